//! The linear layers of a decoder's blocks: the modules that LoRA can adapt. The weight of a layer is
//! [out_features, in_features].

use crate::config::ModelConfig;
use crate::spec::Module;

/// A linear layer of a decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinearModule {
    /// Full name, without `.weight`: `model.layers.3.self_attn.q_proj`.
    pub name: String,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
}

/// Every linear layer of the blocks, in the order in which they run. The output head is not among them, as in PEFT's
/// `all-linear`.
pub fn linear_modules(model: &ModelConfig) -> Vec<LinearModule> {
    model.spec().linear().map(LinearModule::from).collect()
}

impl From<&Module> for LinearModule {
    fn from(module: &Module) -> Self {
        Self { name: module.name.clone(), out_features: module.rows(), in_features: module.cols() }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::Architecture;
    use qlora_kernels::ops::rope::RopeConfig;

    /// A Llama with sizes that are all different, so that a mix-up shows.
    pub(crate) fn tiny_model(layers: usize) -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 128,
            hidden_size: 64,
            intermediate_size: 96,
            num_hidden_layers: layers,
            num_attention_heads: 5,
            num_key_value_heads: 2,
            head_dim: 16,
            rms_norm_eps: 1e-5,
            rope: rope(),
            max_position_embeddings: 64,
            sliding_window: vec![None; layers],
            without_rope: Vec::new(),
            scalings: Default::default(),
            tie_word_embeddings: true,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
        }
    }

    fn rope() -> RopeConfig {
        RopeConfig { theta: 10_000.0, scaling: None }
    }

    #[test]
    fn names_and_shapes_follow_hugging_face() {
        let modules = linear_modules(&tiny_model(2));
        assert_eq!(modules.len(), 14);
        let of = |i: usize| (modules[i].name.as_str(), modules[i].out_features, modules[i].in_features);
        assert_eq!(of(0), ("model.layers.0.self_attn.q_proj", 80, 64));
        assert_eq!(of(1), ("model.layers.0.self_attn.k_proj", 32, 64));
        assert_eq!(of(2), ("model.layers.0.self_attn.v_proj", 32, 64));
        assert_eq!(of(3), ("model.layers.0.self_attn.o_proj", 64, 80));
        assert_eq!(of(4), ("model.layers.0.mlp.gate_proj", 96, 64));
        assert_eq!(of(5), ("model.layers.0.mlp.up_proj", 96, 64));
        assert_eq!(of(13), ("model.layers.1.mlp.down_proj", 64, 96));
    }
}
