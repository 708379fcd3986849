//! Ministral 3's text model: Mistral's block, YaRN, and queries that are scaled by their position. `Ministral3ForCausalLM`.
//!
//! Rotated queries are multiplied by `1 + llama_4_scaling_beta * ln(1 + floor(position / original_max_position_embeddings))`.
//! That is exactly 1 before the original length (16384 in the published models), and no operation here does the rest: the
//! longest sequence is taken as the original length, so that longer ones are refused and shorter ones are right.

use qlora_kernels::ops::rope::{RopeConfig, RopeScaling};
use serde_json::{Map, Value as Json, json};

use super::llama::Llama;
use super::mistral::Mistral;
use super::{Defaults, Definition, no_gguf_window, refuse_gguf_window};
use crate::error::Result;
use crate::spec::config::{Fields, LayerTypes, ModelConfig, decimal};
use crate::spec::gguf::{Metadata, Problem, Value};

const BETA: &str = "llama_4_scaling_beta";
const GGUF_BETA: &str = "attention.temperature_scale";

pub(super) struct Ministral3;

impl Definition for Ministral3 {
    fn class(&self) -> &'static str {
        "Ministral3ForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "ministral3"
    }

    /// llama.cpp's class has the name of the model with images around this one.
    fn gguf_name(&self) -> &'static str {
        "mistral3"
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            max_position_embeddings: 262_144,
            head_dim: Some(128),
            rope_theta: 1_000_000.0,
            ..Mistral.defaults()
        }
    }

    fn read_json(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        // No other class has this default, so `Defaults` does not name it.
        if fields.f64("rms_norm_eps")?.is_none() {
            config.rms_norm_eps = 1e-5;
        }
        let types = LayerTypes::read(fields, config)?;
        let window = types.window.filter(|_| fields.get("sliding_window").is_some());
        config.sliding_window = types.all_or_none(window, fields)?;
        let Some((option, map)) = fields.rope_options()? else {
            config.rope = published_rope();
            config.scalings.llama_4_scaling_beta = 0.1;
            limit_positions(config, &fields.path().display().to_string());
            return Ok(());
        };
        let rope = fields.inside(option, map);
        config.scalings.llama_4_scaling_beta = rope.f64(BETA)?.unwrap_or(0.0) as f32;
        match limit_positions(config, &fields.path().display().to_string()) {
            true => Ok(()),
            false => Err(rope.unsupported(&format!("{BETA} with another rope_type than yarn"))),
        }
    }

    fn write_json(&self, config: &ModelConfig, map: &mut Map<String, Json>) {
        Mistral.write_json(config, map);
        if let Some(Json::Object(options)) = map.get_mut("rope_scaling") {
            options.insert(BETA.to_owned(), decimal(config.scalings.llama_4_scaling_beta));
            return;
        }
        // Without options the class takes those of the published models, and it cannot run without beta and original length.
        let plain = json!({"rope_type": "default", "rope_theta": config.rope.theta, BETA: 0.0,
            "original_max_position_embeddings": config.max_position_embeddings});
        map.insert("rope_scaling".to_owned(), plain);
    }

    /// The original length is YaRN's; `yarn_log_multiplier` is `mscale_all_dim`, beside which llama.cpp takes `mscale` as 1.
    fn read_gguf(&self, metadata: &dyn Metadata, config: &mut ModelConfig) -> std::result::Result<(), Problem> {
        let multiplier = metadata.f64("rope.scaling.yarn_log_multiplier")?.filter(|multiplier| *multiplier != 0.0);
        if let (Some(RopeScaling::Yarn { factor, attention_factor, .. }), Some(multiplier)) =
            (&mut config.rope.scaling, multiplier)
            && *factor > 1.0
        {
            let mscale = |scale: f64| 0.1 * scale * factor.ln() + 1.0;
            let given = attention_factor.unwrap_or(mscale(1.0)) / mscale(multiplier);
            if !(given.is_finite() && given > 0.0) {
                let key = metadata.key("rope.scaling.yarn_log_multiplier");
                return Err(Problem::Format(format!("metadata {key} is {multiplier}")));
            }
            *attention_factor = Some(given);
        }
        config.scalings.llama_4_scaling_beta = metadata.f64(GGUF_BETA)?.unwrap_or(0.0) as f32;
        if !limit_positions(config, &metadata.key(GGUF_BETA)) {
            return Err(Problem::Unsupported(format!("metadata {} without YaRN", metadata.key(GGUF_BETA))));
        }
        refuse_gguf_window(metadata, config)
    }

    fn write_gguf(&self, config: &ModelConfig) -> std::result::Result<Vec<Value>, String> {
        no_gguf_window(config, "a Ministral 3 model")?;
        let beta = config.scalings.llama_4_scaling_beta;
        Ok((beta != 0.0).then_some(Value::F32(GGUF_BETA, beta)).into_iter().collect())
    }

    fn interleaves_in_gguf(&self) -> bool {
        Llama.interleaves_in_gguf()
    }
}

/// The rotary embedding of a `config.json` that says nothing about it.
fn published_rope() -> RopeConfig {
    RopeConfig {
        theta: 1_000_000.0,
        scaling: Some(RopeScaling::Yarn {
            factor: 16.0,
            original_max_position_embeddings: 16_384,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: Some(1.0),
            truncate: true,
        }),
    }
}

/// Ends sequences where the scaling of queries begins. False if there is such a scaling and no original length.
fn limit_positions(config: &mut ModelConfig, place: &str) -> bool {
    let beta = config.scalings.llama_4_scaling_beta;
    if beta == 0.0 {
        return true;
    }
    let Some(RopeScaling::Yarn { original_max_position_embeddings: original, .. }) = config.rope.scaling else {
        return false;
    };
    let declared = config.max_position_embeddings;
    if declared > original {
        tracing::warn!(
            "{place}: {BETA} {beta} scales queries from position {original} on, which is not supported; sequences of more than \
             {original} tokens are refused, as if max_position_embeddings were {original} (it is {declared})"
        );
        config.max_position_embeddings = original;
    }
    true
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(options: &str) -> Result<ModelConfig> {
        let text = format!(
            r#"{{"model_type": "ministral3", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
               "num_attention_heads": 8{options}}}"#
        );
        ModelConfig::from_json(&text, Path::new("config.json"))
    }

    fn yarn(extra: &str) -> String {
        format!(
            r#", "rope_parameters": {{"rope_type": "yarn", "rope_theta": 5e5, "factor": 4, "mscale": 1,
               "original_max_position_embeddings": 256{extra}}}, "max_position_embeddings": 1024"#
        )
    }

    fn read_again(config: &ModelConfig) -> ModelConfig {
        ModelConfig::from_json(&config.to_json(), Path::new("config.json")).unwrap()
    }

    #[test]
    fn missing_keys_mean_the_published_models() {
        let plain = config("").unwrap();
        assert_eq!((plain.head_dim, plain.num_key_value_heads, plain.rms_norm_eps), (128, 8, 1e-5));
        assert_eq!((plain.rope.clone(), plain.scalings.llama_4_scaling_beta), (published_rope(), 0.1));
        assert_eq!((plain.max_position_embeddings, plain.sliding_window.clone()), (16_384, vec![None; 2]));
        assert!(!plain.tie_word_embeddings);
        assert_eq!(read_again(&plain), plain);
        let window = config(r#", "sliding_window": 7, "rms_norm_eps": 1e-6"#).unwrap();
        assert_eq!((window.sliding_window.clone(), window.rms_norm_eps), (vec![Some(7); 2], 1e-6));
        assert!(Ministral3.write_gguf(&window).is_err());
    }

    #[test]
    fn sequences_end_where_queries_are_scaled() {
        let scaled = config(&yarn(r#", "llama_4_scaling_beta": 0.2, "mscale_all_dim": 1"#)).unwrap();
        assert_eq!((scaled.max_position_embeddings, scaled.scalings.llama_4_scaling_beta), (256, 0.2));
        assert!(matches!(scaled.rope.scaling, Some(RopeScaling::Yarn { attention_factor: Some(1.0), .. })));
        assert_eq!(Ministral3.write_gguf(&scaled).unwrap(), [Value::F32(GGUF_BETA, 0.2)]);
        assert_eq!(read_again(&scaled), scaled);
        // Without the scaling the model has its whole length.
        for extra in ["", r#", "llama_4_scaling_beta": null"#, r#", "llama_4_scaling_beta": 0"#] {
            let whole = config(&yarn(extra)).unwrap();
            assert_eq!(whole.max_position_embeddings, 1024, "{extra}");
            assert!(Ministral3.write_gguf(&whole).unwrap().is_empty());
            assert_eq!(read_again(&whole), whole);
        }
        let plain = config(r#", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}"#).unwrap();
        assert_eq!((plain.max_position_embeddings, &plain.rope.scaling), (262_144, &None));
        assert_eq!(read_again(&plain), plain);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (options, message) in [
            (yarn(r#", "llama_4_scaling_beta": "big""#), "rope_parameters.llama_4_scaling_beta"),
            (
                r#", "rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}"#.to_owned(),
                "rope_parameters.llama_4_scaling_beta with another rope_type than yarn",
            ),
            (yarn(r#", "llama_4_scaling_beta": -0.5"#), "the scaling of queries"),
            (r#", "vision_config": {"hidden_size": 4}"#.to_owned(), "vision_config"),
        ] {
            let error = config(&options).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("config.json"), "{options}: {error}");
        }
        let images = r#"{"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
            "text_config": {"model_type": "ministral3"}, "vision_config": {}}"#;
        let error = ModelConfig::from_json(images, Path::new("config.json")).unwrap_err().to_string();
        assert!(
            error.contains("\"mistral3\", a model around a ministral3, which has to be saved by itself"),
            "{error}"
        );
    }
}
