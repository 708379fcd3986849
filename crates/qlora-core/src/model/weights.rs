//! The frozen weights of a model, by name.

use std::sync::Arc;

use qlora_kernels::Matrix;
use qlora_kernels::weight::FrozenWeight;

use super::causal_lm::CausalLm;
use super::stack::Stack;
use crate::spec::Role;

/// A linear layer's frozen weight and bias.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct LinearWeight<'a> {
    /// The module's name, such as `model.layers.0.self_attn.q_proj`.
    pub name: &'a str,
    /// `[outputs, inputs]`.
    pub weight: &'a Arc<dyn FrozenWeight>,
    /// One f32 row of as many columns as there are outputs, where the weight is.
    pub bias: Option<&'a Matrix>,
}

impl CausalLm {
    /// The embedding table `[vocab_size, hidden_size]`.
    pub fn embedding(&self) -> &Arc<dyn FrozenWeight> {
        &self.embedding
    }

    /// The head `[vocab_size, hidden_size]`; the embedding where they are tied.
    pub fn head(&self) -> &Arc<dyn FrozenWeight> {
        &self.head
    }

    /// The linear layers of the blocks, in the order of the model.
    pub fn linear_weights(&self) -> impl Iterator<Item = LinearWeight<'_>> {
        self.stack.blocks().iter().flat_map(|block| block.projections()).map(|projection| LinearWeight {
            name: projection.name(),
            weight: projection.weight(),
            bias: projection.bias(),
        })
    }

    /// The linear layer of this name, such as `model.layers.0.self_attn.q_proj`.
    pub fn linear_weight(&self, name: &str) -> Option<LinearWeight<'_>> {
        self.linear_weights().find(|linear| linear.name == name)
    }

    /// The weight of the norm of this name, such as `model.layers.0.input_layernorm` or `model.norm`: one f32 row.
    pub fn norm_weight(&self, name: &str) -> Option<&Matrix> {
        let spec = self.config.spec();
        if spec.final_norm.name == name {
            return Some(self.stack.final_norm());
        }
        self.stack.blocks().iter().zip(&spec.blocks).find_map(|(block, spec)| {
            let is = |role| spec.get(role).is_some_and(|module| module.name == name);
            let (query, key) = block.qk_norm.as_ref().map(|(query, key)| (query, key)).unzip();
            let norms = [
                (Role::InputNorm, Some(&block.input_norm)),
                (Role::PostAttentionNorm, Some(&block.post_attention_norm)),
                (Role::QueryNorm, query),
                (Role::KeyNorm, key),
            ];
            norms.into_iter().find_map(|(role, weight)| weight.filter(|_| is(role)))
        })
    }

    pub(crate) fn stack(&self) -> &Arc<Stack> {
        &self.stack
    }
}
