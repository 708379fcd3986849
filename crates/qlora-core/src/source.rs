//! Sources of a model's weights: one interface over a Hugging Face folder and a GGUF file.
//!
//! A source maps its files into memory and hands out one tensor at a time, so that quantizing a model needs anonymous
//! memory for the tensor at hand only. Names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), whatever the
//! file calls them, and rows lie in Hugging Face's order.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use qlora_kernels::quant::{Quantized4bit, QuantizedInt};
use qlora_kernels::weight::{PlainData, PlainWeight};
use qlora_kernels::{Dtype, FileBytes};

use crate::config::{ModelConfig, StoredQuantization};
use crate::error::{Error, Result};

/// A tensor in the precision it was stored in, row-major.
#[derive(Clone)]
pub struct PlainTensor {
    /// The elements.
    pub data: PlainData,
    /// The sizes of the dimensions, the outermost first.
    pub shape: Vec<usize>,
}

impl PlainTensor {
    /// The elements as f32; f32 data is not copied.
    pub fn into_f32(self) -> Vec<f32> {
        match self.data {
            PlainData::F32(data) => data,
            data => {
                let mut out = vec![0.0; data.len()];
                data.to_f32(0..data.len(), &mut out);
                out
            }
        }
    }

    /// The tensor as a frozen weight `[rows, cols]`; a vector becomes one row.
    ///
    /// # Errors
    /// If it has more than two dimensions; the error has `name`.
    pub fn into_weight(self, name: &str) -> Result<PlainWeight> {
        match *self.shape {
            [cols] => Ok(PlainWeight::new(self.data, 1, cols)),
            [rows, cols] => Ok(PlainWeight::new(self.data, rows, cols)),
            _ => Err(Error::tensor(name, format!("has shape {:?}, expected a matrix", self.shape))),
        }
    }

    /// The index of the first element that is NaN or infinite.
    pub fn first_non_finite(&self) -> Option<usize> {
        self.data.first_non_finite()
    }
}

impl fmt::Debug for PlainTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = match self.data {
            PlainData::F32(_) => "f32",
            PlainData::Bf16(_) => "bf16",
            PlainData::F16(_) => "f16",
        };
        write!(f, "PlainTensor({:?}, {dtype})", self.shape)
    }
}

/// A weight as a source holds it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SourceWeight {
    /// In 16 or 32 bits.
    Plain(PlainTensor),
    /// NF4 or FP4.
    FourBit(Quantized4bit),
    /// LLM.int8, GPTQ or AWQ.
    Int(QuantizedInt),
}

impl SourceWeight {
    /// The sizes of the dimensions, the outermost first.
    pub fn shape(&self) -> Vec<usize> {
        use qlora_kernels::weight::FrozenWeight;
        match self {
            Self::Plain(tensor) => tensor.shape.clone(),
            Self::FourBit(weight) => vec![weight.rows(), weight.cols()],
            Self::Int(weight) => vec![weight.rows(), weight.cols()],
        }
    }

    /// The values that the weight stands for: 4-bit weights in the type they had before they were quantized, integers in
    /// f32.
    pub fn into_plain(self) -> PlainTensor {
        use qlora_kernels::weight::FrozenWeight;
        let shape = self.shape();
        let data = match self {
            Self::Plain(tensor) => return tensor,
            Self::FourBit(weight) => weight.dequantize(weight.source_dtype()),
            Self::Int(weight) => {
                let mut data = vec![0.0; shape.iter().product()];
                weight.dequantize_rows(0..weight.rows(), &mut data);
                PlainData::F32(data)
            }
        };
        PlainTensor { data, shape }
    }
}

/// A tensor in its file, in the form in which it is used.
#[derive(Clone, Copy, Debug)]
pub struct StoredTensor<'a> {
    /// The elements, row-major and little-endian.
    pub bytes: FileBytes<'a>,
    /// Their type.
    pub dtype: Dtype,
}

/// The weights of one model.
///
/// A source that was opened holds exactly the tensors of its configuration ([`ModelConfig::tensor_shapes`]), each with
/// the shape listed there; a head that is tied to the embedding is left out. Where the files hold a head of their own although
/// their configuration says that it is tied, [`Self::config`] says that it is not.
pub trait WeightSource: Send + Sync + fmt::Debug {
    /// The model's parts and sizes.
    fn config(&self) -> &ModelConfig;

    /// The file or folder, for messages.
    fn path(&self) -> &Path;

    /// The file that holds a tensor, for messages.
    fn file_of(&self, name: &str) -> Option<&Path>;

    /// All tensors, sorted by name.
    fn names(&self) -> Vec<String>;

    /// A tensor's shape, if there is one of that name.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// The quantization of the linear layers, if they are stored quantized. Not all of them need be: see
    /// [`Self::is_packed`].
    fn quantization(&self) -> Option<&StoredQuantization> {
        None
    }

    /// Remarks, in whole sentences, on contents of the files that differ from their configuration, and how they were
    /// read.
    fn remarks(&self) -> &[String] {
        &[]
    }

    /// The type of most linear layers, if they are stored in blocks of fewer than 8 bits a weight and are dequantized when they
    /// are read: quantizing them rounds a second time.
    fn block_type(&self) -> Option<&'static str> {
        None
    }

    /// Whether a tensor is stored quantized, so that only [`Self::read_weight`] reads it.
    fn is_packed(&self, _name: &str) -> bool {
        false
    }

    /// Copies one weight out of the file in the form in which it is stored. Scales of quantized weights are checked, plain
    /// values are not.
    ///
    /// # Errors
    /// If there is no tensor of that name, or a quantized one holds values that it cannot; the error names tensor and file.
    fn read_weight(&self, name: &str) -> Result<SourceWeight> {
        self.read(name).map(SourceWeight::Plain)
    }

    /// A tensor as it lies in its file, if its elements can be taken from there as they are: what is read piece by piece
    /// never needs memory for the whole.
    fn stored(&self, _name: &str) -> Option<StoredTensor<'_>> {
        None
    }

    /// Bytes that reading a tensor takes from its file, for progress bars; 0 if there is no tensor of that name.
    fn stored_bytes(&self, name: &str) -> u64 {
        match self.stored(name) {
            Some(stored) => stored.bytes.len() as u64,
            None => self.shape(name).map_or(0, |shape| 2 * shape.iter().product::<usize>() as u64),
        }
    }

    /// Copies one tensor out of the file. Values are not checked; see [`WeightSource::read_finite`].
    ///
    /// # Errors
    /// If there is no tensor of that name, or it is stored quantized; the error names tensor and file.
    fn read(&self, name: &str) -> Result<PlainTensor>;

    /// As [`WeightSource::read`], and NaN or infinity among the values is an error that says where.
    ///
    /// # Errors
    /// As [`WeightSource::read`], and for values that are not finite.
    fn read_finite(&self, name: &str) -> Result<PlainTensor> {
        let tensor = self.read(name)?;
        let Some(index) = tensor.first_non_finite() else { return Ok(tensor) };
        let cols = tensor.shape.last().copied().unwrap_or(1).max(1);
        let mut value = [0.0];
        tensor.data.to_f32(index..index + 1, &mut value);
        Err(Error::tensor(
            name,
            format!(
                "holds {} at row {}, column {}, in {}; the file is damaged or the model diverged when it was trained",
                value[0],
                index / cols,
                index % cols,
                self.file_of(name).unwrap_or(self.path()).display()
            ),
        ))
    }
}

/// A warning that weights stored in few bits are quantized again, to `target`; none if they are not stored so.
pub(crate) fn again(source: &dyn WeightSource, target: &str) -> Option<String> {
    source.block_type().map(|stored| {
        format!(
            "{}: the weights are stored in {stored} blocks, and quantizing them again to {target} rounds them a second time: the \
             original bf16, f16 or f32 weights give a better model",
            source.path().display()
        )
    })
}

/// The error for a name that a source does not have.
pub(crate) fn unknown_tensor(source: &dyn WeightSource, name: &str) -> Error {
    Error::tensor(name, format!("not in {}", source.path().display()))
}

/// Tensors that old checkpoints carry and no model needs.
pub(crate) fn ignorable(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name.ends_with(".self_attn.masked_bias")
}

/// Checks that a source holds the tensors of its configuration with the right shapes, and no others.
pub(crate) fn check_tensors(source: &dyn WeightSource) -> Result<()> {
    let place = |name: &str| source.file_of(name).unwrap_or(source.path()).display().to_string();
    let mut left: BTreeSet<String> = source.names().into_iter().collect();
    for (name, expected) in source.config().tensor_shapes() {
        let Some(got) = source.shape(&name) else {
            return Err(Error::tensor(&name, format!("missing in {}", source.path().display())));
        };
        if got != expected {
            let message = format!("has shape {got:?} in {}; the configuration gives {expected:?}", place(&name));
            return Err(Error::tensor(&name, message));
        }
        left.remove(&name);
    }
    match left.first() {
        None => Ok(()),
        Some(name) => Err(Error::tensor(
            name,
            format!("in {}, but the configuration has no place for it: file and configuration do not fit", place(name)),
        )),
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn the_first_non_finite_element_is_found() {
        let mut data = vec![1f32; 200_000];
        let tensor = |data: &[f32]| PlainTensor { data: PlainData::F32(data.to_vec()), shape: vec![data.len()] };
        assert_eq!(tensor(&data).first_non_finite(), None);
        data[150_000] = f32::INFINITY;
        data[150_001] = f32::NAN;
        assert_eq!(tensor(&data).first_non_finite(), Some(150_000));
        data[70_000] = f32::NAN;
        assert_eq!(tensor(&data).first_non_finite(), Some(70_000));
        let half = PlainTensor { data: PlainData::Bf16(vec![bf16::ONE, bf16::NEG_INFINITY]), shape: vec![2] };
        assert_eq!(half.first_non_finite(), Some(1));
    }
}
