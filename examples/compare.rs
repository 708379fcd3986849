//! One model held in every way there is: memory, weight error, perplexity on a text and speed, side by side.
//!
//!     cargo run --release --example compare -- MODEL --text some.txt --picture compare.svg

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use qlora::batch::Batch;
use qlora::kernels::quant::{IntBits, IntConfig, QuantConfig, QuantType};
use qlora::lora::linear_modules;
use qlora::model::{CausalLm, DeviceChoice, LoadOptions, Quantization};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::source::WeightSource;

/// Compares the ways to hold a model.
#[derive(Parser)]
struct Args {
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
    /// Where to draw the table as a picture (SVG).
    #[arg(long)]
    picture: Option<PathBuf>,
}

const TEXT: &str = include_str!("../README.md");

/// What is compared: a new kind is a line here.
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

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let args = Args::parse();
    let files = open_model(&args.model, &OpenOptions { progress: true, ..OpenOptions::default() })?;
    let text = match &args.text {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => TEXT.to_owned(),
    };
    let mut tokens = files.tokenizer.encode(&text, true)?;
    tokens.truncate(args.tokens);
    ensure!(tokens.len() >= 2 && args.window >= 2, "a text and a window of at least two tokens are needed");
    println!("{}: {} tokens of text in pieces of {}", files.name, tokens.len(), args.window);
    println!(
        "MB: the whole model. Bits: a weight of the linear layers, scales included. Error: of these weights, against the"
    );
    println!("stored ones. Reads: the text at once. Writes: one token after the other.\n");
    println!(
        "{:18} {:>9} {:>7} {:>9} {:>11} {:>14} {:>14}",
        "held in", "MB", "bits", "error", "perplexity", "reads, tok/s", "writes, tok/s"
    );
    let mut rows = Vec::new();
    for (name, quantization) in kinds() {
        let row = measure(&args, &files, &tokens, name, quantization)?;
        println!(
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
        std::fs::write(path, picture(&files.name, &rows)).with_context(|| path.display().to_string())?;
        println!("\n{}", path.display());
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
    let bar = ProgressBar::new(0)
        .with_style(ProgressStyle::with_template("{msg:14} {bar:24} {bytes} of {total_bytes}, {eta} left")?)
        .with_message(name);
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
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
        model.next_logits(&tokens[..prompt], &mut cache)?;
    }
    let start = Instant::now();
    for &token in &tokens[prompt..prompt + steps] {
        model.next_logits(&[token], &mut cache)?;
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
    for projection in model.stack().blocks().iter().flat_map(|block| block.projections()) {
        let (weight, expected) =
            (projection.weight(), source.read(&format!("{}.weight", projection.name()))?.into_f32());
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

/// Groups of bars, one a quantity.
fn picture(model: &str, rows: &[Row]) -> String {
    const BAR: f64 = 18.0;
    const WIDTH: f64 = 330.0;
    /// Room for the longest name.
    const NAME: f64 = 125.0;
    type Value = fn(&Row) -> f64;
    let mut groups: Vec<(&str, Value, usize)> = vec![
        ("memory, MB", |row| row.bytes as f64 / 1e6, 1),
        ("error of the weights, %", |row| 100.0 * row.error.unwrap_or(0.0), 2),
        ("perplexity", |row| row.perplexity, 3),
        ("generation, tokens/s", |row| row.writing, 1),
    ];
    // Where weights cannot be read back there is no error, which is not the same as none.
    if rows.iter().any(|row| row.error.is_none()) {
        groups.remove(1);
    }
    let height = rows.len() as f64 * (BAR + 6.0) + 50.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"20\" y=\"26\" font-size=\"15\">{}</text>\n",
        2.0 * (WIDTH + 170.0),
        2.0 * height + 40.0,
        escape(model.rsplit('/').next().unwrap_or(model))
    );
    for (index, (title, value, digits)) in groups.into_iter().enumerate() {
        let (x, y) = ((index % 2) as f64 * (WIDTH + 160.0) + 20.0, (index / 2) as f64 * height + 60.0);
        let largest = rows.iter().map(value).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" font-weight=\"bold\">{title}</text>");
        for (row_index, row) in rows.iter().enumerate() {
            let (top, value) = (y + 10.0 + row_index as f64 * (BAR + 6.0), value(row));
            let width = WIDTH * 0.75 * value / largest;
            let _ = writeln!(
                svg,
                "<text x=\"{x}\" y=\"{:.1}\">{}</text><rect x=\"{:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" \
                 height=\"{BAR}\" fill=\"#4477aa\"/><text x=\"{:.1}\" y=\"{:.1}\">{value:.digits$}</text>",
                top + 13.0,
                escape(row.name),
                x + NAME,
                x + NAME + 5.0 + width,
                top + 13.0
            );
        }
    }
    svg + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
