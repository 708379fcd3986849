//! A run in words: the lines that stay, the state after a step, speed and time left.

use super::{Event, StepInfo};
use crate::objective::Metrics;
use crate::samples::Sample;
use crate::trainer::Outcome;

/// The weight of a new step in the moving average of speed: about the last ten steps count.
const NEW: f64 = 0.1;

/// The most characters of a prompt or an answer in a line.
const SHOWN: usize = 60;

/// The lines about an event that stay.
pub(super) fn lasting_lines(event: &Event<'_>) -> Vec<String> {
    match event {
        Event::Started(info) => {
            let resumed = info.resumed_from.map(|path| {
                let (path, step) = (path.display(), info.first_step);
                format!("resuming from {path} at step {step}")
            });
            let (steps, trainable) = (info.total_steps, info.trainable_parameters);
            let documents = info.documents.map_or("a stream of".to_owned(), |documents| documents.to_string());
            let per_epoch = info.steps_per_epoch.map_or_else(String::new, |steps| format!(" ({steps} an epoch)"));
            let begins = format!("{documents} documents, {trainable} trainable parameters, {steps} steps{per_epoch}");
            resumed.into_iter().chain([begins]).collect()
        }
        Event::Eval(entry) => {
            let (step, loss, seconds) = (entry.step, entry.eval_loss, entry.eval_runtime);
            let metrics = shown_metrics(&entry.metrics, "eval_");
            vec![format!("step {step}: eval loss {loss:.4}{metrics} ({})", duration(seconds))]
        }
        Event::Samples(samples) => samples.iter().map(answer).collect(),
        Event::Checkpoint(path) => vec![format!("saved {}", path.display())],
        Event::Message(text) => vec![(*text).to_owned()],
        Event::Finished(Outcome::Interrupted) => {
            vec!["interrupted; resume_from_checkpoint = true goes on from here".to_owned()]
        }
        _ => Vec::new(),
    }
}

/// `step 20: How much is it? -> four`
fn answer(sample: &Sample) -> String {
    let Sample { step, prompt, completion, .. } = sample;
    // What is asked stands at the end of a prompt as the model sees it.
    let prompt: String = one_line(prompt).chars().rev().take(SHOWN).collect::<Vec<_>>().into_iter().rev().collect();
    format!("step {step}: {prompt} -> {}", cut(&one_line(completion), SHOWN))
}

/// A text of a model in one line, without characters that a terminal obeys.
pub(super) fn one_line(text: &str) -> String {
    let shown = |c: &char| !c.is_control() && !turns_text(*c);
    text.trim().chars().map(|c| if c == '\n' { '⏎' } else { c }).filter(shown).collect()
}

/// Whether a character sets the direction of the text around it, or separates lines: with it a text could look like another one.
fn turns_text(c: char) -> bool {
    matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The beginning of a text, with an ellipsis if something is cut off.
pub(super) fn cut(text: &str, width: usize) -> String {
    match text.chars().count() > width {
        true => text.chars().take(width.saturating_sub(1)).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

/// Moving averages over the last steps.
#[derive(Debug, Default)]
pub(super) struct Speed {
    tokens: f64,
    pub(super) seconds: f64,
}

impl Speed {
    pub(super) fn add(&mut self, info: &StepInfo) {
        let weight = if self.seconds == 0.0 { 1.0 } else { NEW };
        self.tokens += weight * (info.tokens as f64 - self.tokens);
        self.seconds += weight * (info.seconds - self.seconds);
    }

    /// Tokens a second.
    pub(super) fn per_second(&self) -> f64 {
        self.tokens / self.seconds.max(1e-9)
    }

    /// The seconds that the steps after this one will take.
    pub(super) fn left(&self, info: &StepInfo) -> f64 {
        (info.total_steps - info.step) as f64 * self.seconds
    }
}

/// The state of a run after a step, as a line.
pub(super) fn status(info: &StepInfo, speed: &Speed) -> String {
    let (per_second, left) = (speed.per_second(), speed.left(info));
    let (epoch, loss, rate) = (info.epoch, info.loss, info.learning_rate);
    let metrics = shown_metrics(&info.metrics, "");
    format!("epoch {epoch:.2}  loss {loss:.4}{metrics}  lr {rate:.1e}  {per_second:.0} tok/s  {} left", duration(left))
}

/// The metrics that say most, as further words of a line.
pub(super) fn shown_metrics(metrics: &Metrics, prefix: &str) -> String {
    let shown = [("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")];
    let word = |(name, word): (&str, &str)| {
        let value = metrics.get(&format!("{prefix}{name}"))?;
        Some(format!("  {word} {value:.2}"))
    };
    shown.into_iter().filter_map(word).collect()
}

/// `45s`, `3m20s`, `2h05m`.
pub(super) fn duration(seconds: f64) -> String {
    let seconds = seconds.round().max(0.0) as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        let texts = [0.2, 59.4, 59.6, 200.0, 3599.0, 7500.0, 400_000.0].map(duration);
        assert_eq!(texts, ["0s", "59s", "1m00s", "3m20s", "59m59s", "2h05m", "111h06m"]);
    }

    #[test]
    fn answers_cannot_move_the_cursor() {
        let (prompt, completion) =
            ("a long prompt ".repeat(9) + "How much?", "four\n\u{1b}[2J\r".to_owned() + &"x".repeat(99));
        let sample = Sample { step: 7, epoch: 0.5, prompt, completion, expected: None };
        let lines = lasting_lines(&Event::Samples(&[sample]));
        assert_eq!(lines.len(), 1);
        assert!(lines[0].starts_with("step 7: ") && lines[0].contains("How much? -> four⏎[2Jxx"), "{}", lines[0]);
        assert_eq!(one_line("a\u{202e}b\u{2066}c\u{2028}d\u{200f} מים"), "abcd מים");
        assert!(lines[0].ends_with('…') && !lines[0].chars().any(char::is_control), "{}", lines[0]);
    }
}
