//! SmolLM3: Llama's block, every fourth of them without rotary embedding. `SmolLM3ForCausalLM`.

use serde_json::{Map, Value as Json, json};

use super::llama::Llama;
use super::qwen2::write_windows;
use super::{Defaults, Definition, no_gguf_window, refuse_gguf_window};
use crate::error::Result;
use crate::spec::config::{Fields, LayerTypes, ModelConfig};
use crate::spec::gguf::{Metadata, Problem, Value};

/// One block of so many is not rotated, in a `config.json` that says nothing else and in every GGUF file: llama.cpp has no key
/// for it.
const INTERVAL: usize = 4;

pub(super) struct SmolLM3;

impl Definition for SmolLM3 {
    fn class(&self) -> &'static str {
        "SmolLM3ForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "smollm3"
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            max_position_embeddings: 32_768,
            num_key_value_heads: Some(4),
            head_dim: None,
            rope_theta: 2_000_000.0,
            tie_word_embeddings: true,
            bos_token_id: Some(128_000),
            eos_token_id: Some(128_001),
        }
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &["no_rope_layers"]
    }

    fn read_json(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let bias = fields.bool("attention_bias")?.unwrap_or(false);
        (config.qkv_bias, config.o_bias) = (bias, bias);
        config.mlp_bias = fields.bool("mlp_bias")?.unwrap_or(false);
        let layers = config.num_hidden_layers;
        config.without_rope = match fields.get("no_rope_layers") {
            None | Some(Json::Null) => {
                let interval = fields.usize("no_rope_layer_interval")?.unwrap_or(INTERVAL);
                if interval == 0 {
                    return Err(fields.invalid("no_rope_layer_interval is 0"));
                }
                every(interval, layers)
            }
            // Its name says the opposite of its values: 1 is a rotated block.
            Some(Json::Array(rotated)) if rotated.len() == layers => rotated
                .iter()
                .map(|value| match value.as_u64() {
                    Some(0) => Ok(true),
                    Some(1) => Ok(false),
                    _ => Err(fields.wrong("no_rope_layers", "a list of 0 and 1", value)),
                })
                .collect::<Result<_>>()?,
            Some(Json::Array(rotated)) => {
                let message = format!("no_rope_layers has {} entries for {layers} layers", rotated.len());
                return Err(fields.invalid(&message));
            }
            Some(other) => return Err(fields.wrong("no_rope_layers", "a list of 0 and 1", other)),
        };
        let types = LayerTypes::read(fields, config)?;
        let in_use = fields.bool("use_sliding_window")? == Some(true) && fields.get("sliding_window").is_some();
        let slides = |layer: usize| config.without_rope[layer];
        config.sliding_window = types.layers(types.window.filter(|_| in_use), slides, fields)?;
        Ok(())
    }

    fn write_json(&self, config: &ModelConfig, map: &mut Map<String, Json>) {
        Llama.write_json(config, map);
        let rotated = |layer: usize| usize::from(!config.without_rope.get(layer).copied().unwrap_or(false));
        map.insert("no_rope_layers".to_owned(), json!((0..config.num_hidden_layers).map(rotated).collect::<Vec<_>>()));
        write_windows(config, map);
    }

    fn read_gguf(&self, metadata: &dyn Metadata, config: &mut ModelConfig) -> std::result::Result<(), Problem> {
        config.without_rope = every(INTERVAL, config.num_hidden_layers);
        refuse_gguf_window(metadata, config)
    }

    fn write_gguf(&self, config: &ModelConfig) -> std::result::Result<Vec<Value>, String> {
        no_gguf_window(config, "a SmolLM3 model")?;
        if config.without_rope != every(INTERVAL, config.num_hidden_layers) {
            return Err(format!("other blocks without rotary embedding than every {INTERVAL}th"));
        }
        Ok(Vec::new())
    }

    fn interleaves_in_gguf(&self) -> bool {
        true
    }
}

/// The last of every `interval` blocks is not rotated.
fn every(interval: usize, layers: usize) -> Vec<bool> {
    (1..=layers).map(|number| number.is_multiple_of(interval)).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(options: &str) -> Result<ModelConfig> {
        let text = format!(
            r#"{{"model_type": "smollm3", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 5,
               "num_attention_heads": 8{options}}}"#
        );
        ModelConfig::from_json(&text, Path::new("config.json"))
    }

    #[test]
    fn blocks_without_rotation_are_named_or_counted() {
        let plain = config("").unwrap();
        assert_eq!(plain.without_rope, [false, false, false, true, false]);
        assert_eq!(
            plain.spec().blocks.iter().map(|block| block.rotary).collect::<Vec<_>>(),
            [true, true, true, false, true]
        );
        assert_eq!((plain.num_key_value_heads, plain.rope.theta), (4, 2_000_000.0));
        assert!(plain.tie_word_embeddings && plain.sliding_window == [None; 5]);
        assert_eq!(config(r#", "no_rope_layer_interval": 2"#).unwrap().without_rope, [false, true, false, true, false]);
        // A window is one of the blocks without rotation, and only where it is in use.
        let windows = r#", "no_rope_layers": [0, 1, 1, 0, 1], "sliding_window": 9"#;
        assert_eq!(config(windows).unwrap().sliding_window, [None; 5]);
        let named = config(&format!("{windows}, \"use_sliding_window\": true")).unwrap();
        assert_eq!(named.without_rope, [true, false, false, true, false]);
        assert_eq!(named.sliding_window, [Some(9), None, None, Some(9), None]);
        assert_eq!(ModelConfig::from_json(&named.to_json(), Path::new("config.json")).unwrap(), named);
        assert!(SmolLM3.write_gguf(&named).is_err() && SmolLM3.write_gguf(&plain).is_ok());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (options, message) in [
            (r#", "no_rope_layers": [1]"#, "1 entries for 5 layers"),
            (r#", "no_rope_layers": [1, 1, 1, 1, 2]"#, "a list of 0 and 1"),
            (r#", "no_rope_layers": 3"#, "a list of 0 and 1"),
            (r#", "no_rope_layer_interval": 0"#, "no_rope_layer_interval is 0"),
        ] {
            let error = config(options).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("config.json"), "{options}: {error}");
        }
    }
}
