//! Time by the GPU's own clock of work that takes less time there than the processor needs to enqueue it.

use candle_core::cuda_backend::cudarc::driver::sys;

use super::gpu::{Gpu, cuda_error};
use crate::error::{Error, Result};

impl Gpu {
    /// Records what `work` enqueues as a CUDA graph and returns the milliseconds that each of `launches` launches of it
    /// takes: the processor's share in enqueuing is not in them, only what lies between kernels on the GPU.
    ///
    /// `work` must have run before, with the same sizes: memory that is allocated, or anything waited for, ends a recording.
    ///
    /// # Errors
    /// Whatever `work` returns, or if the device fails.
    pub fn time_recorded(&self, launches: usize, work: impl FnOnce() -> Result<()>) -> Result<Vec<f64>> {
        const OP: &str = "timing a graph";
        let stream = self.stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(|error| cuda_error(OP, error))?;
        let done = work();
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(|error| cuda_error(OP, error));
        done?;
        let graph = graph?.ok_or_else(|| Error::invalid(OP, "nothing was recorded"))?;
        let launch = || graph.launch().map_err(|error| cuda_error(OP, error));
        launch()?;
        (0..launches).map(|_| self.time(launch)).collect()
    }
}
