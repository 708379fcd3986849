//! Answers while training: what they leave alone, and what becomes of them when a run stops.

use std::fs;
use std::path::Path;

use super::{Told, adapter, job, refused, run, with};
use crate::tiny_folder::write_rows;
use qlora::trainer::progress::{Event, Observer};
use qlora::trainer::samples::{SAMPLES_FILE, Sample};
use qlora::trainer::session::Session;
use qlora::trainer::{Interrupt, Outcome, TrainConfig};

fn samples(output: &Path) -> Vec<Sample> {
    let text = fs::read_to_string(output.join(SAMPLES_FILE)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Losses and rates of every step: what a run computed, without how long it took.
fn numbers(output: &Path) -> Vec<String> {
    let kept = ["step", "loss", "learning_rate", "grad_norm", "num_tokens", "eval_loss"];
    let text = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let of_line = |line: &str| {
        let entry: serde_json::Value = serde_json::from_str(line).unwrap();
        kept.map(|key| entry[key].to_string()).join(" ")
    };
    text.lines().map(of_line).collect()
}

fn into(config: &TrainConfig, folder: &Path, name: &str, changes: &[(&str, &str)]) -> TrainConfig {
    with(&with(config, &[("training.output_dir", folder.join(name).to_str().unwrap())]), changes)
}

#[test]
fn answers_change_no_bit_and_a_resumed_run_has_the_same() {
    let (folder, config) = job();
    let folder = folder.path();
    let base =
        with(&config, &[("training.max_steps", "5"), ("training.save_steps", "2"), ("lora.lora_dropout", "0.3")]);
    let asked = [("training.sample_every", "2"), ("training.sample_prompts", "[\"How much is it?\", \"And now?\"]")];
    let few = ("training.sample_max_new_tokens", "5");
    let plain = into(&base, folder, "plain", &[]);
    let sampled = into(&with(&base, &asked), folder, "sampled", &[few]);
    run(&plain).unwrap();
    run(&sampled).unwrap();
    let (plain, whole) = (&plain.training.output_dir, &sampled.training.output_dir);
    assert!(!plain.join(SAMPLES_FILE).exists());
    assert_eq!(adapter(plain), adapter(whole));
    assert_eq!(numbers(plain), numbers(whole));
    let answers = samples(whole);
    assert_eq!(answers.iter().map(|sample| sample.step).collect::<Vec<_>>(), [0, 0, 2, 2, 4, 4, 5, 5]);
    assert_eq!((answers[0].prompt.as_str(), answers[1].prompt.as_str()), ("How much is it?", "And now?"));
    assert!(answers.iter().all(|sample| sample.completion.chars().count() <= 5 && sample.expected.is_none()));

    // Stopped after each step in turn: every time the file ends up the same.
    let parts = into(&with(&base, &asked), folder, "parts", &[few, ("training.resume_from_checkpoint", "true")]);
    for stop in [1, 2, 4] {
        let session = Session::open(&parts, |_, _| ()).unwrap();
        let (training, validation) = session.datasets().unwrap();
        let interrupt = Interrupt::new();
        let trainer = session.into_trainer(training, validation).unwrap();
        let stopped = super::data::StopAfter(stop, interrupt.clone());
        let summary = trainer.with_observer(stopped).with_interrupt(interrupt).run().unwrap();
        assert_eq!((summary.outcome, summary.steps), (Outcome::Interrupted, stop));
    }
    assert_eq!(run(&parts).unwrap().steps, 5);
    assert_eq!(samples(&parts.training.output_dir), answers);
    assert_eq!(adapter(&parts.training.output_dir), adapter(plain));
}

/// Asks for a stop when a checkpoint is there: before the answers of its step.
struct StopAtCheckpoint(Interrupt);

impl Observer for StopAtCheckpoint {
    fn observe(&mut self, event: &Event<'_>) {
        if matches!(event, Event::Checkpoint(_)) {
            self.0.request();
        }
    }
}

#[test]
fn answers_are_broken_off_behind_the_checkpoint_and_made_by_the_resumed_run() {
    let (folder, config) = job();
    let folder = folder.path();
    let asked = [
        ("training.max_steps", "5"),
        ("training.save_steps", "2"),
        ("training.sample_every", "2"),
        ("training.sample_prompts", "[\"How much is it?\", \"And now?\"]"),
        ("training.sample_max_new_tokens", "5"),
    ];
    let base = with(&config, &asked);
    let whole = into(&base, folder, "whole", &[]);
    run(&whole).unwrap();
    let parts = into(&base, folder, "parts", &[("training.resume_from_checkpoint", "true")]);
    for (stop, rounds) in [(2, &[0, 0][..]), (4, &[0, 0, 2, 2][..]), (5, &[0, 0, 2, 2, 4, 4][..])] {
        let session = Session::open(&parts, |_, _| ()).unwrap();
        let (training, validation) = session.datasets().unwrap();
        let (interrupt, told) = (Interrupt::new(), Told::default());
        let trainer = session.into_trainer(training, validation).unwrap().with_observer(told.clone());
        let stopped = StopAtCheckpoint(interrupt.clone());
        let summary = trainer.with_observer(stopped).with_interrupt(interrupt).run().unwrap();
        assert_eq!((summary.outcome, summary.steps), (Outcome::Interrupted, stop));
        assert!(told.messages.borrow().iter().any(|text| text.starts_with("stopping: ")), "{stop}");
        let steps: Vec<_> = samples(&parts.training.output_dir).iter().map(|sample| sample.step).collect();
        assert_eq!(steps, rounds, "stopped at {stop}");
    }
    assert_eq!((run(&parts).unwrap().outcome, samples(&parts.training.output_dir).len()), (Outcome::Finished, 8));
    assert_eq!(samples(&parts.training.output_dir), samples(&whole.training.output_dir));
    assert_eq!(adapter(&parts.training.output_dir), adapter(&whole.training.output_dir));
}

#[test]
fn rows_of_the_validation_data_are_asked_up_to_their_answer() {
    let (folder, config) = job();
    write_rows(&folder.path().join("held.jsonl"), &["four", "five", "six", "seven"]);
    let held = folder.path().join("held.jsonl");
    let changes =
        [("training.max_steps", "1"), ("training.sample_every", "1"), ("training.sample_max_new_tokens", "2")];
    let config = with(&with(&config, &changes), &[("data.validation_file", held.to_str().unwrap())]);
    run(&config).unwrap();
    let answers = samples(&config.training.output_dir);
    let expected: Vec<_> = answers.iter().map(|sample| sample.expected.clone().unwrap()).collect();
    assert_eq!(expected, ["four", "five", "six", "four", "five", "six"]);
    assert!(answers.iter().all(|sample| sample.prompt.ends_with("<|im_start|>assistant\n")), "{answers:?}");
}

#[test]
fn prompts_of_a_file_and_what_is_wrong_with_some() {
    let (folder, config) = job();
    let file = folder.path().join("ask.jsonl");
    fs::write(
        &file,
        "{\"messages\": [{\"role\": \"system\", \"content\": \"Be short.\"}, {\"role\": \"user\", \"content\": \"a?\"}]}\n\
         {\"prompt\": \"b?\"}\n",
    )
    .unwrap();
    let changes =
        [("training.max_steps", "1"), ("training.sample_every", "100"), ("training.sample_max_new_tokens", "1")];
    let config = with(&config, &changes);
    let asks = |prompts: &str| with(&config, &[("training.sample_prompts", prompts)]);
    let of_file = asks(file.to_str().unwrap());
    run(&of_file).unwrap();
    let answers = samples(&of_file.training.output_dir);
    let asked: Vec<_> = answers.iter().map(|sample| (sample.step, sample.prompt.as_str())).collect();
    assert_eq!(asked, [(0, "a?"), (0, "b?"), (1, "a?"), (1, "b?")]);

    let anew = |config: TrainConfig| with(&config, &[("training.overwrite_output_dir", "true")]);
    fs::write(&file, "{\"prompt\": \"b?\"}\n{\"text\": \"c\"}\n").unwrap();
    assert!(refused(&anew(asks(file.to_str().unwrap()))).contains("ask.jsonl:2: "), "a row that is no prompt");
    fs::write(&file, format!("{{\"prompt\": {:?}}}\n", "x".repeat(600))).unwrap();
    assert!(
        refused(&anew(asks(file.to_str().unwrap()))).contains("ask.jsonl:1: the prompt has "),
        "too long, by its line"
    );
    assert!(refused(&anew(asks("How much?"))).contains("sample_prompts = [\"...\"]"), "one text is a path");
    let long = format!("[{:?}]", "x".repeat(600));
    assert!(refused(&anew(asks(&long))).contains("the model takes 512"), "longer than the model can take");
}
