//! A run as it is planned: its steps, its learning rates, and what it is told apart by. Needs the data and what is known of a
//! model without its weights, so that a mistake is found before they are loaded.

use std::path::Path;

use super::start::Resumed;
use crate::checkpoint::identity::RunIdentity;
use crate::checkpoint::state::TrainerState;
use crate::config::TrainConfig;
use crate::data::{Dataset, Loader, LoaderOptions, Position};
use crate::error::{Error, Result};
use crate::model::{Parameter, TrainableModel};
use crate::objective;
use crate::schedule::Schedule;

/// What a run has to know of a model before it begins.
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

    fn check_data(&self, dataset: &Dataset) -> Result<()> {
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
    pub(crate) loader: Loader,
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
        training: Dataset,
        validation: Option<&Dataset>,
    ) -> Result<Self> {
        facts.check_data(&training)?;
        for data in validation.into_iter().chain([&training]).filter(|data| !data.is_empty()) {
            check_groups(config, data)?;
        }
        if let Some(data) = validation {
            facts.check_data(data)?;
            if data.is_empty() {
                return Err(Error::Invalid("the validation data is empty".to_owned()));
            }
        }
        let options = &config.training;
        let loader = Loader::new(training, LoaderOptions::from(config))?;
        let schedule = Schedule::new(options, options.total_steps(loader.steps_per_epoch()));
        if schedule.trains_nothing() {
            return Err(Error::Invalid(
                "the run has one step, and it is a warmup step, whose learning rate is 0: nothing would be trained. Set \
                 warmup_steps = 0 in [training], or train for more steps"
                    .to_owned(),
            ));
        }
        let identity = RunIdentity::new(config, &schedule, loader.dataset(), &facts.identity, &facts.parameters);
        Ok(Self { loader, schedule, identity })
    }

    /// Checks that the run can go on from a checkpoint, and returns in what it does not go on as it was.
    ///
    /// # Errors
    /// If the checkpoint is of another run, or does not fit.
    pub(crate) fn check_resumed(&self, config: &TrainConfig, resumed: &Resumed) -> Result<Vec<String>> {
        let (path, state) = (&resumed.path, &resumed.checkpoint.state);
        let saved = &state.stateful_callbacks.qlora.identity;
        let changes = saved.check(path, &self.identity, config.training.override_opt_param_scheduler)?;
        check_state(path, state, &self.schedule, &self.loader)?;
        Ok(changes)
    }
}

/// Checks that rows are of the kind that the objective trains on.
fn check_groups(config: &TrainConfig, data: &Dataset) -> Result<()> {
    let wanted = objective::of(config).map_or(1, |objective| objective.group_size());
    if data.group_size() == wanted {
        return Ok(());
    }
    let (origin, name) = (data.origin(0), config.training.objective.name());
    let message = match wanted {
        1 => format!("a pair of answers (`chosen`, `rejected`), which the objective \"{name}\" does not train on"),
        _ => format!(
            "the objective \"{name}\" trains on pairs of answers: a row needs `prompt`, `chosen` and `rejected`"
        ),
    };
    Err(Error::Invalid(format!("{origin}: {message}; see `objective` in [training]")))
}

/// Checks that a checkpoint's step exists in a run, and where the run's data is then.
pub(super) fn check_state(path: &Path, state: &TrainerState, schedule: &Schedule, loader: &Loader) -> Result<()> {
    let (step, total) = (state.global_step, schedule.total_steps);
    if step > total {
        return Err(Error::checkpoint(path, format!("it is at step {step}, but the run has only {total} steps")));
    }
    let per_epoch = loader.steps_per_epoch() as u64;
    let position = Position { epoch: step / per_epoch, step: (step % per_epoch) as usize };
    if state.stateful_callbacks.qlora.position != position {
        return Err(Error::checkpoint(path, "step and position in the data do not belong together"));
    }
    Ok(())
}
