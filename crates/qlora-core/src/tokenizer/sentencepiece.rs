//! The tokenizer of a `tokenizer.model` that has no `tokenizer.json` beside it, with the ids of transformers 5.24.
//!
//! transformers builds it in one of three ways:
//!
//! | class | before the model | user-defined pieces |
//! |---|---|---|
//! | `LlamaTokenizer` | a space in front of the text; with `legacy` in front of every part between added tokens | added tokens |
//! | `GemmaTokenizer` | nothing | added tokens |
//! | any other | the file's own table and rules for spaces, a space in front if the file says so | split off before the model |
//!
//! The class is the one that `tokenizer_config.json` names, except for families whose repositories are known to name a wrong one.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Precompiled, Replace};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::{Template, TemplateProcessing};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer, decoders,
    normalizers,
};

use super::SpecialTokens;
use super::added::text_of;
use super::gguf::{MAX_TOKEN_CHARS, SPACE};
use super::guard::guarded;
use super::model_proto::{Algorithm, Model, Piece, piece_type};

/// The largest file that is read; Gemma's, of 262,144 tokens, has 4.7 MB.
pub(super) const MAX_FILE: u64 = 256 << 20;

/// Families for which transformers builds the tokenizer from the file alone, whatever class the repository names.
const BY_FILE: [&str; 9] =
    ["mistral", "mistral3", "ministral", "ministral3", "mixtral", "phi3", "phimoe", "nemotron", "internlm2"];
/// Classes without rules of their own.
const PLAIN: [&str; 4] = ["PreTrainedTokenizer", "TokenizersBackend", "SentencePieceBackend", "MistralCommonBackend"];

/// How transformers builds a tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Llama,
    Gemma,
    Plain,
}

impl Class {
    fn of(config: &Map<String, Value>, model_type: Option<&str>) -> Result<Self, String> {
        let named = config.get("tokenizer_class").and_then(Value::as_str);
        let named = named.map(|class| class.strip_suffix("Fast").unwrap_or(class));
        match (named, model_type) {
            (_, Some(model_type)) if BY_FILE.contains(&model_type) => Ok(Self::Plain),
            (Some("LlamaTokenizer"), _) => Ok(Self::Llama),
            (Some("GemmaTokenizer"), _) => Ok(Self::Gemma),
            (None, Some(model_type)) if model_type.starts_with("gemma") => Ok(Self::Gemma),
            (None, _) => Ok(Self::Plain),
            (Some(class), _) if PLAIN.contains(&class) => Ok(Self::Plain),
            (Some(class), _) => Err(format!(
                "tokenizer_config.json names the class {class:?}, whose rules for a tokenizer.model are not known here: \
                 AutoTokenizer.from_pretrained(...).save_pretrained(...) in transformers writes a tokenizer.json"
            )),
        }
    }

    /// The special tokens that the class has if the configuration does not name others.
    fn roles(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Llama => &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")],
            Self::Gemma => &[
                ("bos_token", "<bos>"),
                ("eos_token", "<eos>"),
                ("unk_token", "<unk>"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask>"),
            ],
            Self::Plain => &[],
        }
    }
}

/// The tokenizer of a file, and `config` (of `tokenizer_config.json`) with the roles that the class or the file adds.
///
/// # Errors
/// If the file is damaged, or transformers would build the tokenizer in a way that is not known here.
pub(super) fn build(
    file: &[u8],
    config: &mut Map<String, Value>,
    model_type: Option<&str>,
) -> Result<(Tokenizer, SpecialTokens), String> {
    let model = Model::parse(file)?;
    let class = Class::of(config, model_type)?;
    for (id, piece) in model.pieces.iter().enumerate() {
        let chars = piece.text.chars().count();
        if chars == 0 || chars > MAX_TOKEN_CHARS || !piece.score.is_finite() {
            return Err(format!("token {id} has {chars} characters and score {}", piece.score));
        }
    }
    let mut role = |key: &str, text: &str| {
        config.entry(key).or_insert_with(|| Value::String(text.to_owned()));
    };
    class.roles().iter().for_each(|(key, text)| role(key, text));
    if class == Class::Plain {
        model.bos.iter().for_each(|text| role("bos_token", text));
        model.eos.iter().for_each(|text| role("eos_token", text));
        model.unknown.iter().for_each(|_| role("unk_token", model.unknown_piece));
    }
    let user_defined: Vec<&str> =
        model.pieces.iter().filter(|piece| piece.kind == piece_type::USER_DEFINED).map(|piece| piece.text).collect();
    let tokenizer = match (class, model.algorithm) {
        (Class::Plain, _) => plain(&model, config, &user_defined),
        (_, Algorithm::Bpe) => of_class(&model, config, class),
        (_, Algorithm::Unigram) => Err("a Unigram model, where LlamaTokenizer and GemmaTokenizer have BPE".to_owned()),
    };
    let mut tokenizer = tokenizer?;
    let apart = |piece: &&Piece<'_>| {
        piece.kind == piece_type::CONTROL || piece.kind == piece_type::USER_DEFINED && class != Class::Plain
    };
    let tokens = model.pieces.iter().filter(apart);
    let tokens = tokens.map(|piece| AddedToken::from(piece.text, piece.kind == piece_type::CONTROL).normalized(false));
    tokenizer.add_tokens(tokens.collect::<Vec<_>>()).map_err(text)?;
    let find = |key: &str| tokenizer.token_to_id(text_of(config.get(key)?)?);
    let special = SpecialTokens {
        bos: find("bos_token"),
        eos: find("eos_token"),
        unknown: find("unk_token"),
        padding: find("pad_token"),
    };
    Ok((tokenizer, special))
}

/// The family of the model in a folder, if it is known.
pub(super) fn model_type(folder: &Path) -> Option<String> {
    let text = crate::file::read_text(&folder.join("config.json"), crate::file::SMALL).ok()?;
    let config: Value = serde_json::from_str(&text).ok()?;
    config["model_type"].as_str().map(str::to_owned)
}

fn flag(config: &Map<String, Value>, key: &str, default: bool) -> bool {
    config.get(key).and_then(Value::as_bool).unwrap_or(default)
}

/// As `LlamaTokenizer` and `GemmaTokenizer` do.
fn of_class(model: &Model<'_>, config: &Map<String, Value>, class: Class) -> Result<Tokenizer, String> {
    let vocab = vocab(model.pieces.iter().map(|piece| piece.text))?;
    let merges = merges(&vocab, model.pieces.iter().enumerate().map(|(id, piece)| (piece.text, id as f64)));
    let mut builder = BPE::builder().vocab_and_merges(vocab, merges).fuse_unk(true).byte_fallback(true);
    if class == Class::Gemma {
        let unknown = config.get("unk_token").and_then(text_of).unwrap_or("<unk>");
        builder = builder.unk_token(unknown.to_owned());
    }
    let mut tokenizer = Tokenizer::new(builder.build().map_err(text)?);
    let mut prefix = false;
    if class == Class::Gemma {
        tokenizer.with_normalizer(Some(Replace::new(" ", SPACE).map_err(text)?)).map_err(text)?;
    } else {
        prefix = flag(config, "add_prefix_space", true);
        let scheme = match (prefix, flag(config, "legacy", false)) {
            (false, _) => PrependScheme::Never,
            (true, true) => PrependScheme::Always,
            (true, false) => PrependScheme::First,
        };
        tokenizer.with_pre_tokenizer(Some(Metaspace::new('\u{2581}', scheme, false)));
    }
    set_decoder(&mut tokenizer, true, prefix, true)?;
    Ok(tokenizer)
}

/// By the file alone.
fn plain(model: &Model<'_>, config: &Map<String, Value>, user_defined: &[&str]) -> Result<Tokenizer, String> {
    let mut tokenizer = match model.algorithm {
        Algorithm::Unigram => {
            let pieces = model.pieces.iter().map(|piece| (piece.text.to_owned(), f64::from(piece.score))).collect();
            let unigram = guarded(|| Unigram::from(pieces, model.unknown, model.byte_fallback)).map_err(text)?;
            Tokenizer::new(unigram)
        }
        Algorithm::Bpe => {
            let names = renamed(model, config);
            let vocab = vocab(names.iter().copied())?;
            let normal = model.pieces.iter().zip(&names).filter(|(piece, _)| piece.kind == piece_type::NORMAL);
            let normal: Vec<(&str, f64)> = normal.map(|(piece, name)| (*name, -f64::from(piece.score))).collect();
            let mergeable = normal.iter().map(|(name, _)| ((*name).to_owned(), vocab[*name])).collect();
            let merges = merges(&mergeable, normal.into_iter());
            let builder = BPE::builder().vocab_and_merges(vocab, merges).unk_token(model.unknown_piece.to_owned());
            let builder =
                builder.fuse_unk(true).byte_fallback(model.byte_fallback).ignore_merges(!user_defined.is_empty());
            Tokenizer::new(builder.build().map_err(text)?)
        }
    };
    let regex = |pattern: &str| ReplacePattern::Regex(pattern.to_owned());
    let replace = |pattern: ReplacePattern, by: &str| Replace::new(pattern, by).map_err(text);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if !model.charsmap.is_empty() {
        let table = guarded(|| Precompiled::from(model.charsmap)).map_err(text)?;
        normalizers.push(table.into());
    }
    if model.remove_extra_whitespaces {
        normalizers.push(replace(regex(r"\A +| +\z"), "")?.into());
        normalizers.push(replace(regex(" {2,}"), " ")?.into());
    }
    if model.escape_whitespaces {
        normalizers.push(replace(" ".to_owned().into(), SPACE)?.into());
    }
    let legacy = flag(config, "legacy", true);
    let mut pre: Vec<PreTokenizerWrapper> = Vec::new();
    if model.add_dummy_prefix {
        if legacy {
            normalizers.push(replace(regex("\\A\u{2581}"), "\u{2581}\u{2581}")?.into());
        }
        let scheme = if legacy { PrependScheme::Always } else { PrependScheme::First };
        pre.push(Metaspace::new('\u{2581}', scheme, false).into());
    }
    tokenizer.with_normalizer(Some(normalizers::Sequence::new(normalizers))).map_err(text)?;
    if !user_defined.is_empty() {
        let mut longest_first = user_defined.to_vec();
        longest_first.sort_by_key(|piece| std::cmp::Reverse(piece.chars().count()));
        let pattern: Vec<String> = longest_first.into_iter().map(regex::escape).collect();
        let split = Split::new(SplitPattern::Regex(pattern.join("|")), SplitDelimiterBehavior::Isolated, false);
        pre.push(split.map_err(text)?.into());
    }
    if !pre.is_empty() {
        tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(pre)));
    }
    set_decoder(&mut tokenizer, model.byte_fallback, model.add_dummy_prefix, model.byte_fallback)?;
    Ok(tokenizer)
}

fn set_decoder(tokenizer: &mut Tokenizer, bytes: bool, prefix: bool, fuse: bool) -> Result<(), String> {
    let mut decoders: Vec<DecoderWrapper> = vec![Replace::new(SPACE, " ").map_err(text)?.into()];
    if bytes {
        decoders.push(ByteFallback::new().into());
    }
    if prefix || fuse {
        decoders.push(Fuse::new().into());
    }
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(decoders::sequence::Sequence::new(decoders)));
    Ok(())
}

/// The pieces' names, some of which `added_tokens_decoder` replaces (placeholders).
fn renamed<'a>(model: &Model<'a>, config: &'a Map<String, Value>) -> Vec<&'a str> {
    let declared = config.get("added_tokens_decoder").and_then(Value::as_object);
    let declared: BTreeMap<usize, &str> =
        declared.into_iter().flatten().filter_map(|(id, token)| Some((id.parse().ok()?, text_of(token)?))).collect();
    let pieces = || model.pieces.iter().enumerate();
    let kept: HashSet<&str> =
        pieces().filter(|(id, _)| !declared.contains_key(id)).map(|(_, piece)| piece.text).collect();
    let name = |(id, piece): (usize, &Piece<'a>)| {
        declared.get(&id).copied().filter(|name| !kept.contains(name)).unwrap_or(piece.text)
    };
    pieces().map(name).collect()
}

fn vocab<'a>(pieces: impl Iterator<Item = &'a str>) -> Result<Vocab, String> {
    let mut vocab = Vocab::default();
    for (id, piece) in pieces.enumerate() {
        if let Some(first) = vocab.insert(piece.to_owned(), id as u32) {
            return Err(format!("tokens {first} and {id} are equal ({piece:?})"));
        }
    }
    Ok(vocab)
}

/// Every way to put a token together from two of `parts`, those of the lowest rank first; then the shorter left half, then ids.
fn merges<'a>(parts: &Vocab, tokens: impl Iterator<Item = (&'a str, f64)>) -> Merges {
    let mut found: Vec<(f64, u32, usize, &str, &str)> = Vec::new();
    for (token, rank) in tokens {
        for (chars, (split, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(split);
            if parts.contains_key(left) && parts.contains_key(right) {
                found.push((rank, parts.get(token).copied().unwrap_or_default(), chars, left, right));
            }
        }
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    found.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect()
}

/// BOS and EOS around every text, where `tokenizer_config.json` asks for them.
///
/// # Errors
/// If it asks for a token that the vocabulary lacks.
pub(super) fn add_template(tokenizer: &mut Tokenizer, config: &Map<String, Value>) -> Result<(), String> {
    let mut tokens = Vec::new();
    let mut around = |option: &str, key: &str| -> Result<Option<String>, String> {
        if !flag(config, option, false) {
            return Ok(None);
        }
        let name = config.get(key).and_then(text_of).filter(|name| !name.is_empty() && !name.starts_with('$'));
        let found = name.and_then(|name| Some((name.to_owned(), tokenizer.token_to_id(name)?)));
        let found = found.ok_or_else(|| format!("{option} is true, but {key} is no token of the vocabulary"))?;
        tokens.push(found.clone());
        Ok(Some(found.0))
    };
    let (bos, eos) = (around("add_bos_token", "bos_token")?, around("add_eos_token", "eos_token")?);
    if bos.is_none() && eos.is_none() {
        return Ok(());
    }
    let around = |texts: &[&str]| -> Vec<String> {
        texts.iter().flat_map(|text| bos.clone().into_iter().chain([(*text).to_owned()]).chain(eos.clone())).collect()
    };
    tokens.dedup();
    let processor = TemplateProcessing::builder()
        .single(Template::try_from(around(&["$A"]))?)
        .pair(Template::try_from(around(&["$A", "$B:1"]))?)
        .special_tokens(tokens)
        .build()
        .map_err(text)?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

/// A word where transformers 5 leaves out the begin token that earlier versions put in front.
pub(super) fn remark(config: &Map<String, Value>, folder: &Path) {
    if !config.contains_key("add_bos_token") {
        tracing::warn!(
            "{}: tokenizer_config.json does not say whether texts begin with the begin token (add_bos_token), and without a \
             tokenizer.json none is put there, as in transformers 5; earlier versions did",
            folder.display()
        );
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
