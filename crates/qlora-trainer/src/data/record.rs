//! The formats of a row.
//!
//! | keys | what it is |
//! |---|---|
//! | `messages` (and `tools`) | a conversation: `[{"role": "user", "content": "..."}, ...]` |
//! | `conversations` | the same as ShareGPT writes it: `[{"from": "human", "value": "..."}, ...]` |
//! | `prompt`, `completion` | two texts, or two lists of messages |
//! | `instruction`, `output` (and `input`, `system`, `history`) | Alpaca |
//! | `text` | plain text |
//!
//! The first format whose first key is there counts; other keys are ignored. In a conversation the assistant's messages
//! are trained, unless one says `"weight": 0` (OpenAI) or `"train": false`; of `prompt` and `completion` only the latter.

use serde_json::{Map, Value};

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or whatever else the chat template knows.
    pub role: String,
    /// What is said.
    pub content: String,
    /// Everything else, for the chat template: `tool_calls`, `name`, ...
    pub other: Map<String, Value>,
    /// Whether its tokens are trained.
    pub trained: bool,
}

impl Message {
    /// A message with nothing but role and content; an assistant's is trained.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let role = role.into();
        let trained = role == ASSISTANT;
        Self { role, content: content.into(), other: Map::new(), trained }
    }
}

/// Messages, and the tools that the assistant may call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// In order.
    pub messages: Vec<Message>,
    /// The row's `tools`, for the chat template.
    pub tools: Option<Value>,
}

/// A row.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A conversation.
    Chat(Conversation),
    /// A text and how it goes on.
    Completion {
        /// The text.
        prompt: String,
        /// How it goes on.
        completion: String,
    },
    /// Alpaca. A tokenizer with a chat template sees [`Record::instruction_chat`], another [`Record::instruction_text`].
    Instruction {
        /// What to do.
        instruction: String,
        /// With what; may be empty.
        input: String,
        /// The answer.
        output: String,
        /// The system message, if any.
        system: Option<String>,
        /// Earlier turns: instruction and answer.
        history: Vec<(String, String)>,
    },
    /// A text.
    Text(String),
}

const ASSISTANT: &str = "assistant";

/// Why a row is none of the formats; the caller adds file and line.
type Refusal = String;

impl Record {
    /// Reads a row.
    ///
    /// # Errors
    /// What is missing or of the wrong type.
    pub fn from_json(row: &Value) -> Result<Self, Refusal> {
        let Value::Object(row) = row else {
            return Err(format!("a row must be a JSON object, not {}", describe(row)));
        };
        let has = |key: &str| row.get(key).is_some_and(|value| !value.is_null());
        if has("messages") {
            chat(row, "messages", message)
        } else if has("conversations") {
            chat(row, "conversations", sharegpt_message)
        } else if has("chosen") && has("rejected") {
            Err("preference data (`chosen`, `rejected`) is not supported; keep `prompt` and one `completion`"
                .to_owned())
        } else if has("prompt") || has("completion") {
            completion(row)
        } else if has("instruction") {
            instruction(row)
        } else if has("text") {
            Ok(Self::Text(string(row, "text")?.to_owned()))
        } else {
            let keys: Vec<_> = row.keys().map(|key| format!("`{key}`")).collect();
            let found = if keys.is_empty() { "none".to_owned() } else { keys.join(", ") };
            Err(format!(
                "no known keys: expected `messages`, `conversations`, `prompt` and `completion`, `instruction` and \
                 `output`, or `text`; found {found}"
            ))
        }
    }

    /// An Alpaca row as a conversation: the user says the instruction and, on a new line, the input. Only the last
    /// answer is trained. `None` for other rows.
    pub fn instruction_chat(&self) -> Option<Conversation> {
        let Self::Instruction { instruction, input, output, system, history } = self else { return None };
        let mut messages: Vec<_> = system.iter().map(|system| Message::new("system", system)).collect();
        for (question, answer) in history {
            messages.push(Message::new("user", question));
            messages.push(Message { trained: false, ..Message::new(ASSISTANT, answer) });
        }
        let question = if input.is_empty() { instruction.clone() } else { format!("{instruction}\n{input}") };
        messages.extend([Message::new("user", question), Message::new(ASSISTANT, output)]);
        Some(Conversation { messages, tools: None })
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

fn chat(
    row: &Map<String, Value>,
    key: &str,
    read: fn(&Map<String, Value>) -> Result<Message, Refusal>,
) -> Result<Record, Refusal> {
    let messages = message_list(&row[key], key, read)?;
    let tools = row.get("tools").filter(|tools| !tools.is_null()).cloned();
    Ok(Record::Chat(Conversation { messages, tools }))
}

fn message_list(
    value: &Value,
    key: &str,
    read: fn(&Map<String, Value>) -> Result<Message, Refusal>,
) -> Result<Vec<Message>, Refusal> {
    let Value::Array(list) = value else {
        return Err(format!("`{key}` must be a list of messages, not {}", describe(value)));
    };
    if list.is_empty() {
        return Err(format!("`{key}` is empty"));
    }
    let read_one = |(i, value): (usize, &Value)| match value {
        Value::Object(entry) => read(entry).map_err(|problem| format!("`{key}[{i}]`: {problem}")),
        other => Err(format!("`{key}[{i}]` must be an object, not {}", describe(other))),
    };
    list.iter().enumerate().map(read_one).collect()
}

/// `{"role": ..., "content": ...}` and whatever else the chat template wants.
fn message(entry: &Map<String, Value>) -> Result<Message, Refusal> {
    let role = string(entry, "role")?.to_owned();
    let content = match entry.get("content") {
        // An assistant's message that only calls tools has no content.
        None | Some(Value::Null) if entry.contains_key("tool_calls") => String::new(),
        Some(Value::Array(parts)) => text_parts(parts)?,
        _ => string(entry, "content")?.to_owned(),
    };
    let mut other = entry.clone();
    for key in ["role", "content", "weight", "train"] {
        other.shift_remove(key);
    }
    let trained = role == ASSISTANT && message_is_trained(entry)?;
    Ok(Message { role, content, other, trained })
}

fn message_is_trained(entry: &Map<String, Value>) -> Result<bool, Refusal> {
    match (entry.get("weight"), entry.get("train")) {
        (None | Some(Value::Null), None | Some(Value::Null)) => Ok(true),
        (Some(weight), None) => match weight.as_f64() {
            Some(weight) if weight == 0.0 || weight == 1.0 => Ok(weight == 1.0),
            _ => Err(format!("`weight` must be 0 or 1, not {}", describe(weight))),
        },
        (None, Some(train)) => {
            train.as_bool().ok_or_else(|| format!("`train` must be true or false, not {}", describe(train)))
        }
        (Some(_), Some(_)) => Err("has both `weight` and `train`".to_owned()),
    }
}

/// Content as a list of parts, `{"type": "text", "text": ...}`, joined.
fn text_parts(parts: &[Value]) -> Result<String, Refusal> {
    let mut text = String::new();
    for part in parts {
        match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text"), Some(piece)) => text += piece,
            (Some(kind), _) => return Err(format!("a content part of type \"{kind}\" is not supported, only text")),
            (None, _) => return Err("a content part must have a `type`".to_owned()),
        }
    }
    Ok(text)
}

/// `{"from": ..., "value": ...}`, with ShareGPT's names for the roles.
fn sharegpt_message(entry: &Map<String, Value>) -> Result<Message, Refusal> {
    // Some files hold OpenAI's messages under ShareGPT's name.
    if !entry.contains_key("from") && entry.contains_key("role") {
        return message(entry);
    }
    let role = match string(entry, "from")? {
        "human" | "user" => "user",
        "gpt" | "chatgpt" | "bing" | "bard" | "model" | ASSISTANT => ASSISTANT,
        "observation" | "function_response" | "tool" => "tool",
        "system" => "system",
        other => return Err(format!("unknown `from` \"{other}\": expected human, gpt, system or tool")),
    };
    let trained = role == ASSISTANT && message_is_trained(entry)?;
    Ok(Message { trained, ..Message::new(role, string(entry, "value")?) })
}

fn completion(row: &Map<String, Value>) -> Result<Record, Refusal> {
    let [prompt, answer] = ["prompt", "completion"].map(|key| row.get(key).filter(|value| !value.is_null()));
    match (prompt, answer) {
        (None, _) => Err("`completion` without `prompt`".to_owned()),
        (_, None) => Err("`prompt` without `completion`".to_owned()),
        (Some(Value::String(prompt)), Some(Value::String(completion))) => {
            Ok(Record::Completion { prompt: prompt.clone(), completion: completion.clone() })
        }
        (Some(prompt @ Value::Array(_)), Some(completion @ Value::Array(_))) => {
            let mut messages = message_list(prompt, "prompt", message)?;
            messages.iter_mut().for_each(|message| message.trained = false);
            messages.extend(message_list(completion, "completion", message)?);
            let tools = row.get("tools").filter(|tools| !tools.is_null()).cloned();
            Ok(Record::Chat(Conversation { messages, tools }))
        }
        (Some(prompt), Some(completion)) => Err(format!(
            "`prompt` and `completion` must be two strings or two lists of messages, not {} and {}",
            describe(prompt),
            describe(completion)
        )),
    }
}

fn instruction(row: &Map<String, Value>) -> Result<Record, Refusal> {
    let optional = |key: &str| match row.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => string(row, key).map(|text| Some(text.to_owned()).filter(|text| !text.is_empty())),
    };
    let history = match row.get("history") {
        None | Some(Value::Null) => Vec::new(),
        Some(value) => turns(value).ok_or("`history` must be a list of [instruction, answer] pairs of strings")?,
    };
    Ok(Record::Instruction {
        instruction: string(row, "instruction")?.to_owned(),
        input: optional("input")?.unwrap_or_default(),
        output: string(row, "output")?.to_owned(),
        system: optional("system")?,
        history,
    })
}

fn turns(value: &Value) -> Option<Vec<(String, String)>> {
    let turn = |pair: &Value| match pair.as_array()?.as_slice() {
        [question, answer] => Some((question.as_str()?.to_owned(), answer.as_str()?.to_owned())),
        _ => None,
    };
    value.as_array()?.iter().map(turn).collect()
}

fn string<'a>(row: &'a Map<String, Value>, key: &str) -> Result<&'a str, Refusal> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{key}` must be a string, not {}", describe(other))),
        None => Err(format!("`{key}` is missing")),
    }
}

/// What a JSON value is, for messages.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(row: Value) -> Record {
        Record::from_json(&row).unwrap()
    }

    fn refusal(row: Value) -> String {
        Record::from_json(&row).unwrap_err()
    }

    fn roles(record: Record) -> Vec<(String, String, bool)> {
        let Record::Chat(conversation) = record else { panic!("{record:?}") };
        conversation.messages.into_iter().map(|m| (m.role, m.content, m.trained)).collect()
    }

    fn turn(role: &str, content: &str, trained: bool) -> (String, String, bool) {
        (role.into(), content.into(), trained)
    }

    #[test]
    fn conversations_train_the_assistant() {
        let expected = [turn("system", "s", false), turn("user", "q", false), turn("assistant", "a", true)];
        let messages = json!([
            {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        assert_eq!(roles(read(json!({"messages": messages, "id": 7}))), expected);
        assert_eq!(roles(read(json!({"conversations": messages}))), expected);
        let sharegpt = json!([
            {"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
        assert_eq!(roles(read(json!({"conversations": sharegpt}))), expected);
        let (prompt, completion) = (&messages.as_array().unwrap()[..2], &messages.as_array().unwrap()[2..]);
        assert_eq!(roles(read(json!({"prompt": prompt, "completion": completion}))), expected);
    }

    #[test]
    fn single_messages_can_be_left_out() {
        let row = json!({"messages": [
            {"role": "assistant", "content": "a", "weight": 0}, {"role": "assistant", "content": "b", "weight": 1},
            {"role": "assistant", "content": "c", "train": false}, {"role": "user", "content": "d", "train": true}]});
        let trained: Vec<_> = roles(read(row)).into_iter().map(|turn| turn.2).collect();
        assert_eq!(trained, [false, true, false, false]);
        // What the assistant said in the prompt is not trained.
        let row = json!({"prompt": [{"role": "assistant", "content": "a"}],
                         "completion": [{"role": "assistant", "content": "b"}]});
        assert_eq!(roles(read(row)), [turn("assistant", "a", false), turn("assistant", "b", true)]);
    }

    #[test]
    fn what_the_template_needs_is_kept() {
        let row = json!({"tools": [{"name": "f"}], "messages": [
            {"role": "assistant", "tool_calls": [{"name": "f"}], "content": null, "weight": 1},
            {"role": "tool", "name": "f", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]}]});
        let Record::Chat(conversation) = read(row) else { unreachable!() };
        assert_eq!(conversation.tools, Some(json!([{"name": "f"}])));
        assert_eq!(Value::Object(conversation.messages[0].other.clone()), json!({"tool_calls": [{"name": "f"}]}));
        assert_eq!(conversation.messages[1].content, "12");
        assert_eq!(conversation.messages[1].other["name"], "f");
    }

    #[test]
    fn texts_and_instructions() {
        assert_eq!(read(json!({"text": "t"})), Record::Text("t".into()));
        let completion = Record::Completion { prompt: "p".into(), completion: "c".into() };
        assert_eq!(read(json!({"prompt": "p", "completion": "c", "text": "ignored"})), completion);
        let plain = read(json!({"instruction": "do", "input": "", "output": "done"}));
        assert_eq!(plain.instruction_text().unwrap().0, "### Instruction:\ndo\n\n### Response:\n");
        assert_eq!(plain.instruction_chat().unwrap().messages[0].content, "do");
        let full = read(json!({"instruction": "do", "input": "it", "output": "done", "system": "be",
                               "history": [["a", "b"]]}));
        let chat = full.instruction_chat().unwrap().messages;
        let summary: Vec<_> = chat.iter().map(|m| (m.role.as_str(), m.content.as_str(), m.trained)).collect();
        assert_eq!(
            summary,
            [
                ("system", "be", false),
                ("user", "a", false),
                ("assistant", "b", false),
                ("user", "do\nit", false),
                ("assistant", "done", true)
            ]
        );
        let (prompt, answer) = full.instruction_text().unwrap();
        assert_eq!(answer, "done");
        assert_eq!(
            prompt,
            "be\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\ndo\n\n### Input:\nit\n\n### Response:\n"
        );
    }

    #[test]
    fn refusals_name_the_key() {
        for (row, part) in [
            (json!([1]), "a row must be a JSON object, not a list"),
            (json!({}), "found none"),
            (json!({"question": 1, "answer": 2}), "found `question`, `answer`"),
            (json!({"messages": "hello"}), "`messages` must be a list of messages, not a string"),
            (json!({"messages": []}), "`messages` is empty"),
            (json!({"messages": ["x"]}), "`messages[0]` must be an object, not a string"),
            (json!({"messages": [{"role": "user"}]}), "`messages[0]`: `content` is missing"),
            (json!({"messages": [{"content": "x"}]}), "`messages[0]`: `role` is missing"),
            (json!({"messages": [{"role": "user", "content": 5}]}), "`content` must be a string, not the number 5"),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
                "type \"image\" is not supported",
            ),
            (json!({"messages": [{"role": "assistant", "content": "", "weight": 0.5}]}), "`weight` must be 0 or 1"),
            (json!({"conversations": [{"from": "alien", "value": "x"}]}), "unknown `from` \"alien\""),
            (json!({"prompt": "p"}), "`prompt` without `completion`"),
            (json!({"completion": "p"}), "`completion` without `prompt`"),
            (json!({"prompt": "p", "completion": []}), "not a string and a list"),
            (json!({"prompt": "p", "chosen": "a", "rejected": "b"}), "preference data"),
            (json!({"instruction": "i"}), "`output` is missing"),
            (json!({"instruction": "i", "output": "o", "history": [["a"]]}), "`history` must be a list of"),
            (json!({"text": null}), "no known keys"),
            (json!({"text": 3}), "`text` must be a string"),
        ] {
            let message = refusal(row.clone());
            assert!(message.contains(part), "{row}: {message}");
        }
    }
}
