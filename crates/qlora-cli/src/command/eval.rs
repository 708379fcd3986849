//! `qlora eval`.

use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use qlora::open::OpenOptions;
use qlora::trainer::config::{OnOverlong, OnUntrained};
use qlora::trainer::data::load::load;
use qlora::trainer::data::loader::eval_batches;
use qlora::trainer::data::{EncodeOptions, Filters, PlacedRow, Record, RowSet};
use qlora::trainer::exact_match::{AnsweredRow, answers};
use serde_json::json;

use crate::model::ModelArgs;
use crate::output::{self, TITLE};

/// Measures a model on rows: loss, perplexity and, if asked for, exact answers.
///
/// The loss is that of training: over completions and the assistant's messages, unless --all-tokens.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  qlora eval --adapter output heldout.jsonl
  qlora eval --adapter output --with base heldout.jsonl --exact-match --json")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The data to evaluate on, as for training: files of rows, folders, patterns, - for standard input, ids of data
    /// sets on the hub.
    #[arg(required = true)]
    data: Vec<PathBuf>,
    /// The longest document in tokens; longer ones are cut.
    #[arg(long, default_value_t = 1024)]
    max_length: usize,
    /// Documents that are computed together.
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// The loss of every token, not only of answers.
    #[arg(long)]
    all_tokens: bool,
    /// Answers the last message of every conversation greedily, and counts the answers that are those of the data, character for
    /// character.
    #[arg(long)]
    exact_match: bool,
    /// Most tokens of such an answer.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let loaded = args.model.load()?;
    ensure!(!loaded.all_answer, "--with all is for `qlora generate`; name one adapter, or base");
    let encoder = loaded.encoder(&args.model);
    let options = EncodeOptions {
        max_length: args.max_length,
        on_overlong: OnOverlong::Truncate,
        on_untrained: OnUntrained::Skip,
        completion_only_loss: !args.all_tokens,
    };
    let set = RowSet::find(&args.data, &OpenOptions { progress: true, ..OpenOptions::default() })?;
    let (data, _) = load(std::slice::from_ref(&set), &encoder, &options, &Filters::default())?;
    output::remark(data.stats());
    let batch_size = args.batch_size.max(1);
    let bar = output::bar("loss", "{pos} of {len} batches");
    bar.set_length(data.len().div_ceil(batch_size) as u64);
    let (mut sum, mut tokens) = (0.0, 0);
    for batch in eval_batches(&data, batch_size) {
        let loss = loaded.model.evaluate(&batch)?;
        sum += loss.sum;
        tokens += loss.trained_tokens;
        bar.inc(1);
    }
    bar.finish_and_clear();
    ensure!(tokens > 0, "the rows have no token with a loss");
    let loss = sum / tokens as f64;
    let given = if args.exact_match { Some(given_answers(args, &set, &loaded)?) } else { None };
    let right = |given: &[AnsweredRow]| given.iter().filter(|answer| answer.is_exact()).count();
    if args.json {
        let value = json!({
            "documents": data.len(), "tokens": tokens, "loss": loss, "perplexity": loss.exp(),
            "exact_match": given.map(|given| json!({ "exact": right(&given), "rows": given.len() })),
        });
        return Ok(output::print_json(&value)?);
    }
    let mut text = format!("{TITLE}loss{TITLE:#}        {loss:.4} over {tokens} tokens of {} documents\n", data.len());
    text += &format!("{TITLE}perplexity{TITLE:#}  {:.3}\n", loss.exp());
    if let Some(given) = given {
        text += &format!("{TITLE}exact{TITLE:#}       {} of {} answers\n", right(&given), given.len());
        if let Some(answer) = given.first() {
            let line = |text: &str| text.trim().replace('\n', " ");
            text += &format!("\nfor example: {}\n  expected   {}\n", line(&answer.prompt), line(&answer.expected));
            text += &format!("  given      {}\n", line(&answer.given));
        }
    }
    Ok(output::print(&text)?)
}

/// The model's answer to each row.
fn given_answers(args: &Args, set: &RowSet, loaded: &crate::model::Loaded) -> Result<Vec<AnsweredRow>> {
    let record = |row: qlora::trainer::Result<PlacedRow<'_>>| -> Result<Record> {
        let PlacedRow { path, place, row, .. } = row?;
        Ok(row.map_err(|message| anyhow!("{}: {message}", place.in_file(path)))?.record)
    };
    let records = set.rows().map(record).collect::<Result<Vec<_>>>()?;
    let encoder = loaded.encoder(&args.model);
    let bar = output::bar("answers", "{pos} of {len}");
    bar.set_length(records.len() as u64);
    let progress = |done: usize| bar.set_position(done as u64);
    let (new, size) = (args.max_new_tokens, args.batch_size.max(1));
    let given = answers(&loaded.model, &loaded.files.tokenizer, &encoder, &records, new, size, progress)?;
    bar.finish_and_clear();
    Ok(given)
}
