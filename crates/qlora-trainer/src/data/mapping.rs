//! Rows with columns of any name, as rows of the formats that [`record`](super::record) knows.
//!
//! A mapping names columns; those it does not name are left out, as in LLaMA-Factory. Without one a row stays as it is.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::config::{ColumnNames, DatasetOptions, TagNames};

/// The mapping of a data set's columns and messages to their roles.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mapping {
    columns: Vec<Column>,
    messages: MessageKeys,
    /// The input is part of the prompt, because the format has no place of its own for it.
    query_in_prompt: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
struct Column {
    /// Its name in the file.
    from: String,
    /// Its name in our format.
    to: &'static str,
    required: bool,
}

/// The keys of a message, and its roles, in the file and here.
#[derive(Clone, Debug, Default, PartialEq)]
struct MessageKeys {
    keys: Vec<(String, String)>,
    roles: BTreeMap<String, String>,
}

impl MessageKeys {
    fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.roles.is_empty()
    }
}

/// Columns under which a list of messages may stand, or one message; in the first two also a text with such a list.
const MESSAGES: [&str; 6] = ["messages", "conversations", "prompt", "completion", "chosen", "rejected"];

impl Mapping {
    /// The mapping of a set.
    ///
    /// # Errors
    /// The keys that contradict each other, by name.
    pub fn new(options: &DatasetOptions) -> Result<Self, String> {
        let mut mapping = Self { messages: message_keys(options), ..Self::default() };
        if let Some(columns) = &options.columns {
            mapping.add_columns(columns)?;
        }
        for (from, to, required) in [
            (&options.field_messages, "messages", true),
            (&options.field, "text", true),
            (&options.field_instruction, "instruction", true),
            (&options.field_input, "input", false),
            (&options.field_output, "output", true),
            (&options.field_system, "system", false),
            (&options.field_tools, "tools", false),
        ] {
            mapping.add(from, to, required)?;
        }
        let has = |name: &str| mapping.columns.iter().any(|column| column.to == name);
        if !mapping.messages.is_empty() && !mapping.columns.is_empty() && !has("messages") {
            return Err("the keys of messages are named, but not their column: write `field_messages`, or `messages` in `columns`"
                .to_owned());
        }
        if has("instruction") != has("output") {
            return Err(
                "an instruction and its answer belong together: name both columns (`prompt` and `response`, or \
                        `field_instruction` and `field_output`)"
                    .to_owned(),
            );
        }
        Ok(mapping)
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty() && self.messages.is_empty()
    }

    fn add(&mut self, from: &Option<String>, to: &'static str, required: bool) -> Result<(), String> {
        let Some(from) = from else { return Ok(()) };
        if let Some(other) = self.columns.iter().find(|column| column.to == to) {
            return Err(format!("two columns, `{}` and `{from}`, are named for the same", other.from));
        }
        self.columns.push(Column { from: from.clone(), to, required });
        Ok(())
    }

    fn add_columns(&mut self, columns: &ColumnNames) -> Result<(), String> {
        let ColumnNames { prompt, query, response, history, messages, system, tools, chosen, rejected } = columns;
        let instruction = chosen.is_none();
        let (to_prompt, to_response) = if instruction { ("instruction", "output") } else { ("prompt", "completion") };
        for (from, to, required) in [
            (messages, "messages", true),
            (prompt, to_prompt, true),
            (response, to_response, true),
            (history, "history", false),
            (system, "system", false),
            (tools, "tools", false),
            (chosen, "chosen", true),
            (rejected, "rejected", true),
        ] {
            self.add(from, to, required)?;
        }
        match query {
            Some(query) if !instruction => self.query_in_prompt = Some(query.clone()),
            query => self.add(query, "input", false)?,
        }
        if self.columns.is_empty() {
            return Err("`columns` names no column".to_owned());
        }
        if chosen.is_some() != rejected.is_some() {
            return Err("`chosen` and `rejected` belong together in `columns`".to_owned());
        }
        Ok(())
    }

    /// The row in a format of ours, and the columns that were left out.
    ///
    /// # Errors
    /// If a column that is named is missing or null.
    pub fn apply(&self, row: Value) -> Result<(Value, Vec<String>), String> {
        let Value::Object(mut row) = row else { return Ok((row, Vec::new())) };
        if self.is_empty() {
            return Ok((Value::Object(row), Vec::new()));
        }
        let mut mapped = if self.columns.is_empty() { std::mem::take(&mut row) } else { Map::new() };
        for Column { from, to, required } in &self.columns {
            match row.get(from) {
                Some(value) if !value.is_null() => {
                    mapped.insert((*to).to_owned(), value.clone());
                }
                _ if *required => {
                    let names: Vec<_> = row.keys().map(|key| format!("`{key}`")).collect();
                    return Err(format!("the column `{from}` is missing or null; there are {}", names.join(", ")));
                }
                _ => {}
            }
        }
        if let Some(query) = &self.query_in_prompt
            && let (Some(Value::String(prompt)), Some(Value::String(query))) =
                (mapped.get_mut("prompt"), row.get(query))
            && !query.is_empty()
        {
            *prompt = if prompt.is_empty() { query.clone() } else { format!("{prompt}\n{query}") };
        }
        self.map_messages(&mut mapped)?;
        let used = |name: &String| {
            self.columns.iter().any(|column| column.from == *name) || self.query_in_prompt.as_ref() == Some(name)
        };
        let unused = row.into_iter().filter(|(name, value)| !value.is_null() && !used(name)).map(|(name, _)| name);
        Ok((Value::Object(mapped), unused.collect()))
    }

    fn map_messages(&self, row: &mut Map<String, Value>) -> Result<(), String> {
        for (i, column) in MESSAGES.into_iter().enumerate() {
            let Some(value) = row.get_mut(column) else { continue };
            if let Value::String(text) = &*value
                && i < 2
                && text.trim_start().starts_with('[')
            {
                *value = serde_json::from_str(text)
                    .map_err(|error| format!("`{column}` is a text that is not valid JSON ({error})"))?;
            }
            if value.is_object() {
                // One message, as LLaMA-Factory has the better and the worse answer.
                *value = Value::Array(vec![value.take()]);
            }
            if let Value::Array(list) = value {
                list.iter_mut().for_each(|message| self.map_message(message));
            }
        }
        // A conversation that asks, and two answers.
        if row.contains_key("chosen")
            && let Some(messages) = row.shift_remove("messages")
        {
            row.insert("prompt".to_owned(), messages);
        } else if self.messages.is_empty()
            && let Some(messages) = row.shift_remove("messages")
        {
            // This format's reader takes both ways of writing messages.
            row.insert("conversations".to_owned(), messages);
        }
        Ok(())
    }

    fn map_message(&self, message: &mut Value) {
        let Value::Object(fields) = message else { return };
        for (from, to) in &self.messages.keys {
            if from != to
                && let Some(value) = fields.shift_remove(from)
            {
                fields.insert(to.clone(), value);
            }
        }
        if let Some(Value::String(role)) = fields.get_mut("role")
            && let Some(known) = self.messages.roles.get(role.as_str())
        {
            role.clone_from(known);
        }
    }
}

fn message_keys(options: &DatasetOptions) -> MessageKeys {
    let mut keys = MessageKeys::default();
    if let Some(tags) = &options.tags {
        let TagNames { role_tag, content_tag, user_tag, assistant_tag, observation_tag, function_tag, system_tag } =
            tags;
        let pair = |from: &String, to: &str| (from.clone(), to.to_owned());
        keys.keys = vec![pair(role_tag, "role"), pair(content_tag, "content")];
        keys.roles = BTreeMap::from([
            pair(user_tag, "user"),
            pair(assistant_tag, "assistant"),
            pair(observation_tag, "tool"),
            pair(function_tag, "function_call"),
            pair(system_tag, "system"),
        ]);
    }
    keys.keys.extend(options.message_property_mappings.iter().map(|(to, from)| (from.clone(), to.clone())));
    keys.keys.extend(options.message_field_training.iter().map(|from| (from.clone(), "train".to_owned())));
    for (to, from) in &options.roles {
        keys.roles.extend(from.iter().map(|from| (from.clone(), to.clone())));
    }
    keys
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::record::Row;
    use super::*;

    fn mapping(toml: &str) -> Result<Mapping, String> {
        Mapping::new(&toml::from_str(&format!("path = \"x\"\n{toml}")).unwrap())
    }

    fn mapped(toml: &str, row: Value) -> (Value, Vec<String>) {
        mapping(toml).unwrap().apply(row).unwrap()
    }

    #[test]
    fn columns_of_llama_factory() {
        let toml = "columns = { prompt = \"q\", query = \"with\", response = \"a\", system = \"sys\" }";
        let (row, unused) = mapped(toml, json!({"q": "do", "with": "x", "a": "y", "sys": null, "id": 7, "text": "t"}));
        assert_eq!(row, json!({"instruction": "do", "input": "x", "output": "y"}));
        assert_eq!(unused, ["id", "text"]);
        let toml = "columns = { messages = \"dialog\", tools = \"t\" }";
        let (row, _) = mapped(
            toml,
            json!({"dialog": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "t": "[]"}),
        );
        assert_eq!(Row::from_json(&row).unwrap().unused, Vec::<String>::new());
        let toml = "columns = { messages = \"dialog\" }\n[tags]\nrole_tag = \"speaker\"\ncontent_tag = \"said\"\nuser_tag = \"U\"\n\
                    assistant_tag = \"A\"";
        let (row, _) = mapped(
            toml,
            json!({"dialog": [{"speaker": "U", "said": "q"}, {"speaker": "A", "said": "a", "weight": 0}]}),
        );
        let expected = json!([{"role": "user", "content": "q"}, {"weight": 0, "role": "assistant", "content": "a"}]);
        assert_eq!(row, json!({"messages": expected}));
        // As a text.
        let (row, _) = mapped(toml, json!({"dialog": "[{\"speaker\": \"U\", \"said\": \"q\"}]"}));
        assert_eq!(row, json!({"messages": [{"role": "user", "content": "q"}]}));
    }

    #[test]
    fn columns_of_preferences() {
        let toml = "columns = { prompt = \"q\", query = \"with\", chosen = \"good\", rejected = \"bad\" }";
        let (row, _) = mapped(toml, json!({"q": "do", "with": "x", "good": "y", "bad": "z"}));
        assert_eq!(row, json!({"prompt": "do\nx", "chosen": "y", "rejected": "z"}));
        let toml = "columns = { messages = \"m\", chosen = \"good\", rejected = \"bad\" }\ntags = {}";
        let message = |role: &str, text: &str| json!({"from": role, "value": text});
        let (row, _) = mapped(
            toml,
            json!({"m": [message("human", "q")], "good": message("gpt", "y"), "bad": message("gpt", "z")}),
        );
        let ours = |role: &str, text: &str| json!([{"role": role, "content": text}]);
        let expected =
            json!({"chosen": ours("assistant", "y"), "rejected": ours("assistant", "z"), "prompt": ours("user", "q")});
        assert_eq!(row, expected);
    }

    #[test]
    fn fields_of_axolotl() {
        let toml = "field_messages = \"dialog\"\nmessage_field_training = \"learn\"\n\
                    message_property_mappings = { role = \"speaker\", content = \"said\" }\nroles = { user = [\"customer\"] }";
        let (row, _) = mapped(
            toml,
            json!({"dialog": [{"speaker": "customer", "said": "q"}, {"speaker": "assistant", "said": "a", "learn": false}]}),
        );
        let expected = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": false}]);
        assert_eq!(row, json!({"messages": expected}));
        assert_eq!(mapped("field = \"body\"", json!({"body": "t"})).0, json!({"text": "t"}));
        let toml = "field_instruction = \"i\"\nfield_output = \"o\"";
        assert_eq!(mapped(toml, json!({"i": "do", "o": "y"})).0, json!({"instruction": "do", "output": "y"}));
        // Without columns only the messages change.
        let toml = "roles = { assistant = [\"bot\"] }";
        let row = json!({"messages": [{"role": "bot", "content": "a"}], "tools": []});
        let expected = json!({"messages": [{"role": "assistant", "content": "a"}], "tools": []});
        assert_eq!(mapped(toml, row), (expected, vec![]));
        let row = json!({"text": "t"});
        assert_eq!(mapped("", row.clone()), (row, vec![]));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (toml, part) in [
            ("columns = {}", "names no column"),
            ("columns = { prompt = \"q\" }", "belong together"),
            ("columns = { prompt = \"q\", chosen = \"c\" }", "`chosen` and `rejected` belong together"),
            ("columns = { messages = \"a\" }\nfield_messages = \"b\"", "`a` and `b`"),
            ("field = \"a\"\nroles = { user = [\"x\"] }", "not their column"),
        ] {
            let message = mapping(toml).unwrap_err();
            assert!(message.contains(part), "{toml}: {message}");
        }
        let missing = mapping("field = \"body\"").unwrap().apply(json!({"body": null, "b": 1})).unwrap_err();
        assert_eq!(missing, "the column `body` is missing or null; there are `body`, `b`");
    }
}
