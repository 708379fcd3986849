//! Where the frozen base is: whole on the device, in shares on the devices of several ranks, or in host memory.
//!
//! Only the linear layers of the decoder blocks are placed; embedding, head, norms and biases are whole on every device (the embedding
//! may be on the host: [`offload_embedding`](super::LoadOptions::offload_embedding)). A share is made of whole tensors: each tensor of a
//! block belongs to the rank that has the fewest elements so far, largest tensors first, so shares are equal to within one tensor and a
//! rank reads, quantizes and keeps its own tensors only. The others' come while their block runs ([`qlora_kernels::weight::travel`]). The bits of a
//! weight do not depend on where it is, so losses, gradients and adapters do not either.

use std::fmt;
use std::sync::Arc;

use qlora_kernels::Dtype;
use qlora_kernels::weight::packed::{PackedForm, PackedKind};
use qlora_kernels::weight::travel::slot_bytes;

use super::Quantization;
use crate::config::StoredQuantization;
use crate::error::{Error, Result};
use crate::source::{SourceWeight, WeightSource};
use crate::spec::Module;

/// Where the frozen linear layers are.
#[derive(Default)]
#[non_exhaustive]
pub enum BasePlacement<'a> {
    /// All of them in the memory of the device.
    #[default]
    Resident,
    /// All of them in host memory, page-locked where the device is a GPU; those of a block come to the device while it runs.
    Streamed,
    /// Each rank has a share of them, and gets the others' while their block runs.
    Sharded(&'a mut dyn Peers),
}

impl BasePlacement<'_> {
    /// The placement without the ranks, and their number.
    pub(super) fn kind(&self) -> (PlacementKind, usize, usize) {
        match self {
            Self::Resident => (PlacementKind::Resident, 0, 1),
            Self::Streamed => (PlacementKind::Streamed, 0, 1),
            Self::Sharded(peers) => (PlacementKind::Sharded, peers.rank(), peers.size()),
        }
    }
}

/// A placement by its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PlacementKind {
    /// Whole on the device.
    #[default]
    Resident,
    /// In shares on the devices of all ranks.
    Sharded,
    /// In host memory.
    Streamed,
}

/// The other ranks of a run, while a base is loaded that they share.
pub trait Peers {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// The number of processes.
    fn size(&self) -> usize;

    /// Everybody's message, in the order of the ranks.
    ///
    /// # Errors
    /// If a rank failed or is gone; the message names it.
    fn exchange(&mut self, what: &'static str, mine: Vec<u8>) -> Result<Vec<Vec<u8>>>;

    /// Lets the others read this rank's tensors from its host memory from now on, and gives access to theirs. Not called where
    /// the devices read each other's memory.
    ///
    /// # Errors
    /// As [`Self::exchange`].
    fn serve(&mut self, own: Arc<dyn OwnShare>) -> Result<Arc<dyn OtherShares>>;
}

/// The tensors that this rank keeps for all, on the CPU.
pub trait OwnShare: Send + Sync {
    /// The piece ([`qlora_kernels::weight::packed`]) of the tensor with this number; none if it is another rank's.
    fn piece(&self, number: usize) -> Option<Vec<u8>>;
}

/// The tensors that other ranks keep, on the CPU.
pub trait OtherShares: Send + Sync + fmt::Debug {
    /// The piece of the tensor with this number, which `rank` keeps, appended to `out`.
    ///
    /// # Errors
    /// If the rank does not answer; the message names it.
    fn read(&self, rank: usize, number: usize, out: &mut Vec<u8>) -> qlora_kernels::Result<()>;
}

/// The bytes of a placed base on one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BaseMemory {
    /// Where it is.
    pub placement: PlacementKind,
    /// The ranks that share it.
    pub ranks: usize,
    /// The linear layers of all blocks.
    pub whole: u64,
    /// Those that are always on this device.
    pub own: u64,
    /// Room on this device for blocks that come and go.
    pub slots: u64,
    /// Those in host memory.
    pub host: u64,
}

impl BaseMemory {
    /// Bytes on the device.
    pub fn on_device(&self) -> u64 {
        self.own + self.slots
    }

    /// The bytes of a base whose linear layers have these forms, by block, on one of `ranks` ranks.
    pub fn predict(blocks: &[Vec<PackedForm>], placement: PlacementKind, rank: usize, ranks: usize) -> Self {
        let bytes = |form: &PackedForm| form.bytes() as u64;
        let whole = blocks.iter().flatten().map(bytes).sum();
        let memory = Self { placement, ranks: 1, whole, ..Self::default() };
        let slots = |blocks: &[Vec<PackedForm>]| slot_bytes(blocks.iter().map(Vec::as_slice)) as u64;
        match placement {
            PlacementKind::Resident => Self { own: whole, ..memory },
            PlacementKind::Streamed => Self { slots: slots(blocks), host: whole, ..memory },
            PlacementKind::Sharded => {
                let owners = owners(blocks, ranks);
                let is_own = |block: usize, index: usize| owners[block][index] == rank;
                let part = |own: bool| -> Vec<Vec<PackedForm>> {
                    let of = |(block, forms): (usize, &Vec<PackedForm>)| {
                        let kept = forms.iter().enumerate().filter(|(index, _)| is_own(block, *index) == own);
                        kept.map(|(_, form)| *form).collect()
                    };
                    blocks.iter().enumerate().map(of).collect()
                };
                let own = part(true).iter().flatten().map(bytes).sum();
                Self { ranks, own, slots: slots(&part(false)), ..memory }
            }
        }
    }
}

impl fmt::Display for BaseMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: u64| bytes as f64 / 1e9;
        let Self { ranks, whole, own, slots, host, .. } = *self;
        match self.placement {
            PlacementKind::Resident => write!(f, "base whole on the device: {:.2} GB", gb(whole)),
            PlacementKind::Sharded => write!(
                f,
                "base sharded over {ranks} ranks: {:.2} of {:.2} GB here, {:.2} GB of room for two blocks of the others'",
                gb(own),
                gb(whole),
                gb(slots)
            ),
            PlacementKind::Streamed => write!(
                f,
                "base streamed from host memory: {:.2} GB there, {:.2} GB of room for two blocks on the device",
                gb(host),
                gb(slots)
            ),
        }
    }
}

/// The rank of every tensor, by block: each is given to the rank with the fewest bytes so far, the largest of a block first.
pub(super) fn owners(blocks: &[Vec<PackedForm>], ranks: usize) -> Vec<Vec<usize>> {
    let mut held = vec![0; ranks.max(1)];
    let of_block = |forms: &Vec<PackedForm>| {
        let mut order: Vec<usize> = (0..forms.len()).collect();
        order.sort_by_key(|&index| (std::cmp::Reverse(forms[index].bytes()), index));
        let mut owners = vec![0; forms.len()];
        for index in order {
            let least = (0..held.len()).min_by_key(|&rank| held[rank]).unwrap_or(0);
            held[least] += forms[index].bytes();
            owners[index] = least;
        }
        owners
    };
    blocks.iter().map(of_block).collect()
}

/// The forms that the linear layers of a model will have in memory, by block, computing in `dtype` on a GPU, or on the CPU (`None`).
///
/// # Errors
/// If a layer is stored in a way that cannot travel, or cannot be read.
pub fn forms(
    source: &dyn WeightSource,
    quantization: Quantization,
    dtype: Option<Dtype>,
) -> Result<Vec<Vec<PackedForm>>> {
    let refused = |how: &str| {
        Error::Unsupported(format!(
            "base_placement: {how} weights are whole on every device: only 4-bit (NF4, FP4) and unquantized ones can be sharded or \
             streamed"
        ))
    };
    let stored = match source.quantization() {
        None => false,
        Some(StoredQuantization::Bnb4bit) => true,
        Some(other) => return Err(refused(&other.to_string())),
    };
    let plain = |module: &Module| {
        let kept = source.stored(&module.weight_name()).map_or(Dtype::F32, |stored| stored.dtype);
        PackedForm { rows: module.rows(), cols: module.cols(), kind: PackedKind::Plain(dtype.unwrap_or(kept)) }
    };
    // All layers of a checkpoint have the same blocks; one is enough to know them.
    let mut packed = None;
    let mut form = |module: &Module| -> Result<PackedForm> {
        let name = module.weight_name();
        if stored && source.is_packed(&name) {
            if packed.is_none()
                && let SourceWeight::FourBit(weight) = source.read_weight(&name)?
            {
                packed = qlora_kernels::weight::FrozenWeight::packed(&weight).map(|packed| packed.form);
            }
            let form = packed.ok_or_else(|| refused("such"))?;
            return Ok(PackedForm { rows: module.rows(), cols: module.cols(), ..form });
        }
        match quantization {
            _ if stored => Ok(plain(module)),
            Quantization::None => Ok(plain(module)),
            Quantization::Bits4(config) => Ok(PackedForm::quantized(module.rows(), module.cols(), &config)),
            Quantization::Int8 => Err(refused("LLM.int8")),
            Quantization::Int(_) => Err(refused("integer")),
        }
    };
    source.config().spec().blocks.iter().map(|block| block.linear().map(&mut form).collect()).collect()
}

#[cfg(test)]
mod tests {
    use qlora_kernels::quant::QuantConfig;

    use super::*;

    /// Llama 3.1 70B.
    fn shape_70b() -> Vec<Vec<PackedForm>> {
        let sizes =
            [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)];
        let form = |(rows, cols)| PackedForm::quantized(rows, cols, &QuantConfig::default());
        vec![sizes.map(form).to_vec(); 80]
    }

    #[test]
    fn shares_are_even_and_complete() {
        let blocks = shape_70b();
        for ranks in [1, 2, 3, 4, 8] {
            let of = |rank| BaseMemory::predict(&blocks, PlacementKind::Sharded, rank, ranks);
            let all: Vec<BaseMemory> = (0..ranks).map(of).collect();
            let whole = all[0].whole;
            assert_eq!(all.iter().map(|memory| memory.own).sum::<u64>(), whole);
            let largest = blocks[0].iter().map(PackedForm::bytes).max().unwrap() as u64;
            for memory in all {
                assert!(memory.own.abs_diff(whole / ranks as u64) <= largest, "{ranks}: {memory}");
                assert!(memory.slots <= 2 * blocks[0].iter().map(PackedForm::bytes).sum::<usize>() as u64);
            }
        }
        let two = BaseMemory::predict(&blocks, PlacementKind::Sharded, 0, 2);
        assert_eq!(
            two.to_string(),
            "base sharded over 2 ranks: 17.66 of 35.31 GB here, 0.48 GB of room for two blocks of the others'"
        );
        let streamed = BaseMemory::predict(&blocks, PlacementKind::Streamed, 0, 1);
        assert_eq!((streamed.host, streamed.own), (two.whole, 0));
        assert_eq!(streamed.slots, 2 * two.whole / 80);
    }
}
