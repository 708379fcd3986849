//! Training passes without a candle graph, and the log-probabilities that objectives are made of.
//!
//! Every objective has a gradient `sum_t w_t d log p_t` with a number `w_t` a trained token. Of plain fine-tuning
//! `w_t = -1 / num_items` is known beforehand, so one pass of the head makes loss and gradient
//! ([`CausalLm::accumulate_gradients`]). Where the weights depend on the log-probabilities of whole sequences, the head runs
//! twice: once for the log-probabilities, and once for the gradient ([`CausalLm::accumulate_weighted_gradients`]).

use std::sync::Arc;

use candle_core::Tensor;
use qlora_kernels::ops::linear_cross_entropy::{self, GradScale, IGNORE_INDEX, LossSum, PendingLoss};
use qlora_kernels::ops::trained_tables::Table;
use qlora_kernels::tensor::TensorView;
use qlora_kernels::{Matrix, SequenceLayout, ViewMut};

use super::adapters::{AdapterChoice, Chosen};
use super::block::Pass;
use super::causal_lm::CausalLm;
use super::context::{Share, with_a_token_each};
use super::projection::AdapterPass;
use super::trained::TrainedAdapter;
use crate::autograd;
use crate::batch::Batch;
use crate::error::{Error, Result};

/// The parameters of a training pass: those that differ from pass to pass.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct TrainPass {
    /// Seeds the dropout of this pass; two passes with the same seed drop the same elements.
    pub seed: u64,
    /// The gradient that a pass adds is multiplied by this, from the logits on: in float16, gradients of a large batch are
    /// smaller than the smallest number. A power of two changes no other bit; the gradient's user divides it again.
    /// A loss in candle's graph ([`CausalLm::loss`]) does not read it.
    pub loss_scale: f32,
}

impl Default for TrainPass {
    fn default() -> Self {
        Self::seeded(0)
    }
}

impl TrainPass {
    /// A pass with this seed, its gradient not scaled.
    pub fn seeded(seed: u64) -> Self {
        Self { seed, loss_scale: 1.0 }
    }

    /// With the gradient multiplied by `loss_scale`.
    #[must_use]
    pub fn with_loss_scale(self, loss_scale: f32) -> Self {
        Self { loss_scale, ..self }
    }
}

impl CausalLm {
    /// Runs the decoder with the trained adapter on `inputs_embeds [tokens, hidden_size]` (f32), as one node of candle's graph: the
    /// final norm's output `[tokens, hidden_size]`, which the head reads. `backward` gives the gradients of [`TrainedAdapter::variable`]
    /// and, where candle tracks it, of `inputs_embeds`.
    ///
    /// # Errors
    /// If there is no adapter, shapes, dtypes or the device do not fit, or a sequence is too long. The backward fails on a second
    /// call: what the first one read is gone.
    pub fn hidden_states(&self, inputs_embeds: &Tensor, layout: &SequenceLayout, train: TrainPass) -> Result<Tensor> {
        let adapter = self.adapter_to_train()?;
        let (flat, layout, dropout) = (adapter.flat.as_tensor(), Arc::new(layout.clone()), adapter.dropout(train));
        autograd::stack::apply(&self.stack, inputs_embeds, flat, layout, dropout, &self.workspace)
    }

    /// The mean loss over `num_items` trained tokens as a candle scalar: `loss.backward()` gives the gradient of
    /// [`TrainedAdapter::variable`]. `num_items` counts the whole optimizer step, so that micro-batches add up.
    ///
    /// # Errors
    /// If there is no adapter, a token or target is outside the vocabulary, or a sequence is too long.
    pub fn loss(&self, batch: &Batch, num_items: usize, train: TrainPass) -> Result<Tensor> {
        let adapter = self.adapter_to_train()?;
        let trained = (adapter.tables(), adapter.flat.as_tensor());
        let x = autograd::tables::embedding(&batch.tokens, &self.embedding, trained, &self.workspace)?;
        let hidden = self.hidden_states(&x, &batch.layout, train)?;
        let dropout = adapter.dropout(train);
        let (head, targets) = (&self.head, &batch.targets);
        autograd::tables::linear_cross_entropy(&hidden, head, trained, dropout, targets, num_items, &self.workspace)
    }

    /// One forward and backward without a candle graph: adds the gradient of `loss_scale * sum of losses / num_items` to
    /// `gradient` (laid out as the adapter) and returns the sum of the losses. The same operations as [`Self::loss`], the same
    /// bits, and no copy of the gradient. Where [other ranks share the batch](Self::set_sequence_exchange), loss and gradient are
    /// those of this rank's rows.
    ///
    /// # Errors
    /// As [`Self::loss`]; also if `gradient` does not have the adapter's length.
    pub fn accumulate_gradients(
        &self,
        batch: &Batch,
        num_items: usize,
        train: TrainPass,
        gradient: ViewMut,
    ) -> Result<LossSum> {
        if num_items == 0 {
            return Err(Error::Invalid("there is no trained token to divide the loss by".into()));
        }
        let scale = GradScale::Uniform(train.loss_scale * (1.0 / num_items as f32));
        let pending = self.forward_backward(batch, train, gradient, |hidden, targets, head, dhidden, gradient| {
            if self.exchange.is_some() && targets.iter().all(|&target| target == IGNORE_INDEX) {
                // A share may have none.
                dhidden.fill(0.0)?;
                return Ok(None);
            }
            let (hidden, workspace) = (hidden.view(), self.workspace());
            let loss = linear_cross_entropy::enqueue_with(hidden, head, targets, scale, dhidden, gradient, workspace)?;
            Ok(Some(loss))
        })?;
        Ok(pending.map(PendingLoss::wait).transpose()?.unwrap_or_default())
    }

    /// One forward, then the weights that `weigh` gives the tokens for their log-probabilities, then one backward: adds
    /// `loss_scale * sum over tokens of weight * d log p` to `gradient`. Weights and log-probabilities are one a row of the
    /// batch; those of rows without a target are 0 and ignored.
    ///
    /// # Errors
    /// As [`Self::accumulate_gradients`]; also what `weigh` returns, and if it does not give one weight a row.
    pub fn accumulate_weighted_gradients(
        &self,
        batch: &Batch,
        train: TrainPass,
        weigh: &mut dyn FnMut(&[f64]) -> Result<Vec<f32>>,
        gradient: ViewMut,
    ) -> Result<()> {
        if self.exchange.is_some() {
            let message = "weights of whole sequences, where several ranks share a sequence (context_parallel_size)";
            return Err(Error::Unsupported(message.into()));
        }
        self.forward_backward(batch, train, gradient, |hidden, targets, head, dhidden, gradient| {
            let workspace = self.workspace();
            let losses = linear_cross_entropy::token_losses_with(hidden.view(), head, targets, workspace)?;
            let mut scales = weigh(&negated(losses))?;
            // The op's gradient is that of minus the log-probability.
            scales.iter_mut().for_each(|weight| *weight *= -train.loss_scale);
            let scales = GradScale::PerRow(&scales);
            Ok(linear_cross_entropy::enqueue_with(hidden.view(), head, targets, scales, dhidden, gradient, workspace)?)
        })?;
        Ok(())
    }

    /// The log-probability of each row's target, without dropout, with the adapter that `choice` names for every sequence;
    /// rows without a target have 0.
    ///
    /// # Errors
    /// If the adapter is not there or changes the head, a token or target is outside the vocabulary, or a sequence is too long.
    pub fn log_probabilities(&self, batch: &Batch, choice: AdapterChoice) -> Result<Vec<f64>> {
        let spans = self.spans(batch.layout.sequences(), choice.into())?;
        if spans.iter().any(super::adapter_ends::loaded_changes_head) {
            let message = "log-probabilities under an adapter that changes the head are not supported";
            return Err(Error::Unsupported(message.into()));
        }
        let hidden = self.hidden(&batch.tokens, &batch.layout, &spans)?;
        let trained = matches!(spans.as_slice(), [(_, Chosen::Trained)]).then(|| self.adapter()).flatten();
        let values = trained.map(|adapter| TensorView::new("adapter", adapter.flat.as_tensor())).transpose()?;
        let head = match (trained, &values) {
            (Some(adapter), Some(values)) => adapter.tables().head(&**self.head(), values.view(), None),
            _ => Table::frozen(&**self.head()),
        };
        Ok(negated(linear_cross_entropy::token_losses_with(hidden.view(), head, &batch.targets, self.workspace())?))
    }

    /// Runs the forward, `head` on its result (it writes the result's gradient and adds that of the head's trained parts), and the
    /// backward.
    fn forward_backward<R>(
        &self,
        batch: &Batch,
        train: TrainPass,
        mut gradient: ViewMut,
        head: impl FnOnce(&Matrix, &[i64], Table, ViewMut, Option<ViewMut>) -> Result<R>,
    ) -> Result<R> {
        let adapter = self.adapter_to_train()?;
        check_length(adapter, &gradient)?;
        let dropout = adapter.dropout(train);
        let batch = with_a_token_each(batch, self.exchange.as_deref());
        let share = self.exchange.as_deref().map(|exchange| Share::new(exchange, &batch.layout));
        let rows = share.as_ref().map_or(0..batch.tokens.len(), Share::rows);
        let (tokens, targets) = (&batch.tokens[rows.clone()], &batch.targets[rows.clone()]);
        let rope = self.stack().rope(batch.layout.max_len())?;
        let norms = adapter.inverse_norms(self.stack(), self.workspace())?;
        let values = TensorView::new("adapter", adapter.flat.as_tensor())?;
        let inverse_norms = norms.as_deref().map(Matrix::view);
        let embedding = adapter.tables().embedding(&**self.embedding(), values.view());
        let mut table = adapter.tables().head(&**self.head(), values.view(), dropout);
        // The head counts the rows with a target.
        let trained_before = batch.targets[..rows.start].iter().filter(|&&target| target != IGNORE_INDEX).count();
        table.dropout = table.dropout.map(|dropout| dropout.at_row(trained_before));
        let needs_dx = embedding.change.is_some();
        let adapter =
            Some(AdapterPass { dropout, first_row: rows.start, inverse_norms, ..AdapterPass::new(values.view()) });
        let (layout, share, workspace) = (&batch.layout, share.as_ref(), self.workspace());
        let pass = Pass { adapter, layout, share, rope: &rope, workspace };
        let mut x = workspace.matrix(tokens.len(), self.config().hidden_size)?;
        embedding.embed(tokens, x.view_mut())?;
        let (hidden, saved) = self.stack().forward(x, &pass, needs_dx)?;
        let mut dhidden = workspace.matrix(hidden.rows(), hidden.cols())?;
        let result = head(&hidden, targets, table, dhidden.view_mut(), Some(gradient.reborrow()))?;
        drop(hidden);
        let dx = self.stack().backward(saved, dhidden, &pass, gradient.reborrow(), needs_dx)?;
        if let Some(dx) = dx {
            embedding.embed_backward(tokens, dx.view(), gradient, workspace)?;
        }
        Ok(result)
    }
}

fn check_length(adapter: &TrainedAdapter, gradient: &ViewMut) -> Result<()> {
    let (got, expected) = (gradient.rows() * gradient.cols(), adapter.layout().len());
    if got == expected {
        return Ok(());
    }
    Err(Error::Invalid(format!("the adapter has {expected} values, the gradient {got}")))
}

/// Log-probabilities of losses; rows without a target keep 0, not -0.
fn negated(mut losses: Vec<f64>) -> Vec<f64> {
    losses.iter_mut().for_each(|loss| *loss = 0.0 - *loss);
    losses
}
