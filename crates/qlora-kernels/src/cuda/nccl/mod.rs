//! Sums between the GPUs of several processes, and exchanges of matrices, by NCCL, which is opened at run time: no program needs it to
//! start.
//!
//! Communicators are nonblocking: while the library or the GPU waits for another process, the caller is asked again and again
//! whether to go on waiting. That, and [abort](Nccl) in the end, is what keeps a process from hanging when another is gone.

mod api;
mod exchange;

use std::ffi::c_int;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::sys;

use super::event::Event;
use super::gpu::{Gpu, cuda_error};
use crate::error::{Error, Result};
use crate::view::ViewMut;
use api::{Api, Comm, Config, F32, IN_PROGRESS, SUCCESS, SUM, UniqueId};

/// The length of the bytes by which processes find each other.
pub const ID_BYTES: usize = 128;

const OP: &str = "NCCL";

/// Asked while waiting; an error ends the wait.
pub type KeepWaiting<'a> = &'a dyn Fn() -> std::result::Result<(), String>;

/// A process among those that add.
pub struct Nccl {
    api: &'static Api,
    comm: Comm,
    gpu: Arc<Gpu>,
    size: usize,
}

// SAFETY: NCCL allows a communicator to be used from any thread, one at a time; all uses take `&mut self`.
unsafe impl Send for Nccl {}

/// The bytes that the first process makes and gives to the others.
///
/// # Errors
/// If there is no NCCL.
pub fn new_id() -> Result<[u8; ID_BYTES]> {
    let api = Api::get()?;
    let mut id = UniqueId([0; ID_BYTES]);
    // SAFETY: a valid place for the result.
    match unsafe { (api.get_unique_id)(&mut id) } {
        SUCCESS => Ok(id.0),
        status => Err(api.describe("ncclGetUniqueId", status, std::ptr::null_mut())),
    }
}

/// Version and place of the library, for messages.
///
/// # Errors
/// If there is none that can be used; the message says where it was looked for.
pub fn describe() -> Result<String> {
    let api = Api::get()?;
    Ok(format!("NCCL {} ({})", version_text(api.version()), api.path))
}

/// `2.28.9` of 22809.
fn version_text(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

impl Nccl {
    /// Joins the others, who all call this with the same id.
    ///
    /// # Errors
    /// If they do not come before `keep_waiting` fails, or NCCL cannot connect them.
    pub fn join(
        device: &Device,
        id: [u8; ID_BYTES],
        rank: usize,
        size: usize,
        keep_waiting: KeepWaiting<'_>,
    ) -> Result<Self> {
        let (api, gpu) = (Api::get()?, Gpu::of(device)?);
        gpu.bind(OP)?;
        let mut this = Self { api, comm: std::ptr::null_mut(), gpu, size };
        let mut config = Config::nonblocking();
        let number = |n: usize| c_int::try_from(n).map_err(|_| Error::invalid(OP, format!("{n} ranks are too many")));
        let (size, rank) = (number(size)?, number(rank)?);
        // SAFETY: valid places for communicator and configuration; the GPU's context is current.
        let status = unsafe { (api.init_rank)(&mut this.comm, size, UniqueId(id), rank, &mut config) };
        this.finish("ncclCommInitRankConfig", status, keep_waiting)?;
        Ok(this)
    }

    /// Replaces `values` (f32, one row) by the sum of everybody's, and returns when it is there. The same bits everywhere; of
    /// two processes also the same in every run.
    ///
    /// # Errors
    /// If `keep_waiting` fails, a process or connection is lost, or the values are not f32 of this GPU.
    pub fn sum(&mut self, values: ViewMut, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        if self.comm.is_null() {
            return Err(Error::invalid(OP, "the connection was given up after an earlier failure"));
        }
        let summed = self.enqueue_sum(values, keep_waiting);
        if summed.is_err() {
            // A kernel that waits for another GPU would keep the stream, and whoever waits for it, for ever.
            self.abort();
        }
        summed
    }

    fn enqueue_sum(&mut self, values: ViewMut, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let values = values.cuda(OP)?;
        let len = values.rows() * values.cols();
        super::view::one_gpu(OP, &self.gpu, [values.gpu()])?;
        let pointer = super::ops::vector_mut(OP, "values", values, len)?;
        self.gpu.bind(OP)?;
        let stream = self.gpu.stream().clone();
        // SAFETY: `len` live f32 elements, which are read and written in place; the stream outlives the call.
        let status = unsafe {
            (self.api.all_reduce)(pointer.cast(), pointer.cast(), len, F32, SUM, self.comm, stream.cu_stream().cast())
        };
        self.finish("ncclAllReduce", status, keep_waiting)?;
        let done = Event::record(OP, &stream)?;
        self.wait(|| done.happened(OP), "ncclAllReduce", keep_waiting)
    }

    /// Ends the connection. Unlike destroying it, that waits for nobody.
    fn abort(&mut self) {
        let comm = std::mem::replace(&mut self.comm, std::ptr::null_mut());
        if !comm.is_null() {
            let _ = self.gpu.bind(OP);
            // SAFETY: a communicator that is not used again.
            unsafe { (self.api.abort)(comm) };
        }
    }

    /// Waits until a call has enqueued what it has to.
    fn finish(&self, call: &str, status: c_int, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        if status != SUCCESS && status != IN_PROGRESS {
            return Err(self.api.describe(call, status, self.comm));
        }
        self.wait(|| Ok(self.state(call)? == SUCCESS), call, keep_waiting)
    }

    /// The communicator's state: success, or still in progress.
    fn state(&self, call: &str) -> Result<c_int> {
        let mut state = SUCCESS;
        // SAFETY: a live communicator and a valid place for the result.
        let status = unsafe { (self.api.async_error)(self.comm, &mut state) };
        match (status, state) {
            (SUCCESS, SUCCESS | IN_PROGRESS) => Ok(state),
            (SUCCESS, failed) | (failed, _) => Err(self.api.describe(call, failed, self.comm)),
        }
    }

    fn wait(&self, done: impl Fn() -> Result<bool>, call: &str, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let start = Instant::now();
        loop {
            if done()? {
                return Ok(());
            }
            // Failures of other processes show here and nowhere else.
            self.state(call)?;
            keep_waiting().map_err(|why| Error::invalid(OP, why))?;
            match start.elapsed() {
                waited if waited < Duration::from_millis(5) => std::hint::spin_loop(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
        }
    }
}

impl Event {
    /// Whether the event has happened.
    fn happened(&self, op: &'static str) -> Result<bool> {
        match self.query() {
            Ok(()) => Ok(true),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => Err(cuda_error(op, error)),
        }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.abort();
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nccl({})", self.gpu.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(version_text(22_809), "2.28.9");
        assert_eq!(version_text(21_803), "2.18.3");
    }
}
