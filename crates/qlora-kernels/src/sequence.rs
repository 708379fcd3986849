//! How the rows of a batch fall into sequences.
//!
//! A batch is always its documents one after the other, without padding: `tokens` rows, cut into sequences that do not
//! see each other. Positions restart at 0 in each (what Hugging Face calls padding-free, with `cu_seqlens`).

use std::ops::Range;

/// The boundaries of the sequences in a batch and the position of every token; built once a batch, used by all layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequenceLayout {
    bounds: Vec<usize>,
    positions: Vec<u32>,
    max_len: usize,
}

impl SequenceLayout {
    /// Sequences of the given lengths; empty ones are left out.
    pub fn from_lengths(lengths: &[usize]) -> Self {
        let mut bounds = vec![0];
        let mut positions = Vec::with_capacity(lengths.iter().sum());
        for &len in lengths.iter().filter(|&&len| len > 0) {
            bounds.push(positions.len() + len);
            positions.extend(0..u32::try_from(len).expect("a sequence has fewer than 2^32 tokens"));
        }
        Self { bounds, positions, max_len: lengths.iter().copied().max().unwrap_or(0) }
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
    pub fn positions(&self) -> &[u32] {
        &self.positions
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
        assert_eq!(layout.positions(), [0, 1, 2, 0, 1]);
        assert_eq!(layout.sequences().collect::<Vec<_>>(), [0..3, 3..5]);
        assert_eq!((layout.tokens(), layout.max_len()), (5, 3));
        assert_eq!(SequenceLayout::from_lengths(&[]).sequences().len(), 0);
    }
}
