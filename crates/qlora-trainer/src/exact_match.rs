//! How often a model's greedy answer equals the expected one, character for character.

use qlora_core::generate::generate_batch;
use qlora_core::model::CausalLm;
use qlora_core::sampling::GenerationConfig;
use qlora_core::tokenizer::Tokenizer;

use crate::data::{Conversation, Record};
use crate::encoder::ModelEncoder;
use crate::error::{Error, Result};

/// One row of an evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The last message before the answer.
    pub prompt: String,
    /// What the data says.
    pub expected: String,
    /// What the model says.
    pub given: String,
}

impl Answer {
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
) -> Result<Vec<Answer>> {
    let mut rows = Vec::with_capacity(records.len());
    for (index, record) in records.iter().enumerate() {
        rows.push(row(record, encoder).map_err(|message| Error::Invalid(format!("row {}: {message}", index + 1)))?);
    }
    let config = GenerationConfig { max_new_tokens, temperature: None, ..GenerationConfig::default() };
    let mut answers = Vec::with_capacity(rows.len());
    for chunk in rows.chunks(batch_size.max(1)) {
        let prompts: Vec<&[u32]> = chunk.iter().map(|(_, _, tokens)| tokens.as_slice()).collect();
        let generations = generate_batch(model, &prompts, &config)?;
        for ((prompt, expected, _), generation) in chunk.iter().zip(generations) {
            let given = tokenizer.decode(&generation.tokens, true)?;
            answers.push(Answer { prompt: prompt.clone(), expected: expected.clone(), given });
        }
        progress(answers.len());
    }
    Ok(answers)
}

/// The last user message, the expected answer, and the prompt as tokens.
fn row(record: &Record, encoder: &ModelEncoder) -> std::result::Result<(String, String, Vec<u32>), String> {
    let Record::Chat(conversation) = record else {
        return Err("only conversations have an answer to compare".into());
    };
    let Some((answer, before)) = conversation.messages.split_last().filter(|(last, _)| last.role == "assistant") else {
        return Err("the conversation does not end with the assistant's message".into());
    };
    let asked = Conversation { messages: before.to_vec(), tools: conversation.tools.clone() };
    let prompt = before.last().map(|message| message.content.clone()).unwrap_or_default();
    let tokens = encoder.prompt(&asked).map_err(|error| error.to_string())?;
    Ok((prompt, answer.content.clone(), tokens))
}
