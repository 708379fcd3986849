//! The decoder of `qlora-core` as the training loop drives it.

use std::ops::ControlFlow;
use std::path::Path;

use qlora_core::adapter::{self, SaveOptions};
use qlora_core::batch::Batch;
use qlora_core::generate::generate;
use qlora_core::lora::{AdapterLayout, Entry, Which};
use qlora_core::model::{AdapterChoice, CausalLm, TrainPass};
use qlora_core::sampling::GenerationConfig;
use qlora_core::{Error, Result};
use qlora_kernels::ops::linear_cross_entropy::LossSum;
use qlora_kernels::{ViewMut, Workspace};

use crate::model::{Parameter, TrainableModel, Weights};

/// The name under which a model holds the adapter that a run began from, if it began from one (TRL's name).
pub const REFERENCE: &str = "ref";

/// A model with an adapter, whose f32 variable holds the master parameters, and the options of saving it.
#[derive(Debug)]
pub struct QLoraModel {
    model: CausalLm,
    save: SaveOptions,
    identity: Vec<(String, String)>,
}

impl QLoraModel {
    /// Wraps a model that has an adapter. `identity` names what makes the model another one, for resumed runs.
    ///
    /// # Errors
    /// If the model has no adapter.
    pub fn new(model: CausalLm, save: SaveOptions, identity: Vec<(String, String)>) -> Result<Self> {
        if model.adapter().is_none() {
            return Err(Error::Invalid("the model has no adapter to train".into()));
        }
        Ok(Self { model, save, identity })
    }

    /// The model with its adapter as of the last step.
    pub fn model(&self) -> &CausalLm {
        &self.model
    }

    /// Gives the model back.
    pub fn into_model(self) -> CausalLm {
        self.model
    }

    fn adapter(&self) -> &qlora_core::model::TrainedAdapter {
        self.model.adapter().expect("checked in new; nothing takes the adapter away")
    }
}

/// The trainable tensors of an adapter.
pub(crate) fn parameters_of(layout: &AdapterLayout) -> Vec<Parameter> {
    let entries = layout.entries();
    let partner =
        |entry: &Entry, which: Which| entries.iter().position(|e| e.module == entry.module && e.which == which);
    // B starts at zero, of the embedding A.
    let silencer = |entry: &Entry| match (entry.which, entry.module.ends_with("embed_tokens")) {
        (Which::A, false) => partner(entry, Which::B),
        (Which::B, true) => partner(entry, Which::A),
        _ => None,
    };
    let parameter = |entry: &Entry| Parameter {
        name: entry.tensor_name(),
        range: entry.range(),
        shape: entry.shape(),
        silenced_by: silencer(entry),
        may_rest: entry.which == Which::TokenRows,
        decays: !matches!(entry.which, Which::Bias { .. }),
    };
    entries.iter().map(parameter).collect()
}

impl TrainableModel for QLoraModel {
    fn parameters(&self) -> Vec<Parameter> {
        parameters_of(self.adapter().layout())
    }

    fn workspace(&self) -> Result<Workspace> {
        Ok(self.model.workspace().clone())
    }

    fn masters(&self) -> Result<Vec<f32>> {
        self.adapter().values()
    }

    fn update_masters(&mut self, update: &mut dyn FnMut(ViewMut) -> qlora_kernels::Result<()>) -> Result<()> {
        self.adapter().update(update)
    }

    fn accumulate_gradients(&mut self, batch: &Batch, items: usize, pass: TrainPass, grad: ViewMut) -> Result<f64> {
        Ok(self.model.accumulate_gradients(batch, items, pass, grad)?.sum)
    }

    fn accumulate_weighted_gradients(
        &mut self,
        batch: &Batch,
        pass: TrainPass,
        weigh: &mut dyn FnMut(&[f64]) -> Result<Vec<f32>>,
        grad: ViewMut,
    ) -> Result<()> {
        self.model.accumulate_weighted_gradients(batch, pass, weigh, grad)
    }

    fn log_probabilities(&mut self, batch: &Batch, weights: Weights) -> Result<Vec<f64>> {
        let choice = match weights {
            Weights::Trained => AdapterChoice::Active,
            Weights::Reference if self.model.adapter_names().any(|name| name == REFERENCE) => {
                AdapterChoice::Named(REFERENCE)
            }
            Weights::Reference => AdapterChoice::Base,
        };
        self.model.log_probabilities(batch, choice)
    }

    fn generate(
        &mut self,
        prompt: &[u32],
        config: &GenerationConfig,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>> {
        let answer = generate(&self.model, prompt, config, on_token)?;
        Ok(answer.tokens)
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<LossSum> {
        self.model.evaluate(batch)
    }

    fn save_adapter(&self, folder: &Path) -> Result<()> {
        let adapter = self.adapter();
        adapter::save(folder, adapter.config(), adapter.layout(), &adapter.values()?, &self.save)
    }

    fn identity(&self) -> Vec<(String, String)> {
        self.identity.clone()
    }

    fn vocab_size(&self) -> Option<usize> {
        Some(self.model.config().vocab_size)
    }

    fn max_positions(&self) -> Option<usize> {
        Some(self.model.config().max_position_embeddings)
    }
}
