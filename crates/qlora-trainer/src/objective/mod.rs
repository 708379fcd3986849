//! What a run minimises.
//!
//! An objective turns the log-probabilities of a micro-batch's tokens into a loss, a weight a token and metrics: its gradient
//! is `sum_t w_t d log p_t`, whatever it is, so the model needs to know none of them
//! ([`CausalLm::accumulate_weighted_gradients`](qlora_core::model::CausalLm::accumulate_weighted_gradients)). Plain
//! fine-tuning needs no such detour: its weights are known beforehand, and one pass of the head makes loss and gradient.
//!
//! A new objective is a file here and an entry in the lists below; a new kind of row for it is one in `data/record`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

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
}

impl ObjectiveKind {
    /// Its name, as the configuration has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
        }
    }
}

/// `[objective]`: options of objectives other than supervised fine-tuning.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ObjectiveOptions {}

impl ObjectiveOptions {
    /// Every value that makes no sense in a run of this configuration: its key and what is wrong.
    pub(crate) fn problems(_: &TrainConfig) -> Vec<(&'static str, String)> {
        Vec::new()
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

/// What an objective makes of a micro-batch: sums over its groups, which whoever asked divides.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Judged {
    /// The sum of the groups' losses.
    pub loss: f64,
    /// The derivative of that sum by each token's log-probability.
    pub weights: Vec<f32>,
    /// Sums over the groups.
    pub metrics: Metrics,
    /// How many groups there are.
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
    }
}

/// Whether the run trains without dropout whatever the adapter's options say.
pub(crate) fn disables_dropout(_: &TrainConfig) -> bool {
    false
}

/// Adds sums to sums.
pub(crate) fn add(sums: &mut Metrics, metrics: &Metrics) {
    metrics.iter().for_each(|(name, value)| *sums.entry(name.clone()).or_default() += value);
}

/// Sums divided by how many they run over, under names that begin with `prefix`.
pub(crate) fn means(sums: &Metrics, count: usize, prefix: &str) -> Metrics {
    sums.iter().map(|(name, sum)| (format!("{prefix}{name}"), sum / count as f64)).collect()
}
