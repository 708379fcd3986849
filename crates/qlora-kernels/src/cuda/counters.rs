//! Counts of things that are slow to make and should be made once: memory, plans, graphs.
//!
//! A run that is warm makes no more of them; one that does is losing time in every step.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::gpu::Gpu;

/// Counts of a GPU's slow operations since the device was opened: allocations and the like. See [`Gpu::counters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// The number of times the memory pool took more memory from the system. Memory that it gives out again is not
    /// counted.
    pub device_allocations: u64,
    /// Page-locked host buffers that were allocated.
    pub pinned_allocations: u64,
    /// Plans of cuDNN's attention; the forward and the backward of a shape have one each.
    pub cudnn_plans: u64,
    /// Searches of cuBLASLt for the algorithm of a product.
    pub cublaslt_plans: u64,
    /// CUDA graphs that were recorded.
    pub graphs: u64,
}

impl Counters {
    /// The differences from an `earlier` reading.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            device_allocations: self.device_allocations.saturating_sub(earlier.device_allocations),
            pinned_allocations: self.pinned_allocations.saturating_sub(earlier.pinned_allocations),
            cudnn_plans: self.cudnn_plans.saturating_sub(earlier.cudnn_plans),
            cublaslt_plans: self.cublaslt_plans.saturating_sub(earlier.cublaslt_plans),
            graphs: self.graphs.saturating_sub(earlier.graphs),
        }
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device_allocations, pinned_allocations, cudnn_plans, cublaslt_plans, graphs } = self;
        write!(
            f,
            "{device_allocations} device allocations, {pinned_allocations} page-locked allocations, {cudnn_plans} cuDNN \
             plans, {cublaslt_plans} cuBLASLt plans, {graphs} graphs"
        )
    }
}

/// The counts as they grow. cuDNN and cuBLASLt count their plans themselves.
#[derive(Debug, Default)]
pub(super) struct Counting {
    device: AtomicU64,
    /// Bytes that the pool held when it was looked at last.
    reserved: AtomicU64,
    pub(super) pinned: AtomicU64,
    pub(super) graphs: AtomicU64,
}

impl Counting {
    /// The pool holds so many bytes of the system's now.
    pub(super) fn pool_holds(&self, reserved: u64) {
        // Also where it shrank: what it takes then counts again.
        if self.reserved.swap(reserved, Ordering::Relaxed) < reserved {
            self.device.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// One more.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Gpu {
    /// Reads the counts of slow operations so far.
    pub fn counters(&self) -> Counters {
        let counting = self.counting();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            device_allocations: read(&counting.device),
            pinned_allocations: read(&counting.pinned),
            cudnn_plans: self.attention().plans_made(),
            cublaslt_plans: self.blas().searches(),
            graphs: read(&counting.graphs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_the_pool_gives_out_again_does_not_count() {
        let counting = Counting::default();
        for reserved in [10, 10, 30, 30, 20, 30] {
            counting.pool_holds(reserved);
        }
        assert_eq!(counting.device.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn counters_are_subtracted_and_shown() {
        let earlier = Counters { cudnn_plans: 2, ..Counters::default() };
        let now = Counters { cudnn_plans: 6, pinned_allocations: 1, ..earlier };
        assert_eq!(
            now.since(earlier).to_string(),
            "0 device allocations, 1 page-locked allocations, 4 cuDNN plans, 0 cuBLASLt plans, 0 graphs"
        );
    }
}
