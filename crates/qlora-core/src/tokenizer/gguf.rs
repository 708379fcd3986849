//! The tokenizer of a GGUF vocabulary, built so that it gives the ids of the model's original tokenizer.
//!
//! A GGUF file has no `tokenizer.json`: it names the kind of BPE and, for byte-level ones, the splitting expression
//! (`tokenizer.ggml.pre`). The expressions below are those of the original tokenizers.

use std::collections::HashSet;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::{Template, TemplateProcessing};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer, decoders,
    normalizers,
};

use super::SpecialTokens;
use crate::formats::gguf::{Vocabulary, VocabularyKind, token_type};

/// SentencePiece's character for a space.
pub(super) const SPACE: &str = "\u{2581}";

/// Longest token whose merges are derived; longer ones do not occur, and the work grows with the square.
pub(super) const MAX_TOKEN_CHARS: usize = 1024;

pub(super) fn build(vocabulary: &Vocabulary<'_>) -> Result<(Tokenizer, SpecialTokens), String> {
    if vocabulary.tokens.is_empty() {
        return Err("the vocabulary is empty".to_owned());
    }
    let mut tokenizer = match vocabulary.kind {
        VocabularyKind::ByteLevel => byte_level(vocabulary)?,
        VocabularyKind::SentencePiece => sentence_piece(vocabulary)?,
    };
    add_special_tokens(&mut tokenizer, vocabulary)?;
    add_template(&mut tokenizer, vocabulary)?;
    let special = SpecialTokens {
        bos: vocabulary.bos,
        eos: vocabulary.eos,
        unknown: vocabulary.unknown,
        padding: vocabulary.padding,
    };
    Ok((tokenizer, special))
}

/// The tokens with their ids; two equal tokens are an error.
fn vocab(vocabulary: &Vocabulary<'_>) -> Result<Vocab, String> {
    let mut vocab = Vocab::default();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if let Some(first) = vocab.insert((*token).to_owned(), id as u32) {
            return Err(format!("tokens {first} and {id} of the vocabulary are equal ({token:?})"));
        }
    }
    Ok(vocab)
}

/// The rule by which a byte-level vocabulary splits text before BPE.
enum PreTokenizer {
    /// GPT-2's expression.
    Gpt2,
    /// Every digit alone, then GPT-2's expression.
    DigitsThenGpt2,
    /// An expression of its own.
    Split(&'static str),
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The name that GGUF files give to a splitting expression.
pub(crate) fn pre_tokenizer_of(expression: &str) -> Option<&'static str> {
    [(LLAMA3, "llama-bpe"), (QWEN2, "qwen2"), (TEKKEN, "tekken")]
        .into_iter()
        .find_map(|(known, name)| (known == expression).then_some(name))
}

fn byte_level(vocabulary: &Vocabulary<'_>) -> Result<Tokenizer, String> {
    // Llama 3 takes a whole piece as one token where the vocabulary has it, even if no merges lead there.
    let (pre, normalize, ignore_merges) = match vocabulary.pre {
        "default" | "gpt-2" | "gpt2" => (PreTokenizer::Gpt2, false, false),
        "smollm" => (PreTokenizer::DigitsThenGpt2, false, false),
        "llama-bpe" | "llama3" | "llama-v3" => (PreTokenizer::Split(LLAMA3), false, true),
        "qwen2" | "deepseek-r1-qwen" => (PreTokenizer::Split(QWEN2), true, false),
        "tekken" => (PreTokenizer::Split(TEKKEN), false, true),
        other => {
            return Err(format!(
                "pre-tokenizer \"{other}\" is not supported (supported: default, smollm, llama-bpe, qwen2, tekken); give the \
                 model's own tokenizer.json instead"
            ));
        }
    };
    let vocab = vocab(vocabulary)?;
    let mut merges = Merges::with_capacity(vocabulary.merges.len());
    let mut token = String::new();
    for (index, merge) in vocabulary.merges.iter().enumerate() {
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(format!("merge {index} of the vocabulary ({merge:?}) is not two tokens"));
        };
        token.clear();
        token.extend([left, right]);
        if [left, right, &token].iter().any(|token| !vocab.contains_key(*token)) {
            return Err(format!("merge {index} ({merge:?}) is not made of tokens of the vocabulary"));
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    let model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(ignore_merges).build().map_err(text)?;
    let mut tokenizer = Tokenizer::new(model);
    if normalize {
        tokenizer.with_normalizer(Some(NFC)).map_err(text)?;
    }
    let pre: PreTokenizerWrapper = match pre {
        PreTokenizer::Gpt2 => ByteLevel::new(false, false, true).into(),
        PreTokenizer::DigitsThenGpt2 => {
            PreTokenizers::new(vec![Digits::new(true).into(), ByteLevel::new(false, false, true).into()]).into()
        }
        PreTokenizer::Split(expression) => {
            let pattern = SplitPattern::Regex(expression.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(text)?;
            PreTokenizers::new(vec![split.into(), ByteLevel::new(false, false, false).into()]).into()
        }
    };
    tokenizer.with_pre_tokenizer(Some(pre));
    tokenizer.with_decoder(Some(ByteLevel::new(false, false, true)));
    Ok(tokenizer)
}

/// SentencePiece's BPE as Llama 2's `tokenizer.json` has it: spaces become U+2581, one is put before every text, bytes
/// outside the vocabulary become byte tokens.
fn sentence_piece(vocabulary: &Vocabulary<'_>) -> Result<Tokenizer, String> {
    let ids = vocab(vocabulary)?;
    let merges = derive_merges(vocabulary, &ids)?;
    let mut builder = BPE::builder().fuse_unk(true).byte_fallback(true);
    if let Some(unknown) = vocabulary.unknown {
        builder = builder.unk_token(vocabulary.tokens[unknown as usize].to_owned());
    }
    let mut tokenizer = Tokenizer::new(builder.vocab_and_merges(ids, merges).build().map_err(text)?);
    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        normalizers.push(Prepend::new(SPACE.to_owned()).into());
    }
    normalizers.push(Replace::new(" ", SPACE).map_err(text)?.into());
    tokenizer.with_normalizer(Some(normalizers::Sequence::new(normalizers))).map_err(text)?;
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ").map_err(text)?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(decoders::sequence::Sequence::new(decoders)));
    Ok(tokenizer)
}

/// The merges that SentencePiece's scores imply: every way to put a token together from two others, the best token
/// first. SentencePiece always joins the neighbours whose token has the best score, BPE those whose merge comes first.
fn derive_merges(vocabulary: &Vocabulary<'_>, ids: &Vocab) -> Result<Merges, String> {
    if vocabulary.scores.is_empty() {
        return Err("metadata tokenizer.ggml.scores is missing".to_owned());
    }
    let mergeable = |id: u32| matches!(vocabulary.type_of(id as usize), token_type::NORMAL | token_type::USER_DEFINED);
    // Score of the token, then the lengths of its halves, then their ids: transformers' order.
    let mut found: Vec<(f32, usize, usize, u32, u32)> = Vec::new();
    for (id, (token, score)) in vocabulary.tokens.iter().zip(&vocabulary.scores).enumerate() {
        let chars = token.chars().count();
        if score.is_nan() || chars > MAX_TOKEN_CHARS {
            return Err(format!("token {id} of the vocabulary has score {score} and {chars} characters"));
        }
        if !mergeable(id as u32) {
            continue;
        }
        for (left_chars, (split, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(split);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right))
                && mergeable(left)
                && mergeable(right)
            {
                found.push((*score, left_chars, chars - left_chars, left, right));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then((b.1, b.2).cmp(&(a.1, a.2))).then((a.3, a.4).cmp(&(b.3, b.4))));
    let name = |id: u32| vocabulary.tokens[id as usize].to_owned();
    Ok(found.into_iter().map(|(.., left, right)| (name(left), name(right))).collect())
}

/// Control tokens are recognised in text and skipped when decoding; user-defined ones are recognised only, as are those that
/// the file lists as added.
fn add_special_tokens(tokenizer: &mut Tokenizer, vocabulary: &Vocabulary<'_>) -> Result<(), String> {
    let listed: HashSet<&str> = vocabulary.added.iter().copied().collect();
    let untyped = vocabulary.types.is_empty().then(|| Untyped::new(vocabulary));
    let mut added = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let special = match vocabulary.type_of(id) {
            token_type::CONTROL => true,
            token_type::UNKNOWN => vocabulary.kind == VocabularyKind::SentencePiece,
            token_type::USER_DEFINED => false,
            _ => match &untyped {
                Some(untyped) if untyped.is_special(id as u32, token) => true,
                Some(untyped) if untyped.is_added(token) => false,
                _ if listed.contains(token) => false,
                _ => continue,
            },
        };
        added.push(AddedToken::from(*token, special).normalized(false));
    }
    tokenizer.add_tokens(added).map_err(text)?;
    Ok(())
}

/// Clues to the token types of a file that does not store them.
struct Untyped<'a> {
    roles: [Option<u32>; 4],
    /// The tokens that merges produce; none where the vocabulary has no merges.
    merged: Option<HashSet<String>>,
    listed: HashSet<&'a str>,
}

impl<'a> Untyped<'a> {
    fn new(vocabulary: &Vocabulary<'a>) -> Self {
        let byte_level = vocabulary.kind == VocabularyKind::ByteLevel;
        let merged = (byte_level && !vocabulary.merges.is_empty())
            .then(|| vocabulary.merges.iter().map(|merge| merge.replacen(' ', "", 1)).collect());
        let roles = [vocabulary.bos, vocabulary.eos, vocabulary.unknown.filter(|_| !byte_level), vocabulary.padding];
        Self { roles, merged, listed: vocabulary.added.iter().copied().collect() }
    }

    /// Tokens with a role, and added ones that are written as special tokens are: `<|im_start|>`.
    fn is_special(&self, id: u32, token: &str) -> bool {
        self.roles.contains(&Some(id)) || self.is_added(token) && token.starts_with("<|") && token.ends_with("|>")
    }

    /// BPE could never give a token that no merge leads to: it was added to the vocabulary.
    fn is_added(&self, token: &str) -> bool {
        let unreachable = self.merged.as_ref().is_some_and(|merged| !merged.contains(token));
        self.listed.contains(token) || unreachable && token.chars().nth(1).is_some()
    }
}

/// BOS and EOS around every text, where the file or the kind of vocabulary says so.
fn add_template(tokenizer: &mut Tokenizer, vocabulary: &Vocabulary<'_>) -> Result<(), String> {
    let by_kind = match vocabulary.kind {
        VocabularyKind::SentencePiece => true,
        VocabularyKind::ByteLevel => matches!(vocabulary.pre, "llama-bpe" | "llama3" | "llama-v3" | "tekken"),
    };
    let bos = vocabulary.bos.filter(|_| vocabulary.add_bos.unwrap_or(by_kind));
    let eos = vocabulary.eos.filter(|_| vocabulary.add_eos.unwrap_or(false));
    if bos.is_none() && eos.is_none() {
        return Ok(());
    }
    let token = |id: Option<u32>| id.map(|id| vocabulary.tokens[id as usize]);
    let (bos_token, eos_token) = (token(bos), token(eos));
    if [bos_token, eos_token].into_iter().flatten().any(|token| token.is_empty() || token.starts_with('$')) {
        return Err("the begin or end token of the vocabulary cannot be put around texts".to_owned());
    }
    let single: Vec<&str> = [bos_token, Some("$A"), eos_token].into_iter().flatten().collect();
    let pair: Vec<&str> =
        [bos_token, Some("$A"), eos_token, bos_token, Some("$B:1"), eos_token].into_iter().flatten().collect();
    let tokens: HashSet<(String, u32)> =
        [bos, eos].into_iter().flatten().map(|id| (vocabulary.tokens[id as usize].to_owned(), id)).collect();
    let processor = TemplateProcessing::builder()
        .single(Template::try_from(single)?)
        .pair(Template::try_from(pair)?)
        .special_tokens(tokens.into_iter().collect::<Vec<_>>())
        .build()
        .map_err(text)?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
