//! The configuration of a decoder: one description for all supported architectures.
//!
//! [`ModelConfig::from_json_file`] reads the `config.json` of transformers 4 and 5. A property that it cannot represent
//! is an error that names the option; sizes are checked, so that no file can ask for an absurd allocation.

mod json;
mod layers;
mod limits;
mod quantization;
mod rope;
mod write;

use qlora_kernels::ops::attention::AttentionConfig;
use qlora_kernels::ops::rope::RopeConfig;

pub use super::arch::Architecture;
pub(crate) use json::Fields;
pub(crate) use layers::LayerTypes;
pub(crate) use limits::MAX_LAYERS;
pub use quantization::StoredQuantization;
pub(crate) use write::decimal;

/// A decoder's parts and sizes, in the names of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The architecture named in the file.
    pub architecture: Architecture,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding with its scaling.
    pub rope: RopeConfig,
    /// The longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// For each block, how many positions a token sees (itself included), if limited.
    pub sliding_window: Vec<Option<usize>>,
    /// For each block, whether its queries and keys are left unrotated; blocks beyond the list are rotated.
    pub without_rope: Vec<bool>,
    /// The constant factors of the architecture.
    pub scalings: Scalings,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on o.
    pub o_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// RMSNorm on every head of q and k.
    pub qk_norm: bool,
    /// First token of a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
}

/// Factors at places of a decoder; 1, or none, in most architectures.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Scalings {
    /// The embedding's output is multiplied by it.
    pub embedding: f32,
    /// Attention's scores are multiplied by it; none: `1 / sqrt(head_dim)`.
    pub attention: Option<f32>,
    /// The output of each half of a block is multiplied by it before it is added to the half's input.
    pub residual: f32,
    /// Logits are divided by it.
    pub logits: f32,
    /// Rotated queries are multiplied by `1 + llama_4_scaling_beta * ln(1 + floor(position / original length))`; 0: they are not.
    /// No operation does it: `max_position_embeddings` is at most the original length, before which the factor is 1.
    pub llama_4_scaling_beta: f32,
}

impl Default for Scalings {
    fn default() -> Self {
        Self { embedding: 1.0, attention: None, residual: 1.0, logits: 1.0, llama_4_scaling_beta: 0.0 }
    }
}

impl ModelConfig {
    /// Name and shape of every tensor, in Hugging Face's names, the embedding first, then block by block. A tied head is
    /// not listed. Matrices are `[output features, input features]`.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        self.spec().tensors().map(|tensor| (tensor.name, tensor.shape)).collect()
    }

    /// The number of elements in all weights, the head counted only where it is not the embedding.
    pub fn parameter_count(&self) -> u128 {
        self.spec().parameter_count()
    }

    /// The attention of a layer.
    pub fn attention(&self, layer: usize) -> AttentionConfig {
        AttentionConfig {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            scale: self.scalings.attention.unwrap_or(1.0 / (self.head_dim as f32).sqrt()),
            window: self.sliding_window.get(layer).copied().flatten(),
        }
    }
}
