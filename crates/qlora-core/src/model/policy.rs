//! The memory policy of a block: the activations kept for its backward, the place of dequantized weights, the share of
//! a batch that the MLP sees at a time. The [planner](super::plan) chooses.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use qlora_kernels::weight::{FrozenCompute, WeightCache};
use serde::{Deserialize, Serialize};

/// The activations that a block's forward keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Keep {
    /// Nothing: no backward follows.
    Nothing,
    /// The input: the backward recomputes the block (gradient checkpointing).
    Input,
    /// The input, in pinned host memory while the blocks above run (on the CPU the same as `Input`).
    Offload,
    /// The activations of attention and its projections, up to the MLP's input: the backward recomputes the MLP alone.
    Attention,
    /// The same, in pinned host memory (on the CPU the same as `Attention`).
    OffloadAttention,
    /// Everything the backward reads.
    Everything,
}

impl Keep {
    /// Whether it moves to host memory.
    pub fn is_offloaded(self) -> bool {
        matches!(self, Self::Offload | Self::OffloadAttention)
    }
}

/// The caches for the dequantized weights of a block's groups, and the treatment of long batches.
#[derive(Debug, Default)]
pub(crate) struct MemoryPolicy {
    pub(super) qkv: WeightCache,
    pub(super) o: WeightCache,
    pub(super) gate_up: WeightCache,
    pub(super) down: WeightCache,
    kept: AtomicBool,
    shared: AtomicBool,
    split: AtomicBool,
    mlp_rows: AtomicUsize,
}

/// Keeps dequantized weights while it is there.
#[derive(Debug)]
pub(super) struct Shared<'a>(Vec<&'a WeightCache>);

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|cache| cache.set_enabled(false));
    }
}

impl MemoryPolicy {
    /// Dequantizes one weight at a time instead of those that share an input together (CUDA only): less memory, more
    /// time, sums in another order.
    pub(crate) fn set_split(&self, split: bool) {
        self.split.store(split, Ordering::Relaxed);
    }

    /// See [`Self::set_split`].
    pub(crate) fn is_split(&self) -> bool {
        self.split.load(Ordering::Relaxed)
    }

    fn caches(&self) -> [&WeightCache; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    /// Chooses the arithmetic of the products with the block's weights (CUDA only), and frees what is kept for another one.
    pub(crate) fn set_frozen_compute(&self, compute: FrozenCompute) {
        self.caches().iter().for_each(|cache| cache.set_compute(compute));
    }

    /// See [`Self::set_frozen_compute`].
    pub(crate) fn frozen_compute(&self) -> FrozenCompute {
        self.qkv.compute()
    }

    /// Keeps the dequantized weights of the whole block from their next use on, or frees them.
    pub(crate) fn set_weights_kept(&self, kept: bool) {
        self.kept.store(kept, Ordering::Relaxed);
        self.caches().iter().for_each(|cache| cache.set_enabled(kept));
    }

    /// Lets uses of a weight that follow each other share one dequantization: those of a recomputed block, and those of
    /// the pieces of a batch. The block's weights then exist together for a while. Without effect where weights are
    /// dequantized one at a time.
    pub(crate) fn set_weights_shared(&self, shared: bool) {
        self.shared.store(shared, Ordering::Relaxed);
    }

    /// Runs the MLP over at most so many rows of a batch at a time; none: over all of them.
    pub(crate) fn set_mlp_rows(&self, rows: Option<usize>) {
        self.mlp_rows.store(rows.unwrap_or(0), Ordering::Relaxed);
    }

    /// See [`Self::set_mlp_rows`].
    pub(crate) fn mlp_rows(&self) -> Option<usize> {
        Some(self.mlp_rows.load(Ordering::Relaxed)).filter(|&rows| rows > 0)
    }

    /// Shares the weights of attention's projections until the result is dropped.
    pub(super) fn share_attention(&self) -> Shared<'_> {
        self.share(&[&self.qkv, &self.o])
    }

    /// Shares the weights of the MLP over a batch of `rows` until the result is dropped. `twice`: gate and up run twice a
    /// piece.
    pub(super) fn share_mlp(&self, rows: usize, twice: bool) -> Shared<'_> {
        match (pieces(rows, self.mlp_rows()).nth(1).is_some(), twice) {
            (true, _) => self.share(&[&self.gate_up, &self.down]),
            (false, true) => self.share(&[&self.gate_up]),
            (false, false) => Shared(Vec::new()),
        }
    }

    fn share<'a>(&'a self, caches: &[&'a WeightCache]) -> Shared<'a> {
        if !self.shared.load(Ordering::Relaxed) || self.kept.load(Ordering::Relaxed) || self.is_split() {
            return Shared(Vec::new());
        }
        caches.iter().for_each(|cache| cache.set_enabled(true));
        Shared(caches.to_vec())
    }
}

/// The rows of each piece of a batch, `step` in each if it is cut.
pub(super) fn pieces(rows: usize, step: Option<usize>) -> impl Iterator<Item = Range<usize>> {
    let step = step.unwrap_or(rows).max(1);
    (0..rows).step_by(step).map(move |start| start..(start + step).min(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_batch_once() {
        assert!(pieces(7, None).eq(std::iter::once(0..7)));
        assert_eq!(pieces(7, Some(3)).collect::<Vec<_>>(), [0..3, 3..6, 6..7]);
        assert_eq!(pieces(0, Some(3)).count() + pieces(0, None).count(), 0);
    }

    #[test]
    fn sharing_ends_and_leaves_kept_weights_alone() {
        let policy = MemoryPolicy::default();
        drop(policy.share_attention());
        assert!(!policy.qkv.enabled(), "sharing is off unless asked for");
        policy.set_weights_shared(true);
        {
            let _shared = policy.share_attention();
            assert!(policy.qkv.enabled() && policy.o.enabled() && !policy.down.enabled());
        }
        assert!(!policy.qkv.enabled() && !policy.o.enabled());
        {
            let _shared = policy.share_mlp(8, true);
            assert!(policy.gate_up.enabled() && !policy.down.enabled(), "down runs once a batch");
        }
        policy.set_weights_kept(true);
        drop(policy.share_mlp(8, true));
        assert!(policy.gate_up.enabled());
        policy.set_weights_kept(false);
        policy.set_split(true);
        let _shared = policy.share_attention();
        assert!(!policy.qkv.enabled());
    }
}
