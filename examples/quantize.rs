//! Writes a model as a 4-bit checkpoint in bitsandbytes' layout, and shows what a checkpoint holds. Tokenizer, chat template,
//! generation configuration and licence come along.
//!
//!     cargo run --release --example quantize -- MODEL OUT
//!     cargo run --release --example quantize -- --inspect OUT

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use qlora::kernels::quant::{QuantConfig, QuantType};
use qlora::open::{OpenOptions, open_model};
use qlora::quantized_checkpoint;
use qlora::trainer::memory;

/// Quantizes a model to 4 bits.
#[derive(Parser)]
struct Args {
    /// A folder, a GGUF file or a hub id; with --inspect, a folder with safetensors.
    model: String,
    /// The folder to write.
    #[arg(required_unless_present = "inspect")]
    out: Option<PathBuf>,
    /// Show the tensors of a checkpoint instead.
    #[arg(long)]
    inspect: bool,
    /// nf4 or fp4.
    #[arg(long, default_value = "nf4")]
    quant_type: QuantType,
    /// Elements that share a scale.
    #[arg(long, default_value_t = 64)]
    blocksize: usize,
    /// Keep the scales in f32.
    #[arg(long)]
    no_double_quant: bool,
    /// A folder or hub id whose tokenizer and chat template are taken instead of the model's own.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// A file with the chat template to write instead of the model's own.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let args = Args::parse();
    match &args.out {
        Some(out) if !args.inspect => quantize(&args, out),
        _ => inspect(Path::new(&args.model)),
    }
}

fn quantize(args: &Args, out: &Path) -> anyhow::Result<()> {
    let options = OpenOptions {
        progress: true,
        tokenizer: args.tokenizer.clone(),
        chat_template_path: args.chat_template.clone(),
        ..OpenOptions::default()
    };
    let files = open_model(&args.model, &options)?;
    let quantization =
        QuantConfig { quant_type: args.quant_type, blocksize: args.blocksize, double_quant: !args.no_double_quant };
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template("{bar:24} {pos}/{len} tensors, {eta} left")?);
    let size = quantized_checkpoint::write_model(&files, &quantization, out, |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    println!("{}: {:.1} MB, from {:.1} MB", out.display(), megabytes(size.after), megabytes(size.before));
    if let Some(peak) = memory::peak_resident() {
        println!("peak memory {:.1} MB", megabytes(peak));
    }
    Ok(())
}

fn inspect(folder: &Path) -> anyhow::Result<()> {
    let path = folder.join("model.safetensors");
    let data = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let file = safetensors::SafeTensors::deserialize(&data).with_context(|| path.display().to_string())?;
    let mut names = file.names();
    names.sort_unstable();
    for name in names {
        let tensor = file.tensor(name)?;
        print!("{name:64} {:5} {:?}", format!("{:?}", tensor.dtype()), tensor.shape());
        match name.contains("quant_state") {
            true => println!(" {}", String::from_utf8_lossy(tensor.data())),
            false => println!(),
        }
    }
    Ok(())
}
