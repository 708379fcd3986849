//! Perplexity and memory of a model in two precisions. `qlora compare` measures every way to hold a model, and its speed.
//!
//!     cargo run --release --example compare -- MODEL TEXT_FILE

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use qlora::batch::Batch;
use qlora::kernels::quant::QuantConfig;
use qlora::model::{CausalLm, DeviceChoice, LoadOptions, Quantization};
use qlora::open::{OpenOptions, open_model};

/// Compares a model as stored with the same in NF4.
#[derive(Parser)]
struct Args {
    /// A folder, a GGUF file or a hub id.
    model: String,
    /// A text.
    text: PathBuf,
}

/// Tokens that see each other: the text is cut into pieces of so many.
const WINDOW: usize = 512;

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let files = open_model(&args.model, &OpenOptions::default())?;
    let text = std::fs::read_to_string(&args.text).with_context(|| args.text.display().to_string())?;
    let tokens = files.tokenizer.encode(&text, true)?;
    for (name, quantization) in [("stored", Quantization::None), ("NF4", Quantization::Bits4(QuantConfig::default()))] {
        let workspace = DeviceChoice::Auto.open(None, None)?;
        let options = LoadOptions { quantization, ..LoadOptions::default() };
        let model = CausalLm::load_on(&*files.source, options, workspace)?;
        let (mut sum, mut count) = (0.0, 0);
        for piece in tokens.chunks(WINDOW) {
            let labels: Vec<i64> = piece.iter().map(|&token| i64::from(token)).collect();
            let loss = model.evaluate(&Batch::from_documents([(piece, labels.as_slice())]))?;
            sum += loss.sum;
            count += loss.trained_tokens;
        }
        let perplexity = (sum / count.max(1) as f64).exp();
        println!("{name:8} perplexity {perplexity:.3}, {:.1} MB", model.memory().total() as f64 / 1e6);
    }
    Ok(())
}
