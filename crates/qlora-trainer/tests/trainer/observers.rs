//! Tests of the events that observers get, and of the log.

use std::collections::BTreeSet;
use std::fs;
use std::rc::Rc;

use qlora_trainer::metrics::LogEntry;
use qlora_trainer::progress::{Event, LossPlot, Observer};

use crate::toy::{Toy, config, trainer};

#[derive(Default)]
struct Recorder(Vec<String>);

impl Observer for Recorder {
    fn observe(&mut self, event: &Event<'_>) {
        let text = match event {
            Event::Started(info) => format!("start {}/{}", info.first_step, info.total_steps),
            Event::Step(info) => format!("step {}", info.step),
            Event::Logged(LogEntry::Train(entry)) => format!("log {}", entry.step),
            Event::Eval(entry) => format!("eval {}", entry.step),
            Event::Checkpoint(path) => path.file_name().unwrap().to_string_lossy().into_owned(),
            Event::Finished(outcome) => format!("{outcome:?}"),
            _ => return,
        };
        self.0.push(text);
    }
}

#[test]
fn events_come_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.training.max_steps = 5;
    let mut recorder = Recorder::default();
    trainer(&config, Toy::new(1)).with_observer(&mut recorder).run().unwrap();
    let expected = "start 0/5, eval 0, step 1, step 2, log 2, checkpoint-2, step 3, eval 3, step 4, log 4, checkpoint-4, \
                    step 5, log 5, eval 5, checkpoint-5, Finished";
    assert_eq!(recorder.0.join(", "), expected);
}

#[test]
fn the_log_says_what_happened() {
    let folder = tempfile::tempdir().unwrap();
    let plot = folder.path().join("loss.svg");
    let mut trainer = trainer(&config(folder.path()), Toy::new(1)).with_observer(LossPlot::new(&plot, "toy"));
    trainer.run().unwrap();
    let log: Vec<LogEntry> = fs::read_to_string(folder.path().join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(log, trainer.history());
    let train = log.iter().filter_map(|entry| match entry {
        LogEntry::Train(entry) => Some(entry),
        _ => None,
    });
    let train: Vec<_> = train.collect();
    // Every second step, and the last.
    assert_eq!(train.iter().map(|entry| entry.step).collect::<Vec<_>>(), [2, 4, 6, 8, 9]);
    // Warmup of two steps up to 0.05, then down to zero over seven.
    let rate = |i: usize| train[i].learning_rate;
    assert!((rate(0) - 0.025).abs() < 1e-12 && (rate(4) - 0.05 / 7.0).abs() < 1e-12);
    let data = crate::toy::dataset(15);
    assert_eq!(train[4].num_tokens, 3 * data.stats().tokens as u64);
    assert_eq!(train.iter().map(|entry| entry.tokens).sum::<u64>(), train[4].num_tokens);
    assert_eq!(train.iter().map(|entry| entry.trained_tokens).sum::<u64>(), 3 * data.stats().trained_tokens as u64);
    assert!(train.iter().all(|entry| entry.loss.is_finite() && entry.grad_norm > 0.0 && entry.tokens_per_second > 0.0));
    assert_eq!(train[4].epoch, 3.0);
    let eval: Vec<u64> = log.iter().filter(|entry| matches!(entry, LogEntry::Eval(_))).map(LogEntry::step).collect();
    assert_eq!(eval, [0, 3, 6, 9]);
    assert!(fs::read_to_string(&plot).unwrap().contains("<polyline"));
    let state = fs::read_to_string(folder.path().join("checkpoint-9/trainer_state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["global_step"], 9);
    assert_eq!(state["log_history"].as_array().unwrap().len(), log.len());
}

#[test]
fn every_micro_batch_has_its_own_randomness() {
    let run = |seed: u64| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        config.training.seed = seed;
        let model = Toy::new(1);
        let seeds = Rc::clone(&model.seeds);
        trainer(&config, model).run().unwrap();
        seeds.take()
    };
    let seeds = run(42);
    assert_eq!(seeds.len(), 24);
    let both: BTreeSet<u64> = seeds.iter().copied().chain(run(43)).collect();
    assert_eq!(both.len(), 48);
    assert_eq!(run(42), seeds);
}
