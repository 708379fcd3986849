//! `qlora quantize`.

use std::path::PathBuf;

use anyhow::Result;
use qlora::kernels::quant::{QuantConfig, QuantType};
use qlora::open::{OpenOptions, open_model};
use qlora::quantized_checkpoint;
use qlora::trainer::memory;

use crate::output;

/// Writes a model as a 4-bit checkpoint in bitsandbytes' layout.
///
/// Tokenizer, chat template, generation configuration and licence come along. transformers and vLLM load it.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  qlora quantize meta-llama/Llama-3.1-8B-Instruct llama-4bit")]
pub(crate) struct Args {
    /// A folder, a GGUF file or a hub id.
    model: String,
    /// The folder to write.
    out: PathBuf,
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

pub(crate) fn run(args: &Args) -> Result<()> {
    let options = OpenOptions {
        progress: true,
        tokenizer: args.tokenizer.clone(),
        chat_template_path: args.chat_template.clone(),
        ..OpenOptions::default()
    };
    let files = open_model(&args.model, &options)?;
    let quantization =
        QuantConfig { quant_type: args.quant_type, blocksize: args.blocksize, double_quant: !args.no_double_quant };
    let bar = output::bar("", "{pos} of {len} tensors");
    let size = quantized_checkpoint::write_model(&files, &quantization, &args.out, output::count_of(&bar))?;
    bar.finish_and_clear();
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let out = args.out.display();
    output::print(&format!("{out}: {:.1} MB, from {:.1} MB\n", megabytes(size.after), megabytes(size.before)))?;
    if let Some(peak) = memory::peak_resident() {
        output::remark(format!("peak memory {:.1} MB", megabytes(peak)));
    }
    Ok(())
}
