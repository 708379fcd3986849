//! Qwen3: RMSNorm on every head of q and k. `Qwen3ForCausalLM`.

use serde_json::{Map, Value as Json, json};

use super::qwen2::{Qwen2, windows, write_windows};
use super::{Defaults, Definition, no_gguf_window, refuse_gguf_window};
use crate::error::Result;
use crate::spec::config::{Fields, ModelConfig};
use crate::spec::gguf::{Metadata, Problem, Value};

pub(super) struct Qwen3;

impl Definition for Qwen3 {
    fn class(&self) -> &'static str {
        "Qwen3ForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "qwen3"
    }

    fn defaults(&self) -> Defaults {
        Defaults { head_dim: Some(128), ..Qwen2.defaults() }
    }

    fn read_json(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let bias = fields.bool("attention_bias")?.unwrap_or(false);
        (config.qkv_bias, config.o_bias) = (bias, bias);
        config.qk_norm = true;
        config.sliding_window = windows(fields, config)?;
        Ok(())
    }

    fn write_json(&self, config: &ModelConfig, map: &mut Map<String, Json>) {
        write_windows(config, map);
        map.insert("attention_bias".to_owned(), json!(config.qkv_bias));
    }

    fn read_gguf(&self, metadata: &dyn Metadata, config: &mut ModelConfig) -> std::result::Result<(), Problem> {
        config.qk_norm = true;
        refuse_gguf_window(metadata, config)
    }

    fn write_gguf(&self, config: &ModelConfig) -> std::result::Result<Vec<Value>, String> {
        no_gguf_window(config, "a Qwen model")?;
        if config.qkv_bias || config.o_bias || config.mlp_bias {
            return Err("biases of a Qwen3 model".to_owned());
        }
        Ok(Vec::new())
    }
}
