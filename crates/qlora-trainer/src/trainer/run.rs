//! From the first step, or a checkpoint, to the last.

use std::path::{Path, PathBuf};

use super::{Outcome, Summary, Trainer};
use crate::checkpoint::folder::{self, OutputFolder};
use crate::checkpoint::tensors::OptimizerTensors;
use crate::checkpoint::{self, Checkpoint};
use crate::config::Resume;
use crate::error::{Error, Result};
use qlora_kernels::View;

use crate::metrics::{LogEntry, MetricsFile};
use crate::model::TrainableModel;
use crate::progress::{Event, StartInfo};

impl<M: TrainableModel> Trainer<'_, M> {
    /// Runs to the end, or until somebody asks to stop. A run that was stopped can be run again, once the request is
    /// withdrawn ([`Interrupt::clear`](crate::interrupt::Interrupt::clear)).
    ///
    /// # Errors
    /// If the output folder cannot be used, a checkpoint cannot be resumed or written, the model fails, or a loss or
    /// gradient is not finite. The checkpoints that were written before stay.
    pub fn run(&mut self) -> Result<Summary> {
        let output = OutputFolder::open(&self.config.training.output_dir)?;
        let resumed_from = if self.progress.global_step == 0 { self.begin(output.path())? } else { None };
        let mut metrics = MetricsFile::open(output.path(), &self.progress.history)?;
        self.announce(resumed_from.as_deref());

        self.interrupt_announced = false;
        let outcome = self.run_loop(output.path(), &mut metrics)?;
        self.report_what_was_made();
        let adapter = match outcome {
            Outcome::Finished => {
                self.model.save_adapter(output.path())?;
                Some(output.path().to_owned())
            }
            Outcome::Interrupted => None,
        };
        self.notify(&Event::Finished(outcome));
        let eval_loss = self.progress.history.iter().rev().find_map(|entry| match entry {
            LogEntry::Eval(entry) => Some(entry.eval_loss),
            LogEntry::Train(_) => None,
        });
        let checkpoint = self.progress.checkpoint.as_ref().map(|(_, path)| path.clone());
        Ok(Summary { outcome, steps: self.progress.global_step, eval_loss, checkpoint, adapter })
    }

    fn run_loop(&mut self, output: &Path, metrics: &mut MetricsFile) -> Result<Outcome> {
        loop {
            let step = self.progress.global_step;
            if self.eval_is_due(step)
                && let Some(entry) = self.evaluate()?
            {
                self.notify(&Event::Eval(&entry));
                self.log(LogEntry::Eval(entry), metrics)?;
                // A checkpoint of this step was written before the evaluation, which had been interrupted.
                self.progress.checkpoint.take_if(|(of, _)| *of == step);
            }
            let complete = step == self.schedule.total_steps && !self.eval_is_due(step);
            let stop = self.interrupt.requested() && !complete;
            if self.save_is_due(step) || stop {
                self.save(output)?;
            }
            if complete {
                return Ok(Outcome::Finished);
            }
            if stop {
                return Ok(Outcome::Interrupted);
            }
            let info = self.step()?;
            self.count_what_was_made(info.step);
            self.notify(&Event::Step(&info));
            if info.step.is_multiple_of(self.config.training.logging_steps) || info.step == info.total_steps {
                let entry = self.log_entry(&info);
                self.log(entry, metrics)?;
            }
        }
    }

    /// On a GPU: says in which steps memory, plans or graphs were made. Warm steps make none.
    fn count_what_was_made(&mut self, step: u64) {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.model.workspace().ok().as_ref().and_then(|workspace| workspace.gpu()) {
            let counters = gpu.counters();
            if counters != self.made {
                let new = counters.since(std::mem::replace(&mut self.made, counters));
                tracing::debug!(step, made = %new, "made in this step");
            }
        }
        let _ = step;
    }

    /// The same of the whole run.
    fn report_what_was_made(&self) {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.model.workspace().ok().as_ref().and_then(|workspace| workspace.gpu()) {
            tracing::info!(made = %gpu.counters(), attention = gpu.attention().describe(), "made in this run");
        }
    }

    /// Prepares a run that has not made a step: resumes, or checks that the folder holds no other run.
    fn begin(&mut self, output: &Path) -> Result<Option<PathBuf>> {
        let options = &self.config.training;
        let from = match &options.resume_from_checkpoint {
            Resume::No => None,
            Resume::From(path) => Some(path.clone()),
            Resume::Latest => Some(folder::latest(output)?.ok_or_else(|| {
                Error::checkpoint(output, "there is no checkpoint to resume from; leave resume_from_checkpoint out")
            })?),
        };
        let is_inside = from.as_ref().is_some_and(|path| is_in(path, output));
        // Loaded before anything is deleted: it may be the folder's own.
        let checkpoint = from.as_deref().map(checkpoint::load).transpose()?;
        if !is_inside {
            self.make_room(output)?;
        }
        if let (Some(path), Some(checkpoint)) = (&from, checkpoint) {
            self.restore(path, checkpoint)?;
            if is_inside {
                self.progress.checkpoint = Some((self.progress.global_step, path.clone()));
            }
        }
        Ok(from)
    }

    /// An output folder with the checkpoints of another run is refused, or emptied if the options say so.
    fn make_room(&self, output: &Path) -> Result<()> {
        let old = folder::list(output)?;
        let Some((_, newest)) = old.last() else { return Ok(()) };
        if !self.config.training.overwrite_output_dir {
            return Err(Error::checkpoint(
                newest,
                "the output folder holds an earlier run; set resume_from_checkpoint = true to go on with it, \
                 overwrite_output_dir = true to delete its checkpoints, or another output_dir",
            ));
        }
        old.iter().try_for_each(|(_, path)| folder::remove(path))
    }

    fn restore(&mut self, path: &Path, checkpoint: Checkpoint) -> Result<()> {
        let Checkpoint { state, tensors } = checkpoint;
        let ours = state.stateful_callbacks.qlora;
        ours.identity.check(path, &self.identity)?;
        let (len, total) = (self.trainable_parameters(), self.schedule.total_steps);
        if tensors.master.len() != len {
            let found = tensors.master.len();
            return Err(Error::checkpoint(path, format!("it has {found} parameters, the model {len}")));
        }
        if state.global_step > total {
            let step = state.global_step;
            return Err(Error::checkpoint(path, format!("it is at step {step}, but the run has only {total} steps")));
        }
        if ours.position != self.position_after(state.global_step) {
            return Err(Error::checkpoint(path, "step and position in the data do not belong together"));
        }
        self.loader.seek(ours.position)?;
        self.model.update_masters(&mut |masters| masters.copy_from(View::vector(&tensors.master)))?;
        self.optimizer
            .set_moments(tensors.moments, &self.model.workspace()?)
            .map_err(|error| Error::checkpoint(path, format!("its optimizer state cannot be used: {error}")))?;
        let progress = &mut self.progress;
        progress.global_step = state.global_step;
        progress.tokens_seen = state.num_input_tokens_seen;
        progress.history = state.log_history;
        progress.window = ours.window;
        progress.initial_parameters = ours.initial_parameters;
        Ok(())
    }

    fn announce(&mut self, resumed_from: Option<&Path>) {
        let (history, initial) = (self.progress.history.clone(), self.progress.initial_parameters.clone());
        let info = StartInfo {
            first_step: self.progress.global_step,
            total_steps: self.schedule.total_steps,
            steps_per_epoch: self.loader.steps_per_epoch(),
            documents: self.loader.dataset().len(),
            trainable_parameters: self.trainable_parameters(),
            initial_parameters: &initial,
            resumed_from,
            history: &history,
        };
        tracing::info!(
            steps = info.total_steps,
            trainable = info.trainable_parameters,
            initial = info.initial_parameters,
            "training"
        );
        self.notify(&Event::Started(&info));
    }

    fn trainable_parameters(&self) -> usize {
        self.parameters.iter().map(|parameter| parameter.range.len()).sum()
    }

    fn log(&mut self, entry: LogEntry, metrics: &mut MetricsFile) -> Result<()> {
        metrics.write(&entry)?;
        self.notify(&Event::Logged(&entry));
        self.progress.history.push(entry);
        Ok(())
    }

    fn save(&mut self, output: &Path) -> Result<()> {
        let step = self.progress.global_step;
        if step == 0 || self.progress.checkpoint.as_ref().is_some_and(|(of, _)| *of == step) {
            return Ok(());
        }
        let tensors = OptimizerTensors { master: self.model.masters()?, moments: self.optimizer.moments()? };
        let path = checkpoint::save(output, &self.model, &tensors, &self.state(), &self.config)?;
        self.notify(&Event::Checkpoint(&path));
        self.progress.checkpoint = Some((step, path));
        folder::limit(output, self.config.training.save_total_limit, step)
    }

    /// Whether an evaluation belongs here that the log does not have yet.
    fn eval_is_due(&self, step: u64) -> bool {
        let options = &self.config.training;
        let here = match step {
            0 => options.eval_on_start,
            _ => step == self.schedule.total_steps || options.eval_steps.is_some_and(|n| step.is_multiple_of(n)),
        };
        let is_done = |entry: &LogEntry| matches!(entry, LogEntry::Eval(entry) if entry.step == step);
        here && self.validation.is_some() && !self.progress.history.iter().rev().take(2).any(is_done)
    }

    fn save_is_due(&self, step: u64) -> bool {
        let every = self.config.training.save_steps;
        step == self.schedule.total_steps || (every > 0 && step.is_multiple_of(every))
    }
}

fn is_in(path: &Path, folder: &Path) -> bool {
    match (path.canonicalize(), folder.canonicalize()) {
        (Ok(path), Ok(folder)) => path.parent() == Some(&folder),
        _ => false,
    }
}
