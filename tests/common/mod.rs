//! Helpers shared by several test files: tiny random models and comparisons.
#![allow(dead_code)]

pub(crate) mod bigram;
pub(crate) mod exchange;

use std::sync::Arc;

use qlora::config::{Architecture, ModelConfig};
use qlora::kernels::ops::rope::RopeConfig;
use qlora::kernels::quant::{QuantConfig, Quantized4bit};
use qlora::kernels::weight::{FrozenWeight, PlainData, PlainWeight};
use qlora::kernels::{Matrix, Workspace};
use qlora::lora::LoraConfig;
use qlora::model::{CausalLm, ModelPart};
use qlora::spec::Kind;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A configuration small enough for finite differences, with grouped queries and every optional part switched on.
pub(crate) fn tiny_config() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen3,
        vocab_size: 61,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        rms_norm_eps: 1e-5,
        rope: RopeConfig { theta: 10_000.0, scaling: None },
        max_position_embeddings: 128,
        sliding_window: vec![None, Some(3), None],
        without_rope: Vec::new(),
        scalings: Default::default(),
        tie_word_embeddings: true,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        qk_norm: true,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}

/// Random values in `-scale..scale`.
pub(crate) fn random(rng: &mut ChaCha8Rng, len: usize, scale: f32) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-scale..scale)).collect()
}

/// A norm's weight or a bias, where `workspace` is.
fn vector(values: Vec<f32>, workspace: &Workspace) -> Matrix {
    match workspace.device().is_cpu() {
        true => values.into(),
        false => workspace.upload(&values, 1, values.len()).unwrap(),
    }
}

/// A weight as it is, where `workspace` is.
fn plain(weight: PlainWeight, workspace: &Workspace) -> Arc<dyn FrozenWeight> {
    match workspace.device().is_cpu() {
        true => Arc::new(weight),
        #[cfg(feature = "cuda")]
        false => Arc::new(qlora::kernels::cuda::CudaWeight::plain(&weight, workspace).unwrap()),
        #[cfg(not(feature = "cuda"))]
        false => unreachable!("built without CUDA"),
    }
}

/// A 4-bit weight, quantized on the host, where `workspace` is.
fn bits4(weight: Quantized4bit, workspace: &Workspace) -> Arc<dyn FrozenWeight> {
    match workspace.device().is_cpu() {
        true => Arc::new(weight),
        #[cfg(feature = "cuda")]
        false => Arc::new(qlora::kernels::cuda::CudaWeight::quantized(&weight, workspace).unwrap()),
        #[cfg(not(feature = "cuda"))]
        false => unreachable!("built without CUDA"),
    }
}

/// A GPU of its own stream, or `None` with a printed reason where there is no GPU.
///
/// # Panics
/// If there is no GPU although `QLORA_REQUIRE_GPU=1`.
#[cfg(feature = "cuda")]
pub(crate) fn gpu() -> Option<candle_core::Device> {
    match qlora::kernels::cuda::device(0, None) {
        Ok(device) => Some(device),
        Err(error) if std::env::var("QLORA_REQUIRE_GPU").is_ok_and(|value| value == "1") => panic!("no GPU: {error}"),
        Err(error) => {
            println!("skipped: no GPU ({error})");
            None
        }
    }
}

/// Whether a GPU computes in this type: before Ampere, and where the environment lowers its limits, there is no bf16. Prints
/// what is left out.
#[cfg(feature = "cuda")]
pub(crate) fn computes(device: &candle_core::Device, dtype: qlora::kernels::Dtype) -> bool {
    let checked = qlora::kernels::cuda::Gpu::of(device).unwrap().check_dtype("tests", dtype);
    if let Err(error) = &checked {
        println!("left out: {error}");
    }
    checked.is_ok()
}

/// A model with random weights, its projections quantized if `quantized`; the same seed gives the same model on every
/// device.
pub(crate) fn tiny_model(config: &ModelConfig, quantized: bool, seed: u64, workspace: Workspace) -> CausalLm {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let place = workspace.clone();
    let parts = CausalLm::from_parts(config, workspace, &mut |tensor| {
        let (rng, workspace) = (&mut rng, &place);
        let (len, kind) = (tensor.shape.iter().product(), tensor.module.role.kind());
        let [rows, cols] = *tensor.shape else {
            let values = match kind {
                Kind::Linear => random(rng, len, 0.5),
                _ => random(rng, len, 0.3).iter().map(|x| 1.0 + x).collect(),
            };
            return Ok(ModelPart::Vector(vector(values, workspace)));
        };
        let scale = if kind == Kind::Linear { 1.5 / (cols as f32).sqrt() } else { 1.0 };
        let data = PlainData::F32(random(rng, len, scale));
        Ok(ModelPart::Weight(match quantized && kind == Kind::Linear {
            true => bits4(Quantized4bit::quantize(&data, rows, cols, &QuantConfig::default()).unwrap(), workspace),
            false => plain(PlainWeight::new(data, rows, cols), workspace),
        }))
    });
    parts.unwrap()
}

/// Gives the model an adapter on all linear layers whose A and B are both random, so that every gradient is non-zero.
pub(crate) fn add_random_adapter(model: &mut CausalLm, lora: LoraConfig, seed: u64) {
    model.add_adapter(lora, seed).unwrap();
    let adapter = model.adapter().unwrap();
    let values = random(&mut ChaCha8Rng::seed_from_u64(seed), adapter.layout().len(), 0.3);
    adapter.set_values(&values).unwrap();
}

/// The largest difference, relative to the largest value of `expected`.
pub(crate) fn relative_error(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    let difference = got.iter().zip(expected).map(|(g, e)| (g - e).abs());
    difference.fold(0f32, |max, d| if d.is_nan() { f32::NAN } else { max.max(d) }) / scale
}
