//! Llama 2, 3, 3.1, 3.2 and everything of the same shape: `LlamaForCausalLM`.

use serde_json::{Map, Value as Json, json};

use super::{Defaults, Definition};
use crate::error::Result;
use crate::spec::config::{Fields, LayerTypes, ModelConfig};
use crate::spec::gguf::{Metadata, Problem, Value};

pub(super) struct Llama;

impl Definition for Llama {
    fn class(&self) -> &'static str {
        "LlamaForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "llama"
    }

    fn defaults(&self) -> Defaults {
        Defaults {
            max_position_embeddings: 2048,
            num_key_value_heads: None,
            head_dim: None,
            rope_theta: 10_000.0,
            tie_word_embeddings: false,
            bos_token_id: Some(1),
            eos_token_id: Some(2),
        }
    }

    fn read_json(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let bias = fields.bool("attention_bias")?.unwrap_or(false);
        (config.qkv_bias, config.o_bias) = (bias, bias);
        config.mlp_bias = fields.bool("mlp_bias")?.unwrap_or(false);
        // The class ignores `sliding_window`.
        config.sliding_window = LayerTypes::read(fields, config)?.all_or_none(None, fields)?;
        Ok(())
    }

    fn write_json(&self, config: &ModelConfig, map: &mut Map<String, Json>) {
        map.insert("attention_bias".to_owned(), json!(config.qkv_bias));
        map.insert("mlp_bias".to_owned(), json!(config.mlp_bias));
    }

    /// Files of Mistral, whose class in llama.cpp this is, have a window.
    fn read_gguf(&self, _: &dyn Metadata, _: &mut ModelConfig) -> std::result::Result<(), Problem> {
        Ok(())
    }

    fn write_gguf(&self, config: &ModelConfig) -> std::result::Result<Vec<Value>, String> {
        let window = config.sliding_window.first().copied().flatten();
        if config.sliding_window.iter().any(|layer| *layer != window) {
            return Err("a sliding window in some layers, or in a Qwen model".to_owned());
        }
        Ok(window.map(|window| Value::U32("attention.sliding_window", window as u32)).into_iter().collect())
    }

    fn interleaves_in_gguf(&self) -> bool {
        true
    }
}
