//! Owned device memory of plain elements, and pinned host memory.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{result, sys};

use super::counters::count;
use super::gpu::{Gpu, RawMemory, cuda_error};
use crate::error::Result;

/// Device memory.
pub struct Buffer {
    memory: Memory,
    bytes: usize,
    gpu: Arc<Gpu>,
}

enum Memory {
    Owned(RawMemory),
    /// A part of memory that its owner frees.
    Part {
        ptr: sys::CUdeviceptr,
        _owner: Arc<dyn Send + Sync>,
    },
}

impl Buffer {
    /// `bytes` bytes of unspecified content.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(gpu: &Arc<Gpu>, op: &'static str, bytes: usize) -> Result<Self> {
        Ok(Self { memory: Memory::Owned(gpu.alloc(op, bytes)?), bytes, gpu: gpu.clone() })
    }

    /// A part of other memory of this GPU, which lives as long as this.
    ///
    /// # Safety
    /// `owner` keeps the `bytes` bytes from `ptr` on alive, and everything that writes there does so before what reads the part on the
    /// GPU's stream.
    pub(super) unsafe fn part_of(
        gpu: &Arc<Gpu>,
        owner: Arc<dyn Send + Sync>,
        ptr: sys::CUdeviceptr,
        bytes: usize,
    ) -> Self {
        Self { memory: Memory::Part { ptr, _owner: owner }, bytes, gpu: gpu.clone() }
    }

    /// A copy of host memory.
    ///
    /// # Errors
    /// If the memory cannot be had, or the device fails.
    pub fn upload<T: bytemuck::Pod>(gpu: &Arc<Gpu>, op: &'static str, data: &[T]) -> Result<Self> {
        let mut buffer = Self::new(gpu, op, size_of_val(data))?;
        buffer.write(op, 0, data)?;
        Ok(buffer)
    }

    /// Copies host memory to the bytes from `offset` on.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If the data does not fit.
    pub(super) fn write<T: bytemuck::Pod>(&mut self, op: &'static str, offset: usize, data: &[T]) -> Result<()> {
        self.enqueue_write(op, offset, data)
    }

    /// [`Self::write`] from the start, behind everything that reads the memory on the stream so far.
    pub(super) fn overwrite<T: bytemuck::Pod>(&self, op: &'static str, data: &[T]) -> Result<()> {
        self.enqueue_write(op, 0, data)
    }

    fn enqueue_write<T: bytemuck::Pod>(&self, op: &'static str, offset: usize, data: &[T]) -> Result<()> {
        assert!(offset + size_of_val(data) <= self.bytes, "{} bytes from {offset} on", size_of_val(data));
        if data.is_empty() {
            return Ok(());
        }
        self.gpu.bind(op)?;
        let to = self.ptr() + offset as u64;
        // SAFETY: the buffer has room for the data; from pageable memory the copy has read it when it returns.
        unsafe { result::memcpy_htod_async(to, data, self.gpu.stream().cu_stream()) }
            .map_err(|error| cuda_error(op, error))
    }

    /// Copies `len` elements from the byte `offset` on to the host.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If there are not so many.
    pub(super) fn read<T: bytemuck::Pod>(&self, op: &'static str, offset: usize, len: usize) -> Result<Vec<T>> {
        assert!(offset + len * size_of::<T>() <= self.bytes, "{len} elements from {offset} on");
        let mut data = vec![T::zeroed(); len];
        if len > 0 {
            self.gpu.bind(op)?;
            let from = self.ptr() + offset as u64;
            // SAFETY: the buffer has so many bytes; synchronized before the vector is read.
            unsafe { result::memcpy_dtoh_async(&mut data, from, self.gpu.stream().cu_stream()) }
                .map_err(|error| cuda_error(op, error))?;
            self.gpu.synchronize(op)?;
        }
        Ok(data)
    }

    /// The content on the host.
    ///
    /// # Errors
    /// If the device fails.
    ///
    /// # Panics
    /// If the size is not that of whole elements.
    pub fn download<T: bytemuck::Pod>(&self) -> Result<Vec<T>> {
        assert!(self.bytes.is_multiple_of(size_of::<T>()), "{} bytes are no whole elements", self.bytes);
        self.read("copy to the host", 0, self.bytes / size_of::<T>())
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// If the device fails.
    pub fn fill_bytes(&mut self, byte: u8) -> Result<()> {
        const OP: &str = "fill";
        self.gpu.bind(OP)?;
        // SAFETY: the buffer has so many bytes.
        unsafe { result::memset_d8_async(self.ptr(), byte, self.bytes, self.gpu.stream().cu_stream()) }
            .map_err(|error| cuda_error(OP, error))
    }

    /// The size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(crate) fn ptr(&self) -> sys::CUdeviceptr {
        match &self.memory {
            Memory::Owned(memory) => memory.ptr(),
            Memory::Part { ptr, .. } => *ptr,
        }
    }

    pub(super) fn as_ptr<T>(&self) -> *const T {
        self.ptr() as *const T
    }

    pub(super) fn as_mut_ptr<T>(&mut self) -> *mut T {
        self.ptr() as *mut T
    }

    /// Gives the memory up without freeing it.
    ///
    /// # Panics
    /// If it is a part of other memory.
    pub(crate) fn into_ptr(self) -> sys::CUdeviceptr {
        match self.memory {
            Memory::Owned(memory) => memory.into_ptr(),
            Memory::Part { .. } => panic!("a part of other memory is not given away"),
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes)
    }
}

/// Page-locked host memory, which the GPU copies from and to at full speed and while kernels run.
pub struct PinnedBuffer {
    ptr: *mut c_void,
    bytes: usize,
    gpu: Arc<Gpu>,
}

// SAFETY: plain memory, owned.
unsafe impl Send for PinnedBuffer {}
// SAFETY: only read through shared references.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// `bytes` bytes of unspecified content.
    ///
    /// # Errors
    /// If the system does not give so much page-locked memory.
    pub fn new(gpu: &Arc<Gpu>, op: &'static str, bytes: usize) -> Result<Self> {
        gpu.bind(op)?;
        // SAFETY: freed in drop.
        let ptr = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(|error| cuda_error(op, error))?;
        count(&gpu.counting().pinned);
        Ok(Self { ptr, bytes, gpu: gpu.clone() })
    }

    /// The size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn as_ptr(&self) -> *const c_void {
        self.ptr
    }

    /// The memory. No copy into it may be in flight.
    pub(super) fn as_bytes(&self) -> &[u8] {
        // SAFETY: owned memory of so many bytes, of any content, which u8 allows.
        unsafe { std::slice::from_raw_parts(self.ptr.cast(), self.bytes) }
    }

    /// The memory. No copy from or into it may be in flight.
    pub(super) fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), self.bytes) }
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut c_void {
        self.ptr
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let _ = self.gpu.bind("free pinned memory");
        // The driver waits for copies in flight.
        // SAFETY: allocated by `new`, freed once.
        let _ = unsafe { result::free_host(self.ptr) };
    }
}

impl fmt::Debug for PinnedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedBuffer({} bytes)", self.bytes)
    }
}
