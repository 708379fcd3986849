//! Device memory that the steps of generation use again and again.
//!
//! A step of generation makes and drops some three hundred small matrices. Taken from CUDA's pool, each costs two calls of
//! the driver, and an allocation or a release between two kernels keeps the second from being started before the first is
//! done (programmatic dependent launch), which matters when kernels take microseconds. So inside [`Gpu::reuse_memory`] what is
//! dropped is kept, and the next request of about its size gets it: with one stream, whoever gets it runs after whoever had
//! it. It counts as in use; `Workspace::trim` gives it back, and so does a GPU that runs out of memory.

use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;

use super::gpu::{Gpu, RawMemory};

/// The memory that nobody holds: bytes and address.
#[derive(Debug, Default)]
pub(super) struct StepMemory(Mutex<Vec<(usize, CUdeviceptr)>>);

thread_local! {
    /// The GPU whose memory this thread takes from there, by its address.
    static ACTIVE: Cell<usize> = const { Cell::new(0) };
}

/// While it lives, this thread's allocations on a GPU come from its step memory.
#[derive(Debug)]
pub struct MemoryReuse {
    before: usize,
}

impl Gpu {
    /// Lets what this thread allocates on this GPU be used again once it is dropped, until the result is dropped: for work
    /// that does the same over and over.
    pub fn reuse_memory(&self) -> MemoryReuse {
        MemoryReuse { before: ACTIVE.replace(std::ptr::from_ref(self).addr()) }
    }

    pub(super) fn reuses_memory(&self) -> bool {
        ACTIVE.get() == std::ptr::from_ref(self).addr()
    }

    /// Gives the memory that no step holds back to the pool.
    pub fn release_step_memory(&self) {
        let kept = std::mem::take(&mut *self.step_memory().lock());
        for (_, ptr) in kept {
            drop(RawMemory::from_ptr(ptr, self.stream().clone()));
        }
    }
}

impl Drop for MemoryReuse {
    fn drop(&mut self) {
        ACTIVE.set(self.before);
    }
}

impl StepMemory {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(usize, CUdeviceptr)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kept memory of at least `bytes` bytes, and at most twice as much, with its size.
    pub(super) fn take(&self, bytes: usize) -> Option<(usize, CUdeviceptr)> {
        let mut kept = self.lock();
        let fits = |size: usize| (bytes..=bytes.saturating_mul(2)).contains(&size);
        let best = (0..kept.len()).filter(|&index| fits(kept[index].0)).min_by_key(|&index| kept[index].0)?;
        Some(kept.swap_remove(best))
    }

    pub(super) fn keep(&self, bytes: usize, ptr: CUdeviceptr) {
        self.lock().push((bytes, ptr));
    }
}
