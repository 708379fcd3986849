//! Mistral: a sliding window in every layer. `MistralForCausalLM`; llama.cpp runs it as Llama.

use serde_json::{Map, Value as Json, json};

use super::llama::Llama;
use super::{Defaults, Definition};
use crate::error::Result;
use crate::spec::config::{Fields, LayerTypes, ModelConfig};
use crate::spec::gguf::Value;

pub(super) struct Mistral;

impl Definition for Mistral {
    fn class(&self) -> &'static str {
        "MistralForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "mistral"
    }

    fn gguf_name(&self) -> &'static str {
        Llama.gguf_name()
    }

    fn defaults(&self) -> Defaults {
        Defaults { max_position_embeddings: 131_072, num_key_value_heads: Some(8), ..Llama.defaults() }
    }

    fn read_json(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        let types = LayerTypes::read(fields, config)?;
        config.sliding_window = types.all_or_none(types.window, fields)?;
        Ok(())
    }

    fn write_json(&self, config: &ModelConfig, map: &mut Map<String, Json>) {
        map.insert("sliding_window".to_owned(), json!(config.sliding_window.first().copied().flatten()));
    }

    fn write_gguf(&self, config: &ModelConfig) -> std::result::Result<Vec<Value>, String> {
        Llama.write_gguf(config)
    }

    fn interleaves_in_gguf(&self) -> bool {
        true
    }
}
