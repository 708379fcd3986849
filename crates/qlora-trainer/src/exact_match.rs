//! The exact-match rate of a model's greedy answers, compared with the expected ones character for character.

use std::fmt;

use qlora_core::adapter::PeftAdapter;
use qlora_core::generate::GenerationRequest;
use qlora_core::merge::{MergeInto, MergedSource, PeftUpdate, Rounding};
use qlora_core::model::{CausalLm, LoadOptions, Quantization};
use qlora_core::open::ModelFiles;
use qlora_core::sampling::GenerationConfig;
use qlora_core::tokenizer::Tokenizer;

use crate::data::{Conversation, Record};
use crate::encoder::ModelEncoder;
use crate::error::{Error, Result};

/// One row of an evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AnsweredRow {
    /// The last message before the answer.
    pub prompt: String,
    /// The answer in the data.
    pub expected: String,
    /// The answer of the model.
    pub given: String,
}

impl AnsweredRow {
    /// Whether the two are equal, but for white space around them.
    pub fn is_exact(&self) -> bool {
        self.expected.trim() == self.given.trim()
    }
}

/// Answers the last user message of every conversation greedily, `batch_size` at a time. `progress` is called with the
/// number of rows done.
///
/// # Errors
/// If a row is no conversation that ends with an assistant's message, or generation fails.
pub fn answers(
    model: &CausalLm,
    tokenizer: &Tokenizer,
    encoder: &ModelEncoder,
    records: &[Record],
    max_new_tokens: usize,
    batch_size: usize,
    mut progress: impl FnMut(usize),
) -> Result<Vec<AnsweredRow>> {
    let mut rows = Vec::with_capacity(records.len());
    for (index, record) in records.iter().enumerate() {
        rows.push(row(record, encoder).map_err(|message| Error::Invalid(format!("row {}: {message}", index + 1)))?);
    }
    let config = GenerationConfig { max_new_tokens, temperature: None, ..GenerationConfig::default() };
    let mut answers = Vec::with_capacity(rows.len());
    for chunk in rows.chunks(batch_size.max(1)) {
        let prompts: Vec<&[u32]> = chunk.iter().map(|(_, _, tokens)| tokens.as_slice()).collect();
        let generations = GenerationRequest::new(&prompts, &config).run(model)?;
        for ((prompt, expected, _), generation) in chunk.iter().zip(generations) {
            let given = tokenizer.decode(&generation.tokens, true)?;
            answers.push(AnsweredRow { prompt: prompt.clone(), expected: expected.clone(), given });
        }
        progress(answers.len());
    }
    Ok(answers)
}

/// Rows that are answered together where merges are compared.
const TOGETHER: usize = 25;

/// Exact answers of an adapter over its base, and of the models that merging makes of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MergeMatch {
    /// Rows that were answered.
    pub rows: usize,
    /// Exact answers of base and adapter.
    pub unmerged: usize,
    /// Exact answers after merging into the dequantized weights; none if the base is not quantized while loading.
    pub dequantized: Option<usize>,
    /// Exact answers after merging into the original weights.
    pub original: usize,
}

impl fmt::Display for MergeMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} with base and adapter", self.unmerged, self.rows)?;
        if let Some(dequantized) = self.dequantized {
            write!(f, ", {dequantized} merged into the dequantized weights")?;
        }
        write!(f, ", {} merged into the original weights", self.original)
    }
}

/// Answers `records` with `adapter` over its base, which is held as `quantization` says, and with each merged model in
/// `rounding`'s precision. One model is loaded at a time, and nothing is written. `progress` is called with what is
/// measured and its number of rows done.
///
/// # Errors
/// As [`answers`]; also if a model cannot be loaded or merged.
pub fn merge_match(
    files: &ModelFiles,
    adapter: &PeftAdapter,
    quantization: Quantization,
    rounding: Rounding,
    records: &[Record],
    max_new_tokens: usize,
    mut progress: impl FnMut(&str, usize),
) -> Result<MergeMatch> {
    let encoder = ModelEncoder::new(&files.tokenizer, files.chat_template.as_ref(), &files.generation.eos_token_ids);
    let mut exact = |model: &CausalLm, what: &str| -> Result<usize> {
        let progress = |done| progress(what, done);
        let answers = answers(model, &files.tokenizer, &encoder, records, max_new_tokens, TOGETHER, progress)?;
        Ok(answers.iter().filter(|answer| answer.is_exact()).count())
    };
    let mut model = CausalLm::load(&*files.source, LoadOptions { quantization, ..LoadOptions::default() })?;
    model.load_adapter("adapter", adapter)?;
    model.activate_adapter("adapter")?;
    let unmerged = exact(&model, "base and adapter")?;
    drop(model);
    let update = PeftUpdate::new(adapter, &*files.source)?;
    let mut merged = |into: MergeInto| -> Result<usize> {
        let source = MergedSource::new(&*files.source, &update, into, rounding)?;
        exact(&CausalLm::load(&source, LoadOptions::default())?, &format!("merged, {into}"))
    };
    let dequantized = match quantization {
        Quantization::Bits4(config) => Some(merged(MergeInto::Dequantized(config))?),
        _ => None,
    };
    Ok(MergeMatch { rows: records.len(), unmerged, dequantized, original: merged(MergeInto::Original)? })
}

/// The last user message, the expected answer, and the prompt as tokens.
fn row(record: &Record, encoder: &ModelEncoder) -> std::result::Result<(String, String, Vec<u32>), String> {
    let Record::Chat(conversation) = record else {
        return Err("only conversations have an answer to compare".into());
    };
    let Some((answer, before)) = conversation.messages.split_last().filter(|(last, _)| last.role == "assistant") else {
        return Err("the conversation does not end with the assistant's message".into());
    };
    let asked = Conversation { messages: before.to_vec(), ..conversation.clone() };
    let prompt = before.last().map(|message| message.content.clone()).unwrap_or_default();
    let tokens = encoder.prompt(&asked).map_err(|error| error.to_string())?;
    Ok((prompt, answer.content.clone(), tokens))
}
