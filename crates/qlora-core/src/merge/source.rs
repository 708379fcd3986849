//! A base with an adapter merged in, as a source of weights.
//!
//! Tensors are merged as they are read, in pieces of rows: beside the base's tensor and the result, each thread holds
//! some megabytes of f32.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
use qlora_kernels::Dtype;
use qlora_kernels::quant::{QuantConfig, Quantized4bit};
use qlora_kernels::weight::{FrozenWeight, PlainData, PlainWeight};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::update::WeightUpdate;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::source::{PlainTensor, SourceWeight, WeightSource};
use crate::spec::{EMBEDDING_WEIGHT, Module};

/// Elements of a piece that a thread merges at a time.
const PIECE: usize = 1 << 20;

/// The weights to which an adapter is added. Of a base that is stored quantized these are in any case the ones that its
/// layers stand for, and layers that it stores plain stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MergeInto {
    /// The weights as they are stored.
    Original,
    /// The dequantized weights of the blocks' linear layers: the base that a QLoRA adapter was trained on. Layers
    /// without an adapter are then the dequantized ones too.
    Dequantized(QuantConfig),
}

impl fmt::Display for MergeInto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Original => f.write_str("original"),
            Self::Dequantized(_) => f.write_str("dequantized"),
        }
    }
}

/// The precision of a merged model's tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rounding {
    /// Each tensor's own (blocks of a GGUF file become f32; of a layer that is stored in 4 bits, what it was before).
    #[default]
    Stored,
    /// One for all tensors.
    To(Dtype),
    /// Merged tensors stay f32, the others are as stored: for a writer that rounds itself.
    None,
}

/// Statistics of a merge: the number of merged tensors and the size of their changes.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct MergeFigures {
    /// Tensors that were merged.
    pub layers: usize,
    /// The largest change of an element.
    pub largest: f32,
    /// The tensor that has it.
    pub largest_in: String,
    /// The mean of the changes' magnitudes.
    pub mean: f64,
    /// The Frobenius norm of all changes over that of all weights.
    pub relative: f64,
    /// The Frobenius norm of what rounding to the stored precision takes away, over that of all changes: 0 with f32; near
    /// or above 1 the change is lost in the rounding.
    pub rounding: f64,
}

/// A base with an adapter merged in.
#[derive(Debug)]
pub struct MergedSource<'a> {
    base: &'a dyn WeightSource,
    update: &'a dyn WeightUpdate,
    into: MergeInto,
    rounding: Rounding,
    config: ModelConfig,
    shapes: BTreeMap<String, Vec<usize>>,
    linear: HashSet<String>,
    targets: HashSet<String>,
    changes: Mutex<BTreeMap<String, Change>>,
}

/// Sums over the elements of one tensor.
#[derive(Clone, Copy, Debug, Default)]
struct Change {
    elements: u64,
    largest: f32,
    sum: f64,
    squares: f64,
    weights: f64,
    rounding: f64,
}

impl<'a> MergedSource<'a> {
    /// Merges `update` into `base` as tensors are read.
    ///
    /// # Errors
    /// If the update leaves a tensor of the merged model without a value, or changes one that the model does not have.
    pub fn new(
        base: &'a dyn WeightSource,
        update: &'a dyn WeightUpdate,
        into: MergeInto,
        rounding: Rounding,
    ) -> Result<Self> {
        let config = update.config(base.config());
        let shapes: BTreeMap<String, Vec<usize>> = config.tensor_shapes().into_iter().collect();
        for (name, shape) in &shapes {
            let replacement = update.replacement(name).map(|tensor| tensor.shape);
            let got = replacement.or_else(|| base.shape(name));
            if got.as_ref() != Some(shape) {
                let message = match got {
                    Some(got) => format!("has shape {got:?}, the merged model needs {shape:?}"),
                    None => format!(
                        "the merged model needs it, and neither {} nor the adapter has it",
                        base.path().display()
                    ),
                };
                return Err(Error::tensor(name, message));
            }
        }
        let targets: HashSet<String> = update.targets().into_iter().collect();
        if let Some(name) = targets.iter().filter(|name| !shapes.contains_key(*name)).min() {
            let message = format!("the adapter changes it, but {} has no such tensor", base.path().display());
            return Err(Error::tensor(name, message));
        }
        let linear = config.spec().linear().map(Module::weight_name).collect();
        Ok(Self { base, update, into, rounding, config, shapes, linear, targets, changes: Mutex::default() })
    }

    /// The statistics of the tensors that were read so far.
    pub fn figures(&self) -> MergeFigures {
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut figures = MergeFigures { layers: changes.len(), ..MergeFigures::default() };
        let mut all = Change::default();
        for (name, change) in changes.iter() {
            if change.largest > figures.largest || figures.largest_in.is_empty() {
                (figures.largest, figures.largest_in) = (change.largest, name.clone());
            }
            all = all.and(*change);
        }
        let root = |over: f64, under: f64| if under > 0.0 { (over / under).sqrt() } else { 0.0 };
        figures.mean = if all.elements > 0 { all.sum / all.elements as f64 } else { 0.0 };
        figures.relative = root(all.squares, all.weights);
        figures.rounding = root(all.rounding, all.squares);
        figures
    }

    /// Whether a plain weight was quantized for training: the plain layers of a base that is stored quantized were not.
    fn quantized(&self, name: &str) -> bool {
        self.linear.contains(name) && self.base.quantization().is_none()
    }

    fn merge(&self, name: &str, weight: SourceWeight) -> Result<PlainTensor> {
        let shape = weight.shape();
        let [rows, cols] = *shape else {
            return Err(Error::tensor(name, format!("has shape {shape:?}; only matrices can be merged")));
        };
        let dtype = match (self.rounding, &weight) {
            (Rounding::To(dtype), _) => dtype,
            (Rounding::None, _) => Dtype::F32,
            (Rounding::Stored, SourceWeight::Plain(tensor)) => dtype_of(&tensor.data),
            // The weight's dtype before it was quantized.
            (Rounding::Stored, SourceWeight::FourBit(weight)) => weight.source_dtype(),
            // Integers do not say what they were; the tables beside them do.
            (Rounding::Stored, SourceWeight::Int(_)) => {
                self.base.stored(EMBEDDING_WEIGHT).map_or(Dtype::F32, |stored| stored.dtype)
            }
        };
        let weight: Box<dyn FrozenWeight> = match (weight, self.into) {
            (SourceWeight::Plain(tensor), MergeInto::Dequantized(config)) if self.quantized(name) => {
                let quantized = Quantized4bit::quantize(&tensor.data, rows, cols, &config);
                drop(tensor);
                Box::new(quantized.map_err(|error| Error::tensor(name, error.to_string()))?)
            }
            (SourceWeight::Plain(tensor), _) => Box::new(PlainWeight::new(tensor.data, rows, cols)),
            (SourceWeight::FourBit(weight), _) => Box::new(weight),
            (SourceWeight::Int(weight), _) => Box::new(weight),
        };
        let job = Job { name, weight: &*weight, update: self.targets.contains(name).then_some(self.update) };
        let (data, change) = match dtype {
            Dtype::F32 => job.run(0.0, |x| x, |x| x).map(|(data, change)| (PlainData::F32(data), change)),
            Dtype::Bf16 => {
                job.run(bf16::ZERO, bf16::from_f32, bf16::to_f32).map(|(data, change)| (PlainData::Bf16(data), change))
            }
            Dtype::F16 => {
                job.run(f16::ZERO, f16::from_f32, f16::to_f32).map(|(data, change)| (PlainData::F16(data), change))
            }
        }?;
        if job.update.is_some() {
            self.changes.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), change);
        }
        Ok(PlainTensor { data, shape: vec![rows, cols] })
    }
}

impl WeightSource for MergedSource<'_> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn path(&self) -> &Path {
        self.base.path()
    }

    fn file_of(&self, name: &str) -> Option<&Path> {
        self.base.file_of(name)
    }

    fn names(&self) -> Vec<String> {
        self.shapes.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.get(name).cloned()
    }

    fn block_type(&self) -> Option<&'static str> {
        self.base.block_type()
    }

    /// As the base's, merged; values that are not finite are an error.
    fn read(&self, name: &str) -> Result<PlainTensor> {
        if !self.shapes.contains_key(name) {
            return Err(Error::tensor(name, "not in the merged model"));
        }
        let tensor = match self.update.replacement(name) {
            Some(tensor) => tensor,
            None if self.base.is_packed(name) => return self.merge(name, self.base.read_weight(name)?),
            None => self.base.read_finite(name)?,
        };
        let dequantized = matches!(self.into, MergeInto::Dequantized(_)) && self.quantized(name);
        if self.targets.contains(name) || dequantized {
            return self.merge(name, SourceWeight::Plain(tensor));
        }
        match self.rounding {
            Rounding::To(dtype) if dtype != dtype_of(&tensor.data) => convert(name, tensor, dtype),
            _ => Ok(tensor),
        }
    }
}

/// One tensor's merge.
struct Job<'a> {
    name: &'a str,
    weight: &'a dyn FrozenWeight,
    update: Option<&'a dyn WeightUpdate>,
}

impl Job<'_> {
    fn run<T: Copy + Send>(
        &self,
        zero: T,
        round: impl Fn(f32) -> T + Sync,
        widen: impl Fn(T) -> f32 + Sync,
    ) -> Result<(Vec<T>, Change)> {
        let (rows, cols) = (self.weight.rows(), self.weight.cols());
        let mut out = vec![zero; rows * cols];
        if out.is_empty() {
            return Ok((out, Change::default()));
        }
        let piece_rows = (PIECE / cols).max(1);
        let pieces: Vec<Change> = out
            .par_chunks_mut(piece_rows * cols)
            .enumerate()
            .map(|(index, out)| {
                let first = index * piece_rows;
                self.piece(first..first + out.len() / cols, cols, out, &round, &widen)
            })
            .collect::<Result<_>>()?;
        Ok((out, pieces.into_iter().fold(Change::default(), Change::and)))
    }

    fn piece<T: Copy>(
        &self,
        rows: Range<usize>,
        cols: usize,
        out: &mut [T],
        round: impl Fn(f32) -> T,
        widen: impl Fn(T) -> f32,
    ) -> Result<Change> {
        let mut before = vec![0.0; out.len()];
        self.weight.dequantize_rows(rows.clone(), &mut before);
        let mut after = before.clone();
        if let Some(update) = self.update {
            update.apply(self.name, rows.clone(), cols, &mut after)?;
        }
        let mut change = Change { elements: out.len() as u64, ..Change::default() };
        for (i, ((out, &before), &after)) in out.iter_mut().zip(&before).zip(&after).enumerate() {
            *out = round(after);
            let (rounded, difference) = (widen(*out), after - before);
            if !rounded.is_finite() {
                let why = match after.is_finite() {
                    true => "does not fit its precision; choose bf16 or f32",
                    false => "is no weight; base or adapter are damaged",
                };
                let (row, col) = (rows.start + i / cols, i % cols);
                let message = format!("{after} at row {row}, column {col} of the merged weight {why}");
                return Err(Error::tensor(self.name, message));
            }
            change.largest = change.largest.max(difference.abs());
            change.sum += f64::from(difference.abs());
            change.squares += f64::from(difference) * f64::from(difference);
            change.weights += f64::from(before) * f64::from(before);
            change.rounding += f64::from(rounded - after) * f64::from(rounded - after);
        }
        Ok(change)
    }
}

impl Change {
    fn and(self, other: Self) -> Self {
        Self {
            elements: self.elements + other.elements,
            largest: self.largest.max(other.largest),
            sum: self.sum + other.sum,
            squares: self.squares + other.squares,
            weights: self.weights + other.weights,
            rounding: self.rounding + other.rounding,
        }
    }
}

/// The precision of stored elements.
pub(crate) fn dtype_of(data: &PlainData) -> Dtype {
    match data {
        PlainData::F32(_) => Dtype::F32,
        PlainData::Bf16(_) => Dtype::Bf16,
        PlainData::F16(_) => Dtype::F16,
    }
}

/// A tensor in another precision; a value that does not fit it is an error.
fn convert(name: &str, tensor: PlainTensor, dtype: Dtype) -> Result<PlainTensor> {
    let shape = tensor.shape.clone();
    let values = tensor.into_f32();
    let data = match dtype {
        Dtype::F32 => PlainData::F32(values),
        Dtype::Bf16 => PlainData::Bf16(values.into_iter().map(bf16::from_f32).collect()),
        Dtype::F16 => PlainData::F16(values.into_iter().map(f16::from_f32).collect()),
    };
    let tensor = PlainTensor { data, shape };
    match tensor.first_non_finite() {
        None => Ok(tensor),
        Some(index) => {
            let message = format!("element {index} does not fit {}; choose bf16 or f32", dtype.name());
            Err(Error::tensor(name, message))
        }
    }
}
