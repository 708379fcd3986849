//! What a model takes before it is downloaded: parameters, bytes at each precision, an adapter's size, the memory of a
//! training step, the KV cache, and which GPUs it fits. Only the configuration is read.
//!
//!     cargo run --release --example inspect -- meta-llama/Llama-3.1-8B --r 16 --target-modules all-linear --shape 4x2048
//!     cargo run --release --example inspect -- path/to/config.json

use std::str::FromStr;

use clap::Parser;
use qlora::inspect::{
    AdapterBytes, Parameters, Precision, WeightBytes, kv_cache_bytes, training_planner, usable_gpu_bytes,
};
use qlora::kernels::Dtype;
use qlora::lora::{AdapterLayout, LoraConfig, TargetModules};
use qlora::model::Planner;
use qlora::model::block::Keep;
use qlora::open::{OpenOptions, open_config};

/// Shows what a model takes.
#[derive(Parser)]
struct Args {
    /// A config.json, a folder, a GGUF file or a hub id.
    model: String,
    /// Branch, tag or commit on the hub.
    #[arg(long)]
    revision: Option<String>,
    /// The adapter's rank.
    #[arg(long, default_value_t = 16)]
    r: usize,
    /// Layers with an adapter: all-linear, a list such as q_proj,v_proj, or a regular expression.
    #[arg(long, default_value = "all-linear")]
    target_modules: String,
    /// A micro-batch: sequences x tokens.
    #[arg(long, default_value = "4x2048")]
    shape: Shape,
}

#[derive(Clone, Copy)]
struct Shape {
    sequences: usize,
    length: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('x').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        match parsed {
            Some((sequences, length)) if sequences > 0 && length > 0 => Ok(Self { sequences, length }),
            _ => Err("a shape is sequences x tokens, such as 4x2048".to_owned()),
        }
    }
}

/// What GPUs are sold with.
const GPUS: [u64; 7] = [8, 12, 16, 24, 40, 48, 80];

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let options = OpenOptions { revision: args.revision.clone(), ..OpenOptions::default() };
    let config = open_config(&args.model, &options)?;
    let parameters = Parameters::of(&config);
    println!("{}: {:?}, {} parameters", args.model, config.architecture, grouped(parameters.total()));
    println!(
        "  {} layers, width {}, {} heads of {} ({} for keys and values), MLP {}, vocabulary {}{}",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
        if config.tie_word_embeddings { ", head tied to the embedding" } else { "" }
    );
    println!(
        "  linear layers {}, embedding and head {}, norms and biases {}\n",
        grouped(parameters.linear),
        grouped(parameters.embeddings),
        grouped(parameters.vectors)
    );

    println!("{:26} {:>16} {:>10}", "weights", "linear, bytes", "all, GB");
    for precision in Precision::ALL {
        let bytes = WeightBytes::of(&config, precision);
        println!("{:26} {:>16} {:>10.2}", precision.name(), grouped(bytes.linear), gb(bytes.total()));
    }

    let target_modules = match args.target_modules.contains(',') || is_name(&args.target_modules) {
        true => TargetModules::list(args.target_modules.split(',').map(str::trim)),
        false => TargetModules::parse(&args.target_modules)?,
    };
    let lora = LoraConfig { r: args.r, target_modules, ..LoraConfig::default() };
    let layout = AdapterLayout::for_model(&lora, &config)?;
    let adapter = AdapterBytes::of(&layout);
    println!(
        "\nadapter, r = {}, {} layers: {} parameters ({:.3}%), file {:.1} MB",
        args.r,
        layout.modules().count(),
        grouped(adapter.parameters),
        100.0 * adapter.parameters as f64 / parameters.total() as f64,
        mb(adapter.file)
    );
    println!(
        "  in training: values {:.1} MB, gradient {:.1} MB, AdamW {:.1} MB (f32)",
        mb(adapter.values),
        mb(adapter.gradient),
        mb(adapter.optimizer)
    );

    let token = kv_cache_bytes(&config, Dtype::Bf16);
    println!(
        "\nKV cache, bf16: {} bytes a token, {:.2} GB for {} tokens",
        grouped(token),
        gb(token * config.max_position_embeddings as u64),
        config.max_position_embeddings
    );

    let Shape { sequences, length } = args.shape;
    let planner = training_planner(&config, &lora, Precision::Nf4Double, sequences, length)?;
    let (lean, free) = (planner.leanest(), planner.richest());
    println!("\nQLoRA step of {sequences}x{length} tokens in bf16, f32 AdamW:");
    println!("  weights, adapter and optimizer {:.2} GB", gb(lean.resident));
    println!(
        "  activations {:.2} GB at least, {:.2} GB where everything is kept",
        gb(lean.peak - lean.resident),
        gb(free.peak - free.resident)
    );
    println!("\n{:>5} {:>11}  {:24} training step", "GPU", "usable, GB", "inference, up to");
    for size in GPUS {
        println!(
            "{size:>5} {:>11.2}  {:24} {}",
            gb(usable_gpu_bytes(size)),
            inference(&config, size),
            step(&planner, size)
        );
    }
    Ok(())
}

/// The highest precision whose weights fit, and how many tokens of KV cache with them.
fn inference(config: &qlora::config::ModelConfig, size: u64) -> String {
    let usable = usable_gpu_bytes(size);
    let choices = [Precision::Bf16, Precision::Int8, Precision::Nf4Double];
    let fits = choices.into_iter().find_map(|precision| {
        let left = usable.checked_sub(WeightBytes::of(config, precision).total())?;
        let tokens = left / kv_cache_bytes(config, Dtype::Bf16);
        // Less than that is no use.
        (tokens >= 1024).then(|| {
            let name = if precision == Precision::Nf4Double { "nf4" } else { precision.name() };
            format!("{name}, {} tokens", grouped(tokens))
        })
    });
    fits.unwrap_or_else(|| "does not fit".to_owned())
}

fn step(planner: &Planner, size: u64) -> String {
    match planner.plan(usable_gpu_bytes(size)) {
        Ok(plan) => {
            let count = |keep: Keep| plan.keep.iter().filter(|&&k| k == keep).count();
            let what = match (count(Keep::Everything), plan.keep.len()) {
                (kept, all) if kept == all => "keeps all activations".to_owned(),
                _ if count(Keep::Offload) > 0 => "recomputes, inputs in host memory".to_owned(),
                (kept, all) => format!("keeps {kept} of {all} blocks, recomputes the others"),
            };
            format!("{:.2} GB: {what}", gb(plan.peak))
        }
        Err(_) => format!("does not fit: {:.2} GB are needed", gb(planner.leanest().peak)),
    }
}

/// Whether a text is the name of a module rather than `all-linear` or an expression.
fn is_name(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn gb(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
