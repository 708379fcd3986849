//! SmolLM2-135M-Instruct, a real model, against transformers, PEFT and bitsandbytes.
//!
//! `scripts/demo-model.sh` fetches the file; the fixtures are made by `scripts/fixtures/smollm2_logits.py` and
//! `scripts/parity/loss_parity.py`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use qlora::batch::Batch;
use qlora::formats::Gguf;
use qlora::generate::generate;
use qlora::kernels::ops::adamw::{self, AdamW};
use qlora::kernels::ops::grad_norm;
use qlora::kernels::quant::QuantConfig;
use qlora::kernels::{Dtype, SequenceLayout, Workspace};
use qlora::lora::{LoraConfig, TargetModules, Which};
use qlora::model::{AdapterChoice, CausalLm, LoadOptions, Quantization, TrainPass};
use qlora::sampling::GenerationConfig;
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn load(quantization: Quantization) -> CausalLm {
    load_on(quantization, Workspace::cpu())
}

fn load_on(quantization: Quantization, workspace: Workspace) -> CausalLm {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cache = std::env::var_os("QLORA_CACHE").map_or(root.join(".cache"), PathBuf::from);
    let path = cache.join("models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run scripts/demo-model.sh first", path.display());
    let source = Gguf::open(path).unwrap();
    CausalLm::load_on(&source, LoadOptions { quantization, ..LoadOptions::default() }, workspace).unwrap()
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixtures().join(path)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn logits_equal_those_of_transformers() {
    let model = load(Quantization::None);
    let fixture = candle_core::safetensors::load(fixtures().join("smollm2/logits.safetensors"), &Device::Cpu).unwrap();
    let integers = |name: &str| -> Vec<i64> { fixture[name].to_dtype(DType::I64).unwrap().to_vec1().unwrap() };
    let columns = fixture["columns"].to_dtype(DType::U32).unwrap();
    for text in 0..3 {
        let tokens: Vec<u32> = integers(&format!("input_ids.{text}")).into_iter().map(|id| id as u32).collect();
        let logits =
            model.logits(&tokens, &SequenceLayout::from_lengths(&[tokens.len()]), AdapterChoice::Active).unwrap();
        let largest = |tensor: Tensor| -> f32 {
            tensor.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
        };
        let positions = fixture[&format!("positions.{text}")].to_dtype(DType::U32).unwrap();
        let got = logits.index_select(&positions, 0).unwrap().index_select(&columns, 1).unwrap();
        let difference = largest((got - &fixture[&format!("logits.{text}")]).unwrap());
        assert!(difference < 1e-3, "text {text}: {difference}");
        let difference = largest((logits.log_sum_exp(1).unwrap() - &fixture[&format!("logsumexp.{text}")]).unwrap());
        assert!(difference < 1e-3, "text {text}: log-sum-exp {difference}");
        let best: Vec<u32> = logits.argmax(1).unwrap().to_vec1().unwrap();
        let best: Vec<i64> = best.into_iter().map(i64::from).collect();
        assert_eq!(best, integers(&format!("argmax.{text}")), "text {text}");
    }
}

#[test]
fn greedy_generation_gives_the_tokens_of_transformers() {
    let model = load(Quantization::None);
    let cases = json("smollm2/greedy.json");
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 10);
    for case in cases {
        let expected = ids(&case["new_ids"]);
        let config = GenerationConfig { max_new_tokens: 32, temperature: None, ..GenerationConfig::default() };
        let answer = generate(&model, &ids(&case["input_ids"]), &config, |_| ControlFlow::Continue(())).unwrap();
        // transformers keeps the end token.
        let end = expected.iter().position(|id| model.config().eos_token_ids.contains(id)).unwrap_or(expected.len());
        assert_eq!(answer.tokens, expected[..end], "{}", case["prompt"]);
    }
}

/// The initial A of `scripts/parity/loss_parity.py`.
fn initial_a(name: &str, len: usize, width: usize) -> impl Iterator<Item = f32> + use<> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let bound = (1.0 / (width as f64).sqrt()) as f32;
    (1..=len as u64).map(move |i| {
        let mut z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((z >> 40) as f32 * 2f32.powi(-23) - 1.0) * bound
    })
}

/// A micro-batch of the parity run.
fn batch(micro_batch: &Value) -> Batch {
    let documents: Vec<(Vec<u32>, Vec<i64>)> = micro_batch
        .as_array()
        .unwrap()
        .iter()
        .map(|document| {
            let (ids, prompt) = (ids(&document["ids"]), document["prompt"].as_u64().unwrap() as usize);
            let labels = ids.iter().enumerate().map(|(i, &id)| if i < prompt { -100 } else { i64::from(id) });
            (ids.clone(), labels.collect())
        })
        .collect();
    Batch::from_documents(documents.iter().map(|(ids, labels)| (ids.as_slice(), labels.as_slice())))
}

/// The largest relative difference of a step's loss, over 20 steps.
fn loss_parity(quantization: Quantization, column: &str) -> f64 {
    let fixture = json("parity/smollm2_20_steps.json");
    let mut model = load(quantization);
    let target_modules = TargetModules::AllLinear;
    model.add_adapter(LoraConfig { r: 8, lora_alpha: 16.0, target_modules, ..LoraConfig::default() }, 0).unwrap();
    let adapter = model.adapter().unwrap();
    let mut values = vec![0.0; adapter.layout().len()];
    for entry in adapter.layout().entries().iter().filter(|entry| entry.which == Which::A) {
        let start = initial_a(&entry.tensor_name(), entry.numel(), entry.cols);
        values[entry.range()].iter_mut().zip(start).for_each(|(value, a)| *value = a);
        if let Some(check) = fixture["initial_a_check"].get(entry.tensor_name()) {
            let check: Vec<f32> = check.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
            assert_eq!(values[entry.range()][..4], check);
        }
    }
    adapter.set_values(&values).unwrap();

    let batches: Vec<Batch> = fixture["micro_batches"].as_array().unwrap().iter().map(batch).collect();

    let (mut m, mut v) = (vec![0.0; values.len()], vec![0.0; values.len()]);
    let mut worst = 0f64;
    for (step, expected) in fixture["steps"][column].as_array().unwrap().iter().enumerate() {
        let micro_batches = &batches[2 * step..2 * step + 2];
        let items: usize = micro_batches.iter().map(Batch::trained_tokens).sum();
        assert_eq!(items as u64, expected["trained_tokens"].as_u64().unwrap());
        let mut gradient = vec![0.0; values.len()];
        let sums = micro_batches.iter().map(|batch| {
            model.accumulate_gradients(batch, items, TrainPass::default(), (&mut gradient).into()).unwrap().sum
        });
        let loss = sums.sum::<f64>() / items as f64;
        let (want, norm) = (expected["loss"].as_f64().unwrap(), grad_norm::global_norm(&gradient).unwrap());
        println!("{column} step {step}: loss {loss:.6} expected {want:.6}, norm {norm:.5} {}", expected["grad_norm"]);
        worst = worst.max((loss - want).abs() / want);
        let lr = expected["lr"].as_f64().unwrap();
        let optimizer = AdamW { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        let clip = grad_norm::clip_coefficient(norm, 1.0);
        let adapter = model.adapter().unwrap();
        let number = step as u64 + 1;
        adapter.update(|values| adamw::step(&optimizer, number, clip, values, &gradient, &mut m, &mut v)).unwrap();
    }
    println!("{column}: largest relative difference of a loss {worst:.2e}");
    worst
}

#[test]
fn twenty_nf4_steps_have_the_losses_of_peft_and_bitsandbytes() {
    let quantization = Quantization::Bits4(QuantConfig::default());
    assert!(loss_parity(quantization, "nf4") < 1e-3);
    assert!(loss_parity(quantization, "nf4_nearest") < 1e-3);
}

#[test]
fn twenty_steps_over_the_plain_base_have_the_losses_of_peft() {
    assert!(loss_parity(Quantization::None, "f32") < 1e-4);
}

/// The norm of each tensor's gradient, the loss of a micro-batch divided as that of a step of `items` tokens.
fn gradient_norms(workspace: Workspace, items: usize, loss_scale: f32) -> Vec<(String, f64)> {
    let mut model = load_on(Quantization::Bits4(QuantConfig::default()), workspace);
    let target_modules = TargetModules::AllLinear;
    model.add_adapter(LoraConfig { r: 8, lora_alpha: 16.0, target_modules, ..LoraConfig::default() }, 0).unwrap();
    let adapter = model.adapter().unwrap();
    let mut values = vec![0.0; adapter.layout().len()];
    for entry in adapter.layout().entries() {
        // B as small as after some steps; with B at zero A would have no gradient.
        let size = if entry.which == Which::A { 1.0 } else { 0.01 };
        let start = initial_a(&entry.tensor_name(), entry.numel(), entry.cols);
        values[entry.range()].iter_mut().zip(start).for_each(|(value, a)| *value = size * a);
    }
    adapter.set_values(&values).unwrap();
    let batch = batch(&json("parity/smollm2_20_steps.json")["micro_batches"][0]);
    let mut gradient = vec![0.0; values.len()];
    let pass = TrainPass::default().with_loss_scale(loss_scale);
    model.accumulate_gradients(&batch, items, pass, (&mut gradient).into()).unwrap();
    let norm = |values: &[f32]| values.iter().map(|&x| f64::from(x / loss_scale).powi(2)).sum::<f64>().sqrt();
    let entries = model.adapter().unwrap().layout().entries();
    entries.iter().map(|entry| (entry.tensor_name(), norm(&gradient[entry.range()]))).collect()
}

/// With gradients rounded to float16 as a GPU stores them, at the size that a step of 16,384 trained tokens has and at a
/// hundredth of it.
#[test]
fn scaled_float16_gradients_have_the_norms_of_float32() {
    let exact = gradient_norms(Workspace::cpu(), 16_384, 1.0);
    assert!(exact.iter().all(|(_, norm)| *norm > 0.0));
    let worst = |items: usize, loss_scale: f32| {
        let float16 = gradient_norms(Workspace::cpu_rounding_gradients(Dtype::F16), items, loss_scale);
        let size = items as f64 / 16_384.0;
        let differences = exact.iter().zip(&float16).map(|((_, exact), (_, norm))| (size * norm / exact - 1.0).abs());
        let worst = differences.fold(0.0, f64::max);
        println!("{items} tokens, loss scale {loss_scale}: largest difference of a norm {:.3} %", 100.0 * worst);
        worst
    };
    for items in [16_384, 1_638_400] {
        assert!(worst(items, 65_536.0) < 0.02);
    }
    assert!(worst(1_638_400, 1.0) > 0.02, "the test would pass without scaling");
}
