//! A run on a terminal: progress, the curve of the loss, figures, memory against the plan, the last answer.
//!
//! ```text
//! model                                                step 40/80  epoch 1.50  3m20s left
//! ████████████████████████████████████████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░ 50%
//! loss 0.8123  eval 0.9012 (step 30)  lr 1.1e-4  norm 0.42
//! 812 tok/s  GPU 7.00 of 7.10 GB planned
//!   2.31 ⠉⠒⠤⣀
//!   0.81 ⠀⠀⠀⠀⠉⠒⠤⣀⣀
//! How much is it?
//! → four
//! ```
//!
//! Lines that stay (evaluations, checkpoints, answers, messages) scroll by above it. It is drawn in place, without raw mode, another
//! screen or a hidden cursor: however the process ends there is nothing to restore, Ctrl-C stays a signal, and the last state stays
//! readable. That is why it needs no library for whole screens.

mod curve;

use std::fmt::Write;

use console::{Style, Term};
use indicatif::{ProgressDrawTarget, ProgressFinish, ProgressStyle};

use self::curve::{MARK, Range, curve};
use super::words::{Speed, cut, duration, lasting_lines, one_line, shown_metrics};
use super::{Event, Observer, StepInfo};
use crate::metrics::{EvalLog, LogEntry, TrainLog};
use crate::samples::Sample;

/// The smallest terminal that it is drawn on; on others there is the bar.
const LEAST: (usize, usize) = (60, 16);

/// The widest that it is drawn: longer lines are hard to read.
const WIDEST: usize = 110;

/// Lines of the curve.
const CURVE: usize = 6;

/// Columns of the curve's labels.
const LABEL: usize = 9;

/// The most points of the curve; beyond, every second one is dropped.
const POINTS: usize = 4096;

/// The contents of the view besides the events of the run.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct DashboardFacts {
    /// The title: the base model's name.
    pub title: String,
    /// The peak of GPU memory that the plan predicts, in bytes.
    pub planned_peak: Option<u64>,
    /// Whether to use colours.
    pub colors: bool,
}

/// Shows a run on the terminal of stderr.
pub struct Dashboard {
    bar: indicatif::ProgressBar,
    facts: DashboardFacts,
    speed: Speed,
    step: Option<StepInfo>,
    logged: Option<TrainLog>,
    eval: Option<EvalLog>,
    /// What goes on beside steps.
    doing: Option<String>,
    losses: Vec<(f64, f64)>,
    eval_losses: Vec<(f64, f64)>,
    samples: Vec<Sample>,
    /// Steps before the first, and of the whole run.
    first_step: u64,
    total_steps: u64,
}

/// Prints lines above the view, for other parts of the program while it is shown.
#[derive(Clone, Debug)]
pub struct Above(indicatif::ProgressBar);

impl Above {
    /// A line that stays.
    pub fn line(&self, text: &str) {
        self.0.println(text);
    }
}

impl Dashboard {
    /// The view, if stderr is a terminal that can draw in place and is large enough for it.
    pub fn on_terminal(facts: DashboardFacts) -> Option<Self> {
        let (size, target) = (size(), ProgressDrawTarget::stderr());
        // Hidden also where TERM is unset or `dumb`: lines printed above such a view would be lost.
        let fits = !target.is_hidden() && size.0 >= LEAST.0 && size.1 >= LEAST.1;
        fits.then(|| Self::new(facts, target))
    }

    fn new(facts: DashboardFacts, target: ProgressDrawTarget) -> Self {
        let bar = indicatif::ProgressBar::with_draw_target(None, target).with_finish(ProgressFinish::Abandon);
        bar.set_style(ProgressStyle::with_template("{msg}").expect("the template is valid"));
        Self {
            bar,
            facts,
            speed: Speed::default(),
            step: None,
            logged: None,
            eval: None,
            doing: None,
            losses: Vec::new(),
            eval_losses: Vec::new(),
            samples: Vec::new(),
            first_step: 0,
            total_steps: 0,
        }
    }

    /// Prints lines above the view.
    pub fn above(&self) -> Above {
        Above(self.bar.clone())
    }

    fn draw(&self) {
        let width = size().0.saturating_sub(1).clamp(1, WIDEST);
        self.bar.set_message(self.lines(width).join("\n"));
    }

    /// The view, `width` columns wide.
    fn lines(&self, width: usize) -> Vec<String> {
        let mut lines = vec![self.head(width), self.progress(width)];
        lines.extend(self.figures().map(|line| cut(&line, width)));
        lines.extend(self.curve(width));
        if let Some(sample) = self.last_answer() {
            let asked = one_line(&sample.prompt);
            let skipped = asked.chars().count().saturating_sub(width.saturating_sub(2));
            let asked: String = asked.chars().skip(skipped).collect();
            lines.push(self.style().dim().apply_to(asked).to_string());
            lines.push(cut(&format!("→ {}", one_line(&sample.completion)), width));
        }
        lines
    }

    fn style(&self) -> Style {
        Style::new().force_styling(self.facts.colors)
    }

    fn head(&self, width: usize) -> String {
        let done = self.step.as_ref().map_or(self.first_step, |info| info.step);
        let mut right = format!("step {done}/{}", self.total_steps);
        if let Some(info) = &self.step {
            let _ = write!(right, "  epoch {:.2}  {} left", info.epoch, duration(self.speed.left(info)));
        }
        if let Some(doing) = &self.doing {
            let _ = write!(right, "  {doing}");
        }
        let right = cut(&right, width);
        let room = width.saturating_sub(right.chars().count() + 2);
        let title = cut(&one_line(&self.facts.title), room);
        let gap = " ".repeat(width.saturating_sub(title.chars().count() + right.chars().count()));
        format!("{}{gap}{right}", self.style().bold().apply_to(title))
    }

    fn progress(&self, width: usize) -> String {
        let done = self.step.as_ref().map_or(self.first_step, |info| info.step);
        let share = done as f64 / self.total_steps.max(1) as f64;
        let room = width.saturating_sub(5);
        let full = (share * room as f64) as usize;
        let (full, rest) = ("█".repeat(full), "░".repeat(room - full));
        format!("{}{rest} {:>3.0}%", self.style().cyan().apply_to(full), (share * 100.0).floor())
    }

    /// Of the model, and of the machine.
    fn figures(&self) -> [String; 2] {
        let (mut model, mut machine) = (Vec::new(), Vec::new());
        if let Some(info) = &self.step {
            model.push(format!("loss {:.4}{}", info.loss, shown_metrics(&info.metrics, "")));
            model.extend(self.eval.as_ref().map(|eval| format!("eval {:.4} (step {})", eval.eval_loss, eval.step)));
            model.push(format!("lr {:.1e}  norm {:.2}", info.learning_rate, info.grad_norm));
            machine.push(format!("{:.0} tok/s", self.speed.per_second()));
        }
        machine.extend(self.memory());
        [model.join("  "), machine.join("  ")]
    }

    /// Memory against the plan.
    fn memory(&self) -> Option<String> {
        let log = self.logged.as_ref()?;
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        match (log.gpu_peak_memory, self.facts.planned_peak) {
            (Some(peak), Some(planned)) => {
                Some(format!("GPU {:.2} of {:.2} GB planned", gigabytes(peak), gigabytes(planned)))
            }
            (Some(peak), None) => Some(format!("GPU {:.2} GB", gigabytes(peak))),
            (None, _) => log.peak_memory.map(|peak| format!("memory {:.2} GB", gigabytes(peak))),
        }
    }

    /// The loss so far over the steps of the whole run, with the loss on the validation data as marks.
    fn curve(&self, width: usize) -> Vec<String> {
        let values = self.losses.iter().chain(&self.eval_losses).map(|point| point.1);
        let Some(range) = Range::of(values) else { return Vec::new() };
        let room = width.saturating_sub(LABEL);
        if room == 0 {
            return Vec::new();
        }
        let lines = curve(&self.losses, &self.eval_losses, self.total_steps as f64, range, (room, CURVE));
        let label = |i: usize| match i {
            0 => format!("{:>8.4} ", range.high),
            _ if i + 1 == CURVE => format!("{:>8.4} ", range.low),
            _ => " ".repeat(LABEL),
        };
        let (line, mark) = (self.style().blue(), self.style().yellow());
        let colored = |text: &str| {
            let parts: Vec<String> = text.split(MARK).map(|part| line.apply_to(part).to_string()).collect();
            parts.join(&mark.apply_to(MARK).to_string())
        };
        lines.iter().enumerate().map(|(i, text)| format!("{}{}", label(i), colored(text))).collect()
    }

    /// The answer to the prompt whose turn it is.
    fn last_answer(&self) -> Option<&Sample> {
        let turn = self.step.as_ref().map_or(0, |info| info.step as usize / 10);
        self.samples.get(turn % self.samples.len().max(1))
    }

    fn add(&mut self, entry: &LogEntry) {
        match entry {
            LogEntry::Train(entry) => {
                self.losses.push((entry.step as f64, entry.loss));
                if self.losses.len() > POINTS {
                    let mut index = 0;
                    self.losses.retain(|_| {
                        index += 1;
                        index % 2 == 0
                    });
                }
                self.logged = Some(entry.clone());
            }
            LogEntry::Eval(entry) => {
                self.eval_losses.push((entry.step as f64, entry.eval_loss));
                self.eval = Some(entry.clone());
            }
        }
    }
}

impl Observer for Dashboard {
    fn observe(&mut self, event: &Event<'_>) {
        lasting_lines(event).iter().for_each(|line| self.bar.println(line));
        match event {
            Event::Started(info) => {
                (self.first_step, self.total_steps) = (info.first_step, info.total_steps);
                info.history.iter().for_each(|entry| self.add(entry));
                self.samples = info.samples.chunk_by(|a, b| a.step == b.step).last().unwrap_or_default().to_vec();
            }
            Event::Step(info) => {
                self.speed.add(info);
                self.step = Some((*info).clone());
                self.doing = None;
            }
            Event::Logged(entry) => self.add(entry),
            Event::EvalProgress { done, total } => self.doing = Some(format!("evaluating {done}/{total}")),
            Event::Eval(_) => self.doing = None,
            Event::Samples(samples) => self.samples = samples.to_vec(),
            Event::Finished(_) => {
                self.doing = None;
                self.draw();
                self.bar.abandon();
                return;
            }
            Event::Checkpoint(_) | Event::Message(_) => {}
        }
        self.draw();
    }
}

/// Columns and lines of the terminal.
fn size() -> (usize, usize) {
    let (lines, columns) = Term::stderr().size();
    (columns.into(), lines.into())
}

#[cfg(test)]
mod tests {
    use super::super::StartInfo;
    use super::*;
    use crate::objective::Metrics;

    fn dashboard(colors: bool) -> Dashboard {
        let facts = DashboardFacts { title: "org/model".into(), planned_peak: Some(7_100_000_000), colors };
        let mut view = Dashboard::new(facts, ProgressDrawTarget::hidden());
        let start = StartInfo {
            first_step: 0,
            total_steps: 80,
            steps_per_epoch: None,
            documents: None,
            trainable_parameters: 1,
            initial_parameters: "",
            resumed_from: None,
            history: &[],
            samples: &[],
        };
        view.observe(&Event::Started(&start));
        view
    }

    fn train(view: &mut Dashboard, step: u64) {
        let (loss, learning_rate, metrics) = (4.0 - 0.05 * step as f64, 1.1e-4, Metrics::new());
        view.observe(&Event::Step(&StepInfo {
            step,
            total_steps: 80,
            epoch: step as f64 / 20.0,
            loss,
            learning_rate,
            grad_norm: 0.42,
            tokens: 812,
            trained_tokens: 400,
            seconds: 1.0,
            metrics: metrics.clone(),
        }));
        view.observe(&Event::Logged(&LogEntry::Train(TrainLog {
            step,
            epoch: 0.0,
            loss,
            learning_rate,
            grad_norm: 0.42,
            tokens: 812,
            trained_tokens: 400,
            num_tokens: 812 * step,
            tokens_per_second: 812.0,
            peak_memory: Some(1_500_000_000),
            anonymous_memory: None,
            gpu_peak_memory: Some(7_000_000_000),
            loss_scale: None,
            skipped_steps: None,
            ranks: None,
            metrics,
        })));
    }

    #[test]
    fn everything_that_is_known_is_shown() {
        let mut view = dashboard(false);
        assert!(view.lines(79)[0].ends_with("step 0/80"), "{:?}", view.lines(79));
        (1..=40).for_each(|step| train(&mut view, step));
        let metrics = Metrics::new();
        let eval =
            EvalLog { step: 30, epoch: 1.5, eval_loss: 2.75, eval_trained_tokens: 9, eval_runtime: 0.1, metrics };
        view.observe(&Event::Logged(&LogEntry::Eval(eval)));
        let (prompt, completion) = ("How much is it?".to_owned(), "four\n\u{1b}[2Jfive".to_owned());
        view.observe(&Event::Samples(&[Sample { step: 40, epoch: 2.0, prompt, completion, expected: None }]));
        let lines = view.lines(110);
        let text = lines.join("\n");
        for part in [
            "org/model",
            "step 40/80  epoch 2.00  40s left",
            " 50%",
            "loss 2.0000  eval 2.7500 (step 30)  lr 1.1e-4  norm 0.42\n812 tok/s  GPU 7.00 of 7.10 GB planned\n",
            "  3.9500 ",
            "  2.0000 ",
            "How much is it?\n→ four⏎[2Jfive",
        ] {
            assert!(text.contains(part), "{part:?} in\n{text}");
        }
        assert_eq!((lines.len(), text.matches(MARK).count()), (4 + CURVE + 2, 1), "{text}");
        // The curve is half as wide as the run is long.
        assert!(lines[4..4 + CURVE].iter().all(|line| line.chars().skip(62).all(|c| c == '⠀')), "{text}");
        for width in [LEAST.0, 79, WIDEST] {
            assert!(view.lines(width).iter().all(|line| line.chars().count() <= width), "{width}");
        }
        assert!(!text.contains('\u{1b}'));
        // Once it is shown the terminal may become as narrow as its owner likes.
        for width in 0..LEAST.0 {
            let curve = if width > LABEL { CURVE } else { 0 };
            assert_eq!(view.lines(width).len(), 4 + curve + 2, "{width}");
        }
    }

    #[test]
    fn colours_are_for_who_wants_them() {
        let mut view = dashboard(true);
        train(&mut view, 1);
        let text = view.lines(79).join("\n");
        assert!(text.contains("\u{1b}[1morg/model") && text.contains("\u{1b}[34m"), "{text:?}");
    }

    #[test]
    fn a_long_run_keeps_few_points() {
        let mut view = dashboard(false);
        (1..=3 * POINTS as u64).for_each(|step| train(&mut view, step.min(80)));
        assert!(view.losses.len() <= POINTS && view.losses.len() > POINTS / 3);
    }
}
