//! A run whose checkpoints go to a store, and which goes on on a machine that has nothing but the store; a notice of preemption.

use std::fs;
use std::path::{Path, PathBuf};

use qlora_trainer::config::{Resume, TrainConfig};
use qlora_trainer::progress::{Event, Observer};
use qlora_trainer::{Interrupt, Outcome, store};

use crate::toy::{Fault, Toy, config, result, trainer};

const STEPS: u64 = 9;

fn with_store(output: &Path, store: &Path, resume: Resume) -> TrainConfig {
    let mut config = config(output);
    config.training.checkpoint_store = Some(format!("file://{}", store.display()));
    config.training.resume_from_checkpoint = resume;
    config
}

fn steps(folder: &Path) -> Vec<u64> {
    store::open(&format!("file://{}", folder.display())).unwrap().steps().unwrap()
}

#[test]
fn a_machine_that_has_nothing_goes_on_from_the_store() {
    let temporary = tempfile::tempdir().unwrap();
    let at = |name: &str| temporary.path().join(name);
    trainer(&config(&at("reference")), Toy::new(1)).run().unwrap();
    for call in [12, 20, 30] {
        let store = at(&format!("store-{call}"));
        let machine = |number: u32| at(&format!("machine-{call}-{number}"));
        let model = Toy { fault: Some((call, Fault::Killed)), ..Toy::new(1) };
        trainer(&with_store(&machine(1), &store, Resume::Latest), model).run().unwrap_err();
        assert!(!steps(&store).is_empty(), "killed at call {call}");
        fs::remove_dir_all(machine(1)).unwrap();
        let summary = trainer(&with_store(&machine(2), &store, Resume::Latest), Toy::new(1)).run().unwrap();
        assert_eq!((summary.outcome, summary.steps), (Outcome::Finished, STEPS));
        assert_eq!(result(&machine(2), STEPS), result(&at("reference"), STEPS), "killed at call {call}");
        assert_eq!(steps(&store)[0], STEPS);
        assert_eq!(steps(&store).len(), 2, "save_total_limit holds for the store");
    }
    // A new run does not begin over an earlier one's checkpoints, unless it may.
    let store = at("store-12");
    let error = trainer(&with_store(&at("new"), &store, Resume::No), Toy::new(1)).run().unwrap_err().to_string();
    assert!(error.contains("the store holds an earlier run"), "{error}");
    let mut over = with_store(&at("new"), &store, Resume::No);
    over.training.overwrite_output_dir = true;
    trainer(&over, Toy::new(1)).run().unwrap();
    assert_eq!(steps(&store)[0], STEPS);
    let from = with_store(&at("other"), &store, Resume::From("s3://bucket/checkpoint-3".into()));
    let error = trainer(&from, Toy::new(1)).run().unwrap_err().to_string();
    assert!(error.contains("resume_from_checkpoint = true"), "{error}");
}

#[test]
fn a_checkpoint_that_was_not_sent_is_sent_by_the_resumed_run() {
    let temporary = tempfile::tempdir().unwrap();
    let (output, store) = (temporary.path().join("output"), temporary.path().join("store"));
    let model = Toy { fault: Some((30, Fault::Killed)), ..Toy::new(1) };
    trainer(&with_store(&output, &store, Resume::Latest), model).run().unwrap_err();
    let sent = steps(&store);
    fs::remove_file(store.join(format!("checkpoint-{}.json", sent[0]))).unwrap();
    // It is killed again before its next checkpoint.
    let model = Toy { fault: Some((1, Fault::Killed)), ..Toy::new(1) };
    trainer(&with_store(&output, &store, Resume::Latest), model).run().unwrap_err();
    assert_eq!(steps(&store), sent);
}

#[test]
fn a_store_that_fails_ends_no_run_before_its_end() {
    let temporary = tempfile::tempdir().unwrap();
    let (output, store) = (temporary.path().join("output"), temporary.path().join("store"));
    // Where the store's folder should be is a file.
    fs::write(&store, "no folder").unwrap();
    let error = trainer(&with_store(&output, &store, Resume::No), Toy::new(1)).run().unwrap_err().to_string();
    assert!(error.contains("store"), "{error}");
    // The store goes away while the run goes on.
    fs::remove_file(&store).unwrap();
    let mut run = trainer(&with_store(&output, &store, Resume::No), Toy::new(1)).with_observer(Vanish(store.clone()));
    let error = run.run().unwrap_err().to_string();
    assert!(error.contains("of step 9, is on this machine only"), "{error}");
    drop(run);
    trainer(&config(&temporary.path().join("reference")), Toy::new(1)).run().unwrap();
    assert_eq!(result(&output, STEPS), result(&temporary.path().join("reference"), STEPS));
}

/// Puts a file where the store's folder was, as soon as there is a checkpoint.
struct Vanish(PathBuf);

impl Observer for Vanish {
    fn observe(&mut self, event: &Event<'_>) {
        if matches!(event, Event::Step(info) if info.step == 8) {
            // The uploader may be writing there.
            while fs::write(&self.0, "gone").is_err() {
                let _ = fs::remove_dir_all(&self.0);
            }
        }
    }
}

#[test]
fn a_notice_of_preemption_saves_and_ends_the_run() {
    struct Notice(PathBuf);
    impl Observer for Notice {
        fn observe(&mut self, event: &Event<'_>) {
            if matches!(event, Event::Step(info) if info.step == 4) {
                fs::write(&self.0, "").unwrap();
            }
        }
    }
    let temporary = tempfile::tempdir().unwrap();
    let at = |name: &str| temporary.path().join(name);
    let mut watched = config(&at("output"));
    watched.training.preemption_file = Some(at("notice"));
    let summary = trainer(&watched, Toy::new(1)).with_observer(Notice(at("notice"))).run().unwrap();
    assert_eq!((summary.outcome, summary.steps), (Outcome::Interrupted, 5));
    // The file is still there when the next run begins, and means nothing to it.
    watched.training.resume_from_checkpoint = Resume::Latest;
    let summary = trainer(&watched, Toy::new(1)).run().unwrap();
    assert_eq!((summary.outcome, summary.steps), (Outcome::Finished, STEPS));
    trainer(&config(&at("reference")), Toy::new(1)).run().unwrap();
    assert_eq!(result(&at("output"), STEPS), result(&at("reference"), STEPS));
}

#[test]
fn a_run_that_was_stopped_goes_on_sending_and_another_one_does_not_mix_with_it() {
    struct Stop(Interrupt);
    impl Observer for Stop {
        fn observe(&mut self, event: &Event<'_>) {
            if matches!(event, Event::Step(info) if info.step == 4) {
                self.0.request();
            }
        }
    }
    let temporary = tempfile::tempdir().unwrap();
    let at = |name: &str| temporary.path().join(name);
    let (interrupt, store) = (Interrupt::new(), at("store"));
    let config = with_store(&at("output"), &store, Resume::No);
    let mut run =
        trainer(&config, Toy::new(1)).with_interrupt(interrupt.clone()).with_observer(Stop(interrupt.clone()));
    assert_eq!(run.run().unwrap().outcome, Outcome::Interrupted);
    assert_eq!(steps(&store)[0], 4);
    interrupt.clear();
    assert_eq!(run.run().unwrap().outcome, Outcome::Finished);
    assert_eq!(steps(&store)[0], STEPS);
    // Another run begins at a checkpoint of this one's folder; the store holds a step that it will not reach.
    fs::copy(store.join(format!("checkpoint-{STEPS}.json")), store.join("checkpoint-99.json")).unwrap();
    let from = at("output").join(format!("checkpoint-{}", steps(&store)[2]));
    let mut other = with_store(&at("other"), &store, Resume::From(from));
    let error = trainer(&other, Toy::new(1)).run().unwrap_err().to_string();
    assert!(error.contains("the store holds an earlier run"), "{error}");
    assert_eq!(steps(&store)[0], 99);
    other.training.overwrite_output_dir = true;
    trainer(&other, Toy::new(1)).run().unwrap();
    assert_eq!(steps(&store)[0], STEPS);
}
