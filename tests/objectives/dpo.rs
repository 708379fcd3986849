//! `objective = "dpo"` as a user runs it: a TOML, pairs of answers in JSONL, a model folder.

use std::fs;
use std::path::Path;

use qlora::trainer::metrics::{EvalLog, LogEntry, TrainLog};
use qlora::trainer::session::Session;
use qlora::trainer::{Interrupt, Outcome, TrainConfig, Trainer};

use super::{StopAfter, adapter};
use crate::tiny_folder::{self, CHATML};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data");

/// A model of random weights and what a run of it on the pairs of `examples/data` says.
fn config(folder: &Path, output: &str, training: &str, rest: &str) -> TrainConfig {
    let model = folder.join("model");
    if !model.exists() {
        tiny_folder::write_model(&model, 5, CHATML);
    }
    let output = folder.join(output);
    let text = format!(
        "[model]\nmodel_name_or_path = {model:?}\ndevice = \"cpu\"\nblocksize = 32\n\
         [lora]\nr = 8\nlora_alpha = 16\nlora_dropout = 0.1\ntarget_modules = \"all-linear\"\n{rest}\n\
         [data]\ntrain_file = \"{DATA}/preference_train.jsonl\"\nvalidation_file = \"{DATA}/preference_heldout.jsonl\"\n\
         [training]\nobjective = \"dpo\"\noutput_dir = {output:?}\nlr_scheduler_type = \"constant\"\n\
         per_device_train_batch_size = 4\ngradient_accumulation_steps = 2\nsave_steps = 0\n{training}\n\
         [objective]\nbeta = 0.5\n"
    );
    TrainConfig::from_toml_str(&text).unwrap()
}

fn trainer(config: &TrainConfig) -> Trainer<'static, qlora::trainer::qlora_model::QLoraModel> {
    let session = Session::open(config, |_, _| ()).unwrap();
    let (training, validation) = session.data().unwrap();
    session.into_trainer(training, validation).unwrap()
}

fn lines(history: &[LogEntry]) -> (Vec<TrainLog>, Vec<EvalLog>) {
    let (mut train, mut eval) = (Vec::new(), Vec::new());
    for entry in history {
        match entry {
            LogEntry::Train(entry) => train.push(entry.clone()),
            LogEntry::Eval(entry) => eval.push(entry.clone()),
            other => panic!("{other:?}"),
        }
    }
    (train, eval)
}

#[test]
fn preferences_are_learned_and_hold_for_pairs_that_were_not_trained() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), "out", "max_steps = 40\nlearning_rate = 5e-3\neval_steps = 20\n", "");
    let mut trainer = trainer(&config);
    assert_eq!(trainer.run().unwrap().outcome, Outcome::Finished);
    let (train, eval) = lines(trainer.history());
    // Model and reference are the same at first.
    assert!((train[0].loss - 2f64.ln()).abs() < 1e-6, "{}", train[0].loss);
    for name in ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"] {
        assert!(train[0].metrics[name].abs() < 1e-9, "{name}: {}", train[0].metrics[name]);
    }
    assert!(train[0].metrics["logps/chosen"] < 0.0 && train[0].metrics["logps/rejected"] < 0.0);
    let last = eval.last().unwrap();
    println!("held out: loss {:.4}, {:?}", last.eval_loss, last.metrics);
    assert!(last.metrics["eval_rewards/accuracies"] >= 0.85 && last.metrics["eval_rewards/margins"] > 0.0);
    assert!(last.eval_loss < train[0].loss);
    let log = fs::read_to_string(config.training.output_dir.join("metrics.jsonl")).unwrap();
    assert!(log.lines().next().unwrap().contains("\"rewards/margins\":"), "{log}");
    assert!(log.lines().last().unwrap().contains("\"eval_rewards/accuracies\":"), "{log}");
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    resumes(false);
    resumes(true);
}

fn resumes(streaming: bool) {
    let folder = tempfile::tempdir().unwrap();
    let of = |output: &str, more: &str| {
        let training = format!("max_steps = 5\nlearning_rate = 1e-3\nlogging_steps = 2\n{more}");
        let mut config = config(folder.path(), output, &training, "");
        config.data.streaming = streaming;
        config
    };
    let whole = of("whole", "");
    let mut trainer_of_whole = trainer(&whole);
    trainer_of_whole.run().unwrap();
    let interrupt = Interrupt::new();
    let mut first = trainer(&of("parts", "")).with_interrupt(interrupt.clone()).with_observer(StopAfter(3, interrupt));
    assert_eq!(first.run().unwrap().outcome, Outcome::Interrupted);
    let resumed = of("parts", "resume_from_checkpoint = true\n");
    let mut second = trainer(&resumed);
    assert_eq!(second.run().unwrap().outcome, Outcome::Finished);
    assert_eq!(adapter(&whole.training.output_dir), adapter(&resumed.training.output_dir));
    let (expected, got) = (lines(trainer_of_whole.history()), lines(second.history()));
    let numbers = |lines: &[TrainLog]| lines.iter().map(|line| (line.loss, line.metrics.clone())).collect::<Vec<_>>();
    assert_eq!(numbers(&got.0), numbers(&expected.0));
    assert_eq!(got.1[0].metrics, expected.1[0].metrics);
    // Another beta is another run.
    let mut other = of("parts", "resume_from_checkpoint = true\n");
    other.set("objective.beta", "0.2").unwrap();
    let error = Session::open(&other, |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("objective.beta: 0.5 in the checkpoint, 0.2 now"), "{error}");
}

#[test]
fn a_run_from_a_trained_adapter_compares_with_that_adapter() {
    // The last two change the head: some of its rows, and all.
    let rows = "trainable_token_indices = { embed_tokens = [97, 101], lm_head = [101, 115] }\n";
    for parts in ["", rows, "modules_to_save = [\"lm_head\"]\n"] {
        compares_with_where_it_began(parts);
    }
}

fn compares_with_where_it_began(parts: &str) {
    let folder = tempfile::tempdir().unwrap();
    let first = config(folder.path(), "first", "max_steps = 3\nlearning_rate = 5e-3\n", parts);
    trainer(&first).run().unwrap();
    let from = format!("adapter_name_or_path = {:?}", first.training.output_dir);
    let second = config(folder.path(), "second", "max_steps = 2\nlearning_rate = 1e-3\n", &from);
    let mut run = trainer(&second);
    run.run().unwrap();
    let (train, _) = lines(run.history());
    // Not with the base, which the first run has left.
    assert!((train[0].loss - 2f64.ln()).abs() < 1e-4, "{}", train[0].loss);
    assert!(train[1].metrics["rewards/margins"].abs() > 1e-4);
    // Resumed, it still compares with where it began: nothing is left to do, but to evaluate.
    let mut resumed = second.clone();
    resumed.set("training.resume_from_checkpoint", "true").unwrap();
    resumed.set("training.max_steps", "3").unwrap();
    let mut run = trainer(&resumed);
    run.run().unwrap();
    let (train, _) = lines(run.history());
    assert_eq!(train.len(), 3);
    assert!(train[2].metrics["rewards/margins"].abs() > 1e-4, "{:?}", train[2].metrics);
}

#[test]
fn rows_and_objective_must_fit() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |change: &dyn Fn(&mut TrainConfig)| {
        let mut config = config(folder.path(), "out", "max_steps = 1\n", "");
        change(&mut config);
        Session::open(&config, |_, _| ()).unwrap_err().to_string()
    };
    let message = refusal(&|config| {
        config.set("training.objective", "sft").unwrap();
        config.objective = Default::default();
    });
    assert!(message.contains("preference_train.jsonl:1: a pair of answers"), "{message}");
    assert!(message.contains("\"sft\"") && message.contains("`objective` in [training]"), "{message}");
    let plain = folder.path().join("plain.jsonl");
    tiny_folder::write_rows(&plain, &["yes", "no"]);
    let message = refusal(&|config| config.data.train_file = plain.as_path().into());
    assert!(message.contains("plain.jsonl:1: the objective \"dpo\" trains on pairs"), "{message}");
    let pair = fs::read_to_string(format!("{DATA}/preference_heldout.jsonl")).unwrap();
    let mixed = format!("{}\n{}", pair.lines().next().unwrap(), fs::read_to_string(&plain).unwrap());
    fs::write(&plain, mixed).unwrap();
    let message = refusal(&|config| config.data.train_file = plain.as_path().into());
    assert!(message.contains("plain.jsonl:2: pairs of answers"), "{message}");
}
