//! Gradients and whole runs do not depend on how a step is cut into micro-batches, nor on packing.

use qlora_trainer::data::{Loader, LoaderOptions};
use qlora_trainer::{TrainPass, TrainableModel};

use crate::toy::{Toy, config, dataset, trainer};

const DOCUMENTS: usize = 15;

fn model() -> Toy {
    Toy { dropout: false, ..Toy::warm(1) }
}

/// The gradient of every step of an epoch; `num_items` says what the loss of a micro-batch is divided by, given the
/// trained tokens of the step, those of the micro-batch and the number of micro-batches.
fn gradients(options: LoaderOptions, num_items: fn(usize, usize, usize) -> usize) -> Vec<Vec<f32>> {
    let mut loader = Loader::new(dataset(DOCUMENTS), options).unwrap();
    let mut toy = model();
    let mut of_step = |_| {
        let step = loader.next_step();
        let mut grad = vec![0.0; toy.masters().unwrap().len()];
        for batch in &step.micro_batches {
            let items = num_items(step.num_items, batch.trained_tokens(), step.micro_batches.len());
            toy.accumulate_gradients(batch, items, TrainPass::seeded(0), (&mut grad).into()).unwrap();
        }
        grad
    };
    (0..Loader::new(dataset(DOCUMENTS), options).unwrap().steps_per_epoch()).map(&mut of_step).collect()
}

/// The largest difference, relative to the largest gradient.
fn difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (a, b) = (a.concat(), b.concat());
    let largest = a.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let most = a.iter().zip(&b).fold(0.0, |most: f32, (x, y)| most.max((x - y).abs()));
    assert!(largest > 0.0);
    f64::from(most) / f64::from(largest)
}

const fn options(batch_size: usize, accumulation: usize, packing: Option<usize>) -> LoaderOptions {
    LoaderOptions { batch_size, accumulation, shuffle: Some(3), packing }
}

#[test]
fn gradients_do_not_depend_on_the_split() {
    let whole = |step, _, _| step;
    let reference = gradients(options(6, 1, None), whole);
    assert_eq!(reference.len(), 3);
    for (batch_size, accumulation) in [(3, 2), (2, 3), (1, 6)] {
        let found = difference(&reference, &gradients(options(batch_size, accumulation, None), whole));
        assert!(found < 1e-6, "{batch_size} x {accumulation}: {found}");
    }
    // A wrong reduction for comparison: the mean of the micro-batches' means.
    let naive = gradients(options(2, 3, None), |_, own, micro_batches| own * micro_batches);
    assert!(difference(&reference, &naive) > 1e-2);
}

#[test]
fn an_epochs_gradient_does_not_depend_on_packing() {
    let whole = |step, _, _| step;
    let reference = gradients(options(DOCUMENTS, 1, None), whole);
    for capacity in [9, 16, 40] {
        let found = difference(&reference, &gradients(options(1, DOCUMENTS, Some(capacity)), whole));
        assert!(found < 1e-6, "bins of {capacity}: {found}");
    }
}

#[test]
fn whole_runs_agree_across_splits() {
    let run = |batch_size, accumulation| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        config.training.per_device_train_batch_size = batch_size;
        config.training.gradient_accumulation_steps = accumulation;
        let mut trainer = trainer(&config, model());
        assert_eq!(trainer.run().unwrap().steps, 9);
        trainer.into_model().masters().unwrap()
    };
    let reference = run(6, 1);
    let moved = difference(std::slice::from_ref(&reference), &[model().masters().unwrap()]);
    assert!(moved > 0.05, "{moved}");
    for (batch_size, accumulation) in [(3, 2), (2, 3), (1, 6)] {
        let found = difference(std::slice::from_ref(&reference), &[run(batch_size, accumulation)]);
        assert!(found < 1e-5, "{batch_size} x {accumulation}: {found}");
    }
}

#[test]
fn the_run_itself_learns() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.training.num_train_epochs = 30.0;
    // The validation data are the first documents of the training data.
    let mut trainer = trainer(&config, Toy { dropout: false, ..Toy::new(1) });
    let summary = trainer.run().unwrap();
    let first = match &trainer.history()[0] {
        qlora_trainer::metrics::LogEntry::Eval(entry) => entry.eval_loss,
        other => panic!("{other:?}"),
    };
    let last = summary.eval_loss.unwrap();
    assert!(last < 0.75 * first, "{first} -> {last}");
}
