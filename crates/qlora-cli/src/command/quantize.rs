//! `qlora quantize`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use qlora::export::bitsandbytes;
use qlora::export::gguf::{self, GgufOptions, GgufType};
use qlora::kernels::quant::{QuantConfig, QuantType};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::trainer::memory;

use crate::importance::ImportanceArgs;
use crate::output;

/// Writes a model as a 4-bit checkpoint in bitsandbytes' layout, or as a quantized GGUF file.
///
/// Tokenizer, chat template, generation configuration and licence come along. transformers and vLLM load the checkpoint, llama.cpp
/// and Ollama the file.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  qlora quantize meta-llama/Llama-3.1-8B-Instruct llama-4bit
  qlora quantize meta-llama/Llama-3.1-8B-Instruct llama.gguf --type q4_k_m --imatrix imatrix.gguf")]
pub(crate) struct Args {
    /// A folder, a GGUF file or a hub id.
    model: String,
    /// The folder to write, or the GGUF file (NAME.gguf).
    out: PathBuf,
    /// nf4 or fp4.
    #[arg(long, default_value = "nf4", conflicts_with = "kind")]
    quant_type: QuantType,
    /// Elements that share a scale.
    #[arg(long, default_value_t = 64, conflicts_with = "kind")]
    blocksize: usize,
    /// Keep the scales in f32.
    #[arg(long, conflicts_with = "kind")]
    no_double_quant: bool,
    /// The type of a GGUF file, as for `qlora export` (q4_k_m, if not given).
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<GgufType>,
    #[command(flatten)]
    importance: ImportanceArgs,
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
    let is_gguf = args.out.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
    if !is_gguf && (args.kind.is_some() || args.importance.is_given()) {
        let out = args.out.display();
        bail!("--type and --imatrix are for GGUF files, and {out} is not the name of one (NAME.gguf)");
    }
    let files = open_model(&args.model, &options)?;
    if is_gguf {
        return write_gguf(args, &files);
    }
    let quantization =
        QuantConfig { quant_type: args.quant_type, blocksize: args.blocksize, double_quant: !args.no_double_quant };
    let bar = output::bar("", "{pos} of {len} tensors");
    let size = bitsandbytes::write_model(&files, &quantization, &args.out, output::count_of(&bar))?;
    bar.finish_and_clear();
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let out = args.out.display();
    output::print(&format!("{out}: {:.1} MB, from {:.1} MB\n", megabytes(size.after), megabytes(size.before)))?;
    if let Some(peak) = memory::peak_resident() {
        output::remark(format!("peak memory {:.1} MB", megabytes(peak)));
    }
    Ok(())
}

fn write_gguf(args: &Args, files: &ModelFiles) -> Result<()> {
    let out = &args.out;
    if out.exists() {
        bail!("{} exists already; choose another name or delete it", out.display());
    }
    let importance = args.importance.of(files, &*files.source)?;
    let options = GgufOptions {
        name: out.file_stem().and_then(|name| name.to_str()),
        chat_template: files.chat_template.as_ref().map(|template| template.source()),
        eos_token_ids: &files.generation.eos_token_ids,
        importance: importance.as_ref(),
        ..GgufOptions::new(args.kind.unwrap_or(GgufType::Q4KM))
    };
    let bar = output::bar("", "{pos} of {len} tensors");
    let written = gguf::write(&*files.source, &files.tokenizer, out, &options, output::count_of(&bar))?;
    bar.finish_and_clear();
    super::export::remark_fallbacks(&written);
    let megabytes = written.bytes as f64 / 1e6;
    Ok(output::print(&format!("{}: {megabytes:.1} MB, {}\n", out.display(), options.kind))?)
}
