//! Decoding one token at a time.

use super::Tokenizer;
use crate::error::Result;

/// Text from tokens as they come, without splitting characters.
///
/// A token can end in the middle of a character, and a decoder can treat the first token of a text specially (a leading
/// space that SentencePiece removes), so tokens are decoded together with those before them, and only what is new and
/// complete is handed out. All pieces joined are the text that [`Tokenizer::decode`] gives for all tokens at once.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    // The window: tokens whose text was handed out, then those whose text was not.
    ids: Vec<u32>,
    done: usize,
}

/// A character has at most four bytes; this many tokens without a complete one are not UTF-8 at all.
const MAX_PENDING: usize = 16;

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special_tokens: bool) -> Self {
        Self { tokenizer, skip_special_tokens, ids: Vec::new(), done: 0 }
    }

    /// Takes the next token and returns the text that is complete with it, possibly none.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let (text, start) = self.pending()?;
        if text.len() <= start
            || (text.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.done < MAX_PENDING)
        {
            return Ok(String::new());
        }
        self.ids.drain(..self.done);
        self.done = self.ids.len();
        Ok(text[start..].to_owned())
    }

    /// The text of tokens that did not complete a character.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(mut self) -> Result<String> {
        let (mut text, start) = self.pending()?;
        self.ids.clear();
        Ok(text.split_off(start.min(text.len())))
    }

    /// The text of the window, and where what was not handed out yet begins in it.
    fn pending(&self) -> Result<(String, usize)> {
        let before = self.tokenizer.decode(&self.ids[..self.done], self.skip_special_tokens)?;
        let text = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        let start = if text.starts_with(&before) { before.len() } else { text.floor_char_boundary(before.len()) };
        Ok((text, start))
    }
}
