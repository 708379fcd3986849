//! The interface that the training loop needs of a model.

use std::ops::{ControlFlow, Range};
use std::path::Path;

pub use qlora_kernels::ops::linear_cross_entropy::LossSum;

use qlora_core::batch::Batch;
pub use qlora_core::model::TrainPass;
use qlora_core::sampling::GenerationConfig;
use qlora_core::{Error, Result};
use qlora_kernels::{ViewMut, Workspace};

/// A trainable tensor: a stretch of the model's flat parameter buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name, for messages and checkpoints.
    pub name: String,
    /// Its elements in the flat buffer, row-major.
    pub range: Range<usize>,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The index of the parameter whose zeros silence this one's gradient: lora_A names its lora_B, which starts at zero.
    pub silenced_by: Option<usize>,
    /// Its gradient may be zero for as long as the data has nothing of it: rows of the embedding, whose tokens come or do not.
    pub may_rest: bool,
    /// Whether `weight_decay` applies to it: as in transformers to everything but biases and the weights of norms.
    pub decays: bool,
}

/// The weights that compute log-probabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Weights {
    /// As they are now.
    Trained,
    /// As they were when the run began: the base with its adapter off, or with the adapter that the run goes on from.
    Reference,
}

/// A model whose trainable parameters lie in one flat f32 buffer, on the CPU or a GPU.
///
/// The loop zeroes a gradient buffer, lets the model add the gradients of each micro-batch to it, clips, and updates the
/// master parameters with AdamW. Gradient and moments are where [`TrainableModel::workspace`] says.
pub trait TrainableModel {
    /// The trainable tensors. Their ranges follow each other without a gap and cover [`TrainableModel::masters`].
    fn parameters(&self) -> Vec<Parameter>;

    /// The device and allocator of the parameters, the gradient and the optimizer's state: the CPU by default.
    ///
    /// # Errors
    /// If the device cannot be used.
    fn workspace(&self) -> Result<Workspace> {
        Ok(Workspace::cpu())
    }

    /// A copy of the f32 master parameters.
    ///
    /// # Errors
    /// If the device fails.
    fn masters(&self) -> Result<Vec<f32>>;

    /// Lets `update` change the f32 master parameters where they are, as one row: the optimizer's step, or the values of
    /// a resumed run. Values that the model derives from them are updated before this returns.
    ///
    /// # Errors
    /// The error of `update`, or one of the model; it ends the run.
    fn update_masters(&mut self, update: &mut dyn FnMut(ViewMut) -> qlora_kernels::Result<()>) -> Result<()>;

    /// Adds the gradient of `loss_scale * (sum of the micro-batch's cross-entropies) / num_items` to `grad` (one row, f32), and
    /// returns the sum (neither divided nor scaled).
    ///
    /// The pass's seed is all the randomness (dropout) of this call: the same seed, parameters and batch give the same bits.
    /// `loss_scale` is 1 unless the workspace's [gradients are float16](Workspace::gradient_dtype).
    ///
    /// # Errors
    /// Any failure of the model; it ends the run, with the step and the micro-batch added to the message.
    fn accumulate_gradients(&mut self, batch: &Batch, num_items: usize, pass: TrainPass, grad: ViewMut) -> Result<f64>;

    /// One forward, the weights that `weigh` gives the tokens for their log-probabilities, and one backward: adds
    /// `loss_scale * sum over tokens of weight * d log p` to `grad`. For objectives other than plain fine-tuning.
    ///
    /// # Errors
    /// Any failure of the model; it ends the run. A model without it refuses such objectives.
    fn accumulate_weighted_gradients(
        &mut self,
        batch: &Batch,
        pass: TrainPass,
        weigh: &mut dyn FnMut(&[f64]) -> Result<Vec<f32>>,
        grad: ViewMut,
    ) -> Result<()> {
        let _ = (batch, pass, weigh, grad);
        Err(Error::Unsupported("this model trains the objective \"sft\" only".into()))
    }

    /// For each token of a micro-batch the log-probability of its target, without dropout; 0 where there is none.
    ///
    /// # Errors
    /// As [`Self::accumulate_weighted_gradients`].
    fn log_probabilities(&mut self, batch: &Batch, weights: Weights) -> Result<Vec<f64>> {
        let _ = (batch, weights);
        Err(Error::Unsupported("this model trains the objective \"sft\" only".into()))
    }

    /// Continues a prompt with the weights as they are now and returns the new tokens. Nothing that training depends on changes.
    /// `on_token` sees every new token as it is made and may end the answer there, as a run does that is asked to stop.
    ///
    /// # Errors
    /// Any failure of the model. A model without it answers no prompts while it is trained.
    fn generate(
        &mut self,
        prompt: &[u32],
        config: &GenerationConfig,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Vec<u32>> {
        let _ = (prompt, config, on_token);
        Err(Error::Unsupported("this model generates no text".into()))
    }

    /// The loss of a micro-batch, without dropout.
    ///
    /// # Errors
    /// Any failure of the model; it ends the run.
    fn evaluate(&mut self, batch: &Batch) -> Result<LossSum>;

    /// Writes the adapter to a folder that exists, in PEFT's format.
    ///
    /// # Errors
    /// Any failure of writing; nothing half-written may be left under the adapter's final names.
    fn save_adapter(&self, folder: &Path) -> Result<()>;

    /// The identity of this model, as names and values: its files, quantization, adapter options. A checkpoint is only
    /// taken by a model with the same.
    fn identity(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// The number of token ids, if the model knows it: data with other ids is refused before the first step.
    fn vocab_size(&self) -> Option<usize> {
        None
    }

    /// The most positions a sequence may have, if the model knows it: longer documents are refused before the first step.
    fn max_positions(&self) -> Option<usize> {
        None
    }
}
