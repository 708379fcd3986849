//! GGUF metadata to a [`ModelConfig`].

use std::path::Path;

use qlora_kernels::ops::rope::{RopeConfig, RopeScaling};

use super::divisors;
use super::header::{Header, Parse, TensorInfo};
use super::split::Part;
use super::types::GgmlType;
use crate::config::{Architecture, MAX_LAYERS, ModelConfig, Scalings};
use crate::error::{Error, Result};
use crate::spec::gguf::{Metadata, Problem};

/// Metadata (after the architecture's prefix) that changes the computation in a way the decoder does not know, unless the
/// architecture reads it. Allowed where it is 0 or false.
const UNSUPPORTED: [&str; 17] = [
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.sliding_window_pattern",
    "attention.temperature_length",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "expert_used_count",
    "final_logit_softcapping",
    "interleave_moe_layer_step",
    "leading_dense_block_count",
    "logit_scale",
    "nextn_predict_layers",
    "residual_scale",
    "rope.scaling.yarn_ext_factor",
    "use_parallel_residual",
];

/// Tensors that hold rotary frequencies instead of weights.
pub(super) fn is_rope_table(name: &str) -> bool {
    name == "rope_freqs.weight" || name.ends_with(".attn_rot_embd.weight")
}

pub(super) fn model_config(header: &Header, file: &[u8], rest: &[Part], path: &Path) -> Result<ModelConfig> {
    let format = |message: String| Error::format(path, message);
    let prefix = header.str("general.architecture", file).map_err(format)?;
    let prefix = prefix.ok_or_else(|| format("metadata general.architecture is missing".to_owned()))?;
    let Some(architecture) = Architecture::of_gguf(prefix) else {
        let mut names: Vec<&str> = Architecture::ALL.iter().map(|known| known.gguf_name()).collect();
        names.dedup();
        let message = format!("architecture \"{prefix}\" in {} (supported: {})", path.display(), names.join(", "));
        return Err(Error::Unsupported(message));
    };
    let meta = Meta { header, rest, prefix };
    let own_keys = architecture.definition().own_gguf_keys();
    for key in UNSUPPORTED.into_iter().filter(|key| !own_keys.contains(key)) {
        if meta.is_set(key) {
            return Err(Error::Unsupported(format!("metadata {prefix}.{key}, in {}", path.display())));
        }
    }
    let config = meta.build(architecture, file).map_err(|problem| match problem {
        Problem::Format(message) => format(message),
        Problem::Unsupported(what) => Error::Unsupported(format!("{what}, in {}", path.display())),
    })?;
    config.check_sizes(path)?;
    Ok(config)
}

struct Meta<'a> {
    header: &'a Header,
    rest: &'a [Part],
    prefix: &'a str,
}

impl Metadata for Meta<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn f64(&self, key: &str) -> Parse<Option<f64>> {
        self.header.f64(&self.key(key))
    }
}

impl Meta<'_> {
    /// Whether a key is there and neither 0 nor false; a value of another type counts.
    fn is_set(&self, key: &str) -> bool {
        let key = self.key(key);
        let zero = self.header.f64(&key) == Ok(Some(0.0)) || self.header.bool(&key) == Ok(Some(false));
        self.header.has(&key) && !zero
    }

    fn usize(&self, key: &str) -> Parse<Option<usize>> {
        let key = self.key(key);
        match self.header.u64(&key)? {
            None => Ok(None),
            Some(value) => {
                usize::try_from(value).map(Some).map_err(|_| format!("metadata {key} is {value}, too large"))
            }
        }
    }

    fn required(&self, key: &str) -> Parse<usize> {
        self.usize(key)?.ok_or_else(|| format!("metadata {} is missing", self.key(key)))
    }

    fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors.iter().find(|tensor| tensor.name == name)
    }

    fn build(&self, architecture: Architecture, file: &[u8]) -> std::result::Result<ModelConfig, Problem> {
        let layers = self.required("block_count")?;
        if layers > MAX_LAYERS {
            return Err(Problem::Format(format!(
                "metadata {} is {layers}, more than {MAX_LAYERS}",
                self.key("block_count")
            )));
        }
        let hidden_size = self.required("embedding_length")?;
        let heads = self.required("attention.head_count")?;
        let head_dim = match self.usize("attention.key_length")? {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(Problem::Format(format!(
                    "embedding_length {hidden_size} is not a multiple of head_count {heads}"
                )));
            }
        };
        for (key, what) in [("attention.value_length", "value heads"), ("rope.dimension_count", "rotary embeddings")] {
            match self.usize(key)? {
                Some(width) if width != head_dim => {
                    return Err(Problem::Unsupported(format!(
                        "{what} of another width than the heads ({width}, {head_dim})"
                    )));
                }
                _ => {}
            }
        }
        let Some(embedding) = self.tensor("token_embd.weight") else {
            return Err(Problem::Format("tensor token_embd.weight is missing".to_owned()));
        };
        let vocab_size = embedding.shape[0];
        let has = |name: &str| self.tensor(name).is_some();
        let max_position_embeddings = self.required("context_length")?;
        let window = self.usize("attention.sliding_window")?.filter(|window| *window > 0);
        let token = |key: &str| -> Parse<Option<u32>> {
            let id = self.header.u64(&format!("tokenizer.ggml.{key}"))?;
            Ok(id.and_then(|id| u32::try_from(id).ok()).filter(|id| (*id as usize) < vocab_size))
        };
        let mut eos_token_ids: Vec<u32> = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            eos_token_ids.extend(token(key)?.filter(|id| !eos_token_ids.contains(id)));
        }
        let eps = self.f64("attention.layer_norm_rms_epsilon")?;
        let mut config = ModelConfig {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size: self.required("feed_forward_length")?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: self.usize("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            rms_norm_eps: eps
                .ok_or_else(|| format!("metadata {} is missing", self.key("attention.layer_norm_rms_epsilon")))?
                as f32,
            rope: self.rope(file, head_dim, max_position_embeddings)?,
            max_position_embeddings,
            sliding_window: vec![window; layers],
            without_rope: Vec::new(),
            scalings: Scalings::default(),
            tie_word_embeddings: !has("output.weight"),
            qkv_bias: has("blk.0.attn_q.bias"),
            o_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_gate.bias"),
            qk_norm: false,
            bos_token_id: token("bos_token_id")?,
            eos_token_ids,
        };
        architecture.definition().read_gguf(self, &mut config)?;
        Ok(config)
    }

    fn rope(&self, file: &[u8], head_dim: usize, max_positions: usize) -> std::result::Result<RopeConfig, Problem> {
        let number = |key: &str| self.f64(key);
        let theta = number("rope.freq_base")?.unwrap_or(10_000.0);
        if !(theta.is_finite() && theta > 1.0) {
            return Err(Problem::Format(format!("metadata {} is {theta}", self.key("rope.freq_base"))));
        }
        let factor = match number("rope.scaling.factor")?.filter(|factor| *factor != 0.0) {
            Some(factor) => factor,
            None => number("rope.scale_linear")?.filter(|factor| *factor != 0.0).unwrap_or(1.0),
        };
        if !(factor.is_finite() && factor > 0.0) {
            return Err(Problem::Format(format!("metadata {} is {factor}", self.key("rope.scaling.factor"))));
        }
        let original = match self.usize("rope.scaling.original_context_length")? {
            Some(length) if length > 0 => length,
            _ => max_positions,
        };
        // Files before there was a type only have the linear factor.
        let kind = self.header.str(&self.key("rope.scaling.type"), file)?.unwrap_or("linear");
        let mut scaling = match kind {
            "none" => None,
            "linear" if factor == 1.0 => None,
            "linear" => Some(RopeScaling::Linear { factor }),
            "yarn" => {
                let beta =
                    |key: &str, default| Ok::<_, String>(number(key)?.filter(|beta| *beta > 0.0).unwrap_or(default));
                let magnitude = match number("rope.scaling.yarn_attn_factor")? {
                    Some(magnitude) => Some(magnitude),
                    None => number("rope.scaling.attn_factor")?,
                };
                Some(RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    beta_fast: beta("rope.scaling.yarn_beta_fast", 32.0)?,
                    beta_slow: beta("rope.scaling.yarn_beta_slow", 1.0)?,
                    // llama.cpp multiplies YaRN's own factor by this one.
                    attention_factor: magnitude
                        .filter(|magnitude| magnitude.is_finite() && *magnitude > 0.0 && *magnitude != 1.0)
                        .map(|magnitude| magnitude * if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 }),
                    truncate: true,
                })
            }
            other => {
                return Err(Problem::Unsupported(format!("rope scaling \"{other}\" (supported: none, linear, yarn)")));
            }
        };
        if let Some(table) = self.tensor("rope_freqs.weight") {
            let file = if table.part == 0 { file } else { &self.rest[table.part - 1].file };
            let llama3 = llama3(table, file, theta, head_dim)?;
            if scaling.is_some() && llama3.is_some() {
                return Err(Problem::Unsupported("tensor rope_freqs.weight together with rope scaling".to_owned()));
            }
            scaling = llama3.or(scaling);
        }
        Ok(RopeConfig { theta, scaling })
    }
}

/// The Llama 3 scaling whose frequency divisors a file stores as `rope_freqs.weight` `[head_dim / 2]`.
fn llama3(
    table: &TensorInfo,
    file: &[u8],
    theta: f64,
    head_dim: usize,
) -> std::result::Result<Option<RopeScaling>, Problem> {
    if table.kind != GgmlType::F32 || table.shape != [head_dim / 2] {
        return Err(Problem::Format(format!(
            "tensor rope_freqs.weight has type {} and shape {:?}",
            table.kind, table.shape
        )));
    }
    let stored: Vec<f64> =
        file[table.bytes.clone()].as_chunks().0.iter().map(|chunk| f64::from(f32::from_le_bytes(*chunk))).collect();
    if stored.iter().all(|divisor| *divisor == 1.0) {
        return Ok(None);
    }
    let scaling = divisors::llama3(&stored, theta, head_dim);
    let message = "rope_freqs.weight with other divisors than Llama 3's scaling gives";
    scaling.map(Some).ok_or_else(|| Problem::Unsupported(message.to_owned()))
}
