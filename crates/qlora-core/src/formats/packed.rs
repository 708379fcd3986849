//! Linear layers that a checkpoint stores quantized: the tensors of each of them, and their reading.
//!
//! A module is quantized if the tensors that its method adds to a weight are there; all others are plain weights. What the
//! headers say is checked when the source is opened: presence, dtypes, shapes, the JSON state of 4-bit tensors. Values are
//! checked when a weight is read. Codes are taken over as they are.

use std::collections::BTreeMap;
use std::path::Path;

use qlora_kernels::quant::{Quantized4bit, QuantizedInt};
use safetensors::Dtype;

use super::bitsandbytes::{bits4, bits8};
use super::safetensors::shard::Shard;
use super::{awq, gptq};
use crate::config::{ModelConfig, StoredQuantization};
use crate::error::{Error, Result};
use crate::source::SourceWeight;
use crate::spec::Role;

/// A quantized linear layer of the checkpoint.
#[derive(Debug)]
pub(super) struct Packed {
    /// Output and input features.
    pub(super) shape: [usize; 2],
    /// The shard of its largest tensor, for messages.
    pub(super) shard: usize,
    /// Bytes of all its tensors.
    pub(super) bytes: u64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Bnb4(bits4::State),
    Bnb8 { threshold: f32 },
    Gptq(gptq::Layout),
    Awq { group_size: usize },
}

/// The tensors of a checkpoint as its files hold them: name to shard.
pub(super) struct Raw<'a> {
    pub(super) folder: &'a Path,
    pub(super) shards: &'a [Shard],
    pub(super) tensors: &'a BTreeMap<String, usize>,
}

impl Raw<'_> {
    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(super) fn shard(&self, name: &str) -> Option<&Shard> {
        self.tensors.get(name).map(|&number| &self.shards[number])
    }

    pub(super) fn dtype(&self, name: &str) -> Option<Dtype> {
        self.shard(name)?.dtype(name)
    }

    /// Checks that a tensor is there in one of the dtypes, with one of the shapes. `owner` is what needs it.
    pub(super) fn expect(&self, name: &str, owner: &str, dtypes: &[Dtype], shapes: &[&[usize]]) -> Result<()> {
        let missing = || Error::tensor(name, format!("missing in {}; {owner} needs it", self.folder.display()));
        let shard = self.shard(name).ok_or_else(missing)?;
        let (dtype, shape) = (shard.dtype(name).ok_or_else(missing)?, shard.shape(name).ok_or_else(missing)?);
        let place = shard.path().display();
        if !dtypes.contains(&dtype) {
            let expected = dtypes.iter().map(|dtype| format!("{dtype:?}")).collect::<Vec<_>>().join(" or ");
            return Err(Error::tensor(name, format!("has dtype {dtype:?} in {place}; {owner} needs {expected}")));
        }
        if !shapes.contains(&shape) {
            let expected = shapes.iter().map(|shape| format!("{shape:?}")).collect::<Vec<_>>().join(" or ");
            return Err(Error::tensor(name, format!("has shape {shape:?} in {place}; {owner} needs {expected}")));
        }
        Ok(())
    }

    pub(super) fn bytes(&self, name: &str) -> Result<&[u8]> {
        let bytes = self.shard(name).and_then(|shard| shard.bytes(name));
        bytes.ok_or_else(|| Error::tensor(name, format!("missing in {}", self.folder.display())))
    }

    pub(super) fn f32(&self, name: &str) -> Result<Vec<f32>> {
        match self.shard(name) {
            Some(shard) => Ok(shard.read(name)?.into_f32()),
            None => Err(Error::tensor(name, format!("missing in {}", self.folder.display()))),
        }
    }

    /// [`Self::f32`] of a tensor in which no value may be NaN, infinite or less than `least`.
    pub(super) fn scales(&self, name: &str, least: f32) -> Result<Vec<f32>> {
        let values = self.f32(name)?;
        match values.iter().position(|value| !(value.is_finite() && *value >= least)) {
            None => Ok(values),
            Some(i) => Err(Error::tensor(name, format!("element {i} is {}, in {}", values[i], self.place(name)))),
        }
    }

    pub(super) fn place(&self, name: &str) -> String {
        self.shard(name).map_or(self.folder, Shard::path).display().to_string()
    }
}

/// The quantized layers of a checkpoint, by the name that their weight would have were it plain, and the names of the
/// tensors that they consist of.
pub(super) fn find(
    raw: &Raw<'_>,
    config: &ModelConfig,
    quantization: &StoredQuantization,
) -> Result<(BTreeMap<String, Packed>, Vec<String>)> {
    let (mut packed, mut parts) = (BTreeMap::new(), Vec::new());
    let spec = config.spec();
    for described in spec.modules().filter(|module| module.role != Role::Embedding) {
        let &[rows, cols] = &*described.shape else { continue };
        let (module, shape) = (&*described.name, [rows, cols]);
        let found = match quantization {
            StoredQuantization::Bnb4bit => {
                bits4::find(raw, module, shape)?.map(|(state, parts)| (Kind::Bnb4(state), parts))
            }
            StoredQuantization::Bnb8bit { threshold } => {
                bits8::find(raw, module, shape)?.map(|parts| (Kind::Bnb8 { threshold: *threshold }, parts))
            }
            StoredQuantization::Gptq { bits, group_size, zero_offset, per_module } => {
                gptq::find(raw, module, shape, (*bits, *group_size), *zero_offset, *per_module)?
                    .map(|(layout, parts)| (Kind::Gptq(layout), parts))
            }
            StoredQuantization::Awq { group_size } => awq::find(raw, module, shape, *group_size)?
                .map(|parts| (Kind::Awq { group_size: group_size.unwrap_or(cols) }, parts)),
        };
        let Some((kind, mut own)) = found else { continue };
        let shard = raw.tensors[&own[0]];
        // AutoGPTQ and AutoAWQ write a bias of zeros for layers that have none.
        let bias = described.bias_name();
        let unused = raw.has(&bias) && !described.bias;
        if unused && matches!(kind, Kind::Gptq(_) | Kind::Awq { .. }) && raw.f32(&bias)?.iter().all(|x| *x == 0.0) {
            own.push(bias);
        }
        let bytes = own.iter().map(|part| raw.bytes(part).map_or(0, |bytes| bytes.len() as u64)).sum();
        parts.append(&mut own);
        packed.insert(described.weight_name(), Packed { shape, shard, bytes, kind });
    }
    Ok((packed, parts))
}

/// Reads one quantized layer; `name` is that of its weight.
pub(super) fn read(raw: &Raw<'_>, name: &str, packed: &Packed) -> Result<SourceWeight> {
    let module = name.trim_end_matches(".weight");
    let shape = packed.shape;
    // The errors of the kernels' checks, with the place added.
    let place = || raw.shards[packed.shard].path().display();
    let tensor = |error: qlora_kernels::Error| Error::tensor(name, format!("{error}, in {}", place()));
    Ok(match &packed.kind {
        Kind::Bnb4(state) => {
            SourceWeight::FourBit(Quantized4bit::from_parts(bits4::read(raw, module, shape, state)?).map_err(tensor)?)
        }
        Kind::Bnb8 { threshold } => {
            SourceWeight::Int(QuantizedInt::from_parts(bits8::read(raw, module, shape, *threshold)?).map_err(tensor)?)
        }
        Kind::Gptq(layout) => {
            SourceWeight::Int(QuantizedInt::from_parts(gptq::read(raw, module, shape, layout)?).map_err(tensor)?)
        }
        Kind::Awq { group_size } => {
            SourceWeight::Int(QuantizedInt::from_parts(awq::read(raw, module, shape, *group_size)?).map_err(tensor)?)
        }
    })
}
