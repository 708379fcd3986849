//! One optimizer step, and one evaluation.

use std::time::Instant;

use super::Trainer;
use super::ranks::EvalPart;
use crate::comm::exchange;
use crate::data::StepBatch;
use crate::data::loader::eval_batches;
use crate::error::{Error, Result};
use crate::memory;
use crate::metrics::{EvalLog, LogEntry, LogWindow, TrainLog};
use crate::model::{TrainPass, TrainableModel, Weights};
use crate::objective::{self, Metrics, Objective, Scored};
use crate::progress::{Event, StepInfo};
use crate::rng::derive_seed;
use qlora_core::batch::Batch;
use qlora_kernels::ViewMut;

impl<M: TrainableModel> Trainer<'_, M> {
    /// Makes the next optimizer step. On an error neither parameters nor moments have changed.
    pub(super) fn step(&mut self) -> Result<StepInfo> {
        let started = Instant::now();
        let position = self.blueprint.feed.position();
        let batch = self.blueprint.feed.next_step()?;
        let step = self.progress.global_step + 1;
        let made = self.gradient_and_update(step, &batch);
        let Made { loss, learning_rate, grad_norm, metrics } = match made {
            Ok(made) => made,
            Err(error) => {
                // A caller may try again; the data must not move on without the model.
                self.blueprint.feed.seek(&position)?;
                return Err(error);
            }
        };
        if !grad_norm.is_finite() {
            self.skip_step(step);
        } else if let Some(scale) = &mut self.progress.loss_scale {
            scale.fitted();
        }
        self.progress.global_step = step;
        self.progress.tokens_seen += batch.tokens() as u64;
        let info = StepInfo {
            step,
            total_steps: self.blueprint.schedule.total_steps,
            epoch: self.blueprint.feed.epochs(),
            loss,
            learning_rate,
            grad_norm,
            tokens: batch.tokens(),
            trained_tokens: batch.num_items,
            seconds: started.elapsed().as_secs_f64(),
            metrics,
        };
        let window = &mut self.progress.window;
        window.steps += 1;
        window.loss_sum += info.loss;
        window.tokens += info.tokens as u64;
        window.trained_tokens += info.trained_tokens as u64;
        window.seconds += info.seconds;
        objective::add(&mut window.metrics, &info.metrics);
        Ok(info)
    }

    /// The gradient overflowed float16: parameters and moments stay as they are, and the scale shrinks.
    fn skip_step(&mut self, step: u64) {
        let Some(scale) = &mut self.progress.loss_scale else { return };
        scale.overflowed();
        let scale = scale.scale;
        tracing::info!(step, scale, "a gradient overflowed float16: the step is skipped");
        let text = format!("step {step} is skipped: a gradient overflowed float16; the loss scale is now {scale}");
        self.notify(&Event::Message(&text));
    }

    /// The loss scale, the factor of the gradients until the optimizer divides them again.
    fn loss_scale(&self) -> f32 {
        self.progress.loss_scale.map_or(1.0, |scale| scale.scale)
    }

    /// Loss, learning rate and gradient norm of the step; an infinite norm if it has to be skipped.
    fn gradient_and_update(&mut self, step: u64, batch: &StepBatch) -> Result<Made> {
        let (loss_sum, metrics) = self.gradient(step, batch)?;
        let loss = loss_sum / if self.objective.is_some() { batch.groups } else { batch.num_items } as f64;
        let metrics = objective::means(&metrics, batch.groups, "");
        let loss_scale = self.loss_scale();
        let norm = self.optimizer.grad_norm()? / f64::from(loss_scale);
        // Skipped steps are none of the schedule's, nor of the optimizer's.
        let skipped = self.progress.loss_scale.map_or(0, |scale| scale.skipped_steps);
        let update = step - skipped;
        let learning_rate = self.blueprint.schedule.at(update - 1);
        if !norm.is_finite() {
            if self.progress.loss_scale.is_some_and(|scale| scale.can_shrink()) {
                return Ok(Made { loss, learning_rate, grad_norm: f64::INFINITY, metrics });
            }
            return Err(self.locate_non_finite(step, batch));
        }
        if self.guard.is_waiting() {
            let (masters, grad) = (self.model.masters()?, self.optimizer.grad.to_vec()?);
            self.guard.check(step, &self.parameters, &masters, &grad)?;
        }
        let optimizer = &mut self.optimizer;
        self.model
            .update_masters(&mut |masters| optimizer.update_scaled(update, learning_rate, norm, loss_scale, masters))?;
        Ok(Made { loss, learning_rate, grad_norm: norm, metrics })
    }

    /// Adds the gradient of a micro-batch, and returns its loss sum.
    pub(super) fn accumulate(
        &mut self,
        step: u64,
        batch: &StepBatch,
        micro_batch: usize,
        metrics: &mut Metrics,
    ) -> Result<f64> {
        let seed = derive_seed(self.config.training.seed, &[step, micro_batch as u64]);
        let tokens = &batch.micro_batches[micro_batch];
        let pass = TrainPass::seeded(seed).with_loss_scale(self.loss_scale());
        let grad = self.optimizer.grad.view_mut();
        let result = match &self.objective {
            None => self.model.accumulate_gradients(tokens, batch.num_items, pass, grad),
            Some(objective) => {
                let group_size = self.blueprint.feed.group_size();
                let shares = (group_size, batch.groups);
                accumulate_judged(&mut self.model, &**objective, tokens, shares, pass, metrics, grad)
            }
        };
        result.map_err(|source| {
            // An exchange that another rank was missing from: it is named.
            let lost = if self.context_ranks() > 1 { self.comm.check().err() } else { None };
            lost.unwrap_or(Error::Step { step, micro_batch: micro_batch + 1, source })
        })
    }

    /// The step's gradient is not finite: finds the micro-batch by computing each one's gradient again.
    fn locate_non_finite(&mut self, step: u64, batch: &StepBatch) -> Error {
        let of_sum = self.describe_gradient("the sum over the step of ");
        match self.first_non_finite(step, batch) {
            Some(error) => error,
            None => {
                let what = of_sum.unwrap_or_else(|| "the gradient's norm is not finite".to_owned());
                self.non_finite(step, batch, batch.micro_batches.len() - 1, &what)
            }
        }
    }

    /// The problem of a single micro-batch's gradient, if there is one.
    pub(super) fn problem_of(&mut self, step: u64, batch: &StepBatch, micro_batch: usize) -> Option<Error> {
        if let Err(error) = self.optimizer.grad.view_mut().fill(0.0) {
            return Some(error.into());
        }
        if let Err(error) = self.accumulate(step, batch, micro_batch, &mut Metrics::new()) {
            return Some(error);
        }
        self.describe_gradient("").map(|what| self.non_finite(step, batch, micro_batch, &what))
    }

    /// The first element of the gradient that is not finite, in words.
    fn describe_gradient(&self, prefix: &str) -> Option<String> {
        let element = self.optimizer.first_non_finite().ok().flatten()?;
        let parameter = self.parameters.iter().find(|parameter| parameter.range.contains(&element))?;
        let value = *self.optimizer.grad.view().slice_cols(element..element + 1).to_vec().ok()?.first()?;
        Some(format!("{prefix}the gradient of {} is {value}", parameter.name))
    }

    pub(super) fn non_finite(&self, step: u64, batch: &StepBatch, micro_batch: usize, what: &str) -> Error {
        const SHOWN: usize = 4;
        let documents = &batch.documents[micro_batch];
        let named: Vec<_> = documents.iter().take(SHOWN).map(|&i| self.blueprint.feed.origin(i)).collect();
        let more = documents.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let documents = format!("{}{more}", named.join(", "));
        Error::NonFinite { step, micro_batch: micro_batch + 1, what: what.to_owned(), documents }
    }

    /// The log entry for the steps since the last one.
    pub(super) fn log_entry(&mut self, info: &StepInfo) -> LogEntry {
        let window: LogWindow = std::mem::take(&mut self.progress.window);
        LogEntry::Train(TrainLog {
            step: info.step,
            epoch: info.epoch,
            loss: window.loss_sum / window.steps as f64,
            learning_rate: info.learning_rate,
            grad_norm: info.grad_norm,
            tokens: window.tokens,
            trained_tokens: window.trained_tokens,
            num_tokens: self.progress.tokens_seen,
            tokens_per_second: window.tokens as f64 / window.seconds.max(f64::MIN_POSITIVE),
            peak_memory: memory::peak_resident(),
            anonymous_memory: memory::anonymous_resident(),
            gpu_peak_memory: self.model.workspace().ok().and_then(|workspace| memory::gpu_peak(&workspace)),
            loss_scale: self.progress.loss_scale.map(|scale| scale.scale),
            skipped_steps: self.progress.loss_scale.map(|scale| scale.skipped_steps),
            ranks: window.times.to_log(),
            metrics: objective::means(&window.metrics, window.steps as usize, ""),
        })
    }

    /// Evaluates on the validation data; `None` if the run was asked to stop before the end.
    pub(super) fn evaluate(&mut self) -> Result<Option<EvalLog>> {
        let Some(validation) = &self.validation else { return Ok(None) };
        let started = Instant::now();
        let options = &self.config.training;
        let batch_size = options.per_device_eval_batch_size.unwrap_or(options.per_device_train_batch_size);
        let batches = eval_batches(validation, batch_size);
        let total = batches.len();
        let ((group, groups), context) = (self.groups(), self.context_ranks());
        let mut parts = Vec::new();
        for (i, batch) in batches.enumerate() {
            if i % groups == 0 && {
                let asked = self.asked_to_stop();
                // The ranks that share a batch stop at the same one.
                let all =
                    if context == 1 { vec![asked] } else { exchange(&mut *self.comm, "evaluation goes on", &asked)? };
                all.contains(&true)
            } {
                break;
            }
            if i % groups != group {
                continue;
            }
            self.comm.check()?;
            parts.push(match &self.objective {
                None => EvalPart::from(self.model.evaluate(&batch)?),
                Some(objective) => {
                    let log_probs = self.model.log_probabilities(&batch, Weights::Trained)?;
                    let reference = reference(&mut self.model, &**objective, &batch)?;
                    let (log_probs, reference) = (&log_probs[..], reference.as_deref());
                    let scored = Scored::new(&batch, validation.group_size(), log_probs, reference);
                    EvalPart::of(objective.judge(&scored), batch.trained_tokens())
                }
            });
            let event = Event::EvalProgress { done: i + 1, total };
            self.observers.iter_mut().for_each(|observer| observer.observe(&event));
        }
        self.announce_interrupt();
        let interrupted = self.interrupt.requested();
        let Some(whole) = self.whole_evaluation(parts, interrupted)? else { return Ok(None) };
        let divisor = if self.objective.is_some() { whole.groups } else { whole.trained_tokens };
        let eval_loss = whole.loss / divisor as f64;
        if !eval_loss.is_finite() {
            let step = self.progress.global_step;
            return Err(Error::Invalid(format!("after step {step} the loss on the validation data is {eval_loss}")));
        }
        Ok(Some(EvalLog {
            step: self.progress.global_step,
            epoch: self.blueprint.feed.epochs(),
            eval_loss,
            eval_trained_tokens: whole.trained_tokens as u64,
            eval_runtime: started.elapsed().as_secs_f64(),
            metrics: objective::means(&whole.metrics, whole.groups, "eval_"),
        }))
    }
}

/// The results of an optimizer step.
struct Made {
    loss: f64,
    learning_rate: f64,
    /// Infinite if the step has to be skipped.
    grad_norm: f64,
    /// Means over the step's groups.
    metrics: Metrics,
}

/// Adds the gradient of a micro-batch's part of the mean over the step's groups; returns the sum of its losses and adds its
/// metrics. `shares`: the documents of a group and the groups of the step.
fn accumulate_judged<M: TrainableModel>(
    model: &mut M,
    objective: &dyn Objective,
    batch: &Batch,
    (group_size, groups): (usize, usize),
    pass: TrainPass,
    metrics: &mut Metrics,
    grad: ViewMut,
) -> qlora_core::Result<f64> {
    let reference = reference(model, objective, batch)?;
    let mut loss = 0.0;
    let mut weigh = |log_probs: &[f64]| {
        let judged = objective.judge(&Scored::new(batch, group_size, log_probs, reference.as_deref()));
        loss += judged.loss;
        objective::add(metrics, &judged.metrics);
        Ok(judged.weights.iter().map(|weight| weight / groups as f32).collect())
    };
    model.accumulate_weighted_gradients(batch, pass, &mut weigh, grad)?;
    Ok(loss)
}

fn reference<M: TrainableModel>(
    model: &mut M,
    objective: &dyn Objective,
    batch: &Batch,
) -> qlora_core::Result<Option<Vec<f64>>> {
    objective.needs_reference().then(|| model.log_probabilities(batch, Weights::Reference)).transpose()
}
