//! Frozen weights that are in a device's memory only while their block runs.
//!
//! The weights of a decoder block that a process does not keep arrive together in one of [`SLOTS`] slots, and are replaced by those of
//! a block that comes later. A weight that travels is used as any other: an operation that multiplies with it first calls
//! [`FrozenWeight::arrive`], which waits for its block and, on a GPU, lets the next one come while this one runs. The order of the blocks is
//! learnt from the calls: up in a forward pass, down in a backward pass.
//!
//! This file is the CPU's side; the GPU's is in `cuda::travel`. One pass at a time: two threads that run a model whose weights
//! travel would take them away from each other.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::weight::FrozenWeight;
use crate::weight::packed::PackedForm;

/// Blocks that have room at a time: the one that runs and the one that comes.
pub const SLOTS: usize = 2;

/// Where weights come from.
pub trait Home: Send + Sync + fmt::Debug {
    /// The piece of the weight with this number, appended to `out`.
    ///
    /// # Errors
    /// If it cannot be had; the message names the process that holds it.
    fn read(&self, number: usize, out: &mut Vec<u8>) -> Result<()>;
}

/// The block after `block` of `blocks`, in the direction in which they have been run so far.
#[cfg(any(test, feature = "cuda"))]
pub(crate) fn next_block(last: Option<usize>, block: usize, blocks: usize) -> Option<usize> {
    let up = match last {
        _ if block == 0 => true,
        _ if block + 1 == blocks => false,
        Some(last) => last < block,
        None => true,
    };
    if up { Some(block + 1).filter(|&next| next < blocks) } else { block.checked_sub(1) }
}

/// Bytes of the slots for blocks with these weights that travel.
pub fn slot_bytes<'a>(blocks: impl IntoIterator<Item = &'a [PackedForm]>) -> usize {
    let block = |forms: &[PackedForm]| forms.iter().map(PackedForm::bytes).sum::<usize>();
    SLOTS * blocks.into_iter().map(block).max().unwrap_or(0)
}

type Weights = Arc<Vec<Arc<dyn FrozenWeight>>>;

/// The slots in host memory.
pub struct HostRing {
    /// By block: the weights that travel, with their numbers at home.
    blocks: Vec<Vec<(PackedForm, usize)>>,
    home: Arc<dyn Home>,
    slots: [Mutex<Option<(usize, Weights)>>; SLOTS],
}

/// A weight that travels, in host memory.
#[derive(Debug)]
struct HostTraveller {
    ring: Arc<HostRing>,
    block: usize,
    index: usize,
    form: PackedForm,
}

impl HostRing {
    /// The weights that travel, by block; each is given with its number at home.
    pub fn weights(blocks: Vec<Vec<(PackedForm, usize)>>, home: Arc<dyn Home>) -> Vec<Vec<Arc<dyn FrozenWeight>>> {
        let ring = Arc::new(Self { blocks, home, slots: Default::default() });
        let weight = |block: usize, index: usize, form: PackedForm| -> Arc<dyn FrozenWeight> {
            Arc::new(HostTraveller { ring: ring.clone(), block, index, form })
        };
        let of_block = |(block, forms): (usize, &Vec<(PackedForm, usize)>)| {
            forms.iter().enumerate().map(|(index, (form, _))| weight(block, index, *form)).collect()
        };
        ring.blocks.iter().enumerate().map(of_block).collect()
    }

    /// The weights of a block, once they are there.
    fn enter(&self, block: usize) -> Result<Weights> {
        let mut slot = self.slots[block % SLOTS].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((there, weights)) = &*slot
            && *there == block
        {
            return Ok(weights.clone());
        }
        // First the room, then the guests.
        *slot = None;
        let mut weights = Vec::with_capacity(self.blocks[block].len());
        let mut piece = Vec::new();
        for (form, number) in &self.blocks[block] {
            piece.clear();
            self.home.read(*number, &mut piece)?;
            weights.push(form.unpack(&piece)?);
        }
        let weights = Arc::new(weights);
        *slot = Some((block, weights.clone()));
        Ok(weights)
    }
}

impl FrozenWeight for HostTraveller {
    fn rows(&self) -> usize {
        self.form.rows
    }

    fn cols(&self) -> usize {
        self.form.cols
    }

    /// # Panics
    /// If the weight is not there and cannot be had: [`FrozenWeight::arrive`] gives the error.
    fn dequantize_rows(&self, range: Range<usize>, out: &mut [f32]) {
        let weights = self.ring.enter(self.block).expect("a weight arrives before it is read");
        weights[self.index].dequantize_rows(range, out);
    }

    /// None of its own.
    fn bytes(&self) -> usize {
        0
    }

    fn row_blocks_of_4bit(&self) -> Option<usize> {
        self.form.row_blocks_of_4bit()
    }

    fn arrive(&self) -> Result<()> {
        self.ring.enter(self.block).map(drop)
    }

    fn travels(&self) -> bool {
        true
    }
}

impl fmt::Debug for HostRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostRing({} blocks from {:?})", self.blocks.len(), self.home)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::error::Error;
    use crate::weight::{PlainData, PlainWeight};

    #[derive(Debug, Default)]
    struct Counting {
        read: AtomicUsize,
    }

    impl Home for Counting {
        fn read(&self, number: usize, out: &mut Vec<u8>) -> Result<()> {
            self.read.fetch_add(1, Ordering::Relaxed);
            if number == 6 {
                return Err(Error::invalid("home", "rank 3 is gone"));
            }
            let weight = PlainWeight::new(PlainData::F32(vec![number as f32; 8]), 2, 4);
            out.extend(weight.packed().expect("plain weights travel").to_bytes());
            Ok(())
        }
    }

    #[test]
    fn blocks_come_in_the_order_of_the_passes() {
        let passes = |order: &[usize]| {
            let mut last = None;
            let mut next = |&block: &usize| next_block(last.replace(block), block, 4);
            order.iter().map(&mut next).collect::<Vec<_>>()
        };
        // A forward pass and its backward: the top two are still there.
        let forward_backward = [0, 1, 2, 3, 2, 1, 0];
        assert_eq!(passes(&forward_backward), [Some(1), Some(2), Some(3), Some(2), Some(1), Some(0), Some(1)]);
        assert_eq!(next_block(None, 0, 1), None);
        assert_eq!(next_block(Some(1), 0, 2), Some(1));
    }

    #[test]
    fn a_block_is_fetched_once_while_it_runs_and_a_failure_is_told() {
        let form = PackedForm { rows: 2, cols: 4, kind: crate::weight::packed::PackedKind::Plain(crate::Dtype::F32) };
        let home = Arc::new(Counting::default());
        let blocks = (0..4).map(|block| vec![(form, 2 * block), (form, 2 * block + 1)]).collect();
        let weights = HostRing::weights(blocks, home.clone());
        let value = |block: usize, index: usize| {
            let mut out = [0.0; 4];
            weights[block][index].dequantize_rows(1..2, &mut out);
            out[0]
        };
        for block in [0, 1, 2, 1, 2] {
            weights[block][1].arrive().unwrap();
            assert_eq!((value(block, 0), value(block, 1)), ((2 * block) as f32, (2 * block + 1) as f32));
        }
        assert_eq!(home.read.load(Ordering::Relaxed), 6);
        assert!(weights[3][0].arrive().unwrap_err().to_string().contains("rank 3 is gone"));
        assert_eq!(weights[0][0].bytes(), 0);
        assert_eq!(slot_bytes([&[form, form][..], &[form][..]]), 4 * form.bytes());
    }
}
