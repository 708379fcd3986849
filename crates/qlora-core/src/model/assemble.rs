//! A model put together of tensors that are on its device.

use std::sync::Arc;

use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::{Matrix, Workspace};

use super::block::Block;
use super::causal_lm::CausalLm;
use super::policy::MemoryPolicy;
use super::projection::Projection;
use super::stack::Stack;
use crate::config::{ModelConfig, Scalings};
use crate::error::{Error, Result};
use crate::spec::{BlockSpec, Module, Role, Tensor};

/// A tensor of a model, on the model's device.
#[derive(Debug)]
#[non_exhaustive]
pub enum ModelPart {
    /// A norm's weight or a bias: one f32 row.
    Vector(Matrix),
    /// The weight of a linear layer, the embedding's or the head's table: `[rows, cols]`.
    Weight(Arc<dyn FrozenWeight>),
}

/// The use of a tensor, where one tensor has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// As the tensor's module says.
    Own,
    /// The embedding's table as the head of a model whose embedding is kept in host memory.
    TiedHead,
}

impl CausalLm {
    /// Puts a model together of tensors that `part` makes, asked for one after the other in the order of the model:
    /// [`Self::load`] reads them from a checkpoint instead. A tied head is not asked for.
    ///
    /// # Errors
    /// If a part is of the wrong kind or shape, the configuration is not supported, and what `part` returns.
    pub fn from_parts(
        config: &ModelConfig,
        workspace: Workspace,
        part: &mut dyn FnMut(&Tensor<'_>) -> Result<ModelPart>,
    ) -> Result<Self> {
        assemble(config, workspace, false, &mut |tensor, _| part(tensor))
    }
}

/// [`CausalLm::from_parts`]; where the embedding is in host memory, a tied head is asked for apart.
pub(super) fn assemble(
    config: &ModelConfig,
    workspace: Workspace,
    embedding_on_host: bool,
    part: &mut dyn FnMut(&Tensor<'_>, Use) -> Result<ModelPart>,
) -> Result<CausalLm> {
    let spec = config.spec();
    let mut assembly = Assembly { part, eps: residual_eps(config)? };
    let embedding = assembly.weight(&spec.embedding, Use::Own)?;
    let blocks = spec.blocks.iter().map(|block| assembly.block(block)).collect::<Result<Vec<_>>>()?;
    let final_norm = assembly.vector(&spec.final_norm.weight())?;
    let head = match (spec.tied, embedding_on_host) {
        (false, _) => assembly.weight(&spec.head, Use::Own)?,
        (true, false) => embedding.clone(),
        (true, true) => assembly.weight(&spec.embedding, Use::TiedHead)?,
    };
    let (limit, Scalings { embedding: scale, residual, logits, .. }) =
        (config.max_position_embeddings, config.scalings);
    let stack = Stack::new(blocks, final_norm, assembly.eps, config.rope.clone(), limit)?;
    let stack = stack.with_scales(scale / residual, 1.0 / logits);
    Ok(CausalLm::new(config.clone(), embedding, head, stack, workspace))
}

struct Assembly<'a> {
    part: &'a mut dyn FnMut(&Tensor<'_>, Use) -> Result<ModelPart>,
    eps: f32,
}

impl Assembly<'_> {
    fn block(&mut self, spec: &BlockSpec) -> Result<Block> {
        Ok(Block {
            input_norm: self.norm(spec, Role::InputNorm)?,
            post_attention_norm: self.norm(spec, Role::PostAttentionNorm)?,
            qk_norm: match (spec.get(Role::QueryNorm), spec.get(Role::KeyNorm)) {
                (Some(query), Some(key)) => Some((self.vector(&query.weight())?, self.vector(&key.weight())?)),
                _ => None,
            },
            eps: self.eps,
            attention: spec.attention,
            rotary: spec.rotary,
            q: self.projection(spec, Role::Query)?,
            k: self.projection(spec, Role::Key)?,
            v: self.projection(spec, Role::Value)?,
            o: self.projection(spec, Role::Output)?,
            gate: self.projection(spec, Role::Gate)?,
            up: self.projection(spec, Role::Up)?,
            down: self.projection(spec, Role::Down)?,
            policy: MemoryPolicy::default(),
        })
    }

    fn norm(&mut self, block: &BlockSpec, role: Role) -> Result<Matrix> {
        self.vector(&module(block, role)?.weight())
    }

    fn projection(&mut self, block: &BlockSpec, role: Role) -> Result<Projection> {
        let module = module(block, role)?;
        let weight = self.weight(module, Use::Own)?;
        let bias = module.bias().map(|bias| self.vector(&bias)).transpose()?;
        Projection::new(&module.name, weight, bias)
    }

    fn weight(&mut self, module: &Module, of: Use) -> Result<Arc<dyn FrozenWeight>> {
        let tensor = module.weight();
        let ModelPart::Weight(weight) = (self.part)(&tensor, of)? else {
            return Err(Error::tensor(tensor.name, "is a vector, expected a matrix"));
        };
        check_shape(&tensor, &[weight.rows(), weight.cols()])?;
        Ok(weight)
    }

    fn vector(&mut self, tensor: &Tensor<'_>) -> Result<Matrix> {
        let ModelPart::Vector(vector) = (self.part)(tensor, Use::Own)? else {
            return Err(Error::tensor(&tensor.name, "is a matrix, expected a vector"));
        };
        check_shape(tensor, &[vector.rows() * vector.cols()])?;
        Ok(vector)
    }
}

fn check_shape(tensor: &Tensor<'_>, shape: &[usize]) -> Result<()> {
    match tensor.shape == shape {
        true => Ok(()),
        false => Err(Error::tensor(&tensor.name, format!("has shape {shape:?}, expected {:?}", tensor.shape))),
    }
}

/// The epsilon of the norms for a residual stream that is kept divided by the residual multiplier `m`.
///
/// Such a stream needs no multiplier in the blocks: with `z = x / m`, `x + m f(norm(x; eps))` is `z + f(norm(z; eps / m^2))`, as
/// a norm keeps its value when its input and the root of eps have the same factor. So the residual sums stay where they are
/// fastest, in the projections, and adapters' gradients are what they are with `x`.
fn residual_eps(config: &ModelConfig) -> Result<f32> {
    let multiplier = config.scalings.residual;
    if multiplier != 1.0 && config.qk_norm {
        // Their input is no residual stream: they would need an eps of their own.
        return Err(Error::Unsupported("a residual multiplier together with norms on q and k".to_owned()));
    }
    Ok(config.rms_norm_eps / (multiplier * multiplier))
}

/// The module of a block that this decoder cannot run without.
fn module(block: &BlockSpec, role: Role) -> Result<&Module> {
    block.get(role).ok_or_else(|| Error::Unsupported(format!("{}: a block without {role:?}", block.name)))
}
