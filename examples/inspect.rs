//! A model's sizes and memory needs, from its configuration alone: parameters, bytes at each precision, an adapter's
//! size, the memory of a training step, the KV cache, and which GPUs it fits. `qlora inspect` has the options.
//!
//!     cargo run --release --example inspect -- meta-llama/Llama-3.1-8B
//!     cargo run --release --example inspect -- path/to/config.json "RTX 3060"

use clap::Parser;
use qlora::card::Card;
use qlora::inspect::{report, report_on_card};
use qlora::lora::{LoraConfig, TargetModules};
use qlora::open::{OpenOptions, open_config};

/// Shows what a model takes.
#[derive(Parser)]
struct Args {
    /// A config.json, a folder, a GGUF file or a hub id.
    model: String,
    /// A card by its name, which need not be in this machine: a run's plan on it.
    card: Option<String>,
}

/// A micro-batch.
const SEQUENCES: usize = 4;
const LENGTH: usize = 2048;

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let config = open_config(&args.model, &OpenOptions::default())?;
    let lora = LoraConfig { target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
    print!("{}", report(&args.model, &config, &lora, SEQUENCES, LENGTH)?);
    if let Some(name) = &args.card {
        print!("\n{}", report_on_card(&config, &lora, &Card::named(name)?, SEQUENCES, LENGTH)?);
    }
    Ok(())
}
