//! Answers a prompt with a model and, if given, an adapter.
//!
//!     cargo run --release --example generate -- --model MODEL --adapter output/adapter "Where is Rome?"
//!
//! Without a prompt a chat begins (`/help` lists its commands); `--batch prompts.jsonl --output answers.jsonl` answers a file.
//! With `--adapter` given several times as NAME=ADAPTER, `--with NAME` chooses one; `--with all` answers with the base and with
//! every adapter, in one batch.

#[path = "support/terminal.rs"]
mod terminal;

use std::collections::BTreeSet;
use std::fmt;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use qlora::adapter;
use qlora::generate::{Answer, AnswerText, CachePlan, answer_all, answer_batch_with, generate};
use qlora::kernels::quant::QuantConfig;
use qlora::model::{AdapterChoice, CausalLm, DeviceChoice, LoadOptions, Quantization};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::sampling::GenerationConfig;
use qlora::trainer::config::TemplateKwargs;
use qlora::trainer::data::{Conversation, JsonLine, Message, TextEncoder, read_json_lines};
use qlora::trainer::encoder::ModelEncoder;
use terminal::{Input, Terminal};

/// Generates text.
#[derive(Parser)]
struct Args {
    /// A folder, a GGUF file or a hub id; if not given, what the first adapter names as its base.
    #[arg(long, required_unless_present = "adapter")]
    model: Option<String>,
    /// A folder or hub id whose tokenizer and chat template are taken instead of the model's own.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// A PEFT adapter: a folder or a hub id; as NAME=ADAPTER it has a name. May be given several times.
    #[arg(long)]
    adapter: Vec<String>,
    /// Which adapter answers: its name, "base" for none, or "all" for all of them (the first one is the default).
    #[arg(long)]
    with: Option<String>,
    /// A file with the chat template to ask with, instead of the adapter's or the model's.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// What the system message says.
    #[arg(long)]
    system: Option<String>,
    /// Further arguments of the chat template, as in training: '{"enable_thinking": false}'.
    #[arg(long, value_name = "JSON", default_value = "{}")]
    chat_template_kwargs: TemplateKwargs,
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
    /// Ends the answer as soon as it occurs, special tokens included; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Prompts run in pieces of so many tokens: smaller ones take less memory.
    #[arg(long)]
    prefill_chunk_size: Option<usize>,
    /// Answers every line of a JSONL file: {"prompt": "..."} or {"messages": [...]}.
    #[arg(long, conflicts_with = "prompt", requires = "output")]
    batch: Option<PathBuf>,
    /// Where the answers of --batch go: the same lines with "completion".
    #[arg(long)]
    output: Option<PathBuf>,
    /// Lines of --batch that are answered together.
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// What the user says. Without it (and without --batch) a chat on the terminal begins.
    prompt: Option<String>,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let args = Args::parse();
    let mut options = OpenOptions { progress: true, tokenizer: args.tokenizer.clone(), ..OpenOptions::default() };
    let mut folders = Vec::new();
    for adapter in &args.adapter {
        let (name, spec) = adapter.split_once('=').unwrap_or((adapter, adapter));
        folders.push((name, adapter::locate(spec, None, &options)?));
    }
    // The model is asked as the adapter that answers was trained: with its tokenizer and its chat template.
    let answering = match args.with.as_deref() {
        None | Some("all") => folders.first(),
        Some(name) => folders.iter().find(|(other, _)| *other == name),
    };
    options.adapter = answering.map(|(_, folder)| folder.clone());
    options.chat_template_path.clone_from(&args.chat_template);
    let mut files = open_model(&base(&args, &folders)?, &options)?;
    let mut adapters = Vec::new();
    for (name, folder) in &folders {
        let adapter = adapter::open_folder(folder, files.source.config())?;
        files = files.with_vocabulary_of(&adapter)?;
        adapters.push((*name, adapter));
    }
    // A checkpoint that is stored quantized stays as it is.
    let quantization = match args.no_quantization || files.source.quantization().is_some() {
        true => Quantization::None,
        false => Quantization::Bits4(QuantConfig::default()),
    };
    let workspace = args.device.open(None, None)?;
    let bar = ProgressBar::new(0)
        .with_style(ProgressStyle::with_template("loading {bar:24} {bytes} of {total_bytes}, {eta} left")?);
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let options = LoadOptions { quantization, progress: Some(&mut progress), ..LoadOptions::default() };
    let mut model = CausalLm::load_on(&*files.source, options, workspace)?;
    bar.finish_and_clear();
    for (name, adapter) in &adapters {
        model.load_adapter(name, adapter).with_context(|| (*name).to_owned())?;
    }
    let names: Vec<&str> = adapters.iter().map(|(name, _)| *name).collect();
    match args.with.as_deref() {
        Some("base" | "all") => {}
        Some(name) => model.activate_adapter(name)?,
        None => names.first().map_or(Ok(()), |name| model.activate_adapter(name))?,
    }

    let config = GenerationConfig {
        max_new_tokens: args.max_new_tokens,
        temperature: (args.temperature > 0.0).then_some(args.temperature),
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        stop_tokens: files.generation.eos_token_ids.clone(),
        stop_strings: [args.stop.clone(), files.generation.stop_strings.clone()].concat(),
        prefill_chunk_size: args.prefill_chunk_size,
        ..GenerationConfig::default()
    };
    eprintln!("{}: {:.2} GB on {}", files.name, model.memory().total() as f64 / 1e9, device_name(&model));
    let encoder = ModelEncoder::new(&files.tokenizer, files.chat_template.as_ref(), &files.generation.eos_token_ids)
        .with_template_kwargs(args.chat_template_kwargs.as_map());
    let talk = Talk { model: &model, files: &files, encoder, config, raw: args.raw };
    talk.remark(&BTreeSet::from_iter(talk.encoder.unused(&Conversation::default())));
    let system: Vec<Message> = args.system.iter().map(|text| Message::new("system", text)).collect();
    if let (Some(input), Some(output)) = (&args.batch, &args.output) {
        return talk.answer_file(input, output, &system, args.batch_size.max(1));
    }
    let Some(prompt) = &args.prompt else { return talk.chat(system) };
    let prompt =
        talk.encode(&Conversation::new([system, vec![Message::new("user", prompt)]].concat()), Some(prompt))?;

    if args.with.as_deref() == Some("all") {
        let lengths = vec![prompt.len(); names.len() + 1];
        eprintln!("keys and values: {} at most", CachePlan::new(&model, lengths, &talk.config)?);
        let choices: Vec<AdapterChoice> =
            [AdapterChoice::Base].into_iter().chain(names.iter().map(|name| AdapterChoice::Named(name))).collect();
        let prompts = vec![prompt.as_slice(); choices.len()];
        let answers = answer_batch_with(&model, &files.tokenizer, &prompts, &talk.config, &choices)?;
        for (name, answer) in ["base"].iter().chain(&names).zip(answers) {
            println!("[{name}] {}", answer.text);
        }
        return Ok(());
    }

    let (_, figures) = talk.stream(&prompt, 0, || false)?;
    eprintln!("{figures}");
    Ok(())
}

/// The model, or what the first adapter names as its base.
fn base(args: &Args, adapters: &[(&str, PathBuf)]) -> anyhow::Result<String> {
    if let Some(model) = &args.model {
        return Ok(model.clone());
    }
    let (name, folder) = adapters.first().context("give --model or --adapter")?;
    let (config, _) = adapter::read_any_config(folder)?;
    config.base_model_name_or_path.with_context(|| format!("{name} names no base model: give --model"))
}

/// The device that a model is on.
fn device_name(model: &CausalLm) -> &'static str {
    if model.workspace().device().is_cpu() { "the CPU" } else { "the GPU" }
}

/// A model that answers.
struct Talk<'a> {
    model: &'a CausalLm,
    files: &'a ModelFiles,
    encoder: ModelEncoder<'a>,
    config: GenerationConfig,
    raw: bool,
}

impl Talk<'_> {
    /// A conversation as tokens, as training writes it; with --raw its last text alone.
    fn encode(&self, conversation: &Conversation, raw: Option<&str>) -> anyhow::Result<Vec<u32>> {
        if let (true, Some(text)) = (self.raw, raw) {
            return Ok(self.files.tokenizer.encode_prompt(text)?);
        }
        self.files
            .chat_template
            .as_ref()
            .context("the model has no chat template: give one with --chat-template, or use --raw")?;
        self.encoder.prompt(conversation).map_err(|error| anyhow!("{error}"))
    }

    /// Says what the chat template does not read.
    fn remark(&self, unused: &BTreeSet<String>) {
        if !self.raw && !unused.is_empty() {
            let names = unused.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            eprintln!("the chat template does not use: {names}");
        }
    }

    /// Prints an answer as it comes, until it ends or `stop` says so, and returns it. No two turns repeat each other's draws.
    fn stream(&self, prompt: &[u32], turn: u64, stop: impl Fn() -> bool) -> anyhow::Result<(String, Figures)> {
        let config = GenerationConfig { seed: self.config.seed_of_row(turn), ..self.config.clone() };
        let cache = CachePlan::new(self.model, [prompt.len()], &config)?;
        let start = Instant::now();
        let mut text = AnswerText::new(&self.files.tokenizer, &config);
        let (mut whole, mut failure, mut first) = (String::new(), None, None);
        let answer = generate(self.model, prompt, &config, |token| match text.push(token) {
            Ok(piece) => {
                first.get_or_insert_with(|| start.elapsed());
                print!("{piece}");
                whole.push_str(&piece);
                // A closed pipe ends the generation, too.
                match !text.is_complete() && !stop() && std::io::stdout().flush().is_ok() {
                    true => ControlFlow::Continue(()),
                    false => ControlFlow::Break(()),
                }
            }
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        })?;
        if let Some(error) = failure {
            return Err(error.into());
        }
        let rest = text.finish()?;
        println!("{rest}");
        let whole_time = start.elapsed();
        let first = first.unwrap_or(whole_time);
        let figures =
            Figures { prompt: prompt.len(), first, answer: answer.tokens.len(), rest: whole_time - first, cache };
        Ok((whole + &rest, figures))
    }

    /// A chat on the terminal, until the input ends.
    fn chat(&self, system: Vec<Message>) -> anyhow::Result<()> {
        let mut terminal = Terminal::open()?;
        let (mut conversation, mut last, mut turn) = (Conversation::new(system.clone()), None::<Figures>, 0);
        eprintln!("Say something. /help lists the commands; Ctrl-D ends the chat.");
        loop {
            let line = match terminal.read()? {
                Input::Say(line) => line,
                Input::Quit => return Ok(()),
                Input::Help => {
                    eprintln!("{}", terminal::HELP);
                    continue;
                }
                Input::Clear => {
                    (conversation, last) = (Conversation::new(system.clone()), None);
                    eprintln!("A new conversation.");
                    continue;
                }
                Input::Stats => {
                    let limit = self.model.config().max_position_embeddings;
                    match &last {
                        Some(figures) => {
                            eprintln!("{figures}\n{} of {limit} tokens used", figures.prompt + figures.answer)
                        }
                        None => eprintln!("no answer yet; the model takes {limit} tokens"),
                    }
                    continue;
                }
            };
            conversation.messages.push(Message::new("user", line.as_str()));
            terminal.begin_answer();
            let prompt = self.encode(&conversation, Some(&line));
            match prompt.and_then(|prompt| self.stream(&prompt, turn, || terminal.is_interrupted())) {
                Ok((answer, figures)) => {
                    conversation.messages.push(Message::new("assistant", answer));
                    last = Some(figures);
                    turn += 1;
                }
                // Such as a message that is too long: the others are still there.
                Err(error) => {
                    eprintln!("{error:#}");
                    conversation.messages.pop();
                }
            }
        }
    }

    /// Answers the lines of a JSONL file, several at a time.
    fn answer_file(&self, input: &Path, output: &Path, system: &[Message], size: usize) -> anyhow::Result<()> {
        if output.exists() && input.canonicalize().ok() == output.canonicalize().ok() {
            bail!("{} would be overwritten: give --output another name", input.display());
        }
        let (mut rows, mut unused) = (Vec::new(), BTreeSet::new());
        for JsonLine { number, row, .. } in read_json_lines(input)? {
            let place = || format!("{}, line {number}", input.display());
            let mut asked = Conversation::prompt_from_json(&row).map_err(|error| anyhow!("{}: {error}", place()))?;
            if asked.messages.first().is_none_or(|first| first.role != "system") {
                asked.messages.splice(0..0, system.iter().cloned());
            }
            let prompt = row.get("prompt").and_then(|prompt| prompt.as_str()).filter(|_| row.get("messages").is_none());
            unused.extend(self.encoder.unused(&asked));
            let tokens = self.encode(&asked, prompt).with_context(place)?;
            rows.push((row, tokens));
        }
        self.remark(&unused);
        let prompts: Vec<&[u32]> = rows.iter().map(|(_, tokens)| tokens.as_slice()).collect();
        eprintln!("keys and values: {} at most", CachePlan::of_batches(self.model, &prompts, &self.config, size)?);
        let bar = ProgressBar::new(rows.len() as u64)
            .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} answers, {msg}{elapsed}, {eta} left")?);
        bar.tick();
        let file = std::fs::File::create(output).with_context(|| output.display().to_string())?;
        let (mut file, start, mut tokens) = (std::io::BufWriter::new(file), Instant::now(), 0);
        let mut write = |first: usize, answers: Vec<Answer>| -> std::io::Result<()> {
            for ((row, _), answer) in rows[first..].iter().zip(&answers) {
                let mut row = row.clone();
                row["completion"] = answer.text.clone().into();
                writeln!(file, "{row}")?;
                tokens += answer.tokens;
            }
            bar.set_message(format!("{:.0} tokens/s, ", tokens as f64 / start.elapsed().as_secs_f64()));
            bar.inc(answers.len() as u64);
            file.flush()
        };
        answer_all(self.model, &self.files.tokenizer, &prompts, &self.config, size, |first, answers| {
            write(first, answers).map_err(|source| qlora::Error::Io { path: output.to_owned(), source })
        })?;
        bar.finish_and_clear();
        let seconds = start.elapsed().as_secs_f64();
        let speed = tokens as f64 / seconds;
        println!("{}: {} answers in {seconds:.1} s, {speed:.0} tokens/s", output.display(), rows.len());
        Ok(())
    }
}

/// How long an answer took, and its memory.
struct Figures {
    prompt: usize,
    /// Until the first token, which belongs to the prompt.
    first: Duration,
    answer: usize,
    rest: Duration,
    cache: CachePlan,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let speed = self.answer.saturating_sub(1) as f64 / self.rest.as_secs_f64().max(1e-9);
        writeln!(f, "keys and values: {} at most", self.cache)?;
        write!(f, "{} tokens of prompt in {:.2} s, ", self.prompt, self.first.as_secs_f64())?;
        write!(f, "{} new tokens at {speed:.1} tokens/s", self.answer)
    }
}
