//! A run that was killed or interrupted anywhere ends with the same bits and the same log as one that was not.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::rc::Rc;

use qlora_trainer::checkpoint::folder;
use qlora_trainer::config::{Optim, Resume, TrainConfig};
use qlora_trainer::progress::{Event, Observer};
use qlora_trainer::{Interrupt, Outcome, TrainableModel};

use crate::toy::{Fault, Toy, config, result, trainer};

const STEPS: u64 = 9;

/// Runs to the end without trouble; returns how often the model was called.
fn uninterrupted(config: &TrainConfig) -> usize {
    let model = Toy::new(1);
    let calls = Rc::clone(&model.calls);
    let summary = trainer(config, model).run().unwrap();
    assert_eq!((summary.outcome, summary.steps), (Outcome::Finished, STEPS));
    calls.get()
}

/// Goes on from the latest checkpoint, or from the start if there is none.
fn go_on(output: &Path) -> TrainConfig {
    let mut config = config(output);
    if folder::latest(output).unwrap().is_some() {
        config.training.resume_from_checkpoint = Resume::Latest;
    }
    config
}

#[test]
fn two_runs_of_the_same_are_the_same() {
    let [one, two] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    for folder in [&one, &two] {
        uninterrupted(&config(folder.path()));
    }
    assert_eq!(result(one.path(), STEPS), result(two.path(), STEPS));
    let mut other = config(two.path());
    (other.training.seed, other.training.overwrite_output_dir) = (43, true);
    uninterrupted(&other);
    assert_ne!(result(one.path(), STEPS), result(two.path(), STEPS));
}

#[test]
fn killed_at_any_micro_batch() {
    let reference = tempfile::tempdir().unwrap();
    let calls = uninterrupted(&config(reference.path()));
    let expected = result(reference.path(), STEPS);
    // 24 micro-batches of training, 3 of each of 4 evaluations.
    assert_eq!(calls, 24 + 3 * 4);
    let mut resumed = 0;
    for call in 0..calls {
        let folder = tempfile::tempdir().unwrap();
        let model = Toy { fault: Some((call, Fault::Killed)), ..Toy::new(1) };
        let error = trainer(&config(folder.path()), model).run().unwrap_err().to_string();
        assert!(error.ends_with("killed"), "{error}");
        let next = go_on(folder.path());
        resumed += usize::from(next.training.resume_from_checkpoint == Resume::Latest);
        uninterrupted(&next);
        assert_eq!(result(folder.path(), STEPS), expected, "killed at call {call}");
    }
    assert!(resumed > 20, "{resumed}");
}

#[test]
fn with_8_bit_moments() {
    let with = |folder: &Path, optim| {
        let mut config = go_on(folder);
        config.training.optim = optim;
        config
    };
    let reference = tempfile::tempdir().unwrap();
    let calls = uninterrupted(&with(reference.path(), Optim::Adamw8bit));
    for call in (0..calls).step_by(5) {
        let folder = tempfile::tempdir().unwrap();
        let model = Toy { fault: Some((call, Fault::Killed)), ..Toy::new(1) };
        trainer(&with(folder.path(), Optim::Adamw8bit), model).run().unwrap_err();
        uninterrupted(&with(folder.path(), Optim::Adamw8bit));
        assert_eq!(result(folder.path(), STEPS), result(reference.path(), STEPS), "killed at call {call}");
    }
    let plain = tempfile::tempdir().unwrap();
    uninterrupted(&with(plain.path(), Optim::AdamwTorch));
    assert_ne!(result(plain.path(), STEPS), result(reference.path(), STEPS), "8 bits take another way");
    let folder = tempfile::tempdir().unwrap();
    let model = Toy { fault: Some((30, Fault::Killed)), ..Toy::new(1) };
    trainer(&with(folder.path(), Optim::AdamwTorch), model).run().unwrap_err();
    let error = trainer(&with(folder.path(), Optim::Adamw8bit), Toy::new(1)).run().unwrap_err().to_string();
    assert!(error.contains("training.optim"), "{error}");
}

#[test]
fn a_checkpoint_from_before_there_were_optimizers_to_choose_from() {
    let [reference, folder] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    uninterrupted(&config(reference.path()));
    let model = Toy { fault: Some((30, Fault::Killed)), ..Toy::new(1) };
    trainer(&config(folder.path()), model).run().unwrap_err();
    let state = folder::latest(folder.path()).unwrap().unwrap().join("trainer_state.json");
    let mut json: serde_json::Value = serde_json::from_str(&fs::read_to_string(&state).unwrap()).unwrap();
    let identity = json["stateful_callbacks"]["qlora"]["identity"].as_object_mut().unwrap();
    assert_eq!(identity.remove("training.optim").unwrap(), "adamw_torch");
    fs::write(&state, json.to_string()).unwrap();
    let mut other = go_on(folder.path());
    other.training.optim = Optim::Adamw8bit;
    let error = trainer(&other, Toy::new(1)).run().unwrap_err().to_string();
    assert!(error.contains("training.optim"), "{error}");
    uninterrupted(&go_on(folder.path()));
    assert_eq!(result(folder.path(), STEPS), result(reference.path(), STEPS));
}

#[test]
fn killed_again_and_again() {
    let reference = tempfile::tempdir().unwrap();
    uninterrupted(&config(reference.path()));
    let folder = tempfile::tempdir().unwrap();
    // Eleven calls hold at least one checkpoint after the last one.
    for attempt in 0.. {
        assert!(attempt < 20);
        let model = Toy { fault: Some((11, Fault::Killed)), ..Toy::new(1) };
        if trainer(&go_on(folder.path()), model).run().is_ok() {
            break;
        }
    }
    assert_eq!(result(folder.path(), STEPS), result(reference.path(), STEPS));
}

/// Requests the interrupt at the `at`-th event that a person could react to.
struct Interrupter {
    at: usize,
    seen: Rc<Cell<usize>>,
    interrupt: Interrupt,
}

impl Observer for Interrupter {
    fn observe(&mut self, event: &Event<'_>) {
        if let Event::Step(_) | Event::EvalProgress { .. } | Event::Checkpoint(_) | Event::Started(_) = event {
            if self.seen.get() == self.at {
                self.interrupt.request();
            }
            self.seen.set(self.seen.get() + 1);
        }
    }
}

#[test]
fn interrupted_at_any_event() {
    let reference = tempfile::tempdir().unwrap();
    uninterrupted(&config(reference.path()));
    let expected = result(reference.path(), STEPS);
    let (mut at, mut interrupted) = (0, 0);
    loop {
        let folder = tempfile::tempdir().unwrap();
        let (seen, interrupt) = (Rc::new(Cell::new(0)), Interrupt::new());
        let observer = Interrupter { at, seen: Rc::clone(&seen), interrupt: interrupt.clone() };
        let mut trainer =
            trainer(&config(folder.path()), Toy::new(1)).with_observer(observer).with_interrupt(interrupt);
        let summary = trainer.run().unwrap();
        drop(trainer);
        if seen.get() <= at {
            break;
        }
        if summary.outcome == Outcome::Interrupted {
            interrupted += 1;
            assert_eq!(summary.adapter, None);
            // Nothing is lost: the checkpoint is of the step that was finished last.
            let name = (summary.steps > 0).then(|| folder.path().join(folder::name(summary.steps)));
            assert_eq!((&summary.checkpoint, folder::latest(folder.path()).unwrap()), (&name, name.clone()));
            uninterrupted(&go_on(folder.path()));
        }
        assert_eq!(result(folder.path(), STEPS), expected, "interrupted at event {at}");
        at += 1;
    }
    assert!(interrupted > 20, "{interrupted} of {at}");
}

#[test]
fn a_run_goes_on_in_the_same_process() {
    let reference = tempfile::tempdir().unwrap();
    uninterrupted(&config(reference.path()));
    let folder = tempfile::tempdir().unwrap();
    let interrupt = Interrupt::new();
    let mut trainer = trainer(&config(folder.path()), Toy::new(1)).with_interrupt(interrupt.clone());
    interrupt.request();
    assert_eq!(trainer.run().unwrap().outcome, Outcome::Interrupted);
    interrupt.clear();
    assert_eq!(trainer.run().unwrap().outcome, Outcome::Finished);
    assert_eq!(result(folder.path(), STEPS), result(reference.path(), STEPS));
}

#[test]
fn an_older_checkpoint_can_be_resumed_into_the_same_folder_or_another() {
    let folder = tempfile::tempdir().unwrap();
    let mut keep_all = config(folder.path());
    keep_all.training.save_total_limit = 0;
    uninterrupted(&keep_all);
    assert_eq!(folder::list(folder.path()).unwrap().len(), 5);
    let expected = result(folder.path(), STEPS);

    let mut again = keep_all.clone();
    again.training.resume_from_checkpoint = Resume::From(folder.path().join("checkpoint-4"));
    uninterrupted(&again);
    assert_eq!(result(folder.path(), STEPS), expected);

    let elsewhere = tempfile::tempdir().unwrap();
    again.training.output_dir = elsewhere.path().to_owned();
    uninterrupted(&again);
    assert_eq!(result(elsewhere.path(), STEPS), expected);
}

#[test]
fn a_finished_run_resumes_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    uninterrupted(&config(folder.path()));
    let expected = result(folder.path(), STEPS);
    fs::remove_file(folder.path().join("adapter_model.bin")).unwrap();
    assert_eq!(uninterrupted(&go_on(folder.path())), 0);
    assert_eq!(result(folder.path(), STEPS), expected);
}

#[test]
fn only_the_newest_checkpoints_stay() {
    let folder = tempfile::tempdir().unwrap();
    uninterrupted(&config(folder.path()));
    let steps: Vec<u64> = folder::list(folder.path()).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [8, 9]);
    let mut names: Vec<_> = fs::read_dir(folder.path().join("checkpoint-9"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["adapter_model.bin", "config.toml", "optimizer.safetensors", "trainer_state.json"]);
    let copy = TrainConfig::from_toml_file(folder.path().join("checkpoint-9/config.toml")).unwrap();
    assert_eq!(copy, config(folder.path()));
}

#[test]
fn steps_with_a_constant_rate_can_be_added() {
    let folder = tempfile::tempdir().unwrap();
    let constant = |steps: i64, resume: Resume| {
        let mut config = config(folder.path());
        config.training.set_constant(steps);
        config.training.resume_from_checkpoint = resume;
        let mut trainer = trainer(&config, Toy::new(1));
        trainer.run().unwrap();
        trainer.into_model().masters().unwrap()
    };
    constant(4, Resume::No);
    let extended = constant(7, Resume::Latest);
    fs::remove_dir_all(folder.path().join("checkpoint-7")).unwrap();
    fs::remove_dir_all(folder.path().join("checkpoint-6")).unwrap();
    assert_eq!(constant_in_one_go(), extended);
}

fn constant_in_one_go() -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.training.set_constant(7);
    let mut trainer = trainer(&config, Toy::new(1));
    trainer.run().unwrap();
    trainer.into_model().masters().unwrap()
}

trait SetConstant {
    fn set_constant(&mut self, steps: i64);
}

impl SetConstant for qlora_trainer::config::TrainingOptions {
    fn set_constant(&mut self, steps: i64) {
        self.lr_scheduler_type = qlora_trainer::config::Scheduler::Constant;
        (self.warmup_steps, self.max_steps) = (None, steps);
    }
}
