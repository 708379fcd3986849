//! Frozen weights that come to the GPU while their block runs: from page-locked host memory, or from another GPU's share.
//!
//! Two slots hold a block each. The addresses of a block's weights are those of its slot, made once, so kernels see weights like any
//! others. [`DeviceRing::enter`] makes the compute stream wait for the block's copies (an event) and starts those of the next block on a
//! stream of their own, behind the work that reads the block that is replaced (another event). Nothing waits on the host.
//!
//! A weight is copied as it lies, in its 4 bits: of Llama 70B a block is 441 MB, 8 ms over PCIe 5 and 1.5 ms over NVLink, while a
//! forward of it over 4,096 tokens takes 11 ms on an H200.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaStream, result, sys};

use super::buffer::{Buffer, PinnedBuffer};
use super::event::Event;
use super::gpu::{Gpu, cuda_error};
use super::share::OtherShare;
use super::weight::CudaWeight;
use crate::error::{Error, Result};
use crate::weight::packed::PackedForm;
use crate::weight::travel::{SLOTS, next_block};

const OP: &str = "travelling weights";

/// Device memory that pieces lie in, and what keeps it alive.
pub(super) struct PieceMemory {
    pub(super) gpu: Arc<Gpu>,
    pub(super) owner: Arc<dyn Send + Sync>,
    pub(super) ptr: sys::CUdeviceptr,
    pub(super) bytes: usize,
}

impl PieceMemory {
    /// # Panics
    /// If the part does not lie in the memory.
    pub(super) fn part(&self, at: usize, bytes: usize) -> Buffer {
        assert!(at + bytes <= self.bytes, "{bytes} bytes from {at} on in {}", self.bytes);
        // SAFETY: the owner keeps the memory; a share is written before anybody reads it, and the ring lets the compute stream wait for
        // what it writes into a slot.
        unsafe { Buffer::part_of(&self.gpu, self.owner.clone(), self.ptr + at as u64, bytes) }
    }
}

/// A weight in page-locked host memory.
#[derive(Debug)]
pub struct HostPiece {
    form: PackedForm,
    memory: PinnedBuffer,
}

impl HostPiece {
    /// Copies a weight from the GPU, and returns when it is there.
    ///
    /// # Errors
    /// If the weight cannot travel, the host gives no page-locked memory, or the device fails.
    pub fn of(weight: &CudaWeight) -> Result<Self> {
        let (form, arrays) = weight.piece().ok_or_else(|| Error::invalid(OP, "a weight of integers cannot travel"))?;
        let gpu = weight.gpu();
        let mut memory = PinnedBuffer::new(gpu, OP, form.bytes())?;
        for (place, array) in form.arrays().into_iter().zip(arrays) {
            if array.bytes() != place.len() {
                return Err(Error::invalid(OP, format!("an array has {} bytes, not {}", array.bytes(), place.len())));
            }
            let to = memory.as_mut_ptr().wrapping_byte_add(place.start);
            // SAFETY: both sides have so many bytes; synchronized before either goes.
            unsafe { sys::cuMemcpyDtoHAsync_v2(to, array.ptr(), place.len(), gpu.stream().cu_stream()) }
                .result()
                .map_err(|error| cuda_error(OP, error))?;
        }
        gpu.synchronize(OP)?;
        Ok(Self { form, memory })
    }

    /// The weight's form.
    pub fn form(&self) -> &PackedForm {
        &self.form
    }

    /// Bytes of page-locked memory.
    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}

/// A weight that travels, with its home.
#[derive(Debug)]
#[non_exhaustive]
pub enum Traveller {
    /// In host memory.
    Host(HostPiece),
    /// In the share of another GPU, from the byte `at` on.
    Other {
        /// Its form.
        form: PackedForm,
        /// The share.
        share: Arc<OtherShare>,
        /// Its place there.
        at: usize,
    },
}

impl Traveller {
    fn form(&self) -> &PackedForm {
        match self {
            Self::Host(piece) => &piece.form,
            Self::Other { form, .. } => form,
        }
    }
}

/// The slots of a GPU, and the homes of what passes through them.
pub struct DeviceRing {
    gpu: Arc<Gpu>,
    copies: Arc<CudaStream>,
    slots: Vec<Arc<Buffer>>,
    blocks: Vec<Vec<Traveller>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The block that runs.
    current: Option<usize>,
    slots: [Slot; SLOTS],
}

#[derive(Default)]
struct Slot {
    holds: Option<usize>,
    /// The end of its copies, until the compute stream was told to wait for it.
    arrives: Option<Event>,
}

impl DeviceRing {
    /// The weights that travel, by block.
    ///
    /// # Errors
    /// If the memory for the slots cannot be had.
    pub fn weights(gpu: &Arc<Gpu>, blocks: Vec<Vec<Traveller>>) -> Result<Vec<Vec<CudaWeight>>> {
        let of_block = |block: &Vec<Traveller>| block.iter().map(|weight| weight.form().bytes()).sum::<usize>();
        let largest = blocks.iter().map(of_block).max().unwrap_or(0);
        let slots = (0..SLOTS).map(|_| Buffer::new(gpu, OP, largest).map(Arc::new)).collect::<Result<Vec<_>>>()?;
        gpu.bind(OP)?;
        let copies = gpu.stream().context().new_stream().map_err(|error| cuda_error(OP, error))?;
        let ring = Arc::new(Self { gpu: gpu.clone(), copies, slots, blocks, state: Mutex::default() });
        let weights_of = |(block, travellers): (usize, &Vec<Traveller>)| {
            let slot = &ring.slots[block % SLOTS];
            let memory = PieceMemory { gpu: gpu.clone(), owner: slot.clone(), ptr: slot.ptr(), bytes: slot.bytes() };
            let mut at = 0;
            let weight = |traveller: &Traveller| {
                let form = traveller.form();
                let weight = CudaWeight::of_piece(form, &memory, at, Some((ring.clone(), block)));
                at += form.bytes();
                weight
            };
            travellers.iter().map(weight).collect()
        };
        Ok(ring.blocks.iter().enumerate().map(weights_of).collect())
    }

    /// Makes the compute stream wait until a block's weights are there, and lets the next block's come.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn enter(&self, block: usize) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Asked for in any case: a recorded graph would run without its weights.
        let compute = self.gpu.stream();
        if state.current == Some(block) {
            return Ok(());
        }
        self.gpu.bind(OP)?;
        if state.slots[block % SLOTS].holds != Some(block) {
            self.fetch(&mut state, block)?;
        }
        if let Some(event) = state.slots[block % SLOTS].arrives.take() {
            event.hold(OP, compute)?;
        }
        let next = next_block(state.current, block, self.blocks.len());
        state.current = Some(block);
        match next.filter(|&next| state.slots[next % SLOTS].holds != Some(next)) {
            Some(next) => self.fetch(&mut state, next),
            None => Ok(()),
        }
    }

    /// Starts the copies of a block's weights, behind all work that is enqueued so far: the block that was in the slot has been.
    fn fetch(&self, state: &mut State, block: usize) -> Result<()> {
        let slot = &mut state.slots[block % SLOTS];
        (slot.holds, slot.arrives) = (None, None);
        Event::record(OP, self.gpu.stream())?.hold(OP, &self.copies)?;
        let mut to = self.slots[block % SLOTS].ptr();
        let stream = self.copies.cu_stream();
        for traveller in &self.blocks[block] {
            let bytes = traveller.form().bytes();
            let status = match traveller {
                // SAFETY: both sides have so many bytes and live as long as the ring, which waits for its copies; nothing on the
                // compute stream reads the slot between the event before and the one behind.
                Traveller::Host(piece) => unsafe {
                    sys::cuMemcpyHtoDAsync_v2(to, piece.memory.as_ptr(), bytes, stream).result()
                },
                Traveller::Other { share, at, .. } => {
                    let from = share.at(*at, bytes)?;
                    // SAFETY: as above.
                    unsafe { result::memcpy_dtod_async(to, from, bytes, stream) }
                }
            };
            status.map_err(|error| cuda_error(OP, error))?;
            to += bytes as u64;
        }
        (slot.holds, slot.arrives) = (Some(block), Some(Event::record(OP, &self.copies)?));
        Ok(())
    }
}

impl Drop for DeviceRing {
    fn drop(&mut self) {
        let _ = self.gpu.bind(OP);
        // What it copies from and to goes now.
        let _ = self.copies.synchronize();
    }
}

impl fmt::Debug for DeviceRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceRing({} blocks)", self.blocks.len())
    }
}
