//! What a model takes before it is downloaded: parameters, bytes at each precision, an adapter's size, the memory of a
//! training step, the KV cache, and which GPUs it fits. Only the configuration is read.
//!
//!     cargo run --release --example inspect -- meta-llama/Llama-3.1-8B --r 16 --target-modules all-linear --shape 4x2048
//!     cargo run --release --example inspect -- path/to/config.json
//!     cargo run --release --example inspect -- meta-llama/Llama-3.1-8B --card "RTX 3060" --link 12 --shape 1x2048

use std::str::FromStr;

use clap::Parser;
use qlora::card::Card;
use qlora::inspect::{report, report_on_card};
use qlora::lora::{LoraConfig, TargetModules};
use qlora::open::{OpenOptions, open_config};

/// Shows what a model takes. A hub id needs only its config.json, with the access token in HF_TOKEN where the model is gated.
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
    /// A card by its name (`RTX 4090`, `T4`, `A100 40GB`), which need not be in this machine: its plan, the longest sequence that fits
    /// and the speed to expect, computed.
    #[arg(long)]
    card: Option<String>,
    /// That card with another memory, in GB as it is sold.
    #[arg(long, value_name = "GB", requires = "card")]
    card_memory: Option<f64>,
    /// That card behind a link to the host of so many GB/s, such as 6 for PCIe 3 x8, 12 for PCIe 3 x16, 25 for PCIe 4 x16.
    #[arg(long, value_name = "GB/S", requires = "card")]
    link: Option<f64>,
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

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let options = OpenOptions { revision: args.revision.clone(), progress: true, ..OpenOptions::default() };
    let config = open_config(&args.model, &options)?;
    let target_modules = match args.target_modules.contains(',') || is_name(&args.target_modules) {
        true => TargetModules::list(args.target_modules.split(',').map(str::trim)),
        false => TargetModules::parse(&args.target_modules)?,
    };
    let lora = LoraConfig { r: args.r, target_modules, ..LoraConfig::default() };
    print!("{}", report(&args.model, &config, &lora, args.shape.sequences, args.shape.length)?);
    if let Some(name) = &args.card {
        let mut card = Card::named(name)?;
        if let Some(gb) = args.card_memory {
            card = card.with_memory(gb)?;
        }
        if let Some(rate) = args.link {
            card = card.with_host_link(rate)?;
        }
        print!("\n{}", report_on_card(&config, &lora, &card, args.shape.sequences, args.shape.length)?);
    }
    Ok(())
}

/// Whether a text is the name of a module rather than `all-linear` or an expression.
fn is_name(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}
