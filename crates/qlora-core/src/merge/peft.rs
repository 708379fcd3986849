//! The merge of an adapter of any of PEFT's kinds into a base's weights.
//!
//! | kind | merged weight |
//! |---|---|
//! | LoRA, with any ranks and scalings | `W + s B A` |
//! | DoRA | each row of `W + s B A`, scaled to its magnitude |
//! | LoRA on the embedding | `E + s (B A)^T`; with DoRA each column scaled |
//! | token rows, saved modules, trained biases | in place of the base's |
//! | a bias on B | added to the layer's bias, which has to exist |
//!
//! A head that is tied to the embedding is untied where the two no longer agree: the merged model then has a head of its own.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use qlora_kernels::ops::matmul;
use qlora_kernels::weight::{PlainData, PlainWeight};
use qlora_kernels::{View, ViewMut};

use super::update::WeightUpdate;
use crate::adapter::kinds::{EMBEDDING, HEAD, dora};
use crate::adapter::{LoraModule, PeftAdapter, TokenRows};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::model::embedding_gain;
use crate::source::{PlainTensor, WeightSource};

/// An adapter of any kind.
#[derive(Debug)]
pub struct PeftUpdate<'a> {
    modules: HashMap<&'a str, &'a LoraModule>,
    /// Rows of the tensors of these modules.
    tokens: Vec<(String, &'a TokenRows)>,
    replaced: HashMap<String, PlainTensor>,
    /// B with its columns as rows, and DoRA's factors, of the embedding's adapter.
    embedding: Option<(Vec<f32>, Option<Vec<f32>>)>,
    /// Whether a tied head becomes one of its own.
    unties: bool,
    /// Rows of the merged model's tables, if others than the base's.
    vocab_size: Option<usize>,
}

impl<'a> PeftUpdate<'a> {
    /// The update of `adapter`, which was read for a model as `base` is.
    ///
    /// # Errors
    /// If the merged model cannot express it (a bias on B of a layer without a bias), or a tensor of the base that the
    /// adapter builds on cannot be read.
    pub fn new(adapter: &'a PeftAdapter, base: &dyn WeightSource) -> Result<Self> {
        let modules: HashMap<&str, &LoraModule> = adapter.modules.iter().map(|m| (m.name.as_str(), m)).collect();
        let (table, head) = (format!("{EMBEDDING}.weight"), format!("{HEAD}.weight"));
        let tied = base.config().tie_word_embeddings;
        let follows = adapter.kinds.ensure_weight_tying;
        let own = |name: &str| adapter.replaced.iter().any(|r| r.name == name && !r.is_base);
        let apart = modules.contains_key(HEAD) || (modules.contains_key(EMBEDDING) && !follows);
        let unties = tied && (apart || own(&table) || own(&head));

        let mut replaced = HashMap::new();
        for tensor in &adapter.replaced {
            // A tied head is no tensor of the base, but may come along with the adapter.
            if base.shape(&tensor.name).is_none() && (tensor.name != head || !tied) {
                return Err(Error::tensor(&tensor.name, "the adapter replaces it, but the base has no such tensor"));
            }
            let shape = tensor.shape.clone();
            replaced.insert(tensor.name.clone(), PlainTensor { data: tensor.data.clone(), shape });
        }
        if unties && !replaced.contains_key(&head) {
            // The original head: the base's table, or the one that came with the adapter in its place.
            let followed = adapter.replaced.iter().find(|r| r.name == table && r.is_base);
            let tensor = match followed {
                Some(tensor) => PlainTensor { data: tensor.data.clone(), shape: tensor.shape.clone() },
                None => base.read_finite(&table)?,
            };
            replaced.insert(head, tensor);
        }
        for module in &adapter.modules {
            let Some(bias) = &module.bias else { continue };
            let name = format!("{}.bias", module.name);
            let own = match replaced.remove(&name) {
                Some(tensor) => tensor,
                None if base.shape(&name).is_some() => base.read_finite(&name)?,
                None => {
                    let message = "the adapter has a bias (lora_bias) and the base's layer has none to add it to: this \
                                   adapter can be used, but not merged";
                    return Err(Error::tensor(name, message));
                }
            };
            let mut values = vec![0.0; own.data.len()];
            own.data.to_f32(0..values.len(), &mut values);
            values.iter_mut().zip(bias).for_each(|(own, bias)| *own += module.scaling as f32 * bias);
            replaced.insert(name, PlainTensor { data: PlainData::F32(values), shape: own.shape });
        }
        let mut tokens = Vec::new();
        for rows in &adapter.tokens {
            tokens.push((rows.module.clone(), rows));
            // Without a head of its own, the table is the head.
            if tied && unties && rows.module == EMBEDDING {
                tokens.push((HEAD.to_owned(), rows));
            }
        }
        let embedding = match modules.get(EMBEDDING) {
            None => None,
            Some(module) => Some(embedding_factors(module, replaced.get(&table), base, &table)?),
        };
        Ok(Self { modules, tokens, replaced, embedding, unties, vocab_size: adapter.vocab_size })
    }

    fn add_lora(&self, module: &LoraModule, rows: Range<usize>, cols: usize, weight: &mut [f32]) -> Result<()> {
        let (rank, scale) = (module.rank, module.scaling as f32);
        let fits = module.a.len() == rank * cols && rows.end * rank <= module.b.len();
        if !fits {
            let message = format!("rows {rows:?} of {cols} columns do not fit the adapter's factors");
            return Err(Error::tensor(&module.name, message));
        }
        let (a, b) = (View::new(&module.a, rank, cols), View::new(&module.b, module.b.len() / rank, rank));
        matmul::nn(b.slice_rows(rows.clone()), a, ViewMut::new(weight, rows.len(), cols), scale, 1.0)?;
        let Some(magnitude) = &module.magnitude else { return Ok(()) };
        dora::rescale(&module.name, rows, cols, weight, magnitude)
    }

    fn add_to_embedding(
        &self,
        module: &LoraModule,
        rows: Range<usize>,
        hidden: usize,
        weight: &mut [f32],
    ) -> Result<()> {
        let Some((b, gain)) = &self.embedding else { return Ok(()) };
        let a = View::new(&module.a, module.rank, module.a.len() / module.rank);
        let target = ViewMut::new(weight, rows.len(), hidden);
        matmul::tn(a.slice_cols(rows), View::new(b, module.rank, hidden), target, module.scaling as f32, 1.0)?;
        if let Some(gain) = gain {
            for row in weight.chunks_exact_mut(hidden.max(1)) {
                row.iter_mut().zip(gain).for_each(|(w, gain)| *w *= gain);
            }
        }
        Ok(())
    }
}

/// B `[hidden, r]` as `[r, hidden]`, and `m / ||E + s (B A)^T||` of every column.
fn embedding_factors(
    module: &LoraModule,
    replaced: Option<&PlainTensor>,
    base: &dyn WeightSource,
    table: &str,
) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
    let rank = module.rank;
    let b = (0..rank).flat_map(|k| module.b.iter().skip(k).step_by(rank).copied()).collect();
    let Some(magnitude) = &module.magnitude else { return Ok((b, None)) };
    let tensor = match replaced {
        Some(tensor) => PlainTensor { data: tensor.data.clone(), shape: tensor.shape.clone() },
        None => base.read_finite(table)?,
    };
    let [rows, cols] = *tensor.shape else {
        return Err(Error::tensor(table, format!("has shape {:?}", tensor.shape)));
    };
    let gain = embedding_gain(&PlainWeight::new(tensor.data, rows, cols), module, magnitude)?;
    Ok((b, Some(gain)))
}

impl WeightUpdate for PeftUpdate<'_> {
    fn targets(&self) -> Vec<String> {
        let modules = self.modules.keys().copied().chain(self.tokens.iter().map(|(module, _)| module.as_str()));
        let names: BTreeSet<String> = modules.map(|module| format!("{module}.weight")).collect();
        names.into_iter().collect()
    }

    fn apply(&self, name: &str, rows: Range<usize>, cols: usize, weight: &mut [f32]) -> Result<()> {
        let module_name = name.strip_suffix(".weight").unwrap_or(name);
        match self.modules.get(module_name) {
            Some(module) if module_name == EMBEDDING => self.add_to_embedding(module, rows.clone(), cols, weight)?,
            Some(module) => self.add_lora(module, rows.clone(), cols, weight)?,
            None => {}
        }
        for (_, tokens) in self.tokens.iter().filter(|(module, _)| module == module_name) {
            for (&id, row) in tokens.ids.iter().zip(tokens.rows.chunks_exact(cols.max(1))) {
                if rows.contains(&(id as usize)) {
                    let at = (id as usize - rows.start) * cols;
                    weight[at..at + cols].copy_from_slice(row);
                }
            }
        }
        Ok(())
    }

    fn replacement(&self, name: &str) -> Option<PlainTensor> {
        let tensor = self.replaced.get(name)?;
        Some(PlainTensor { data: tensor.data.clone(), shape: tensor.shape.clone() })
    }

    fn config(&self, base: &ModelConfig) -> ModelConfig {
        let tie_word_embeddings = base.tie_word_embeddings && !self.unties;
        let vocab_size = self.vocab_size.unwrap_or(base.vocab_size);
        ModelConfig { vocab_size, tie_word_embeddings, ..base.clone() }
    }
}
