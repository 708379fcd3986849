//! The weight update of an adapter: its effect on a base's weights.

use std::fmt;
use std::ops::Range;

use qlora_kernels::ViewMut;
use qlora_kernels::ops::matmul;
use qlora_kernels::weight::PlainData;

use crate::adapter::SavedAdapter;
use crate::adapter::kinds::{EMBEDDING, HEAD, dora};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::lora::{Entry, Which};
use crate::source::PlainTensor;

/// A change of a base's weights that an adapter stands for: LoRA and DoRA change rows in
/// [`WeightUpdate::apply`], fully trained modules are [`WeightUpdate::replacement`]s, a resized vocabulary is in
/// [`WeightUpdate::config`].
pub trait WeightUpdate: Send + Sync + fmt::Debug {
    /// The tensors that [`WeightUpdate::apply`] changes; all of them have to be in the merged model.
    fn targets(&self) -> Vec<String>;

    /// Changes rows `rows` of the tensor `name`, of which `weight` holds the base's values as f32, `[rows.len(), cols]`
    /// without gaps. Called from several threads, for disjoint rows.
    ///
    /// # Errors
    /// If the adapter does not fit the tensor.
    fn apply(&self, name: &str, rows: Range<usize>, cols: usize, weight: &mut [f32]) -> Result<()>;

    /// A tensor that takes the place of the base's whole tensor, or that the base does not have.
    fn replacement(&self, _name: &str) -> Option<PlainTensor> {
        None
    }

    /// The merged model's configuration, where it differs from the base's: a resized vocabulary, a head that is no longer
    /// tied. Every tensor whose shape differs needs a [`WeightUpdate::replacement`].
    fn config(&self, base: &ModelConfig) -> ModelConfig {
        base.clone()
    }
}

/// An adapter as training has it: `W + s B A`, with DoRA each row scaled to its magnitude, and rows of tokens and
/// biases in place of the base's.
#[derive(Debug)]
pub struct LoraUpdate<'a> {
    adapter: &'a SavedAdapter,
}

impl<'a> LoraUpdate<'a> {
    /// The update of an adapter.
    ///
    /// # Errors
    /// If its buffer is not the layout's, a scaling is not finite, or it has A and B of the embedding or the head, or the whole of
    /// either.
    pub fn new(adapter: &'a SavedAdapter) -> Result<Self> {
        if adapter.weights.len() != adapter.layout.len() {
            let (got, expected) = (adapter.weights.len(), adapter.layout.len());
            return Err(Error::Invalid(format!("the adapter has {expected} values by its layout, but holds {got}")));
        }
        for module in adapter.layout.modules() {
            let scale = adapter.config.lora.scaling_of(module) as f32;
            if !scale.is_finite() {
                return Err(Error::Invalid(format!("the adapter's scaling is {scale} for {module}")));
            }
        }
        let is_end = |entry: &&Entry| {
            entry.which == Which::Table
                || (entry.which == Which::A && [EMBEDDING, HEAD].contains(&entry.module.as_str()))
        };
        if let Some(table) = adapter.layout.entries().iter().find(is_end) {
            // The merged head may be another than the base's, which only an update that knows the base can give.
            let message =
                "is of the embedding or the head: open the folder with adapter::open_folder and merge with PeftUpdate";
            return Err(Error::tensor(table.tensor_name(), message));
        }
        Ok(Self { adapter })
    }

    /// The tokens whose rows are the adapter's, and the rows.
    fn token_rows(&self, module: &str) -> Option<(&[u32], &[f32])> {
        let entry = self.adapter.layout.tables().find(|entry| entry.module == module)?;
        let ids = self.adapter.config.lora.trainable_token_indices.of(module)?;
        Some((ids, &self.adapter.weights[entry.range()]))
    }
}

impl WeightUpdate for LoraUpdate<'_> {
    fn targets(&self) -> Vec<String> {
        let tables = self.adapter.layout.tables().map(|entry| entry.module.as_str());
        self.adapter.layout.modules().chain(tables).map(|module| format!("{module}.weight")).collect()
    }

    fn replacement(&self, name: &str) -> Option<PlainTensor> {
        let module = name.strip_suffix(".bias")?;
        let bias = self.adapter.layout.biases().find(|entry| entry.module == module)?;
        let data = PlainData::F32(self.adapter.weights[bias.range()].to_vec());
        Some(PlainTensor { data, shape: vec![bias.rows] })
    }

    fn apply(&self, name: &str, rows: Range<usize>, cols: usize, weight: &mut [f32]) -> Result<()> {
        let module = name.strip_suffix(".weight");
        if let Some((ids, values)) = module.and_then(|module| self.token_rows(module)) {
            for (&id, row) in ids.iter().zip(values.chunks_exact(cols.max(1))) {
                if rows.contains(&(id as usize)) {
                    let at = (id as usize - rows.start) * cols;
                    weight[at..at + cols].copy_from_slice(row);
                }
            }
            return Ok(());
        }
        let pair = module.and_then(|module| Some((module, self.adapter.layout.get(module)?)));
        let (module, pair) = pair.ok_or_else(|| Error::tensor(name, "has no adapter"))?;
        let (a, b) = pair.views(&self.adapter.weights);
        if cols != pair.a.cols || rows.end > pair.b.rows {
            let message = format!(
                "rows {rows:?} of {cols} columns do not fit the adapter's {} x {} factors",
                pair.b.rows, pair.a.cols
            );
            return Err(Error::tensor(name, message));
        }
        let scale = self.adapter.config.lora.scaling_of(module) as f32;
        let target = ViewMut::new(weight, rows.len(), cols);
        matmul::nn(b.slice_rows(rows.clone()), a, target, scale, 1.0)?;
        let Some(magnitude) = pair.magnitude else { return Ok(()) };
        dora::rescale(module, rows, cols, weight, &self.adapter.weights[magnitude.range()])
    }
}
