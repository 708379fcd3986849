//! Time by the GPU's own clock of work that takes less time there than the processor needs to enqueue it.

use super::gpu::Gpu;
use super::step_memory::StepMemory;
use crate::error::{Error, Result};

impl Gpu {
    /// Records what `work` enqueues as a CUDA graph and returns the milliseconds that each of `launches` launches of it
    /// takes: the processor's share in enqueuing is not in them, only what lies between kernels on the GPU.
    ///
    /// # Errors
    /// The error of `work`, an operation of it that cannot be recorded, or a failure of the device.
    pub fn time_recorded(&self, launches: usize, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let gpu = self.arc();
        let memory = StepMemory::new(&gpu);
        let reuse = memory.reuse();
        // The memory that the recording needs is there afterwards.
        work()?;
        let recorded = gpu.capture(&[], work)?;
        drop(reuse);
        let refused = || Error::invalid("timing a graph", "the work cannot be recorded");
        let (graph, ()) = recorded.ok_or_else(refused)?;
        let launch = || if graph.launch()? { Ok(()) } else { Err(refused()) };
        launch()?;
        (0..launches).map(|_| self.time(launch)).collect()
    }
}
