//! A run as TensorBoard event files, with the tags that transformers' trainer has: `train/loss`, `train/learning_rate`,
//! `train/grad_norm`, `eval/loss`, and every other number of `metrics.jsonl` by its name there; the configuration and the answers to
//! prompts as texts. `tensorboard --logdir output/runs` shows them.

mod event;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use event::Event as Record;
use serde_json::Value;

use super::{Event, Observer, StartInfo};
use crate::metrics::LogEntry;
use crate::samples::Sample;

/// The beginning of the names of event files.
const PREFIX: &str = "events.out.tfevents.";

/// Keys of the log that stand beside each point anyway.
const POSITION: [&str; 1] = ["step"];

/// Writes event files. Each start of a run makes a file; one that is resumed begins with the step it goes on from, and TensorBoard
/// drops what earlier files have of later steps.
#[derive(Debug)]
pub struct TensorBoard {
    folder: PathBuf,
    configuration: String,
    file: Option<File>,
}

impl TensorBoard {
    /// Event files in a folder, which is made when the run begins. `configuration` is shown as a text.
    pub fn new(folder: impl Into<PathBuf>, configuration: impl Into<String>) -> Self {
        Self { folder: folder.into(), configuration: configuration.into(), file: None }
    }

    fn begin(&mut self, info: &StartInfo<'_>) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let earlier = last_time(&self.folder)?;
        let now = wall_time();
        // Files are read in the order of their names.
        let seconds = earlier.map_or(now as u64, |earlier| (now as u64).max(earlier.saturating_add(1)));
        let (host, process) = (host_name(), std::process::id());
        let path = self.folder.join(format!("{PREFIX}{seconds:010}.{host}.{process}.0"));
        self.file = Some(File::options().create_new(true).append(true).open(path)?);
        self.write(&Record::version(now))?;
        // A new run in the folder of another one replaces what that has of step 0, too.
        let first = if info.first_step == 0 { 0 } else { info.first_step + 1 };
        self.write(&Record::restart(now, first))?;
        let text = format!("```toml\n{}\n```", self.configuration.trim_end());
        self.write(&Record::text(now, info.first_step, "args", &text))?;
        if earlier.is_none() {
            // Of a run that goes on in another folder.
            info.history.iter().try_for_each(|entry| self.logged(entry))?;
            self.answered(info.samples)?;
        }
        Ok(())
    }

    fn logged(&mut self, entry: &LogEntry) -> io::Result<()> {
        self.write(&Record::scalars(wall_time(), entry.step(), &scalars(entry)))
    }

    fn answered(&mut self, samples: &[Sample]) -> io::Result<()> {
        for round in samples.chunk_by(|a, b| a.step == b.step) {
            for (i, sample) in round.iter().enumerate() {
                let expected = sample.expected.as_deref().map(|text| quoted("in the data", text)).unwrap_or_default();
                let text = quoted("prompt", &sample.prompt) + &quoted("answer", &sample.completion) + &expected;
                self.write(&Record::text(wall_time(), sample.step, &format!("samples/{}", i + 1), &text))?;
            }
        }
        Ok(())
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), |file| file.write_all(&record.record()))
    }
}

impl Observer for TensorBoard {
    fn observe(&mut self, event: &Event<'_>) {
        let written = match event {
            Event::Started(info) => self.begin(info),
            Event::Logged(entry) => self.logged(entry),
            Event::Samples(samples) => self.answered(samples),
            _ => Ok(()),
        };
        if let Err(error) = written {
            let folder = self.folder.display();
            tracing::warn!("{folder}: the TensorBoard events are not written any more: {error}");
            self.file = None;
        }
    }
}

/// The numbers of a line of the log by the tags that transformers' trackers give them: `eval_x` is `eval/x`, anything else
/// `train/x`.
fn scalars(entry: &LogEntry) -> Vec<(String, f32)> {
    let Ok(Value::Object(entry)) = serde_json::to_value(entry) else { return Vec::new() };
    let numbers = entry.into_iter().filter(|(key, _)| !POSITION.contains(&key.as_str()));
    let tagged = |(key, value): (String, Value)| {
        let tag = key.strip_prefix("eval_").map_or_else(|| format!("train/{key}"), |key| format!("eval/{key}"));
        // A norm that is infinite is null.
        Some((tag, value.as_f64()? as f32))
    };
    numbers.filter_map(tagged).collect()
}

/// A text of a model as Markdown that shows it as it is: a block of code whose fence is longer than any in the text.
fn quoted(title: &str, text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat((longest + 1).max(3));
    format!("{title}\n\n{fence}\n{text}\n{fence}\n\n")
}

/// The time in the name of the folder's last event file.
fn last_time(folder: &Path) -> io::Result<Option<u64>> {
    let mut last = None;
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let time = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok());
        last = last.max(time);
    }
    Ok(last)
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// The host's name where the system tells it in a file; it only makes names of files unique.
fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-_".contains(*c)).collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::EvalLog;

    fn eval(step: u64) -> LogEntry {
        let metrics = [("eval_rewards/margins".to_owned(), 0.5)].into();
        LogEntry::Eval(EvalLog {
            step,
            epoch: 1.0,
            eval_loss: 2.0,
            eval_trained_tokens: 7,
            eval_runtime: 0.25,
            metrics,
        })
    }

    fn info<'a>(first_step: u64, history: &'a [LogEntry]) -> StartInfo<'a> {
        StartInfo {
            first_step,
            total_steps: 9,
            steps_per_epoch: None,
            documents: None,
            trainable_parameters: 1,
            initial_parameters: "",
            resumed_from: None,
            history,
            samples: &[],
        }
    }

    fn files(folder: &Path) -> Vec<Vec<u8>> {
        let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths.iter().map(|path| fs::read(path).unwrap()).collect()
    }

    /// The events of a file, whose lengths and checksums must be right to its end.
    fn events(mut file: &[u8]) -> Vec<Vec<u8>> {
        let mut events = Vec::new();
        while !file.is_empty() {
            let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            events.push(file[12..12 + length].to_vec());
            file = &file[16 + length..];
        }
        events
    }

    fn holds(event: &[u8], bytes: &[u8]) -> bool {
        event.windows(bytes.len()).any(|window| window == bytes)
    }

    #[test]
    fn a_resumed_run_makes_a_second_file_that_says_where_it_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let runs = folder.path().join("deep/runs");
        let mut first = TensorBoard::new(&runs, "[lora]\nr = 4\n");
        assert!(!runs.exists());
        first.observe(&Event::Started(&info(0, &[])));
        [1, 2].iter().for_each(|&step| first.observe(&Event::Logged(&eval(step))));
        let mut second = TensorBoard::new(&runs, "[lora]\nr = 4\n");
        second.observe(&Event::Started(&info(1, &[eval(1)])));
        second.observe(&Event::Logged(&eval(2)));
        let files = files(&runs);
        let [first, second] = [events(&files[0]), events(&files[1])];
        // Version, restart, configuration, points; what the first file has is not written again.
        assert_eq!((first.len(), second.len()), (5, 4));
        assert!(holds(&first[2], b"args/text_summary") && holds(&first[2], b"r = 4"));
        assert!(
            holds(&first[3], b"\x0a\x09eval/loss\x15\x00\x00\x00\x40") && holds(&first[3], b"eval/rewards/margins")
        );
        assert!(first[1].ends_with(&[0x10, 0, 0x3a, 2, 8, 1]) && second[1].ends_with(&[0x10, 2, 0x3a, 2, 8, 1]));
    }

    #[test]
    fn a_run_that_goes_on_elsewhere_takes_its_points_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::new(folder.path(), "");
        board.observe(&Event::Started(&info(2, &[eval(1), eval(2)])));
        assert_eq!(events(&files(folder.path())[0]).len(), 5);
    }

    #[test]
    fn a_new_run_in_the_folder_of_another_replaces_all_of_it() {
        let folder = tempfile::tempdir().unwrap();
        // Later than any time that there is.
        let other = folder.path().join(format!("{PREFIX}{}.x", u64::MAX));
        fs::write(&other, "").unwrap();
        TensorBoard::new(folder.path(), "").observe(&Event::Started(&info(0, &[])));
        fs::remove_file(other).unwrap();
        let files = files(folder.path());
        assert_eq!(files.len(), 1);
        assert!(events(&files[0])[1].ends_with(&[0x10, 0, 0x3a, 2, 8, 1]));
    }

    #[test]
    fn tags_are_those_of_transformers() {
        let tags: Vec<String> = scalars(&eval(3)).into_iter().map(|(tag, _)| tag).collect();
        assert_eq!(tags, ["train/epoch", "eval/loss", "eval/trained_tokens", "eval/runtime", "eval/rewards/margins"]);
    }

    #[test]
    fn a_folder_that_cannot_be_made_ends_no_run() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut board = TensorBoard::new(file.path(), "");
        board.observe(&Event::Started(&info(0, &[])));
        board.observe(&Event::Logged(&eval(1)));
        assert_eq!(fs::read(file.path()).unwrap(), b"");
    }

    #[test]
    fn a_fence_is_longer_than_those_in_the_text() {
        assert!(quoted("answer", "a ````b````").contains("\n`````\na ````b````\n`````\n"));
    }
}
