//! The trained adapter of a model: given to it, taken away, switched off.

use candle_core::{Tensor, Var};
use qlora_kernels::ops::adapter_rows::{AdapterChanges, LinearChange};
use qlora_kernels::weight::FrozenCompute;

use super::causal_lm::CausalLm;
use super::memory_use::FP8_WITH_DORA;
use super::projection::LoraSlot;
use super::trained::TrainedAdapter;
use crate::adapter::kinds::tables::{self, TrainedTables};
use crate::adapter::kinds::{EMBEDDING, HEAD, dora};
use crate::error::{Error, Result};
use crate::lora::{AdapterLayout, Entry, LoraConfig, Which};

impl CausalLm {
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
        self.adapter = Some(TrainedAdapter::new(config, layout, flat, changes, tables));
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

    pub(super) fn adapter_to_train(&self) -> Result<&TrainedAdapter> {
        self.adapter.as_ref().ok_or_else(|| {
            Error::Invalid("the model has no adapter to train: call add_adapter or set_adapter first".into())
        })
    }
}
