//! The linear layers of a decoder: names as in Hugging Face's modules, sizes from the configuration.
//!
//! For every block i: `model.layers.{i}.self_attn.{q,k,v,o}_proj` and `model.layers.{i}.mlp.{gate,up,down}_proj`. The
//! weight of a layer is [out_features, in_features].

use crate::config::ModelConfig;

/// One of the seven linear layers of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// Hidden state to queries.
    Q,
    /// Hidden state to keys.
    K,
    /// Hidden state to values.
    V,
    /// Attention's output back to the hidden state.
    O,
    /// Hidden state to the MLP's gate.
    Gate,
    /// Hidden state to what the gate lets through.
    Up,
    /// The MLP's inside back to the hidden state.
    Down,
}

impl Projection {
    /// All of them, in the order in which a block uses them.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// The last part of the layer's name: `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The name of the part of the block that holds the layer: `self_attn` or `mlp`.
    pub fn parent(self) -> &'static str {
        match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        }
    }

    /// The layer's full name in block `layer`: `model.layers.3.self_attn.q_proj`.
    pub fn module_name(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.{}", self.parent(), self.name())
    }

    /// `(out_features, in_features)` of the layer: the shape of its weight.
    pub fn shape(self, model: &ModelConfig) -> (usize, usize) {
        let hidden = model.hidden_size;
        let queries = model.num_attention_heads * model.head_dim;
        let keys = model.num_key_value_heads * model.head_dim;
        match self {
            Self::Q => (queries, hidden),
            Self::K | Self::V => (keys, hidden),
            Self::O => (hidden, queries),
            Self::Gate | Self::Up => (model.intermediate_size, hidden),
            Self::Down => (hidden, model.intermediate_size),
        }
    }
}

/// A linear layer of a decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    let mut modules = Vec::with_capacity(model.num_hidden_layers * Projection::ALL.len());
    for layer in 0..model.num_hidden_layers {
        for projection in Projection::ALL {
            let (out_features, in_features) = projection.shape(model);
            modules.push(LinearModule { name: projection.module_name(layer), out_features, in_features });
        }
    }
    modules
}

/// The names of all other modules that a Hugging Face model of this architecture has. A target that selects one of them
/// is refused, as PEFT would either adapt it (the embedding, the head) or fail on it (everything else).
pub(super) fn other_modules(model: &ModelConfig) -> Vec<String> {
    let mut names: Vec<String> =
        ["lm_head", "model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"]
            .map(String::from)
            .into();
    let mut parts = vec!["self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm"];
    if model.qk_norm {
        parts.extend(["self_attn.q_norm", "self_attn.k_norm"]);
    }
    for layer in 0..model.num_hidden_layers {
        let block = format!("model.layers.{layer}");
        names.extend(parts.iter().map(|part| format!("{block}.{part}")));
        names.push(block);
    }
    names
}

/// What the linear layers of this model are called, for messages.
pub(super) fn describe(model: &ModelConfig) -> String {
    let names = Projection::ALL.map(|projection| format!("{}.{}", projection.parent(), projection.name())).join(", ");
    match model.num_hidden_layers {
        0 => "none".to_owned(),
        1 => format!("{names}, each after model.layers.0."),
        layers => format!("{names}, each after model.layers.0. to model.layers.{}.", layers - 1),
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
