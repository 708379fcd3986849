//! The model as data: the modules of a decoder, their names in files, their shapes, and the differences between blocks.
//!
//! [`ModelConfig::spec`](crate::config::ModelConfig::spec) makes a [`ModelSpec`] from sizes and options; what distinguishes one
//! architecture from another is in one file of [`arch`] each. Everything that names a module or counts its elements reads the
//! specification: the tensor list that checkpoints are checked against and merged models written from, GGUF's names in both
//! directions, LoRA's targets, the loader, the memory planner.
//!
//! | role | Hugging Face | GGUF | shape |
//! |---|---|---|---|
//! | embedding | `model.embed_tokens` | `token_embd` | `[vocab_size, hidden_size]` |
//! | linear layer | `model.layers.3.self_attn.q_proj` | `blk.3.attn_q` | `[output features, input features]` |
//! | norm | `model.layers.3.input_layernorm` | `blk.3.attn_norm` | `[width]` |
//! | head | `lm_head` | `output` | `[vocab_size, hidden_size]` |

pub mod arch;
pub mod config;
mod decoder;
pub(crate) mod gguf;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use qlora_kernels::ops::attention::AttentionConfig;

pub(crate) use self::decoder::{EMBEDDING, EMBEDDING_WEIGHT, HEAD, HEAD_WEIGHT, is_linear_in_a_block};

/// The part of a decoder that a module is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Role {
    /// The table that turns tokens into hidden states.
    Embedding,
    /// The norm before attention.
    InputNorm,
    /// Hidden state to queries.
    Query,
    /// Hidden state to keys.
    Key,
    /// Hidden state to values.
    Value,
    /// Attention's output back to the hidden state.
    Output,
    /// The norm on every head of the queries.
    QueryNorm,
    /// The norm on every head of the keys.
    KeyNorm,
    /// The norm before the MLP.
    PostAttentionNorm,
    /// Hidden state to the MLP's gate.
    Gate,
    /// Hidden state to the values that the gate lets through.
    Up,
    /// The MLP's inside back to the hidden state.
    Down,
    /// The norm after the last block.
    FinalNorm,
    /// Hidden state to logits.
    Head,
}

/// The kind of a module's computation, and so the shape of its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Embedding or head, `[vocab_size, hidden_size]`.
    Table,
    /// A linear layer of a block, `[output features, input features]`: it is quantized, and LoRA can adapt it.
    Linear,
    /// RMSNorm, `[width]`.
    Norm,
}

impl Role {
    /// The kind of computation of a module of this role.
    pub fn kind(self) -> Kind {
        match self {
            Self::Embedding | Self::Head => Kind::Table,
            Self::Query | Self::Key | Self::Value | Self::Output | Self::Gate | Self::Up | Self::Down => Kind::Linear,
            Self::InputNorm | Self::QueryNorm | Self::KeyNorm | Self::PostAttentionNorm | Self::FinalNorm => Kind::Norm,
        }
    }
}

/// A part of a decoder that has a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Module {
    /// The module's part of the decoder.
    pub role: Role,
    /// Hugging Face's name: `model.layers.3.self_attn.q_proj`.
    pub name: String,
    /// The name in GGUF files: `blk.3.attn_q`.
    pub gguf: String,
    /// The weight's shape, the outermost size first.
    pub shape: Vec<usize>,
    /// Whether it has a bias, of as many elements as the weight has rows.
    pub bias: bool,
    /// The heads whose rows GGUF files keep with their two halves interleaved, where they do.
    pub interleaved_heads: Option<usize>,
}

/// One decoder block.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct BlockSpec {
    /// Hugging Face's name: `model.layers.3`.
    pub name: String,
    /// Heads, their width, scale and window.
    pub attention: AttentionConfig,
    /// Whether queries and keys are rotated by their position.
    pub rotary: bool,
    /// The modules in the order in which files hold them.
    pub modules: Vec<Module>,
    /// Modules without a weight, which Hugging Face's classes name too: `model.layers.3.mlp.act_fn`.
    pub weightless: Vec<String>,
}

/// A decoder.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelSpec {
    /// The embedding.
    pub embedding: Module,
    /// The blocks, the first to run first.
    pub blocks: Vec<BlockSpec>,
    /// The norm after the last block.
    pub final_norm: Module,
    /// The head.
    pub head: Module,
    /// Whether the head is the embedding's table and has no tensor of its own.
    pub tied: bool,
    /// Modules without a weight outside the blocks.
    pub weightless: Vec<String>,
}

/// A tensor that a checkpoint of the model holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor<'a> {
    /// Hugging Face's name: `model.layers.3.self_attn.q_proj.weight`.
    pub name: String,
    /// The sizes of the dimensions, the outermost first.
    pub shape: Vec<usize>,
    /// Whether it is the module's weight; else it is its bias.
    pub is_weight: bool,
    /// The module that it belongs to.
    pub module: &'a Module,
}

/// Hugging Face's names by GGUF's.
pub(crate) struct GgufNames(HashMap<String, String>);

impl GgufNames {
    /// The name of a tensor, if it is one of this kind of model. One of a block beyond the model's last has a name too: it is
    /// what messages call it.
    pub(crate) fn hugging_face(&self, gguf: &str) -> Option<String> {
        if let Some(name) = self.0.get(gguf) {
            return Some(name.clone());
        }
        let (number, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
        // Only the spelling that blocks have, so that two names cannot become one.
        number.parse().ok().filter(|parsed: &u32| parsed.to_string() == number)?;
        let first = self.0.get(&format!("blk.0.{rest}"))?;
        Some(first.replacen(".0.", &format!(".{number}."), 1))
    }
}

impl Module {
    /// Hugging Face's name of the weight.
    pub fn weight_name(&self) -> String {
        format!("{}.weight", self.name)
    }

    /// Hugging Face's name of the bias, whether there is one or not.
    pub fn bias_name(&self) -> String {
        format!("{}.bias", self.name)
    }

    /// Rows of the weight: output features of a linear layer, the width of a norm.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    /// Columns of the weight: input features of a linear layer, 1 for a norm.
    pub fn cols(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// The weight.
    pub fn weight(&self) -> Tensor<'_> {
        Tensor { name: self.weight_name(), shape: self.shape.clone(), is_weight: true, module: self }
    }

    /// The bias, if there is one.
    pub fn bias(&self) -> Option<Tensor<'_>> {
        let shape = vec![self.rows()];
        self.bias.then(|| Tensor { name: self.bias_name(), shape, is_weight: false, module: self })
    }

    fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        std::iter::once(self.weight()).chain(self.bias())
    }

    /// Elements of weight and bias.
    fn elements(&self) -> u128 {
        let bias = if self.bias { self.rows() as u128 } else { 0 };
        self.shape.iter().map(|&size| size as u128).product::<u128>() + bias
    }
}

impl Tensor<'_> {
    /// The name in GGUF files: `blk.3.attn_q.weight`.
    pub fn gguf(&self) -> String {
        format!("{}.{}", self.module.gguf, if self.is_weight { "weight" } else { "bias" })
    }
}

impl BlockSpec {
    /// The module of this role, if the block has one.
    pub fn get(&self, role: Role) -> Option<&Module> {
        self.modules.iter().find(|module| module.role == role)
    }

    /// The linear layers in the order in which they run.
    pub fn linear(&self) -> impl Iterator<Item = &Module> {
        self.modules.iter().filter(|module| module.role.kind() == Kind::Linear)
    }
}

impl ModelSpec {
    /// The modules that have tensors of their own, in the order in which files hold them.
    pub fn modules(&self) -> impl Iterator<Item = &Module> {
        let head = (!self.tied).then_some(&self.head);
        let blocks = self.blocks.iter().flat_map(|block| &block.modules);
        std::iter::once(&self.embedding).chain(blocks).chain([&self.final_norm]).chain(head)
    }

    /// Every tensor of a checkpoint, in the order in which files hold them. A tied head is not among them.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.modules().flat_map(Module::tensors)
    }

    /// Every linear layer of the blocks, in the order in which they run. The head is not among them.
    pub fn linear(&self) -> impl Iterator<Item = &Module> {
        self.blocks.iter().flat_map(BlockSpec::linear)
    }

    /// The number of elements in all tensors.
    pub fn parameter_count(&self) -> u128 {
        self.modules().map(Module::elements).sum()
    }

    /// The names of all modules that are no linear layer of a block: tables, norms, those without a weight, and those that
    /// hold others.
    pub fn other_modules(&self) -> Vec<String> {
        let mut names = vec![self.head.name.clone()];
        let mut add = |name: &str| {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        };
        let outside = [&self.embedding, &self.final_norm];
        outside.iter().for_each(|module| parents(&module.name).for_each(&mut add));
        outside.iter().for_each(|module| add(&module.name));
        self.blocks.iter().flat_map(|block| parents(&block.name)).for_each(&mut add);
        self.weightless.iter().for_each(|name| add(name));
        for block in &self.blocks {
            let mut own: Vec<&str> = Vec::new();
            let within = |name: &&str| name.len() > block.name.len();
            let holders = block.modules.iter().flat_map(|module| parents(&module.name).filter(within));
            let norms = block.modules.iter().filter(|module| module.role.kind() != Kind::Linear);
            let weightless = block.weightless.iter().map(String::as_str);
            for name in holders.chain(weightless).chain(norms.map(|module| &*module.name)).chain([&*block.name]) {
                if !own.contains(&name) {
                    own.push(name);
                }
            }
            names.extend(own.into_iter().map(str::to_owned));
        }
        names
    }

    /// Hugging Face's names of the tensors in GGUF files of this model: of a linear layer's bias and of the head too, whether
    /// the model has them or not.
    pub(crate) fn gguf_names(&self) -> GgufNames {
        let mut names = HashMap::new();
        for module in self.modules().chain(self.tied.then_some(&self.head)) {
            names.insert(format!("{}.weight", module.gguf), module.weight_name());
            if module.role.kind() == Kind::Linear {
                names.insert(format!("{}.bias", module.gguf), module.bias_name());
            }
        }
        GgufNames(names)
    }

    /// The linear layers of this model in words, for messages.
    pub(crate) fn describe_linear(&self) -> String {
        let Some(first) = self.blocks.first() else { return "none".to_owned() };
        let own = |module: &Module| module.name[first.name.len() + 1..].to_owned();
        let names = first.linear().map(own).collect::<Vec<_>>().join(", ");
        match self.blocks.last() {
            Some(last) if last.name != first.name => {
                format!("{names}, each after {}. to {}.", first.name, last.name)
            }
            _ => format!("{names}, each after {}.", first.name),
        }
    }
}

/// The modules that hold the module of this name, the innermost last: `model`, `model.layers` and so on.
fn parents(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('.').map(move |(at, _)| &name[..at])
}
