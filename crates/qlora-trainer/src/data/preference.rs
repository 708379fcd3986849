//! Pairs of answers to token ids, as TRL's `DPOTrainer` makes them.
//!
//! With `P` the tokens of the prompt (of a conversation: as the chat template asks for the answer) and `C` and `R` those of
//! prompt and answer together, the trained tokens are those behind what `P` has in common with both `C` and `R`. Texts end
//! with EOS; conversations as their template ends them.

use super::encode::{EncodeError, EncodeOptions, Encoded, Notes, RowOutcome, TextEncoder};
use super::record::{Conversation, ConversationMessage, Preference};
use crate::config::OnOverlong;

/// Chosen and rejected, in this order.
pub(super) fn encode_pair(
    pair: &Preference,
    encoder: &dyn TextEncoder,
    options: &EncodeOptions,
) -> Result<RowOutcome, String> {
    let mut notes = Notes::default();
    let (prompt, mut answers) = tokens(pair, encoder).map_err(|error| error.to_string())?;
    let common = |ids: &[u32]| prompt.iter().zip(ids).take_while(|(a, b)| a == b).count();
    let shared = answers.iter().map(|ids| common(ids)).min().unwrap_or(0);
    notes.boundary_merged = shared < prompt.len();
    if let Some(at) = answers.iter().position(|ids| ids.len() <= shared.max(1)) {
        let name = ["chosen", "rejected"][at];
        return Err(format!("`{name}` has no token after the prompt"));
    }
    let longest = answers.iter().map(Vec::len).max().unwrap_or(0);
    if longest > options.max_length {
        match options.on_overlong {
            OnOverlong::Error => {
                return Err(format!(
                    "{longest} tokens, more than max_length = {}; raise it, or set on_overlong to \"truncate\" or \"drop\"",
                    options.max_length
                ));
            }
            OnOverlong::Drop => return Ok(RowOutcome::Overlong),
            // Nothing of an answer would be left.
            OnOverlong::Truncate if shared >= options.max_length => return Ok(RowOutcome::UntrainedAfterTruncation),
            OnOverlong::Truncate => {
                answers.iter_mut().for_each(|ids| ids.truncate(options.max_length));
                notes.truncated = true;
            }
        }
    }
    let document = |ids: Vec<u32>| Encoded { trained: (0..ids.len()).map(|i| i >= shared).collect(), ids };
    Ok(RowOutcome::Group(answers.into_iter().map(document).collect(), notes))
}

/// The prompt's tokens, and those of prompt and answer.
fn tokens(pair: &Preference, encoder: &dyn TextEncoder) -> Result<(Vec<u32>, [Vec<u32>; 2]), EncodeError> {
    match pair {
        Preference::Text { prompt, chosen, rejected } => {
            let eos = encoder.eos().ok_or("the tokenizer has no EOS token, so the model could never learn to stop")?;
            let whole = |answer: &str| -> Result<Vec<u32>, EncodeError> {
                let mut ids = encoder.encode(&format!("{prompt}{answer}"), true)?;
                if ids.last() != Some(&eos) {
                    ids.push(eos);
                }
                Ok(ids)
            };
            let mut alone = encoder.encode(prompt, true)?;
            // An EOS that the tokenizer puts behind every text is no part of the prompt.
            if alone.last() == Some(&eos) && encoder.encode(prompt, false)?.last() != Some(&eos) {
                alone.pop();
            }
            Ok((alone, [whole(chosen)?, whole(rejected)?]))
        }
        Preference::Chat { prompt, chosen, rejected } => {
            let whole = |answer: &[ConversationMessage]| -> Result<Vec<u32>, EncodeError> {
                let mut conversation: Conversation = prompt.clone();
                conversation.messages.extend_from_slice(answer);
                encoder.encode_whole_chat(&conversation)
            };
            Ok((encoder.encode_prompt(prompt)?, [whole(chosen)?, whole(rejected)?]))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::ToyEncoder;
    use super::*;
    use crate::config::OnUntrained;
    use crate::data::encode::encode;
    use crate::data::record::Record;
    use serde_json::{Value, json};

    const OPTIONS: EncodeOptions = EncodeOptions {
        max_length: 100,
        on_overlong: OnOverlong::Truncate,
        on_untrained: OnUntrained::Error,
        completion_only_loss: true,
    };

    fn outcome(row: Value, encoder: &ToyEncoder, options: &EncodeOptions) -> Result<RowOutcome, String> {
        encode(&Record::from_json(&row).unwrap(), encoder, options)
    }

    fn marked(row: Value, encoder: &ToyEncoder, options: &EncodeOptions) -> (Vec<String>, Notes) {
        match outcome(row, encoder, options).unwrap() {
            RowOutcome::Group(documents, notes) => (documents.iter().map(|one| encoder.marked(one)).collect(), notes),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn answers_are_trained_and_end() {
        let encoder = ToyEncoder::default();
        let row = json!({"prompt": "ab", "chosen": "cd", "rejected": "e$"});
        assert_eq!(marked(row, &encoder, &OPTIONS).0, ["^ab[cd$]", "^ab[e$]"]);
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let row = json!({
            "prompt": [turn("user", "a"), turn("assistant", "b"), turn("user", "q")],
            "chosen": [turn("assistant", "x")], "rejected": [turn("assistant", "yz")],
        });
        assert_eq!(marked(row, &encoder, &OPTIONS).0, ["^<u>a|<a>b|<u>q|<a>[x|]", "^<u>a|<a>b|<u>q|<a>[yz|]"]);
    }

    #[test]
    fn a_token_across_the_border_is_trained_in_both() {
        let encoder = ToyEncoder { merge: Some("bc"), ..ToyEncoder::default() };
        let (texts, notes) = marked(json!({"prompt": "ab", "chosen": "cd", "rejected": "e"}), &encoder, &OPTIONS);
        assert_eq!(texts, ["^a[bcd$]", "^a[be$]"]);
        assert!(notes.boundary_merged);
    }

    #[test]
    fn long_pairs() {
        let encoder = ToyEncoder::default();
        let row = || json!({"prompt": "ab", "chosen": "cdefgh", "rejected": "c"});
        let with = |max_length, on_overlong| EncodeOptions { max_length, on_overlong, ..OPTIONS };
        let (texts, notes) = marked(row(), &encoder, &with(5, OnOverlong::Truncate));
        assert_eq!(texts, ["^ab[cd]", "^ab[c$]"]);
        assert!(notes.truncated);
        let of = |options: &EncodeOptions| outcome(row(), &encoder, options);
        assert_eq!(of(&with(3, OnOverlong::Truncate)), Ok(RowOutcome::UntrainedAfterTruncation));
        assert_eq!(of(&with(5, OnOverlong::Drop)), Ok(RowOutcome::Overlong));
        assert!(of(&with(5, OnOverlong::Error)).unwrap_err().contains("10 tokens, more than max_length = 5"));
    }

    #[test]
    fn an_empty_answer_only_ends() {
        let encoder = ToyEncoder::default();
        let row = json!({"prompt": "ab", "chosen": "c", "rejected": ""});
        assert_eq!(marked(row, &encoder, &OPTIONS).0, ["^ab[c$]", "^ab[$]"]);
    }
}
