//! Runs over data of several sets, in memory and streamed.

use std::fs;
use std::path::Path;

use qlora::trainer::Interrupt;
use qlora::trainer::config::{MixStrategy, Resume};
use qlora::trainer::progress::{Event, Observer};
use qlora::trainer::session::Session;
use qlora::trainer::{Outcome, TrainConfig};

use super::{adapter, copy};
use crate::tiny_folder::{CHATML, config, write_model, write_rows};

const STEPS: i64 = 11;

/// A model, and two sets whose columns have names of their own.
fn job() -> (tempfile::TempDir, TrainConfig) {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_model(&at("model"), 1, CHATML);
    let answers: Vec<String> = (0..17).map(|i| format!("answer {}", "x".repeat(i))).collect();
    write_rows(&at("train.jsonl"), &answers.iter().map(String::as_str).collect::<Vec<_>>());
    let rows: String = (0..9).map(|i| format!("question {i},\"reply, {i}\"\n")).collect();
    fs::write(at("more.csv"), "q,a\n".to_owned() + &rows).unwrap();
    let mut config = config(folder.path());
    let more = format!("path = {:?}\nfield_instruction = \"q\"\nfield_output = \"a\"", at("more.csv"));
    config.data.datasets = vec![toml::from_str(&more).unwrap()];
    config.data.mix_strategy = MixStrategy::InterleaveOver;
    config.data.interleave_probs = vec![0.6, 0.4];
    config.data.val_size = 3.0;
    config.lora.lora_dropout = 0.1;
    config.training.max_steps = STEPS;
    config.training.per_device_train_batch_size = 2;
    config.training.gradient_accumulation_steps = 2;
    config.training.save_steps = 4;
    config.training.eval_steps = Some(5);
    (folder, config)
}

/// Asks the run to stop after a step, as Ctrl-C does.
pub(super) struct StopAfter(pub(super) u64, pub(super) Interrupt);

impl Observer for StopAfter {
    fn observe(&mut self, event: &Event<'_>) {
        if matches!(event, Event::Step(info) if info.step == self.0) {
            self.1.request();
        }
    }
}

fn run(config: &TrainConfig, stop_after: u64) -> Outcome {
    let interrupt = Interrupt::new();
    let session = Session::open(config, |_, _| ()).unwrap();
    let (training, validation) = session.data().unwrap();
    let trainer = session.into_trainer(training, validation).unwrap();
    trainer.with_observer(StopAfter(stop_after, interrupt.clone())).with_interrupt(interrupt).run().unwrap().outcome
}

/// Losses of the log, without what depends on time.
fn losses(output: &Path) -> Vec<(Option<f64>, Option<f64>, Option<u64>)> {
    let text = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let number = |line: &serde_json::Value, key: &str| line[key].as_f64();
    let line = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        (number(&line, "loss"), number(&line, "eval_loss"), line["num_tokens"].as_u64())
    };
    text.lines().map(line).collect()
}

/// Stopped after any step, or killed and begun again from the last checkpoint, a run ends with the bytes of one that was not;
/// the data is mixed, shuffled, split for validation, and goes through several epochs.
#[test]
fn interrupted_runs_are_the_same() {
    for (streaming, packing) in [(false, false), (true, false), (true, true)] {
        let (folder, mut config) = job();
        config.data.streaming = streaming;
        config.data.buffer_size = 5;
        config.data.packing = packing;
        config.training.output_dir = folder.path().join("whole");
        assert_eq!(run(&config, 0), Outcome::Finished);
        let whole = (adapter(&config.training.output_dir), losses(&config.training.output_dir));
        assert!(whole.1.iter().filter(|line| line.1.is_some()).count() >= 3, "{:?}", whole.1);
        for stop in [1, 4, 6, 9] {
            config.training.output_dir = folder.path().join(format!("stopped-{stop}"));
            assert_eq!(run(&config, stop), Outcome::Interrupted);
            config.training.resume_from_checkpoint = Resume::Latest;
            assert_eq!(run(&config, 0), Outcome::Finished);
            config.training.resume_from_checkpoint = Resume::No;
            let resumed = (adapter(&config.training.output_dir), losses(&config.training.output_dir));
            assert!(resumed == whole, "streaming {streaming}, stopped after {stop}");
        }
        // Killed: what is left is a checkpoint.
        config.training.output_dir = folder.path().join("killed");
        copy(&folder.path().join("whole/checkpoint-8"), &config.training.output_dir.join("checkpoint-8"));
        config.training.resume_from_checkpoint = Resume::Latest;
        assert_eq!(run(&config, 0), Outcome::Finished);
        assert_eq!(adapter(&config.training.output_dir), whole.0, "streaming {streaming}");
    }
}

#[test]
fn a_stream_goes_on_with_the_same_data_only() {
    let (folder, mut config) = job();
    config.data.streaming = true;
    assert_eq!(run(&config, 4), Outcome::Interrupted);
    config.training.resume_from_checkpoint = Resume::Latest;
    let refusal = |config: &TrainConfig| Session::open(config, |_, _| ()).unwrap_err().to_string();
    let mut other = config.clone();
    other.data.buffer_size = 7;
    assert!(refusal(&other).contains("data.buffer_size: 16384 in the checkpoint, 7 now"), "{}", refusal(&other));
    let mut other = config.clone();
    other.data.streaming = false;
    assert!(refusal(&other).contains("training data: \"a stream of 2 files"), "{}", refusal(&other));
    fs::write(folder.path().join("more.csv"), "q,a\nx,y\n").unwrap();
    assert!(refusal(&config).contains("training data"), "{}", refusal(&config));
    let session = Session::open_dry_run(&config, |_, _| ()).unwrap();
    assert!(session.datasets().unwrap_err().to_string().contains("use Session::data"));
}

/// Tokens that were kept train as those that are made: no bit of the adapter or the log differs. A planned run keeps nothing.
#[test]
fn runs_out_of_the_cache_are_the_same() {
    let (folder, mut config) = job();
    let answers: Vec<String> = (0..4000).map(|i| format!("answer {i} {}", "y".repeat(250 + i % 60))).collect();
    write_rows(&folder.path().join("train.jsonl"), &answers.iter().map(String::as_str).collect::<Vec<_>>());
    config.training.max_steps = 4;
    config.data.max_length = 48;
    let cache = folder.path().join("prepared");
    config.data.dataset_prepared_path = Some(cache.clone());
    let remark = |config: &TrainConfig| {
        let session = Session::open_dry_run(config, |_, _| ()).unwrap();
        session.data().unwrap().0.remarks().remove(0)
    };
    assert!(remark(&config).starts_with("4000 rows tokenized"));
    assert!(!cache.exists(), "a planned run writes nothing");
    let mut ended = Vec::new();
    for (name, dataset_cache) in [("without", false), ("made", true), ("read", true)] {
        config.data.dataset_cache = dataset_cache;
        config.training.output_dir = folder.path().join(name);
        run(&config, u64::MAX);
        ended.push((losses(&config.training.output_dir), adapter(&config.training.output_dir)));
        assert_eq!(cache.exists(), dataset_cache);
    }
    assert!(remark(&config).starts_with("4000 rows are ready out of the cache"), "{}", remark(&config));
    assert!(!ended[0].0.is_empty());
    assert!(ended[0] == ended[1] && ended[0] == ended[2]);
}
