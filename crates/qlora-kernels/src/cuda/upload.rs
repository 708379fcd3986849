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

/// Pieces of up to so many bytes are not page-locked. A multiple of every block size too.
const SMALL: usize = 64 << 10;

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
    piece: usize,
    slots: [Slot; 2],
    turn: usize,
    /// Values on their way back to the host.
    scratch: Option<Buffer>,
}

/// A buffer that is read into, one of two used by turns; made when it is first needed.
#[derive(Debug, Default)]
struct Slot {
    copied: Option<Event>,
    host: Option<Host>,
    /// For pieces that only pass through the GPU.
    device: Option<Buffer>,
}

#[derive(Debug)]
enum Host {
    Pinned(PinnedBuffer),
    /// For a few bytes, page-locked memory costs more than it gains.
    Plain(Vec<u64>),
}

/// A piece that is on its way: its bytes as they were read, and where they will be when the stream gets there.
pub(super) struct Piece<'a> {
    pub(super) at: usize,
    pub(super) host: &'a [u8],
    pub(super) device: sys::CUdeviceptr,
}

impl Uploader {
    /// For many weights of at most `largest` bytes: takes up to 16 MiB of page-locked memory and as much on the GPU.
    ///
    /// # Errors
    /// If there is not so much.
    pub fn new(gpu: &Arc<Gpu>, largest: usize) -> Result<Self> {
        const OP: &str = "uploader";
        // Whole blocks of every size and type, should a weight be larger after all.
        let mut uploader = Self::with_piece(gpu, largest.clamp(1, PIECE).next_multiple_of(SMALL));
        let size = uploader.piece;
        for slot in &mut uploader.slots {
            slot.host(gpu, OP, size)?;
            slot.device(gpu, OP, size)?;
        }
        Ok(uploader)
    }

    /// For one weight of so many bytes: takes memory when it is needed, and no more than that.
    pub(super) fn for_bytes(gpu: &Arc<Gpu>, bytes: usize) -> Self {
        Self::with_piece(gpu, bytes.clamp(4096, PIECE))
    }

    fn with_piece(gpu: &Arc<Gpu>, piece: usize) -> Self {
        Self { gpu: gpu.clone(), piece, slots: Default::default(), turn: 0, scratch: None }
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
        let (gpu, size) = (&self.gpu, self.piece);
        for Range { start: at, end } in pieces(source.len(), size) {
            let slot = &mut self.slots[self.turn];
            self.turn = 1 - self.turn;
            let device = match target {
                Some(base) => base + at as u64,
                None => slot.device(gpu, op, size)?,
            };
            let host = &mut slot.host(gpu, op, size)?[..end - at];
            source.read(op, at, host)?;
            // SAFETY: the target has room for the whole source, or the scratch memory for a piece; the host memory is not
            // written or freed before `copied` has happened.
            unsafe { result::memcpy_htod_async(device, &*host, gpu.stream().cu_stream()) }
                .map_err(|error| cuda_error(op, error))?;
            slot.copied = Some(Event::record(op, gpu.stream())?);
            work(Piece { at, host: &slot.bytes()[..end - at], device })?;
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
        let (gpu, size) = (&self.gpu, self.piece);
        for Range { start, end } in pieces(bytes.len(), size) {
            let slot = &mut self.slots[self.turn];
            self.turn = 1 - self.turn;
            let host = &mut slot.host(gpu, op, size)?[..end - start];
            // SAFETY: the caller's memory has so many bytes; the host memory is read after the event.
            unsafe { result::memcpy_dtoh_async(host, from + start as u64, gpu.stream().cu_stream()) }
                .map_err(|error| cuda_error(op, error))?;
            Event::record(op, gpu.stream())?.wait(op)?;
            bytes[start..end].copy_from_slice(host);
        }
        Ok(values)
    }
}

impl Slot {
    /// The host memory, once no copy reads it any more.
    fn host(&mut self, gpu: &Arc<Gpu>, op: &'static str, size: usize) -> Result<&mut [u8]> {
        if let Some(copied) = self.copied.take() {
            copied.wait(op)?;
        }
        let host = match self.host.take() {
            Some(host) => host,
            None if size <= SMALL => Host::Plain(vec![0; size.div_ceil(8)]),
            None => Host::Pinned(PinnedBuffer::new(gpu, op, size)?),
        };
        Ok(match self.host.insert(host) {
            Host::Pinned(pinned) => pinned.as_bytes_mut(),
            Host::Plain(words) => bytemuck::cast_slice_mut(words),
        })
    }

    /// The bytes that were read last.
    fn bytes(&self) -> &[u8] {
        match &self.host {
            None => &[],
            Some(Host::Pinned(pinned)) => pinned.as_bytes(),
            Some(Host::Plain(words)) => bytemuck::cast_slice(words),
        }
    }

    fn device(&mut self, gpu: &Arc<Gpu>, op: &'static str, size: usize) -> Result<sys::CUdeviceptr> {
        let device = match self.device.take() {
            Some(device) => device,
            None => Buffer::new(gpu, op, size)?,
        };
        Ok(self.device.insert(device).ptr())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Copies read the host memory until then.
        if let Some(copied) = self.copied.take() {
            let _ = copied.wait("uploader");
        }
    }
}

fn pieces(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..len.min(start + size))
}
