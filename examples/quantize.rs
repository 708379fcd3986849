//! Writes a model as a 4-bit checkpoint in bitsandbytes' layout. Tokenizer, chat template, generation configuration and licence
//! come along. `qlora quantize` has the options.
//!
//!     cargo run --release --example quantize -- MODEL OUT

use std::path::PathBuf;

use clap::Parser;
use qlora::export::bitsandbytes;
use qlora::kernels::quant::QuantConfig;
use qlora::open::{OpenOptions, open_model};

/// Quantizes a model to NF4.
#[derive(Parser)]
struct Args {
    /// A folder, a GGUF file or a hub id.
    model: String,
    /// The folder to write.
    out: PathBuf,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let args = Args::parse();
    let files = open_model(&args.model, &OpenOptions::default())?;
    let size = bitsandbytes::write_model(&files, &QuantConfig::default(), &args.out, |_, _| ())?;
    println!("{}: {:.1} MB, from {:.1} MB", args.out.display(), size.after as f64 / 1e6, size.before as f64 / 1e6);
    Ok(())
}
