//! `qlora merge`.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::ValueEnum;
use qlora::adapter::{self, PeftAdapter, TrainedOver};
use qlora::export::gguf::{self, GgufOptions, GgufType};
use qlora::formats::{Gguf, HfDirectory};
use qlora::kernels::Dtype;
use qlora::kernels::quant::{QuantConfig, QuantType};
use qlora::merge::{
    Companions, FolderOptions, MergeChoice, MergeInto, MergedSource, PeftUpdate, Rounding, gap, write_folder,
};
use qlora::model::{CausalLm, LoadOptions, Quantization};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::source::WeightSource;
use qlora::trainer::data::read_records;
use qlora::trainer::encoder::ModelEncoder;
use qlora::trainer::exact_match::{answers, merge_match};
use qlora::trainer::memory;

use crate::model::base_of;
use crate::output::{self, line};

/// Merges an adapter into its base: a Hugging Face folder or a GGUF file that needs no adapter.
///
/// A QLoRA adapter was trained over a 4-bit base: by default it is added to that base's dequantized weights (in 16 or 32 bits, never
/// requantized), which answers as base and adapter do. `--into original` adds it to the weights before quantization. What either
/// costs is measured on a text and printed; with `--heldout` also in exact answers. Without `--out` nothing is written.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  qlora merge --adapter output --out merged
  qlora merge --adapter output --out model.gguf --outtype q8_0
  qlora merge --adapter output --heldout heldout.jsonl")]
pub(crate) struct Args {
    /// The base: a folder, a GGUF file or a hub id; if not given, what the adapter names.
    #[arg(long)]
    base: Option<String>,
    /// A folder with a PEFT adapter, or a hub id.
    #[arg(long)]
    adapter: String,
    /// A folder or hub id whose tokenizer and chat template are taken instead of the base's own.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// The folder or GGUF file to write.
    #[arg(long, required_unless_present = "heldout")]
    out: Option<PathBuf>,
    /// The weights to which the adapter is added; if not given, those that it was trained over, as its folder says.
    #[arg(long, value_enum)]
    into: Option<Into>,
    /// The output format; if not given, GGUF where the name of --out ends with .gguf.
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Precision: for folders f32, bf16 or f16 (as the base is stored, if not given); for GGUF those of `qlora export
    /// --type` (f16, if not given).
    #[arg(long)]
    outtype: Option<GgufType>,
    /// Most gigabytes of one weight file of a folder.
    #[arg(long, default_value_t = 5.0)]
    max_shard_size: f64,
    /// The quantization of the base in training (nf4 or fp4), where the adapter's folder does not say it.
    #[arg(long)]
    quant_type: Option<QuantType>,
    /// Elements that shared a scale in training (64).
    #[arg(long)]
    blocksize: Option<usize>,
    /// The scales were kept in f32 in training.
    #[arg(long)]
    no_double_quant: bool,
    /// The base was not quantized in training (LoRA).
    #[arg(long, conflicts_with_all = ["no_double_quant", "quant_type", "blocksize"])]
    no_quantization: bool,
    /// A file with the chat template to write, instead of the adapter's or the base's.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// A text file to measure the gap on, instead of the built-in text.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Most tokens of the text; 0 measures nothing (it loads the model three times, one after the other).
    #[arg(long, default_value_t = gap::DEFAULT_TOKENS)]
    gap_tokens: usize,
    /// JSONL conversations: counts how many last answers are exactly the expected ones, before merging and after it, both
    /// ways.
    #[arg(long)]
    heldout: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Into {
    /// The weights as they are stored.
    Original,
    /// The dequantized weights, which the adapter was trained on.
    Dequantized,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A Hugging Face folder.
    Hf,
    /// A GGUF file for llama.cpp.
    Gguf,
}

const TEXT: &str = include_str!("text.md");
/// Tokens of an answer to --heldout.
const NEW_TOKENS: usize = 48;

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(out) = args.out.as_deref().filter(|out| out.exists()) {
        bail!("{} exists already; choose another name or delete it", out.display());
    }
    let format = format_of(args)?;
    let options = OpenOptions { progress: true, tokenizer: args.tokenizer.clone(), ..OpenOptions::default() };
    let folder = adapter::locate(&args.adapter, None, &options)?;
    let (base, revision) = match &args.base {
        Some(base) => (base.clone(), None),
        None => base_of(&folder, "the adapter names no base model: give --base")?,
    };
    // With the tokenizer and the chat template that the adapter was trained with, where it has them.
    let options = OpenOptions {
        revision,
        adapter: Some(folder.clone()),
        chat_template_path: args.chat_template.clone(),
        ..options
    };
    let files = open_model(&base, &options).with_context(|| match args.base {
        Some(_) => "the base".to_owned(),
        None => format!("{base}, which the adapter names as its base; --base takes another place of it"),
    })?;
    let adapter = adapter::open_folder(&folder, files.source.config())?;
    let files = files.with_vocabulary_of(&adapter)?;
    let MergeChoice { into, quantization, remark, .. } = merge_into(args, &folder, &files)?;
    if let Some(remark) = remark {
        output::remark(remark);
    }
    let rounding = match (format, args.outtype) {
        // Straight from f32 to the GGUF type: one rounding less.
        (Format::Gguf, _) => Rounding::None,
        (Format::Hf, None) => Rounding::Stored,
        (Format::Hf, Some(GgufType::F32)) => Rounding::To(Dtype::F32),
        (Format::Hf, Some(GgufType::F16)) => Rounding::To(Dtype::F16),
        (Format::Hf, Some(GgufType::Bf16)) => Rounding::To(Dtype::Bf16),
        (Format::Hf, Some(other)) => {
            bail!("--outtype {other} is for GGUF files (--out NAME.gguf); folders are f32, f16 or bf16")
        }
    };

    if let Some(out) = &args.out {
        write(args, format, out, &files, &adapter, into, rounding)?;
        if args.gap_tokens > 0 {
            print_gap(args, format, out, &files, &adapter, quantization)?;
        }
    }
    if let Some(heldout) = &args.heldout {
        print_exact(args, format, heldout, &files, &adapter, quantization, rounding)?;
    }
    if let Some(peak) = memory::peak_resident() {
        output::remark(format!("peak memory {:.2} GB", peak as f64 / 1e9));
    }
    Ok(())
}

/// The output format: --format, else the one that the name of --out implies.
fn format_of(args: &Args) -> anyhow::Result<Format> {
    let named =
        args.out.as_deref().is_some_and(|out| out.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf")));
    match args.format {
        Some(Format::Hf) if named => bail!("--format hf writes a folder, but --out is the name of a GGUF file"),
        Some(format) => Ok(format),
        None => Ok(if named { Format::Gguf } else { Format::Hf }),
    }
}

/// The weights to which the adapter is added, and the quantization of the base where the two are compared: the one that
/// the adapter was trained over.
fn merge_into(args: &Args, adapter: &Path, files: &ModelFiles) -> anyhow::Result<MergeChoice> {
    let given = args.quant_type.is_some() || args.blocksize.is_some() || args.no_double_quant;
    let default = QuantConfig::default();
    let config = QuantConfig {
        quant_type: args.quant_type.unwrap_or(default.quant_type),
        blocksize: args.blocksize.unwrap_or(default.blocksize),
        double_quant: !args.no_double_quant,
    };
    let trained_over = match (args.no_quantization, given) {
        (true, _) => Some(TrainedOver::Plain),
        (false, true) => Some(TrainedOver::Bits4 { config, stored: false }),
        (false, false) => TrainedOver::read(adapter)?,
    };
    let choice = MergeChoice::new(&*files.source, trained_over.as_ref());
    Ok(match args.into {
        None => choice,
        Some(Into::Original) => choice.into_original(),
        Some(Into::Dequantized) => choice.into_dequantized(&*files.source, trained_over.as_ref(), config)?,
    })
}

/// Writes the merged model, and prints the figures of the merge.
fn write(
    args: &Args,
    format: Format,
    out: &Path,
    files: &ModelFiles,
    adapter: &PeftAdapter,
    into: MergeInto,
    rounding: Rounding,
) -> anyhow::Result<()> {
    let update = PeftUpdate::new(adapter, &*files.source)?;
    let merged = MergedSource::new(&*files.source, &update, into, rounding)?;
    let bar = output::bar("", "{pos} of {len} tensors");
    let progress = output::count_of(&bar);
    files.check_vocabulary(merged.config().vocab_size)?;
    let bytes = match format {
        Format::Hf => {
            let companions = Companions::of(files)?;
            let config_json = std::fs::read_to_string(files.source.path().join("config.json")).ok();
            let max_shard_bytes = (args.max_shard_size * 1e9) as u64;
            let options = FolderOptions { config_json, max_shard_bytes };
            write_folder(&merged, &companions, out, &options, progress)?.bytes
        }
        Format::Gguf => write_gguf(args, out, files, &merged, progress)?,
    };
    bar.finish_and_clear();

    let figures = merged.figures();
    line!("{}: {:.2} GB", out.display(), bytes as f64 / 1e9);
    line!(
        "{} layers merged into the {into} weights: largest change {:.2e} (in {}), mean {:.2e}, {:.3}% of the weights' norm",
        figures.layers,
        figures.largest,
        figures.largest_in,
        figures.mean,
        100.0 * figures.relative
    );
    if figures.rounding > 0.0 {
        line!("rounding takes {:.1}% of the change's norm", 100.0 * figures.rounding);
    }
    Ok(())
}

fn write_gguf(
    args: &Args,
    out: &Path,
    files: &ModelFiles,
    merged: &MergedSource<'_>,
    progress: impl FnMut(usize, usize),
) -> anyhow::Result<u64> {
    let options = GgufOptions {
        name: out.file_stem().and_then(|name| name.to_str()),
        chat_template: files.chat_template.as_ref().map(|template| template.source()),
        eos_token_ids: &files.generation.eos_token_ids,
        ..GgufOptions::new(args.outtype.unwrap_or(GgufType::F16))
    };
    let written = gguf::write(merged, &files.tokenizer, out, &options, progress)?;
    super::export::remark_fallbacks(&written);
    Ok(written.bytes)
}

fn print_gap(
    args: &Args,
    format: Format,
    out: &Path,
    files: &ModelFiles,
    adapter: &PeftAdapter,
    quantization: Quantization,
) -> anyhow::Result<()> {
    let read = |path: &Path| std::fs::read_to_string(path).with_context(|| path.display().to_string());
    let text = args.text.as_deref().map_or(Ok(TEXT.to_owned()), read)?;
    let tokens = files.tokenizer.encode(&text, true)?;
    let update = PeftUpdate::new(adapter, &*files.source)?;
    let put_on = |model: &mut CausalLm| {
        model.load_adapter("adapter", adapter)?;
        model.activate_adapter("adapter")
    };
    let (reference, gaps) = gap::measure(&*files.source, &update, put_on, quantization, &tokens, args.gap_tokens)?;
    let Some((_, first)) = gaps.first() else { return Ok(()) };
    line!("\non {} tokens, against base and adapter (perplexity {:.4}):", first.tokens, first.perplexity_before);
    line!(
        "{:12} {:>11} {:>15} {:>12} {:>12} {:>11}",
        "merged into",
        "perplexity",
        "largest logit",
        "mean logit",
        "divergence",
        "same best"
    );
    let row = |name: &str, gap: &gap::Gap| -> anyhow::Result<()> {
        line!(
            "{name:12} {:>11.4} {:>15.4} {:>12.5} {:>12.6} {:>10.1}%",
            gap.perplexity_after,
            gap.largest,
            gap.mean,
            gap.divergence,
            100.0 * gap.same_best
        );
        Ok(())
    };
    gaps.iter().try_for_each(|(into, gap)| row(&into.to_string(), gap))?;
    let written = CausalLm::load(&*written(format, out)?, LoadOptions::default())?;
    row("as written", &reference.gap(&written)?)
}

/// Opens the written model as a weight source.
fn written(format: Format, out: &Path) -> anyhow::Result<Box<dyn WeightSource>> {
    Ok(match format {
        Format::Hf => Box::new(HfDirectory::open(out)?),
        Format::Gguf => Box::new(Gguf::open(out)?),
    })
}

/// Prints the numbers of exact answers of base and adapter, of both merged models, and of the written model.
fn print_exact(
    args: &Args,
    format: Format,
    heldout: &Path,
    files: &ModelFiles,
    adapter: &PeftAdapter,
    quantization: Quantization,
    rounding: Rounding,
) -> anyhow::Result<()> {
    let records = read_records(heldout)?;
    let bar = output::bar("{msg:24}", "{pos} of {len} answers");
    bar.set_length(records.len() as u64);
    let progress = |what: &str, done: usize| {
        bar.set_message(what.to_owned());
        bar.set_position(done as u64);
    };
    let mut figures = merge_match(files, adapter, quantization, rounding, &records, NEW_TOKENS, progress)?.to_string();
    if let Some(out) = &args.out {
        let model = CausalLm::load(&*written(format, out)?, LoadOptions::default())?;
        let ends = &files.generation.eos_token_ids;
        let encoder = ModelEncoder::new(&files.tokenizer, files.chat_template.as_ref(), ends);
        let progress = |done| progress("as written", done);
        let answers = answers(&model, &files.tokenizer, &encoder, &records, NEW_TOKENS, 25, progress)?;
        let exact = answers.iter().filter(|answer| answer.is_exact()).count();
        figures.push_str(&format!(", {exact} as written"));
    }
    bar.finish_and_clear();
    line!("\nexact answers: {figures}");
    Ok(())
}
