//! A model's description as a `config.json`, for models that came from elsewhere (GGUF).

use qlora_kernels::ops::rope::RopeScaling;
use serde_json::{Map, Value, json};

use super::ModelConfig;
use crate::error::{Error, Result};

impl ModelConfig {
    /// The text of a `config.json` that transformers and [`ModelConfig::from_json_file`] read as this model.
    pub fn to_json(&self) -> String {
        let definition = self.architecture.definition();
        let mut config = Map::new();
        let mut set = |key: &str, value: Value| drop(config.insert(key.to_owned(), value));
        set("architectures", json!([definition.class()]));
        set("model_type", json!(definition.model_type()));
        set("hidden_act", json!("silu"));
        set("vocab_size", json!(self.vocab_size));
        set("hidden_size", json!(self.hidden_size));
        set("intermediate_size", json!(self.intermediate_size));
        set("num_hidden_layers", json!(self.num_hidden_layers));
        set("num_attention_heads", json!(self.num_attention_heads));
        set("num_key_value_heads", json!(self.num_key_value_heads));
        set("head_dim", json!(self.head_dim));
        set("rms_norm_eps", decimal(self.rms_norm_eps));
        set("max_position_embeddings", json!(self.max_position_embeddings));
        set("rope_theta", json!(self.rope.theta));
        set("rope_scaling", self.rope.scaling.as_ref().map_or(Value::Null, scaling));
        set("tie_word_embeddings", json!(self.tie_word_embeddings));
        set("torch_dtype", json!("float32"));
        definition.write_json(self, &mut config);
        let mut set = |key: &str, value: Value| drop(config.insert(key.to_owned(), value));
        set("bos_token_id", json!(self.bos_token_id));
        set("eos_token_id", if let [one] = self.eos_token_ids[..] { json!(one) } else { json!(self.eos_token_ids) });
        serde_json::to_string_pretty(&config).expect("a map of plain values is JSON")
    }

    /// The `config.json` of a model that is written anew: `original` (without one, [`Self::to_json`]) with what can have become
    /// another one, and without `quantization_config`.
    ///
    /// # Errors
    /// If `original` is not a JSON object.
    pub(crate) fn rewrite(&self, original: Option<&str>) -> Result<Map<String, Value>> {
        let invalid = |error: serde_json::Error| Error::Invalid(format!("config.json of the base: {error}"));
        let written = self.to_json();
        let mut map: Map<String, Value> = serde_json::from_str(original.unwrap_or(&written)).map_err(invalid)?;
        map.shift_remove("quantization_config");
        map.insert("vocab_size".to_owned(), json!(self.vocab_size));
        // The names in the file are those of the class with a head.
        map.insert("architectures".to_owned(), json!([self.architecture.class()]));
        let absent_means = self.architecture.definition().defaults().tie_word_embeddings;
        if self.tie_word_embeddings != absent_means || map.contains_key("tie_word_embeddings") {
            map.insert("tie_word_embeddings".to_owned(), json!(self.tie_word_embeddings));
        }
        Ok(map)
    }
}

/// The shortest decimal that is this f32, not its f64 expansion.
pub(crate) fn decimal(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, |value| json!(value))
}

fn scaling(scaling: &RopeScaling) -> Value {
    match scaling {
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original_max_position_embeddings,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
            "truncate": truncate,
        }),
        _ => unreachable!("every scaling that is read can be written"),
    }
}
