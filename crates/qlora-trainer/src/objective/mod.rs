//! The objectives that a run minimises.
//!
//! An objective turns the log-probabilities of a micro-batch's tokens into a loss, a weight a token and metrics: its gradient
//! is `sum_t w_t d log p_t`, whatever it is, so the model needs to know none of them
//! ([`CausalLm::accumulate_weighted_gradients`](qlora_core::model::CausalLm::accumulate_weighted_gradients)). Plain
//! fine-tuning needs no such detour: its weights are known beforehand, and one pass of the head makes loss and gradient.
//!
//! A new objective is a file here and an entry in the lists below; a new kind of row for it is one in `data/record`.

mod dpo;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use dpo::DpoLoss;

use crate::config::TrainConfig;
use qlora_core::batch::Batch;

/// The names of the objectives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ObjectiveKind {
    /// Supervised fine-tuning: the cross-entropy of the trained tokens.
    #[default]
    Sft,
    /// Direct preference optimization on pairs of answers.
    Dpo,
}

impl ObjectiveKind {
    /// Its name, as the configuration has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Dpo => "dpo",
        }
    }
}

/// `[objective]`: options of objectives other than supervised fine-tuning, in TRL's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ObjectiveOptions {
    /// The strength with which the model is held to the reference: the larger, the nearer it stays. Default: 0.1.
    pub beta: f64,
    /// The loss of a pair: `"sigmoid"`, `"hinge"`, `"ipo"` or `"robust"`. Default: sigmoid.
    pub loss_type: DpoLoss,
    /// The share of pairs whose preference is wrong, for `"robust"`: at least 0, below 0.5. Default: 0.
    pub label_smoothing: f64,
    /// Train without the adapter's dropout, so that model and reference differ in the weights alone. Default: true.
    pub disable_dropout: bool,
}

impl Default for ObjectiveOptions {
    fn default() -> Self {
        Self { beta: 0.1, loss_type: DpoLoss::Sigmoid, label_smoothing: 0.0, disable_dropout: true }
    }
}

impl ObjectiveOptions {
    /// Every value that makes no sense in a run of this configuration: its key and a description of the problem.
    pub(crate) fn problems(config: &TrainConfig) -> Vec<(&'static str, String)> {
        let Self { beta, loss_type, label_smoothing, .. } = config.objective;
        if config.training.objective == ObjectiveKind::Sft {
            let message =
                "are options of objectives over pairs: set `objective = \"dpo\"` in [training], or leave them out";
            let other = config.objective != Self::default();
            return if other { vec![("objective", message.to_owned())] } else { Vec::new() };
        }
        let mut problems = Vec::new();
        if !(beta.is_finite() && beta > 0.0) {
            problems.push(("objective.beta", format!("must be a number above 0, not {beta}")));
        }
        if !(0.0..0.5).contains(&label_smoothing) {
            let message = format!("must be at least 0 and below 0.5, not {label_smoothing}");
            problems.push(("objective.label_smoothing", message));
        } else if label_smoothing > 0.0 && loss_type != DpoLoss::Robust {
            problems.push(("objective.label_smoothing", "needs `loss_type = \"robust\"`".to_owned()));
        }
        if !config.data.completion_only_loss {
            problems.push(("data.completion_only_loss", "must be true: preferences are between answers".to_owned()));
        }
        problems
    }
}

/// Metrics by the names that TRL gives them.
pub type Metrics = BTreeMap<String, f64>;

/// A micro-batch as an objective sees it: documents in groups, and numbers for every token.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Scored<'a> {
    /// The tokens and their targets.
    pub batch: &'a Batch,
    /// Documents of a group; they follow each other.
    pub group_size: usize,
    /// For each token, the log-probability of the one that follows it; 0 where that is not trained.
    pub log_probs: &'a [f64],
    /// The same under the weights that the run began with, if the objective asked for them.
    pub reference: Option<&'a [f64]>,
}

impl<'a> Scored<'a> {
    /// A micro-batch whose documents are in groups of `group_size`.
    ///
    /// # Panics
    /// If there is not one number a token.
    pub fn new(batch: &'a Batch, group_size: usize, log_probs: &'a [f64], reference: Option<&'a [f64]>) -> Self {
        let tokens = batch.tokens.len();
        assert!(log_probs.len() == tokens && reference.is_none_or(|reference| reference.len() == tokens));
        Self { batch, group_size: group_size.max(1), log_probs, reference }
    }

    /// The rows of each group's documents in the batch.
    pub fn groups(&self) -> impl Iterator<Item = Vec<std::ops::Range<usize>>> {
        let documents: Vec<_> = self.batch.layout.sequences().collect();
        let groups: Vec<Vec<_>> = documents.chunks(self.group_size).map(<[_]>::to_vec).collect();
        groups.into_iter()
    }
}

/// An objective's result for a micro-batch: sums over its groups, which the caller divides.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Judged {
    /// The sum of the groups' losses.
    pub loss: f64,
    /// The derivative of that sum by each token's log-probability.
    pub weights: Vec<f32>,
    /// Sums over the groups.
    pub metrics: Metrics,
    /// The number of groups.
    pub groups: usize,
}

/// A loss of log-probabilities.
pub trait Objective: std::fmt::Debug {
    /// Documents of a group: 2 for pairs.
    fn group_size(&self) -> usize;

    /// Whether it compares with the log-probabilities under the weights that the run began with.
    fn needs_reference(&self) -> bool;

    /// Loss, weights and metrics of a micro-batch.
    fn judge(&self, scored: &Scored) -> Judged;
}

/// The configured objective; none for plain fine-tuning.
pub fn of(config: &TrainConfig) -> Option<Box<dyn Objective>> {
    match config.training.objective {
        ObjectiveKind::Sft => None,
        ObjectiveKind::Dpo => {
            let ObjectiveOptions { loss_type: loss, beta, label_smoothing, .. } = config.objective;
            Some(Box::new(dpo::Dpo { loss, beta, label_smoothing }))
        }
    }
}

/// Whether the run trains without dropout whatever the adapter's options say.
pub(crate) fn disables_dropout(config: &TrainConfig) -> bool {
    config.training.objective != ObjectiveKind::Sft && config.objective.disable_dropout
}

/// Adds sums to sums.
pub(crate) fn add(sums: &mut Metrics, metrics: &Metrics) {
    metrics.iter().for_each(|(name, value)| *sums.entry(name.clone()).or_default() += value);
}

/// Sums divided by their numbers of terms, under names that begin with `prefix`.
pub(crate) fn means(sums: &Metrics, count: usize, prefix: &str) -> Metrics {
    sums.iter().map(|(name, sum)| (format!("{prefix}{name}"), sum / count as f64)).collect()
}
