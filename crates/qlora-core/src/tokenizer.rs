//! Text to token ids and back: Hugging Face's `tokenizer.json`, SentencePiece's `tokenizer.model` where that stands alone, or the
//! vocabulary inside a GGUF file.

mod added;
mod gguf;
mod guard;
mod json;
mod model_proto;
mod sentencepiece;
mod stream;

use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::file::{self, LARGE, SMALL};
use crate::formats::gguf::{Gguf, read_vocabulary};
use guard::guarded;

pub(crate) use gguf::pre_tokenizer_of;
pub use stream::DecodeStream;

/// A tokenizer with its special tokens. Encoding neither truncates nor pads, whatever the file says.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    vocab_size: usize,
}

/// The roles that a tokenizer's files give to tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct SpecialTokens {
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
}

/// A token of an encoded text.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Piece {
    /// The token's id.
    pub id: u32,
    /// The bytes of the text it stands for. Tokens that are part of one character all get the character's bytes; a token
    /// that was added (such as BOS) has an empty range.
    pub bytes: Range<usize>,
}

/// The file that most models have.
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";
/// SentencePiece's, which older models have alone.
pub(crate) const MODEL_FILE: &str = "tokenizer.model";

/// Advice for a model whose own tokenizer is missing or not known, as the end of a message.
const BY_HAND: &str = "; another folder or hub id with the model's tokenizer.json can be given (`--tokenizer`, or \
                       `tokenizer_name_or_path` in [model])";

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder (where there is none, `tokenizer.model`, to the tokenizer that transformers makes of
    /// it), and the special tokens from `tokenizer_config.json` or
    /// `special_tokens_map.json`. Tokens that only these files (or `added_tokens.json`) know are added as transformers adds
    /// them.
    ///
    /// # Errors
    /// If there is neither file, or one is damaged.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let [path, model] = [TOKENIZER_FILE, MODEL_FILE].map(|name| folder.join(name));
        let mut tokenizer = if path.exists() {
            let Self { mut inner, special, .. } = Self::from_file(&path)?;
            added::complete(&mut inner, folder, &Map::new())?;
            added::note_unused_options(&inner, folder)?;
            Self::new(inner, special)
        } else if model.exists() {
            Self::from_sentencepiece(&model, folder)?
        } else {
            return Err(Error::format(folder, format!("tokenizer.json is missing{BY_HAND}")));
        };
        for name in ["special_tokens_map.json", "tokenizer_config.json"] {
            let path = folder.join(name);
            if path.exists() {
                tokenizer.take_roles(&file::read_object(&path, SMALL)?);
            }
        }
        Ok(tokenizer)
    }

    /// The tokenizer of `model`, a `tokenizer.model`, with the configuration beside it in `folder`.
    fn from_sentencepiece(model: &Path, folder: &Path) -> Result<Self> {
        let damaged = |message: String| Error::format(model, message);
        let mut config = added::config_of(folder)?;
        sentencepiece::remark(&config, folder);
        let bytes = file::read_bytes(model, sentencepiece::MAX_FILE)?;
        let family = sentencepiece::model_type(folder);
        let (mut inner, special) = sentencepiece::build(&bytes, &mut config, family.as_deref()).map_err(damaged)?;
        added::complete(&mut inner, folder, &config)?;
        sentencepiece::add_template(&mut inner, &config).map_err(damaged)?;
        Ok(Self::new(inner, special))
    }

    /// Reads a `tokenizer.json`. Roles of special tokens are not in that file: [`Tokenizer::from_folder`] finds them.
    ///
    /// # Errors
    /// If the file cannot be read or is damaged.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        json::read(&file::read_text(path, LARGE)?)
            .map(|inner| Self::new(inner, SpecialTokens::default()))
            .map_err(|message| Error::format(path, message))
    }

    /// Builds the tokenizer whose vocabulary a GGUF file holds.
    ///
    /// # Errors
    /// If the file has none, it is damaged, or its kind is not supported.
    pub fn from_gguf(model: &Gguf) -> Result<Self> {
        use crate::source::WeightSource;
        let damaged = |message: String| Error::format(model.path(), message);
        let built = model.vocabulary().and_then(|vocabulary| gguf::build(&vocabulary).map_err(damaged));
        built.map(|(inner, special)| Self::new(inner, special)).map_err(|error| match error {
            Error::Format { path, message } => Error::format(path, format!("{message}{BY_HAND}")),
            other => other,
        })
    }

    /// As [`Tokenizer::from_gguf`], from a file that need not hold a model (a "vocab-only" file).
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`].
    pub fn from_gguf_file(path: impl AsRef<Path>) -> Result<Self> {
        read_vocabulary(path.as_ref(), gguf::build).map(|(inner, special)| Self::new(inner, special))
    }

    fn new(inner: tokenizers::Tokenizer, special: SpecialTokens) -> Self {
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Self { inner, special, vocab_size }
    }

    /// Takes over the special tokens of a `tokenizer_config.json`: a string, or an object with `content`.
    fn take_roles(&mut self, config: &Map<String, Value>) {
        let find = |key: &str| {
            let value = config.get(key)?;
            let token = value.as_str().or_else(|| value.get("content")?.as_str())?;
            self.inner.token_to_id(token)
        };
        let found = SpecialTokens {
            bos: find("bos_token").or(self.special.bos),
            eos: find("eos_token").or(self.special.eos),
            unknown: find("unk_token").or(self.special.unknown),
            padding: find("pad_token").or(self.special.padding),
        };
        self.special = found;
    }

    /// The token ids of `text`. Special tokens written in the text are recognised; `add_special_tokens` also adds those
    /// the tokenizer puts around every text (BOS, for most models). Text from a chat template has them already.
    ///
    /// # Errors
    /// If the tokenizer cannot encode the text (a vocabulary without unknown token).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special_tokens))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token ids of a text that is to be continued: as [`Tokenizer::encode`] with special tokens, but with one BOS where
    /// the text begins with one itself, and without an EOS that the tokenizer would put behind it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, true)?;
        if let (Some(bos), [first, second, ..]) = (self.special.bos, ids.as_slice())
            && (*first, *second) == (bos, bos)
        {
            ids.remove(0);
        }
        if let (Some(eos), Some(last)) = (self.special.eos, ids.last())
            && *last == eos
            && self.encode(text, false)?.last() != Some(&eos)
        {
            ids.pop();
        }
        Ok(ids)
    }

    /// As [`Tokenizer::encode`], with the place of every token in the text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pieces(&self, text: &str, add_special_tokens: bool) -> Result<Vec<Piece>> {
        let encoding = guarded(|| self.inner.encode(text, add_special_tokens))?;
        let pieces = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(pieces.map(|(&id, &(start, end))| Piece { id, bytes: start..end }).collect())
    }

    /// The token ids of `text`, and for each whether any of its bytes lies in one of `spans` (ascending byte ranges of
    /// the text): the tokens to train.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_spans(
        &self,
        text: &str,
        spans: &[Range<usize>],
        add_special_tokens: bool,
    ) -> Result<(Vec<u32>, Vec<bool>)> {
        let pieces = self.encode_pieces(text, add_special_tokens)?;
        let inside = |bytes: &Range<usize>| {
            let next = spans.partition_point(|span| span.end <= bytes.start);
            spans.get(next).is_some_and(|span| span.start < bytes.end)
        };
        Ok(pieces.into_iter().map(|piece| (piece.id, inside(&piece.bytes))).unzip())
    }

    /// The text of token ids. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special_tokens))
    }

    /// Decodes token by token, for output while generating.
    pub fn decode_stream(&self, skip_special_tokens: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special_tokens)
    }

    /// A text that is the same for tokenizers that give the same tokens: the whole tokenizer as JSON, and the roles of its tokens.
    /// None if it has no such form.
    pub fn identity(&self) -> Option<String> {
        Some(format!("{}{:?}", self.inner.to_string(false).ok()?, self.special))
    }

    /// The token that begins a text.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// The token that ends a text.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.special.eos
    }

    /// The token for text that the vocabulary does not have.
    pub fn unk_token_id(&self) -> Option<u32> {
        self.special.unknown
    }

    /// The token that pads batches.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.special.padding
    }

    /// The largest token id plus one. The embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its text in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token's text in the vocabulary (byte-level tokens in their printable alphabet).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether decoding can skip this token as a special one.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        added.get_added_tokens_decoder().get(&id).is_some_and(|token| token.special)
    }

    /// The special tokens with their texts.
    pub fn special_tokens(&self) -> impl Iterator<Item = (u32, String)> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.iter().filter(|(_, token)| token.special).map(|(id, token)| (*id, token.content.clone()))
    }

    /// Whether this token was added to the vocabulary of the model (special tokens are): it is recognised in any text as a whole.
    pub fn is_added(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// The tokenizer of the `tokenizers` crate.
    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// Writes a `tokenizer.json` that Hugging Face's libraries read.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.inner.save(path, true).map_err(|e| Error::io(path, std::io::Error::other(e)))
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({} tokens, {:?})", self.vocab_size, self.special)
    }
}

#[cfg(test)]
#[path = "tokenizer/tests.rs"]
mod tests;
