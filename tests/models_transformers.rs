//! Logits and gradients against transformers, PEFT and PyTorch, on tiny random models of every architecture.
//! The fixtures are made by `scripts/fixtures/tiny_models.py` and `scripts/fixtures/lora_step.py`,
//! that of preference training by `scripts/fixtures/dpo_step.py`.

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use common::relative_error;
use qlora::batch::Batch;
use qlora::formats::HfDirectory;
use qlora::kernels::SequenceLayout;
use qlora::kernels::ops::adamw::{self, AdamW};
use qlora::kernels::ops::grad_norm;
use qlora::kernels::quant::QuantConfig;
use qlora::model::{AdapterChoice, CausalLm, LoadOptions, Quantization, TrainPass};
use qlora::trainer::{TrainConfig, objective};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn load(name: &str, quantization: Quantization) -> CausalLm {
    let source = HfDirectory::open(fixtures().join("models").join(name)).unwrap();
    CausalLm::load(&source, LoadOptions { quantization, ..LoadOptions::default() }).unwrap()
}

fn tensors(path: PathBuf) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn ids(tensor: &Tensor) -> Vec<u32> {
    labels(tensor).into_iter().map(|id| id as u32).collect()
}

fn labels(tensor: &Tensor) -> Vec<i64> {
    tensor.to_dtype(DType::I64).unwrap().to_vec1().unwrap()
}

fn largest_difference(got: &Tensor, expected: &Tensor) -> f32 {
    let difference = (got - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    difference.to_scalar().unwrap()
}

#[test]
fn logits_of_every_architecture_equal_those_of_transformers() {
    let names = [
        "llama",
        "llama_wide",
        "llama_rope_linear",
        "llama_rope_llama3",
        "llama_rope_yarn",
        "mistral",
        "qwen2",
        "qwen2_window",
        "qwen3",
        "granite",
        "granite_untied",
        "smollm3",
        "smollm3_window",
        "ministral3",
    ];
    for name in names {
        let model = load(name, Quantization::None);
        let expected = tensors(fixtures().join("models").join(name).join("expected.safetensors"));
        let texts: Vec<Vec<u32>> = (0..2).map(|i| ids(&expected[&format!("input_ids.{i}")])).collect();
        let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
        // Both sequences in one packed batch; transformers ran each alone.
        let logits =
            model.logits(&texts.concat(), &SequenceLayout::from_lengths(&lengths), AdapterChoice::Active).unwrap();
        for (i, start) in [0, lengths[0]].into_iter().enumerate() {
            let got = logits.narrow(0, start, lengths[i]).unwrap();
            let difference = largest_difference(&got, &expected[&format!("logits.{i}")]);
            assert!(difference < 1e-4, "{name}, sequence {i}: {difference}");
        }
    }
}

#[test]
fn cached_logits_and_greedy_tokens_equal_those_of_transformers() {
    let mut generated = 0;
    for name in ["llama", "mistral", "qwen3", "granite", "granite_untied", "smollm3", "smollm3_window", "ministral3"] {
        let model = load(name, Quantization::None);
        let expected = tensors(fixtures().join("models").join(name).join("expected.safetensors"));
        let (tokens, rows) = (ids(&expected["input_ids.0"]), expected["logits.0"].to_vec2::<f32>().unwrap());
        let greedy = expected.get("greedy").map(ids).unwrap_or_default();
        let mut cache = model.new_cache(tokens.len() + greedy.len());
        // Five tokens at once, the others one at a time.
        let mut last = Vec::new();
        for end in 5..=tokens.len() {
            let start = if end == 5 { 0 } else { end - 1 };
            last = model
                .next_logits(&[&tokens[start..end]], &mut [&mut cache], AdapterChoice::Active)
                .unwrap()
                .to_vec()
                .unwrap();
            let difference = last.iter().zip(&rows[end - 1]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(difference < 1e-4, "{name}, token {end}: {difference}");
        }
        for (i, &token) in greedy.iter().enumerate() {
            let best = last.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
            assert_eq!(best, token, "{name}, generated token {i}");
            last = model.next_logits(&[&[token]], &mut [&mut cache], AdapterChoice::Active).unwrap().to_vec().unwrap();
            generated += 1;
        }
    }
    assert_eq!(generated, 5 * 24);
}

/// From position 128 on Ministral 3 scales its queries, which is not supported.
#[test]
fn ministral_3_takes_no_sequence_longer_than_its_original_length() {
    let model = load("ministral3", Quantization::None);
    let tokens: Vec<u32> = (0..129).map(|i| 3 + i % 70).collect();
    let logits =
        |length| model.logits(&tokens[..length], &SequenceLayout::from_lengths(&[length]), AdapterChoice::Active);
    assert_eq!(logits(128).unwrap().dims(), [128, 80]);
    let error = logits(129).unwrap_err().to_string();
    assert!(error.contains("129 tokens") && error.contains("(128)"), "{error}");
}

struct Step {
    model: CausalLm,
    expected: HashMap<String, Tensor>,
    batches: Vec<Batch>,
    items: usize,
}

impl Step {
    fn load(case: &str, base: &str, quantization: Quantization) -> Self {
        let folder = fixtures().join("lora_step").join(case);
        let mut model = load(base, quantization);
        let adapter = qlora::adapter::load(&folder, model.config()).unwrap();
        model.set_adapter(adapter.config.lora, adapter.layout, adapter.weights).unwrap();
        let expected = tensors(folder.join("step.safetensors"));
        let batches: Vec<Batch> = (0..2)
            .map(|i| {
                let (ids, labels) =
                    (ids(&expected[&format!("input_ids.{i}")]), labels(&expected[&format!("labels.{i}")]));
                Batch::from_documents([(ids.as_slice(), labels.as_slice())])
            })
            .collect();
        let items = batches.iter().map(Batch::trained_tokens).sum();
        Self { model, expected, batches, items }
    }

    fn run(&self) -> (f64, Vec<f32>) {
        let mut gradient = vec![0.0; self.model.adapter().unwrap().layout().len()];
        let sums = self.batches.iter().map(|batch| {
            self.model
                .accumulate_gradients(batch, self.items, TrainPass::default(), (&mut gradient).into())
                .unwrap()
                .sum
        });
        (sums.sum::<f64>() / self.items as f64, gradient)
    }

    /// The values under `prefix` in the adapter's order.
    fn flat(&self, prefix: &str) -> Vec<f32> {
        let layout = self.model.adapter().unwrap().layout();
        let mut flat = vec![0.0; layout.len()];
        for entry in layout.entries() {
            let tensor = &self.expected[&format!("{prefix}.{}", entry.tensor_name())];
            flat[entry.range()].copy_from_slice(&tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
        flat
    }

    fn check(&self, tolerance: f32) {
        for (i, batch) in self.batches.iter().enumerate() {
            let logits = self.model.logits(&batch.tokens, &batch.layout, AdapterChoice::Active).unwrap();
            let difference = largest_difference(&logits, &self.expected[&format!("logits.{i}")]);
            assert!(difference < 1e-3, "logits of document {i}: {difference}");
        }
        let (loss, gradient) = self.run();
        let expected_loss = f64::from(self.expected["loss"].to_scalar::<f32>().unwrap());
        assert!((loss - expected_loss).abs() < 1e-5 * expected_loss, "{loss} {expected_loss}");
        let expected = self.flat("grad");
        let layout = self.model.adapter().unwrap().layout();
        for entry in layout.entries() {
            let error = relative_error(&gradient[entry.range()], &expected[entry.range()]);
            assert!(error < tolerance, "{}: {error}", entry.tensor_name());
        }
        let norm = f64::from(self.expected["grad_norm"].to_scalar::<f32>().unwrap());
        assert!((grad_norm::global_norm(&gradient).unwrap() - norm).abs() < 1e-4 * norm);
    }
}

#[test]
fn one_step_over_a_plain_base_gives_the_gradients_of_pytorch() {
    Step::load("llama", "llama", Quantization::None).check(1e-4);
    Step::load("qwen3", "qwen3", Quantization::None).check(1e-4);
    Step::load("granite", "granite", Quantization::None).check(1e-4);
    Step::load("smollm3", "smollm3", Quantization::None).check(1e-4);
    Step::load("ministral3", "ministral3", Quantization::None).check(1e-4);
}

#[test]
fn one_step_over_an_nf4_base_gives_the_gradients_of_bitsandbytes() {
    let quantization = Quantization::Bits4(QuantConfig { double_quant: true, ..QuantConfig::default() });
    Step::load("llama_nf4", "llama_wide", quantization).check(1e-4);
}

#[test]
fn adapters_written_by_peft_give_its_logits() {
    let folder = fixtures().join("peft");
    let expected = tensors(folder.join("logits.safetensors"));
    let tokens = ids(&expected["input_ids"]);
    let layout = SequenceLayout::from_lengths(&[tokens.len()]);
    let source = HfDirectory::open(folder.join("base")).unwrap();
    let mut model = CausalLm::load(&source, LoadOptions::default()).unwrap();
    let mut seen = 0;
    for (name, expected) in expected.iter().filter(|(name, _)| *name != "input_ids") {
        if name != "base" {
            let adapter = qlora::adapter::load(folder.join(name), model.config()).unwrap();
            model.set_adapter(adapter.config.lora, adapter.layout, adapter.weights).unwrap();
        }
        model.enable_adapter(name != "base");
        let difference = largest_difference(&model.logits(&tokens, &layout, AdapterChoice::Active).unwrap(), expected);
        assert!(difference < 1e-3, "{name}: {difference}");
        seen += 1;
    }
    assert_eq!(seen, 5, "the base and four adapters");
}

#[test]
fn clipping_and_adamw_give_the_adapter_of_pytorch() {
    let step = Step::load("llama", "llama", Quantization::None);
    let (_, gradient) = step.run();
    let clip = grad_norm::clip_coefficient(grad_norm::global_norm(&gradient).unwrap(), 0.5);
    let optimizer = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    let (mut m, mut v) = (vec![0.0; gradient.len()], vec![0.0; gradient.len()]);
    let adapter = step.model.adapter().unwrap();
    adapter.update(|values| adamw::step(&optimizer, 1, clip, values, &gradient, &mut m, &mut v)).unwrap();
    // The first step moves an element by lr * g / (|g| + eps): a gradient near eps (1e-8) would turn the last bits of its
    // own rounding into a visible difference, so the few such elements are left out.
    let got = adapter.values().unwrap();
    let compared = got.iter().zip(step.flat("after")).zip(&gradient).filter(|(_, g)| (clip * **g).abs() > 1e-5);
    let differences: Vec<f32> = compared.map(|((got, expected), _)| (got - expected).abs()).collect();
    assert!(differences.len() * 100 > got.len() * 98, "{} of {}", differences.len(), got.len());
    let largest = differences.into_iter().fold(0f32, f32::max);
    assert!(largest < 2e-6, "{largest}");
}

/// One step of DPO on the pairs of the fixture: the loss, the metrics, and the gradient of every tensor are those of TRL.
#[test]
fn a_step_of_dpo_equals_that_of_trl() {
    let folder = fixtures().join("dpo_step");
    let pairs: Value = serde_json::from_slice(&std::fs::read(folder.join("pairs.json")).unwrap()).unwrap();
    let tokens = |ids: &Value| -> Vec<i64> { serde_json::from_value(ids.clone()).unwrap() };
    let mut documents = Vec::new();
    for pair in pairs.as_array().unwrap() {
        for side in ["chosen", "rejected"] {
            let (prompt, answer) = (tokens(&pair["prompt"]), tokens(&pair[side]));
            let labels = [vec![-100; prompt.len()], answer.clone()].concat();
            let ids: Vec<u32> = prompt.iter().chain(&answer).map(|&id| id as u32).collect();
            documents.push((ids, labels));
        }
    }
    assert_eq!(documents.len(), 4);
    let batch = Batch::from_documents(documents.iter().map(|(ids, labels)| (ids.as_slice(), labels.as_slice())));
    for loss_type in ["sigmoid", "ipo"] {
        let step = Step {
            expected: tensors(folder.join(format!("{loss_type}.safetensors"))),
            ..Step::load("llama", "llama", Quantization::None)
        };
        let mut config = TrainConfig::default();
        config.set("training.objective", "dpo").unwrap();
        config.set("objective.loss_type", loss_type).unwrap();
        let dpo = objective::of(&config).unwrap();
        let reference = step.model.log_probabilities(&batch, AdapterChoice::Base).unwrap();
        let mut judged = objective::Judged::default();
        let mut gradient = vec![0.0; step.model.adapter().unwrap().layout().len()];
        let mut weigh = |log_probs: &[f64]| {
            judged = dpo.judge(&objective::Scored::new(&batch, dpo.group_size(), log_probs, Some(&reference)));
            Ok(judged.weights.iter().map(|weight| weight / judged.groups as f32).collect())
        };
        let pass = TrainPass::default();
        step.model.accumulate_weighted_gradients(&batch, pass, &mut weigh, (&mut gradient).into()).unwrap();
        let number = |name: &str| f64::from(step.expected[name].to_scalar::<f32>().unwrap());
        let close = |name: &str, got: f64, want: f64| {
            assert!((got - want).abs() < 1e-4 * want.abs().max(1.0), "{loss_type}, {name}: {got} {want}");
        };
        assert_eq!(judged.groups, 2);
        close("loss", judged.loss / 2.0, number("loss"));
        assert_eq!(judged.metrics.len(), 6);
        for (name, sum) in &judged.metrics {
            close(name, sum / 2.0, number(&format!("metric.{name}")));
        }
        let expected = step.flat("grad");
        for entry in step.model.adapter().unwrap().layout().entries() {
            let error = relative_error(&gradient[entry.range()], &expected[entry.range()]);
            assert!(error < 1e-4, "{loss_type}, {}: {error}", entry.tensor_name());
        }
        // The log-probabilities with the adapter on are those that the training forward saw.
        let evaluated = step.model.log_probabilities(&batch, AdapterChoice::Active).unwrap();
        let evaluated = dpo.judge(&objective::Scored::new(&batch, 2, &evaluated, Some(&reference)));
        close("evaluated", evaluated.loss, judged.loss);
    }
}
