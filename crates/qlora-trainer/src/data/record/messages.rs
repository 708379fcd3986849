//! The messages of a conversation, as OpenAI and as ShareGPT write them.

use serde_json::{Map, Value, json};

use super::columns::{describe, json_text, string};
use super::{ASSISTANT, ConversationMessage, Refusal};

/// The format of a list of messages.
#[derive(Clone, Copy)]
pub(super) enum Reader {
    /// `{"role": ..., "content": ...}`.
    OpenAi,
    /// `{"from": ..., "value": ...}`, or the other form under this name.
    ShareGpt,
}

pub(super) fn message_list(value: &Value, key: &str, reader: Reader) -> Result<Vec<ConversationMessage>, Refusal> {
    let parsed = match value {
        Value::String(text) if text.trim_start().starts_with('[') => Some(json_text(key, text)?),
        _ => None,
    };
    let value = parsed.as_ref().unwrap_or(value);
    let Value::Array(list) = value else {
        return Err(format!("`{key}` must be a list of messages, not {}", describe(value)));
    };
    if list.is_empty() {
        return Err(format!("`{key}` is empty"));
    }
    let read_one = |(i, value): (usize, &Value)| match (value, reader) {
        (Value::Object(entry), Reader::OpenAi) => message(entry).map_err(|problem| format!("`{key}[{i}]`: {problem}")),
        (Value::Object(entry), Reader::ShareGpt) => {
            sharegpt_message(entry).map_err(|problem| format!("`{key}[{i}]`: {problem}"))
        }
        (other, _) => Err(format!("`{key}[{i}]` must be an object, not {}", describe(other))),
    };
    list.iter().enumerate().map(read_one).collect()
}

/// `{"role": ..., "content": ...}` and whatever else the chat template wants.
fn message(entry: &Map<String, Value>) -> Result<ConversationMessage, Refusal> {
    let role = match string(entry, "role")? {
        // ShareGPT's names for what the other format has fields for.
        FUNCTION_CALL => return function_call(entry, "content"),
        "observation" | "function_response" => "tool",
        other => other,
    };
    let mut other = entry.clone();
    for key in ["role", "content", "weight", "train"] {
        other.shift_remove(key);
    }
    tool_calls(&mut other)?;
    let (content, template_content) = match entry.get("content") {
        // An assistant's message that only calls tools has no content.
        None if other.contains_key(TOOL_CALLS) => (String::new(), Some(Value::Null)),
        // One that only thinks says nothing.
        None if role == ASSISTANT && REASONING.iter().any(|key| other.contains_key(*key)) => (String::new(), None),
        None => return Err("`content` is missing (or null)".to_owned()),
        // Parts of an answer are its text: what is trained has to be found in what the template writes.
        Some(Value::Array(parts)) if role == ASSISTANT => (text_parts(parts)?, None),
        Some(parts @ Value::Array(list)) => (text_parts(list)?, Some(parts.clone())),
        Some(_) => (string(entry, "content")?.to_owned(), None),
    };
    let trained = role == ASSISTANT && message_is_trained(entry)?;
    Ok(ConversationMessage { role: role.to_owned(), content, template_content, other, trained })
}

const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
const TOOL_CALLS: &str = "tool_calls";
/// ShareGPT's role of an assistant that calls a tool, and OpenAI's old field for it.
const FUNCTION_CALL: &str = "function_call";

/// The calls of a message as a list of objects, whatever they are written as. An empty list is none.
fn tool_calls(fields: &mut Map<String, Value>) -> Result<(), Refusal> {
    if let Some(call) = fields.shift_remove(FUNCTION_CALL)
        && !fields.contains_key(TOOL_CALLS)
    {
        let call = if let Value::String(text) = &call { json_text(FUNCTION_CALL, text)? } else { call };
        fields.insert(TOOL_CALLS.to_owned(), json!([{"type": "function", "function": call}]));
    }
    let Some(calls) = fields.get_mut(TOOL_CALLS) else { return Ok(()) };
    if let Value::String(text) = &*calls {
        *calls = if text.trim().is_empty() { json!([]) } else { json_text(TOOL_CALLS, text)? };
    }
    match calls {
        Value::Array(list) if list.is_empty() => {
            fields.shift_remove(TOOL_CALLS);
            Ok(())
        }
        Value::Array(list) => match list.iter().find(|call| !call.is_object()) {
            Some(call) => Err(format!("a call in `{TOOL_CALLS}` must be an object, not {}", describe(call))),
            None => Ok(()),
        },
        other => Err(format!("`{TOOL_CALLS}` must be a list of calls, not {}", describe(other))),
    }
}

fn message_is_trained(entry: &Map<String, Value>) -> Result<bool, Refusal> {
    match (entry.get("weight"), entry.get("train")) {
        (None, None) => Ok(true),
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
            (Some("text"), None) => return Err("a content part of type \"text\" has no `text`".to_owned()),
            (Some(kind), _) => return Err(format!("a content part of type \"{kind}\" is not supported, only text")),
            (None, _) => return Err("a content part must have a `type`".to_owned()),
        }
    }
    Ok(text)
}

/// `{"from": ..., "value": ...}`, with ShareGPT's names for the roles.
fn sharegpt_message(entry: &Map<String, Value>) -> Result<ConversationMessage, Refusal> {
    // Some files hold OpenAI's messages under ShareGPT's name.
    if !entry.contains_key("from") && entry.contains_key("role") {
        return message(entry);
    }
    let role = match string(entry, "from")? {
        "human" | "user" => "user",
        "gpt" | "chatgpt" | "bing" | "bard" | "model" | ASSISTANT => ASSISTANT,
        "observation" | "function_response" | "tool" => "tool",
        FUNCTION_CALL => return function_call(entry, "value"),
        "system" => "system",
        other => {
            return Err(format!(
                "unknown `from` \"{other}\": expected human, gpt, system, function_call, observation or tool"
            ));
        }
    };
    let mut other = entry.clone();
    for key in ["from", "value", "weight", "train"] {
        other.shift_remove(key);
    }
    let trained = role == ASSISTANT && message_is_trained(entry)?;
    Ok(ConversationMessage { trained, other, ..ConversationMessage::new(role, string(entry, "value")?) })
}

/// `{"from": "function_call", "value": "{\"name\": ..., \"arguments\": ...}"}`: the assistant calls a tool, or, with a list,
/// several. The text is kept for chat templates that know no calls.
fn function_call(entry: &Map<String, Value>, key: &str) -> Result<ConversationMessage, Refusal> {
    let (text, calls) = match entry.get(key) {
        Some(Value::String(text)) => (text.clone(), json_text(key, text)?),
        Some(value) => (value.to_string(), value.clone()),
        None => return Err(format!("`{key}` is missing")),
    };
    let calls = match calls {
        Value::Array(calls) if !calls.is_empty() => calls,
        call => vec![call],
    };
    let wrapped = |call: Value| match &call {
        Value::Object(map) if map.contains_key("function") => Ok(call),
        Value::Object(map) if map.contains_key("name") => Ok(json!({"type": "function", "function": call})),
        other => Err(format!(
            "a function_call must be a JSON object with `name` and `arguments`, or a list of them, not {}",
            describe(other)
        )),
    };
    let calls = calls.into_iter().map(wrapped).collect::<Result<Vec<_>, _>>()?;
    let other = [(TOOL_CALLS.to_owned(), Value::Array(calls))].into_iter().collect();
    let trained = message_is_trained(entry)?;
    Ok(ConversationMessage {
        trained,
        other,
        template_content: Some(Value::Null),
        ..ConversationMessage::new(ASSISTANT, text)
    })
}
