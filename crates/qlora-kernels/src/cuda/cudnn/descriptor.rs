//! One backend descriptor: created, given attributes, finalized, and destroyed with its owner.

use std::ffi::{c_int, c_void};

use super::api::{Api, Handle, Kind, RawDescriptor, kind_of_value};
use super::error::Result;

/// An owned `cudnnBackendDescriptor_t`.
pub(super) struct Descriptor {
    api: &'static Api,
    kind: Kind,
    raw: RawDescriptor,
}

// SAFETY: a descriptor is plain host memory of cuDNN without ties to the thread that made it. It is changed only
// through `&mut self`; finalized ones are only read.
unsafe impl Send for Descriptor {}
// SAFETY: as above; shared use only reads.
unsafe impl Sync for Descriptor {}

impl Descriptor {
    /// An empty descriptor of `kind`.
    pub(super) fn new(api: &'static Api, kind: Kind) -> Result<Self> {
        let mut raw: RawDescriptor = std::ptr::null_mut();
        // SAFETY: `raw` is a valid place for the result.
        let status = unsafe { (api.create_descriptor)(kind as c_int, &mut raw) };
        api.check(status, || format!("cudnnBackendCreateDescriptor of {kind:?}"))?;
        Ok(Self { api, kind, raw })
    }

    /// The pointer, for attributes of other descriptors and for execution.
    pub(super) fn raw(&self) -> RawDescriptor {
        self.raw
    }

    /// Ends construction; cuDNN checks the descriptor here.
    pub(super) fn finalize(&mut self) -> Result<()> {
        // SAFETY: the descriptor is alive.
        let status = unsafe { (self.api.finalize)(self.raw) };
        self.api.check(status, || format!("cudnnBackendFinalize of {:?}", self.kind))
    }

    fn set(&mut self, name: i32, value_kind: i32, count: usize, values: *const c_void) -> Result<()> {
        // SAFETY: the callers below pass `count` values of the C type that belongs to `value_kind`.
        let status = unsafe { (self.api.set_attribute)(self.raw, name, value_kind, count as i64, values) };
        self.api.check(status, || format!("cudnnBackendSetAttribute {name} of {:?}", self.kind))
    }

    /// Sets 64-bit integers.
    pub(super) fn set_i64(&mut self, name: i32, values: &[i64]) -> Result<()> {
        self.set(name, kind_of_value::INT64, values.len(), values.as_ptr().cast())
    }

    /// Sets one value of a C enumeration (`value_kind` says which).
    pub(super) fn set_enum(&mut self, name: i32, value_kind: i32, value: i32) -> Result<()> {
        self.set(name, value_kind, 1, (&raw const value).cast())
    }

    /// Sets a flag.
    pub(super) fn set_bool(&mut self, name: i32, value: bool) -> Result<()> {
        let value = u8::from(value);
        self.set(name, kind_of_value::BOOLEAN, 1, (&raw const value).cast())
    }

    /// Sets a text (with its final zero, as cuDNN counts it).
    pub(super) fn set_text(&mut self, name: i32, text: &str) -> Result<()> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.set(name, kind_of_value::CHAR, bytes.len(), bytes.as_ptr().cast())
    }

    /// Sets the library handle.
    pub(super) fn set_handle(&mut self, name: i32, handle: Handle) -> Result<()> {
        self.set(name, kind_of_value::HANDLE, 1, (&raw const handle).cast())
    }

    /// Sets pointers (device addresses, or host addresses of values passed by value).
    pub(super) fn set_pointers(&mut self, name: i32, pointers: &[*mut c_void]) -> Result<()> {
        self.set(name, kind_of_value::VOID_PTR, pointers.len(), pointers.as_ptr().cast())
    }

    /// Sets other descriptors.
    pub(super) fn set_descriptors(&mut self, name: i32, descriptors: &[RawDescriptor]) -> Result<()> {
        self.set(name, kind_of_value::BACKEND_DESCRIPTOR, descriptors.len(), descriptors.as_ptr().cast())
    }

    /// Reads one 64-bit integer.
    pub(super) fn get_i64(&self, name: i32) -> Result<i64> {
        let (mut value, mut count) = (0i64, 0i64);
        // SAFETY: room for one integer is offered.
        let status = unsafe {
            (self.api.get_attribute)(self.raw, name, kind_of_value::INT64, 1, &mut count, (&raw mut value).cast())
        };
        self.api.check(status, || format!("cudnnBackendGetAttribute {name} of {:?}", self.kind))?;
        Ok(value)
    }

    /// Reads descriptors of `kind`: all of them, but at most `limit`.
    pub(super) fn get_descriptors(&self, name: i32, kind: Kind, limit: usize) -> Result<Vec<Descriptor>> {
        let what = || format!("cudnnBackendGetAttribute {name} of {:?}", self.kind);
        let value_kind = kind_of_value::BACKEND_DESCRIPTOR;
        let mut count = 0i64;
        // SAFETY: asks for the number only; nothing is written but `count`.
        let status =
            unsafe { (self.api.get_attribute)(self.raw, name, value_kind, 0, &mut count, std::ptr::null_mut()) };
        self.api.check(status, what)?;
        // cuDNN fills descriptors that the caller made.
        let results = (0..(count.max(0) as usize).min(limit))
            .map(|_| Descriptor::new(self.api, kind))
            .collect::<Result<Vec<_>>>()?;
        let mut raw: Vec<RawDescriptor> = results.iter().map(Descriptor::raw).collect();
        if raw.is_empty() {
            return Ok(results);
        }
        let mut filled = 0i64;
        // SAFETY: `raw` holds as many live descriptors of the right kind as are asked for.
        let status = unsafe {
            (self.api.get_attribute)(self.raw, name, value_kind, raw.len() as i64, &mut filled, raw.as_mut_ptr().cast())
        };
        self.api.check(status, what)?;
        Ok(results.into_iter().take(filled.max(0) as usize).collect())
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: created by us and destroyed once. A failure to destroy leaves nothing to be done.
        let _ = unsafe { (self.api.destroy_descriptor)(self.raw) };
    }
}
