//! Options of a generation, and their defaults from a model's `generation_config.json`.

use crate::config::ModelConfig;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// The parameters of generating text. The default is greedy, like transformers'.
///
/// In files (TOML, JSON) every key may be left out and an unknown key is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerationConfig {
    /// The most tokens to generate.
    pub max_new_tokens: usize,
    /// The temperature, which divides the logits; none or 0 takes the most probable token each time. Below
    /// [`GenerationConfig::GREEDY_BELOW`] it counts as 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Only this many of the most probable tokens are drawn from; none or 0 is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Only the most probable tokens that together reach this probability are drawn from; none or 1 is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Above 1 makes tokens that occurred less probable, below 1 more; 1 is off.
    pub repetition_penalty: f32,
    /// The number of last tokens (prompt included) that count as having occurred; none is all, as in transformers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_window: Option<usize>,
    /// Prompts run in pieces of at most so many tokens, for less memory; none is [`GenerationConfig::PREFILL_CHUNK`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_chunk_size: Option<usize>,
    /// Seed of the draws.
    pub seed: u64,
    /// Tokens that end the generation.
    pub stop_tokens: Vec<u32>,
    /// Strings that end the generation as soon as they occur in the generated text.
    pub stop_strings: Vec<String>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 256,
            temperature: None,
            top_k: None,
            top_p: None,
            repetition_penalty: 1.0,
            repetition_window: None,
            prefill_chunk_size: None,
            seed: 0,
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
        }
    }
}

/// Options of transformers that change which tokens come out and have no counterpart here, with the values that are
/// off.
const WITHOUT_COUNTERPART: [(&str, &[f64]); 22] = [
    ("bad_words_ids", &[]),
    ("diversity_penalty", &[0.0]),
    ("encoder_no_repeat_ngram_size", &[0.0]),
    ("encoder_repetition_penalty", &[1.0]),
    ("epsilon_cutoff", &[0.0]),
    ("eta_cutoff", &[0.0]),
    ("exponential_decay_length_penalty", &[]),
    ("forced_bos_token_id", &[]),
    ("forced_eos_token_id", &[]),
    ("guidance_scale", &[1.0]),
    ("min_length", &[0.0]),
    ("min_new_tokens", &[0.0]),
    ("min_p", &[0.0]),
    ("no_repeat_ngram_size", &[0.0]),
    ("num_beams", &[1.0]),
    ("penalty_alpha", &[0.0]),
    ("sequence_bias", &[]),
    ("suppress_tokens", &[]),
    ("begin_suppress_tokens", &[]),
    ("top_h", &[]),
    ("typical_p", &[1.0]),
    ("watermarking_config", &[]),
];

impl GenerationConfig {
    /// Tokens of a prompt that run at a time, unless said otherwise.
    pub const PREFILL_CHUNK: usize = 2048;

    /// Temperatures below this one are greedy: at such a temperature a draw is the largest logit but for rounding.
    pub const GREEDY_BELOW: f64 = 1e-7;

    /// Whether the most probable token is taken each time, without a draw.
    pub fn is_greedy(&self) -> bool {
        self.temperature.is_none_or(|temperature| temperature < Self::GREEDY_BELOW)
    }

    /// Whether this token ends the generation.
    pub fn is_stop_token(&self, token: u32) -> bool {
        self.stop_tokens.contains(&token)
    }

    /// The seed that the prompt in place `row` (from 0) of a batch or file draws from: for the first one the seed itself, for
    /// the others a mix of both numbers (SplitMix64's finalizer), so that no row of one seed repeats the draws of any row of
    /// another, as it would with `seed + row`.
    pub fn seed_of_row(&self, row: u64) -> u64 {
        fn mix(mut z: u64) -> u64 {
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        match row {
            0 => self.seed,
            _ => mix(mix(self.seed.wrapping_add(GOLDEN)).wrapping_add(row.wrapping_mul(GOLDEN))),
        }
    }

    /// The defaults of a model: what the `generation_config.json` at `file` says, if there is one, and as stop tokens
    /// the end tokens of that file, or else those of the model's own configuration.
    ///
    /// As in transformers, a file that does not say `do_sample` is greedy whatever temperature it gives, and one that
    /// does samples with temperature 1 and `top_k` 50 unless it says otherwise. `max_length` is not used: it counts the
    /// prompt. Options without a counterpart here (`min_p`, `num_beams`, ...) are reported as a warning.
    ///
    /// # Errors
    /// If the file cannot be read, is no JSON, or has values that make no sense.
    pub fn for_model(file: Option<&Path>, model: &ModelConfig) -> Result<Self> {
        let mut config = match file {
            None => Self::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
                Self::from_transformers(&text).map_err(|error| Error::format(path, error.to_string()))?
            }
        };
        if config.stop_tokens.is_empty() {
            config.stop_tokens.clone_from(&model.eos_token_ids);
        }
        Ok(config)
    }

    /// Parses the text of a `generation_config.json`; see [`GenerationConfig::for_model`].
    ///
    /// # Errors
    /// If the text is no JSON, or has values that make no sense.
    pub fn from_transformers(json: &str) -> Result<Self> {
        let keys: Map<String, Value> = serde_json::from_str(json)
            .map_err(|error| Error::Invalid(format!("no valid generation config: {error}")))?;
        let ignored: Vec<&str> = WITHOUT_COUNTERPART
            .iter()
            .filter(|(key, off)| keys.get(*key).is_some_and(|value| !is_off(value, off)))
            .map(|(key, _)| *key)
            .collect();
        if !ignored.is_empty() {
            tracing::warn!("generation config: {} not supported and ignored", ignored.join(", "));
        }
        let mut config = Self { stop_tokens: token_ids(&keys, "eos_token_id")?, ..Self::default() };
        if read::<bool>(&keys, "do_sample")? == Some(true) {
            config.temperature = Some(read(&keys, "temperature")?.unwrap_or(1.0));
            config.top_k = Some(read(&keys, "top_k")?.unwrap_or(50));
            config.top_p = read(&keys, "top_p")?;
        }
        if let Some(penalty) = read(&keys, "repetition_penalty")? {
            config.repetition_penalty = penalty;
        }
        if let Some(tokens) = read(&keys, "max_new_tokens")? {
            config.max_new_tokens = tokens;
        }
        config.stop_strings = match keys.get("stop_strings") {
            Some(Value::String(text)) => vec![text.clone()],
            _ => read(&keys, "stop_strings")?.unwrap_or_default(),
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks the options.
    ///
    /// # Errors
    /// If one is outside its range; the message names it.
    pub fn validate(&self) -> Result<()> {
        let fail = |message: String| Err(Error::Invalid(message));
        if self.max_new_tokens == 0 {
            return fail("max_new_tokens is 0: nothing would be generated".to_owned());
        }
        match self.temperature {
            Some(t) if !(t.is_finite() && t >= 0.0) => {
                return fail(format!("temperature is {t}: it has to be 0 (greedy) or a positive number"));
            }
            _ => {}
        }
        match self.top_p {
            Some(p) if !(p > 0.0 && p <= 1.0) => {
                return fail(format!("top_p is {p}: it has to be above 0 and at most 1 (1 is no limit)"));
            }
            _ => {}
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return fail(format!(
                "repetition_penalty is {}: it has to be a positive number (1 is off)",
                self.repetition_penalty
            ));
        }
        if self.repetition_window == Some(0) {
            return fail("repetition_window is 0: set repetition_penalty = 1 to turn the penalty off".to_owned());
        }
        if self.prefill_chunk_size == Some(0) {
            return fail("prefill_chunk_size is 0: leave it out, or give a number of tokens".to_owned());
        }
        if self.stop_strings.iter().any(String::is_empty) {
            return fail("stop_strings has an empty string, which would end every generation at once".to_owned());
        }
        Ok(())
    }
}

fn is_off(value: &Value, off: &[f64]) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64().is_some_and(|number| off.contains(&number)),
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        _ => false,
    }
}

fn read<T: serde::de::DeserializeOwned>(keys: &Map<String, Value>, key: &str) -> Result<Option<T>> {
    match keys.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value.clone())
            .map(Some)
            .map_err(|error| Error::Invalid(format!("{key} = {value}: {error}"))),
    }
}

/// One id, a list of ids, or nothing.
fn token_ids(keys: &Map<String, Value>, key: &str) -> Result<Vec<u32>> {
    match keys.get(key) {
        Some(Value::Array(_)) => Ok(read(keys, key)?.unwrap_or_default()),
        _ => Ok(read::<u32>(keys, key)?.into_iter().collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_row_of_a_seed_draws_as_a_row_of_another() {
        let seeds = (0..200).chain([u64::MAX - 1, u64::MAX, 1 << 40]);
        let mut all: Vec<u64> = seeds
            .flat_map(|seed| (0..300).map(move |row| GenerationConfig { seed, ..Default::default() }.seed_of_row(row)))
            .collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert_eq!(GenerationConfig { seed: 7, ..Default::default() }.seed_of_row(0), 7);
    }

    #[test]
    fn a_file_that_samples_gives_its_options() {
        let config = GenerationConfig::from_transformers(
            r#"{"bos_token_id": 1, "do_sample": true, "eos_token_id": [7, 9], "temperature": 0.6, "top_p": 0.9, "top_k": 20,
                "repetition_penalty": 1.1, "transformers_version": "4.42.3"}"#,
        )
        .unwrap();
        assert_eq!((config.temperature, config.top_p, config.top_k), (Some(0.6), Some(0.9), Some(20)));
        assert_eq!((config.repetition_penalty, config.stop_tokens), (1.1, vec![7, 9]));
    }

    #[test]
    fn the_defaults_are_those_of_transformers() {
        let sampling = GenerationConfig::from_transformers(r#"{"do_sample": true, "eos_token_id": 2}"#).unwrap();
        assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (Some(1.0), Some(50), None));
        assert_eq!(sampling.stop_tokens, [2]);
        let greedy =
            GenerationConfig::from_transformers(r#"{"temperature": 0.6, "top_k": 20, "max_new_tokens": 5}"#).unwrap();
        assert!(greedy.is_greedy());
        assert_eq!((greedy.top_k, greedy.max_new_tokens), (None, 5));
        assert_eq!(GenerationConfig::from_transformers("{}").unwrap(), GenerationConfig::default());
        let one = GenerationConfig::from_transformers(r#"{"stop_strings": "END"}"#).unwrap();
        assert_eq!(one.stop_strings, ["END"]);
    }

    #[test]
    fn the_models_own_end_tokens_are_used_where_the_file_has_none() {
        let model = crate::lora::tiny_model(1);
        assert_eq!(GenerationConfig::for_model(None, &model).unwrap().stop_tokens, [2]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("generation_config.json");
        std::fs::write(&path, r#"{"eos_token_id": [5]}"#).unwrap();
        assert_eq!(GenerationConfig::for_model(Some(&path), &model).unwrap().stop_tokens, [5]);
        std::fs::write(&path, r#"{"eos_token_id": "x"}"#).unwrap();
        let error = GenerationConfig::for_model(Some(&path), &model).unwrap_err().to_string();
        assert!(error.contains("generation_config.json") && error.contains("eos_token_id"), "{error}");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(GenerationConfig::for_model(Some(&path), &model), Err(Error::Io { .. })));
    }

    #[test]
    fn options_outside_their_range_are_named() {
        let of = |edit: fn(&mut GenerationConfig)| {
            let mut config = GenerationConfig::default();
            edit(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(of(|c| c.max_new_tokens = 0).starts_with("max_new_tokens"));
        assert!(of(|c| c.temperature = Some(-1.0)).starts_with("temperature is -1"));
        assert!(of(|c| c.temperature = Some(f64::NAN)).starts_with("temperature is NaN"));
        assert!(of(|c| c.top_p = Some(0.0)).starts_with("top_p is 0"));
        assert!(of(|c| c.top_p = Some(1.5)).starts_with("top_p is 1.5"));
        assert!(of(|c| c.repetition_penalty = 0.0).starts_with("repetition_penalty is 0"));
        assert!(of(|c| c.repetition_window = Some(0)).starts_with("repetition_window"));
        assert!(of(|c| c.stop_strings = vec![String::new()]).starts_with("stop_strings"));
        GenerationConfig { temperature: Some(0.0), top_p: Some(1.0), top_k: Some(0), ..Default::default() }
            .validate()
            .unwrap();
        assert!(serde_json::from_str::<GenerationConfig>(r#"{"temprature": 1}"#).is_err());
        for text in ["", "[]", r#"{"top_k": -1, "do_sample": true}"#, r#"{"top_p": 7, "do_sample": true}"#] {
            assert!(GenerationConfig::from_transformers(text).is_err(), "{text}");
        }
    }
}
