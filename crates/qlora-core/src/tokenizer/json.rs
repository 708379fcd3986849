//! `tokenizer.json` through the `tokenizers` crate, with the checks that crate leaves out.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{PostProcessorWrapper, Tokenizer};

use super::guard::guarded;

/// The tokenizer of a `tokenizer.json`. Truncation and padding are switched off, and offsets keep their spaces.
pub(super) fn read(text: &str) -> Result<Tokenizer, String> {
    check_merges(text)?;
    let read = guarded(|| Tokenizer::from_bytes(text));
    let mut tokenizer = read.map_err(|e| format!("not a tokenizer.json: {e}"))?;
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
    keep_spaces_in_offsets(&mut tokenizer)?;
    Ok(tokenizer)
}

#[derive(Deserialize)]
struct File<'a> {
    #[serde(borrow)]
    model: Option<Model<'a>>,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(borrow)]
    vocab: Option<Vocab<'a>>,
    #[serde(borrow)]
    merges: Option<Vec<Merge<'a>>>,
    continuing_subword_prefix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Vocab<'a> {
    #[serde(borrow)]
    Ids(HashMap<Cow<'a, str>, u32>),
    Other(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge<'a> {
    #[serde(borrow)]
    Pair((Cow<'a, str>, Cow<'a, str>)),
    #[serde(borrow)]
    Line(Cow<'a, str>),
}

/// The crate writes the two halves of a merge into a buffer as long as the longest token and panics if they do not fit:
/// every merge has to give a token.
fn check_merges(text: &str) -> Result<(), String> {
    let file: File<'_> = serde_json::from_str(text).map_err(|e| format!("not a tokenizer.json: {e}"))?;
    let Some(Model { vocab: Some(Vocab::Ids(vocab)), merges: Some(merges), continuing_subword_prefix }) = file.model
    else {
        return Ok(());
    };
    let prefix = continuing_subword_prefix.unwrap_or_default();
    let mut token = String::new();
    for (index, merge) in merges.iter().enumerate() {
        let (left, right) = match merge {
            Merge::Pair((left, right)) => (&**left, &**right),
            Merge::Line(line) if line.starts_with("#version") => continue,
            Merge::Line(line) => line.split_once(' ').ok_or_else(|| format!("merge {index} is not two tokens"))?,
        };
        token.clear();
        token.push_str(left);
        token.push_str(right.get(prefix.len()..).ok_or_else(|| format!("merge {index} is shorter than the prefix"))?);
        if [left, right, &token].iter().any(|token| !vocab.contains_key(*token)) {
            return Err(format!("merge {index} ({left:?} with {right:?}) is not made of tokens of the vocabulary"));
        }
    }
    Ok(())
}

/// Byte-level post-processors cut spaces off the offsets, for highlighting text. Training needs every byte's token.
fn keep_spaces_in_offsets(tokenizer: &mut Tokenizer) -> Result<(), String> {
    fn keep(value: &mut Value) {
        match value {
            Value::Object(map) => {
                if let Some(trim) = map.get_mut("trim_offsets") {
                    *trim = Value::Bool(false);
                }
                map.values_mut().for_each(keep);
            }
            Value::Array(items) => items.iter_mut().for_each(keep),
            _ => {}
        }
    }
    let Some(processor) = tokenizer.get_post_processor() else { return Ok(()) };
    let mut value = serde_json::to_value(processor).map_err(|e| e.to_string())?;
    keep(&mut value);
    let processor: PostProcessorWrapper = serde_json::from_value(value).map_err(|e| e.to_string())?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}
