//! Merges an adapter into its base: a Hugging Face folder that needs no adapter. `qlora merge` does more: GGUF files, hub ids, what
//! merging costs.
//!
//!     cargo run --release --example merge -- output merged

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use qlora::adapter::{self, TrainedOver};
use qlora::merge::{Companions, FolderOptions, MergeChoice, MergedSource, PeftUpdate, Rounding, write_folder};
use qlora::open::{OpenOptions, open_model};

/// Merges an adapter into the base that it names.
#[derive(Parser)]
struct Args {
    /// The adapter's folder.
    adapter: PathBuf,
    /// The folder to write.
    out: PathBuf,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let args = Args::parse();
    let (config, _) = adapter::read_any_config(&args.adapter)?;
    let base = config.base_model_name_or_path.context("the adapter names no base model")?;
    // With the tokenizer and the chat template that the adapter was trained with, where it has them.
    let options =
        OpenOptions { adapter: Some(args.adapter.clone()), revision: config.revision, ..OpenOptions::default() };
    let files = open_model(&base, &options)?;
    let adapter = adapter::open_folder(&args.adapter, files.source.config())?;
    let files = files.with_vocabulary_of(&adapter)?;

    // Into what the adapter was trained over: the dequantized weights of a QLoRA run.
    let choice = MergeChoice::new(&*files.source, TrainedOver::read(&args.adapter)?.as_ref());
    let update = PeftUpdate::new(&adapter, &*files.source)?;
    let merged = MergedSource::new(&*files.source, &update, choice.into, Rounding::Stored)?;
    let config_json = std::fs::read_to_string(files.source.path().join("config.json")).ok();
    let options = FolderOptions { config_json, ..FolderOptions::default() };
    let written = write_folder(&merged, &Companions::of(&files)?, &args.out, &options, |_, _| ())?;
    let figures = merged.figures();
    println!(
        "{}: {:.2} GB; {} layers changed by {:.3}% of their norm",
        args.out.display(),
        written.bytes as f64 / 1e9,
        figures.layers,
        100.0 * figures.relative
    );
    Ok(())
}
