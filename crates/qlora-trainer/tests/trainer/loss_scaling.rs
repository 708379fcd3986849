//! Runs whose gradients are float16: the loss is scaled, and steps that overflow are skipped.

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::rc::Rc;

use qlora_kernels::{Dtype, Workspace};
use qlora_trainer::checkpoint::folder;
use qlora_trainer::config::Resume;
use qlora_trainer::metrics::{LogEntry, TrainLog};
use qlora_trainer::progress::{Event, Observer};
use qlora_trainer::{Outcome, TrainConfig};

use crate::toy::{Fault, Toy, config, dataset, result, trainer};

const STEPS: u64 = 9;

fn float16(toy: Toy) -> Toy {
    Toy { workspace: Workspace::cpu_rounding_gradients(Dtype::F16), ..toy }
}

/// A line a step.
fn every_step(output: &Path) -> TrainConfig {
    let mut config = config(output);
    config.training.logging_steps = 1;
    config
}

fn train_lines(history: &[LogEntry]) -> Vec<TrainLog> {
    let train = |entry: &LogEntry| match entry {
        LogEntry::Train(entry) => Some(entry.clone()),
        _ => None,
    };
    history.iter().filter_map(train).collect()
}

struct Messages(Rc<RefCell<Vec<String>>>);

impl Observer for Messages {
    fn observe(&mut self, event: &Event<'_>) {
        if let Event::Message(text) = event {
            self.0.borrow_mut().push((*text).to_owned());
        }
    }
}

#[test]
fn a_step_that_overflows_is_skipped_and_the_scale_halved() {
    let folder = tempfile::tempdir().unwrap();
    // Calls: 3 of the evaluation before the first step, then 3, 3 and 2 of an epoch's steps; the overflow is in the third step.
    let model = float16(Toy { fault: Some((3 + 2 * 3 + 1, Fault::Gradient(7))), ..Toy::new(1) });
    let (scales, messages) = (Rc::clone(&model.scales), Rc::default());
    let mut run = trainer(&every_step(folder.path()), model).with_observer(Messages(Rc::clone(&messages)));
    let summary = run.run().unwrap();
    assert_eq!((summary.outcome, summary.steps), (Outcome::Finished, STEPS));
    let scales = scales.borrow();
    assert!(scales[..8].iter().all(|&scale| scale == 65_536.0) && scales[8..].iter().all(|&scale| scale == 32_768.0));
    let lines = train_lines(run.history());
    let skipped: Vec<_> = lines.iter().map(|line| line.skipped_steps.unwrap()).collect();
    assert_eq!(skipped, [0, 0, 1, 1, 1, 1, 1, 1, 1]);
    assert_eq!(
        lines.iter().map(|line| line.loss_scale.unwrap()).collect::<Vec<_>>()[1..4],
        [65_536.0, 32_768.0, 32_768.0]
    );
    // The schedule stands still: the step after has the skipped one's learning rate.
    assert!(lines[2].grad_norm.is_infinite() && lines[2].loss.is_finite());
    assert_eq!(lines[2].learning_rate, lines[3].learning_rate);
    assert!(lines[3].learning_rate > lines[4].learning_rate);
    let text = "step 3 is skipped: a gradient overflowed float16; the loss scale is now 32768";
    assert!(messages.borrow().iter().any(|message| message == text), "{:?}", messages.borrow());
}

#[test]
fn a_skipped_step_changes_no_parameter_and_no_moment() {
    let folder = tempfile::tempdir().unwrap();
    let optimizer = |fault| {
        let mut config = every_step(folder.path());
        (config.training.overwrite_output_dir, config.training.max_steps) = (true, 3);
        config.training.save_steps = 1;
        config.training.save_total_limit = 0;
        trainer(&config, float16(Toy { fault, ..Toy::new(1) })).run().unwrap();
        [2, 3].map(|step| fs::read(folder.path().join(format!("checkpoint-{step}/optimizer.safetensors"))).unwrap())
    };
    let [before, after] = optimizer(Some((3 + 2 * 3, Fault::Gradient(0))));
    assert_eq!(before, after);
    let [before, after] = optimizer(None);
    assert_ne!(before, after);
}

#[test]
fn killed_and_resumed_with_skipped_steps() {
    // Every step with a batch that begins with this token overflows, so that a resumed run meets the same.
    let first: Vec<u32> = (0..15).map(|i| dataset(15).document(i).ids[0]).collect();
    let often = *first.iter().max_by_key(|token| first.iter().filter(|other| other == token).count()).unwrap();
    let run = |output: &Path, killed: Option<usize>| {
        let mut config = config(output);
        if folder::latest(output).unwrap().is_some() {
            config.training.resume_from_checkpoint = Resume::Latest;
        }
        let toy = Toy { poisoned_token: Some((often, Fault::Gradient(2))), ..Toy::new(1) };
        let model = float16(Toy { fault: killed.map(|call| (call, Fault::Killed)), ..toy });
        let calls = Rc::clone(&model.calls);
        let outcome = trainer(&config, model).run().map(|_| ());
        (outcome, calls.get())
    };
    let reference = tempfile::tempdir().unwrap();
    let (outcome, calls) = run(reference.path(), None);
    outcome.unwrap();
    let expected = result(reference.path(), STEPS);
    let log = String::from_utf8(expected["metrics.jsonl"].clone()).unwrap();
    let skipped = (1..STEPS).filter(|count| log.contains(&format!("\"skipped_steps\":{count}}}"))).max();
    assert!(skipped.is_some() && !log.contains(&format!("\"skipped_steps\":{STEPS}")), "{log}");
    for call in (0..calls).step_by(2) {
        let folder = tempfile::tempdir().unwrap();
        assert!(run(folder.path(), Some(call)).0.is_err());
        run(folder.path(), None).0.unwrap();
        assert_eq!(result(folder.path(), STEPS), expected, "killed at call {call}");
    }
}

#[test]
fn gradients_below_the_range_of_float16_train_as_in_float32() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, model: Toy| {
        let mut trainer = trainer(&every_step(&folder.path().join(name)), model);
        trainer.run().map(|_| trainer.history().to_vec())
    };
    // As a mean over millions of tokens has them.
    let small = Toy { factor: 2f64.powi(-22), dropout: false, ..Toy::new(1) };
    let exact = train_lines(&run("exact", small.clone()).unwrap());
    let scaled = train_lines(&run("scaled", float16(small.clone())).unwrap());
    for (exact, scaled) in exact.iter().zip(&scaled) {
        let difference = (exact.grad_norm - scaled.grad_norm).abs() / exact.grad_norm;
        assert!(difference < 0.02, "step {}: norms {} {}", exact.step, exact.grad_norm, scaled.grad_norm);
    }
    // Without scaling nothing is left of them.
    let unscaled = Toy { ignores_scale: true, ..float16(small) };
    let error = run("unscaled", unscaled).unwrap_err().to_string();
    assert!(error.starts_with("step 1: no gradient reaches 2 of 4 trainable tensors"), "{error}");
}

#[test]
fn at_scale_one_a_gradient_that_is_not_finite_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = every_step(folder.path());
    config.training.max_steps = 30;
    let model = float16(Toy { poisoned_gradient: Some(5), ..Toy::new(1) });
    let mut run = trainer(&config, model);
    let error = run.run().unwrap_err().to_string();
    assert!(error.starts_with("step 17, micro-batch 1: the gradient of one.lora_A is inf"), "{error}");
    assert_eq!(train_lines(run.history()).last().unwrap().loss_scale, Some(1.0));
}
