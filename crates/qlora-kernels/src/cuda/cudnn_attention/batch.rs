//! cuDNN's data of one batch: made at its first layer, used by all of them.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::OP;
use crate::cuda::buffer::Buffer;
use crate::cuda::cache::OnDevice;
use crate::cuda::cudnn::PackedLayout;
use crate::cuda::gpu::Gpu;
use crate::cuda::step_memory::lasting;
use crate::error::Result;
use crate::ops::attention::route::Bounds;
use crate::sequence::SequenceLayout;

/// Belongs to a [`SequenceLayout`]; a clone of that starts empty.
#[derive(Default)]
pub(crate) struct AttentionBatch {
    /// Whether the shape of its sequences of one length gets plans of its own.
    admitted: OnceLock<bool>,
    /// The packed batch; none if there are no bounds for it.
    packed: OnceLock<Option<PackedBatch>>,
}

/// Sequences in a packed plan's bounds, and the GPU's copy of where they lie.
pub(crate) struct PackedBatch {
    pub(super) bounds: Bounds,
    layout: PackedLayout,
    lengths: OnDevice,
    /// By row stride.
    offsets: Mutex<Vec<(i64, Buffer)>>,
}

impl AttentionBatch {
    pub(super) fn admitted(&self, decide: impl FnOnce() -> bool) -> bool {
        *self.admitted.get_or_init(decide)
    }

    pub(super) fn packed(
        &self,
        layout: &SequenceLayout,
        bounds: impl FnOnce() -> Option<Bounds>,
    ) -> Option<&PackedBatch> {
        let make = |bounds: Bounds| {
            let lengths: Vec<usize> = layout.sequences().map(|rows| rows.len()).collect();
            let layout = PackedLayout::with_bounds(&lengths, bounds.sequences as i64, bounds.len as i64);
            PackedBatch { bounds, layout, lengths: OnDevice::default(), offsets: Mutex::default() }
        };
        self.packed.get_or_init(|| bounds().map(make)).as_ref()
    }
}

/// Device addresses of a packed batch.
pub(super) struct Placed {
    pub(super) tokens: i64,
    pub(super) lengths: u64,
    pub(super) offsets: Vec<(i64, u64)>,
}

impl PackedBatch {
    /// Lengths, and offsets for rows of `strides` elements, on a GPU: copied at the first use, a few hundred bytes each.
    pub(super) fn on_device(&self, gpu: &Gpu, strides: &[i64]) -> Result<Placed> {
        // Refuses another GPU than the first.
        let lengths = self.lengths.get(gpu, &self.layout.lengths)?.ptr();
        let mut known = self.offsets.lock().unwrap_or_else(PoisonError::into_inner);
        let mut offsets: Vec<(i64, u64)> = Vec::with_capacity(strides.len());
        for &stride in strides {
            if offsets.iter().any(|(there, _)| *there == stride) {
                continue;
            }
            let ptr = match known.iter().find(|(there, _)| *there == stride) {
                Some((_, buffer)) => buffer.ptr(),
                None => {
                    let gpu: Arc<Gpu> = gpu.arc();
                    let buffer = lasting(|| Buffer::upload(&gpu, OP, &self.layout.offsets(stride)))?;
                    let ptr = buffer.ptr();
                    known.push((stride, buffer));
                    ptr
                }
            };
            offsets.push((stride, ptr));
        }
        Ok(Placed { tokens: self.layout.tokens, lengths, offsets })
    }
}

impl Clone for AttentionBatch {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for AttentionBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bounds = self.packed.get().and_then(|packed| packed.as_ref()).map(|packed| packed.bounds);
        write!(f, "AttentionBatch(admitted {:?}, bounds {bounds:?})", self.admitted.get())
    }
}
