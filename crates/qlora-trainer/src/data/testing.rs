//! An encoder for tests: every character is a token.

use super::encode::{EncodeError, Encoded, Notes, TextEncoder};
use super::record::Conversation;
use crate::fingerprint::Fingerprint;

/// `^` is BOS, `$` EOS, `|` the end of a turn; a turn is `<r>content|` with the first letter of its role.
pub(crate) struct ToyEncoder {
    pub(crate) bos: bool,
    pub(crate) eos: bool,
    pub(crate) template: bool,
    pub(crate) end_of_turn: &'static str,
    /// Characters that make one token when they follow each other.
    pub(crate) merge: Option<&'static str>,
}

/// The token of `merge`.
const MERGED: u32 = 0x11_0000;

impl Default for ToyEncoder {
    fn default() -> Self {
        Self { bos: true, eos: true, template: true, end_of_turn: "|", merge: None }
    }
}

impl ToyEncoder {
    /// The text with trained stretches in brackets.
    pub(crate) fn marked(&self, encoded: &Encoded) -> String {
        let mut text = String::new();
        for (i, (&id, &trained)) in encoded.ids.iter().zip(&encoded.trained).enumerate() {
            let before = i > 0 && encoded.trained[i - 1];
            text += match (before, trained) {
                (false, true) => "[",
                (true, false) => "]",
                _ => "",
            };
            text += &self.decode(&[id]).unwrap();
        }
        text + if encoded.trained.last() == Some(&true) { "]" } else { "" }
    }
}

impl TextEncoder for ToyEncoder {
    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EncodeError> {
        let mut ids: Vec<u32> = Vec::new();
        ids.extend(self.bos().filter(|_| add_special));
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let merged = self.merge.filter(|merge| rest.starts_with(*merge));
            ids.push(if merged.is_some() { MERGED } else { first as u32 });
            rest = &rest[merged.map_or(first.len_utf8(), str::len)..];
        }
        Ok(ids)
    }

    fn has_chat_template(&self) -> bool {
        self.template
    }

    fn encode_chat(&self, conversation: &Conversation, _: &mut Notes) -> Result<Encoded, EncodeError> {
        let mut encoded = Encoded { ids: self.encode("", true)?, trained: Vec::new() };
        encoded.trained.resize(encoded.ids.len(), false);
        for message in &conversation.messages {
            let head = format!("<{}>", message.role.chars().next().ok_or("empty role")?);
            for (text, trained) in [(head.as_str(), false), (&message.content, message.trained)] {
                encoded.ids.extend(self.encode(text, false)?);
                encoded.trained.resize(encoded.ids.len(), trained);
            }
            // Not in the mask, as with templates whose generation marks end too early.
            encoded.ids.extend(self.encode(self.end_of_turn, false)?);
            encoded.trained.resize(encoded.ids.len(), false);
        }
        Ok(encoded)
    }

    fn encode_prompt(&self, conversation: &Conversation) -> Result<Vec<u32>, EncodeError> {
        let mut ids = self.encode_whole_chat(conversation)?;
        ids.extend(self.encode("<a>", false)?);
        Ok(ids)
    }

    fn fingerprint(&self) -> Option<Fingerprint> {
        let mut fingerprint = Fingerprint::new();
        let merge = self.merge.unwrap_or_default();
        fingerprint
            .bytes(format!("{} {} {} {} {merge}", self.bos, self.eos, self.template, self.end_of_turn).as_bytes());
        Some(fingerprint)
    }

    fn bos(&self) -> Option<u32> {
        self.bos.then_some('^' as u32)
    }

    fn eos(&self) -> Option<u32> {
        self.eos.then_some('$' as u32)
    }

    fn is_end(&self, token: u32) -> bool {
        token == '$' as u32 || token == '|' as u32
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, EncodeError> {
        let text = |&id: &u32| match self.merge {
            Some(merge) if id == MERGED => merge.to_owned(),
            _ => char::from_u32(id).map(String::from).unwrap_or_default(),
        };
        Ok(tokens.iter().map(text).collect())
    }
}
