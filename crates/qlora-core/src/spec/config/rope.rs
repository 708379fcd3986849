//! `rope_scaling` and `rope_theta` (transformers 4) or `rope_parameters` (transformers 5) to a [`RopeConfig`].

use qlora_kernels::ops::rope::{RopeConfig, RopeScaling};
use serde_json::{Map, Value};

use super::json::Fields;
use crate::error::{Error, Result};

/// Reads the rotary embedding of a `config.json`. A non-empty `rope_scaling` wins over `rope_parameters`, and a key inside
/// wins over the same key at the top, as in transformers. `default_theta` is the base where the file names none.
pub(super) fn parse(config: &Fields<'_>, max_position_embeddings: usize, default_theta: f64) -> Result<RopeConfig> {
    let empty = Map::new();
    let (option, map) = config.rope_options()?.unwrap_or(("rope_scaling", &empty));
    if let Some(key) = map.keys().find(|key| matches!(key.as_str(), "full_attention" | "sliding_attention")) {
        return Err(config.unsupported(&format!("{option} with parameters by layer type ({key})")));
    }
    let rope = config.inside(option, map);
    for fields in [config, &rope] {
        if let Some(factor) = fields.f64("partial_rotary_factor")?
            && factor != 1.0
        {
            return Err(fields.unsupported(&format!("partial_rotary_factor {factor}")));
        }
    }
    if rope.present("mrope_section") {
        return Err(rope.unsupported("mrope_section (multimodal rotary embeddings)"));
    }
    let theta = rope.f64("rope_theta")?.or(config.f64("rope_theta")?).unwrap_or(default_theta);
    if !(theta.is_finite() && theta > 1.0) {
        return Err(rope.invalid(&format!("rope_theta is {theta}; it must be finite and greater than 1")));
    }

    let kind = match rope.string("rope_type")? {
        Some(kind) => kind,
        None => rope.string("type")?.unwrap_or("default"),
    };
    let original = || -> Result<usize> {
        let key = "original_max_position_embeddings";
        let length = match config.usize(key)? {
            Some(length) => length,
            None => rope.usize(key)?.unwrap_or(max_position_embeddings),
        };
        if length == 0 {
            return Err(rope.invalid(&format!("{key} is 0")));
        }
        Ok(length)
    };
    let scaling = match kind {
        "default" => None,
        "linear" => Some(RopeScaling::Linear { factor: rope.positive("factor")? }),
        "llama3" => {
            let (low, high) = (rope.positive("low_freq_factor")?, rope.positive("high_freq_factor")?);
            if high <= low {
                return Err(
                    rope.invalid(&format!("high_freq_factor ({high}) must be greater than low_freq_factor ({low})"))
                );
            }
            Some(RopeScaling::Llama3 {
                factor: rope.positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original()?,
            })
        }
        "yarn" => Some(yarn(&rope, original()?, max_position_embeddings)?),
        other => {
            return Err(rope.unsupported(&format!("rope_type \"{other}\" (supported: default, linear, llama3, yarn)")));
        }
    };
    Ok(RopeConfig { theta, scaling })
}

/// YaRN's options with transformers' defaults. `mscale` and `mscale_all_dim` only choose the attention factor.
fn yarn(rope: &Fields<'_>, original: usize, max_position_embeddings: usize) -> Result<RopeScaling> {
    let factor = match rope.f64("factor")? {
        Some(_) => rope.positive("factor")?,
        None => max_position_embeddings as f64 / original as f64,
    };
    let mscale = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let nonzero = |key| -> Result<Option<f64>> { Ok(rope.f64(key)?.filter(|value| *value != 0.0)) };
    let attention_factor = match (rope.f64("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
        (Some(_), ..) => Some(rope.positive("attention_factor")?),
        (None, Some(scale), Some(all)) => Some(mscale(scale) / mscale(all)),
        _ => None,
    };
    if attention_factor.is_some_and(|factor| !factor.is_finite()) {
        return Err(rope.invalid("mscale and mscale_all_dim give no finite attention factor"));
    }
    let (beta_fast, beta_slow) = (nonzero("beta_fast")?.unwrap_or(32.0), nonzero("beta_slow")?.unwrap_or(1.0));
    if !(beta_fast > 0.0 && beta_slow > 0.0 && beta_fast >= beta_slow) {
        return Err(
            rope.invalid(&format!("beta_fast ({beta_fast}) must be at least beta_slow ({beta_slow}), both positive"))
        );
    }
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        beta_fast,
        beta_slow,
        attention_factor,
        truncate: rope.bool("truncate")?.unwrap_or(true),
    })
}

impl<'a> Fields<'a> {
    /// The object with the options of the rotary embedding, after the key that it stands under, if the file has one.
    pub(crate) fn rope_options(&self) -> Result<Option<(&'static str, &'a Map<String, Value>)>> {
        Ok(match (self.object("rope_scaling")?, self.object("rope_parameters")?) {
            (Some(map), _) if !map.is_empty() => Some(("rope_scaling", map)),
            (_, Some(map)) => Some(("rope_parameters", map)),
            _ => None,
        })
    }

    /// A required, finite number above zero.
    fn positive(&self, key: &str) -> Result<f64> {
        match self.f64(key)? {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(self.invalid(&format!("{key} is {value}; it must be finite and positive"))),
            None => Err(self.invalid(&format!("{key} is missing"))),
        }
    }

    /// Whether a key is there and not null.
    fn present(&self, key: &str) -> bool {
        !matches!(self.get(key), None | Some(Value::Null))
    }

    /// The error for an option that is not supported.
    pub(crate) fn unsupported(&self, option: &str) -> Error {
        Error::Unsupported(format!("{}{option}, in {}", self.prefix(), self.path().display()))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{ModelConfig, json};
    use super::*;

    fn rope(options: &str) -> Result<RopeConfig> {
        let text = format!(
            r#"{{"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
               "num_attention_heads": 2, "max_position_embeddings": 1024{options}}}"#
        );
        json::parse(&text, Path::new("config.json")).map(|config: ModelConfig| config.rope)
    }

    #[test]
    fn both_generations_of_transformers_say_the_same() {
        let plain = RopeConfig { theta: 10_000.0, scaling: None };
        assert_eq!(rope("").unwrap(), plain);
        assert_eq!(rope(r#", "rope_scaling": null, "rope_parameters": null"#).unwrap(), plain);
        assert_eq!(rope(r#", "rope_theta": 5e5"#).unwrap().theta, 5e5);
        assert_eq!(rope(r#", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}"#).unwrap().theta, 5e5);
        let linear = RopeConfig { theta: 1e6, scaling: Some(RopeScaling::Linear { factor: 4.0 }) };
        assert_eq!(rope(r#", "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4}"#).unwrap(), linear);
        let new = r#", "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000000}"#;
        assert_eq!(rope(new).unwrap(), linear);
        let llama = |original| RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original,
        };
        let options =
            r#", "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4"#;
        assert_eq!(rope(&format!("{options}}}")).unwrap().scaling, Some(llama(1024)));
        let original = format!("{options}, \"original_max_position_embeddings\": 256}}");
        assert_eq!(rope(&original).unwrap().scaling, Some(llama(256)));
    }

    #[test]
    fn yarn_takes_transformers_defaults() {
        let yarn = |extra: &str| match rope(&format!(r#", "rope_scaling": {{"rope_type": "yarn"{extra}}}"#))?.scaling {
            Some(RopeScaling::Yarn {
                factor, original_max_position_embeddings, attention_factor, truncate, ..
            }) => Ok::<_, Error>((factor, original_max_position_embeddings, attention_factor, truncate)),
            other => panic!("{other:?}"),
        };
        assert_eq!(yarn(r#", "factor": 4"#).unwrap(), (4.0, 1024, None, true));
        let ratio = r#", "factor": null, "original_max_position_embeddings": 256, "truncate": false"#;
        assert_eq!(yarn(ratio).unwrap(), (4.0, 256, None, false));
        assert_eq!(yarn(r#", "factor": 4, "attention_factor": 1.5"#).unwrap().2, Some(1.5));
        let mscale = yarn(r#", "factor": 40, "mscale": 0.5, "mscale_all_dim": 1"#).unwrap().2.unwrap();
        assert!((mscale - (0.05 * 40f64.ln() + 1.0) / (0.1 * 40f64.ln() + 1.0)).abs() < 1e-12);
        assert!(yarn(r#", "factor": 4, "beta_fast": -1"#).is_err());
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (options, message) in [
            (r#", "rope_scaling": {"type": "dynamic", "factor": 2}"#, "rope_scaling.rope_type \"dynamic\""),
            (r#", "rope_parameters": {"rope_type": "longrope"}"#, "rope_parameters.rope_type \"longrope\""),
            (r#", "partial_rotary_factor": 0.5"#, "partial_rotary_factor 0.5"),
            (r#", "rope_parameters": {"partial_rotary_factor": 0.5}"#, "rope_parameters.partial_rotary_factor 0.5"),
            (r#", "rope_parameters": {"full_attention": {}}"#, "by layer type"),
            (r#", "rope_scaling": {"type": "default", "mrope_section": [1]}"#, "mrope_section"),
            (r#", "rope_scaling": {"type": "linear"}"#, "factor is missing"),
            (r#", "rope_scaling": {"type": "linear", "factor": 0}"#, "factor is 0"),
            (r#", "rope_theta": 0"#, "rope_theta is 0"),
            (r#", "rope_theta": "big""#, "rope_theta"),
            (
                r#", "rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}"#,
                "high_freq_factor (1) must be greater",
            ),
        ] {
            let error = rope(options).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("config.json"), "{options}: {error}");
        }
    }
}
