//! Following a run: events, a view on the terminal, a progress bar, a report, TensorBoard, a plot of the loss.

pub mod bar;
mod chart;
mod dashboard;
pub mod plot;
pub mod report;
mod tensorboard;
mod words;

use std::path::Path;

pub use bar::ProgressBar;
pub use dashboard::{Above, Dashboard, DashboardFacts};
pub use plot::LossPlot;
pub use report::{HtmlReport, ReportFacts};
pub use tensorboard::TensorBoard;

use crate::metrics::{EvalLog, LogEntry};
use crate::objective::Metrics;
use crate::samples::Sample;
use crate::trainer::Outcome;

/// An observer, which gets the events of a run. Its methods cannot fail: following a run must not end it.
pub trait Observer {
    /// Something happened.
    fn observe(&mut self, event: &Event<'_>);
}

impl<O: Observer + ?Sized> Observer for &mut O {
    fn observe(&mut self, event: &Event<'_>) {
        (**self).observe(event);
    }
}

impl<O: Observer + ?Sized> Observer for Box<O> {
    fn observe(&mut self, event: &Event<'_>) {
        (**self).observe(event);
    }
}

/// An event of a run, as observers get it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The loop is about to begin.
    Started(&'a StartInfo<'a>),
    /// An optimizer step is done.
    Step(&'a StepInfo),
    /// A line was written to the log.
    Logged(&'a LogEntry),
    /// A micro-batch of an evaluation is done.
    EvalProgress {
        /// Micro-batches done.
        done: usize,
        /// Micro-batches of the evaluation.
        total: usize,
    },
    /// An evaluation is done.
    Eval(&'a EvalLog),
    /// The prompts of the run were answered.
    Samples(&'a [Sample]),
    /// A checkpoint was written.
    Checkpoint(&'a Path),
    /// Something a person may want to know.
    Message(&'a str),
    /// The loop has ended without an error.
    Finished(Outcome),
}

/// The facts of a run that are known before its first step.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StartInfo<'a> {
    /// Steps that are done already, in a resumed run.
    pub first_step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps of an epoch; none if that is not known, as of a stream.
    pub steps_per_epoch: Option<usize>,
    /// Documents of the training data; none if that is not known.
    pub documents: Option<usize>,
    /// Trainable parameters.
    pub trainable_parameters: usize,
    /// Stands for the parameters before the first step: equal for runs that began equally.
    pub initial_parameters: &'a str,
    /// The checkpoint that the run goes on from.
    pub resumed_from: Option<&'a Path>,
    /// The log up to here.
    pub history: &'a [LogEntry],
    /// The answers up to here.
    pub samples: &'a [Sample],
}

/// An optimizer step that is done.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct StepInfo {
    /// Its number, from 1.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Epochs done, with the fraction of the current one.
    pub epoch: f64,
    /// The mean cross-entropy over the step's trained tokens, or the objective's loss over its groups.
    pub loss: f64,
    /// The learning rate.
    pub learning_rate: f64,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
    /// Tokens processed.
    pub tokens: usize,
    /// Tokens with a loss.
    pub trained_tokens: usize,
    /// The duration of the step, in seconds.
    pub seconds: f64,
    /// The objective's metrics besides the loss, by TRL's names: means over the step.
    pub metrics: Metrics,
}
