//! Qwen2 and Qwen2.5: biases on q, k and v, and a window in the upper layers where one is in use. `Qwen2ForCausalLM`.

use serde_json::{Map, Value as Json, json};

use super::{Defaults, Definition, no_gguf_window, refuse_gguf_window};
use crate::error::Result;
use crate::spec::config::{Fields, LayerTypes, ModelConfig};
use crate::spec::gguf::{Metadata, Problem, Value};

pub(super) struct Qwen2;

impl Definition for Qwen2 {
    fn class(&self) -> &'static str {
        "Qwen2ForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "qwen2"
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            max_position_embeddings: 32_768,
            num_key_value_heads: Some(32),
            head_dim: None,
            rope_theta: 10_000.0,
            tie_word_embeddings: false,
            bos_token_id: None,
            eos_token_id: None,
        }
    }

    fn read_json(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        config.qkv_bias = true;
        config.sliding_window = windows(fields, config)?;
        Ok(())
    }

    fn write_json(&self, config: &ModelConfig, map: &mut Map<String, Json>) {
        write_windows(config, map);
    }

    fn read_gguf(&self, metadata: &dyn Metadata, config: &mut ModelConfig) -> std::result::Result<(), Problem> {
        config.qkv_bias = true;
        refuse_gguf_window(metadata, config)
    }

    fn write_gguf(&self, config: &ModelConfig) -> std::result::Result<Vec<Value>, String> {
        no_gguf_window(config, "a Qwen model")?;
        if config.o_bias || config.mlp_bias {
            return Err("biases on o or in the MLP of a Qwen2 model".to_owned());
        }
        Ok(Vec::new())
    }
}

/// The windows of Qwen's layers: only with `use_sliding_window`, and without `layer_types` from layer `max_window_layers` on.
pub(super) fn windows(fields: &Fields<'_>, config: &ModelConfig) -> Result<Vec<Option<usize>>> {
    let types = LayerTypes::read(fields, config)?;
    let window = types.window.filter(|_| fields.get("use_sliding_window") == Some(&Json::Bool(true)));
    fields.bool("use_sliding_window")?;
    let first = fields.usize("max_window_layers")?.unwrap_or(28);
    types.layers(window, |layer| layer >= first, fields)
}

/// Writes the keys that [`windows`] reads.
pub(super) fn write_windows(config: &ModelConfig, map: &mut Map<String, Json>) {
    let windowed = config.sliding_window.iter().flatten().next();
    let kind = |window: &Option<usize>| if window.is_some() { "sliding_attention" } else { "full_attention" };
    map.insert("use_sliding_window".to_owned(), json!(windowed.is_some()));
    map.insert("sliding_window".to_owned(), json!(windowed));
    map.insert("layer_types".to_owned(), config.sliding_window.iter().map(kind).collect());
}
