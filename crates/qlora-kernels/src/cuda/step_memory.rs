//! Device memory that the steps of generation use again and again.
//!
//! A step of generation makes and drops some three hundred small matrices. Taken from CUDA's pool, each costs two calls of
//! the driver. So inside [`StepMemory::reuse`] what is dropped is kept, and the next request of about its size gets it: with
//! one stream, its next user runs after the one before. It counts as in use; it is given back with the [`StepMemory`].

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;

use super::gpu::{Gpu, RawMemory};

/// The largest allocation that is kept, in bytes: larger ones go back to the pool at once. Activations of a step are
/// smaller, weights that were dequantized for it are not.
const LARGEST: usize = 32 << 20;

/// Memory of one GPU that is kept for the next step. Cloning gives another handle to the same.
#[derive(Clone, Debug)]
pub struct StepMemory(Arc<Kept>);

#[derive(Debug)]
pub(super) struct Kept {
    /// The free allocations: bytes and address.
    free: Mutex<Vec<(usize, CUdeviceptr)>>,
    gpu: Arc<Gpu>,
}

thread_local! {
    static ACTIVE: RefCell<Option<Arc<Kept>>> = const { RefCell::new(None) };
}

/// While it lives, this thread's allocations on the GPU come from a [`StepMemory`].
#[derive(Debug)]
pub struct MemoryReuse {
    before: Option<Arc<Kept>>,
    /// It belongs to this thread.
    thread: PhantomData<*const ()>,
}

/// Runs `work` with allocations that last longer than a step: they do not come from the memory of steps.
pub(super) fn lasting<T>(work: impl FnOnce() -> T) -> T {
    let _off = MemoryReuse { before: ACTIVE.take(), thread: PhantomData };
    work()
}

impl StepMemory {
    /// Nothing yet.
    pub fn new(gpu: &Arc<Gpu>) -> Self {
        Self(Arc::new(Kept { free: Mutex::default(), gpu: gpu.clone() }))
    }

    /// Lets what this thread allocates on the GPU be used again once it is dropped, until the result is dropped: for work that
    /// does the same over and over.
    pub fn reuse(&self) -> MemoryReuse {
        MemoryReuse { before: ACTIVE.replace(Some(self.0.clone())), thread: PhantomData }
    }
}

impl Drop for MemoryReuse {
    fn drop(&mut self) {
        ACTIVE.set(self.before.take());
    }
}

impl Kept {
    /// The memory that this thread's allocations on `gpu` come from, if they do.
    pub(super) fn active(gpu: &Gpu) -> Option<Arc<Self>> {
        ACTIVE.with_borrow(|active| active.clone()).filter(|kept| std::ptr::eq(&*kept.gpu, gpu))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(usize, CUdeviceptr)>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kept memory of at least `bytes` bytes, and at most twice as much, with its size.
    pub(super) fn take(&self, bytes: usize) -> Option<(usize, CUdeviceptr)> {
        let mut free = self.lock();
        let fits = |size: usize| (bytes..=bytes.saturating_mul(2)).contains(&size);
        let best = (0..free.len()).filter(|&index| fits(free[index].0)).min_by_key(|&index| free[index].0)?;
        Some(free.swap_remove(best))
    }

    pub(super) fn keep(&self, bytes: usize, ptr: CUdeviceptr) {
        if bytes > LARGEST {
            return drop(RawMemory::from_ptr(ptr, bytes, self.gpu.stream().clone()));
        }
        self.lock().push((bytes, ptr));
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        for (bytes, ptr) in std::mem::take(&mut *self.lock()) {
            drop(RawMemory::from_ptr(ptr, bytes, self.gpu.stream().clone()));
        }
    }
}
