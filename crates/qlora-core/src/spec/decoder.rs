//! The block that the architectures share: norm, attention, norm, gated MLP, each half added to its input.

use super::arch::Definition;
use super::config::ModelConfig;
use super::{BlockSpec, Kind, ModelSpec, Module, Role};

/// The embedding's name.
pub(crate) const EMBEDDING: &str = "model.embed_tokens";
/// The embedding's tensor.
pub(crate) const EMBEDDING_WEIGHT: &str = "model.embed_tokens.weight";
/// The head's name.
pub(crate) const HEAD: &str = "lm_head";
/// The head's tensor.
pub(crate) const HEAD_WEIGHT: &str = "lm_head.weight";
const FINAL_NORM: &str = "model.norm";

/// The names of a block's module in an architecture's files: after `model.layers.N.` and after `blk.N.`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name {
    pub(crate) role: Role,
    pub(crate) hugging_face: &'static str,
    pub(crate) gguf: &'static str,
}

const fn name(role: Role, hugging_face: &'static str, gguf: &'static str) -> Name {
    Name { role, hugging_face, gguf }
}

/// The names of Llama's block, which most architectures have taken over, in the order in which files hold the modules.
pub(crate) const LLAMA_NAMES: &[Name] = &[
    name(Role::InputNorm, "input_layernorm", "attn_norm"),
    name(Role::Query, "self_attn.q_proj", "attn_q"),
    name(Role::Key, "self_attn.k_proj", "attn_k"),
    name(Role::Value, "self_attn.v_proj", "attn_v"),
    name(Role::Output, "self_attn.o_proj", "attn_output"),
    name(Role::Gate, "mlp.gate_proj", "ffn_gate"),
    name(Role::Up, "mlp.up_proj", "ffn_up"),
    name(Role::Down, "mlp.down_proj", "ffn_down"),
    name(Role::QueryNorm, "self_attn.q_norm", "attn_q_norm"),
    name(Role::KeyNorm, "self_attn.k_norm", "attn_k_norm"),
    name(Role::PostAttentionNorm, "post_attention_layernorm", "ffn_norm"),
];

/// Whether a module's name ends as that of a linear layer in a block of any supported architecture.
pub(crate) fn is_linear_in_a_block(module: &str) -> bool {
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let ends = last(module);
    super::arch::Architecture::ALL
        .iter()
        .flat_map(|architecture| architecture.definition().names())
        .any(|name| name.role.kind() == Kind::Linear && last(name.hugging_face) == ends)
}

/// The specification of a model whose architecture has this block.
pub(crate) fn spec(config: &ModelConfig, definition: &dyn Definition) -> ModelSpec {
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let outside = |role, name: &str, gguf: &str, shape| Module {
        role,
        name: name.to_owned(),
        gguf: gguf.to_owned(),
        shape,
        bias: false,
        interleaved_heads: None,
    };
    ModelSpec {
        embedding: outside(Role::Embedding, EMBEDDING, "token_embd", vec![vocab, hidden]),
        blocks: (0..config.num_hidden_layers).map(|layer| block(config, definition, layer)).collect(),
        final_norm: outside(Role::FinalNorm, FINAL_NORM, "output_norm", vec![hidden]),
        head: outside(Role::Head, HEAD, "output", vec![vocab, hidden]),
        tied: config.tie_word_embeddings,
        weightless: vec!["model.rotary_emb".to_owned()],
    }
}

fn block(config: &ModelConfig, definition: &dyn Definition, layer: usize) -> BlockSpec {
    let block = format!("model.layers.{layer}");
    let module = |name: &Name| {
        let (shape, bias) = shape(config, name.role)?;
        let heads = match name.role {
            Role::Query => Some(config.num_attention_heads),
            Role::Key => Some(config.num_key_value_heads),
            _ => None,
        };
        Some(Module {
            role: name.role,
            name: format!("{block}.{}", name.hugging_face),
            gguf: format!("blk.{layer}.{}", name.gguf),
            shape,
            bias,
            interleaved_heads: heads.filter(|_| definition.interleaves_in_gguf()),
        })
    };
    BlockSpec {
        attention: config.attention(layer),
        rotary: !config.without_rope.get(layer).copied().unwrap_or(false),
        modules: definition.names().iter().filter_map(module).collect(),
        weightless: vec![format!("{block}.mlp.act_fn")],
        name: block,
    }
}

/// Shape and bias of a block's module, if a block of this configuration has it.
fn shape(config: &ModelConfig, role: Role) -> Option<(Vec<usize>, bool)> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    Some(match role {
        Role::Query => (vec![q, hidden], config.qkv_bias),
        Role::Key | Role::Value => (vec![kv, hidden], config.qkv_bias),
        Role::Output => (vec![hidden, q], config.o_bias),
        Role::Gate | Role::Up => (vec![inner, hidden], config.mlp_bias),
        Role::Down => (vec![hidden, inner], config.mlp_bias),
        Role::InputNorm | Role::PostAttentionNorm => (vec![hidden], false),
        Role::QueryNorm | Role::KeyNorm if config.qk_norm => (vec![config.head_dim], false),
        Role::QueryNorm | Role::KeyNorm | Role::Embedding | Role::FinalNorm | Role::Head => return None,
    })
}
