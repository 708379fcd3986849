//! From a checkpoint to a model, one tensor at a time.
//!
//! On the CPU each weight is read, checked, quantized if asked, and dropped before the next one is read: besides the finished
//! model, host memory holds no more than one tensor in its stored precision. On a GPU several threads load at a time
//! ([`threads`]), and what lies plain in a file goes there piece by piece, quantized on the way: the whole model in 16 bits is
//! never anywhere, and no whole tensor of it either.

mod tensor;
mod threads;

use std::sync::Arc;

use qlora_kernels::quant::{IntConfig, QuantConfig};
use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::{Matrix, Workspace};

use self::tensor::{Context, Job, Loaded, Place};
use self::threads::Parts;
use super::block::{Block, MemoryPolicy};
use super::causal_lm::CausalLm;
use super::projection::Projection;
use super::stack::Stack;
use crate::config::{CheckpointQuantization, ModelConfig, Scalings};
use crate::error::{Error, Result};
use crate::source::{WeightSource, again};
use crate::spec::{BlockSpec, HEAD_WEIGHT, Kind, ModelSpec, Module, Role, Tensor};

/// The storage of the frozen projections in memory. A checkpoint that is stored quantized is always held as it is
/// stored, its plain layers too: with one, [`Quantization::None`] or what it is stored in are the only values that are
/// not refused.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Quantization {
    /// As stored: LoRA without quantization.
    #[default]
    None,
    /// 4-bit, as bitsandbytes does it.
    Bits4(QuantConfig),
    /// LLM.int8, as bitsandbytes does it: weights and activations in 8 bits, outlier activations (from 6.0 on) exact.
    Int8,
    /// Uniform 4- or 8-bit integers.
    Int(IntConfig),
}

/// Options of loading a model.
#[derive(Default)]
pub struct LoadOptions<'a> {
    /// The storage of the projections in memory. Embeddings, norms and the head stay as stored.
    pub quantization: Quantization,
    /// Leave the embedding's table in host memory: only the rows of a batch go to the GPU. A head that is tied to it is
    /// on the GPU in any case.
    pub offload_embedding: bool,
    /// Called after each tensor with the bytes of the files that were read, and their total.
    pub progress: Option<&'a mut dyn FnMut(u64, u64)>,
}

impl CausalLm {
    /// Reads a model.
    ///
    /// # Errors
    /// If a tensor is missing, superfluous or has the wrong shape, or holds a value that is not finite; the message
    /// names it.
    pub fn load(source: &dyn WeightSource, options: LoadOptions<'_>) -> Result<Self> {
        Self::load_on(source, options, Workspace::new(&candle_core::Device::Cpu)?)
    }

    /// [`Self::load`] onto the device of `workspace`, computing in its type. On a GPU, weights are quantized there.
    ///
    /// # Errors
    /// As there; also if the device's memory does not hold the model.
    pub fn load_on(source: &dyn WeightSource, options: LoadOptions<'_>, workspace: Workspace) -> Result<Self> {
        let LoadOptions { mut quantization, offload_embedding, progress } = options;
        if let Some(stored) = source.quantization() {
            check_quantization(quantization, stored, source)?;
            quantization = Quantization::None;
        }
        let target = match quantization {
            Quantization::Bits4(config) => Some(config.quant_type.to_string()),
            Quantization::Int(config) => Some(format!("{}-bit integers", config.bits.bits())),
            Quantization::None | Quantization::Int8 => None,
        };
        if let Some(remark) = target.and_then(|target| again(source, &target)) {
            tracing::warn!("{remark}");
        }
        let config = source.config();
        let spec = config.spec();
        let jobs = jobs(&spec, offload_embedding);
        check_all_used(source, &jobs)?;
        let mut progress = progress;
        let report = |done, total| progress.iter_mut().for_each(|progress| progress(done, total));
        let parts = threads::load(&Context { source, quantization, workspace: &workspace }, jobs, report)?;
        Assembly { config, spec: &spec, eps: residual_eps(config)?, parts }.model(offload_embedding, workspace)
    }
}

/// The inputs for building the model once all tensors are on their device.
struct Assembly<'a> {
    config: &'a ModelConfig,
    spec: &'a ModelSpec,
    eps: f32,
    parts: Parts,
}

/// The tensors of a model in the order in which they are read.
fn jobs(spec: &ModelSpec, offload_embedding: bool) -> Vec<Job> {
    let place = |tensor: &Tensor| match (tensor.is_weight, tensor.module.role) {
        (true, Role::Embedding) if offload_embedding => Place::HostTable,
        (true, role) if role.kind() == Kind::Table => Place::Table,
        (true, role) if role.kind() == Kind::Linear => Place::Projection,
        _ => Place::Vector,
    };
    let job = |tensor: Tensor| Job { place: place(&tensor), name: tensor.name, shape: tensor.shape };
    let mut jobs: Vec<Job> = spec.tensors().map(job).collect();
    // A head that is tied to a table in host memory has its own on the device.
    if spec.tied && offload_embedding {
        let (name, shape) = (spec.embedding.weight_name(), spec.embedding.shape.clone());
        jobs.push(Job { name, shape, place: Place::Table });
    }
    jobs
}

impl Assembly<'_> {
    fn model(mut self, offload_embedding: bool, workspace: Workspace) -> Result<CausalLm> {
        let (config, spec) = (self.config, self.spec);
        let place = if offload_embedding { Place::HostTable } else { Place::Table };
        let embedding = self.weight(&spec.embedding, place)?;
        let blocks = spec.blocks.iter().map(|block| self.block(block)).collect::<Result<Vec<_>>>()?;
        let final_norm = self.vector(&spec.final_norm.weight_name())?;
        let head = match (spec.tied, offload_embedding) {
            (false, _) => self.weight(&spec.head, Place::Table)?,
            (true, false) => embedding.clone(),
            (true, true) => self.weight(&spec.embedding, Place::Table)?,
        };
        let (limit, Scalings { embedding: scale, residual, logits, .. }) =
            (config.max_position_embeddings, config.scalings);
        let stack = Stack::new(blocks, final_norm, self.eps, config.rope.clone(), limit)?;
        let stack = stack.with_scales(scale / residual, 1.0 / logits);
        Ok(CausalLm::new(config.clone(), embedding, head, stack, workspace))
    }

    fn block(&mut self, spec: &BlockSpec) -> Result<Block> {
        let qk_norm = match (spec.get(Role::QueryNorm), spec.get(Role::KeyNorm)) {
            (Some(query), Some(key)) => Some((self.vector(&query.weight_name())?, self.vector(&key.weight_name())?)),
            _ => None,
        };
        Ok(Block {
            input_norm: self.norm(spec, Role::InputNorm)?,
            post_attention_norm: self.norm(spec, Role::PostAttentionNorm)?,
            qk_norm,
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
        self.vector(&part(block, role)?.weight_name())
    }

    fn projection(&mut self, block: &BlockSpec, role: Role) -> Result<Projection> {
        let module = part(block, role)?;
        let weight = self.weight(module, Place::Projection)?;
        let bias = module.bias.then(|| self.vector(&module.bias_name())).transpose()?;
        Projection::new(&module.name, weight, bias)
    }

    fn weight(&mut self, module: &Module, place: Place) -> Result<Arc<dyn FrozenWeight>> {
        let name = module.weight_name();
        match self.parts.remove(&(name.clone(), place)) {
            Some(Loaded::Weight(weight)) => Ok(weight),
            _ => Err(Error::tensor(name, "is not among the tensors of the configuration")),
        }
    }

    fn vector(&mut self, name: &str) -> Result<Matrix> {
        match self.parts.remove(&(name.to_owned(), Place::Vector)) {
            Some(Loaded::Vector(vector)) => Ok(vector),
            _ => Err(Error::tensor(name, "is not among the tensors of the configuration")),
        }
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
fn part(block: &BlockSpec, role: Role) -> Result<&Module> {
    block.get(role).ok_or_else(|| Error::Unsupported(format!("{}: a block without {role:?}", block.name)))
}

/// Refuses tensors that no part of the model reads: the model is then not the one that its configuration describes.
fn check_all_used(source: &dyn WeightSource, jobs: &[Job]) -> Result<()> {
    let tied = source.config().tie_word_embeddings;
    let harmless = |name: &str| name.ends_with("rotary_emb.inv_freq") || (tied && name == HEAD_WEIGHT);
    let used: std::collections::HashSet<_> = jobs.iter().map(|job| &job.name).collect();
    let unused: Vec<_> = source.names().into_iter().filter(|name| !used.contains(name) && !harmless(name)).collect();
    if unused.is_empty() {
        return Ok(());
    }
    let shown = unused.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
    let more = if unused.len() > 5 { format!(" and {} more", unused.len() - 5) } else { String::new() };
    Err(Error::Unsupported(format!("the checkpoint has tensors that this architecture does not use: {shown}{more}")))
}

/// Refuses to quantize weights that are quantized already, which would lose precision without saying so.
fn check_quantization(asked: Quantization, stored: &CheckpointQuantization, source: &dyn WeightSource) -> Result<()> {
    let asked = match (asked, stored) {
        (Quantization::None, _)
        | (Quantization::Bits4(_), CheckpointQuantization::Bnb4bit)
        | (Quantization::Int8, CheckpointQuantization::Bnb8bit { .. }) => return Ok(()),
        (Quantization::Bits4(config), _) => config.quant_type.to_string(),
        (Quantization::Int8, _) => "LLM.int8".to_owned(),
        (Quantization::Int(config), _) => format!("{}-bit integers", config.bits.bits()),
    };
    Err(Error::Invalid(format!(
        "{}: the weights are stored in {stored} and cannot be quantized again to {asked} without loss: load them without \
         quantization (they stay as they are stored; `load_in_4bit = false`), or take the original bf16, f16 or f32 weights",
        source.path().display()
    )))
}
