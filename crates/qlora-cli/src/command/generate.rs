//! `qlora generate`.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use qlora::generate::{Answer, GenerationRequest};
use qlora::model::AdapterChoice;
use qlora::trainer::data::{Conversation, ConversationMessage, JsonLine, read_json_lines};

use crate::chat::{AskArgs, Asker};
use crate::model::Loaded;
use crate::output::{self, remark};

/// Answers a prompt, or every line of a file.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  qlora generate --adapter output \"Where is Rome?\"
  qlora generate --model model.gguf --raw \"Once upon a time\"
  qlora generate --adapter output --batch prompts.jsonl --output answers.jsonl
  qlora generate --adapter a=first --adapter b=second --with all \"Where is Rome?\"")]
pub(crate) struct Args {
    #[command(flatten)]
    ask: AskArgs,
    /// Answers every line of a JSONL file: {"prompt": "..."} or {"messages": [...]}.
    #[arg(long, conflicts_with = "prompt", requires = "output", value_name = "FILE")]
    batch: Option<PathBuf>,
    /// The output file for the answers of --batch: the same lines with "completion".
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Lines of --batch that are answered together: where answers have ended, the next ones begin [default: what the memory
    /// allows, up to 64; 8 on the CPU].
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// The user's message.
    #[arg(required_unless_present = "batch")]
    prompt: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let loaded = args.ask.load()?;
    let (asker, system) = (args.ask.asker(&loaded), args.ask.system());
    if let (Some(input), Some(output)) = (&args.batch, &args.output) {
        return answer_file(&asker, input, output, &system, args.batch_size);
    }
    asker.remark_unused([&Conversation::default()]);
    let text = args.prompt.as_deref().unwrap_or_default();
    let asked = Conversation::new([system, vec![ConversationMessage::new("user", text)]].concat());
    let prompt = asker.encode(&asked, Some(text))?;
    if loaded.all_answer {
        return answer_with_all(&asker, &prompt);
    }
    let (_, figures) = asker.stream(&prompt, 0, || false)?;
    remark(figures);
    Ok(())
}

/// Answers with the base and with every adapter, in one batch.
fn answer_with_all(asker: &Asker<'_>, prompt: &[u32]) -> Result<()> {
    let Loaded { model, files, adapters, .. } = asker.loaded;
    let named = adapters.iter().map(|name| AdapterChoice::Named(name));
    let choices: Vec<AdapterChoice> = [AdapterChoice::Base].into_iter().chain(named).collect();
    let prompts = vec![prompt; choices.len()];
    let request = GenerationRequest::new(&prompts, &asker.config).with_adapters(&choices);
    remark(format!("keys and values: {} at most", request.cache_plan(model)?));
    let answers = request.answer(model, &files.tokenizer)?;
    let names = ["base"].into_iter().chain(adapters.iter().map(String::as_str));
    for (name, answer) in names.zip(answers) {
        output::print(&format!("[{name}] {}\n", answer.text))?;
    }
    Ok(())
}

/// Answers the lines of a JSONL file, several at a time.
fn answer_file(
    asker: &Asker<'_>,
    input: &Path,
    output: &Path,
    system: &[ConversationMessage],
    size: Option<usize>,
) -> Result<()> {
    if output.exists() && input.canonicalize().ok() == output.canonicalize().ok() {
        bail!("{} would be overwritten: give --output another name", input.display());
    }
    let Loaded { model, files, .. } = asker.loaded;
    let (mut rows, mut conversations) = (Vec::new(), Vec::new());
    for JsonLine { number, row, .. } in read_json_lines(input)? {
        let place = || format!("{}, line {number}", input.display());
        let mut asked = Conversation::prompt_from_json(&row).map_err(|error| anyhow!("{}: {error}", place()))?;
        if asked.messages.first().is_none_or(|first| first.role != "system") {
            asked.messages.splice(0..0, system.iter().cloned());
        }
        let prompt = row.get("prompt").and_then(|prompt| prompt.as_str()).filter(|_| row.get("messages").is_none());
        let tokens = asker.encode(&asked, prompt).with_context(place)?;
        rows.push((row, tokens));
        conversations.push(asked);
    }
    asker.remark_unused(&conversations);
    let prompts: Vec<&[u32]> = rows.iter().map(|(_, tokens)| tokens.as_slice()).collect();
    let request = GenerationRequest::new(&prompts, &asker.config);
    let size = size.map_or_else(|| request.default_batch_size(model), |size| Ok(size.max(1)))?;
    let request = request.with_batch_size(size);
    remark(format!("batches of {size}; keys and values: {} at most", request.cache_plan(model)?));
    let bar = output::bar("", "{pos} of {len} answers, {msg}{elapsed}");
    bar.set_length(rows.len() as u64);
    let file = std::fs::File::create(output).with_context(|| output.display().to_string())?;
    let (mut file, start, mut tokens) = (BufWriter::new(file), Instant::now(), 0);
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
    request.answer_batches(model, &files.tokenizer, |first, answers| {
        write(first, answers).map_err(|source| qlora::core::Error::Io { path: output.to_owned(), source })
    })?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let speed = tokens as f64 / seconds;
    let count = rows.len();
    output::print(&format!("{}: {count} answers in {seconds:.1} s, {speed:.0} tokens/s\n", output.display()))?;
    Ok(())
}
