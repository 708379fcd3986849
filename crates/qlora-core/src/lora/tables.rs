//! Rows of tokens and whole tables: PEFT's `trainable_token_indices` and `modules_to_save`, as far as the embedding and the head
//! are concerned.
//!
//! Of a tied model the rows of tokens are the head's too. A table that is trained whole is no longer tied, as in PEFT, unless
//! `ensure_weight_tying` says that the head follows the embedding.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::config::LoraConfig;
use super::layout::Which;
use super::targets::TargetModules;
use crate::config::ModelConfig;
use crate::spec::{EMBEDDING, HEAD};
use crate::{Error, Result};

/// The tokens whose rows are trained, by the end of the name of the table: `embed_tokens` or `lm_head`. In files a list stands for
/// the embedding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenIndices(BTreeMap<String, Vec<u32>>);

const EMBED_TOKENS: &str = "embed_tokens";

impl TokenIndices {
    /// Tokens of the embedding; of a tied model the head's rows are the same.
    pub fn of_embedding(tokens: impl Into<Vec<u32>>) -> Self {
        Self::by_module([(EMBED_TOKENS.to_owned(), tokens.into())].into())
    }

    /// Tokens by the end of the table's name.
    pub fn by_module(map: BTreeMap<String, Vec<u32>>) -> Self {
        Self(map.into_iter().filter(|(_, tokens)| !tokens.is_empty()).collect())
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ends of the tables' names, and their tokens.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u32])> {
        self.0.iter().map(|(module, tokens)| (module.as_str(), tokens.as_slice()))
    }

    /// The tokens of the table of this full name.
    pub fn of(&self, module: &str) -> Option<&[u32]> {
        self.iter().find(|(end, _)| !end.is_empty() && module.ends_with(end)).map(|(_, tokens)| tokens)
    }
}

impl Serialize for TokenIndices {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self.0.get(EMBED_TOKENS) {
            Some(tokens) if self.0.len() == 1 => tokens.serialize(serializer),
            _ => self.0.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TokenIndices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a list of token ids, or such lists by `embed_tokens` and `lm_head`")]
        enum Form {
            Nothing(()),
            List(Vec<u32>),
            ByModule(BTreeMap<String, Vec<u32>>),
        }
        Ok(match Form::deserialize(deserializer)? {
            Form::Nothing(()) => Self::default(),
            Form::List(tokens) => Self::of_embedding(tokens),
            Form::ByModule(map) => Self::by_module(map),
        })
    }
}

/// The parts of the two tables that are trained: kind, module and rows, the embedding's first.
pub(super) fn tables(config: &LoraConfig, model: &ModelConfig) -> Result<Vec<(Which, &'static str, usize)>> {
    let (tokens, tied) = (&config.trainable_token_indices, model.tie_word_embeddings);
    for (end, ids) in tokens.iter() {
        const KEY: &str = "trainable_token_indices";
        if end.is_empty() || !(EMBEDDING.ends_with(end) || HEAD.ends_with(end)) {
            return Err(Error::Invalid(format!("{KEY}: {end:?} is neither {EMBEDDING} nor {HEAD}")));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= model.vocab_size) {
            return Err(Error::Invalid(format!(
                "{KEY}: token {id} is beyond the model's vocabulary of {}: give the base as many rows first",
                model.vocab_size
            )));
        }
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::Invalid(format!("{KEY}: token {} of {end} is there twice", pair[0])));
        }
    }
    let whole =
        |module: &str| config.modules_to_save.iter().any(|end| !end.is_empty() && module.ends_with(end.as_str()));
    if let Some(other) =
        config.modules_to_save.iter().find(|end| end.is_empty() || !(EMBEDDING.ends_with(*end) || HEAD.ends_with(*end)))
    {
        return Err(Error::Unsupported(format!(
            "modules_to_save: {other:?} is not supported: in training, {EMBEDDING} and {HEAD} can be trained whole"
        )));
    }
    let follows = tied && config.ensure_weight_tying;
    let mut parts = Vec::new();
    for module in [EMBEDDING, HEAD] {
        let ids = tokens.of(module);
        if whole(module) && ids.is_some() {
            return Err(Error::Invalid(format!("{module} is in modules_to_save and in trainable_token_indices")));
        }
        if module == HEAD && tied && ids.is_some() && ids != tokens.of(EMBEDDING) {
            return Err(Error::Invalid(format!(
                "trainable_token_indices: the head of this model is its embedding: name the tokens of {EMBEDDING}, which are {HEAD}'s too"
            )));
        }
        if module == HEAD && follows && whole(HEAD) && !whole(EMBEDDING) {
            return Err(Error::Invalid(format!(
                "modules_to_save: with ensure_weight_tying name {EMBEDDING}, which {HEAD} follows"
            )));
        }
        if (whole(module) || ids.is_some())
            && config.targets(module)
            && config.target_modules != TargetModules::AllLinear
        {
            return Err(Error::Invalid(format!(
                "{module} is in target_modules, and in modules_to_save or trainable_token_indices"
            )));
        }
        match ids {
            Some(_) if module == HEAD && tied => {}
            Some(ids) => parts.push((Which::TokenRows, module, ids.len())),
            None if module == HEAD && follows => {}
            None if whole(module) => parts.push((Which::Table, module, model.vocab_size)),
            None => {}
        }
    }
    let targeted = config.targets(HEAD) && config.target_modules != TargetModules::AllLinear;
    if tied && (whole(HEAD) || targeted) && tokens.of(EMBEDDING).is_some() {
        let key = if whole(HEAD) { "modules_to_save" } else { "target_modules" };
        return Err(Error::Unsupported(format!(
            "{key} has the head of a tied model, of whose embedding trainable_token_indices trains rows"
        )));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::super::tiny_model;
    use super::*;

    fn parsed(json: &str) -> LoraConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_list_is_of_the_embedding_and_both_forms_are_read_back() {
        let config = parsed(r#"{"trainable_token_indices": [3, 1]}"#);
        assert_eq!(config.trainable_token_indices, TokenIndices::of_embedding([3, 1]));
        for json in [r#"{"trainable_token_indices": [3, 1]}"#, r#"{"trainable_token_indices": {"lm_head": [1]}}"#] {
            let config = parsed(json);
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<LoraConfig>(&text).unwrap(), config, "{text}");
        }
        for nothing in ["null", "[]", "{}"] {
            let config = parsed(&format!("{{\"trainable_token_indices\": {nothing}}}"));
            assert!(config.trainable_token_indices.is_empty() && config == LoraConfig::default());
        }
        let error = serde_json::from_str::<LoraConfig>(r#"{"trainable_token_indices": ["a"]}"#).unwrap_err();
        assert!(error.to_string().contains("a list of token ids"), "{error}");
    }

    #[test]
    fn tables_follow_what_is_tied() {
        let tied = tiny_model(1);
        let untied = ModelConfig { tie_word_embeddings: false, ..tied.clone() };
        let tokens = |rows| (Which::TokenRows, EMBEDDING, rows);
        let table = |module| (Which::Table, module, 128);
        let both = r#"{"trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [5, 2]}}"#;
        let saved = r#"{"modules_to_save": ["embed_tokens", "lm_head"]}"#;
        let follows = r#"{"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": true}"#;
        for (json, of_tied, of_untied) in [
            (r#"{"trainable_token_indices": [5, 2]}"#, vec![tokens(2)], vec![tokens(2)]),
            (both, vec![tokens(2)], vec![tokens(2), (Which::TokenRows, HEAD, 2)]),
            (saved, vec![table(EMBEDDING), table(HEAD)], vec![table(EMBEDDING), table(HEAD)]),
            (follows, vec![table(EMBEDDING)], vec![table(EMBEDDING), table(HEAD)]),
            ("{}", vec![], vec![]),
        ] {
            assert_eq!(tables(&parsed(json), &tied).unwrap(), of_tied, "{json}");
            assert_eq!(tables(&parsed(json), &untied).unwrap(), of_untied, "{json}");
        }
        for (json, message) in [
            (r#"{"trainable_token_indices": {"q_proj": [1]}}"#, "\"q_proj\" is neither"),
            (r#"{"trainable_token_indices": [128]}"#, "token 128 is beyond the model's vocabulary of 128"),
            (r#"{"trainable_token_indices": [1, 2, 1]}"#, "token 1 of embed_tokens is there twice"),
            (r#"{"trainable_token_indices": {"lm_head": [1]}}"#, "name the tokens of model.embed_tokens"),
            (r#"{"modules_to_save": ["norm"]}"#, "modules_to_save: \"norm\" is not supported"),
            (r#"{"modules_to_save": ["lm_head"], "ensure_weight_tying": true}"#, "name model.embed_tokens"),
            (r#"{"modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]}"#, "in modules_to_save and in"),
            (r#"{"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}"#, "the head of a tied model"),
            (r#"{"target_modules": ["lm_head"], "trainable_token_indices": [1]}"#, "the head of a tied model"),
            (r#"{"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}"#, "lm_head is in target_modules, and"),
        ] {
            let error = tables(&parsed(json), &tied).unwrap_err().to_string();
            assert!(error.contains(message), "{json}: {error}");
        }
    }
}
