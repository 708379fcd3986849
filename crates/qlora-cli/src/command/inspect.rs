//! `qlora inspect`.

use std::str::FromStr;

use anyhow::Result;
use qlora::config::ModelConfig;
use qlora::inspect::{
    AdapterBytes, OnCard, Parameters, Precision, WeightBytes, kv_cache_bytes, report, report_on_card, training_planner,
};
use qlora::kernels::Dtype;
use qlora::lora::{AdapterLayout, LoraConfig, TargetModules};
use qlora::open::{OpenOptions, open_config};
use serde_json::{Map, Value, json};

use crate::card::CardArgs;
use crate::output;

/// Says what a model takes before it is downloaded: parameters, bytes, an adapter's size, a training step, GPUs it fits.
///
/// Of a hub id only config.json is fetched, with the access token in HF_TOKEN where the model is gated.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  qlora inspect meta-llama/Llama-3.1-8B --r 16 --target-modules all-linear --shape 4x2048
  qlora inspect meta-llama/Llama-3.1-8B --card 'RTX 3060' --shape 1x2048
  qlora inspect path/to/config.json --json")]
pub(crate) struct Args {
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
    #[command(flatten)]
    card: CardArgs,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
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

pub(crate) fn run(args: &Args) -> Result<()> {
    let options = OpenOptions { revision: args.revision.clone(), progress: true, ..OpenOptions::default() };
    let config = open_config(&args.model, &options)?;
    let is_name = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let target_modules = match args.target_modules.contains(',') || is_name(&args.target_modules) {
        true => TargetModules::list(args.target_modules.split(',').map(str::trim)),
        false => TargetModules::parse(&args.target_modules)?,
    };
    let lora = LoraConfig { r: args.r, target_modules, ..LoraConfig::default() };
    let Shape { sequences, length } = args.shape;
    let card = args.card.card()?.map(|card| report_on_card(&config, &lora, &card, sequences, length)).transpose()?;
    if args.json {
        let mut figures = figures(&config, &lora, args.shape)?;
        if let Some(on) = card {
            figures["card"] = on_card(&on);
        }
        return Ok(output::print_json(&figures)?);
    }
    output::print(&report(&args.model, &config, &lora, sequences, length)?)?;
    if let Some(on) = card {
        output::print(&format!("\n{on}"))?;
    }
    Ok(())
}

/// The predicted run on a GPU as JSON: bytes, tokens, and tokens a second from the slowest to the fastest expected.
fn on_card(on: &OnCard) -> Value {
    json!({
        "name": on.card.name, "memory": on.card.memory, "dtype": on.dtype.name(),
        "plan": on.plan.as_ref().map(ToString::to_string).ok(),
        "peak": on.plan.as_ref().map(|plan| plan.peak).ok(),
        "longest_sequence": on.longest,
        "computed_tokens_per_second": on.speed.map(|speed| speed.range(on.card.measured)),
    })
}

/// The figures of [`report`] as JSON; sizes in bytes.
fn figures(config: &ModelConfig, lora: &LoraConfig, shape: Shape) -> Result<Value> {
    let (parameters, layout) = (Parameters::of(config), AdapterLayout::for_model(lora, config)?);
    let adapter = AdapterBytes::of(&layout);
    let planner = training_planner(config, lora, Precision::Nf4Double, shape.sequences, shape.length)?;
    let weights: Map<String, Value> = Precision::ALL
        .iter()
        .map(|&precision| (precision.name().to_owned(), WeightBytes::of(config, precision).total().into()))
        .collect();
    Ok(json!({
        "architecture": format!("{:?}", config.architecture),
        "parameters": { "linear": parameters.linear, "embeddings": parameters.embeddings, "vectors": parameters.vectors,
            "total": parameters.total() },
        "weights": weights,
        "adapter": { "r": lora.r, "modules": layout.modules().count(), "parameters": adapter.parameters,
            "file": adapter.file, "training": adapter.training() },
        "kv_cache_bytes_per_token": kv_cache_bytes(config, Dtype::Bf16),
        "training_step": { "sequences": shape.sequences, "length": shape.length,
            "least": planner.leanest().peak, "all_kept": planner.richest().peak },
    }))
}
