//! Scratch memory of loading, used again for every weight.
//!
//! Quantizing takes a weight's source and its absmax values for a moment. Allocated anew each time, they leave holes
//! between the codes that stay, too small for the next weight: after an 8B model, 1.1 GB of a pool could not be used.

use std::sync::{Arc, Mutex, PoisonError};

use super::buffer::Buffer;
use super::gpu::Gpu;
use crate::error::Result;

/// The scratch memory that nobody holds.
#[derive(Debug, Default)]
pub(super) struct Staging(Mutex<Option<Buffer>>);

impl Gpu {
    /// At least `bytes` bytes, to be given back by [`Self::keep_staging`].
    pub(super) fn take_staging(self: &Arc<Self>, op: &'static str, bytes: usize) -> Result<Buffer> {
        let kept = self.staging().0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match kept.filter(|buffer| buffer.bytes() >= bytes) {
            Some(buffer) => Ok(buffer),
            None => Buffer::new(self, op, bytes),
        }
    }

    pub(super) fn keep_staging(&self, buffer: Buffer) {
        *self.staging().0.lock().unwrap_or_else(PoisonError::into_inner) = Some(buffer);
    }

    /// Frees the scratch memory of loading: to be called when a model is loaded.
    pub fn release_staging(&self) {
        *self.staging().0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
