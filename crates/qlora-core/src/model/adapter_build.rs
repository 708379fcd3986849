//! From an adapter's file to the numbers and the table that a model runs, and combinations of those.
//!
//! DoRA's gain of output feature i is `m_i / ||(W + s B A)_i||`, over the dequantized rows of the frozen weight, a few at a time;
//! that of the embedding is over the columns, as PEFT takes it transposed. Sums of squares are f64, on a GPU f32.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use qlora_kernels::ops::adapter_rows::{AdapterChanges, LinearChange};
use qlora_kernels::ops::linear_group::LoraSlot;
use qlora_kernels::ops::{dora_linear, matmul};
use qlora_kernels::weight::{FrozenWeight, PlainData, PlainWeight};
use qlora_kernels::{Matrix, View, ViewMut, Workspace};

use super::adapters::{Combination, EmbeddingChange, LoadedAdapter};
use super::causal_lm::CausalLm;
use super::projection::Projection;
use crate::adapter::kinds::{EMBEDDING, HEAD};
use crate::adapter::{LoraModule, PeftAdapter, Replaced};
use crate::error::{Error, Result};

/// Elements of a weight that are dequantized at a time.
const CHUNK: usize = 1 << 20;

/// The adapter as `model` runs it.
pub(super) fn build(model: &CausalLm, adapter: &PeftAdapter) -> Result<LoadedAdapter> {
    let own = model.config().vocab_size;
    if let Some(got) = adapter.vocab_size.filter(|size| *size != own) {
        return Err(Error::Invalid(format!(
            "the adapter was trained on a model of {got} tokens and brings its tables along, the base has {own}: load the base as \
             ModelFiles::with_vocabulary_of(adapter) gives it (an adapter of another vocabulary cannot be beside it)"
        )));
    }
    let tied = model.config().tie_word_embeddings;
    let projections: HashMap<&str, &Projection> = model
        .stack()
        .blocks()
        .iter()
        .flat_map(|block| block.projections())
        .map(|projection| (projection.name(), projection))
        .collect();
    let mut builder = Builder { model, tied, projections, ..Builder::new(model) };
    adapter.replaced.iter().try_for_each(|replaced| builder.replace(replaced))?;
    if tied && adapter.kinds.ensure_weight_tying && adapter.kinds.saves(EMBEDDING) {
        // A head that was saved too holds the same numbers.
        if let Some(table) = builder.embedding.table.clone() {
            builder.linear(HEAD).weight = Some(table);
            builder.keep_linear_weights();
        }
    }
    for module in &adapter.modules {
        builder.lora(module)?;
        let head = adapter.modules.iter().any(|other| other.name == HEAD);
        if module.name == EMBEDDING && tied && adapter.kinds.ensure_weight_tying && !head {
            builder.tied_head(module)?;
        }
    }
    for tokens in &adapter.tokens {
        let width = model.config().hidden_size;
        if tokens.rows.len() != tokens.ids.len() * width {
            return Err(Error::tensor(&tokens.module, "the rows of its tokens have another width than the model"));
        }
        let mut ranges = HashMap::new();
        for (id, row) in tokens.ids.iter().zip(tokens.rows.chunks_exact(width)) {
            ranges.insert(*id, push(&mut builder.values, row));
        }
        if tokens.module == HEAD || tied {
            builder.head_tokens.clone_from(&ranges);
        }
        if tokens.module == EMBEDDING {
            builder.embedding.tokens = ranges;
        }
    }
    builder.finish()
}

struct Builder<'a> {
    model: &'a CausalLm,
    tied: bool,
    projections: HashMap<&'a str, &'a Projection>,
    values: Vec<f32>,
    linears: HashMap<String, LinearChange>,
    norms: HashMap<String, Range<usize>>,
    embedding: EmbeddingChange,
    head_tokens: HashMap<u32, Range<usize>>,
    weights: Vec<Arc<dyn FrozenWeight>>,
}

fn push(values: &mut Vec<f32>, data: &[f32]) -> Range<usize> {
    let start = values.len();
    values.extend_from_slice(data);
    start..values.len()
}

impl<'a> Builder<'a> {
    fn new(model: &'a CausalLm) -> Self {
        Self {
            model,
            tied: false,
            projections: HashMap::new(),
            values: Vec::new(),
            linears: HashMap::new(),
            norms: HashMap::new(),
            embedding: EmbeddingChange::default(),
            head_tokens: HashMap::new(),
            weights: Vec::new(),
        }
    }

    fn linear(&mut self, name: &str) -> &mut LinearChange {
        self.linears.entry(name.to_owned()).or_default()
    }

    /// Drops the weights that no linear layer and no embedding uses any more, and counts each once.
    fn keep_linear_weights(&mut self) {
        let mut weights: Vec<Arc<dyn FrozenWeight>> = Vec::new();
        let used = self.linears.values().filter_map(|change| change.weight.as_ref()).chain(&self.embedding.table);
        for weight in used {
            if !weights.iter().any(|other| Arc::ptr_eq(other, weight)) {
                weights.push(weight.clone());
            }
        }
        self.weights = weights;
    }

    fn replace(&mut self, replaced: &Replaced) -> Result<()> {
        let Some((module, end)) = replaced.name.rsplit_once('.') else { return Ok(()) };
        let values = |data: &PlainData| {
            let mut values = vec![0.0; data.len()];
            data.to_f32(0..data.len(), &mut values);
            values
        };
        match (end, replaced.shape.as_slice()) {
            ("weight", &[rows, cols]) => {
                let own: &Arc<dyn FrozenWeight> = match module {
                    EMBEDDING => self.model.embedding(),
                    HEAD => self.model.head(),
                    _ => self.projection(module)?.weight(),
                };
                if (own.rows(), own.cols()) != (rows, cols) {
                    let message = format!("has shape [{rows}, {cols}], the model [{}, {}]", own.rows(), own.cols());
                    return Err(Error::tensor(&replaced.name, message));
                }
                let weight = place(PlainWeight::new(replaced.data.clone(), rows, cols), self.model.workspace())?;
                if replaced.is_base && same(&*weight, &**own) {
                    return Ok(());
                }
                let both = replaced.is_base && self.tied;
                if module == EMBEDDING || both {
                    self.embedding.table = Some(weight.clone());
                }
                if module != EMBEDDING || both {
                    let module = if both { HEAD } else { module };
                    self.linear(module).weight = Some(weight);
                }
                self.keep_linear_weights();
            }
            ("weight", &[_]) => {
                let range = push(&mut self.values, &values(&replaced.data));
                self.norms.insert(module.to_owned(), range);
            }
            ("bias", &[_]) => {
                let range = push(&mut self.values, &values(&replaced.data));
                self.linear(module).bias = Some(range);
            }
            _ => return Err(Error::tensor(&replaced.name, format!("has shape {:?}", replaced.shape))),
        }
        Ok(())
    }

    fn projection(&self, module: &str) -> Result<&'a Projection> {
        self.projections
            .get(module)
            .copied()
            .ok_or_else(|| Error::Invalid(format!("the adapter changes {module}, which the model does not have")))
    }

    fn lora(&mut self, module: &LoraModule) -> Result<()> {
        let (a, b) = (push(&mut self.values, &module.a), push(&mut self.values, &module.b));
        let scale = module.scaling as f32;
        let slot = LoraSlot { a, b, rank: module.rank, scale, stream: 0, kind: Default::default() };
        let (vocab, hidden) = (self.model.config().vocab_size, self.model.config().hidden_size);
        if module.name == EMBEDDING {
            self.check(module, vocab, hidden)?;
            if let Some(magnitude) = &module.magnitude {
                let table = self.embedding.table.as_ref().unwrap_or(self.model.embedding()).clone();
                let gain = embedding_gain(&*table, module, magnitude)?;
                self.embedding.gain = Some(push(&mut self.values, &gain));
            }
            self.embedding.lora = Some(slot);
            return Ok(());
        }
        let projection = if module.name == HEAD { None } else { Some(self.projection(&module.name)?) };
        let replaced = self.linears.get(&module.name).and_then(|change| change.weight.clone());
        let own = projection.map_or(self.model.head(), Projection::weight);
        let weight = replaced.unwrap_or_else(|| own.clone());
        self.check(module, weight.cols(), weight.rows())?;
        let gain = match &module.magnitude {
            None => None,
            Some(magnitude) => {
                let gain = gain(&*weight, module, magnitude, self.model.workspace())?;
                Some(push(&mut self.values, &gain))
            }
        };
        let bias = match &module.bias {
            None => None,
            Some(bias) => {
                let own = match self.linears.get(&module.name).and_then(|change| change.bias.clone()) {
                    Some(range) => self.values[range].to_vec(),
                    None => match projection.and_then(Projection::bias) {
                        Some(bias) => bias.to_vec()?,
                        None => vec![0.0; bias.len()],
                    },
                };
                let folded: Vec<f32> = own.iter().zip(bias).map(|(own, bias)| own + scale * bias).collect();
                // In the place of a bias that the adapter replaces.
                match self.linears.get(&module.name).and_then(|change| change.bias.clone()) {
                    Some(range) => {
                        self.values[range].copy_from_slice(&folded);
                        None
                    }
                    None => Some(push(&mut self.values, &folded)),
                }
            }
        };
        let change = self.linear(&module.name);
        change.lora = Some(slot);
        change.gain = gain;
        if bias.is_some() {
            change.bias = bias;
        }
        Ok(())
    }

    /// The head's A is the embedding's B transposed, and the other way round.
    fn tied_head(&mut self, module: &LoraModule) -> Result<()> {
        if module.magnitude.is_some() || self.linears.get(HEAD).is_some_and(|change| change.lora.is_some()) {
            return Err(Error::Unsupported("ensure_weight_tying with DoRA or a second adapter on the head".into()));
        }
        let rank = module.rank;
        let transposed = |data: &[f32], cols: usize| -> Vec<f32> {
            (0..cols).flat_map(|j| data.iter().skip(j).step_by(cols).copied()).collect()
        };
        let (hidden, vocab) = (module.b.len() / rank, module.a.len() / rank);
        debug_assert_eq!((module.a.len(), module.b.len()), (rank * vocab, rank * hidden));
        let a = push(&mut self.values, &transposed(&module.b, rank));
        let b = push(&mut self.values, &transposed(&module.a, vocab));
        self.linear(HEAD).lora =
            Some(LoraSlot { a, b, rank, scale: module.scaling as f32, stream: 0, kind: Default::default() });
        Ok(())
    }

    fn check(&self, module: &LoraModule, inputs: usize, outputs: usize) -> Result<()> {
        let vector = |data: &Option<Vec<f32>>| data.as_ref().is_none_or(|data| data.len() == outputs);
        let fits = module.rank > 0 && module.a.len() == module.rank * inputs && module.b.len() == module.rank * outputs;
        if fits && vector(&module.bias) && vector(&module.magnitude) {
            return Ok(());
        }
        let message = format!("its A and B do not fit [{outputs}, {inputs}] with rank {}", module.rank);
        Err(Error::tensor(&module.name, message))
    }

    fn finish(self) -> Result<LoadedAdapter> {
        let changes = AdapterChanges { linears: self.linears, norms: self.norms };
        finish(self.model, self.values, changes, self.embedding, self.head_tokens, self.weights)
    }
}

fn finish(
    model: &CausalLm,
    mut values: Vec<f32>,
    changes: AdapterChanges,
    embedding: EmbeddingChange,
    head_tokens: HashMap<u32, Range<usize>>,
    weights: Vec<Arc<dyn FrozenWeight>>,
) -> Result<LoadedAdapter> {
    values.shrink_to_fit();
    // Not from the workspace's pool, whose memory comes in sizes that other matrices had.
    let values = match model.workspace().device().is_cpu() {
        true => Matrix::vector(values),
        false => model.workspace().upload(&values, 1, values.len())?,
    };
    let slots = changes.linears.iter().filter_map(|(name, change)| Some((name.as_str(), change.lora.as_ref()?)));
    let scalings = slots.chain(embedding.lora.as_ref().map(|slot| (EMBEDDING, slot)));
    let scalings = scalings.map(|(name, slot)| (name.to_owned(), slot.scale)).collect();
    Ok(LoadedAdapter { values, changes, embedding, head_tokens, weights, weight: 1.0, scalings })
}

/// A weight as it is, on the model's device.
fn place(weight: PlainWeight, workspace: &Workspace) -> Result<Arc<dyn FrozenWeight>> {
    #[cfg(feature = "cuda")]
    if workspace.gpu().is_some() {
        return Ok(Arc::new(qlora_kernels::cuda::CudaWeight::plain(&weight, workspace)?));
    }
    let _ = workspace;
    Ok(Arc::new(weight))
}

/// Rows of a weight, a few at a time.
fn chunks(weight: &dyn FrozenWeight) -> impl Iterator<Item = Range<usize>> + use<> {
    let (rows, step) = (weight.rows(), (CHUNK / weight.cols().max(1)).max(1));
    (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
}

fn same(left: &dyn FrozenWeight, right: &dyn FrozenWeight) -> bool {
    let (mut one, mut two) = (Vec::new(), Vec::new());
    chunks(left).all(|rows| {
        one.resize(rows.len() * left.cols(), 0.0);
        two.resize(rows.len() * left.cols(), 0.0);
        left.dequantize_rows(rows.clone(), &mut one);
        right.dequantize_rows(rows, &mut two);
        one == two
    })
}

/// `m / ||W + s B A||` of every row.
fn gain(weight: &dyn FrozenWeight, module: &LoraModule, magnitude: &[f32], workspace: &Workspace) -> Result<Vec<f32>> {
    let (rows, cols, scale) = (weight.rows(), weight.cols(), module.scaling as f32);
    #[cfg(feature = "cuda")]
    if weight.as_cuda().is_some() && workspace.gpu().is_some() {
        let a = workspace.upload(&module.a, module.rank, cols)?;
        let b = workspace.upload(&module.b, rows, module.rank)?;
        let mut inverse = workspace.matrix_f32(1, rows)?;
        dora_linear::inverse_norms(weight, a.view(), b.view(), scale, inverse.view_mut())?;
        return finite(module, inverse.to_vec()?.iter().zip(magnitude).map(|(inverse, m)| m * inverse).collect());
    }
    let _ = workspace;
    let (a, b) = (View::new(&module.a, module.rank, cols), View::new(&module.b, rows, module.rank));
    let squares = dora_linear::row_squares(weight, a, b, scale)?;
    finite(module, squares.iter().zip(magnitude).map(|(square, m)| (f64::from(*m) / square.sqrt()) as f32).collect())
}

/// `m / ||E + s (B A)^T||` of every column of the table.
pub(crate) fn embedding_gain(table: &dyn FrozenWeight, module: &LoraModule, magnitude: &[f32]) -> Result<Vec<f32>> {
    let (vocab, hidden) = (table.rows(), table.cols());
    let a = View::new(&module.a, module.rank, vocab);
    let b: Vec<f32> = (0..module.rank).flat_map(|k| module.b.iter().skip(k).step_by(module.rank).copied()).collect();
    let b = View::new(&b, module.rank, hidden);
    let (mut squares, mut memory) = (vec![0f64; hidden], Vec::new());
    for rows in chunks(table) {
        memory.resize(rows.len() * hidden, 0.0);
        table.dequantize_rows(rows.clone(), &mut memory);
        let sum = ViewMut::new(&mut memory, rows.len(), hidden);
        matmul::tn(a.slice_cols(rows), b, sum, module.scaling as f32, 1.0)?;
        for row in memory.chunks_exact(hidden.max(1)) {
            squares.iter_mut().zip(row).for_each(|(square, &w)| *square += f64::from(w) * f64::from(w));
        }
    }
    let gain = squares.iter().zip(magnitude).map(|(square, m)| (f64::from(*m) / square.sqrt()) as f32).collect();
    finite(module, gain)
}

fn finite(module: &LoraModule, gain: Vec<f32>) -> Result<Vec<f32>> {
    match gain.iter().position(|gain| !gain.is_finite()) {
        None => Ok(gain),
        Some(i) => Err(Error::tensor(
            format!("{}.lora_magnitude_vector", module.name),
            format!("feature {i} of the weight with its adapter is zero: DoRA divides by its norm"),
        )),
    }
}

/// One adapter of several plain ones.
pub(super) fn combine(
    model: &CausalLm,
    sources: &[(&LoadedAdapter, f32)],
    combination: Combination,
) -> Result<LoadedAdapter> {
    // Per module its parts: values, slot, weight.
    let mut modules: BTreeMap<&str, Vec<(&LoadedAdapter, &LoraSlot, f32)>> = BTreeMap::new();
    for &(source, weight) in sources {
        let linears =
            source.changes.linears.iter().filter_map(|(name, change)| Some((name.as_str(), change.lora.as_ref()?)));
        for (name, slot) in linears.chain(source.embedding.lora.as_ref().map(|slot| (EMBEDDING, slot))) {
            modules.entry(name).or_default().push((source, slot, weight * slot.scale));
        }
    }
    let read: Vec<(*const LoadedAdapter, Vec<f32>)> = sources
        .iter()
        .map(|&(source, _)| Ok((std::ptr::from_ref(source), source.values.to_vec()?)))
        .collect::<Result<_>>()?;
    let values_of = |source: &LoadedAdapter| -> &[f32] {
        read.iter().find(|(other, _)| std::ptr::eq(*other, source)).map_or(&[], |(_, values)| values)
    };
    let mut values = Vec::new();
    let (mut changes, mut embedding) = (AdapterChanges::default(), EmbeddingChange::default());
    for (name, parts) in modules {
        let parts: Vec<(&[f32], &LoraSlot, f32)> =
            parts.iter().map(|(source, slot, weight)| (values_of(source), *slot, *weight)).collect();
        let slot = match combination {
            Combination::Cat => concatenated(&parts, &mut values),
            Combination::Linear => summed(name, &parts, &mut values)?,
        };
        if name == EMBEDDING {
            embedding.lora = Some(slot);
        } else {
            changes.linears.insert(name.to_owned(), LinearChange { lora: Some(slot), ..Default::default() });
        }
    }
    finish(model, values, changes, embedding, HashMap::new(), Vec::new())
}

/// `[w1 A1; w2 A2; ..]` and `[B1 | B2 | ..]`.
fn concatenated(parts: &[(&[f32], &LoraSlot, f32)], values: &mut Vec<f32>) -> LoraSlot {
    let start = values.len();
    for (of, slot, weight) in parts {
        values.extend(of[slot.a.clone()].iter().map(|a| a * weight));
    }
    let middle = values.len();
    let outputs = parts.first().map_or(0, |(_, slot, _)| slot.b.len() / slot.rank.max(1));
    for row in 0..outputs {
        for (of, slot, _) in parts {
            values.extend_from_slice(&of[slot.b.clone()][row * slot.rank..][..slot.rank]);
        }
    }
    let rank = parts.iter().map(|(_, slot, _)| slot.rank).sum();
    LoraSlot { a: start..middle, b: middle..values.len(), rank, scale: 1.0, stream: 0, kind: Default::default() }
}

/// `sum of sign(w) sqrt|w| A` and `sum of sqrt|w| B`.
fn summed(name: &str, parts: &[(&[f32], &LoraSlot, f32)], values: &mut Vec<f32>) -> Result<LoraSlot> {
    let (_, first, _) = parts[0];
    if let Some((_, slot, _)) = parts.iter().find(|(_, slot, _)| slot.rank != first.rank) {
        return Err(Error::Invalid(format!(
            "{name}: adapters of ranks {} and {} cannot be summed; Combination::Cat takes any ranks",
            first.rank, slot.rank
        )));
    }
    let start = values.len();
    values.resize(start + first.a.len() + first.b.len(), 0.0);
    let (a, b) = values[start..].split_at_mut(first.a.len());
    for (of, slot, weight) in parts {
        let root = weight.abs().sqrt();
        let signed = root.copysign(*weight);
        a.iter_mut().zip(&of[slot.a.clone()]).for_each(|(sum, a)| *sum += signed * a);
        b.iter_mut().zip(&of[slot.b.clone()]).for_each(|(sum, b)| *sum += root * b);
    }
    let middle = start + first.a.len();
    Ok(LoraSlot {
        a: start..middle,
        b: middle..values.len(),
        rank: first.rank,
        scale: 1.0,
        stream: 0,
        kind: Default::default(),
    })
}
