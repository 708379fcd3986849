//! Matrices moved to pinned host memory and back while kernels run.
//!
//! A copy runs on a stream of its own. Out: it starts when the compute stream has written the matrix, whose memory is
//! given back once the compute stream waits for the copy ([`Leaving::retire`], called a block later, when the copy is
//! long done). Back: memory is taken on the compute stream, the copy waits for it, and the compute stream waits for the
//! copy before the first use ([`Arriving::wait`]). So two matrices are in flight at a time, whatever their number.
//!
//! Pinned memory is expensive to get, so it goes back to a list and is used again in the next step. A run reserves the
//! buffers of its largest batch once ([`Gpu::reserve_pinned`]); every smaller batch finds its own among them.
//! `Workspace::trim` frees what is not in use.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaStream, sys};

use super::buffer::PinnedBuffer;
use super::event::Event;
use super::gpu::{Gpu, cuda_error};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};

const OP: &str = "offload";

/// The copy stream of a GPU and its idle pinned memory.
#[derive(Debug, Default)]
pub(super) struct Offloader {
    stream: Mutex<Option<Arc<CudaStream>>>,
    free: Mutex<Vec<PinnedBuffer>>,
    /// Bytes that are held.
    in_use: AtomicUsize,
}

/// A matrix in pinned host memory; it is there when the copy stream has passed its copy.
#[derive(Debug)]
pub struct Offloaded {
    /// Always there until it is dropped.
    host: Option<PinnedBuffer>,
    rows: usize,
    cols: usize,
    margin: usize,
    dtype: Dtype,
    gpu: Arc<Gpu>,
}

/// The device memory of a matrix that is being copied out.
#[derive(Debug)]
pub struct Leaving {
    /// Read by the copy stream until `copied`.
    _matrix: Matrix,
    copied: Event,
    gpu: Arc<Gpu>,
}

/// A matrix that is being copied back.
#[derive(Debug)]
pub struct Arriving {
    matrix: Option<Matrix>,
    copied: Event,
    gpu: Arc<Gpu>,
}

impl Offloader {
    fn stream(&self, gpu: &Gpu) -> Result<Arc<CudaStream>> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = &*stream {
            return Ok(stream.clone());
        }
        let made = gpu.stream().context().new_stream().map_err(|error| cuda_error(OP, error))?;
        Ok(stream.insert(made).clone())
    }

    /// The smallest free buffer of at least `bytes` bytes, or a new one. Where the buffers of the largest batch were
    /// reserved, a smaller batch always finds one: its matrices are no larger, each taken from the least that serves.
    fn pinned(&self, gpu: &Arc<Gpu>, bytes: usize) -> Result<PinnedBuffer> {
        let mut free = self.lock();
        let best = smallest_of_at_least(&free, bytes, PinnedBuffer::bytes);
        let buffer = best.map(|index| free.swap_remove(index));
        // Buffers of longer batches must not pile up: as much may be idle as is in use.
        let mut surplus = Vec::new();
        let mut idle: usize = free.iter().map(PinnedBuffer::bytes).sum();
        let in_use = self.in_use.fetch_add(buffer.as_ref().map_or(bytes, PinnedBuffer::bytes), Ordering::Relaxed);
        while buffer.is_none() && idle > in_use + bytes {
            let Some(smallest) = smallest_of_at_least(&free, 0, PinnedBuffer::bytes) else { break };
            let smallest = free.swap_remove(smallest);
            idle -= smallest.bytes();
            surplus.push(smallest);
        }
        drop(free);
        if !surplus.is_empty() {
            // A copy into or out of them may be under way.
            self.stream(gpu)?.synchronize().map_err(|error| cuda_error(OP, error))?;
            drop(surplus);
        }
        match buffer {
            Some(buffer) => Ok(buffer),
            None => PinnedBuffer::new(gpu, OP, bytes).inspect_err(|_| {
                self.in_use.fetch_sub(bytes, Ordering::Relaxed);
            }),
        }
    }

    /// Makes the buffers of `sizes` that are not there yet.
    fn reserve(&self, gpu: &Arc<Gpu>, sizes: &[u64]) -> Result<()> {
        let mut sizes: Vec<usize> = sizes.iter().map(|&bytes| bytes as usize).collect();
        sizes.sort_unstable();
        let mut free = self.lock();
        // Which of those that are there serve a size; the largest first, so that none is wasted on a small one.
        let mut there: Vec<usize> = free.iter().map(PinnedBuffer::bytes).collect();
        let missing: Vec<usize> = sizes
            .into_iter()
            .rev()
            .filter(|&bytes| match smallest_of_at_least(&there, bytes, |&bytes| bytes) {
                Some(index) => {
                    there.swap_remove(index);
                    false
                }
                None => true,
            })
            .collect();
        for bytes in missing {
            free.push(PinnedBuffer::new(gpu, OP, bytes)?);
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<PinnedBuffer>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_back(&self, buffer: PinnedBuffer) {
        self.in_use.fetch_sub(buffer.bytes(), Ordering::Relaxed);
        self.lock().push(buffer);
    }
}

/// The place of the smallest item of at least `bytes` bytes.
fn smallest_of_at_least<T>(items: &[T], bytes: usize, size: impl Fn(&T) -> usize) -> Option<usize> {
    (0..items.len()).filter(|&index| size(&items[index]) >= bytes).min_by_key(|&index| size(&items[index]))
}

impl Gpu {
    /// Starts to copy a matrix to pinned host memory.
    ///
    /// # Errors
    /// If the matrix is not on this GPU, or the host gives no pinned memory.
    pub fn offload(self: &Arc<Self>, matrix: Matrix) -> Result<(Offloaded, Leaving)> {
        let view = matrix.view().cuda(OP)?;
        let (rows, cols, dtype, from) = (view.rows(), view.cols(), view.dtype(), view.ptr());
        let margin = view.margin_width();
        let bytes = rows * (cols + margin) * dtype.size();
        let copy_stream = self.offloader().stream(self)?;
        let mut host = self.offloader().pinned(self, bytes)?;
        Event::record(OP, self.stream())?.hold(OP, &copy_stream)?;
        // SAFETY: both sides have at least `bytes` bytes; the matrix lives until `Leaving` is retired, the pinned memory until the
        // copy stream has passed everything that uses it (it is only reused by later copies on the same stream).
        let status =
            unsafe { sys::cuMemcpyDtoHAsync_v2(host.as_mut_ptr(), from, bytes, copy_stream.cu_stream()) }.result();
        status.map_err(|error| cuda_error(OP, error))?;
        let copied = Event::record(OP, &copy_stream)?;
        let offloaded = Offloaded { host: Some(host), rows, cols, margin, dtype, gpu: self.clone() };
        Ok((offloaded, Leaving { _matrix: matrix, copied, gpu: self.clone() }))
    }
}

impl Gpu {
    /// Makes page-locked buffers of these sizes, in bytes, so that no step has to: one for each matrix that a step of the
    /// largest batch will [offload](Self::offload). Page-locking takes about half a second a gigabyte.
    ///
    /// # Errors
    /// If the host gives no more page-locked memory.
    pub fn reserve_pinned(self: &Arc<Self>, sizes: &[u64]) -> Result<()> {
        self.offloader().reserve(self, sizes)
    }

    /// Frees the pinned memory that nothing uses.
    ///
    /// # Errors
    /// If the device fails.
    pub fn release_pinned(&self) -> Result<()> {
        let offloader = self.offloader();
        let stream = offloader.stream.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(stream) = stream {
            stream.synchronize().map_err(|error| cuda_error(OP, error))?;
        }
        offloader.lock().clear();
        Ok(())
    }
}

impl Leaving {
    /// Gives the device memory back.
    ///
    /// # Errors
    /// If the device fails.
    pub fn retire(self) -> Result<()> {
        self.copied.hold(OP, self.gpu.stream())
    }
}

impl Offloaded {
    /// Starts to copy it back.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn fetch(&self) -> Result<Arriving> {
        let workspace = Workspace::with_dtype(&self.gpu.device(), self.dtype)?;
        let mut matrix = workspace.with_margin(self.rows, self.cols, self.margin)?;
        let to = matrix.view_mut().cuda(OP)?.ptr();
        let host = self.host.as_ref().ok_or_else(|| Error::invalid(OP, "the matrix was given back"))?;
        let copy_stream = self.gpu.offloader().stream(&self.gpu)?;
        Event::record(OP, self.gpu.stream())?.hold(OP, &copy_stream)?;
        // SAFETY: both sides have the same number of bytes; the copy follows the one that filled the pinned memory on the
        // same stream, and the memory of the matrix belongs to the compute stream's past from the event on.
        let status =
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, host.as_ptr(), self.bytes(), copy_stream.cu_stream()) }.result();
        status.map_err(|error| cuda_error(OP, error))?;
        Ok(Arriving { matrix: Some(matrix), copied: Event::record(OP, &copy_stream)?, gpu: self.gpu.clone() })
    }

    /// Bytes of pinned host memory.
    pub fn bytes(&self) -> usize {
        self.rows * (self.cols + self.margin) * self.dtype.size()
    }
}

impl Drop for Offloaded {
    fn drop(&mut self) {
        if let Some(host) = self.host.take() {
            self.gpu.offloader().give_back(host);
        }
    }
}

impl Arriving {
    /// The matrix, for work that is enqueued from now on.
    ///
    /// # Errors
    /// If the device fails.
    pub fn wait(mut self) -> Result<Matrix> {
        self.copied.hold(OP, self.gpu.stream())?;
        self.matrix.take().ok_or_else(|| Error::invalid(OP, "the matrix was taken already"))
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        // If it was not waited for (an error ended the pass), its memory must outlive the copy.
        let _ = self.gpu.bind(OP);
        let _ = self.copied.hold(OP, self.gpu.stream());
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        // The memory is freed on the compute stream, so that stream has to wait for the copy.
        let _ = self.gpu.bind(OP);
        let _ = self.copied.hold(OP, self.gpu.stream());
    }
}

#[cfg(test)]
mod tests {
    use super::smallest_of_at_least;

    #[test]
    fn a_smaller_batch_finds_its_buffers_among_those_of_the_largest() {
        // Two blocks of four matrices; another batch has a share of the rows, in any order.
        let reserved: Vec<usize> = [8192, 12288, 8320, 8192].repeat(2);
        for share in [1, 3, 7, 10] {
            for turn in 0..8 {
                let mut free = reserved.clone();
                for index in 0..8 {
                    let wanted = reserved[(index * 3 + turn) % 8] * share / 10;
                    let place = smallest_of_at_least(&free, wanted, |&bytes| bytes);
                    free.swap_remove(place.expect("a buffer of the largest batch serves"));
                }
            }
        }
        assert_eq!(smallest_of_at_least(&[1, 5, 3], 4, |&bytes| bytes), Some(1));
        assert_eq!(smallest_of_at_least(&[1, 5, 3], 6, |&bytes| bytes), None);
    }
}
