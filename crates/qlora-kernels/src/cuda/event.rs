//! A point in the work of a stream that other streams and the host can wait for.

use candle_core::cuda_backend::cudarc::driver::{CudaStream, DriverError, result, sys};

use super::gpu::cuda_error;
use crate::error::Result;

#[derive(Debug)]
pub(super) struct Event(sys::CUevent);

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Marks the work that is enqueued on `stream` so far.
    pub(super) fn record(op: &'static str, stream: &CudaStream) -> Result<Self> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(|error| cuda_error(op, error))?;
        let event = Self(event);
        // SAFETY: both are alive.
        unsafe { result::event::record(event.0, stream.cu_stream()) }.map_err(|error| cuda_error(op, error))?;
        Ok(event)
    }

    /// Makes work that is enqueued on `stream` from now on wait for the event.
    pub(super) fn hold(&self, op: &'static str, stream: &CudaStream) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive; the driver keeps what it needs of the event.
        unsafe { result::stream::wait_event(stream.cu_stream(), self.0, flags) }.map_err(|error| cuda_error(op, error))
    }

    /// Success if the event has happened, `CUDA_ERROR_NOT_READY` if not.
    pub(super) fn query(&self) -> std::result::Result<(), DriverError> {
        // SAFETY: the event is alive.
        unsafe { result::event::query(self.0) }
    }

    /// The host waits until the event has happened.
    pub(super) fn wait(&self, op: &'static str) -> Result<()> {
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.0) }.map_err(|error| cuda_error(op, error))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `record`, destroyed once; the driver waits with the release until the event is done.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
