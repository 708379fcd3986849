//! Training with DoRA against PEFT: start, gradients, 20 steps; then saved, read, gone on with, merged.
//!
//! Fixtures: `tests/fixtures/dora_step`, made by `scripts/fixtures/dora_step.py` with PEFT 0.21.2.

use candle_core::{Device, Tensor, Var};
use qlora::adapter::{self, SaveOptions, SavedAdapter};
use qlora::autograd;
use qlora::formats::HfDirectory;
use qlora::kernels::ops::adamw::{self, AdamW};
use qlora::kernels::ops::grad_norm;
use qlora::kernels::quant::QuantConfig;
use qlora::kernels::{SequenceLayout, Workspace};
use qlora::lora::Which;
use qlora::merge::{LoraUpdate, MergeInto, MergedSource, PeftUpdate, Rounding, WeightUpdate};
use qlora::model::{AdapterChoice, CausalLm, LoadOptions, Quantization, TrainPass};

use crate::common::relative_error;
use crate::step::{Case, fixture, floats};

/// Cases and their bases.
const CASES: [(&str, &str, bool); 3] =
    [("llama", "llama", false), ("qwen2", "qwen2", false), ("llama_nf4", "llama_wide", true)];

fn load((name, base, bits4): (&str, &str, bool)) -> Case {
    let quantization = if bits4 { Quantization::Bits4(QuantConfig::default()) } else { Quantization::None };
    Case::load("dora_step", name, base, quantization)
}

#[test]
fn a_fresh_adapter_starts_with_the_magnitudes_of_peft_and_changes_nothing() {
    for case in CASES {
        let Case { mut model, adapter, expected, batches, .. } = load(case);
        model.remove_adapter().unwrap();
        let batch = &batches[0];
        let base = floats(&model.logits(&batch.tokens, &batch.layout, AdapterChoice::Active).unwrap());
        model.add_adapter(adapter.config.lora, 5).unwrap();
        let trained = model.adapter().unwrap();
        assert_eq!(trained.layout(), &adapter.layout);
        let (values, mut magnitudes) = (trained.values().unwrap(), 0);
        for entry in trained.layout().entries().iter().filter(|entry| entry.which == Which::Magnitude) {
            let start = floats(&expected[&format!("start.{}", entry.tensor_name())]);
            assert!(relative_error(&values[entry.range()], &start) < 1e-6, "{case:?} {}", entry.tensor_name());
            magnitudes += 1;
        }
        assert_eq!(magnitudes, trained.layout().modules().count());
        let error =
            relative_error(&floats(&model.logits(&batch.tokens, &batch.layout, AdapterChoice::Active).unwrap()), &base);
        assert!(error < 1e-5, "{case:?}: {error}");
    }
}

#[test]
fn loss_and_gradients_are_those_of_peft() {
    for name in CASES {
        let case = load(name);
        case.check_logits(&case.model);
        let (loss, gradient) = case.gradient();
        let expected = f64::from(case.expected["loss"].to_scalar::<f32>().unwrap());
        assert!((loss - expected).abs() < 1e-5 * expected, "{name:?}: {loss} {expected}");
        case.check("grad", &gradient, 1e-4);
    }
}

#[test]
fn recomputed_blocks_give_the_same_bits() {
    let mut case = load(CASES[1]);
    for lora_dropout in [0.0, 0.3] {
        let SavedAdapter { mut config, layout, weights } = case.adapter.clone();
        config.lora.lora_dropout = lora_dropout;
        case.model.set_adapter(config.lora, layout, weights).unwrap();
        case.model.set_gradient_checkpointing(false).unwrap();
        let (loss, gradient) = case.gradient();
        case.model.set_gradient_checkpointing(true).unwrap();
        assert_eq!(case.gradient(), (loss, gradient), "dropout {lora_dropout}");
    }
}

#[test]
fn the_gradient_of_the_input_is_that_of_peft_through_candles_graph() {
    for name in CASES {
        let Case { model, adapter, expected, batches, items } = load(name);
        let mut sum = vec![0.0; adapter.layout.len()];
        for (i, batch) in batches.iter().enumerate() {
            let workspace = Workspace::poisoned();
            let x = autograd::ops::embedding(&batch.tokens, &**model.embedding(), &workspace).unwrap();
            let x = Var::from_tensor(&x).unwrap();
            let flat = model.adapter().unwrap().variable();
            let hidden = model.hidden_states(x.as_tensor(), &batch.layout, TrainPass::default()).unwrap();
            let head = &**model.head();
            let loss = autograd::ops::linear_cross_entropy(&hidden, head, &batch.targets, items, &workspace).unwrap();
            let gradients = loss.backward().unwrap();
            let error =
                relative_error(&floats(gradients.get(&x).unwrap()), &floats(&expected[&format!("grad_embedding.{i}")]));
            assert!(error < 1e-4, "{name:?}: dx of document {i}: {error}");
            sum.iter_mut().zip(floats(gradients.get(flat).unwrap())).for_each(|(sum, g)| *sum += g);
        }
        for entry in adapter.layout.entries() {
            let error =
                relative_error(&sum[entry.range()], &floats(&expected[&format!("grad.{}", entry.tensor_name())]));
            assert!(error < 1e-4, "{name:?}: {}: {error}", entry.tensor_name());
        }
    }
}

#[test]
fn twenty_steps_give_the_losses_of_peft() {
    let case = load(CASES[0]);
    let trained = case.model.adapter().unwrap();
    let options = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    let len = trained.layout().len();
    let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
    for (step, expected) in floats(&case.expected["losses"]).into_iter().enumerate() {
        let (loss, gradient) = case.gradient();
        assert!((loss - f64::from(expected)).abs() < 1e-4 * f64::from(expected), "step {step}: {loss} {expected}");
        let clip = grad_norm::clip_coefficient(grad_norm::global_norm(&gradient).unwrap(), 0.5);
        let number = step as u64 + 1;
        trained.update(|values| adamw::step(&options, number, clip, values, &gradient, &mut m, &mut v)).unwrap();
    }
    // The tolerance covers 20 steps of Adam on small gradients with rounding errors, which it divides by themselves.
    case.check("after", &trained.values().unwrap(), 1e-2);
}

#[test]
fn what_is_saved_is_read_trained_on_and_merged() {
    for name in CASES {
        let mut case = load(name);
        let folder = tempfile::tempdir().unwrap();
        let values = case.model.adapter().unwrap().values().unwrap();
        let lora = &case.adapter.config.lora;
        adapter::save(folder.path(), lora, &case.adapter.layout, &values, &SaveOptions::default()).unwrap();
        let again = adapter::load(folder.path(), case.model.config()).unwrap();
        assert_eq!((&again.config.lora, &again.layout, &again.weights), (lora, &case.adapter.layout, &values));
        let text = std::fs::read_to_string(folder.path().join("adapter_config.json")).unwrap();
        assert!(text.contains("\"use_dora\": true"), "{text}");

        // Loaded for inference, it computes what the trained one does.
        case.check_logits(&case.model);
        let loaded = adapter::open_folder(folder.path(), case.model.config()).unwrap();
        case.model.remove_adapter().unwrap();
        case.model.load_adapter("saved", &loaded).unwrap();
        case.model.activate_adapter("saved").unwrap();
        case.check_logits(&case.model);

        let source = HfDirectory::open(fixture("models", name.1)).unwrap();
        let into = if name.2 { MergeInto::Dequantized(QuantConfig::default()) } else { MergeInto::Original };
        let updates: [Box<dyn WeightUpdate + '_>; 2] =
            [Box::new(LoraUpdate::new(&again).unwrap()), Box::new(PeftUpdate::new(&loaded, &source).unwrap())];
        for update in &updates {
            let merged = MergedSource::new(&source, &**update, into, Rounding::None).unwrap();
            case.check_logits(&CausalLm::load(&merged, LoadOptions::default()).unwrap());
        }
    }
}

#[test]
fn changed_values_change_what_is_remembered_of_them() {
    let case = load(CASES[0]);
    let (trained, tokens) = (case.model.adapter().unwrap(), &case.batches[0].tokens);
    let layout = SequenceLayout::from_lengths(&[tokens.len()]);
    let logits = || floats(&case.model.logits(tokens, &layout, AdapterChoice::Active).unwrap());
    let (before, values) = (logits(), trained.values().unwrap());
    assert_eq!(logits(), before);
    let half: Vec<f32> = values.iter().map(|value| value * 0.5).collect();
    trained.set_values(&half).unwrap();
    assert!(relative_error(&logits(), &before) > 1e-3);
    trained.set_values(&values).unwrap();
    assert_eq!(logits(), before);
    // A program of the user's own writes to the variable without saying so.
    let variable = trained.variable();
    variable.set(&Tensor::from_vec(half, values.len(), &Device::Cpu).unwrap()).unwrap();
    assert!(relative_error(&logits(), &before) > 1e-3);
}
