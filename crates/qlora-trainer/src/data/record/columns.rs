//! The columns beside a conversation: its system message, its tools, and further arguments of the chat template.

use serde_json::{Map, Value};

use super::Refusal;

/// The columns beside a conversation.
pub(super) struct ConversationColumns {
    /// The column's name and its text.
    pub(super) system: Option<(&'static str, String)>,
    pub(super) tools: Option<Value>,
    pub(super) template_kwargs: Map<String, Value>,
    /// The names of the columns that are there.
    pub(super) used: Vec<&'static str>,
}

const SYSTEM: [&str; 2] = ["system", "system_prompt"];
const KWARGS: &str = "chat_template_kwargs";
/// The names of variables that a template gets anyway; further arguments of the same names would hide them.
const NO_KWARGS: [&str; 4] = ["messages", "conversation", "tools", "add_generation_prompt"];

impl ConversationColumns {
    pub(super) fn read(row: &Map<String, Value>) -> Result<Self, Refusal> {
        let mut used = Vec::new();
        let mut system = None;
        for column in SYSTEM {
            if system.is_none() && row.contains_key(column) {
                used.push(column);
                system = optional_text(row, column)?.map(|text| (column, text));
            }
        }
        let tools = row.get("tools").map(tools).transpose()?.flatten();
        let template_kwargs = row.get(KWARGS).map(template_kwargs).transpose()?.unwrap_or_default();
        used.extend(["tools", KWARGS].into_iter().filter(|key| row.contains_key(*key)));
        Ok(Self { system, tools, template_kwargs, used })
    }
}

/// A list of tools: as it is, as a text that holds it, or a list of such texts. An empty text is none.
fn tools(value: &Value) -> Result<Option<Value>, Refusal> {
    let list = match value {
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => json_text("tools", text)?,
        other => other.clone(),
    };
    let list = match list {
        Value::Array(list) => list,
        tool @ Value::Object(_) => vec![tool],
        other => return Err(format!("`tools` must be a list of tools, or a text with one, not {}", describe(&other))),
    };
    let one = |(i, tool): (usize, Value)| match tool {
        Value::String(text) => match json_text(&format!("tools[{i}]"), &text)? {
            tool @ Value::Object(_) => Ok(tool),
            other => Err(format!("`tools[{i}]` must be an object, not {}", describe(&other))),
        },
        tool @ Value::Object(_) => Ok(tool),
        other => Err(format!("`tools[{i}]` must be an object, not {}", describe(&other))),
    };
    list.into_iter().enumerate().map(one).collect::<Result<_, _>>().map(|list| Some(Value::Array(list)))
}

fn template_kwargs(value: &Value) -> Result<Map<String, Value>, Refusal> {
    let map = match value {
        Value::Object(map) => map.clone(),
        Value::String(text) if text.trim().is_empty() => return Ok(Map::new()),
        Value::String(text) => match json_text(KWARGS, text)? {
            Value::Object(map) => map,
            other => return Err(format!("`{KWARGS}` must be an object, not {}", describe(&other))),
        },
        other => return Err(format!("`{KWARGS}` must be an object, not {}", describe(other))),
    };
    match NO_KWARGS.into_iter().find(|key| map.contains_key(*key)) {
        Some(key) => Err(format!("`{KWARGS}` must not hold `{key}`, which the template gets from the row itself")),
        None => Ok(map),
    }
}

/// The JSON in a text.
pub(super) fn json_text(key: &str, text: &str) -> Result<Value, Refusal> {
    let value = serde_json::from_str(text)
        .map_err(|error| format!("`{key}` is a text that is not valid JSON ({error}): {:?}", shortened(text)))?;
    Ok(value)
}

/// The beginning of a text, for messages.
fn shortened(text: &str) -> String {
    let short: String = text.chars().take(40).collect();
    if short.len() < text.len() { short + "..." } else { short }
}

/// The fields that are not null, on every level; the items of lists stay.
pub(super) fn without_nulls(map: &Map<String, Value>) -> Map<String, Value> {
    fn value_of(value: &Value) -> Value {
        match value {
            Value::Object(map) => Value::Object(without_nulls(map)),
            Value::Array(list) => Value::Array(list.iter().map(value_of).collect()),
            other => other.clone(),
        }
    }
    map.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value_of(value))).collect()
}

/// A text that may be missing; an empty one is missing.
pub(super) fn optional_text(row: &Map<String, Value>, key: &str) -> Result<Option<String>, Refusal> {
    match row.get(key) {
        None => Ok(None),
        Some(_) => string(row, key).map(|text| Some(text.to_owned()).filter(|text| !text.is_empty())),
    }
}

pub(super) fn string<'a>(row: &'a Map<String, Value>, key: &str) -> Result<&'a str, Refusal> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{key}` must be a string, not {}", describe(other))),
        None => Err(format!("`{key}` is missing")),
    }
}

/// The type of a JSON value, and a short value itself, for messages.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}
