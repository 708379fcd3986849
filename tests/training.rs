//! The training loop over the real decoder: splits of a step, resuming, float16, and preferences.

mod common;
#[path = "objectives/dpo.rs"]
mod dpo;
#[path = "common/tiny_folder.rs"]
mod tiny_folder;

use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{add_random_adapter, relative_error, tiny_config, tiny_model};
use qlora::adapter::SaveOptions;
use qlora::formats::HfDirectory;
use qlora::kernels::quant::QuantConfig;
use qlora::kernels::{Dtype, Workspace};
use qlora::lora::{LoraConfig, TargetModules};
use qlora::model::{CausalLm, LoadOptions, Quantization};
use qlora::trainer::data::{Dataset, Encoded};
use qlora::trainer::progress::{Event, Observer};
use qlora::trainer::qlora_model::QLoraModel;
use qlora::trainer::{Interrupt, Outcome, TrainConfig, TrainPass, Trainer};

/// Documents of different lengths, the first tokens of each not trained.
fn dataset(documents: usize) -> Dataset {
    Dataset::from_encoded((0..documents as u32).map(|d| {
        let ids: Vec<u32> = (0..6 + d * 5 % 17).map(|i| (i * 7 + d * 13 + i * i) % 61).collect();
        let trained = (0..ids.len()).map(|i| i >= 3).collect();
        Encoded { ids, trained }
    }))
    .unwrap()
}

fn model(lora_dropout: f64, checkpointing: bool) -> QLoraModel {
    let mut model = tiny_model(&tiny_config(), true, 7, Workspace::poisoned());
    let target_modules = TargetModules::AllLinear;
    model.add_adapter(LoraConfig { r: 3, lora_dropout, target_modules, ..LoraConfig::default() }, 1).unwrap();
    model.set_gradient_checkpointing(checkpointing).unwrap();
    QLoraModel::new(model, SaveOptions::default(), vec![("model".into(), "tiny".into())]).unwrap()
}

fn config(folder: &Path, change: impl Fn(&mut TrainConfig)) -> TrainConfig {
    let mut config = TrainConfig::default();
    config.model.model_name_or_path = "tiny".into();
    config.data.train_file = Path::new("memory").into();
    config.training.output_dir = folder.to_owned();
    config.training.learning_rate = 1e-2;
    config.training.max_steps = 7;
    config.training.per_device_train_batch_size = 2;
    config.training.gradient_accumulation_steps = 2;
    config.training.save_steps = 2;
    change(&mut config);
    config
}

fn adapter(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("adapter_model.safetensors")).unwrap()
}

/// Asks the run to stop after a step, as Ctrl-C does.
struct StopAfter(u64, Interrupt);

impl Observer for StopAfter {
    fn observe(&mut self, event: &Event<'_>) {
        if matches!(event, Event::Step(info) if info.step == self.0) {
            self.1.request();
        }
    }
}

#[test]
fn a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    // 10 documents, 4 a step: an epoch ends with a partial step.
    let summary = Trainer::new(config(&whole, |_| ()), model(0.2, false), dataset(10), None).unwrap().run().unwrap();
    assert_eq!((summary.outcome, summary.steps), (Outcome::Finished, 7));

    let parts = folder.path().join("parts");
    for stop in [1, 4, 5] {
        let interrupt = Interrupt::new();
        let config = config(&parts, |config| {
            if stop > 1 {
                config.set("training.resume_from_checkpoint", "true").unwrap();
            }
        });
        // Recomputing the blocks changes no bit either.
        let mut trainer = Trainer::new(config, model(0.2, stop == 4), dataset(10), None)
            .unwrap()
            .with_interrupt(interrupt.clone())
            .with_observer(StopAfter(stop, interrupt));
        assert_eq!(trainer.run().unwrap().outcome, Outcome::Interrupted);
    }
    let resume = config(&parts, |config| config.set("training.resume_from_checkpoint", "true").unwrap());
    let summary = Trainer::new(resume, model(0.2, false), dataset(10), None).unwrap().run().unwrap();
    assert_eq!((summary.outcome, summary.steps), (Outcome::Finished, 7));
    assert_eq!(adapter(&whole), adapter(&parts));
}

/// The losses of a run's steps.
#[derive(Default)]
struct Losses(Arc<Mutex<Vec<f64>>>);

impl Observer for Losses {
    fn observe(&mut self, event: &Event<'_>) {
        if let Event::Step(info) = event {
            self.0.lock().unwrap().push(info.loss);
        }
    }
}

#[test]
fn factors_and_blocks_without_rotation_learn_over_an_nf4_base() {
    for name in ["granite", "granite_untied", "smollm3", "smollm3_window"] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name);
        let quantization = Quantization::Bits4(QuantConfig::default());
        let options = LoadOptions { quantization, ..LoadOptions::default() };
        let mut model = CausalLm::load(&HfDirectory::open(source).unwrap(), options).unwrap();
        let target_modules = TargetModules::AllLinear;
        model.add_adapter(LoraConfig { r: 4, target_modules, ..LoraConfig::default() }, 1).unwrap();
        let model = QLoraModel::new(model, SaveOptions::default(), vec![("model".into(), name.into())]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path(), |config| config.training.max_steps = 30);
        let losses = Losses::default();
        let seen = losses.0.clone();
        let mut trainer = Trainer::new(config, model, dataset(8), None).unwrap().with_observer(losses);
        assert_eq!(trainer.run().unwrap().steps, 30);
        let losses = seen.lock().unwrap().clone();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&losses[..4]), mean(&losses[26..]));
        println!("{name}: {first:.3} to {last:.3}");
        assert!(last < 0.8 * first, "{name}: {first} to {last}");
    }
}

#[test]
fn splitting_a_step_into_micro_batches_changes_only_rounding() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, batch: usize, accumulation: usize| {
        let folder = folder.path().join(name);
        let config = config(&folder, |config| {
            config.training.per_device_train_batch_size = batch;
            config.training.gradient_accumulation_steps = accumulation;
            config.training.max_steps = 3;
        });
        // 6 documents, 4 a step: the second step of an epoch has 2.
        let mut trainer = Trainer::new(config, model(0.0, false), dataset(6), None).unwrap();
        trainer.run().unwrap();
        let trained = trainer.into_model();
        trained.model().adapter().unwrap().values().unwrap()
    };
    let reference = run("4x1", 4, 1);
    for (name, batch, accumulation) in [("2x2", 2, 2), ("1x4", 1, 4)] {
        // AdamW's first steps turn rounding of tiny gradients into visible differences of single elements; on the whole
        // the adapters agree.
        let other = run(name, batch, accumulation);
        let error = relative_error(&other, &reference);
        assert!(error < 1e-2, "{name}: {error}");
        let mean =
            other.iter().zip(&reference).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>() / other.len() as f64;
        assert!(mean < 1e-5, "{name}: mean difference {mean}");
    }
}

/// The norm of each tensor's gradient, the loss of the six documents divided as that of a step of `items` tokens.
fn gradient_norms(workspace: Workspace, items: usize, loss_scale: f32) -> Vec<f64> {
    let mut model = tiny_model(&tiny_config(), true, 7, workspace);
    let target_modules = TargetModules::AllLinear;
    add_random_adapter(&mut model, LoraConfig { r: 3, target_modules, ..LoraConfig::default() }, 3);
    let layout = model.adapter().unwrap().layout();
    let mut gradient = vec![0f32; layout.len()];
    let batch = dataset(6).batch(&[0, 1, 2, 3, 4, 5]);
    let pass = TrainPass::seeded(0).with_loss_scale(loss_scale);
    model.accumulate_gradients(&batch, items, pass, (&mut gradient).into()).unwrap();
    let norm = |values: &[f32]| values.iter().map(|&x| f64::from(x / loss_scale).powi(2)).sum::<f64>().sqrt();
    layout.entries().iter().map(|entry| norm(&gradient[entry.range()])).collect()
}

#[test]
fn scaled_float16_gradients_have_the_norms_of_float32() {
    let worst = |items: usize, loss_scale: f32| {
        let exact = gradient_norms(Workspace::cpu(), items, 1.0);
        let float16 = gradient_norms(Workspace::cpu_rounding_gradients(Dtype::F16), items, loss_scale);
        assert!(exact.iter().all(|&norm| norm > 0.0));
        exact.iter().zip(&float16).map(|(exact, float16)| (float16 / exact - 1.0).abs()).fold(0.0, f64::max)
    };
    // At the size that a step of 16,384 tokens has, and at a hundredth of it.
    for items in [16_384, 1_638_400] {
        assert!(worst(items, 65_536.0) < 0.02, "{items}: {}", worst(items, 65_536.0));
    }
    // Without scaling they are lost: at a hundredth most of them.
    let unscaled = worst(1_638_400, 1.0);
    assert!(unscaled > 0.1, "{unscaled}");
}
