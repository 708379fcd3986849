//! Rows to token ids, with the tokens to train on.
//!
//! - `text`: the tokenizer's tokens, EOS appended; all of it is trained.
//! - `prompt` + `completion`: the tokens of the joined text, EOS appended; trained from the first token in which the joined
//!   text differs from the prompt alone (with most tokenizers the completion's first token).
//! - pairs of answers: two documents, trained from the first token that is not the prompt's.
//! - `prompt` + `completion` of messages, the latter a single one: what the chat template gives, trained from the first token
//!   in which it differs from the prompt as the template asks for the answer, to the end (as TRL's `SFTTrainer` has it).
//! - other conversations: what the chat template gives; the trained messages' tokens, each with the end-of-turn token after it.
//!   A conversation that would end without a trained end token gets EOS.
//!
//! So every document teaches the model to stop, unless `max_length` cut its end off.

use std::error::Error as StdError;

use super::record::{Conversation, Record};
use crate::config::{DataOptions, OnOverlong, OnUntrained};
use crate::fingerprint::Fingerprint;

/// The version of the rules by which rows become tokens. It counts up when other tokens, or others to train, come out of the same
/// row, so that tokens that were kept by earlier versions are made again.
pub(super) const ENCODING: u32 = 1;

/// The libraries that make text and tokens, with their versions in `Cargo.lock`: another version may make others.
pub(super) const LIBRARIES: [(&str, &str); 2] = [("minijinja", "3.0.5"), ("tokenizers", "0.23.2")];

/// The error of a [`TextEncoder`].
pub type EncodeError = Box<dyn StdError + Send + Sync>;

/// A tokenizer with its chat template, as training needs it.
pub trait TextEncoder: Sync {
    /// The token ids of a text. With `add_special` the tokenizer's own special tokens are added (BOS for most); without
    /// it none.
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EncodeError>;

    /// Whether there is a chat template; without one [`TextEncoder::encode_chat`] is not called.
    fn has_chat_template(&self) -> bool;

    /// The token ids of a conversation as the chat template writes it, and for each token whether it belongs to a
    /// message with `trained` set. Such messages that are not found in the text are counted in `notes`.
    fn encode_chat(&self, conversation: &Conversation, notes: &mut Notes) -> Result<Encoded, EncodeError>;

    /// The token ids of a conversation as the chat template writes it, without looking for its messages.
    fn encode_whole_chat(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        Ok(self.encode_chat(conversation, &mut Notes::default())?.ids)
    }

    /// The token ids of a conversation as the chat template writes it to ask for the next answer.
    fn encode_prompt(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        let _ = conversation;
        Err("this encoder cannot ask for an answer".into())
    }

    /// The parts of a conversation that the chat template does not read, by the names of the row's columns.
    fn unused(&self, conversation: &Conversation) -> Vec<String> {
        let _ = conversation;
        Vec::new()
    }

    /// Stands for everything that the tokens of a row depend on besides the row, so that they can be kept; none if that cannot be
    /// said, or changes from day to day.
    fn fingerprint(&self) -> Option<Fingerprint> {
        None
    }

    /// The token that begins a text.
    fn bos(&self) -> Option<u32>;

    /// The token that ends a text, which is appended to plain texts and completions.
    fn eos(&self) -> Option<u32>;

    /// Whether generation stops at this token: EOS, and the end-of-turn token of a chat template.
    fn is_end(&self, token: u32) -> bool {
        self.eos() == Some(token)
    }

    /// The text of tokens, special ones included.
    fn decode(&self, tokens: &[u32]) -> Result<String, EncodeError>;
}

/// Token ids, and for each whether it is trained.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// As many flags.
    pub trained: Vec<bool>,
}

impl Encoded {
    /// The number of tokens with a loss: the trained ones except the first token, which nothing predicts.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().skip(1).filter(|&&trained| trained).count()
    }

    fn push(&mut self, id: u32, trained: bool) {
        self.ids.push(id);
        self.trained.push(trained);
    }
}

/// Options of [`encode`]: the treatment of long documents and the mask of trained tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// The most tokens a document has.
    pub max_length: usize,
    /// The treatment of longer ones.
    pub on_overlong: OnOverlong,
    /// The treatment of rows without a token to train on.
    pub on_untrained: OnUntrained,
    /// Train on completions and the assistant's messages only.
    pub completion_only_loss: bool,
}

impl From<&DataOptions> for EncodeOptions {
    fn from(options: &DataOptions) -> Self {
        Self {
            max_length: options.max_length,
            on_overlong: options.on_overlong,
            on_untrained: options.on_untrained,
            completion_only_loss: options.completion_only_loss,
        }
    }
}

/// The result of encoding a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowOutcome {
    /// A document.
    Document(Encoded, Notes),
    /// Documents that belong together.
    Group(Vec<Encoded>, Notes),
    /// Left out: longer than `max_length`.
    Overlong,
    /// Left out: nothing to train on.
    Untrained,
    /// Left out: nothing to train on within `max_length`.
    UntrainedAfterTruncation,
}

/// The corrections made to a row while it was encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// Its end was cut off.
    pub truncated: bool,
    /// A second BOS was removed.
    pub double_bos: bool,
    /// Prompt and completion share a token.
    pub boundary_merged: bool,
    /// Answers of the assistant that should be trained and are not: the chat template leaves them out, or writes them such
    /// that they are not found.
    pub answers_not_found: usize,
}

/// Encodes a row.
///
/// # Errors
/// A description of the row's problem, without file and line.
pub fn encode(record: &Record, encoder: &dyn TextEncoder, options: &EncodeOptions) -> Result<RowOutcome, String> {
    if let Record::Preference(pair) = record {
        return super::preference::encode_pair(pair, encoder, options);
    }
    let mut notes = Notes::default();
    let mut encoded =
        tokens(record, encoder, options.completion_only_loss, &mut notes).map_err(|error| error.to_string())?;
    debug_assert_eq!(encoded.ids.len(), encoded.trained.len());
    if let (Some(bos), [first, second, ..]) = (encoder.bos(), encoded.ids.as_slice())
        && (*first, *second) == (bos, bos)
    {
        encoded.ids.remove(0);
        encoded.trained.remove(0);
        notes.double_bos = true;
    }
    if !options.completion_only_loss {
        encoded.trained.fill(true);
    }
    if encoded.trained_tokens() == 0 {
        return match options.on_untrained {
            OnUntrained::Skip => Ok(RowOutcome::Untrained),
            OnUntrained::Error => Err(untrained_message(record, notes)),
        };
    }
    let tokens = encoded.ids.len();
    if tokens > options.max_length {
        match options.on_overlong {
            OnOverlong::Drop => return Ok(RowOutcome::Overlong),
            OnOverlong::Error => {
                let limit = options.max_length;
                return Err(format!(
                    "{tokens} tokens, more than max_length = {limit}; raise it, or set on_overlong to \"truncate\" or \
                     \"drop\""
                ));
            }
            OnOverlong::Truncate => {
                encoded.ids.truncate(options.max_length);
                encoded.trained.truncate(options.max_length);
                notes.truncated = true;
                if encoded.trained_tokens() == 0 {
                    return Ok(RowOutcome::UntrainedAfterTruncation);
                }
            }
        }
    }
    Ok(RowOutcome::Document(encoded, notes))
}

fn tokens(
    record: &Record,
    encoder: &dyn TextEncoder,
    completion_only: bool,
    notes: &mut Notes,
) -> Result<Encoded, EncodeError> {
    match record {
        Record::Chat(conversation) => chat(conversation, encoder, completion_only, notes),
        Record::Completion { prompt, completion } => completion_tokens(prompt, completion, encoder, notes),
        Record::Instruction { .. } => {
            if let Some(conversation) = record.instruction_chat().filter(|_| encoder.has_chat_template()) {
                return chat(&conversation, encoder, completion_only, notes);
            }
            let (prompt, completion) = record.instruction_text().expect("the row is an instruction");
            completion_tokens(&prompt, &completion, encoder, notes)
        }
        Record::Preference(_) => Err("a pair of answers is no document".into()),
        Record::Text(text) => {
            let ids = encoder.encode(text, true)?;
            let mut encoded = Encoded { trained: vec![true; ids.len()], ids };
            append_eos(&mut encoded, encoder)?;
            Ok(encoded)
        }
    }
}

fn completion_tokens(
    prompt: &str,
    completion: &str,
    encoder: &dyn TextEncoder,
    notes: &mut Notes,
) -> Result<Encoded, EncodeError> {
    let mut alone = encoder.encode(prompt, true)?;
    // An EOS that the tokenizer puts behind every text is no part of the prompt.
    if encoder.eos().is_some_and(|eos| alone.last() == Some(&eos))
        && encoder.encode(prompt, false)?.last() != alone.last()
    {
        alone.pop();
    }
    let ids = encoder.encode(&format!("{prompt}{completion}"), true)?;
    let common = common_prefix(&alone, &ids);
    notes.boundary_merged = common < alone.len();
    let trained = (0..ids.len()).map(|i| i >= common).collect();
    let mut encoded = Encoded { ids, trained };
    append_eos(&mut encoded, encoder)?;
    if completion.is_empty() {
        // Nothing to learn but to stop: more likely a mistake in the data.
        encoded.trained.fill(false);
    }
    Ok(encoded)
}

/// The number of tokens with which both begin.
fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn chat(
    conversation: &Conversation,
    encoder: &dyn TextEncoder,
    completion_only: bool,
    notes: &mut Notes,
) -> Result<Encoded, EncodeError> {
    if !encoder.has_chat_template() {
        return Err("the tokenizer has no chat template: set data.chat_template_path, or use `prompt` and \
                    `completion` strings"
            .into());
    }
    if !completion_only {
        let ids = encoder.encode_whole_chat(conversation)?;
        let mut encoded = Encoded { trained: vec![true; ids.len()], ids };
        if !encoded.ids.iter().any(|&id| encoder.is_end(id)) {
            append_eos(&mut encoded, encoder)?;
        }
        return Ok(encoded);
    }
    let mut encoded = match conversation.prompt_of_completion() {
        Some(prompt) => {
            let (alone, ids) = (encoder.encode_prompt(&prompt)?, encoder.encode_whole_chat(conversation)?);
            let common = common_prefix(&alone, &ids);
            notes.boundary_merged = common < alone.len();
            Encoded { trained: (0..ids.len()).map(|i| i >= common).collect(), ids }
        }
        None => encoder.encode_chat(conversation, notes)?,
    };
    if encoded.ids.len() != encoded.trained.len() {
        let (ids, flags) = (encoded.ids.len(), encoded.trained.len());
        return Err(format!("the encoder returned {ids} tokens and {flags} flags").into());
    }
    let Some(last) = encoded.trained.iter().rposition(|&trained| trained) else { return Ok(encoded) };
    // A template's generation marks may leave the end-of-turn token out: the model would never learn to stop.
    for i in 1..encoded.ids.len() {
        if encoded.trained[i - 1] && !encoded.trained[i] && encoder.is_end(encoded.ids[i]) {
            encoded.trained[i] = !encoder.is_end(encoded.ids[i - 1]);
        }
    }
    let learns_to_stop = encoded.ids.iter().zip(&encoded.trained).any(|(&id, &trained)| trained && encoder.is_end(id));
    // Behind a text that is not the assistant's, EOS would teach to end that.
    if !learns_to_stop && encoder.decode(&encoded.ids[last + 1..])?.trim().is_empty() {
        append_eos(&mut encoded, encoder)?;
    }
    Ok(encoded)
}

/// Appends EOS, trained, unless the text ends with it.
fn append_eos(encoded: &mut Encoded, encoder: &dyn TextEncoder) -> Result<(), EncodeError> {
    let eos = encoder.eos().ok_or("the tokenizer has no EOS token, so the model could never learn to stop")?;
    // The text's own, and another one that the tokenizer puts behind every text.
    if encoded.ids.ends_with(&[eos, eos]) {
        encoded.ids.pop();
        encoded.trained.pop();
    }
    if encoded.ids.last() == Some(&eos) {
        encoded.trained.pop();
        encoded.trained.push(true);
    } else {
        encoded.push(eos, true);
    }
    Ok(())
}

fn untrained_message(record: &Record, notes: Notes) -> String {
    let reason = match record {
        Record::Chat(_) | Record::Instruction { .. } if notes.answers_not_found > 0 => {
            "the assistant's messages are not found in the text that the chat template writes (it leaves them out or changes \
             them); a template that marks them with {% generation %} and {% endgeneration %} can be given as \
             data.chat_template_path"
        }
        Record::Chat(conversation) if conversation.messages.iter().all(|message| !message.trained) => {
            "no message of the assistant is trained"
        }
        Record::Chat(_) => "the chat template gives the assistant's messages no tokens",
        Record::Completion { .. } => "the completion is empty",
        Record::Instruction { .. } => "the output is empty",
        Record::Text(_) => "the text is empty",
        Record::Preference(_) => "an answer is empty",
    };
    format!("no token to train on: {reason}; set on_untrained = \"skip\" to leave such rows out")
}

#[cfg(test)]
mod tests {
    use super::super::record::ConversationMessage;
    use super::super::testing::ToyEncoder;
    use super::*;

    const OPTIONS: EncodeOptions = EncodeOptions {
        max_length: 100,
        on_overlong: OnOverlong::Truncate,
        on_untrained: OnUntrained::Error,
        completion_only_loss: true,
    };

    fn document(record: &Record, encoder: &ToyEncoder, options: &EncodeOptions) -> (Encoded, Notes) {
        match encode(record, encoder, options).unwrap() {
            RowOutcome::Document(encoded, notes) => (encoded, notes),
            other => panic!("{other:?}"),
        }
    }

    /// The text with trained stretches in brackets.
    fn marked(record: &Record, encoder: &ToyEncoder) -> String {
        encoder.marked(&document(record, encoder, &OPTIONS).0)
    }

    fn completion(prompt: &str, completion: &str) -> Record {
        Record::Completion { prompt: prompt.into(), completion: completion.into() }
    }

    fn conversation(messages: &[(&str, &str)]) -> Record {
        let messages = messages.iter().map(|(role, content)| ConversationMessage::new(*role, *content)).collect();
        Record::Chat(Conversation::new(messages))
    }

    #[test]
    fn masks_end_with_a_trained_end_token() {
        let encoder = ToyEncoder::default();
        assert_eq!(marked(&Record::Text("ab".into()), &encoder), "[^ab$]");
        assert_eq!(marked(&Record::Text("ab$".into()), &encoder), "[^ab$]");
        assert_eq!(marked(&completion("ab", "cd"), &encoder), "^ab[cd$]");
        assert_eq!(marked(&completion("ab", "cd$"), &encoder), "^ab[cd$]");
        let two_turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
        assert_eq!(marked(&conversation(&two_turns), &encoder), "^<u>a|<a>[b|]<u>c|<a>[d|]");
        // A template without an end of turn gets EOS.
        let bare = ToyEncoder { end_of_turn: "", ..ToyEncoder::default() };
        assert_eq!(marked(&conversation(&two_turns), &bare), "^<u>a<a>[b]<u>c<a>[d$]");
        // A user turn at the end does not matter.
        assert_eq!(marked(&conversation(&[("assistant", "b"), ("user", "c")]), &encoder), "^<a>[b|]<u>c|");
        // EOS behind it would teach to end the user's text.
        assert_eq!(marked(&conversation(&[("assistant", "b"), ("user", "c")]), &bare), "^<a>[b]<u>c");
    }

    /// As TRL has it: of one message everything behind the prompt, of several what the assistant says.
    #[test]
    fn completions_of_messages() {
        let turn = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        let row = |completion: &[serde_json::Value]| {
            let prompt = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")];
            Record::from_json(&serde_json::json!({"prompt": prompt, "completion": completion})).unwrap()
        };
        // What the template writes behind the end of the turn is trained with a single message.
        let encoder = ToyEncoder { end_of_turn: "|.", ..ToyEncoder::default() };
        let one = row(&[turn("assistant", "d")]);
        assert_eq!(marked(&one, &encoder), "^<u>a|.<a>b|.<u>c|.<a>[d|.]");
        let several = row(&[turn("assistant", "d"), turn("user", "e"), turn("assistant", "f")]);
        let plain = ToyEncoder::default();
        assert_eq!(marked(&several, &plain), "^<u>a|<a>b|<u>c|<a>[d|]<u>e|<a>[f|]");
        let bare = ToyEncoder { end_of_turn: "", ..ToyEncoder::default() };
        assert_eq!(marked(&one, &bare), "^<u>a<a>b<u>c<a>[d$]");
    }

    #[test]
    fn instructions_follow_the_template_where_there_is_one() {
        let record = Record::Instruction {
            instruction: "do".into(),
            input: "x".into(),
            output: "y".into(),
            system: None,
            history: vec![],
        };
        assert_eq!(marked(&record, &ToyEncoder::default()), "^<u>do\nx|<a>[y|]");
        let plain = ToyEncoder { template: false, ..ToyEncoder::default() };
        let expected = "^### Instruction:\ndo\n\n### Input:\nx\n\n### Response:\n[y$]";
        assert_eq!(marked(&record, &plain), expected);
        let chat = encode(&conversation(&[("assistant", "b")]), &plain, &OPTIONS).unwrap_err();
        assert!(chat.contains("no chat template"), "{chat}");
    }

    #[test]
    fn everything_is_trained_on_request() {
        let options = EncodeOptions { completion_only_loss: false, ..OPTIONS };
        let encoder = ToyEncoder::default();
        let (encoded, _) = document(&completion("ab", "c"), &encoder, &options);
        assert_eq!(encoder.marked(&encoded), "[^abc$]");
        // The first token has no loss: nothing predicts it.
        assert_eq!(encoded.trained_tokens(), 4);
        // Of conversations too, whoever speaks in them.
        let two = conversation(&[("user", "a"), ("assistant", "b")]);
        assert_eq!(encoder.marked(&document(&two, &encoder, &options).0), "[^<u>a|<a>b|]");
        let bare = ToyEncoder { end_of_turn: "", ..ToyEncoder::default() };
        assert_eq!(bare.marked(&document(&two, &bare, &options).0), "[^<u>a<a>b$]");
    }

    #[test]
    fn a_token_across_the_boundary_is_trained_and_noted() {
        let encoder = ToyEncoder { merge: Some("bc"), ..ToyEncoder::default() };
        let (encoded, notes) = document(&completion("ab", "cd"), &encoder, &OPTIONS);
        assert_eq!(encoder.marked(&encoded), "^a[bcd$]");
        assert!(notes.boundary_merged);
        assert!(!document(&completion("ab", "xd"), &encoder, &OPTIONS).1.boundary_merged);
    }

    #[test]
    fn a_second_bos_is_removed_and_noted() {
        let encoder = ToyEncoder::default();
        let (encoded, notes) = document(&completion("^a", "b"), &encoder, &OPTIONS);
        assert_eq!(encoder.marked(&encoded), "^a[b$]");
        assert!(notes.double_bos);
    }

    #[test]
    fn rows_without_a_trained_token_are_refused_or_skipped() {
        let encoder = ToyEncoder::default();
        let skip = EncodeOptions { on_untrained: OnUntrained::Skip, ..OPTIONS };
        for (record, reason) in [
            (conversation(&[("user", "a")]), "no message of the assistant"),
            (completion("ab", ""), "the completion is empty"),
        ] {
            let message = encode(&record, &encoder, &OPTIONS).unwrap_err();
            assert!(message.starts_with("no token to train on") && message.contains(reason), "{message}");
            assert_eq!(encode(&record, &encoder, &skip).unwrap(), RowOutcome::Untrained);
        }
        // EOS alone, with nothing before it that could predict it.
        let no_bos = ToyEncoder { bos: false, ..ToyEncoder::default() };
        assert!(encode(&Record::Text(String::new()), &no_bos, &OPTIONS).unwrap_err().contains("the text is empty"));
    }

    #[test]
    fn long_documents_keep_their_start_or_are_dropped_or_refused() {
        let encoder = ToyEncoder::default();
        let record = completion("ab", "cdef");
        let with = |max_length, on_overlong| EncodeOptions { max_length, on_overlong, ..OPTIONS };
        let (encoded, notes) = document(&record, &encoder, &with(5, OnOverlong::Truncate));
        assert_eq!(encoder.marked(&encoded), "^ab[cd]");
        assert!(notes.truncated);
        let whole = document(&record, &encoder, &with(8, OnOverlong::Error));
        assert_eq!((encoder.marked(&whole.0).as_str(), whole.1.truncated), ("^ab[cdef$]", false));
        let outcome = |max_length, on_overlong| encode(&record, &encoder, &with(max_length, on_overlong));
        assert_eq!(outcome(3, OnOverlong::Truncate).unwrap(), RowOutcome::UntrainedAfterTruncation);
        assert_eq!(outcome(7, OnOverlong::Drop).unwrap(), RowOutcome::Overlong);
        assert!(outcome(7, OnOverlong::Error).unwrap_err().starts_with("8 tokens, more than max_length = 7"));
    }

    #[test]
    fn without_eos_there_is_nothing_to_append() {
        let encoder = ToyEncoder { eos: false, ..ToyEncoder::default() };
        assert!(encode(&Record::Text("a".into()), &encoder, &OPTIONS).unwrap_err().contains("no EOS token"));
    }
}
