//! The tokens that end an answer: one notion for training, generation, merging, quantizing and GGUF files.
//!
//! A model's files often disagree. Base models name the end of a document in `generation_config.json`, while the chat template
//! that they are trained with ends a turn with another token; GGUF files of Llama 3 name `<|end_of_text|>` alone. transformers
//! stops at what `generation_config.json` (else `config.json`) lists; llama.cpp at `eos_token_id`, `eot_token_id`,
//! `eom_token_id` and at every token whose text it knows. A model that was trained with one end and is stopped at another
//! talks on to itself. So all of them count:
//!
//! 1. `eos_token_id` of `generation_config.json`,
//! 2. `eos_token_id` of `config.json`; of a GGUF file also `eot_token_id` and `eom_token_id`,
//! 3. the tokenizer's `eos_token`,
//! 4. what the chat template writes after an answer ([`of_template`]),
//! 5. tokens with a well-known text ([`is_known_text`]).

use crate::chat::{ChatTemplate, Message, TemplateArguments};
use crate::tokenizer::Tokenizer;

/// Texts that nothing but an end has, whatever a vocabulary says about the token: ends of turns, of messages to a tool, and of
/// documents. llama.cpp stops at these by their text.
const KNOWN: [&str; 15] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|end|>",
    "<end_of_utterance>",
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
];

/// Further end tokens, of models whose files name them.
const KNOWN_HERE: [&str; 5] = [
    "<|eot|>",
    "<|eom|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// Texts that may also be written in code or prose: an end only as a token that was added to the vocabulary.
const KNOWN_IF_ADDED: [&str; 3] = ["</s>", "<eos>", "[EOS]"];

/// Whether a token with this text ends an answer, independently of the model's files.
pub fn is_known_text(text: &str) -> bool {
    KNOWN.contains(&text) || KNOWN_HERE.contains(&text) || KNOWN_IF_ADDED.contains(&text)
}

/// Whether llama.cpp stops at a token by its text, so that a GGUF file need not name it.
pub(crate) fn llama_cpp_knows(text: &str) -> bool {
    KNOWN.contains(&text)
}

/// The tokens that end an answer, each once, in the order above: `stated` are those of the model's configuration files.
pub fn end_tokens(
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    stated: impl IntoIterator<Item = u32>,
) -> Vec<u32> {
    let by_template = template.and_then(|template| of_template(template, tokenizer));
    let mut ends = Vec::new();
    for id in stated.into_iter().chain(tokenizer.eos_token_id()).chain(by_template).chain(known(tokenizer)) {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    ends
}

/// The tokens of a vocabulary whose text is known.
fn known(tokenizer: &Tokenizer) -> impl Iterator<Item = u32> {
    let id = move |text: &str| tokenizer.token_to_id(text);
    // In OpenAI's harmony format <|end|> ends a message within an answer, and the answer goes on.
    let harmony = ["<|return|>", "<|call|>", "<|end|>"].iter().all(|text| id(text).is_some());
    let always = KNOWN.into_iter().chain(KNOWN_HERE).filter(move |text| !(harmony && *text == "<|end|>"));
    let added = KNOWN_IF_ADDED.into_iter().filter(move |text| id(text).is_some_and(|id| tokenizer.is_added(id)));
    always.chain(added).filter_map(id)
}

/// The token that a chat template writes after an answer, if it writes a special or added token there. It is found by
/// rendering a conversation, so any template's own marker counts.
pub fn of_template(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<u32> {
    // No template changes such a word, and none writes it itself.
    const ANSWER: &str = "qloraendprobe";
    let talk = [Message::user("Hi"), Message::assistant(ANSWER)];
    let text = template.render(&talk, false, &TemplateArguments::new()).ok()?;
    let (_, after) = text.rsplit_once(ANSWER)?;
    let first = *tokenizer.encode(after.trim_start(), false).ok()?.first()?;
    tokenizer.is_added(first).then_some(first)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A vocabulary of single letters, with these added tokens.
    fn tokenizer(added: &[&str]) -> Tokenizer {
        let letters = "abcdefghijklmnopqrstuvwxyzH<>|_ /[]\n";
        let vocab: serde_json::Map<String, serde_json::Value> =
            letters.chars().enumerate().map(|(id, c)| (c.to_string(), id.into())).collect();
        let first = vocab.len();
        let added: Vec<serde_json::Value> = added
            .iter()
            .enumerate()
            .map(|(index, text)| {
                serde_json::json!({"id": first + index, "content": text, "special": true, "single_word": false,
                                   "lstrip": false, "rstrip": false, "normalized": false})
            })
            .collect();
        let json = serde_json::json!({"version": "1.0", "added_tokens": added,
                                      "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        Tokenizer::from_folder(folder.path()).unwrap()
    }

    fn texts(added: &[&str], template: Option<&str>) -> Vec<String> {
        let tokenizer = tokenizer(added);
        let template = template.map(|source| ChatTemplate::new(source, []).unwrap());
        let ends = end_tokens(&tokenizer, template.as_ref(), []);
        ends.into_iter().map(|id| tokenizer.id_to_token(id).unwrap()).collect()
    }

    #[test]
    fn known_texts_are_found() {
        assert_eq!(texts(&["<s>", "<|eot_id|>", "<|x|>", "<|eom_id|>"], None), ["<|eot_id|>", "<|eom_id|>"]);
        assert_eq!(texts(&["</s>", "<eos>"], None), ["</s>", "<eos>"]);
        assert!(texts(&["<|im_start|>", "<pad>", "<think>", "</tool_call>"], None).is_empty());
        // Two ways of <|end|>.
        assert_eq!(texts(&["<|end|>", "<|user|>"], None), ["<|end|>"]);
        assert_eq!(texts(&["<|end|>", "<|return|>", "<|call|>"], None), ["<|return|>", "<|call|>"]);
    }

    #[test]
    fn a_templates_own_marker_is_an_end() {
        let of = |after: &str| {
            let source = format!("{{% for m in messages %}}<h>{{{{ m.content }}}}{after}{{% endfor %}}");
            texts(&["<h>", "<|fin|>", "<|im_end|>"], Some(&source))
        };
        assert_eq!(of("<|fin|>\n"), ["<|fin|>", "<|im_end|>"]);
        assert_eq!(of(" <|fin|>"), ["<|fin|>", "<|im_end|>"]);
        assert_eq!(of("<|im_end|>"), ["<|im_end|>"]);
        // Text, nothing, or a template that refuses: no marker.
        assert_eq!(of("/end"), ["<|im_end|>"]);
        assert_eq!(of("\n"), ["<|im_end|>"]);
        assert_eq!(of("{{ raise_exception('no') }}"), ["<|im_end|>"]);
    }

    #[test]
    fn what_files_state_stays_in_its_order() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizer/llama");
        let llama = Tokenizer::from_folder(folder).unwrap();
        assert_eq!(end_tokens(&llama, None, [7, 5, 7]), [7, 5, 2]);
    }
}
