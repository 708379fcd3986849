//! Granite 3: Llama's block with four factors. `GraniteForCausalLM`.
//!
//! The embedding's output, attention's scores and each half of a block are multiplied by one, logits are divided by one. The
//! factor of the scores stands in place of `1 / sqrt(head_dim)`, and is 1 where a `config.json` does not name it.

use serde_json::{Map, Value as Json};

use super::llama::Llama;
use super::{Defaults, Definition, no_gguf_window, refuse_gguf_window};
use crate::error::Result;
use crate::spec::config::{Fields, ModelConfig, decimal};
use crate::spec::gguf::{Metadata, Problem, Value};

pub(super) struct Granite;

impl Definition for Granite {
    fn class(&self) -> &'static str {
        "GraniteForCausalLM"
    }

    fn model_type(&self) -> &'static str {
        "granite"
    }

    fn defaults(&self) -> Defaults {
        Llama.defaults()
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &["attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"]
    }

    fn read_json(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
        Llama.read_json(fields, config)?;
        let factor = |key: &str| -> Result<f32> { Ok(fields.f64(key)?.unwrap_or(1.0) as f32) };
        config.scalings.embedding = factor("embedding_multiplier")?;
        config.scalings.attention = Some(factor("attention_multiplier")?);
        config.scalings.residual = factor("residual_multiplier")?;
        config.scalings.logits = factor("logits_scaling")?;
        Ok(())
    }

    fn write_json(&self, config: &ModelConfig, map: &mut Map<String, Json>) {
        Llama.write_json(config, map);
        map.insert("embedding_multiplier".to_owned(), decimal(config.scalings.embedding));
        map.insert("attention_multiplier".to_owned(), decimal(config.attention(0).scale));
        map.insert("residual_multiplier".to_owned(), decimal(config.scalings.residual));
        map.insert("logits_scaling".to_owned(), decimal(config.scalings.logits));
    }

    fn own_gguf_keys(&self) -> &'static [&'static str] {
        &["attention.scale", "embedding_scale", "logit_scale", "residual_scale"]
    }

    /// llama.cpp takes a missing factor, and 0, as none.
    fn read_gguf(&self, metadata: &dyn Metadata, config: &mut ModelConfig) -> std::result::Result<(), Problem> {
        let factor = |key: &str| -> std::result::Result<_, Problem> {
            Ok(metadata.f64(key)?.filter(|factor| *factor != 0.0).map(|factor| factor as f32))
        };
        config.scalings.embedding = factor("embedding_scale")?.unwrap_or(1.0);
        config.scalings.attention = factor("attention.scale")?;
        config.scalings.residual = factor("residual_scale")?.unwrap_or(1.0);
        config.scalings.logits = factor("logit_scale")?.unwrap_or(1.0);
        refuse_gguf_window(metadata, config)
    }

    fn write_gguf(&self, config: &ModelConfig) -> std::result::Result<Vec<Value>, String> {
        no_gguf_window(config, "a Granite model")?;
        Ok(vec![
            Value::F32("attention.scale", config.attention(0).scale),
            Value::F32("embedding_scale", config.scalings.embedding),
            Value::F32("residual_scale", config.scalings.residual),
            Value::F32("logit_scale", config.scalings.logits),
        ])
    }

    fn interleaves_in_gguf(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Scalings;

    const SIZES: &str = r#""model_type": "granite", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4"#;

    fn config(options: &str) -> Result<ModelConfig> {
        ModelConfig::from_json(&format!("{{{SIZES}{options}}}"), Path::new("config.json"))
    }

    #[test]
    fn factors_are_read_and_written() {
        // A missing factor of the scores is 1, not 1 / sqrt(head_dim).
        let plain = config("").unwrap();
        assert_eq!(plain.scalings, Scalings { attention: Some(1.0), ..Scalings::default() });
        assert_eq!(plain.attention(1).scale, 1.0);
        let all = config(
            r#", "embedding_multiplier": 12, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22,
               "logits_scaling": 8.0, "attention_bias": true, "mlp_bias": true"#,
        )
        .unwrap();
        let (attention, plain) = (Some(0.0078125), Scalings::default());
        let expected = Scalings { embedding: 12.0, attention, residual: 0.22, logits: 8.0, ..plain };
        assert_eq!((all.scalings, all.attention(0).scale), (expected, 0.0078125));
        assert!(all.qkv_bias && all.o_bias && all.mlp_bias);
        assert_eq!(ModelConfig::from_json(&all.to_json(), Path::new("config.json")).unwrap(), all);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (options, message) in [
            (r#", "residual_multiplier": 0"#, "residual multiplier is 0"),
            (r#", "logits_scaling": -8"#, "logits scaling is -8"),
            (r#", "embedding_multiplier": "big""#, "embedding_multiplier"),
            (r#", "num_experts": 4"#, "num_experts"),
        ] {
            let error = config(options).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("config.json"), "{options}: {error}");
        }
        let llama = format!("{{{}, \"residual_multiplier\": 0.22}}", SIZES.replace("granite", "llama"));
        let error = ModelConfig::from_json(&llama, Path::new("config.json")).unwrap_err().to_string();
        assert!(error.contains("residual_multiplier"), "{error}");
    }
}
