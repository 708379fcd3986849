//! A run as it is planned: its steps, its learning rates, and its identity. Needs the data and what is known of a model
//! without its weights, so that a mistake is found before they are loaded.

use std::path::Path;

use super::start::Resumed;
use crate::checkpoint::identity::RunIdentity;
use crate::checkpoint::state::TrainerState;
use crate::config::TrainConfig;
use crate::data::feed::Feed;
use crate::data::{Dataset, LoaderOptions, Position, TrainingData};
use crate::error::{Error, Result};
use crate::model::{Parameter, TrainableModel};
use crate::objective;
use crate::schedule::Schedule;

/// The properties of a model that a run needs before it begins.
#[derive(Clone, Debug)]
pub(crate) struct ModelFacts {
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) identity: Vec<(String, String)>,
    pub(crate) vocab_size: Option<usize>,
    pub(crate) max_positions: Option<usize>,
}

impl ModelFacts {
    pub(crate) fn of<M: TrainableModel>(model: &M) -> Self {
        Self {
            parameters: model.parameters(),
            identity: model.identity(),
            vocab_size: model.vocab_size(),
            max_positions: model.max_positions(),
        }
    }
}

/// The limits on documents that a model can process.
#[derive(Clone, Copy, Debug)]
struct Limits {
    vocab_size: Option<usize>,
    max_positions: Option<usize>,
}

impl Limits {
    fn check(&self, dataset: &Dataset) -> Result<()> {
        if let (Some(size), Some(largest)) = (self.vocab_size, dataset.largest_token())
            && largest as usize >= size
        {
            let origin = dataset.first_with_token(largest).map(|i| dataset.origin(i)).unwrap_or_default();
            return Err(Error::Invalid(format!(
                "{origin}: token id {largest}, but the model has only {size}; the tokenizer belongs to another model"
            )));
        }
        if let Some(limit) = self.max_positions
            && let Some(i) = (0..dataset.len()).find(|&i| dataset.document_len(i) > limit)
        {
            let (origin, length) = (dataset.origin(i), dataset.document_len(i));
            return Err(Error::Invalid(format!(
                "{origin}: {length} tokens, but the model has only {limit} positions; set data.max_length to at most {limit}"
            )));
        }
        Ok(())
    }
}

/// The plan of a run.
pub(crate) struct Blueprint {
    pub(crate) feed: Feed,
    pub(crate) schedule: Schedule,
    pub(crate) identity: RunIdentity,
}

impl Blueprint {
    /// # Errors
    /// If the data is empty, holds token ids that the model does not have or documents longer than it can take, or the options
    /// would train nothing.
    pub(crate) fn new(
        config: &TrainConfig,
        facts: &ModelFacts,
        training: TrainingData,
        validation: Option<&Dataset>,
    ) -> Result<Self> {
        let limits = Limits { vocab_size: facts.vocab_size, max_positions: facts.max_positions };
        let kind = RowKind::of(config);
        let check = move |data: &Dataset| {
            limits.check(data)?;
            kind.check(data)
        };
        let feed = Feed::new(training, LoaderOptions::from(config), check)?;
        if let Some(data) = validation {
            check(data)?;
            if data.is_empty() {
                return Err(Error::Invalid("the validation data is empty".to_owned()));
            }
        }
        let options = &config.training;
        // A stream has `max_steps`.
        let schedule = Schedule::new(options, options.total_steps(feed.steps_per_epoch().unwrap_or(0)));
        if schedule.trains_nothing() {
            return Err(Error::Invalid(
                "the run has one step, and it is a warmup step, whose learning rate is 0: nothing would be trained. Set \
                 warmup_steps = 0 in [training], or train for more steps"
                    .to_owned(),
            ));
        }
        let identity = RunIdentity::new(config, &schedule, &feed.identity(), &facts.identity, &facts.parameters);
        Ok(Self { feed, schedule, identity })
    }

    /// Checks that the run can go on from a checkpoint, and returns in what it does not go on as it was.
    ///
    /// # Errors
    /// If the checkpoint is of another run, or does not fit.
    pub(crate) fn check_resumed(&self, config: &TrainConfig, resumed: &Resumed) -> Result<Vec<String>> {
        let (path, state) = (&resumed.path, &resumed.checkpoint.state);
        let saved = &state.stateful_callbacks.qlora.identity;
        let changes = saved.check(path, &self.identity, config.training.override_opt_param_scheduler)?;
        check_state(path, state, &self.schedule, &self.feed)?;
        Ok(changes)
    }
}

/// The rows that an objective trains on.
#[derive(Clone, Copy)]
struct RowKind {
    /// Documents that are made of a row.
    group_size: usize,
    objective: &'static str,
}

impl RowKind {
    fn of(config: &TrainConfig) -> Self {
        let group_size = objective::of(config).map_or(1, |objective| objective.group_size());
        Self { group_size, objective: config.training.objective.name() }
    }

    fn check(self, data: &Dataset) -> Result<()> {
        if data.is_empty() || data.group_size() == self.group_size {
            return Ok(());
        }
        let (origin, name) = (data.origin(0), self.objective);
        let message = match self.group_size {
            1 => format!("a pair of answers (`chosen`, `rejected`), which the objective \"{name}\" does not train on"),
            _ => format!(
                "the objective \"{name}\" trains on pairs of answers: a row needs `prompt`, `chosen` and `rejected`"
            ),
        };
        Err(Error::Invalid(format!("{origin}: {message}; see `objective` in [training]")))
    }
}

/// Checks that a checkpoint's step exists in a run, and where the run's data is then.
pub(super) fn check_state(path: &Path, state: &TrainerState, schedule: &Schedule, feed: &Feed) -> Result<()> {
    let (step, total) = (state.global_step, schedule.total_steps);
    if step > total {
        return Err(Error::checkpoint(path, format!("it is at step {step}, but the run has only {total} steps")));
    }
    let Some(per_epoch) = feed.steps_per_epoch().map(|steps| steps as u64) else {
        let known = state.stateful_callbacks.qlora.stream.is_some();
        return if known {
            Ok(())
        } else {
            Err(Error::checkpoint(path, "it does not say where the run is in the data"))
        };
    };
    let position = Position { epoch: step / per_epoch, step: (step % per_epoch) as usize };
    if state.stateful_callbacks.qlora.position != position {
        return Err(Error::checkpoint(path, "step and position in the data do not belong together"));
    }
    Ok(())
}
