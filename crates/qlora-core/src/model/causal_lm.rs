//! A causal language model: embedding, decoder stack, head, and at most one adapter.

use std::sync::Arc;

use candle_core::{Tensor, Var};
use qlora_kernels::ops::adapter_rows::{AdapterChanges, LinearChange};
use qlora_kernels::ops::linear_cross_entropy::LossSum;
use qlora_kernels::ops::{embedding, frozen_linear};
use qlora_kernels::weight::{FrozenCompute, FrozenWeight};
use qlora_kernels::{Matrix, SequenceLayout, ViewMut, Workspace};

use super::adapters::{AdapterChoices, AdapterSet, Span};
use super::block::{Keep, Pass};
use super::cache::KvCache;
use super::projection::LoraSlot;
use super::stack::Stack;
use super::train::TrainPass;
use super::trained::Adapter;
use crate::adapter::kinds::tables::{self, TrainedTables};
use crate::adapter::kinds::{EMBEDDING, HEAD, dora};
use crate::autograd;
use crate::batch::Batch;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::lora::{AdapterLayout, Entry, LoraConfig, Which};

/// A model with frozen weights and, once [`Self::add_adapter`] or [`Self::set_adapter`] was called, a trainable adapter.
#[derive(Debug)]
pub struct CausalLm {
    config: ModelConfig,
    embedding: Arc<dyn FrozenWeight>,
    head: Arc<dyn FrozenWeight>,
    stack: Arc<Stack>,
    adapter: Option<Adapter>,
    pub(super) adapters: AdapterSet,
    enabled: bool,
    workspace: Workspace,
    #[cfg(feature = "cuda")]
    pub(super) steps: super::decode_graph::DecodeSteps,
}

/// Bytes held by a model, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// The blocks' frozen projections.
    pub projections: usize,
    /// The embedding, and the head where it is not the embedding.
    pub embeddings: usize,
    /// Norm weights and biases.
    pub vectors: usize,
    /// The values of the adapter that is trained.
    pub adapter: usize,
    /// The loaded adapters: their values and the weights that they hold whole.
    pub loaded_adapters: usize,
}

impl MemoryUse {
    /// All parts.
    pub fn total(&self) -> usize {
        self.projections + self.embeddings + self.vectors + self.adapter + self.loaded_adapters
    }
}

impl CausalLm {
    /// Puts a model together from its parts; [`Self::load`] reads them from a checkpoint.
    pub fn new(
        config: ModelConfig,
        embedding: Arc<dyn FrozenWeight>,
        head: Arc<dyn FrozenWeight>,
        stack: Stack,
        workspace: Workspace,
    ) -> Self {
        let stack = Arc::new(stack);
        Self {
            config,
            embedding,
            head,
            stack,
            adapter: None,
            adapters: AdapterSet::default(),
            enabled: true,
            workspace,
            #[cfg(feature = "cuda")]
            steps: super::decode_graph::DecodeSteps::default(),
        }
    }

    /// The model's description.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The adapter, if there is one.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// The device and allocator of this model's activations.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// The embedding table `[vocab_size, hidden_size]`.
    pub fn embedding(&self) -> &Arc<dyn FrozenWeight> {
        &self.embedding
    }

    /// The head `[vocab_size, hidden_size]`; the embedding where they are tied.
    pub fn head(&self) -> &Arc<dyn FrozenWeight> {
        &self.head
    }

    /// The decoder stack.
    pub fn stack(&self) -> &Arc<Stack> {
        &self.stack
    }

    /// A fresh adapter: A kaiming-uniform from `seed`, B zero, DoRA's magnitudes the norms of the weights' rows, rows of tokens,
    /// whole tables and biases the base's, so that the model computes what it did before.
    ///
    /// # Errors
    /// If the configuration targets nothing, a graph of this model is still alive, or a weight with a row of zeros gets a magnitude.
    pub fn add_adapter(&mut self, config: LoraConfig, seed: u64) -> Result<()> {
        let layout = AdapterLayout::for_model(&config, &self.config)?;
        let values = crate::lora::init(&layout, seed);
        self.set_adapter(config, layout, values)?;
        if let Err(error) = self.start_with_the_base().and_then(|()| self.start_magnitudes()) {
            self.remove_adapter()?;
            return Err(error);
        }
        Ok(())
    }

    /// Rows, tables and biases that take the place of the base's begin as these.
    fn start_with_the_base(&self) -> Result<()> {
        let adapter = self.adapter_to_train()?;
        if adapter.tables().is_empty() && adapter.layout().biases().next().is_none() {
            return Ok(());
        }
        let mut values = adapter.values()?;
        for projection in self.stack.blocks().iter().flat_map(|block| block.projections()) {
            if let (Some(place), Some(bias)) = (projection.bias_place(), projection.bias()) {
                values[place.clone()].copy_from_slice(&bias.to_vec()?);
            }
        }
        for entry in adapter.layout().tables() {
            let weight = if entry.module == HEAD { &self.head } else { &self.embedding };
            tables::start(entry, adapter.config(), &**weight, &mut values, &self.workspace)?;
        }
        adapter.set_values(&values)
    }

    fn start_magnitudes(&self) -> Result<()> {
        let adapter = self.adapter_to_train()?;
        let Some(norms) = adapter.inverse_norms(&self.stack, &self.workspace)? else { return Ok(()) };
        let mut values = adapter.values()?;
        dora::start(self.stack.adapted(), &mut values, &norms.to_vec()?)?;
        adapter.set_values(&values)
    }

    /// An adapter with given values, as [`crate::adapter::load`] returns them.
    ///
    /// # Errors
    /// If the layout names a module that this model does not have, shapes differ, or a graph of this model is alive.
    pub fn set_adapter(&mut self, mut config: LoraConfig, layout: AdapterLayout, values: Vec<f32>) -> Result<()> {
        // On a model whose tables are two it has no effect.
        config.ensure_weight_tying &= self.config.tie_word_embeddings;
        if values.len() != layout.len() {
            let (got, expected) = (values.len(), layout.len());
            return Err(Error::Invalid(format!("the adapter has {expected} values, {got} were given")));
        }
        if layout.entries().iter().any(|entry| entry.which == Which::Magnitude) != config.use_dora {
            return Err(Error::Invalid(format!("use_dora = {}: the layout is of another kind", config.use_dora)));
        }
        if config.use_dora && self.frozen_compute() == FrozenCompute::Fp8 {
            return Err(Error::Invalid(FP8_WITH_DORA.into()));
        }
        let tables = TrainedTables::new(&config, &layout, &self.config, self.workspace.device().is_cpu())?;
        let stack = self.stack_mut()?;
        let mut changes = AdapterChanges::default();
        let (mut placed, mut norms, mut biases) = (0, 0, 0);
        for (index, projection) in stack.blocks_mut().iter_mut().flat_map(|block| block.projections_mut()).enumerate() {
            let slot = layout.get(projection.name()).map(|pair| -> Result<LoraSlot> {
                let rank = pair.rank();
                let factors = [(pair.a, [rank, projection.inputs()]), (pair.b, [projection.outputs(), rank])];
                let magnitude = pair.magnitude.map(|entry| (entry, [projection.outputs(), 1]));
                for (entry, shape) in factors.into_iter().chain(magnitude) {
                    if [entry.rows, entry.cols] != shape {
                        let message = format!("has shape {:?}, expected {shape:?}", [entry.rows, entry.cols]);
                        return Err(Error::tensor(entry.tensor_name(), message));
                    }
                }
                let (a, b) = (pair.a.range(), pair.b.range());
                let scale = config.scaling_of(projection.name()) as f32;
                let kind = dora::slot_kind(&pair, &mut norms);
                Ok(LoraSlot { a, b, rank, scale, stream: index as u64, kind })
            });
            placed += usize::from(slot.is_some());
            let slot = slot.transpose()?;
            let bias = layout.biases().find(|entry| entry.module == projection.name()).map(Entry::range);
            biases += usize::from(bias.is_some());
            if slot.is_some() || bias.is_some() {
                let change = slot.as_ref().map(|slot| dora::change(slot, layout.len())).unwrap_or_default();
                changes.linears.insert(projection.name().to_owned(), LinearChange { bias: bias.clone(), ..change });
            }
            projection.set_bias_place(bias)?;
            projection.set_slot(slot);
        }
        if biases != layout.biases().count() {
            return Err(Error::Invalid(format!(
                "the adapter has {} biases, {biases} of them are of linear layers of the model's blocks",
                layout.biases().count()
            )));
        }
        let modules = layout.modules().filter(|module| ![EMBEDDING, HEAD].contains(module)).count();
        if placed != modules {
            return Err(Error::Invalid(format!(
                "the adapter is on {modules} modules, {placed} of them are linear layers of the model's blocks"
            )));
        }
        let flat = Var::from_tensor(&Tensor::from_vec(values, layout.len(), &self.workspace.device())?)?;
        self.adapter = Some(Adapter::new(config, layout, flat, changes, tables));
        Ok(())
    }

    /// Takes the adapter away.
    pub fn remove_adapter(&mut self) -> Result<()> {
        for projection in self.stack_mut()?.blocks_mut().iter_mut().flat_map(|block| block.projections_mut()) {
            projection.set_slot(None);
            projection.set_bias_place(None)?;
        }
        self.adapter = None;
        Ok(())
    }

    /// Runs the model with or without its adapter, loaded or trained; it stays in memory.
    pub fn enable_adapter(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// See [`Self::enable_adapter`].
    pub fn adapter_enabled(&self) -> bool {
        self.enabled
    }

    /// Recompute every block in the backward instead of keeping its activations: less memory, more time, same bits.
    pub fn set_gradient_checkpointing(&mut self, on: bool) -> Result<()> {
        self.stack_mut()?.set_gradient_checkpointing(on);
        Ok(())
    }

    /// Chooses the arithmetic of the products with the frozen weights of all blocks, forward and backward: in the type of the
    /// activations, or in fp8: in training, in evaluation, and over prompts. Generation's steps of a few tokens read 4-bit weights as
    /// they are stored, and so are not changed by it.
    ///
    /// # Errors
    /// If it is fp8 and the model is not on a Hopper GPU, or its adapter is a DoRA, whose layers are multiplied one by one.
    pub fn set_frozen_compute(&self, compute: FrozenCompute) -> Result<()> {
        if compute == FrozenCompute::Fp8 {
            check_fp8(&self.workspace)?;
            if self.adapter().is_some_and(|adapter| adapter.config().use_dora) {
                return Err(Error::Invalid(FP8_WITH_DORA.into()));
            }
            if !self.has_fp8_layers() {
                let message = "frozen_compute = \"fp8\" has no layer to run in: LLM.int8's layers round their inputs in their own \
                               way, and sizes have to be multiples of 16. Leave it out";
                return Err(Error::Invalid(message.into()));
            }
        }
        self.stack.blocks().iter().for_each(|block| block.policy.set_frozen_compute(compute));
        Ok(())
    }

    /// Whether there are layers that [`Self::set_frozen_compute`] can run in fp8.
    pub fn has_fp8_layers(&self) -> bool {
        let fits = |size: usize| size.is_multiple_of(16);
        self.stack.blocks().iter().flat_map(|block| block.projections()).any(|projection| {
            let weight = projection.weight();
            weight.int8_activations().is_none() && fits(weight.rows()) && fits(weight.cols())
        })
    }

    /// See [`Self::set_frozen_compute`].
    pub fn frozen_compute(&self) -> FrozenCompute {
        self.stack.blocks().first().map_or_else(FrozenCompute::default, |block| block.policy.frozen_compute())
    }

    /// Sets the activations that each block keeps for its backward (one choice a block).
    ///
    /// # Errors
    /// If there is not one choice a block, or a loss of this model is still alive.
    pub fn set_keep(&mut self, keep: Vec<Keep>) -> Result<()> {
        self.stack_mut()?.set_keep(keep)
    }

    /// Dequantize one weight at a time (CUDA only): less memory, more time.
    pub fn set_split_weights(&self, on: bool) {
        self.stack.blocks().iter().for_each(|block| block.policy.set_split(on));
    }

    /// Keep the dequantized weights of every block between uses (CUDA only): 2 bytes a parameter for the time of
    /// dequantizing; same bits.
    pub fn set_weight_cache(&self, on: bool) {
        self.stack.blocks().iter().for_each(|block| block.policy.set_weights_kept(on));
    }

    /// The mean loss over `num_items` trained tokens as a candle scalar: `loss.backward()` gives the gradient of
    /// [`Adapter::variable`]. `num_items` counts the whole optimizer step, so that micro-batches add up.
    ///
    /// # Errors
    /// If there is no adapter, a token or target is outside the vocabulary, or a sequence is too long.
    pub fn loss(&self, batch: &Batch, num_items: usize, train: TrainPass) -> Result<Tensor> {
        let adapter = self.adapter_to_train()?;
        let trained = (adapter.tables(), adapter.flat.as_tensor());
        let x = autograd::tables::embedding(&batch.tokens, &self.embedding, trained, &self.workspace)?;
        let layout = Arc::new(batch.layout.clone());
        let dropout = adapter.dropout(train);
        let hidden =
            autograd::stack::apply(&self.stack, &x, adapter.flat.as_tensor(), layout, dropout, &self.workspace)?;
        let (head, targets) = (&self.head, &batch.targets);
        autograd::tables::linear_cross_entropy(&hidden, head, trained, dropout, targets, num_items, &self.workspace)
    }

    /// The sum of the losses of a batch, without gradient and without dropout.
    pub fn evaluate(&self, batch: &Batch) -> Result<LossSum> {
        let spans = self.spans(batch.layout.sequences(), AdapterChoices::default())?;
        let hidden = self.hidden(&batch.tokens, &batch.layout, &spans)?;
        self.head_loss(&hidden, &batch.targets, &spans)
    }

    /// The logits of every token of a batch of sequences, `[tokens, vocab_size]`: for tests and analysis (training never makes them
    /// whole).
    ///
    /// # Errors
    /// If a token is outside the vocabulary, a sequence is too long, there is not one choice a sequence, or a chosen adapter is not
    /// loaded.
    pub fn logits<'a>(
        &self,
        tokens: &[u32],
        layout: &SequenceLayout,
        adapters: impl Into<AdapterChoices<'a>>,
    ) -> Result<Tensor> {
        let spans = self.spans(layout.sequences(), adapters.into())?;
        let hidden = self.hidden(tokens, layout, &spans)?;
        let logits = self.head_logits(&hidden, &spans)?;
        Ok(logits.into_tensor((tokens.len(), self.config.vocab_size))?)
    }

    /// An empty cache for a text of at most `capacity` tokens.
    pub fn new_cache(&self, capacity: usize) -> KvCache {
        let width = self.config.num_key_value_heads * self.config.head_dim;
        KvCache::new(self.config.num_hidden_layers, width, capacity)
    }

    /// Runs the next tokens of each sequence, whose earlier ones are in its cache, and returns the logits that follow the last of
    /// them, `[sequences, vocab_size]`; each weight is read once for all. The contents of a cache were made with the adapter of its
    /// sequence: a sequence keeps its choice.
    ///
    /// # Errors
    /// If a sequence has no token, a cache is too small, a token is outside the vocabulary, there is not one cache or choice a
    /// sequence, or a chosen adapter is not loaded. The caches are then as before.
    pub fn next_logits<'a>(
        &self,
        sequences: &[&[u32]],
        caches: &mut [&mut KvCache],
        adapters: impl Into<AdapterChoices<'a>>,
    ) -> Result<Matrix> {
        if sequences.len() != caches.len() {
            let (got, expected) = (caches.len(), sequences.len());
            return Err(Error::Invalid(format!("{expected} sequences need as many caches, {got} were given")));
        }
        if sequences.is_empty() || sequences.iter().any(|tokens| tokens.is_empty()) {
            return Err(Error::Invalid("generation needs at least one token to start from".into()));
        }
        let seen: Vec<usize> = caches.iter().map(|cache| cache.len()).collect();
        let result = self.run_cached(sequences, caches, &seen, adapters.into());
        if result.is_err() {
            caches.iter_mut().zip(&seen).for_each(|(cache, &len)| cache.truncate(len));
        }
        result
    }

    fn run_cached(
        &self,
        sequences: &[&[u32]],
        caches: &mut [&mut KvCache],
        seen: &[usize],
        choices: AdapterChoices,
    ) -> Result<Matrix> {
        let tokens = sequences.concat();
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let layout = SequenceLayout::from_lengths(&lengths);
        let ends = || seen.iter().zip(&lengths).map(|(seen, len)| seen + len);
        let rope = self.stack.rope(ends().max().unwrap_or(0))?;
        let positions: Vec<u32> = seen.iter().zip(ends()).flat_map(|(&seen, end)| seen as u32..end as u32).collect();
        let spans = self.spans(layout.sequences(), choices)?;
        #[cfg(feature = "cuda")]
        if layout.uniform_len() == Some(1)
            && let Some(logits) = self.decode_step(&tokens, caches, &layout, &rope, &spans)?
        {
            return Ok(logits);
        }
        let x = self.embed_with(&tokens, &spans)?;
        let hidden = self.with_pass(&spans, |adapter| {
            let pass = Pass { adapter, layout: &layout, rope: &rope, workspace: &self.workspace };
            self.stack.infer_cached(x, &positions.into(), caches, &pass)
        })?;
        let last = match hidden.rows() == sequences.len() {
            true => hidden,
            false => {
                let mut last = self.workspace.matrix(sequences.len(), hidden.cols())?;
                for (row, range) in layout.sequences().enumerate() {
                    let from = hidden.view().slice_rows(range.end - 1..range.end);
                    last.view_mut().slice_rows(row..row + 1).copy_from(from)?;
                }
                last
            }
        };
        let rows: Vec<_> = (0..sequences.len()).map(|row| row..row + 1).collect();
        self.head_logits(&last, &self.spans(rows.into_iter(), choices)?)
    }

    /// Bytes held, by part.
    pub fn memory(&self) -> MemoryUse {
        let mut memory = MemoryUse { embeddings: self.embedding.bytes(), ..MemoryUse::default() };
        if !Arc::ptr_eq(&self.embedding, &self.head) {
            memory.embeddings += self.head.bytes();
        }
        for block in self.stack.blocks() {
            memory.projections += block.projections().iter().map(|p| p.weight().bytes()).sum::<usize>();
            memory.vectors += block.vector_bytes();
        }
        memory.vectors += self.stack.final_norm().bytes();
        memory.loaded_adapters = self.loaded_bytes();
        memory.adapter = self.adapter.as_ref().map_or(0, |adapter| adapter.layout().len() * size_of::<f32>());
        memory
    }

    pub(super) fn hidden(&self, tokens: &[u32], layout: &SequenceLayout, spans: &[Span]) -> Result<Matrix> {
        let rope = self.stack.rope(layout.max_len())?;
        let x = self.embed_with(tokens, spans)?;
        self.with_pass(spans, |adapter| {
            self.stack.infer(x, &Pass { adapter, layout, rope: &rope, workspace: &self.workspace })
        })
    }

    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Matrix> {
        let mut x = self.workspace.matrix(tokens.len(), self.config.hidden_size)?;
        embedding::forward(tokens, &*self.embedding, x.view_mut())?;
        Ok(x)
    }

    pub(super) fn base_logits(&self, hidden: &Matrix, logits: ViewMut) -> Result<()> {
        Ok(frozen_linear::forward(hidden.view(), &*self.head, logits, 0.0, &self.workspace)?)
    }

    pub(super) fn adapter_to_train(&self) -> Result<&Adapter> {
        self.adapter.as_ref().ok_or_else(|| {
            Error::Invalid("the model has no adapter to train: call add_adapter or set_adapter first".into())
        })
    }

    /// Drops recorded steps of generation: they hold addresses and scales that are about to change.
    pub(super) fn forget_steps(&mut self) {
        #[cfg(feature = "cuda")]
        self.steps.forget();
    }

    pub(super) fn stack_mut(&mut self) -> Result<&mut Stack> {
        self.forget_steps();
        Arc::get_mut(&mut self.stack).ok_or_else(|| {
            Error::Invalid("a loss of this model is still alive: drop it before changing the model".into())
        })
    }
}

const FP8_WITH_DORA: &str = "frozen_compute = \"fp8\" is not there for DoRA: leave one of the two out";

/// Whether the memory's device multiplies frozen weights in fp8 ([`CausalLm::set_frozen_compute`]).
///
/// # Errors
/// If it does not: on the CPU, and on GPUs other than Hopper.
pub fn check_fp8(workspace: &Workspace) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = workspace.gpu() {
        return Ok(gpu.check_fp8()?);
    }
    let _ = workspace;
    let message =
        "frozen_compute = \"fp8\" needs a Hopper GPU (H100, H200, GH200), and this run is on the CPU: leave it out";
    Err(Error::Invalid(message.into()))
}
