//! The training loop.
//!
//! Every optimizer step adds the gradients of its micro-batches to one flat f32 buffer; each is already divided by the
//! trained tokens of the whole step, so the result does not depend on how the step is cut into micro-batches. Then the
//! norm, clipping and AdamW. With float16 gradients the loss is scaled ([`loss_scale`](crate::loss_scale)).
//!
//! After a step, in this order and where due: a line in the log, an evaluation, a checkpoint. A run that was interrupted
//! or killed at any point goes on from its last checkpoint with the same bits and the same log as one that was not.

pub(crate) mod blueprint;
mod ranks;
mod run;
pub(crate) mod start;
mod step;

use std::path::PathBuf;

use blueprint::{Blueprint, ModelFacts};
use start::Start;

use crate::checkpoint::state::{FORMAT_VERSION, QloraState, StatefulCallbacks, TrainerState};
use crate::comm::{Alone, Communicator};
use crate::config::TrainConfig;
use crate::data::feed::FeedPosition;
use crate::data::{Dataset, TrainingData};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::guard::GradientGuard;
use crate::interrupt::Interrupt;
use crate::loss_scale::LossScale;
use crate::metrics::{LogEntry, LogWindow};
use crate::model::{Parameter, TrainableModel};
use crate::objective::{self, Objective};
use crate::optimizer::Optimizer;
use crate::preemption::Notice;
use crate::progress::{Event, Observer};
use crate::samples::{Sample, SamplePlan};
use crate::store::upload::Uploader;
use crate::times::{Times, Watch};
use qlora_kernels::Dtype;

/// The outcome of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// The run was interrupted on request; it can be resumed.
    Interrupted,
}

/// The result of a run.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// The outcome of the run.
    pub outcome: Outcome,
    /// Optimizer steps done.
    pub steps: u64,
    /// The loss of the last evaluation.
    pub eval_loss: Option<f64>,
    /// The last checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// The folder with the final adapter; none if the run was interrupted.
    pub adapter: Option<PathBuf>,
}

/// A model, its data, and everything a run changes.
pub struct Trainer<'a, M> {
    config: TrainConfig,
    model: M,
    parameters: Vec<Parameter>,
    blueprint: Blueprint,
    validation: Option<Dataset>,
    optimizer: Optimizer,
    guard: GradientGuard,
    /// None for plain fine-tuning.
    objective: Option<Box<dyn Objective>>,
    /// Output folder and checkpoint, where they were opened before the model.
    start: Option<Start>,
    /// The current time that the chat template was given when the data was rendered, if it asks for it.
    template_time: Option<String>,
    observers: Vec<Box<dyn Observer + 'a>>,
    interrupt: Interrupt,
    preemption: Option<Notice>,
    /// Sends checkpoints to the store, if there is one.
    uploader: Option<Uploader>,
    /// The prompts to answer while training.
    prompts: Option<SamplePlan>,
    /// The other processes of the run.
    comm: Box<dyn Communicator>,
    /// The time of all ranks in this run.
    times: Times,
    watch: Watch,
    /// Whether the ranks have agreed to stop.
    stop_agreed: bool,
    /// Whether the observers know of the request to stop.
    interrupt_announced: bool,
    progress: Progress,
    /// The GPU's counters after the last step.
    #[cfg(feature = "cuda")]
    made: qlora_kernels::cuda::Counters,
}

/// The progress of a run: the state that changes from step to step besides model, optimizer and loader.
#[derive(Clone, Debug, Default)]
struct Progress {
    global_step: u64,
    tokens_seen: u64,
    history: Vec<LogEntry>,
    samples: Vec<Sample>,
    window: LogWindow,
    initial_parameters: String,
    /// The ranks for which the run's micro-batches a step were chosen, if it was resumed.
    ranks: Option<usize>,
    /// The scale of the loss, if gradients are float16.
    loss_scale: Option<LossScale>,
    /// The last checkpoint in the output folder that this run wrote or began from, with its step.
    checkpoint: Option<(u64, PathBuf)>,
}

impl<'a, M: TrainableModel> Trainer<'a, M> {
    /// A run that has not begun.
    ///
    /// # Errors
    /// If the configuration is not valid, the data is empty, holds token ids that the model does not have or documents
    /// longer than the model can take, or the model's parameters do not cover its buffer.
    pub fn new(
        config: TrainConfig,
        model: M,
        training: impl Into<TrainingData>,
        validation: Option<Dataset>,
    ) -> Result<Self> {
        config.validate()?;
        let facts = ModelFacts::of(&model);
        let masters = model.masters()?;
        let blueprint = Blueprint::new(&config, &facts, training.into(), validation.as_ref())?;
        check_parameters(&facts.parameters, masters.len())?;
        if blueprint.schedule.is_all_warmup() {
            let steps = blueprint.schedule.total_steps;
            tracing::warn!(
                "all {steps} steps are warmup steps: the learning rate does not reach {}",
                config.training.learning_rate
            );
        }
        let parameters = facts.parameters;
        let workspace = model.workspace()?;
        let optimizer = Optimizer::new(&config.training, masters.len(), &workspace)?.with_decay_of(&parameters);
        let loss_scale = (workspace.gradient_dtype() == Dtype::F16).then(LossScale::default);
        let initial_parameters = Fingerprint::new().floats(&masters).to_string();
        Ok(Self {
            guard: match loss_scale {
                Some(_) => GradientGuard::new(&parameters).of_float16(),
                None => GradientGuard::new(&parameters),
            },
            objective: objective::of(&config),
            progress: Progress { initial_parameters, loss_scale, ..Progress::default() },
            observers: Vec::new(),
            interrupt: Interrupt::new(),
            preemption: config.training.preemption_file.as_deref().map(Notice::watch),
            prompts: None,
            comm: Box::new(Alone),
            uploader: None,
            times: Times::default(),
            watch: Watch::default(),
            stop_agreed: false,
            interrupt_announced: false,
            start: None,
            template_time: None,
            config,
            model,
            parameters,
            blueprint,
            validation,
            optimizer,
            #[cfg(feature = "cuda")]
            made: qlora_kernels::cuda::Counters::default(),
        })
    }

    /// Begins with the state that was opened before there was a model.
    pub(crate) fn with_start(mut self, mut start: Option<Start>, template_time: Option<String>) -> Self {
        if let Some(notice) = start.as_mut().and_then(|start| start.notice.take()) {
            self.preemption = Some(notice);
        }
        (self.start, self.template_time) = (start, template_time);
        self
    }

    /// Trains together with other processes. The configuration's `gradient_accumulation_steps` counts the micro-batches of all
    /// of them.
    pub(crate) fn with_communicator(mut self, comm: Box<dyn Communicator>) -> Self {
        self.comm = comm;
        self
    }

    /// Whether the run is to stop here. With other ranks that is what all of them know, after the step.
    fn stops_here(&self) -> bool {
        if self.comm.size() == 1 { self.interrupt.requested() } else { self.stop_agreed }
    }

    /// Adds an observer, which gets the events of the run.
    #[must_use]
    pub fn with_observer(mut self, observer: impl Observer + 'a) -> Self {
        self.observers.push(Box::new(observer));
        self
    }

    /// Stops the run, with a checkpoint, after the step in which `interrupt` is requested.
    #[must_use]
    pub fn with_interrupt(mut self, interrupt: Interrupt) -> Self {
        self.interrupt = interrupt;
        self
    }

    /// Answers prompts every so many steps; rank 0 does. They change no bit of the run.
    #[must_use]
    pub fn with_samples(mut self, prompts: Option<SamplePlan>) -> Self {
        self.prompts = prompts;
        self
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.blueprint.schedule.total_steps
    }

    /// The log so far.
    pub fn history(&self) -> &[LogEntry] {
        &self.progress.history
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model, to keep.
    pub fn into_model(self) -> M {
        self.model
    }

    fn notify(&mut self, event: &Event<'_>) {
        self.observers.iter_mut().for_each(|observer| observer.observe(event));
    }

    /// Whether a signal, the program or a notice of preemption asks the run to end.
    fn asked_to_stop(&self) -> bool {
        self.interrupt.requested() || self.preemption.as_ref().is_some_and(Notice::is_given)
    }

    /// Looks for a notice of preemption, and tells the observers once of a request to stop: until the step is done that is all a
    /// person sees of it.
    fn announce_interrupt(&mut self) {
        if let Some(notice) = self.preemption.take_if(|notice| notice.is_given()) {
            self.notify(&Event::Message(&format!("{} asks the run to end", notice.path().display())));
            self.interrupt.request();
        }
        if self.interrupt.requested() && !self.interrupt_announced {
            self.interrupt_announced = true;
            self.notify(&Event::Message("stopping: finishing the step, then saving; Ctrl-C again exits at once"));
        }
    }

    /// `trainer_state.json` as of now.
    fn state(&self) -> TrainerState {
        let (options, progress) = (&self.config.training, &self.progress);
        let FeedPosition { position, stream } = self.blueprint.feed.position();
        TrainerState {
            best_global_step: None,
            best_metric: None,
            best_model_checkpoint: None,
            epoch: self.blueprint.feed.epochs(),
            eval_steps: options.eval_steps.unwrap_or(0),
            global_step: progress.global_step,
            is_hyper_param_search: false,
            is_local_process_zero: true,
            is_world_process_zero: true,
            log_history: progress.history.clone(),
            logging_steps: options.logging_steps,
            max_steps: self.blueprint.schedule.total_steps,
            num_input_tokens_seen: progress.tokens_seen,
            num_train_epochs: self
                .blueprint
                .feed
                .steps_per_epoch()
                .map_or(1, |per_epoch| self.blueprint.schedule.total_steps.div_ceil(per_epoch as u64)),
            save_steps: options.save_steps,
            stateful_callbacks: StatefulCallbacks {
                qlora: QloraState {
                    format_version: FORMAT_VERSION,
                    qlora_version: env!("CARGO_PKG_VERSION").to_owned(),
                    position,
                    stream,
                    window: progress.window.clone(),
                    seed: options.seed,
                    data_seed: options.resolved_data_seed(),
                    initial_parameters: progress.initial_parameters.clone(),
                    template_time: self.template_time.clone(),
                    loss_scale: progress.loss_scale,
                    ranks: progress.ranks.unwrap_or(self.groups().1),
                    optimizer_fingerprint: String::new(),
                    identity: self.blueprint.identity.clone(),
                },
            },
            total_flos: 0.0,
            train_batch_size: options.per_device_train_batch_size,
            trial_name: None,
            trial_params: None,
        }
    }
}

fn check_parameters(parameters: &[Parameter], len: usize) -> Result<()> {
    let mut end = 0;
    for parameter in parameters {
        let elements: usize = parameter.shape.iter().product();
        if parameter.range.start != end || parameter.range.len() != elements {
            let Parameter { name, range, shape, .. } = parameter;
            return Err(Error::Invalid(format!(
                "{name}: the elements {range:?} do not fit the shape {shape:?} or do not follow the parameter before"
            )));
        }
        end = parameter.range.end;
    }
    if end != len || len == 0 {
        return Err(Error::Invalid(format!("the parameters have {end} elements, the buffer {len}")));
    }
    Ok(())
}
