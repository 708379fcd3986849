//! The layout of a batch: the sequences among its rows.
//!
//! A batch is always its documents one after the other, without padding: `tokens` rows, cut into sequences that do not
//! see each other. Positions restart at 0 in each (what Hugging Face calls padding-free, with `cu_seqlens`).

use std::ops::{Deref, Range};

#[cfg(feature = "cuda")]
use crate::cuda::{AttentionBatch, Buffer, Gpu, OnDevice};
#[cfg(feature = "cuda")]
use crate::error::Result;

/// The position of every token of a batch in its sequence, with the GPU's copy once one was needed.
#[derive(Clone, Debug, Default)]
pub struct Positions {
    values: Vec<u32>,
    #[cfg(feature = "cuda")]
    device: OnDevice,
}

impl From<Vec<u32>> for Positions {
    fn from(values: Vec<u32>) -> Self {
        Self {
            values,
            #[cfg(feature = "cuda")]
            device: OnDevice::default(),
        }
    }
}

impl Deref for Positions {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.values
    }
}

impl PartialEq for Positions {
    fn eq(&self, other: &Self) -> bool {
        self.values == other.values
    }
}

impl Eq for Positions {}

#[cfg(feature = "cuda")]
impl Positions {
    pub(crate) fn on_device(&self, gpu: &Gpu) -> Result<&Buffer> {
        self.device.get(gpu, &self.values)
    }
}

/// The boundaries of the sequences in a batch and the position of every token; built once a batch, used by all layers.
#[derive(Clone, Debug)]
pub struct SequenceLayout {
    bounds: Vec<usize>,
    positions: Positions,
    max_len: usize,
    #[cfg(feature = "cuda")]
    device: OnDevice,
    #[cfg(feature = "cuda")]
    attention: AttentionBatch,
}

impl PartialEq for SequenceLayout {
    fn eq(&self, other: &Self) -> bool {
        self.bounds == other.bounds
    }
}

impl Eq for SequenceLayout {}

impl SequenceLayout {
    /// Sequences of the given lengths; empty ones are left out.
    pub fn from_lengths(lengths: &[usize]) -> Self {
        let mut bounds = vec![0];
        let mut positions = Vec::with_capacity(lengths.iter().sum());
        for &len in lengths.iter().filter(|&&len| len > 0) {
            bounds.push(positions.len() + len);
            positions.extend(0..u32::try_from(len).expect("a sequence has fewer than 2^32 tokens"));
        }
        Self {
            bounds,
            positions: positions.into(),
            max_len: lengths.iter().copied().max().unwrap_or(0),
            #[cfg(feature = "cuda")]
            device: OnDevice::default(),
            #[cfg(feature = "cuda")]
            attention: AttentionBatch::default(),
        }
    }

    /// The number of tokens (rows).
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// The rows of each sequence.
    pub fn sequences(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.bounds.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// The position of every token in its sequence, from 0.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// The length that all sequences have, if they have the same.
    pub fn uniform_len(&self) -> Option<usize> {
        let uniform = self.sequences().all(|rows| rows.len() == self.max_len);
        (uniform && self.max_len > 0).then_some(self.max_len)
    }

    /// The boundaries on a GPU: `i32`, one more than there are sequences.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(&self, gpu: &Gpu) -> Result<&Buffer> {
        let bound = |&bound: &usize| i32::try_from(bound).unwrap_or(i32::MAX);
        self.device.get_or_make(gpu, || self.bounds.iter().map(bound).collect::<Vec<i32>>())
    }

    /// The GPU attention path chosen for this batch, and the batch's copies on the GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn attention(&self) -> &AttentionBatch {
        &self.attention
    }

    /// The longest sequence.
    pub fn max_len(&self) -> usize {
        self.max_len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_restart_in_every_sequence() {
        let layout = SequenceLayout::from_lengths(&[3, 0, 2]);
        assert_eq!(**layout.positions(), [0, 1, 2, 0, 1]);
        assert_eq!(layout.sequences().collect::<Vec<_>>(), [0..3, 3..5]);
        assert_eq!((layout.tokens(), layout.max_len()), (5, 3));
        assert_eq!(SequenceLayout::from_lengths(&[]).sequences().len(), 0);
    }
}
