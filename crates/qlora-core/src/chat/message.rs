//! One message of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A message as chat data sets and chat APIs write it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// The role of the speaker: `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// The content: a text, a list of parts, or null (a call of a tool).
    #[serde(default)]
    pub content: Value,
    /// Further fields that a template may read: `tool_calls`, `reasoning_content`, `name`, ...
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The names under which the assistant's reasoning is passed; the first is the one most templates read.
pub(super) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl Message {
    /// A text by `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Value::String(content.into()), extra: Map::new() }
    }

    /// The instructions that a conversation begins with.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A message of the model (role `assistant`).
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// The content, if it is a text.
    pub fn text(&self) -> Option<&str> {
        self.content.as_str()
    }

    /// Whether the model says this.
    pub fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }

    /// The message as templates see it. Reasoning is passed under both names that templates read, as by transformers.
    pub(super) fn to_template(&self) -> Value {
        let mut map = Map::new();
        let reasoning = REASONING.iter().find_map(|key| self.extra.get(*key).filter(|value| !value.is_null()));
        if let Some(reasoning) = reasoning {
            map.insert("thinking".to_owned(), reasoning.clone());
        }
        map.insert("role".to_owned(), Value::String(self.role.clone()));
        map.insert("content".to_owned(), self.content.clone());
        map.extend(self.extra.iter().map(|(key, value)| (key.clone(), value.clone())));
        if let Some(reasoning) = reasoning {
            map.insert(REASONING[0].to_owned(), reasoning.clone());
        }
        Value::Object(map)
    }
}
