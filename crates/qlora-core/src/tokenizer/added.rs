//! Tokens that stand beside `tokenizer.json`: in `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
//!
//! transformers adds them while loading, in the order of their declared ids but with the next free ids; so do we, so that the
//! ids are the same. `added_tokens_decoder` of the configuration makes the two older files void.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use super::guard::guarded;
use crate::error::{Error, Result};
use crate::file::{self, SMALL};

const CONFIG: &str = "tokenizer_config.json";
const DECODER: &str = "added_tokens_decoder";
/// The tokens with a role of their own; further keys that end in `_token` name tokens of one model.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Adds the tokens that the files beside `tokenizer.json` declare and it lacks, and those of `roles` that no file names otherwise.
///
/// # Errors
/// If a file is damaged.
pub(super) fn complete(tokenizer: &mut Tokenizer, folder: &Path, roles: &Map<String, Value>) -> Result<()> {
    let mut config = config_of(folder)?;
    let declared = match config.get(DECODER).and_then(Value::as_object) {
        Some(decoder) => by_id(decoder).map_err(|message| Error::format(folder.join(CONFIG), message))?,
        None => match read(folder, "added_tokens.json")? {
            Some(ids) => by_text(&ids, &special_texts(&config))
                .map_err(|message| Error::format(folder.join("added_tokens.json"), message))?,
            None => BTreeMap::new(),
        },
    };
    for (key, value) in roles {
        config.entry(key).or_insert_with(|| value.clone());
    }
    let known: HashSet<AddedToken> = tokenizer.get_added_tokens_decoder().into_values().collect();
    let named = special_texts(&config);
    let mut texts: HashSet<String> = known.iter().map(|token| token.content.clone()).collect();
    let mut added = Vec::new();
    for token in declared.values().filter(|token| !known.contains(*token)) {
        let special = token.special || named.contains(&token.content);
        texts.insert(token.content.clone());
        added.push(AddedToken { special, ..token.clone() });
    }
    for token in special_tokens(&config) {
        if !token.content.is_empty() && texts.insert(token.content.clone()) {
            added.push(token);
        }
    }
    if !added.is_empty() {
        // Normalizes the tokens: a damaged table shows here first.
        guarded(|| tokenizer.add_tokens(added)).map_err(|error| Error::format(folder, error.to_string()))?;
    }
    if config.get("split_special_tokens") == Some(&Value::Bool(true)) {
        tokenizer.set_encode_special_tokens(true);
    }
    for (id, token) in &declared {
        let content = &token.content;
        if let Some(found) = tokenizer.token_to_id(content).filter(|found| found != id) {
            tracing::warn!(
                "{}: token {content:?} is declared with id {id} and gets {found}, the next free one, as in transformers",
                folder.display()
            );
        }
    }
    Ok(())
}

/// `add_bos_token` and `add_eos_token` mean nothing beside a `tokenizer.json`, whose post-processor counts (transformers drops
/// them, too): worth a word where they say something else.
pub(super) fn note_unused_options(tokenizer: &Tokenizer, folder: &Path) -> Result<()> {
    let config = config_of(folder)?;
    let encoding = |special: bool| tokenizer.encode_fast("a", special).map(|encoding| encoding.get_ids().to_vec());
    let (Ok(without), Ok(with)) = (encoding(false), encoding(true)) else { return Ok(()) };
    let token = |key: &str| text_of(config.get(key)?).and_then(|text| tokenizer.token_to_id(text));
    let adds_bos = with.first() != without.first() && with.first() == token("bos_token").as_ref();
    let adds_eos = with.last() != without.last() && with.last() == token("eos_token").as_ref();
    for (option, adds) in [("add_bos_token", adds_bos), ("add_eos_token", adds_eos)] {
        if let Some(stated) = config.get(option).and_then(Value::as_bool).filter(|stated| *stated != adds) {
            let does = if adds { "adds it" } else { "does not add it" };
            tracing::warn!(
                "{}: {option} = {stated} is not used: the post-processor of tokenizer.json counts, and it {does} (as in \
                 transformers)",
                folder.join(CONFIG).display()
            );
        }
    }
    Ok(())
}

/// `tokenizer_config.json`; where it declares no tokens, with the roles of `special_tokens_map.json`.
pub(super) fn config_of(folder: &Path) -> Result<Map<String, Value>> {
    let mut config = read(folder, CONFIG)?.unwrap_or_default();
    if !config.get(DECODER).is_some_and(Value::is_object) {
        let map = read(folder, "special_tokens_map.json")?.unwrap_or_default();
        config.extend(map.into_iter().filter(|(_, value)| !value.is_null()));
    }
    Ok(config)
}

fn read(folder: &Path, name: &str) -> Result<Option<Map<String, Value>>> {
    let path = folder.join(name);
    path.exists().then(|| file::read_object(&path, SMALL)).transpose()
}

/// `added_tokens_decoder`: ids to tokens.
fn by_id(decoder: &Map<String, Value>) -> std::result::Result<BTreeMap<u32, AddedToken>, String> {
    let one = |(id, value): (&String, &Value)| {
        let number = id.parse().map_err(|_| format!("{DECODER} has the id {id:?}, which is no number"))?;
        let token = token_of(value, false).filter(|_| value.is_object());
        Ok((number, token.ok_or_else(|| format!("{DECODER}: the entry of {id} is no token"))?))
    };
    decoder.iter().map(one).collect()
}

/// `added_tokens.json`: texts to ids.
fn by_text(
    ids: &Map<String, Value>,
    special: &HashSet<String>,
) -> std::result::Result<BTreeMap<u32, AddedToken>, String> {
    let one = |(text, id): (&String, &Value)| {
        let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let number = number.ok_or_else(|| format!("the id of {text:?} is {id}, which is no token id"))?;
        Ok((number, AddedToken::from(text.clone(), special.contains(text))))
    };
    ids.iter().map(one).collect()
}

/// The tokens with a role, and the additional ones, in the order in which transformers adds them.
fn special_tokens(config: &Map<String, Value>) -> Vec<AddedToken> {
    let named = NAMED.iter().filter_map(|key| config.get(*key));
    let own = config.iter().filter(|(key, _)| key.ends_with("_token") && !NAMED.contains(&key.as_str()));
    let extra = config.get("extra_special_tokens").or_else(|| config.get("additional_special_tokens"));
    let extra: Vec<&Value> = match extra {
        Some(Value::Array(list)) => list.iter().collect(),
        Some(Value::Object(map)) => map.values().collect(),
        _ => Vec::new(),
    };
    named.chain(own.map(|(_, value)| value)).chain(extra).filter_map(|value| token_of(value, true)).collect()
}

fn special_texts(config: &Map<String, Value>) -> HashSet<String> {
    special_tokens(config).into_iter().map(|token| token.content).collect()
}

pub(super) fn text_of(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// A token as text, or as an object with `content` and flags.
fn token_of(value: &Value, special: bool) -> Option<AddedToken> {
    let flag = |key: &str| value.get(key).and_then(Value::as_bool);
    let special = special || flag("special").unwrap_or(false);
    let token = AddedToken::from(text_of(value)?, special);
    Some(AddedToken {
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        ..token
    })
}
