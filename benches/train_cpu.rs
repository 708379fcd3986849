//! Training speed and memory on the CPU, in the same terms as `scripts/bench/peft_cpu.py`.
//!
//!     cargo bench --bench train_cpu -- MODEL [--checkpointing]
//!
//! Real steps (forward, backward, clipping, AdamW) on random tokens with the loss over all of them: 2 x 256 tokens, NF4 with
//! double quantization, LoRA r = 16 on every linear layer. Prints one JSON line; `matmul_gflops` is what a large f32 product
//! reaches in the same run, `share_of_matmul` the training step's useful arithmetic against that.

use std::time::Instant;

use anyhow::Context;
use qlora::batch::Batch;
use qlora::kernels::ops::{adamw, grad_norm, matmul};
use qlora::kernels::quant::QuantConfig;
use qlora::kernels::{View, ViewMut};
use qlora::lora::{LoraConfig, TargetModules};
use qlora::model::{CausalLm, LoadOptions, Quantization, TrainPass};
use qlora::open::{OpenOptions, open_model};
use qlora::trainer::memory;
use rand::{RngExt, SeedableRng};

const SEQUENCES: usize = 2;
const LENGTH: usize = 256;
const WARMUP: usize = 2;
const STEPS: usize = 8;

fn main() -> anyhow::Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let checkpointing = arguments.iter().any(|argument| argument == "--checkpointing");
    arguments.retain(|argument| !argument.starts_with("--"));
    // `cargo test` builds and starts benches too: without a model there is nothing to measure.
    let Some(path) = arguments.first() else {
        println!("usage: cargo bench --bench train_cpu -- MODEL [--checkpointing]");
        return Ok(());
    };
    let files = open_model(path, &OpenOptions::default())?;
    let quantization = Quantization::Bits4(QuantConfig::default());
    let mut model = CausalLm::load(&*files.source, LoadOptions { quantization, ..LoadOptions::default() })?;
    let target_modules = TargetModules::AllLinear;
    model.add_adapter(LoraConfig { r: 16, lora_alpha: 32.0, target_modules, ..LoraConfig::default() }, 0)?;
    model.set_gradient_checkpointing(checkpointing)?;
    let adapter = model.adapter().context("the adapter was just added")?;
    let trainable = adapter.layout().len();
    let (mut gradient, mut m, mut v) = (vec![0.0; trainable], vec![0.0; trainable], vec![0.0; trainable]);
    let optimizer = adamw::AdamW { lr: 2e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };

    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let vocabulary = model.config().vocab_size as u32;
    let mut seconds = Vec::new();
    for step in 1..=WARMUP + STEPS {
        let documents: Vec<Vec<u32>> =
            (0..SEQUENCES).map(|_| (0..LENGTH).map(|_| rng.random_range(0..vocabulary)).collect()).collect();
        let labels: Vec<Vec<i64>> = documents.iter().map(|ids| ids.iter().map(|&id| i64::from(id)).collect()).collect();
        let batch = Batch::from_documents(documents.iter().map(Vec::as_slice).zip(labels.iter().map(Vec::as_slice)));
        let start = Instant::now();
        gradient.fill(0.0);
        model.accumulate_gradients(&batch, batch.trained_tokens(), TrainPass::default(), (&mut gradient).into())?;
        let clip = grad_norm::clip_coefficient(grad_norm::global_norm(&gradient)?, 1.0);
        adapter.update(|values| adamw::step(&optimizer, step as u64, clip, values, &gradient, &mut m, &mut v))?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.drain(..WARMUP);
    seconds.sort_by(f64::total_cmp);
    let tokens = (SEQUENCES * LENGTH) as f64;
    let tok_s = tokens / seconds[seconds.len() / 2];

    let ceiling = matmul_gflops()?;
    let share = tok_s * useful_flops(&model, trainable) / 1e9 / ceiling;
    let peak = memory::peak_resident().unwrap_or_default() as f64 / 1e9;
    println!(
        "{{\"system\": \"qlora, base nf4, compute f32\", \"tok_s\": {tok_s:.1}, \"peak_rss_gb\": {peak:.3}, \
         \"activations_gb\": {:.3}, \"model_gb\": {:.3}, \"matmul_gflops\": {ceiling:.0}, \"share_of_matmul\": {share:.2}, \
         \"sequences\": {SEQUENCES}, \"length\": {LENGTH}, \"r\": 16, \"gradient_checkpointing\": {checkpointing}}}",
        model.workspace().peak_bytes() as f64 / 1e9,
        model.memory().total() as f64 / 1e9,
    );
    Ok(())
}

/// Floating-point operations a token that no implementation can avoid: forward and input gradient of the frozen layers
/// (the lowest block's q, k and v need none) and of the head, three products for the adapters; attention is left out.
fn useful_flops(model: &CausalLm, trainable: usize) -> f64 {
    let sizes = || model.linear_weights().map(|linear| linear.weight.rows() * linear.weight.cols());
    let (weights, lowest): (usize, usize) = (sizes().sum(), sizes().take(3).sum());
    let head = model.config().vocab_size * model.config().hidden_size;
    (4 * weights - 2 * lowest + 4 * head + 6 * trainable) as f64
}

/// The speed of the matrix library on a large product, in GFLOP/s.
fn matmul_gflops() -> anyhow::Result<f64> {
    let n = 1536;
    let (a, b, mut c) = (vec![1.0; n * n], vec![1.0; n * n], vec![0.0; n * n]);
    let mut best = f64::INFINITY;
    for _ in 0..8 {
        let start = Instant::now();
        matmul::nn(View::new(&a, n, n), View::new(&b, n, n), ViewMut::new(&mut c, n, n), 1.0, 0.0)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (n as f64).powi(3) / best / 1e9)
}
