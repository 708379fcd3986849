//! Pairs of answers of which one is preferred: `prompt`, `chosen`, `rejected`, as texts or as messages.
//!
//! Without `prompt` it is what both answers begin with (TRL's `extract_prompt`); a `prompt` text beside conversations that
//! repeat it is ignored, as HuggingFaceH4/ultrafeedback_binarized has it.

use serde_json::{Map, Value};

use super::columns::describe;
use super::messages::{Reader, message_list};
use super::{ASSISTANT, Conversation, ConversationMessage, Record, Refusal, Used, with_columns};

/// A prompt and two answers to it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Preference {
    /// Texts.
    Text {
        /// The prompt of both answers.
        prompt: String,
        /// The better one.
        chosen: String,
        /// The other one.
        rejected: String,
    },
    /// Messages.
    Chat {
        /// The prompt of both answers, with the row's tools and template arguments.
        prompt: Conversation,
        /// The better messages.
        chosen: Vec<ConversationMessage>,
        /// The other ones.
        rejected: Vec<ConversationMessage>,
    },
}

const KEYS: [&str; 3] = ["prompt", "chosen", "rejected"];

/// Whether a row is a pair.
pub(super) fn is_pair(row: &Map<String, Value>) -> bool {
    row.contains_key("chosen") && row.contains_key("rejected")
}

pub(super) fn read(row: &Map<String, Value>) -> Result<Used, Refusal> {
    let (prompt, chosen, rejected) = (row.get("prompt"), &row["chosen"], &row["rejected"]);
    if chosen == rejected {
        return Err("`chosen` and `rejected` are the same".to_owned());
    }
    let used = KEYS.to_vec();
    match (prompt, chosen, rejected) {
        (Some(Value::String(prompt)), Value::String(chosen), Value::String(rejected)) => {
            let (prompt, chosen, rejected) = (prompt.clone(), chosen.clone(), rejected.clone());
            Ok((pair(Preference::Text { prompt, chosen, rejected }), used))
        }
        (None, Value::String(chosen), Value::String(rejected)) => Ok((pair(split_texts(chosen, rejected)), used)),
        (_, Value::Array(_), Value::Array(_)) => {
            let list = |value: &Value, key: &str| message_list(value, key, Reader::OpenAi);
            let (mut chosen, mut rejected) = (list(chosen, "chosen")?, list(rejected, "rejected")?);
            let messages = match prompt {
                Some(prompt @ Value::Array(_)) => list(prompt, "prompt")?,
                Some(Value::String(_)) | None => {
                    let shared = shared_messages(&chosen, &rejected);
                    rejected.drain(..shared);
                    let shared: Vec<_> = chosen.drain(..shared).collect();
                    match prompt {
                        // The answers alone: the text is the question.
                        Some(Value::String(text)) if shared.is_empty() => vec![ConversationMessage::new("user", text)],
                        _ => shared,
                    }
                }
                Some(other) => {
                    return Err(format!("`prompt` must be a text or a list of messages, not {}", describe(other)));
                }
            };
            if messages.is_empty() {
                return Err(
                    "`chosen` and `rejected` begin with different messages, and there is no `prompt`".to_owned()
                );
            }
            for (name, answer) in [("chosen", &chosen), ("rejected", &rejected)] {
                if !answer.iter().any(|message| message.role == ASSISTANT) {
                    return Err(format!("`{name}` has no message of the assistant after the prompt"));
                }
            }
            let (prompt, mut columns) = with_columns(row, messages)?;
            columns.extend(used);
            Ok((pair(Preference::Chat { prompt, chosen, rejected }), columns))
        }
        (prompt, chosen, rejected) => {
            let prompt = prompt.map_or_else(|| "nothing".to_owned(), describe);
            Err(format!(
                "`chosen` and `rejected` must be two texts or two lists of messages, with a `prompt` of the same kind; they are \
                 {} and {}, `prompt` is {prompt}",
                describe(chosen),
                describe(rejected)
            ))
        }
    }
}

fn pair(preference: Preference) -> Record {
    Record::Preference(Box::new(preference))
}

/// The number of messages with which both begin; the last message of the shorter one is never among them.
fn shared_messages(chosen: &[ConversationMessage], rejected: &[ConversationMessage]) -> usize {
    let shared = chosen.iter().zip(rejected).take_while(|(a, b)| a == b).count();
    shared.min(chosen.len().min(rejected.len()).saturating_sub(1))
}

/// Splits two texts behind their common beginning; a space before the split belongs to the answers.
fn split_texts(chosen: &str, rejected: &str) -> Preference {
    let shared: usize =
        chosen.chars().zip(rejected.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    let shared = if chosen[..shared].ends_with(' ') { shared - 1 } else { shared };
    Preference::Text {
        prompt: chosen[..shared].to_owned(),
        chosen: chosen[shared..].to_owned(),
        rejected: rejected[shared..].to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read_row(row: Value) -> Result<Preference, Refusal> {
        match Record::from_json(&row)? {
            Record::Preference(pair) => Ok(*pair),
            other => panic!("{other:?}"),
        }
    }

    fn text(prompt: &str, chosen: &str, rejected: &str) -> Preference {
        Preference::Text { prompt: prompt.into(), chosen: chosen.into(), rejected: rejected.into() }
    }

    fn contents(messages: &[ConversationMessage]) -> Vec<&str> {
        messages.iter().map(|message| message.content.as_str()).collect()
    }

    #[test]
    fn texts() {
        assert_eq!(read_row(json!({"prompt": "p ", "chosen": "c", "rejected": "r"})).unwrap(), text("p ", "c", "r"));
        let row = json!({"chosen": "Q: hé? A: yes", "rejected": "Q: hé? A: no"});
        assert_eq!(read_row(row).unwrap(), text("Q: hé? A:", " yes", " no"));
    }

    #[test]
    fn messages_with_and_without_a_prompt() {
        let (user, good, bad) = (
            json!({"role": "user", "content": "q"}),
            json!({"role": "assistant", "content": "good"}),
            json!({"role": "assistant", "content": "bad"}),
        );
        for row in [
            json!({"prompt": [user], "chosen": [good], "rejected": [bad]}),
            json!({"chosen": [user, good], "rejected": [user, bad]}),
            // A text beside conversations that repeat it, and one that they do not.
            json!({"prompt": "q", "chosen": [user, good], "rejected": [user, bad]}),
            json!({"prompt": "q", "chosen": [good], "rejected": [bad]}),
        ] {
            let Preference::Chat { prompt, chosen, rejected } = read_row(row.clone()).unwrap() else { panic!("{row}") };
            assert_eq!(contents(&prompt.messages), ["q"], "{row}");
            assert_eq!((contents(&chosen), contents(&rejected)), (vec!["good"], vec!["bad"]), "{row}");
        }
        // One answer is the beginning of the other one.
        let row = json!({"chosen": [user, good], "rejected": [user, good, user, bad]});
        let Preference::Chat { prompt, chosen, rejected } = read_row(row).unwrap() else { panic!("texts") };
        assert_eq!((prompt.messages.len(), chosen.len(), rejected.len()), (1, 1, 3));
        let row = json!({"system": "s", "tools": [], "prompt": [user], "chosen": [good], "rejected": [bad]});
        let Preference::Chat { prompt, .. } = read_row(row).unwrap() else { panic!("texts") };
        assert_eq!(contents(&prompt.messages), ["s", "q"]);
    }

    #[test]
    fn unusable_pairs_are_named() {
        let user = json!({"role": "user", "content": "q"});
        let good = json!({"role": "assistant", "content": "good"});
        for (row, part) in [
            (json!({"prompt": "p", "chosen": "c", "rejected": "c"}), "are the same"),
            (json!({"prompt": "p", "chosen": "c", "rejected": [good]}), "a string and a list"),
            (json!({"prompt": [user], "chosen": "c", "rejected": "r"}), "`prompt` is a list"),
            (json!({"chosen": [good], "rejected": [user]}), "begin with different messages"),
            (json!({"prompt": [user], "chosen": [good], "rejected": [user]}), "`rejected` has no message"),
            (json!({"prompt": 3, "chosen": [user, good], "rejected": [user]}), "`prompt` must be a text"),
        ] {
            let message = read_row(row.clone()).unwrap_err();
            assert!(message.contains(part), "{row}: {message}");
        }
    }
}
