//! The tokenizer part of a GGUF file's metadata.

use super::header::{Header, Parse};

/// The kind of a vocabulary's tokenizer (`tokenizer.ggml.model`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VocabularyKind {
    /// Byte-level BPE with merges ("gpt2").
    ByteLevel,
    /// SentencePiece BPE with scores and byte fallback ("llama").
    SentencePiece,
}

/// The kinds of a token (`tokenizer.ggml.token_type`).
pub(crate) mod token_type {
    pub(crate) const NORMAL: i32 = 1;
    pub(crate) const UNKNOWN: i32 = 2;
    pub(crate) const CONTROL: i32 = 3;
    pub(crate) const USER_DEFINED: i32 = 4;
}

/// A vocabulary as the file states it; texts are borrowed from the mapped file.
#[derive(Debug)]
pub(crate) struct Vocabulary<'a> {
    pub(crate) kind: VocabularyKind,
    /// The name of the regular expression that splits the text before BPE (`tokenizer.ggml.pre`).
    pub(crate) pre: &'a str,
    pub(crate) tokens: Vec<&'a str>,
    /// One of [`token_type`] for each token; empty if the file has none.
    pub(crate) types: Vec<i32>,
    /// SentencePiece's scores; empty if the file has none.
    pub(crate) scores: Vec<f32>,
    /// BPE's merges, best first, two tokens with a space between; empty if the file has none.
    pub(crate) merges: Vec<&'a str>,
    /// Tokens that no merges lead to, where the file lists them (`tokenizer.ggml.added_tokens`).
    pub(crate) added: Vec<&'a str>,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Option<u32>,
    pub(crate) unknown: Option<u32>,
    pub(crate) padding: Option<u32>,
    pub(crate) add_bos: Option<bool>,
    pub(crate) add_eos: Option<bool>,
    pub(crate) add_space_prefix: Option<bool>,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn read(header: &Header, file: &'a [u8]) -> Parse<Self> {
        let model = header.str("tokenizer.ggml.model", file)?;
        let kind = match model.ok_or("metadata tokenizer.ggml.model is missing: the file has no tokenizer")? {
            "gpt2" => VocabularyKind::ByteLevel,
            "llama" => VocabularyKind::SentencePiece,
            other => return Err(format!("tokenizer \"{other}\" is not supported (supported: gpt2, llama)")),
        };
        let tokens =
            header.strings("tokenizer.ggml.tokens", file)?.ok_or("metadata tokenizer.ggml.tokens is missing")?;
        let types = header.ints("tokenizer.ggml.token_type", file)?.unwrap_or_default();
        let scores = header.floats("tokenizer.ggml.scores", file)?.unwrap_or_default();
        for (key, len) in [("token_type", types.len()), ("scores", scores.len())] {
            if len != 0 && len != tokens.len() {
                return Err(format!("metadata tokenizer.ggml.{key} has {len} entries for {} tokens", tokens.len()));
            }
        }
        let id = |key: &str| -> Parse<Option<u32>> {
            let key = format!("tokenizer.ggml.{key}_token_id");
            match header.u64(&key)? {
                None => Ok(None),
                Some(id) if (id as usize) < tokens.len() && id <= u64::from(u32::MAX) => Ok(Some(id as u32)),
                Some(id) => Err(format!("metadata {key} is {id}, outside the {} tokens", tokens.len())),
            }
        };
        Ok(Self {
            kind,
            pre: header.str("tokenizer.ggml.pre", file)?.unwrap_or("default"),
            types,
            scores,
            merges: header.strings("tokenizer.ggml.merges", file)?.unwrap_or_default(),
            added: header.strings("tokenizer.ggml.added_tokens", file)?.unwrap_or_default(),
            bos: id("bos")?,
            eos: id("eos")?,
            unknown: id("unknown")?,
            padding: id("padding")?,
            add_bos: header.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: header.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: header.bool("tokenizer.ggml.add_space_prefix")?,
            tokens,
        })
    }

    /// The kind of a token; normal where the file does not say.
    pub(crate) fn type_of(&self, id: usize) -> i32 {
        self.types.get(id).copied().unwrap_or(token_type::NORMAL)
    }
}
