//! The special tokens that a template may write, by the names under which it knows them.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::Result;
use crate::file::{self, SMALL};
use crate::tokenizer::Tokenizer;

/// The keys of `tokenizer_config.json` that templates see.
const KEYS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];

/// Those that a `tokenizer_config.json` or `special_tokens_map.json` states: a text, or an object with `content`.
pub(super) fn stated(config: &Map<String, Value>) -> impl Iterator<Item = (String, String)> {
    KEYS.into_iter().filter_map(move |key| {
        let value = config.get(key)?;
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some((key.to_owned(), text.to_owned()))
    })
}

/// Those of a tokenizer's folder.
pub(super) fn read(folder: &Path) -> Result<Vec<(String, String)>> {
    let mut tokens = Vec::new();
    for name in ["special_tokens_map.json", "tokenizer_config.json"] {
        let path = folder.join(name);
        if path.exists() {
            tokens.extend(stated(&file::read_object(&path, SMALL)?));
        }
    }
    Ok(tokens)
}

/// Those of a tokenizer without a folder.
pub(super) fn of(tokenizer: &Tokenizer) -> Vec<(String, String)> {
    let roles = [
        ("bos_token", tokenizer.bos_token_id()),
        ("eos_token", tokenizer.eos_token_id()),
        ("unk_token", tokenizer.unk_token_id()),
        ("pad_token", tokenizer.pad_token_id()),
    ];
    roles.into_iter().filter_map(|(name, id)| Some((name.to_owned(), tokenizer.id_to_token(id?)?))).collect()
}
