//! The inputs that a chat template renders, found out by rendering small conversations.
//!
//! Templates do not say whether they know tools, whether a call's arguments are a JSON text or an object for them, or whether
//! a content may be a list of parts. Given the wrong form they do not fail: they write the arguments as an escaped text, a
//! list as Python prints it, or nothing at all.

use serde_json::{Value, json};

use super::{ChatTemplate, Message, TemplateArguments};

/// The inputs that a chat template renders: tools, tool calls, reasoning and the like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// It writes the tools that it gets.
    pub tools: bool,
    /// It writes the `tool_calls` of the assistant's messages.
    pub tool_calls: bool,
    /// The arguments of a call may be an object.
    pub object_arguments: bool,
    /// The arguments of a call may be a JSON text.
    pub text_arguments: bool,
    /// A message that only calls tools may have null as content.
    pub null_content: bool,
    /// A content may be a list of parts.
    pub content_parts: bool,
}

const TOOL: &str = "probe_tool";
const CALL: &str = "probe_call";
const KEY: &str = "probe_key";
const VALUE: &str = "probe value";

impl Capabilities {
    pub(super) fn of(template: &ChatTemplate) -> Self {
        let none = TemplateArguments::new();
        let tools = json!([{"type": "function", "function": {"name": TOOL, "description": "d", "parameters": {
            "type": "object", "required": ["a"], "properties": {"a": {"type": "string", "description": "d"}}}}}]);
        let with_tools: TemplateArguments = [("tools".to_owned(), tools)].into_iter().collect();
        let render = |messages: &Value, arguments: &TemplateArguments| {
            let messages = messages.as_array().cloned().unwrap_or_default();
            template.render_values(messages, arguments).unwrap_or_default()
        };
        let user = json!({"role": "user", "content": "q"});

        let plain = [json!([user]), json!([{"role": "system", "content": "s"}, user])];
        let shows_tools = plain.iter().any(|messages| render(messages, &with_tools).contains(TOOL));

        // Some templates want the tool's answer behind the call, or the tools before it; the identifier is as Mistral wants it.
        let call = |content: &Value, call_arguments: &Value| {
            let call = json!([{"role": "assistant", "content": content, "tool_calls": [{"id": "abcdefghi",
                "type": "function", "function": {"name": CALL, "arguments": call_arguments}}]}]);
            let answer = json!({"role": "tool", "tool_call_id": "abcdefghi", "name": CALL, "content": "{}"});
            let alone = json!([user, call[0]]);
            let answered = json!([user, call[0], answer, {"role": "assistant", "content": "a"}]);
            [(&answered, &with_tools), (&answered, &none), (&alone, &with_tools), (&alone, &none)]
                .into_iter()
                .map(|(messages, arguments)| render(messages, arguments))
                .find(|text| text.contains(CALL))
        };
        let object = json!({KEY: VALUE});
        let text = json!(format!("{{\"{KEY}\": \"{VALUE}\"}}"));
        let empty = json!("");
        let either = |arguments: &Value| call(&Value::Null, arguments).or_else(|| call(&empty, arguments));
        let (of_object, of_text) = (either(&object), either(&text));
        let is_object = |text: &String| {
            text.contains(KEY) && text.contains(VALUE) && !text.contains(&format!("'{KEY}': '{VALUE}'"))
        };
        let is_text = |text: &String| text.contains(&format!("\"{KEY}\": \"{VALUE}\""));

        let parts = json!([{"role": "user", "content":
            [{"type": "text", "text": "probe one"}, {"type": "text", "text": "probe two"}]}]);
        let parts = render(&parts, &none);
        Self {
            tools: shows_tools,
            tool_calls: of_object.is_some() || of_text.is_some(),
            object_arguments: of_object.as_ref().is_some_and(is_object),
            text_arguments: of_text.as_ref().is_some_and(is_text),
            null_content: [&object, &text].into_iter().any(|arguments| call(&Value::Null, arguments).is_some()),
            content_parts: parts.contains("probe one")
                && parts.contains("probe two")
                && !["'type'", "\"type\""].iter().any(|printed| parts.contains(printed)),
        }
    }

    /// Brings a message into the form in which the template writes it.
    pub(super) fn adapt(self, message: &mut Message) {
        let joined = match &message.content {
            Value::Array(parts) if !self.content_parts => joined(parts),
            Value::Null if self.tool_calls && !self.null_content => Some(String::new()),
            _ => None,
        };
        if let Some(text) = joined {
            message.content = Value::String(text);
        }
        let calls = message.extra.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten();
        for call in calls {
            let function =
                if call.get("function").is_some_and(Value::is_object) { &mut call["function"] } else { call };
            let Some(arguments) = function.get_mut("arguments") else { continue };
            match arguments {
                Value::String(text) if !self.text_arguments => {
                    if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
                        *arguments = object;
                    }
                }
                Value::Object(_) if !self.object_arguments && self.text_arguments => {
                    *arguments = Value::String(super::python::json_text(arguments));
                }
                _ => {}
            }
        }
    }
}

/// Text parts as one text; none if there are others.
fn joined(parts: &[Value]) -> Option<String> {
    let text = |part: &Value| match part.get("type").and_then(Value::as_str) {
        Some("text") => part.get("text")?.as_str().map(str::to_owned),
        _ => None,
    };
    parts.iter().map(text).collect()
}
