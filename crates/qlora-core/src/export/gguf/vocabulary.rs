//! A tokenizer as GGUF metadata: tokens, their types, merges or scores, special tokens, chat template.
//!
//! GGUF has no `tokenizer.json`: it names the kind of BPE and, for byte-level ones, how text is split before it
//! (`tokenizer.ggml.pre`). The written vocabulary is read back and has to give the same ids as the original.

use std::collections::HashMap;
use std::io::Write;

use serde_json::Value;

use super::GgufOptions;
use crate::config::ModelConfig;
use crate::end_tokens::llama_cpp_knows;
use crate::error::{Error, Result};
use crate::formats::gguf::metadata::Metadata;
use crate::formats::gguf::token_type;
use crate::tokenizer::{Tokenizer, pre_tokenizer_of};

/// Tokens that only fill the embedding's rows.
const UNUSED: i32 = 5;
/// SentencePiece's tokens for single bytes.
const BYTE: i32 = 6;

/// Scripts, digits, spaces, contractions and signs that tokenizers differ on.
const PROBE: &str = "Hello, world! I'm sure it's 12345.678 or 1/2\u{a0}km;  two  spaces\tand a tab\n\n  New\r\nlines \
                     and_snake_case(x[0]) += camelCase; // Stra\u{df}e na\u{ef}ve \u{1e9b}\u{323} e\u{301} \
                     \u{41f}\u{440}\u{438}\u{432}\u{435}\u{442} \u{4f60}\u{597d}\u{3001}\u{4e16}\u{754c} \u{645}\u{631}\u{62d}\u{628}\u{627} \
                     \u{939}\u{93f}\u{928}\u{94d}\u{926}\u{940} \u{d55c}\u{ad6d}\u{c5b4} \u{1f44b}\u{1f3fd} 2\u{b2} \u{663}\u{664} THE'LL we'Re \
                     https://example.org/?a=b&c=%20 {\"k\": [1, null]} ...---*** \u{2014}";

/// The tokenizer's data that is written to the GGUF file.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
    kind: Kind,
}

enum Kind {
    /// Byte-level BPE: how text is split, and the merges.
    ByteLevel { pre: &'static str, merges: Vec<String> },
    /// SentencePiece: the tokens' scores, and whether a space is put before every text.
    SentencePiece { scores: Vec<f32>, space_prefix: bool },
}

/// Adds the tokenizer's keys to `metadata`.
///
/// # Errors
/// If llama.cpp has no such tokenizer, or what was written would give other ids.
pub(super) fn write(
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    options: &GgufOptions<'_>,
    metadata: &mut Metadata,
) -> Result<()> {
    let unsupported = |message: String| Error::Unsupported(format!("this tokenizer in a GGUF file: {message}"));
    let text = tokenizer.inner().to_string(false).map_err(|error| Error::Invalid(error.to_string()))?;
    let json: Value = serde_json::from_str(&text).map_err(|error| Error::Invalid(error.to_string()))?;
    let vocabulary = read(&json, config.vocab_size).map_err(unsupported)?;
    let mut own = Metadata::default();
    emit(&vocabulary, tokenizer, config, options, &mut own);
    verify(tokenizer, &own)?;
    emit(&vocabulary, tokenizer, config, options, metadata);
    Ok(())
}

fn emit(
    vocabulary: &Vocabulary,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    options: &GgufOptions<'_>,
    metadata: &mut Metadata,
) {
    match &vocabulary.kind {
        Kind::ByteLevel { pre, .. } => {
            metadata.string("tokenizer.ggml.model", "gpt2");
            metadata.string("tokenizer.ggml.pre", pre);
        }
        Kind::SentencePiece { .. } => {
            metadata.string("tokenizer.ggml.model", "llama");
            metadata.string("tokenizer.ggml.pre", "default");
        }
    }
    metadata.strings("tokenizer.ggml.tokens", &vocabulary.tokens);
    metadata.ints("tokenizer.ggml.token_type", &vocabulary.types);
    match &vocabulary.kind {
        Kind::ByteLevel { merges, .. } => metadata.strings("tokenizer.ggml.merges", merges),
        Kind::SentencePiece { scores, space_prefix } => {
            metadata.floats("tokenizer.ggml.scores", scores);
            metadata.bool("tokenizer.ggml.add_space_prefix", *space_prefix);
        }
    }
    let bos = tokenizer.bos_token_id().or(config.bos_token_id).filter(|id| (*id as usize) < config.vocab_size);
    let ends = end_tokens(tokenizer, config, options.eos_token_ids);
    let roles = [
        ("bos", bos),
        ("eos", ends.eos),
        ("eot", ends.eot),
        ("eom", ends.eom),
        ("unknown", tokenizer.unk_token_id()),
        ("padding", tokenizer.pad_token_id()),
    ];
    for (role, id) in roles {
        if let Some(id) = id {
            metadata.u32(&format!("tokenizer.ggml.{role}_token_id"), id);
        }
    }
    let around = tokenizer.encode("a", true).unwrap_or_default();
    metadata.bool("tokenizer.ggml.add_bos_token", bos.is_some() && around.first().copied() == bos);
    metadata.bool("tokenizer.ggml.add_eos_token", ends.eos.is_some() && around.last().copied() == ends.eos);
    if let Some(template) = options.chat_template {
        metadata.string("tokenizer.chat_template", template);
    }
}

/// The tokens at which llama.cpp ends an answer.
#[derive(Debug, Default, PartialEq, Eq)]
struct EndTokens {
    eos: Option<u32>,
    eot: Option<u32>,
    eom: Option<u32>,
}

/// Spreads the model's end tokens over the three places that a GGUF file has: the tokenizer's own is the end of a text, one that
/// says "message" ends a message, another one a turn. llama.cpp finds the well-known ones by their text, so that those it does
/// not know get the places first; ends of documents need none.
fn end_tokens(tokenizer: &Tokenizer, config: &ModelConfig, listed: &[u32]) -> EndTokens {
    let mut all: Vec<u32> = Vec::new();
    for id in listed.iter().chain(&config.eos_token_ids).copied().chain(tokenizer.eos_token_id()) {
        if (id as usize) < config.vocab_size && !all.contains(&id) {
            all.push(id);
        }
    }
    let own = tokenizer.eos_token_id().filter(|id| all.contains(id));
    let mut ends = EndTokens { eos: own.or_else(|| all.first().copied()), ..EndTokens::default() };
    let text = |id: u32| tokenizer.id_to_token(id).unwrap_or_default();
    let known = |id: &u32| llama_cpp_knows(&text(*id));
    let mut left: Vec<u32> = all.into_iter().filter(|id| Some(*id) != ends.eos).collect();
    ends.eom = left.iter().copied().find(|&id| text(id).contains("eom"));
    left.retain(|id| Some(*id) != ends.eom);
    let of_document = |id: &u32| matches!(text(*id).as_str(), "<|endoftext|>" | "<|end_of_text|>");
    let unknown = left.iter().find(|id| !known(id));
    ends.eot = unknown.or_else(|| left.iter().find(|id| !of_document(id))).copied();
    for id in left.iter().filter(|id| Some(**id) != ends.eot && !known(id)) {
        let taken = ends.eot.unwrap_or_default();
        tracing::warn!("GGUF files have no place for the end token {id}; {taken} is written, {id} is left out");
    }
    ends
}

fn read(json: &Value, rows: usize) -> std::result::Result<Vocabulary, String> {
    let model = &json["model"];
    let kind = model["type"].as_str().unwrap_or("BPE");
    let Some(ids) = model["vocab"].as_object().filter(|_| kind == "BPE") else {
        return Err(format!("its model is {kind}; BPE is written"));
    };
    let sentence_piece = model["byte_fallback"] == Value::Bool(true);
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; rows];
    let mut place = |token: &str, id: Option<u64>, kind: i32| -> std::result::Result<(), String> {
        let slot = id.and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
        let slot = slot.ok_or_else(|| format!("token {token:?} is outside the {rows} rows of the embedding"))?;
        *slot = Some((token.to_owned(), kind));
        Ok(())
    };
    for (token, id) in ids {
        let byte = sentence_piece && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        place(token, id.as_u64(), if byte { BYTE } else { token_type::NORMAL })?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let token = added["content"].as_str().ok_or("an added token has no content")?;
        let unknown = sentence_piece && model["unk_token"] == *token;
        let kind = match added["special"] == Value::Bool(true) {
            _ if unknown => token_type::UNKNOWN,
            true => token_type::CONTROL,
            false => token_type::USER_DEFINED,
        };
        place(token, added["id"].as_u64(), kind)?;
    }
    let (tokens, types): (Vec<String>, Vec<i32>) = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)))
        .unzip();
    let merges = model["merges"].as_array().ok_or("it has no merges")?;
    let merges: Vec<(&str, &str)> = merges.iter().map(merge).collect::<Option<_>>().ok_or("its merges are damaged")?;
    let kind = match sentence_piece {
        true => {
            let scores = scores(&tokens, &types, &merges);
            Kind::SentencePiece { scores, space_prefix: puts_space_first(&json["normalizer"], &json["pre_tokenizer"]) }
        }
        false => {
            let pre = pre_tokenizer(&json["pre_tokenizer"])?;
            Kind::ByteLevel { pre, merges: merges.iter().map(|(left, right)| format!("{left} {right}")).collect() }
        }
    };
    Ok(Vocabulary { tokens, types, kind })
}

fn merge(value: &Value) -> Option<(&str, &str)> {
    match value {
        Value::String(line) => line.split_once(' '),
        Value::Array(pair) => Some((pair.first()?.as_str()?, pair.get(1)?.as_str()?)),
        _ => None,
    }
}

/// SentencePiece always joins the neighbours whose token has the best score: the order of the merges as scores.
fn scores(tokens: &[String], types: &[i32], merges: &[(&str, &str)]) -> Vec<f32> {
    let mut best: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        best.entry(format!("{left}{right}")).or_insert(rank);
    }
    let score = |(token, kind): (&String, &i32)| match *kind {
        token_type::NORMAL | token_type::USER_DEFINED => -(best.get(token).copied().unwrap_or(merges.len()) as f32),
        _ => 0.0,
    };
    tokens.iter().zip(types).map(score).collect()
}

/// Whether a normalizer or pre-tokenizer puts a space before every text.
fn puts_space_first(normalizer: &Value, pre_tokenizer: &Value) -> bool {
    parts(normalizer, "normalizers").iter().any(|part| part["type"] == "Prepend")
        || parts(pre_tokenizer, "pretokenizers").iter().any(|part| {
            part["type"] == "Metaspace" && part["prepend_scheme"] != "never" && part["add_prefix_space"] != false
        })
}

/// The members of a sequence, or the one there is.
fn parts<'a>(value: &'a Value, list: &str) -> Vec<&'a Value> {
    match value {
        Value::Null => Vec::new(),
        value if value["type"] == "Sequence" => {
            value[list].as_array().into_iter().flatten().flat_map(|part| parts(part, list)).collect()
        }
        value => vec![value],
    }
}

/// llama.cpp's name of a byte-level pre-tokenizer.
fn pre_tokenizer(value: &Value) -> std::result::Result<&'static str, String> {
    let parts = parts(value, "pretokenizers");
    let kinds: Vec<&str> = parts.iter().filter_map(|part| part["type"].as_str()).collect();
    match *kinds {
        ["ByteLevel"] if parts[0]["use_regex"] != false => Ok("gpt-2"),
        ["Digits", "ByteLevel"] if parts[0]["individual_digits"] == true && parts[1]["use_regex"] != false => {
            Ok("smollm")
        }
        ["Split", "ByteLevel"] if parts[1]["use_regex"] == false => {
            let expression = parts[0]["pattern"]["Regex"].as_str().unwrap_or_default();
            pre_tokenizer_of(expression)
                .ok_or_else(|| format!("llama.cpp's name of the expression {expression:?} is not known"))
        }
        _ => Err(format!("its pre-tokenizer ({}) is not known", kinds.join(", "))),
    }
}

/// Reads what was written and compares it with the original. Text has to give the same ids; around special tokens
/// llama.cpp's kinds of tokenizers differ in spaces from some originals (Mistral's later ones), which is a warning.
fn verify(tokenizer: &Tokenizer, metadata: &Metadata) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(std::env::temp_dir(), error);
    let mut file = tempfile::NamedTempFile::new().map_err(failed)?;
    file.write_all(&metadata.header(&[])).and_then(|()| file.flush()).map_err(failed)?;
    let written = Tokenizer::from_gguf_file(file.path())?;
    if let Some(difference) = difference(tokenizer, &written, PROBE)? {
        return Err(Error::Unsupported(format!("this tokenizer in a GGUF file: {difference}")));
    }
    let special = (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_special(id)).take(64);
    for token in special.filter_map(|id| tokenizer.id_to_token(id)) {
        if let Some(difference) = difference(tokenizer, &written, &format!("a{token}b"))? {
            tracing::warn!("around {token}, llama.cpp will cut text otherwise: {difference}");
            break;
        }
    }
    Ok(())
}

/// Finds the difference between two tokenizers on a text, if there is one; a text that the first cannot encode is not
/// compared.
fn difference(tokenizer: &Tokenizer, written: &Tokenizer, text: &str) -> Result<Option<String>> {
    for add in [true, false] {
        let Ok(expected) = tokenizer.encode(text, add) else { continue };
        let got = written.encode(text, add)?;
        if got != expected {
            let at = got.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            let token = |ids: &[u32]| ids.get(at).and_then(|&id| tokenizer.id_to_token(id)).unwrap_or_default();
            let (got, expected) = (token(&got), token(&expected));
            return Ok(Some(format!("token {at} of a test text would become {got:?} instead of {expected:?}")));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::super::GgufType;
    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizer").join(name)
    }

    fn config(rows: usize) -> ModelConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama/config.json");
        ModelConfig { vocab_size: rows, ..ModelConfig::from_json_file(path).unwrap() }
    }

    fn options() -> GgufOptions<'static> {
        GgufOptions { chat_template: Some("{{ x }}"), ..GgufOptions::new(GgufType::F32) }
    }

    fn rewritten(tokenizer: &Tokenizer, rows: usize) -> Result<Tokenizer> {
        let mut metadata = Metadata::default();
        write(tokenizer, &config(rows), &options(), &mut metadata)?;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), metadata.header(&[])).unwrap();
        Tokenizer::from_gguf_file(file.path())
    }

    #[test]
    fn every_kind_survives_and_pads_to_the_embedding() {
        for name in ["byte-level-llama-bpe.gguf", "byte-level-qwen2.gguf", "byte-level-tekken.gguf", "spm.gguf"] {
            let original = Tokenizer::from_gguf_file(fixture(name)).unwrap();
            let written = rewritten(&original, original.vocab_size() + 3).unwrap();
            assert_eq!(written.encode(PROBE, true).unwrap(), original.encode(PROBE, true).unwrap(), "{name}");
            assert_eq!(written.vocab_size(), original.vocab_size() + 3);
            assert_eq!(written.bos_token_id(), original.bos_token_id().or(Some(1)), "{name}");
            let error = rewritten(&original, original.vocab_size() - 1).unwrap_err().to_string();
            assert!(error.contains("rows of the embedding"), "{error}");
        }
        let llama = Tokenizer::from_folder(fixture("llama")).unwrap();
        let written = rewritten(&llama, llama.vocab_size()).unwrap();
        assert_eq!(written.encode("a b  c", true).unwrap(), llama.encode("a b  c", true).unwrap());
        assert_eq!((written.eos_token_id(), written.unk_token_id()), (Some(2), Some(0)));
    }

    #[test]
    fn what_llama_cpp_does_not_know_is_refused() {
        let json = |model: &str, pre: &str| {
            let text = format!(
                r#"{{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {pre}, "post_processor": null,
                    "decoder": null, "truncation": null, "padding": null, "model": {model}}}"#
            );
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("tokenizer.json"), text).unwrap();
            rewritten(&Tokenizer::from_folder(folder.path()).unwrap(), 8).unwrap_err().to_string()
        };
        let words = r#"{"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}"#;
        assert!(json(words, "null").contains("its model is WordLevel"));
        let bpe = r#"{"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}"#;
        assert!(json(bpe, r#"{"type": "Whitespace"}"#).contains("its pre-tokenizer (Whitespace) is not known"));
        let split = r#"{"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\w"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}"#;
        assert!(json(bpe, split).contains(r#"the expression "\\w" is not known"#));
    }

    #[test]
    fn a_text_that_would_be_cut_otherwise_is_an_error() {
        // The same tokens, but text is split by other rules before them.
        let original = Tokenizer::from_gguf_file(fixture("byte-level-llama-bpe.gguf")).unwrap();
        let other = Tokenizer::from_gguf_file(fixture("byte-level-tekken.gguf")).unwrap();
        let found = difference(&original, &other, PROBE).unwrap().unwrap();
        assert!(found.contains("instead of"), "{found}");
        assert_eq!(difference(&original, &original, PROBE).unwrap(), None);
    }

    #[test]
    fn end_tokens_find_their_places() {
        let tokenizer = Tokenizer::from_folder(fixture("llama")).unwrap();
        let config = config(400);
        let ends = end_tokens(&tokenizer, &config, &[7, 2]);
        assert_eq!(ends, EndTokens { eos: Some(2), eot: Some(7), eom: None });
        // One that the embedding does not have is left out.
        assert_eq!(end_tokens(&tokenizer, &config, &[100_000]), EndTokens { eos: Some(2), ..EndTokens::default() });
    }
}
