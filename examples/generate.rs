//! Answers a prompt with a model and, if given, an adapter.
//!
//!     cargo run --release --example generate -- --model MODEL --adapter output/adapter "Where is Rome?"

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use qlora::chat::{Message, TemplateArguments};
use qlora::generate::generate;
use qlora::kernels::Dtype;
use qlora::kernels::quant::QuantConfig;
use qlora::model::{CausalLm, DeviceChoice, LoadOptions, Quantization};
use qlora::open::{OpenOptions, open_model};
use qlora::sampling::GenerationConfig;

/// Generates text.
#[derive(Parser)]
struct Args {
    /// A folder, a GGUF file or a hub id.
    #[arg(long)]
    model: String,
    /// A folder with a PEFT adapter.
    #[arg(long)]
    adapter: Option<PathBuf>,
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
    if let Some(folder) = &args.adapter {
        let adapter = qlora::adapter::load(folder, model.config())?;
        model.set_adapter(adapter.config.lora, adapter.layout, adapter.weights)?;
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
