//! Answers a prompt with a model and, if given, an adapter.
//!
//!     cargo run --release --example generate -- --model MODEL --adapter output/adapter "Where is Rome?"
//!
//! With `--adapter` given several times as NAME=ADAPTER, `--with NAME` chooses one; `--with all` answers with the base and with every
//! adapter, in one batch.

use std::io::Write;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use qlora::chat::{Message, TemplateArguments};
use qlora::generate::{generate, generate_batch_with};
use qlora::kernels::Dtype;
use qlora::kernels::quant::QuantConfig;
use qlora::model::{AdapterChoice, CausalLm, DeviceChoice, LoadOptions, Quantization};
use qlora::open::{OpenOptions, open_model};
use qlora::sampling::GenerationConfig;

/// Generates text.
#[derive(Parser)]
struct Args {
    /// A folder, a GGUF file or a hub id.
    #[arg(long)]
    model: String,
    /// A PEFT adapter: a folder or a hub id; as NAME=ADAPTER it has a name. May be given several times.
    #[arg(long)]
    adapter: Vec<String>,
    /// Which adapter answers: its name, "base" for none, or "all" for all of them (the first one is the default).
    #[arg(long)]
    with: Option<String>,
    /// What the system message says.
    #[arg(long)]
    system: Option<String>,
    /// The prompt is the beginning of a text, not a message of a chat.
    #[arg(long)]
    raw: bool,
    /// auto, cpu, cuda, or such as cuda:1.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Keep the weights as stored instead of quantizing them to NF4.
    #[arg(long)]
    no_quantization: bool,
    /// Most tokens of the answer.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 takes the most probable token each time.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Only the so many most probable tokens.
    #[arg(long)]
    top_k: Option<usize>,
    /// Only the most probable tokens that together have this probability.
    #[arg(long)]
    top_p: Option<f64>,
    /// Makes tokens that occurred less probable.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Seed of the sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What the user says.
    prompt: String,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let files = open_model(&args.model, &OpenOptions { progress: true, ..OpenOptions::default() })?;
    // A checkpoint that is stored quantized stays as it is.
    let quantization = match args.no_quantization || files.source.quantization().is_some() {
        true => Quantization::None,
        false => Quantization::Bits4(QuantConfig::default()),
    };
    let workspace = args.device.open(Dtype::Bf16, None)?;
    let mut model =
        CausalLm::load_on(&*files.source, LoadOptions { quantization, ..LoadOptions::default() }, workspace)?;
    let options = OpenOptions { progress: true, ..OpenOptions::default() };
    let mut names = Vec::new();
    for adapter in &args.adapter {
        let (name, spec) = adapter.split_once('=').unwrap_or((adapter, adapter));
        model.load_adapter(name, &qlora::adapter::open(spec, None, &options, model.config())?)?;
        names.push(name);
    }
    match args.with.as_deref() {
        Some("base" | "all") => {}
        Some(name) => model.activate_adapter(name)?,
        None => names.first().map_or(Ok(()), |name| model.activate_adapter(name))?,
    }

    let prompt = if args.raw {
        files.tokenizer.encode(&args.prompt, true)?
    } else {
        let template = files.chat_template.as_ref().context("the model has no chat template: use --raw")?;
        let messages: Vec<Message> =
            args.system.iter().map(Message::system).chain([Message::user(&args.prompt)]).collect();
        let text = template.render(&messages, true, &TemplateArguments::new())?;
        files.tokenizer.encode(&text, false)?
    };
    let config = GenerationConfig {
        max_new_tokens: args.max_new_tokens,
        temperature: (args.temperature > 0.0).then_some(args.temperature),
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        stop_tokens: files.generation.eos_token_ids.clone(),
        ..GenerationConfig::default()
    };

    if args.with.as_deref() == Some("all") {
        let choices: Vec<AdapterChoice> =
            [AdapterChoice::Base].into_iter().chain(names.iter().map(|name| AdapterChoice::Named(name))).collect();
        let answers = generate_batch_with(&model, &vec![prompt.as_slice(); choices.len()], &config, &choices)?;
        for (name, answer) in ["base"].iter().chain(&names).zip(answers) {
            println!("[{name}] {}", files.tokenizer.decode(&answer.tokens, true)?);
        }
        return Ok(());
    }

    let start = Instant::now();
    let mut text = files.tokenizer.decode_stream(true);
    let mut failure = None;
    let answer = generate(&model, &prompt, &config, |token| match text.push(token) {
        Ok(piece) => {
            print!("{piece}");
            // A closed pipe ends the generation.
            if std::io::stdout().flush().is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        }
        Err(error) => {
            failure = Some(error);
            ControlFlow::Break(())
        }
    })?;
    if let Some(error) = failure {
        return Err(error.into());
    }
    println!("{}", text.finish()?);
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("{} tokens, {:.1} tokens/s", answer.tokens.len(), answer.tokens.len() as f64 / seconds);
    Ok(())
}
