//! Generation with an 8B model on a GPU: tokens per second while decoding, and of a prompt.
//!
//!     cargo bench --features cuda --bench decode -- [--batch 1,8] [--prompt 128] [--new 128] [--prefill 2048] [--rank 16]
//!         [--layers 32] [--graph 0] [--fp8 1] [--loaded 8] [--dora 1] [--out decode.csv] [--gpu H100] [--driver 580] [--commit abc] [--date 2026-11-22] [--profile 1]
//!
//! Llama-3.1-8B's shape with random weights, NF4 with double quantization, bf16, an all-linear adapter, greedy. Decoding
//! is timed without the prompt: from the first new token to the last, each brought to the host before the next begins.
//! With `--fp8 1` frozen weights are multiplied in fp8 from 32 rows on, and kept so (`frozen_compute`).
//! `--loaded N` takes N loaded adapters of this rank instead, which the sequences have in turn; with `--dora 1` of DoRA's kind.

#[path = "common/command.rs"]
mod command;
#[path = "common/random_8b.rs"]
mod random_8b;

use std::time::Instant;

use anyhow::Context;
use command::{Arguments, append};
use qlora::adapter::{AdapterConfig, AdapterKinds, LoraModule, PeftAdapter};
use qlora::kernels::ops::argmax;
use qlora::kernels::quant::QuantConfig;
use qlora::kernels::weight::FrozenCompute;
use qlora::kernels::{Workspace, cuda};
use qlora::lora::{LoraConfig, TargetModules};
use qlora::model::{AdapterChoice, CausalLm, KvCache, LoadOptions, Quantization};
use random_8b::{RandomWeights, llama_8b};

/// An adapter of all linear layers with small random values.
fn random_adapter(model: &CausalLm, rank: usize, dora: bool, seed: u64) -> PeftAdapter {
    let mut state = seed;
    let mut numbers = |len: usize, center: f32| -> Vec<f32> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            center + ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.01
        };
        (0..len).map(|_| next()).collect()
    };
    let modules = model.linear_weights().map(|linear| LoraModule {
        name: linear.name.to_owned(),
        rank,
        scaling: 1.0,
        a: numbers(rank * linear.weight.cols(), 0.0),
        b: numbers(rank * linear.weight.rows(), 0.0),
        bias: None,
        magnitude: dora.then(|| numbers(linear.weight.rows(), 1.0)),
    });
    let config = AdapterConfig {
        lora: LoraConfig { r: rank, ..LoraConfig::default() },
        base_model_name_or_path: None,
        revision: None,
    };
    let modules = modules.collect();
    PeftAdapter {
        config,
        kinds: AdapterKinds::default(),
        modules,
        tokens: Vec::new(),
        replaced: Vec::new(),
        vocab_size: None,
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::read();
    let (value, number) = (|name: &str| arguments.value(name), |name: &str, or: usize| arguments.number(name, or));
    let device = match cuda::device(0, None) {
        Ok(device) => device,
        // `cargo test` starts benches too.
        Err(error) => {
            println!("nothing measured: {error}");
            return Ok(());
        }
    };
    let workspace = Workspace::new(&device)?;
    let gpu = workspace.gpu().context("the device is a GPU")?.clone();
    let (prompt, new) = (number("--prompt", 128)?, number("--new", 128)?);
    let config = llama_8b(number("--layers", 32)?);
    let vocab = config.vocab_size as u32;
    let quantization = Quantization::Bits4(QuantConfig::default());
    let options = LoadOptions { quantization, ..LoadOptions::default() };
    let mut model = CausalLm::load_on(&RandomWeights::new(config), options, workspace.clone())?;
    if value("--fp8").is_some() {
        model.set_frozen_compute(FrozenCompute::Fp8)?;
        model.set_weight_cache(true);
    }
    model.set_decode_graph(value("--graph").as_deref() != Some("0"));
    let rank = number("--rank", 16)?;
    let loaded = number("--loaded", 0)?;
    let names: Vec<String> = (0..loaded).map(|index| index.to_string()).collect();
    for (seed, name) in names.iter().enumerate() {
        let start = Instant::now();
        let adapter = random_adapter(&model, rank, value("--dora").is_some(), seed as u64);
        let made = Instant::now();
        model.load_adapter(name, &adapter)?;
        let (first, second) = (made.duration_since(start).as_secs_f64(), made.elapsed().as_secs_f64());
        println!("adapter {name}: made in {first:.2} s, loaded in {second:.2} s");
    }
    if loaded > 0 {
        println!("{:.3} GB of loaded adapters", model.memory().loaded_adapters as f64 / 1e9);
    }
    let choice = |sequence: usize| match names.get(sequence % names.len().max(1)) {
        Some(name) => AdapterChoice::Named(name),
        None => AdapterChoice::Active,
    };
    if rank > 0 && loaded == 0 {
        let target_modules = TargetModules::AllLinear;
        model.add_adapter(LoraConfig { r: rank, target_modules, ..LoraConfig::default() }, 0)?;
    }
    let prompt_of = |len: usize, seed: u32| -> Vec<u32> {
        (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_769).wrapping_add(seed * 7919)) % vocab).collect()
    };
    let mut lines = Vec::new();
    for batch in value("--batch").unwrap_or_else(|| "1,8".into()).split(',') {
        let batch: usize = batch.parse()?;
        let prompts: Vec<Vec<u32>> = (0..batch).map(|seed| prompt_of(prompt, seed as u32)).collect();
        let (mut best, mut host) = (f64::INFINITY, 0.0);
        for _ in 0..3 {
            let mut caches: Vec<KvCache> = (0..batch).map(|_| model.new_cache(prompt + new)).collect();
            let enqueueing = std::cell::Cell::new(0.0);
            let step = |tokens: &[Vec<u32>], caches: &mut [KvCache]| -> anyhow::Result<Vec<Vec<u32>>> {
                let inputs: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
                let choices: Vec<AdapterChoice> = (0..inputs.len()).map(choice).collect();
                let mut caches = caches.iter_mut().collect::<Vec<_>>();
                let begin = Instant::now();
                let logits = model.next_logits(&inputs, &mut caches, &choices)?;
                enqueueing.set(enqueueing.get() + begin.elapsed().as_secs_f64());
                let next = argmax::rows(logits.view())?;
                next.into_iter().map(|token| Ok(vec![token.context("no largest logit")?])).collect()
            };
            let mut tokens = step(&prompts, &mut caches)?;
            let start = Instant::now();
            enqueueing.set(0.0);
            for _ in 1..new {
                tokens = step(&tokens, &mut caches)?;
            }
            let seconds = start.elapsed().as_secs_f64() / (new - 1) as f64;
            if seconds < best {
                (best, host) = (seconds, enqueueing.get() / (new - 1) as f64);
            }
            if value("--profile").is_some() {
                let entries = gpu.profile(|| {
                    step(&tokens, &mut caches)
                        .map(drop)
                        .map_err(|e| qlora::kernels::Error::invalid("step", e.to_string()))
                })?;
                println!("a step of batch {batch}: {:.2} ms in launches", entries.iter().map(|e| e.ms).sum::<f64>());
                entries.iter().take(14).for_each(|e| println!("  {:8.3} ms {:5} x {}", e.ms, e.calls, e.op));
            }
        }
        println!("as one CUDA graph: {}", model.runs_decode_graph());
        let rate = batch as f64 / best;
        println!(
            "decode batch {batch}: {rate:.1} tok/s ({:.3} ms a step, the host enqueues it in {:.3})",
            best * 1e3,
            host * 1e3
        );
        let with = if loaded > 0 { format!(" with {loaded} adapters") } else { String::new() };
        lines.push(format!("decode batch {batch}{with},{rate:.1}"));
    }
    let len = number("--prefill", 2048)?;
    let text = prompt_of(len, 3);
    let mut seconds: Vec<f64> = Vec::new();
    for _ in 0..4 {
        let mut cache = model.new_cache(len);
        let start = Instant::now();
        model.next_logits(&[&text], &mut [&mut cache], &[choice(0)])?.to_vec()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let rate = len as f64 / seconds[1];
    println!("prefill {len}: {rate:.0} tok/s ({:.1} ms)", seconds[1] * 1e3);
    lines.push(format!("prefill {len},{rate:.1}"));
    println!("{:.2} GB at most", gpu.pool().peak()? as f64 / 1e9);
    let system = if value("--fp8").is_some() { "qlora-fp8" } else { "qlora" };
    for line in lines {
        let line = format!("{system},{line},{}", arguments.place());
        append(value("--out").as_deref(), "system,case,tok_s,gpu,driver,commit,date", &line)?;
    }
    Ok(())
}
