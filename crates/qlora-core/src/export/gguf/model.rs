//! A [`ModelConfig`] as GGUF metadata.

use qlora_kernels::ops::rope::RopeScaling;

use super::GgufOptions;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::formats::gguf::metadata::Metadata;
use crate::spec::gguf::Value;

/// The tensor that holds the divisors of Llama 3's rotary frequencies.
pub(super) const ROPE_TABLE: &str = "rope_freqs.weight";

/// Writes the general keys and those of the architecture.
pub(super) fn describe(config: &ModelConfig, options: &GgufOptions<'_>, metadata: &mut Metadata) -> Result<()> {
    let unsupported =
        |what: &str| Err(Error::Unsupported(format!("{what} in a GGUF file: llama.cpp has no place for it")));
    let definition = config.architecture.definition();
    let prefix = definition.gguf_name();
    let own = match definition.write_gguf(config) {
        Ok(own) => own,
        Err(what) => return unsupported(&what),
    };

    metadata.string("general.architecture", prefix);
    metadata.string("general.type", "model");
    if let Some(name) = options.name {
        metadata.string("general.name", name);
    }
    metadata.u32("general.file_type", options.kind.file_type());
    metadata.u32("general.quantization_version", 2);
    let key = |key: &str| format!("{prefix}.{key}");
    let mut size = |name: &str, value: usize| metadata.u32(&key(name), value as u32);
    size("block_count", config.num_hidden_layers);
    size("context_length", config.max_position_embeddings);
    size("embedding_length", config.hidden_size);
    size("feed_forward_length", config.intermediate_size);
    size("attention.head_count", config.num_attention_heads);
    size("attention.head_count_kv", config.num_key_value_heads);
    size("attention.key_length", config.head_dim);
    size("attention.value_length", config.head_dim);
    size("rope.dimension_count", config.head_dim);
    size("vocab_size", config.vocab_size);
    for value in own {
        match value {
            Value::U32(name, value) => metadata.u32(&key(name), value),
            Value::F32(name, value) => metadata.f32(&key(name), value),
        }
    }
    metadata.f32(&key("attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
    metadata.f32(&key("rope.freq_base"), config.rope.theta as f32);
    match &config.rope.scaling {
        // Llama 3's is a tensor.
        None | Some(RopeScaling::Llama3 { .. }) => {}
        Some(RopeScaling::Linear { factor }) => {
            metadata.string(&key("rope.scaling.type"), "linear");
            metadata.f32(&key("rope.scaling.factor"), *factor as f32);
        }
        Some(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        }) => {
            if !truncate {
                return unsupported("YaRN without truncation");
            }
            metadata.string(&key("rope.scaling.type"), "yarn");
            metadata.f32(&key("rope.scaling.factor"), *factor as f32);
            metadata.u32(&key("rope.scaling.original_context_length"), *original_max_position_embeddings as u32);
            metadata.f32(&key("rope.scaling.yarn_beta_fast"), *beta_fast as f32);
            metadata.f32(&key("rope.scaling.yarn_beta_slow"), *beta_slow as f32);
            if let Some(attention_factor) = attention_factor {
                // llama.cpp multiplies YaRN's own factor by this one.
                let own = if *factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
                metadata.f32(&key("rope.scaling.attn_factor"), (attention_factor / own) as f32);
            }
        }
        Some(_) => return unsupported("this rope scaling"),
    }
    Ok(())
}

/// The divisors of the rotary frequencies under Llama 3's scaling, `[head_dim / 2]`.
pub(super) fn rope_table(config: &ModelConfig) -> Option<Vec<f32>> {
    let divisors = config.rope.llama3_divisors(config.head_dim)?;
    Some(divisors.into_iter().map(|divisor| divisor as f32).collect())
}
