//! The memory pool of a GPU: how much is used, how much at most, and how much may be.
//!
//! All device memory comes from one CUDA memory pool (`cuMemAllocAsync`). The pool keeps what it was given, or every
//! synchronization would hand memory back to the system and fetch it again. Its own counter of the most bytes in use at
//! one time is the peak that we report.
//!
//! The pool belongs to the GPU and the process, not to a device that was opened: the driver takes all memory, also that of
//! devices opened earlier, from the pool that was set last. So every question goes to that one.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaContext, result, sys};

use super::gpu::cuda_error;
use crate::error::{Error, Result};

const OP: &str = "memory pool";

/// A GPU's memory pool.
#[derive(Debug)]
pub struct Pool {
    device: sys::CUdevice,
    context: Arc<CudaContext>,
    /// The peak before the driver's counter was set back for a reservation.
    earlier_peak: AtomicU64,
}

/// The limits of the pools that were made with one, by address; they live as long as the process.
static LIMITS: Mutex<Vec<(usize, u64)>> = Mutex::new(Vec::new());

/// Bytes that were taken beside the pool, by the GPU's number: memory that other processes read cannot come from it.
static BESIDE: Mutex<Vec<(usize, u64)>> = Mutex::new(Vec::new());

impl super::gpu::Gpu {
    /// Lets the pool take so many bytes more from the system now instead of during a step, if they are there: a run whose
    /// peak is known then takes none anew, whatever batches come.
    ///
    /// # Errors
    /// If the device fails.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        let before = self.pool().peak()?;
        // Freed at once: the pool keeps it. Without so much in one piece, steps take what they need.
        drop(self.alloc(OP, bytes as usize));
        // Nobody used it: it is no peak of the run's.
        self.synchronize(OP)?;
        self.pool().restore_peak(before)
    }
}

impl Pool {
    /// Makes an earlier peak that of the run so far: what was in use since, and is no more, was none of the run's.
    pub(super) fn restore_peak(&self, before: u64) -> Result<()> {
        self.reset_peak()?;
        self.earlier_peak.store(before, Ordering::Relaxed);
        Ok(())
    }

    /// The GPU's pool as it is, or with a limit a new one that takes its place for the whole process.
    pub(super) fn open(context: Arc<CudaContext>, limit: Option<u64>) -> Result<Self> {
        let ordinal = context.ordinal();
        context.bind_to_thread().map_err(|error| cuda_error(OP, error))?;
        let device = result::device::get(ordinal as i32).map_err(|error| cuda_error(OP, error))?;
        if let Some(limit) = limit {
            // SAFETY: all-zero is a valid value of this plain struct.
            let mut props: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
            props.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
            props.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
            props.location.id = ordinal as i32;
            props.maxSize = limit as usize;
            // SAFETY: the properties are filled in.
            let pool = unsafe { result::mem_pool::create(&raw const props) }.map_err(|error| cuda_error(OP, error))?;
            LIMITS.lock().unwrap_or_else(PoisonError::into_inner).push((pool as usize, limit));
            // SAFETY: the device exists; the pool lives as long as the process.
            unsafe { result::device::set_mem_pool(device, pool) }.map_err(|error| cuda_error(OP, error))?;
        }
        let pool = Self { device, context, earlier_peak: AtomicU64::new(0) };
        pool.set(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)?;
        Ok(pool)
    }

    /// The pool that memory comes from now.
    fn handle(&self) -> Result<sys::CUmemoryPool> {
        // SAFETY: the device exists.
        unsafe { result::device::get_mem_pool(self.device) }.map_err(|error| cuda_error(OP, error))
    }

    /// Bytes in use, those beside the pool included.
    pub fn used(&self) -> Result<u64> {
        Ok(self.get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)? + self.beside())
    }

    /// Bytes in use that did not come from the pool: they count as used, in the peak, and against the limit.
    pub fn beside(&self) -> u64 {
        let beside = BESIDE.lock().unwrap_or_else(PoisonError::into_inner);
        let ordinal = self.context.ordinal();
        beside.iter().find(|(of, _)| *of == ordinal).map_or(0, |(_, bytes)| *bytes)
    }

    /// Counts bytes that were taken beside the pool (`taken`), or given back.
    pub(super) fn count_beside(&self, bytes: u64, taken: bool) {
        let mut beside = BESIDE.lock().unwrap_or_else(PoisonError::into_inner);
        let ordinal = self.context.ordinal();
        if !beside.iter().any(|(of, _)| *of == ordinal) {
            beside.push((ordinal, 0));
        }
        for (_, count) in beside.iter_mut().filter(|(of, _)| *of == ordinal) {
            *count = if taken { *count + bytes } else { count.saturating_sub(bytes) };
        }
    }

    /// The most bytes in use at one time, since the start or [`Self::reset_peak`].
    pub fn peak(&self) -> Result<u64> {
        let counted = self.get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?;
        Ok((counted + self.beside()).max(self.earlier_peak.load(Ordering::Relaxed)))
    }

    /// Bytes taken from the system, in use or not.
    pub fn reserved(&self) -> Result<u64> {
        self.get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)
    }

    /// Lets [`Self::peak`] start again from the memory in use.
    pub fn reset_peak(&self) -> Result<()> {
        self.earlier_peak.store(0, Ordering::Relaxed);
        self.set(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)
    }

    /// Gives memory that is not in use back to the system.
    pub fn trim(&self) -> Result<()> {
        // SAFETY: the pool lives as long as the process.
        unsafe { result::mem_pool::trim_to(self.handle()?, 0) }.map_err(|error| cuda_error(OP, error))
    }

    /// The limit of the pool that memory comes from now: that of the last device that was opened with one.
    pub fn limit(&self) -> Option<u64> {
        let handle = self.handle().ok()? as usize;
        let limits = LIMITS.lock().unwrap_or_else(PoisonError::into_inner);
        limits.iter().find(|(pool, _)| *pool == handle).map(|(_, limit)| *limit)
    }

    /// Bytes that can still be had: what the limit, or the GPU, has left.
    pub fn available(&self) -> Result<u64> {
        self.context.bind_to_thread().map_err(|error| cuda_error(OP, error))?;
        let (free, _) = result::mem_get_info().map_err(|error| cuda_error(OP, error))?;
        let idle = (self.reserved()? + self.beside()).saturating_sub(self.used()?);
        let physical = free as u64 + idle;
        Ok(match self.limit() {
            None => physical,
            Some(limit) => physical.min(limit.saturating_sub(self.used()?)),
        })
    }

    /// Bytes that a plan may count on, out of `budget` or of all that can be had: a pool loses memory between pieces that
    /// do not fit. Of 8.59 GB, requests that would have made it 8.12 and 8.20 in use failed, 8.11 did not.
    ///
    /// # Errors
    /// If the device fails.
    pub fn plannable(&self, budget: Option<u64>) -> Result<u64> {
        let (there, beside) = (self.used()? + self.available()?, self.beside());
        // What lies beside the pool is one piece, which loses nothing.
        Ok(beside + budget.unwrap_or(u64::MAX).min(there).saturating_sub(beside) / 100 * 93)
    }

    pub(super) fn out_of_memory(&self, op: &'static str, bytes: usize) -> Error {
        let used = self.used().unwrap_or(0);
        let available = self.available().unwrap_or(0);
        Error::OutOfMemory { op, requested: bytes as u64, used, available, limit: self.limit() }
    }

    fn get(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: all attributes asked for are 64-bit.
        unsafe { result::mem_pool::get_attribute(self.handle()?, attribute, (&raw mut value).cast::<c_void>()) }
            .map_err(|error| cuda_error(OP, error))?;
        Ok(value)
    }

    fn set(&self, attribute: sys::CUmemPool_attribute, mut value: u64) -> Result<()> {
        // SAFETY: all attributes set are 64-bit.
        unsafe { result::mem_pool::set_attribute(self.handle()?, attribute, (&raw mut value).cast::<c_void>()) }
            .map_err(|error| cuda_error(OP, error))
    }
}
