//! The log of a run: the lines of `metrics.jsonl`, which are also `log_history` in `trainer_state.json`.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::objective::Metrics;
pub use crate::times::RankTimes;
use crate::times::Times;
use qlora_core::atomic::write_atomically;

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum LogEntry {
    /// An evaluation. First, because its keys tell it apart.
    Eval(EvalLog),
    /// Training since the last such entry.
    Train(TrainLog),
}

impl LogEntry {
    /// The optimizer step after which it was written.
    pub fn step(&self) -> u64 {
        match self {
            Self::Eval(entry) => entry.step,
            Self::Train(entry) => entry.step,
        }
    }
}

/// Training since the last entry of this kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct TrainLog {
    /// Optimizer steps done.
    pub step: u64,
    /// Epochs done, with the fraction of the current one.
    pub epoch: f64,
    /// The mean of the steps' losses; each is the mean cross-entropy over the step's trained tokens, or the objective's loss over
    /// the step's groups.
    pub loss: f64,
    /// The learning rate of the last step.
    pub learning_rate: f64,
    /// The gradient's norm in the last step, before clipping. Infinite (null in the file) if that step was skipped because a
    /// gradient overflowed.
    #[serde(deserialize_with = "null_is_infinite")]
    pub grad_norm: f64,
    /// Tokens processed.
    pub tokens: u64,
    /// Tokens with a loss.
    pub trained_tokens: u64,
    /// Tokens processed since the start of the run.
    pub num_tokens: u64,
    /// Tokens processed a second; evaluation and saving are not counted.
    pub tokens_per_second: f64,
    /// The largest resident set of the process so far, in bytes.
    pub peak_memory: Option<u64>,
    /// Anonymous memory of the process now, in bytes.
    pub anonymous_memory: Option<u64>,
    /// The most GPU memory in use at one time since the process began, in bytes, the base and its loading included. Not
    /// there on the CPU, nor in logs of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_peak_memory: Option<u64>,
    /// In a run whose gradients are float16: the factor of the next step's loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f32>,
    /// In such a run: the steps so far that were skipped because a gradient overflowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped_steps: Option<u64>,
    /// In a run of several ranks: where their time went.
    #[serde(flatten)]
    pub ranks: Option<RankTimes>,
    /// The objective's metrics besides the loss, by TRL's names: means over the steps of the entry.
    #[serde(flatten)]
    pub metrics: Metrics,
}

/// JSON has no infinity: it is written as null.
fn null_is_infinite<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

/// An evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct EvalLog {
    /// Optimizer steps done.
    pub step: u64,
    /// Epochs done, with the fraction of the current one.
    pub epoch: f64,
    /// The mean cross-entropy over all trained tokens of the validation data, or the objective's mean loss.
    pub eval_loss: f64,
    /// The number of those tokens.
    pub eval_trained_tokens: u64,
    /// The duration of the evaluation, in seconds.
    pub eval_runtime: f64,
    /// The objective's metrics besides the loss, by TRL's names with `eval_` in front: means over the validation data.
    #[serde(flatten)]
    pub metrics: Metrics,
}

/// The sums of the steps since the last [`TrainLog`]; part of a checkpoint, so that a resumed run logs the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct LogWindow {
    pub(crate) steps: u64,
    pub(crate) loss_sum: f64,
    pub(crate) tokens: u64,
    pub(crate) trained_tokens: u64,
    pub(crate) seconds: f64,
    /// Sums of the steps' metrics.
    #[serde(default, skip_serializing_if = "Metrics::is_empty")]
    pub(crate) metrics: Metrics,
    /// The ranks' time; a resumed run, which may have other ranks, begins anew.
    #[serde(skip)]
    pub(crate) times: Times,
}

/// `metrics.jsonl` while a run writes it.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file with `history` as its content: nothing for a new run; for a resumed one what was logged up to the
    /// checkpoint, so that lines of steps that are done again do not stay.
    pub(crate) fn open(folder: &Path, history: &[LogEntry]) -> Result<Self> {
        let path = folder.join("metrics.jsonl");
        if !history.is_empty() {
            let lines: String = history.iter().map(line).collect();
            write_atomically(&path, |file| file.write_all(lines.as_bytes()))?;
        }
        let mut options = File::options();
        options.create(true).write(true).append(!history.is_empty()).truncate(history.is_empty());
        let file = options.open(&path).map_err(|error| Error::io(&path, error))?;
        Ok(Self { path, file })
    }

    /// Adds a line; it is in the file when this returns.
    pub(crate) fn write(&mut self, entry: &LogEntry) -> Result<()> {
        self.file.write_all(line(entry).as_bytes()).map_err(|error| Error::io(&self.path, error))
    }
}

fn line(entry: &LogEntry) -> String {
    let mut line = serde_json::to_string(entry).expect("numbers have a JSON form");
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn train(step: u64) -> LogEntry {
        LogEntry::Train(TrainLog {
            step,
            epoch: 1.0 / 3.0,
            loss: 0.1 + 0.2,
            learning_rate: 2e-4 / 7.0,
            grad_norm: 1e-300 / 3.0,
            tokens: 10,
            trained_tokens: 5,
            num_tokens: 10 * step,
            tokens_per_second: 123.456,
            peak_memory: Some(1 << 40),
            anonymous_memory: None,
            gpu_peak_memory: Some(9_705_000_000),
            loss_scale: None,
            skipped_steps: None,
            ranks: None,
            metrics: Metrics::new(),
        })
    }

    fn eval(step: u64) -> LogEntry {
        LogEntry::Eval(EvalLog {
            step,
            epoch: 1.0,
            eval_loss: 2.0 / 3.0,
            eval_trained_tokens: 7,
            eval_runtime: 0.1,
            metrics: Metrics::new(),
        })
    }

    #[test]
    fn entries_come_back_to_the_bit() {
        for entry in [train(3), eval(4)] {
            let back: LogEntry = serde_json::from_str(&line(&entry)).unwrap();
            assert_eq!(back, entry);
            assert_eq!(line(&back), line(&entry));
        }
    }

    #[test]
    fn metrics_of_an_objective_are_keys_of_the_line() {
        let metrics = |name: &str| Metrics::from([(name.to_owned(), 1.0 / 3.0)]);
        let LogEntry::Train(entry) = train(3) else { panic!("not a step") };
        let LogEntry::Eval(evaluated) = eval(3) else { panic!("no evaluation") };
        for (entry, key) in [
            (LogEntry::Train(TrainLog { metrics: metrics("rewards/margins"), ..entry }), "\"rewards/margins\":0.33"),
            (
                LogEntry::Eval(EvalLog { metrics: metrics("eval_rewards/margins"), ..evaluated }),
                "\"eval_rewards/margins\":0.33",
            ),
        ] {
            assert!(line(&entry).contains(key), "{}", line(&entry));
            assert_eq!(serde_json::from_str::<LogEntry>(&line(&entry)).unwrap(), entry);
        }
    }

    #[test]
    fn a_skipped_step_comes_back() {
        let LogEntry::Train(entry) = train(3) else { panic!("not a step") };
        let skipped = LogEntry::Train(TrainLog {
            grad_norm: f64::INFINITY,
            loss_scale: Some(32_768.0),
            skipped_steps: Some(1),
            ..entry
        });
        assert!(line(&skipped).contains(r#""grad_norm":null"#), "{}", line(&skipped));
        assert_eq!(serde_json::from_str::<LogEntry>(&line(&skipped)).unwrap(), skipped);
        assert!(!line(&train(3)).contains("loss_scale"));
    }

    #[test]
    fn a_line_without_a_gpus_memory_is_read_and_written_so() {
        let LogEntry::Train(entry) = train(3) else { panic!("not a step") };
        let on_cpu = LogEntry::Train(TrainLog { gpu_peak_memory: None, ..entry });
        assert!(!line(&on_cpu).contains("gpu_peak_memory"));
        let back: LogEntry = serde_json::from_str(&line(&on_cpu)).unwrap();
        assert_eq!(back, on_cpu);
    }

    #[test]
    fn a_resumed_run_cuts_the_file_back_to_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let content = || std::fs::read_to_string(folder.path().join("metrics.jsonl")).unwrap();
        let mut file = MetricsFile::open(folder.path(), &[]).unwrap();
        [train(1), eval(1), train(2)].iter().for_each(|entry| file.write(entry).unwrap());
        let whole = content();
        assert_eq!(whole.lines().count(), 3);
        let mut file = MetricsFile::open(folder.path(), &[train(1), eval(1)]).unwrap();
        assert_eq!(content().lines().count(), 2);
        file.write(&train(2)).unwrap();
        assert_eq!(content(), whole);
        MetricsFile::open(folder.path(), &[]).unwrap();
        assert_eq!(content(), "");
    }
}
