//! From the first step, or a checkpoint, to the last.

use std::path::{Path, PathBuf};

use super::start::{Resumed, Start};
use super::{Outcome, Summary, Trainer};
use crate::checkpoint::folder::{self, OutputFolder};
use crate::checkpoint::tensors::OptimizerTensors;
use crate::checkpoint::{self, Checkpoint};
use crate::comm::or_tell_all;
use crate::comm::shares::cause_of;
use crate::config::Resume;
use crate::data::feed::FeedPosition;
use crate::error::{Error, Result};
use qlora_kernels::View;

use crate::metrics::{LogEntry, MetricsFile};
use crate::model::TrainableModel;
use crate::preemption::Notice;
use crate::progress::{Event, StartInfo};
use crate::samples::{SamplePlan, SamplesFile};
use crate::store::Mirror;
use crate::store::upload::Uploader;

impl<M: TrainableModel> Trainer<'_, M> {
    /// Runs to the end, or until a stop is requested. A run that was stopped can be run again, once the request is
    /// withdrawn ([`Interrupt::clear`](crate::interrupt::Interrupt::clear)).
    ///
    /// # Errors
    /// If the output folder cannot be used, a checkpoint cannot be resumed or written, the model fails, or a loss or
    /// gradient is not finite. The checkpoints that were written before stay.
    pub fn run(&mut self) -> Result<Summary> {
        let ended = self.run_to_end().map_err(|error| cause_of(error, &*self.comm));
        // Also of a run that failed: what it saved is what the next one goes on from. Before the others are told: they end with it, and
        // a launcher takes a rank that ends for the end of all.
        let sent = self.finish_uploads();
        let has_store = self.config.training.checkpoint_store.is_some();
        let ended = or_tell_all(&mut *self.comm, ended);
        if ended.is_err() && has_store {
            self.comm.wait_for_first();
        }
        let summary = ended?;
        if has_store {
            // The same where nothing failed.
            let met = self.meet("upload of checkpoints");
            or_tell_all(&mut *self.comm, met)?;
        }
        self.comm.leave();
        match (sent, summary.outcome) {
            (Ok(()), _) => Ok(summary),
            (Err(error), Outcome::Finished) => Err(Error::Invalid(format!("the run is done, but {error}"))),
            // A run that goes on here has it.
            (Err(error), Outcome::Interrupted) => {
                self.notify(&Event::Message(&format!("{error}; the run that goes on from it sends it")));
                Ok(summary)
            }
        }
    }

    fn run_to_end(&mut self) -> Result<Summary> {
        let (output, resumed_from) = if self.progress.global_step == 0 {
            let start = match self.start.take() {
                Some(start) => start,
                None => Start::open_on(&self.config.training, &mut *self.comm)?,
            };
            self.begin(start)?
        } else if self.comm.rank() == 0 {
            (Some(OutputFolder::open(&self.config.training.output_dir)?), None)
        } else {
            (None, None)
        };
        self.check_same_parameters()?;
        let path = output.as_ref().map(OutputFolder::path);
        let mut metrics = path.map(|path| MetricsFile::open(path, &self.progress.history)).transpose()?;
        let mut samples = path.map(|path| self.open_samples(path)).transpose()?;
        self.announce(resumed_from.as_deref());

        (self.interrupt_announced, self.stop_agreed) = (false, false);
        let outcome = self.run_loop(path, &mut metrics, &mut samples)?;
        self.report_what_was_made();
        let adapter = match (outcome, path) {
            (Outcome::Finished, Some(path)) => {
                self.comm.writing(true);
                let saved = self.model.save_adapter(path);
                self.comm.writing(false);
                saved?;
                Some(path.to_owned())
            }
            _ => None,
        };
        // Who is done early must not look lost to who still writes.
        self.meet("end of the run")?;
        if let Some(summary) = self.times.summary() {
            self.notify(&Event::Message(&summary));
        }
        self.notify(&Event::Finished(outcome));
        let eval_loss = self.progress.history.iter().rev().find_map(|entry| match entry {
            LogEntry::Eval(entry) => Some(entry.eval_loss),
            LogEntry::Train(_) => None,
        });
        let checkpoint = self.progress.checkpoint.as_ref().map(|(_, path)| path.clone());
        Ok(Summary { outcome, steps: self.progress.global_step, eval_loss, checkpoint, adapter })
    }

    fn run_loop(
        &mut self,
        output: Option<&Path>,
        metrics: &mut Option<MetricsFile>,
        samples: &mut Option<SamplesFile>,
    ) -> Result<Outcome> {
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
            let complete = step == self.blueprint.schedule.total_steps && !self.eval_is_due(step);
            let stop = self.stops_here() && !complete;
            if stop {
                // Where the request came after the step's last look at it.
                self.announce_interrupt();
            }
            if self.save_is_due(step) || stop {
                self.save_together(output)?;
            }
            if stop {
                return Ok(Outcome::Interrupted);
            }
            // Answers come after the checkpoint: they may take longer than a scheduler waits. A round that is broken off is made by
            // the resumed run, from the same parameters.
            if !self.sample_if_due(step, samples.as_mut())? {
                self.save_together(output)?;
                return Ok(Outcome::Interrupted);
            }
            if complete {
                return Ok(Outcome::Finished);
            }
            let info = self.step()?;
            self.say_what_was_sent();
            self.count_what_was_made(info.step);
            self.notify(&Event::Step(&info));
            if info.step.is_multiple_of(self.config.training.logging_steps) || info.step == info.total_steps {
                let entry = self.log_entry(&info);
                self.log(entry, metrics)?;
            }
        }
    }

    /// Says which checkpoints have reached the store, and which have not.
    fn say_what_was_sent(&mut self) {
        let news = self.uploader.as_mut().map(Uploader::news).unwrap_or_default();
        news.iter().for_each(|text| self.notify(&Event::Message(text)));
    }

    /// Waits until the store has what it was sent.
    fn finish_uploads(&mut self) -> Result<()> {
        self.say_what_was_sent();
        let Some(mut uploader) = self.uploader.take() else { return Ok(()) };
        if let Some(step) = uploader.on_its_way() {
            let text = format!("waiting until {} is in {}", folder::name(step), uploader.url());
            self.notify(&Event::Message(&text));
        }
        self.comm.writing(true);
        let mut said = Vec::new();
        let finished = uploader.finish(&mut |text| said.push(text.to_owned()));
        self.comm.writing(false);
        said.iter().for_each(|text| self.notify(&Event::Message(text)));
        // A run that was stopped can be run again.
        self.uploader = Some(uploader);
        finished
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

    /// Prepares a run that has not made a step: resumes, or makes room for a new one. Returns the output folder, and the
    /// checkpoint that was resumed.
    fn begin(&mut self, start: Start) -> Result<(Option<OutputFolder>, Option<PathBuf>)> {
        let goes_on_inside = start.goes_on_inside();
        let Start { output, resumed, mirror, .. } = start;
        let folder = output.as_ref().map(OutputFolder::path);
        let checkpoints = || folder.map_or_else(|| Ok(Vec::new()), folder::list);
        // Another run's, which may be deleted now: [`Start::open`] has refused what may not.
        let clear = || -> Result<()> {
            mirror.as_ref().map_or(Ok(()), |mirror| mirror.forget_after(0))?;
            checkpoints()?.iter().try_for_each(|(_, path)| folder::remove(path))
        };
        let Some(resumed) = resumed else {
            if let Some(folder) = folder
                && self.config.training.resume_from_checkpoint == Resume::Latest
            {
                let text = format!("{} holds no checkpoint: the run begins", folder.display());
                self.notify(&Event::Message(&text));
            }
            clear()?;
            self.start_uploads(mirror);
            return Ok((output, None));
        };
        let changes = self.blueprint.check_resumed(&self.config, &resumed)?;
        if !goes_on_inside {
            clear()?;
        }
        let path = resumed.path.clone();
        self.restore(resumed)?;
        if goes_on_inside {
            self.progress.checkpoint = Some((self.progress.global_step, path.clone()));
        }
        if !changes.is_empty() {
            self.notify(&Event::Message(&format!("from here on {}", changes.join("; "))));
            // The checkpoints behind this one are of a run that this one is no longer.
            for (step, later) in checkpoints()? {
                if step > self.progress.global_step {
                    let aside = folder::set_aside(&later)?;
                    self.notify(&Event::Message(&format!("{} is now {}", later.display(), aside.display())));
                }
            }
            mirror.as_ref().map_or(Ok(()), |mirror| mirror.forget_after(self.progress.global_step))?;
        }
        let step = self.progress.global_step;
        // It was saved, and the run killed, before it could be sent.
        let is_missing = goes_on_inside
            && mirror.as_ref().map(Mirror::steps).transpose()?.is_some_and(|steps| !steps.contains(&step));
        self.start_uploads(mirror);
        if let (true, Some(uploader)) = (is_missing, &mut self.uploader) {
            uploader.send(step, &path)?;
        }
        Ok((output, Some(path)))
    }

    fn start_uploads(&mut self, mirror: Option<Mirror>) {
        let keep = self.config.training.save_total_limit;
        self.uploader = mirror.map(|mirror| Uploader::start(mirror, keep));
    }

    fn restore(&mut self, resumed: Resumed) -> Result<()> {
        let Resumed { path, checkpoint: Checkpoint { state, tensors } } = resumed;
        let len = self.trainable_parameters();
        if tensors.master.len() != len {
            let found = tensors.master.len();
            return Err(Error::checkpoint(path, format!("it has {found} parameters, the model {len}")));
        }
        let ours = state.stateful_callbacks.qlora;
        self.blueprint.feed.seek(&FeedPosition { position: ours.position, stream: ours.stream })?;
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
        progress.ranks = Some(ours.ranks);
        if progress.loss_scale.is_some() {
            // A checkpoint of an earlier version has none.
            progress.loss_scale = Some(ours.loss_scale.unwrap_or_default());
        }
        self.template_time = ours.template_time.or_else(|| self.template_time.take());
        Ok(())
    }

    fn announce(&mut self, resumed_from: Option<&Path>) {
        let (history, initial) = (self.progress.history.clone(), self.progress.initial_parameters.clone());
        let samples = self.progress.samples.clone();
        let info = StartInfo {
            first_step: self.progress.global_step,
            total_steps: self.blueprint.schedule.total_steps,
            steps_per_epoch: self.blueprint.feed.steps_per_epoch(),
            documents: self.blueprint.feed.documents(),
            trainable_parameters: self.trainable_parameters(),
            initial_parameters: &initial,
            resumed_from,
            history: &history,
            samples: &samples,
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

    fn log(&mut self, entry: LogEntry, metrics: &mut Option<MetricsFile>) -> Result<()> {
        if let Some(metrics) = metrics {
            metrics.write(&entry)?;
        }
        self.notify(&Event::Logged(&entry));
        self.progress.history.push(entry);
        Ok(())
    }

    /// Opens the file of answers and takes up those of the steps before this one.
    fn open_samples(&mut self, output: &Path) -> Result<SamplesFile> {
        // A file beside a checkpoint of another folder is another run's.
        let goes_on = self.progress.checkpoint.is_some();
        let prompts = self.prompts.as_ref().map_or(0, SamplePlan::len);
        let (file, samples) = SamplesFile::open(output, if goes_on { self.progress.global_step } else { 0 }, prompts)?;
        self.progress.samples = samples;
        Ok(file)
    }

    /// Answers the prompts where that belongs and was not done yet; the other ranks wait. Returns whether the run goes on: not if
    /// a request to stop came before all answers were there.
    fn sample_if_due(&mut self, step: u64, file: Option<&mut SamplesFile>) -> Result<bool> {
        let last = step == self.blueprint.schedule.total_steps;
        if !self.prompts.as_ref().is_some_and(|prompts| last || prompts.is_due(step)) {
            return Ok(true);
        }
        let goes_on = match file {
            Some(file) => self.sample(step, file)?,
            None => true,
        };
        self.all_go_on(goes_on)
    }

    /// The same of the rank that answers. An answer that cannot be had ends no run.
    fn sample(&mut self, step: u64, file: &mut SamplesFile) -> Result<bool> {
        let Some(prompts) = &self.prompts else { return Ok(true) };
        if self.progress.samples.last().is_some_and(|sample| sample.step == step) {
            return Ok(true);
        }
        let epoch = self.blueprint.feed.epochs();
        let (interrupt, notice) = (&self.interrupt, self.preemption.as_ref());
        let asked_to_stop = || interrupt.requested() || notice.is_some_and(Notice::is_given);
        match prompts.answer(&mut self.model, step, epoch, &asked_to_stop) {
            Ok(Some(samples)) => {
                file.write(&samples)?;
                self.notify(&Event::Samples(&samples));
                self.progress.samples.extend(samples);
            }
            Ok(None) => {
                self.announce_interrupt();
                return Ok(false);
            }
            Err(error) => self.notify(&Event::Message(&format!("step {step}: the prompts were not answered: {error}"))),
        }
        Ok(true)
    }

    /// Writes a checkpoint of what all ranks have alike.
    fn save_together(&mut self, output: Option<&Path>) -> Result<()> {
        self.check_same_parameters()?;
        self.comm.writing(true);
        let saved = self.save(output);
        self.comm.writing(false);
        saved
    }

    fn save(&mut self, output: Option<&Path>) -> Result<()> {
        let step = self.progress.global_step;
        if step == 0 || self.progress.checkpoint.as_ref().is_some_and(|(of, _)| *of == step) {
            return Ok(());
        }
        let Some(output) = output else { return Ok(()) };
        let tensors = OptimizerTensors { master: self.model.masters()?, moments: self.optimizer.moments()? };
        let path = checkpoint::save(output, &self.model, &tensors, &self.state(), &self.config)?;
        self.notify(&Event::Checkpoint(&path));
        if let Some(uploader) = &mut self.uploader {
            // Before the folder may be deleted.
            uploader.send(step, &path)?;
        }
        self.progress.checkpoint = Some((step, path));
        folder::limit(output, self.config.training.save_total_limit, step)
    }

    /// Whether an evaluation belongs here that the log does not have yet.
    fn eval_is_due(&self, step: u64) -> bool {
        let options = &self.config.training;
        let here = match step {
            0 => options.eval_on_start,
            _ => {
                step == self.blueprint.schedule.total_steps
                    || options.eval_steps.is_some_and(|n| step.is_multiple_of(n))
            }
        };
        let is_done = |entry: &LogEntry| matches!(entry, LogEntry::Eval(entry) if entry.step == step);
        here && self.validation.is_some() && !self.progress.history.iter().rev().take(2).any(is_done)
    }

    fn save_is_due(&self, step: u64) -> bool {
        let every = self.config.training.save_steps;
        step == self.blueprint.schedule.total_steps || (every > 0 && step.is_multiple_of(every))
    }
}
