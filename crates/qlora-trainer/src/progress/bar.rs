//! A progress bar on the terminal; plain lines where there is none.
//!
//! ```text
//! ████████████░░░░░░░░░░░░ 40/80  epoch 1.50  loss 0.8123  lr 1.1e-4  812 tok/s  3m20s left
//! ```

use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{ProgressDrawTarget, ProgressStyle};

use super::words::{Speed, lasting_lines, status};
use super::{Event, Observer, StepInfo};

/// Time between two plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Shows a run on stderr.
pub struct ProgressBar {
    display: Display,
    speed: Speed,
    /// The status after the last step, to go back to after an evaluation.
    status: String,
}

enum Display {
    Bar(indicatif::ProgressBar),
    Lines { out: Box<dyn Write>, last: Option<Instant> },
}

impl Default for ProgressBar {
    fn default() -> Self {
        Self::new()
    }
}

impl ProgressBar {
    /// A bar if stderr is a terminal that can draw in place, else a plain line every ten seconds.
    pub fn new() -> Self {
        let target = ProgressDrawTarget::stderr();
        // No terminal, or one without a cursor to move (TERM unset or `dumb`). There indicatif drops lines that are to stay, too.
        if target.is_hidden() {
            return Self::lines(std::io::stderr());
        }
        Self::bar(target)
    }

    fn bar(target: ProgressDrawTarget) -> Self {
        let bar = indicatif::ProgressBar::with_draw_target(None, target);
        let style = ProgressStyle::with_template("{bar:24.cyan} {pos}/{len}  {msg}").expect("the template is valid");
        bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏░"));
        Self { display: Display::Bar(bar), speed: Speed::default(), status: String::new() }
    }

    /// Plain lines: the first and last step, one every ten seconds between, every evaluation and checkpoint.
    pub fn lines(out: impl Write + 'static) -> Self {
        Self {
            display: Display::Lines { out: Box::new(out), last: None },
            speed: Speed::default(),
            status: String::new(),
        }
    }

    /// A line that stays.
    fn say(&mut self, line: &str) {
        match &mut self.display {
            Display::Bar(bar) => bar.println(line),
            // Nowhere to report that stderr is closed.
            Display::Lines { out, .. } => drop(writeln!(out, "{line}")),
        }
    }

    fn step(&mut self, info: &StepInfo) {
        self.speed.add(info);
        let status = status(info, &self.speed);
        match &mut self.display {
            Display::Bar(bar) => {
                bar.set_message(status.clone());
                bar.set_position(info.step);
            }
            Display::Lines { out, last } => {
                let is_due = last.is_none_or(|last| last.elapsed() >= PLAIN_INTERVAL);
                if is_due || info.step == info.total_steps {
                    drop(writeln!(out, "step {}/{}  {status}", info.step, info.total_steps));
                    *last = Some(Instant::now());
                }
            }
        }
        self.status = status;
    }
}

impl Observer for ProgressBar {
    fn observe(&mut self, event: &Event<'_>) {
        lasting_lines(event).iter().for_each(|line| self.say(line));
        match (event, &self.display) {
            (Event::Started(info), Display::Bar(bar)) => {
                bar.set_length(info.total_steps);
                bar.set_position(info.first_step);
            }
            (Event::Step(info), _) => self.step(info),
            (Event::EvalProgress { done, total }, Display::Bar(bar)) => {
                bar.set_message(format!("evaluating {done}/{total}"));
            }
            (Event::Eval(_), Display::Bar(bar)) => bar.set_message(self.status.clone()),
            (Event::Finished(_), Display::Bar(bar)) => bar.abandon(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::StartInfo;
    use super::*;
    use crate::metrics::EvalLog;
    use crate::objective::Metrics;
    use crate::trainer::Outcome;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn info(step: u64, seconds: f64) -> StepInfo {
        StepInfo {
            step,
            total_steps: 100,
            epoch: 0.5,
            loss: 1.23456,
            learning_rate: 1.95e-4,
            grad_norm: 1.0,
            tokens: 500,
            trained_tokens: 200,
            seconds,
            metrics: Metrics::new(),
        }
    }

    #[test]
    fn the_status_has_loss_rate_speed_and_time_left() {
        let mut speed = Speed::default();
        speed.add(&info(1, 2.0));
        assert_eq!(status(&info(1, 2.0), &speed), "epoch 0.50  loss 1.2346  lr 1.9e-4  250 tok/s  3m18s left");
        let metrics = [("rewards/accuracies", 0.8125), ("rewards/margins", 0.3), ("logps/chosen", -9.0)];
        let metrics = metrics.map(|(name, value)| (name.to_owned(), value)).into();
        let of_pairs = status(&StepInfo { metrics, ..info(1, 2.0) }, &speed);
        assert!(of_pairs.contains("loss 1.2346  accuracy 0.81  margin 0.30  lr"), "{of_pairs}");
        // One slow step out of many moves it a little.
        speed.add(&info(2, 12.0));
        assert!((speed.seconds - 3.0).abs() < 1e-9);
    }

    #[test]
    fn the_bar_follows_the_run() {
        let mut progress = ProgressBar::bar(ProgressDrawTarget::hidden());
        let start = StartInfo {
            first_step: 20,
            total_steps: 100,
            steps_per_epoch: Some(50),
            documents: Some(7),
            trainable_parameters: 3,
            initial_parameters: "0",
            resumed_from: Some("out/checkpoint-20".as_ref()),
            history: &[],
            samples: &[],
        };
        progress.observe(&Event::Started(&start));
        progress.observe(&Event::Step(&info(21, 1.0)));
        let Display::Bar(bar) = &progress.display else { panic!("no bar") };
        assert_eq!((bar.position(), bar.length()), (21, Some(100)));
        assert!(bar.message().contains("loss 1.2346"));
        progress.observe(&Event::EvalProgress { done: 1, total: 3 });
        let Display::Bar(bar) = &progress.display else { panic!("no bar") };
        assert_eq!(bar.message(), "evaluating 1/3");
        let entry = EvalLog {
            step: 21,
            epoch: 0.0,
            eval_loss: 1.0,
            eval_trained_tokens: 1,
            eval_runtime: 1.0,
            metrics: Metrics::new(),
        };
        progress.observe(&Event::Eval(&entry));
        let Display::Bar(bar) = &progress.display else { panic!("no bar") };
        assert!(bar.message().contains("loss 1.2346"));
        progress.observe(&Event::Finished(Outcome::Finished));
    }

    #[test]
    fn plain_lines_are_few_and_include_the_ends() {
        let out = Shared::default();
        let mut bar = ProgressBar::lines(out.clone());
        (1..=100).for_each(|step| bar.observe(&Event::Step(&info(step, 1.0))));
        bar.observe(&Event::Checkpoint("out/checkpoint-100".as_ref()));
        bar.observe(&Event::Finished(Outcome::Interrupted));
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].starts_with("step 1/100  epoch") && lines[1].starts_with("step 100/100  epoch"));
        assert_eq!(lines[2], "saved out/checkpoint-100");
    }
}
