//! `qlora compare`.

mod picture;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use qlora::batch::Batch;
use qlora::kernels::quant::{IntBits, IntConfig, QuantConfig, QuantType};
use qlora::lora::linear_modules;
use qlora::model::{AdapterChoice, CausalLm, DeviceChoice, LoadOptions, Quantization};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::source::WeightSource;

use crate::output::{self, line};

/// Compares the ways to hold a model: memory, weight error, perplexity on a text and speed, side by side.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  qlora compare model.gguf --text some.txt --picture compare.svg")]
pub(crate) struct Args {
    /// A folder, a GGUF file or a hub id.
    model: String,
    /// A text file for the perplexity, instead of the built-in text.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Most tokens of the text.
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Tokens that see each other: the text is cut into pieces of so many.
    #[arg(long, default_value_t = 512)]
    window: usize,
    /// Tokens to generate for the speed.
    #[arg(long, default_value_t = 48)]
    new_tokens: usize,
    /// auto, cpu, cuda, or such as cuda:1.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// The path of a picture of the table (SVG).
    #[arg(long)]
    picture: Option<PathBuf>,
}

const TEXT: &str = include_str!("text.md");

/// The quantization kinds to compare; add a new kind as a line here.
fn kinds() -> Vec<(&'static str, Quantization)> {
    let bits4 = |quant_type, double_quant| {
        Quantization::Bits4(QuantConfig { quant_type, double_quant, ..QuantConfig::default() })
    };
    let int4 = IntConfig { bits: IntBits::Four, group_size: Some(64), zero_point: true };
    vec![
        ("none", Quantization::None),
        ("LLM.int8", Quantization::Int8),
        ("INT4, groups of 64", Quantization::Int(int4)),
        ("FP4", bits4(QuantType::Fp4, false)),
        ("NF4", bits4(QuantType::Nf4, false)),
        ("NF4 + double", bits4(QuantType::Nf4, true)),
    ]
}

struct Row {
    name: &'static str,
    /// Bytes of the whole model.
    bytes: usize,
    /// Bits a weight of the blocks' linear layers.
    bits: f64,
    /// Frobenius norm of the linear layers' errors over that of the weights; none where weights cannot be read back.
    error: Option<f64>,
    perplexity: f64,
    /// Tokens a second: the text, and generating one after the other.
    reading: f64,
    writing: f64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let files = open_model(&args.model, &OpenOptions { progress: true, ..OpenOptions::default() })?;
    let text = match &args.text {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => TEXT.to_owned(),
    };
    let mut tokens = files.tokenizer.encode(&text, true)?;
    tokens.truncate(args.tokens);
    ensure!(tokens.len() >= 2 && args.window >= 2, "a text and a window of at least two tokens are needed");
    line!("{}: {} tokens of text in pieces of {}", files.name, tokens.len(), args.window);
    line!(
        "MB: the whole model. Bits: a weight of the linear layers, scales included. Error: of these weights, against the"
    );
    line!("stored ones. Reads: the text at once. Writes: one token after the other.\n");
    line!(
        "{:18} {:>9} {:>7} {:>9} {:>11} {:>14} {:>14}",
        "held in",
        "MB",
        "bits",
        "error",
        "perplexity",
        "reads, tok/s",
        "writes, tok/s"
    );
    let mut rows = Vec::new();
    for (name, quantization) in kinds() {
        let row = measure(args, &files, &tokens, name, quantization)?;
        line!(
            "{name:18} {:>9.1} {:>7.3} {:>9} {:>11.3} {:>14.1} {:>14.1}",
            row.bytes as f64 / 1e6,
            row.bits,
            row.error.map_or("-".to_owned(), |error| format!("{:.3}%", 100.0 * error)),
            row.perplexity,
            row.reading,
            row.writing
        );
        rows.push(row);
    }
    if let Some(path) = &args.picture {
        std::fs::write(path, picture::picture(&files.name, &rows)?).with_context(|| path.display().to_string())?;
        line!("\n{}", path.display());
    }
    Ok(())
}

fn measure(
    args: &Args,
    files: &ModelFiles,
    tokens: &[u32],
    name: &'static str,
    quantization: Quantization,
) -> anyhow::Result<Row> {
    let bar = output::bar(name, "{bytes} of {total_bytes}");
    let mut progress = output::bytes_of(&bar);
    let options = LoadOptions { quantization, progress: Some(&mut progress), ..LoadOptions::default() };
    let model = CausalLm::load_on(&*files.source, options, args.device.open(None, None)?)?;
    bar.finish_and_clear();
    let memory = model.memory();
    let linear: usize = linear_modules(model.config()).iter().map(|m| m.out_features * m.in_features).sum();

    let labels: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
    let start = Instant::now();
    let (mut sum, mut count) = (0.0, 0);
    for (tokens, labels) in tokens.chunks(args.window).zip(labels.chunks(args.window)) {
        let loss = model.evaluate(&Batch::from_documents([(tokens, labels)]))?;
        sum += loss.sum;
        count += loss.trained_tokens;
    }
    let reading = tokens.len() as f64 / start.elapsed().as_secs_f64();

    // The text itself is fed, token by token: every kind makes the same number of steps.
    let prompt = tokens.len().min(32) - 1;
    let steps = args.new_tokens.min(tokens.len() - prompt).max(1);
    let mut cache = model.new_cache(prompt + steps);
    if prompt > 0 {
        model.next_logits(&[&tokens[..prompt]], &mut [&mut cache], AdapterChoice::Active)?;
    }
    let start = Instant::now();
    for &token in &tokens[prompt..prompt + steps] {
        model.next_logits(&[&[token]], &mut [&mut cache], AdapterChoice::Active)?;
    }
    let writing = steps as f64 / start.elapsed().as_secs_f64();
    Ok(Row {
        name,
        bytes: memory.total(),
        bits: 8.0 * memory.projections as f64 / linear as f64,
        error: weight_error(&model, &*files.source)?,
        perplexity: (sum / count.max(1) as f64).exp(),
        reading,
        writing,
    })
}

/// Reads every linear layer back; on a GPU, weights are not read back.
fn weight_error(model: &CausalLm, source: &dyn WeightSource) -> anyhow::Result<Option<f64>> {
    if !model.workspace().device().is_cpu() {
        return Ok(None);
    }
    let (mut errors, mut weights) = (0.0, 0.0);
    for linear in model.linear_weights() {
        let (weight, expected) = (linear.weight, source.read(&format!("{}.weight", linear.name))?.into_f32());
        let mut row = vec![0.0; weight.cols()];
        for (index, expected) in expected.chunks_exact(weight.cols()).enumerate() {
            weight.dequantize_rows(index..index + 1, &mut row);
            for (&got, &expected) in row.iter().zip(expected) {
                errors += f64::from(got - expected).powi(2);
                weights += f64::from(expected).powi(2);
            }
        }
    }
    Ok(Some(if weights > 0.0 { (errors / weights).sqrt() } else { 0.0 }))
}
