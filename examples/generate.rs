//! Answers a prompt with a model and, if given, an adapter. `qlora generate` and `qlora chat` do more: conversations, files of
//! prompts, several adapters at once.
//!
//!     cargo run --release --example generate -- MODEL "Where is Rome?" --adapter output

use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, anyhow};
use clap::Parser;
use qlora::adapter;
use qlora::generate::{AnswerText, generate};
use qlora::kernels::quant::QuantConfig;
use qlora::model::{CausalLm, DeviceChoice, LoadOptions, Quantization};
use qlora::open::{OpenOptions, open_model};
use qlora::sampling::GenerationConfig;
use qlora::trainer::data::{Conversation, ConversationMessage};
use qlora::trainer::encoder::ModelEncoder;

/// Answers a prompt.
#[derive(Parser)]
struct Args {
    /// A folder, a GGUF file or a hub id.
    model: String,
    /// The user's message.
    prompt: String,
    /// The folder of a PEFT adapter.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// auto, cpu, cuda, or such as cuda:1.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let args = Args::parse();
    // With the tokenizer and the chat template of the adapter, where it has them.
    let mut files = open_model(&args.model, &OpenOptions { adapter: args.adapter.clone(), ..OpenOptions::default() })?;
    let adapter =
        args.adapter.as_ref().map(|folder| adapter::open_folder(folder, files.source.config())).transpose()?;
    if let Some(adapter) = &adapter {
        files = files.with_vocabulary_of(adapter)?;
    }
    // A checkpoint that is stored quantized stays as it is.
    let quantization = match files.source.quantization() {
        Some(_) => Quantization::None,
        None => Quantization::Bits4(QuantConfig::default()),
    };
    let options = LoadOptions { quantization, ..LoadOptions::default() };
    let mut model = CausalLm::load_on(&*files.source, options, args.device.open(None, None)?)?;
    if let Some(adapter) = &adapter {
        model.load_adapter("adapter", adapter)?;
        model.activate_adapter("adapter")?;
    }

    let template = files.chat_template.as_ref().context("the model has no chat template")?;
    let encoder = ModelEncoder::new(&files.tokenizer, Some(template), &files.generation.eos_token_ids);
    let conversation = Conversation::new(vec![ConversationMessage::new("user", args.prompt.as_str())]);
    let prompt = encoder.prompt(&conversation).map_err(|error| anyhow!("{error}"))?;
    let config = GenerationConfig {
        stop_tokens: files.generation.eos_token_ids.clone(),
        stop_strings: files.generation.stop_strings.clone(),
        ..GenerationConfig::default()
    };
    let mut text = AnswerText::new(&files.tokenizer, &config);
    generate(&model, &prompt, &config, |token| {
        print!("{}", text.push(token).unwrap_or_default());
        match !text.is_complete() && std::io::stdout().flush().is_ok() {
            true => ControlFlow::Continue(()),
            false => ControlFlow::Break(()),
        }
    })?;
    println!("{}", text.finish()?);
    Ok(())
}
