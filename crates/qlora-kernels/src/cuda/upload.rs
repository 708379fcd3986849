//! From a file or host memory to the GPU, piece by piece.
//!
//! The bus is fast only from page-locked memory, and a file's pages are not. An [`Uploader`] has two page-locked pieces:
//! while one is copied to the GPU, the next is read into the other. Several uploaders, one a thread, keep disk, memory and bus
//! busy at a time. Neither the host nor the GPU ever holds more of a weight's source than these pieces.

use std::ops::Range;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{result, sys};

use super::buffer::{Buffer, PinnedBuffer};
use super::event::Event;
use super::gpu::{Gpu, cuda_error};
use crate::error::{Error, Result};
use crate::mapped::FileBytes;

/// Bytes of a piece: 0.15 ms of the bus, far more than what a copy costs to start. A multiple of every block size, so that
/// pieces can be quantized one by one.
const PIECE: usize = 8 << 20;

/// Bytes to be uploaded.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Of a file.
    File(FileBytes<'a>),
    /// In memory.
    Memory(&'a [u8]),
}

impl Source<'_> {
    /// The number of bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::File(bytes) => bytes.len(),
            Self::Memory(bytes) => bytes.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn read(&self, op: &'static str, at: usize, to: &mut [u8]) -> Result<()> {
        match self {
            Self::File(bytes) => bytes.read_at(at, to).map_err(|error| Error::Io { op, error }),
            Self::Memory(bytes) => {
                to.copy_from_slice(&bytes[at..at + to.len()]);
                Ok(())
            }
        }
    }
}

/// Copies weights to one GPU. For one thread; each has its own.
#[derive(Debug)]
pub struct Uploader {
    gpu: Arc<Gpu>,
    slots: [Slot; 2],
    turn: usize,
    /// Values on their way back to the host.
    scratch: Option<Buffer>,
}

#[derive(Debug)]
struct Slot {
    // Before the memory that it guards: dropping it does not wait, dropping pinned memory does.
    copied: Option<Event>,
    pinned: PinnedBuffer,
    /// For pieces that only pass through the GPU.
    device: Buffer,
}

/// A piece that is on its way: its bytes as they were read, and where they will be when the stream gets there.
pub(super) struct Piece<'a> {
    pub(super) at: usize,
    pub(super) host: &'a [u8],
    pub(super) device: sys::CUdeviceptr,
}

impl Uploader {
    /// Takes 16 MiB of page-locked memory and as much on the GPU.
    ///
    /// # Errors
    /// If there is not so much.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        const OP: &str = "uploader";
        let slot = || -> Result<Slot> {
            let pinned = PinnedBuffer::new(gpu, OP, PIECE)?;
            Ok(Slot { copied: None, pinned, device: Buffer::new(gpu, OP, PIECE)? })
        };
        Ok(Self { gpu: gpu.clone(), slots: [slot()?, slot()?], turn: 0, scratch: None })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Enqueues the copy of every piece to `target`, or to scratch memory without one, and calls `work` after each: what it
    /// enqueues finds the piece there.
    pub(super) fn each(
        &mut self,
        op: &'static str,
        source: Source,
        target: Option<sys::CUdeviceptr>,
        mut work: impl FnMut(Piece) -> Result<()>,
    ) -> Result<()> {
        self.gpu.bind(op)?;
        for at in (0..source.len()).step_by(PIECE) {
            let len = PIECE.min(source.len() - at);
            let slot = &mut self.slots[self.turn];
            self.turn = 1 - self.turn;
            let device = target.map_or(slot.device.ptr(), |base| base + at as u64);
            let host = &mut slot.free(op)?[..len];
            source.read(op, at, host)?;
            // SAFETY: the target has room for the whole source, or the scratch memory for a piece; the pinned memory is not
            // written again before `copied` has happened, and freeing it waits.
            unsafe { result::memcpy_htod_async(device, &*host, self.gpu.stream().cu_stream()) }
                .map_err(|error| cuda_error(op, error))?;
            slot.copied = Some(Event::record(op, self.gpu.stream())?);
            // SAFETY: until the slot's next turn nobody writes to the pinned memory.
            let host = unsafe { std::slice::from_raw_parts(slot.pinned.as_ptr().cast::<u8>(), len) };
            work(Piece { at, host, device })?;
        }
        Ok(())
    }

    /// A new buffer with these bytes.
    pub(super) fn upload(&mut self, op: &'static str, source: Source) -> Result<Buffer> {
        let buffer = Buffer::new(&self.gpu, op, source.len())?;
        self.each(op, source, Some(buffer.ptr()), |_| Ok(()))?;
        Ok(buffer)
    }

    /// At least `bytes` bytes of scratch memory on the GPU, until it is asked for again.
    pub(super) fn scratch(&mut self, op: &'static str, bytes: usize) -> Result<sys::CUdeviceptr> {
        let scratch = match self.scratch.take().filter(|scratch| scratch.bytes() >= bytes) {
            Some(scratch) => scratch,
            None => Buffer::new(&self.gpu, op, bytes)?,
        };
        Ok(self.scratch.insert(scratch).ptr())
    }

    /// Copies what will be at `from` back to the host, and waits for it (and for nothing that is enqueued later).
    pub(super) fn download<T: bytemuck::Pod>(
        &mut self,
        op: &'static str,
        from: sys::CUdeviceptr,
        len: usize,
    ) -> Result<Vec<T>> {
        self.gpu.bind(op)?;
        let mut values = vec![T::zeroed(); len];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        for Range { start, end } in pieces(bytes.len()) {
            let slot = &mut self.slots[self.turn];
            self.turn = 1 - self.turn;
            let host = &mut slot.free(op)?[..end - start];
            // SAFETY: the caller's memory has so many bytes; the pinned memory is read after the event.
            unsafe { result::memcpy_dtoh_async(host, from + start as u64, self.gpu.stream().cu_stream()) }
                .map_err(|error| cuda_error(op, error))?;
            Event::record(op, self.gpu.stream())?.wait(op)?;
            bytes[start..end].copy_from_slice(host);
        }
        Ok(values)
    }
}

impl Slot {
    /// The pinned memory, once no copy reads it any more.
    fn free(&mut self, op: &'static str) -> Result<&mut [u8]> {
        if let Some(copied) = self.copied.take() {
            copied.wait(op)?;
        }
        let bytes = self.pinned.bytes();
        // SAFETY: owned memory of so many bytes (of any content, which u8 allows); no copy is in flight.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pinned.as_mut_ptr().cast::<u8>(), bytes) })
    }
}

fn pieces(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(PIECE).map(move |start| start..len.min(start + PIECE))
}
