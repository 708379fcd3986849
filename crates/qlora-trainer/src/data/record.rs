//! The formats of a row.
//!
//! | keys | what it is |
//! |---|---|
//! | `messages` | a conversation: `[{"role": "user", "content": "..."}, ...]` |
//! | `conversations` | the same as ShareGPT writes it: `[{"from": "human", "value": "..."}, ...]` |
//! | `prompt`, `completion` | two texts, or two lists of messages |
//! | `instruction`, `output` (and `input`, `system`, `history`) | Alpaca |
//! | `prompt`, `chosen`, `rejected` | a pair of answers, texts or lists of messages; `prompt` may be left out of them |
//! | `text` | plain text |
//!
//! Beside a conversation stand, if wanted, `system` (or `system_prompt`), which becomes the first message, `tools` and
//! `chat_template_kwargs`; the last two as JSON or as a text that holds JSON.
//!
//! The first format whose first key is there counts; the other keys are ignored and named by [`Row::unused`]. A key whose
//! value is null is a key that is not there, in messages and tools too: files that went through Arrow have every key in every
//! row. In a conversation the assistant's messages are trained, unless one says `"weight": 0` (OpenAI) or `"train": false`;
//! of `prompt` and `completion` only the latter. Unpaired preferences (`prompt`, `completion`, `label`), stepwise supervision and
//! prompts alone, which TRL knows too, are refused by name: no objective reads them.

mod columns;
mod messages;
mod preference;

use serde_json::{Map, Value};

use columns::{ConversationColumns, describe, optional_text, string, without_nulls};
use messages::{Reader, message_list};

pub use preference::Preference;

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ConversationMessage {
    /// The role of the speaker: `system`, `user`, `assistant`, `tool`, or any other that the chat template knows.
    pub role: String,
    /// The text of the message. Of a message that only calls tools this is empty, or the call as ShareGPT writes it.
    pub content: String,
    /// The content as the chat template gets it, where that is not the text: null, or a list of parts.
    pub template_content: Option<Value>,
    /// Everything else, for the chat template: `tool_calls`, `name`, ...
    pub other: Map<String, Value>,
    /// Whether its tokens are trained.
    pub trained: bool,
}

impl ConversationMessage {
    /// A message with nothing but role and content; an assistant's is trained.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let role = role.into();
        let trained = role == ASSISTANT;
        Self { role, content: content.into(), template_content: None, other: Map::new(), trained }
    }
}

/// Messages, and the further inputs of the chat template.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Conversation {
    /// In order.
    pub messages: Vec<ConversationMessage>,
    /// The row's `tools`: the functions that the assistant may call.
    pub tools: Option<Value>,
    /// The row's `chat_template_kwargs`: further arguments of the template, such as `enable_thinking`.
    pub template_kwargs: Map<String, Value>,
    /// Of a row of `prompt` and `completion` the number of messages in the latter, which are the last ones; 0 for other rows.
    pub completion_messages: usize,
}

impl Conversation {
    /// A conversation without tools.
    pub fn new(messages: Vec<ConversationMessage>) -> Self {
        Self { messages, ..Self::default() }
    }

    /// The prompt of a row whose completion is one message that is trained.
    pub(super) fn prompt_of_completion(&self) -> Option<Self> {
        let (last, before) = self.messages.split_last()?;
        let is_answer = self.completion_messages == 1 && !before.is_empty() && last.trained;
        is_answer.then(|| Self { messages: before.to_vec(), completion_messages: 0, ..self.clone() })
    }

    /// Reads a row that asks for an answer: `messages` or `conversations`, or `prompt` as a text or as messages, with
    /// the same columns beside them as in training.
    ///
    /// # Errors
    /// A column that is missing or of the wrong type.
    pub fn prompt_from_json(row: &Value) -> Result<Self, String> {
        let row = object(row)?;
        if row.contains_key("messages") {
            conversation(&row, "messages", Reader::OpenAi)
        } else if row.contains_key("conversations") {
            conversation(&row, "conversations", Reader::ShareGpt)
        } else if let Some(Value::String(prompt)) = row.get("prompt") {
            Ok(with_columns(&row, vec![ConversationMessage::new("user", prompt)])?.0)
        } else if row.contains_key("prompt") {
            conversation(&row, "prompt", Reader::OpenAi)
        } else {
            Err(format!("neither `prompt` nor `messages`; found {}", names(&row)))
        }
    }
}

/// A row and which of its keys mean nothing in its format.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Row {
    /// The row.
    pub record: Record,
    /// The keys that were not read.
    pub unused: Vec<String>,
}

/// A row.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A conversation.
    Chat(Conversation),
    /// A prompt and its completion.
    Completion {
        /// The text.
        prompt: String,
        /// The completion.
        completion: String,
    },
    /// Alpaca. A tokenizer with a chat template sees [`Record::instruction_chat`], another [`Record::instruction_text`].
    Instruction {
        /// The instruction.
        instruction: String,
        /// The input of the instruction; may be empty.
        input: String,
        /// The answer.
        output: String,
        /// The system message, if any.
        system: Option<String>,
        /// Earlier turns: instruction and answer.
        history: Vec<(String, String)>,
    },
    /// A prompt with a chosen and a rejected answer.
    Preference(Box<Preference>),
    /// A text.
    Text(String),
}

const ASSISTANT: &str = "assistant";

/// The reason why a row is none of the formats; the caller adds file and line.
type Refusal = String;

impl Row {
    /// Reads a row.
    ///
    /// # Errors
    /// A column that is missing or of the wrong type.
    pub fn from_json(row: &Value) -> Result<Self, String> {
        let row = object(row)?;
        let has = |key: &str| row.contains_key(key);
        let (record, used) = if has("messages") {
            chat(&row, "messages", Reader::OpenAi)?
        } else if has("conversations") {
            chat(&row, "conversations", Reader::ShareGpt)?
        } else if preference::is_pair(&row) {
            preference::read(&row)?
        } else if has("prompt") || has("completion") {
            completion(&row)?
        } else if has("instruction") {
            instruction(&row)?
        } else if has("text") {
            (Record::Text(string(&row, "text")?.to_owned()), vec!["text"])
        } else {
            return Err(format!(
                "no known keys: expected `messages`, `conversations`, `prompt` and `completion`, `instruction` and \
                 `output`, `chosen` and `rejected`, or `text`; found {}. An entry of [[data.datasets]] says what columns of \
                 other names mean",
                names(&row)
            ));
        };
        let unused = row.keys().filter(|key| !used.contains(&key.as_str())).cloned().collect();
        Ok(Self { record, unused })
    }
}

impl Record {
    /// Reads a row; see [`Row::from_json`] for its unused columns.
    ///
    /// # Errors
    /// A column that is missing or of the wrong type.
    pub fn from_json(row: &Value) -> Result<Self, String> {
        Row::from_json(row).map(|row| row.record)
    }

    /// An Alpaca row as a conversation: the user says the instruction and, on a new line, the input. Only the last
    /// answer is trained. `None` for other rows.
    pub fn instruction_chat(&self) -> Option<Conversation> {
        let Self::Instruction { instruction, input, output, system, history } = self else { return None };
        let mut messages: Vec<_> = system.iter().map(|system| ConversationMessage::new("system", system)).collect();
        for (question, answer) in history {
            messages.push(ConversationMessage::new("user", question));
            messages.push(ConversationMessage { trained: false, ..ConversationMessage::new(ASSISTANT, answer) });
        }
        let question = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n{input}") };
        messages.extend([ConversationMessage::new("user", question), ConversationMessage::new(ASSISTANT, output)]);
        Some(Conversation::new(messages))
    }

    /// An Alpaca row as prompt and completion, with the headings of the Alpaca data set. `None` for other rows.
    pub fn instruction_text(&self) -> Option<(String, String)> {
        let Self::Instruction { instruction, input, output, system, history } = self else { return None };
        let mut prompt = system.as_ref().map(|system| format!("{system}\n\n")).unwrap_or_default();
        for (question, answer) in history {
            prompt += &format!("### Instruction:\n{question}\n\n### Response:\n{answer}\n\n");
        }
        prompt += &format!("### Instruction:\n{instruction}\n\n");
        if !input.is_empty() {
            prompt += &format!("### Input:\n{input}\n\n");
        }
        Some((prompt + "### Response:\n", output.clone()))
    }
}

/// The row's fields that are there.
fn object(row: &Value) -> Result<Map<String, Value>, Refusal> {
    match row {
        Value::Object(row) => Ok(without_nulls(row)),
        other => Err(format!("a row must be a JSON object, not {}", describe(other))),
    }
}

fn names(row: &Map<String, Value>) -> String {
    let keys: Vec<_> = row.keys().map(|key| format!("`{key}`")).collect();
    if keys.is_empty() { "none".to_owned() } else { keys.join(", ") }
}

/// A row's record, and the keys that were read for it.
type Used = (Record, Vec<&'static str>);

fn chat(row: &Map<String, Value>, key: &'static str, reader: Reader) -> Result<Used, Refusal> {
    let (conversation, mut used) = with_columns(row, message_list(&row[key], key, reader)?)?;
    used.push(key);
    Ok((Record::Chat(conversation), used))
}

fn conversation(row: &Map<String, Value>, key: &str, reader: Reader) -> Result<Conversation, Refusal> {
    Ok(with_columns(row, message_list(&row[key], key, reader)?)?.0)
}

/// Messages with the columns that stand beside them, and which of those were used.
fn with_columns(
    row: &Map<String, Value>,
    mut messages: Vec<ConversationMessage>,
) -> Result<(Conversation, Vec<&'static str>), Refusal> {
    let ConversationColumns { system, tools, template_kwargs, mut used } = ConversationColumns::read(row)?;
    if let Some((column, text)) = system {
        match messages.first() {
            // The conversation's own counts; one column that says the same is no news.
            Some(first) if first.role == "system" => used.retain(|&key| key != column || first.content == text),
            _ => messages.insert(0, ConversationMessage::new("system", text)),
        }
    }
    Ok((Conversation { messages, tools, template_kwargs, completion_messages: 0 }, used))
}

/// Rows of TRL's KTO and BCO trainers. As prompt and completion the bad answers would be learned, too.
const UNPAIRED: &str = "`prompt`, `completion` and `label` are an unpaired preference (TRL's KTOTrainer); no objective here reads \
     it. To train on the good answers, keep the rows whose `label` is true and leave the column out; with a good and a bad \
     answer to each prompt write `chosen` and `rejected`, for objective = \"dpo\"";
/// Rows of TRL's process reward models.
const STEPWISE: &str = "`prompt` without `completion`: `completions` and `labels` are steps with a verdict each (TRL's stepwise \
     supervision, for reward models); no objective here reads them";
/// Rows of TRL's online trainers.
const PROMPT_ONLY: &str = "`prompt` without `completion`: a prompt alone (as TRL's GRPO and RLOO trainers read) has nothing to train \
     on; `qlora generate --batch` answers such rows, and its output can be trained on";

fn completion(row: &Map<String, Value>) -> Result<Used, Refusal> {
    const KEYS: [&str; 2] = ["prompt", "completion"];
    if let Some(Value::Bool(_)) = row.get("label") {
        return Err(UNPAIRED.to_owned());
    }
    match KEYS.map(|key| row.get(key)) {
        [None, _] => Err("`completion` without `prompt`".to_owned()),
        [_, None] if row.contains_key("completions") => Err(STEPWISE.to_owned()),
        [_, None] => Err(PROMPT_ONLY.to_owned()),
        [Some(Value::String(prompt)), Some(Value::String(completion))] => {
            Ok((Record::Completion { prompt: prompt.clone(), completion: completion.clone() }, KEYS.to_vec()))
        }
        [Some(prompt @ Value::Array(_)), Some(completion @ Value::Array(_))] => {
            let mut messages = message_list(prompt, "prompt", Reader::OpenAi)?;
            messages.iter_mut().for_each(|message| message.trained = false);
            let completion = message_list(completion, "completion", Reader::OpenAi)?;
            let completion_messages = completion.len();
            messages.extend(completion);
            let (conversation, mut used) = with_columns(row, messages)?;
            used.extend(KEYS);
            Ok((Record::Chat(Conversation { completion_messages, ..conversation }), used))
        }
        [Some(prompt), Some(completion)] => Err(format!(
            "`prompt` and `completion` must be two strings or two lists of messages, not {} and {}",
            describe(prompt),
            describe(completion)
        )),
    }
}

fn instruction(row: &Map<String, Value>) -> Result<Used, Refusal> {
    let history = match row.get("history") {
        None => Vec::new(),
        Some(value) => turns(value).ok_or("`history` must be a list of [instruction, answer] pairs of strings")?,
    };
    let mut used = vec!["instruction", "input", "output", "history", "system"];
    let mut system = optional_text(row, "system")?;
    if system.is_none() {
        system = optional_text(row, "system_prompt")?;
        used.push("system_prompt");
    }
    let record = Record::Instruction {
        instruction: string(row, "instruction")?.to_owned(),
        input: optional_text(row, "input")?.unwrap_or_default(),
        output: string(row, "output")?.to_owned(),
        system,
        history,
    };
    Ok((record, used))
}

fn turns(value: &Value) -> Option<Vec<(String, String)>> {
    let turn = |pair: &Value| match pair.as_array()?.as_slice() {
        [question, answer] => Some((question.as_str()?.to_owned(), answer.as_str()?.to_owned())),
        _ => None,
    };
    value.as_array()?.iter().map(turn).collect()
}

#[cfg(test)]
mod tests;
