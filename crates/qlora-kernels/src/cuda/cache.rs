//! The GPU's copy of host data that many operations read.

use std::fmt;
use std::sync::{Arc, OnceLock};

use super::buffer::Buffer;
use super::gpu::Gpu;
use super::step_memory::lasting;
use crate::error::{Error, Result};

/// Filled at the first use and kept as long as its owner; a clone starts empty.
#[derive(Default)]
pub(crate) struct OnDevice(OnceLock<Buffer>);

impl OnDevice {
    /// The copy of `data` on `gpu`.
    ///
    /// # Errors
    /// If the first use was on another GPU, or the memory cannot be had.
    pub(crate) fn get<T: bytemuck::Pod>(&self, gpu: &Gpu, data: &[T]) -> Result<&Buffer> {
        self.get_or_make(gpu, || data)
    }

    /// [`Self::get`] of data that are made at the first use only.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn get_or_make<T: bytemuck::Pod, D: AsRef<[T]>>(
        &self,
        gpu: &Gpu,
        make: impl FnOnce() -> D,
    ) -> Result<&Buffer> {
        const OP: &str = "copy to the GPU";
        let gpu = gpu.arc();
        let buffer = match self.0.get() {
            Some(buffer) => buffer,
            None => {
                let buffer = lasting(|| Buffer::upload(&gpu, OP, make().as_ref()))?;
                self.0.get_or_init(|| buffer)
            }
        };
        if !Arc::ptr_eq(buffer.gpu(), &gpu) {
            return Err(Error::invalid(OP, "the same batch or table was used on another GPU before"));
        }
        Ok(buffer)
    }
}

impl Clone for OnDevice {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for OnDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.get().is_some() { "OnDevice(copied)" } else { "OnDevice(not copied)" })
    }
}
