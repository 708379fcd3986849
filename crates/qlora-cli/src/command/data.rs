//! `qlora data`.

mod histogram;
mod look;

use std::collections::HashMap;
use std::fmt::Write;

use anyhow::{Result, anyhow};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::trainer::TrainConfig;
use qlora::trainer::data::encode::{EncodeOptions, Notes, RowOutcome, encode};
use qlora::trainer::data::{Encoded, PlacedRow, RowSet, training_sets};
use qlora::trainer::encoder::ModelEncoder;
use serde_json::json;

use super::run_args::RunArgs;
use crate::output::{self, BAD, FAINT, TITLE, WARNING};

/// Shows rows as the model will see them, and what is wrong with the data.
///
/// Trained tokens are green, or between ⟦ and ⟧ where there are no colours. Then: lengths, duplicates, what would be cut or left
/// out, and every row that cannot be used, with its line or number.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  qlora data qlora.toml
  qlora data HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl --rows 5
  qlora data HuggingFaceTB/SmolLM2-135M-Instruct 'data/*.parquet' --max-samples 1000
  qlora data qlora.toml --rows 0 --json")]
pub(crate) struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// The number of rows of each set to show.
    #[arg(long, default_value_t = 3)]
    rows: usize,
    /// Put a line between tokens.
    #[arg(long)]
    tokens: bool,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let config = args.run.config()?;
    let files = open_files(&config)?;
    let encoder = ModelEncoder::new(&files.tokenizer, files.chat_template.as_ref(), &files.generation.eos_token_ids)
        .with_template_kwargs(config.data.chat_template_kwargs.as_map());
    let found = read(&config, &training_sets(&config)?, &encoder, args)?;
    if args.json {
        output::print_json(&found.to_json())?;
    } else {
        output::print(&found.to_text(&config))?;
    }
    match found.problems.len() {
        0 => Ok(()),
        1 => Err(anyhow!("one row cannot be used")),
        count => Err(anyhow!("{count} rows cannot be used")),
    }
}

/// The tokenizer and the chat template that a run would have.
fn open_files(config: &TrainConfig) -> Result<ModelFiles> {
    let options = OpenOptions {
        revision: config.model.revision.clone(),
        cache_dir: config.model.cache_dir.clone(),
        offline: config.model.local_files_only,
        tokenizer: config.model.tokenizer_name_or_path.clone(),
        chat_template_path: config.data.chat_template_path.clone(),
        progress: true,
        ..OpenOptions::default()
    };
    Ok(open_model(&config.model.model_name_or_path, &options)?)
}

/// Statistics and remarks collected from the data files of a run.
#[derive(Default)]
struct Found {
    shown: Vec<String>,
    rows: usize,
    /// Tokens of each document, before anything is cut.
    lengths: Vec<usize>,
    tokens: usize,
    trained: usize,
    /// Rows with a place: those that would be cut, left out, and that cannot be used.
    cut: Vec<String>,
    short: Vec<String>,
    left_out: Vec<String>,
    problems: Vec<String>,
    /// Rows that are the same tokens as an earlier one.
    duplicates: Vec<String>,
    unused: Vec<String>,
}

fn read(config: &TrainConfig, sets: &[RowSet], encoder: &ModelEncoder<'_>, args: &Args) -> Result<Found> {
    let options = EncodeOptions::from(&config.data);
    // Lengths are those of whole documents.
    let whole = EncodeOptions { max_length: usize::MAX, ..options };
    let (mut found, mut seen) = (Found::default(), HashMap::<u64, String>::new());
    for set in sets {
        let mut shown_of_set = 0;
        for row in set.rows().take(config.data.max_samples.unwrap_or(usize::MAX)) {
            let PlacedRow { path, place, row, .. } = row?;
            found.rows += 1;
            let place = place.in_file(path);
            let encoded = row.and_then(|row| {
                for name in row.unused {
                    if !found.unused.contains(&name) {
                        found.unused.push(name);
                    }
                }
                encode(&row.record, encoder, &whole)
            });
            let (documents, notes) = match encoded {
                Ok(RowOutcome::Document(document, notes)) => (vec![document], notes),
                // Such as a chosen and a rejected answer.
                Ok(RowOutcome::Group(documents, notes)) => (documents, notes),
                Ok(_) => {
                    found.left_out.push(format!("{place}: no token to train on"));
                    continue;
                }
                Err(message) => {
                    found.problems.push(format!("{place}: {message}"));
                    continue;
                }
            };
            let longest = documents.iter().map(|document| document.ids.len()).max().unwrap_or_default();
            remark(&mut found, &place, longest, notes, config);
            for document in &documents {
                found.lengths.push(document.ids.len());
                found.tokens += document.ids.len();
                found.trained += document.trained_tokens();
            }
            let hash = look::hash(&documents);
            match seen.get(&hash) {
                Some(first) => found.duplicates.push(format!("{place} is {first} again")),
                None => drop(seen.insert(hash, place.clone())),
            }
            if shown_of_set < args.rows {
                shown_of_set += 1;
                found.shown.push(shown(&place, &documents, encoder, args.tokens)?);
            }
        }
    }
    Ok(found)
}

/// A row's documents for the eye; of a pair the chosen one comes first.
fn shown(place: &str, documents: &[Encoded], encoder: &ModelEncoder<'_>, lines: bool) -> Result<String> {
    let mut shown = String::new();
    for (index, document) in documents.iter().enumerate() {
        let text = look::text(document, encoder, lines).map_err(|error| anyhow!("{place}: {error}"))?;
        let (all, trained) = (document.ids.len(), document.trained_tokens());
        let name = match (documents.len(), index) {
            (2, 0) => ", chosen",
            (2, _) => ", rejected",
            _ => "",
        };
        shown += &format!("{TITLE}{place}{name}{TITLE:#}{FAINT}, {all} tokens, {trained} trained{FAINT:#}\n{text}\n");
    }
    Ok(shown)
}

/// Records whether a row is cut, too short, or has answers that are not found.
fn remark(found: &mut Found, place: &str, length: usize, notes: Notes, config: &TrainConfig) {
    if length > config.data.max_length {
        found.cut.push(format!("{place}: {length} tokens"));
    }
    if length < config.data.min_sample_len {
        found.short.push(format!("{place}: {length} tokens"));
    }
    if notes.answers_not_found > 0 {
        let count = notes.answers_not_found;
        found.left_out.push(format!("{place}: {count} answers are not found in what the chat template writes"));
    }
}

/// Places that are listed, of each kind.
const LISTED: usize = 10;

impl Found {
    fn to_text(&self, config: &TrainConfig) -> String {
        let mut text = self.shown.join("\n");
        let documents = self.lengths.len();
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "\n{TITLE}{} rows{TITLE:#}, {documents} documents, {} tokens, {} of them trained",
            self.rows, self.tokens, self.trained
        );
        text += &histogram::text(&self.lengths, config.data.max_length);
        let overlong = format!("longer than max_length = {} (on_overlong)", config.data.max_length);
        let short = format!("shorter than min_sample_len = {}: they are left out", config.data.min_sample_len);
        for (places, what, style) in [
            (&self.duplicates, "duplicates", WARNING),
            (&self.cut, overlong.as_str(), WARNING),
            (&self.short, short.as_str(), WARNING),
            (&self.left_out, "nothing or not all to train on (on_untrained)", WARNING),
            (&self.unused, "columns that are not used", WARNING),
            (&self.problems, "rows that cannot be used", BAD),
        ] {
            if places.is_empty() {
                continue;
            }
            let _ = writeln!(text, "\n{style}{}{style:#} {what}", places.len());
            for place in places.iter().take(LISTED) {
                let _ = writeln!(text, "  {place}");
            }
            if places.len() > LISTED {
                let _ = writeln!(text, "  {FAINT}and {} more{FAINT:#}", places.len() - LISTED);
            }
        }
        text
    }

    fn to_json(&self) -> serde_json::Value {
        json!({
            "rows": self.rows, "documents": self.lengths.len(), "tokens": self.tokens, "trained_tokens": self.trained,
            "lengths": self.lengths, "duplicates": self.duplicates, "overlong": self.cut, "short": self.short, "untrained": self.left_out,
            "unused_columns": self.unused, "problems": self.problems,
        })
    }
}
