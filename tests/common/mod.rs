//! Helpers shared by several test files: tiny random models and comparisons.
#![allow(dead_code)]

pub(crate) mod bigram;

use std::sync::Arc;

use qlora::config::{Architecture, ModelConfig, Scalings};
use qlora::kernels::ops::rope::RopeConfig;
use qlora::kernels::quant::{QuantConfig, Quantized4bit};
use qlora::kernels::weight::{FrozenWeight, PlainData, PlainWeight};
use qlora::kernels::{Matrix, Workspace};
use qlora::lora::LoraConfig;
use qlora::model::CausalLm;
use qlora::model::block::{Block, MemoryPolicy};
use qlora::model::projection::Projection;
use qlora::model::stack::Stack;
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
    let spec = config.spec();
    let Scalings { embedding: scale, residual, logits, .. } = config.scalings;
    // A residual stream that is kept divided by the multiplier, as the loader makes it.
    let eps = config.rms_norm_eps / (residual * residual);
    let (hidden, mlp, head_dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let (q_width, kv_width) = (config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim);
    let norm = |rng: &mut ChaCha8Rng, len: usize| -> Matrix {
        vector(random(rng, len, 0.3).iter().map(|x| 1.0 + x).collect(), &workspace)
    };
    let table = |rng: &mut ChaCha8Rng| -> Arc<dyn FrozenWeight> {
        let data = PlainData::F32(random(rng, config.vocab_size * hidden, 1.0));
        plain(PlainWeight::new(data, config.vocab_size, hidden), &workspace)
    };
    let projection = |rng: &mut ChaCha8Rng, name: String, rows: usize, cols: usize, bias: bool| {
        let data = PlainData::F32(random(rng, rows * cols, 1.5 / (cols as f32).sqrt()));
        let weight: Arc<dyn FrozenWeight> = match quantized {
            true => bits4(Quantized4bit::quantize(&data, rows, cols, &QuantConfig::default()).unwrap(), &workspace),
            false => plain(PlainWeight::new(data, rows, cols), &workspace),
        };
        Projection::new(name, weight, bias.then(|| vector(random(rng, rows, 0.5), &workspace))).unwrap()
    };
    let embedding = table(&mut rng);
    let blocks = (0..config.num_hidden_layers)
        .map(|layer| {
            let rng = &mut rng;
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            Block {
                input_norm: norm(rng, hidden),
                post_attention_norm: norm(rng, hidden),
                qk_norm: config.qk_norm.then(|| (norm(rng, head_dim), norm(rng, head_dim))),
                eps,
                attention: spec.blocks[layer].attention,
                rotary: spec.blocks[layer].rotary,
                q: projection(rng, name("self_attn.q_proj"), q_width, hidden, config.qkv_bias),
                k: projection(rng, name("self_attn.k_proj"), kv_width, hidden, config.qkv_bias),
                v: projection(rng, name("self_attn.v_proj"), kv_width, hidden, config.qkv_bias),
                o: projection(rng, name("self_attn.o_proj"), hidden, q_width, config.o_bias),
                gate: projection(rng, name("mlp.gate_proj"), mlp, hidden, config.mlp_bias),
                up: projection(rng, name("mlp.up_proj"), mlp, hidden, config.mlp_bias),
                down: projection(rng, name("mlp.down_proj"), hidden, mlp, config.mlp_bias),
                policy: MemoryPolicy::default(),
            }
        })
        .collect();
    let final_norm = norm(&mut rng, hidden);
    let head = if config.tie_word_embeddings { embedding.clone() } else { table(&mut rng) };
    let limit = config.max_position_embeddings;
    let stack = Stack::new(blocks, final_norm, eps, config.rope.clone(), limit).unwrap();
    let stack = stack.with_scales(scale / residual, 1.0 / logits);
    CausalLm::new(config.clone(), embedding, head, stack, workspace)
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
