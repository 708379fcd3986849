//! From a checkpoint to a model, one tensor at a time.
//!
//! On the CPU each weight is read, checked, quantized if asked, and dropped before the next one is read: besides the finished
//! model, host memory holds no more than one tensor in its stored precision. On a GPU several threads load at a time
//! ([`threads`]), and what lies plain in a file goes there piece by piece, quantized on the way: the whole model in 16 bits is
//! never anywhere, and no whole tensor of it either.

mod placer;
mod tensor;
mod threads;

use qlora_kernels::Workspace;
use qlora_kernels::quant::{IntConfig, QuantConfig};

use self::placer::Placer;
use self::tensor::{Context, Job, Place};
use super::assemble::{Use, assemble};
use super::causal_lm::CausalLm;
use super::placement::BasePlacement;
use crate::config::StoredQuantization;
use crate::error::{Error, Result};
use crate::source::{WeightSource, again, ignorable};
use crate::spec::{HEAD_WEIGHT, Kind, ModelSpec, Role, Tensor};

/// The storage of the frozen projections in memory. A checkpoint that is stored quantized is always held as it is
/// stored, its plain layers too: with one, [`Quantization::None`] or what it is stored in are the only values that are
/// not refused.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
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
    /// Where the projections are.
    pub placement: BasePlacement<'a>,
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
        let LoadOptions { mut quantization, offload_embedding, placement, progress } = options;
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
        let mut jobs = jobs(&spec, offload_embedding);
        check_all_used(source, &jobs)?;
        let placer = Placer::new(&placement, source, quantization, &workspace)?;
        jobs.retain(|job| placer.as_ref().is_none_or(|placer| placer.loads(job)));
        let mut progress = progress;
        let report = |done, total| progress.iter_mut().for_each(|progress| progress(done, total));
        let context = Context { source, quantization, workspace: &workspace, placer: placer.as_ref() };
        let mut parts = threads::load(&context, jobs, report)?;
        let base = placer.map(|placer| placer.finish(placement, &mut parts)).transpose()?;
        let mut model = assemble(config, workspace, offload_embedding, &mut |tensor, of| {
            let place = place(tensor, offload_embedding && of == Use::Own);
            let part = parts.remove(&(tensor.name.clone(), place));
            part.ok_or_else(|| Error::tensor(&tensor.name, "is not among the tensors of the configuration"))
        })?;
        model.base = base;
        Ok(model)
    }
}

/// The tensors of a model in the order in which they are read.
fn jobs(spec: &ModelSpec, offload_embedding: bool) -> Vec<Job> {
    let job = |tensor: Tensor| Job { place: place(&tensor, offload_embedding), name: tensor.name, shape: tensor.shape };
    let mut jobs: Vec<Job> = spec.tensors().map(job).collect();
    // A head that is tied to a table in host memory has its own on the device.
    if spec.tied && offload_embedding {
        let (name, shape) = (spec.embedding.weight_name(), spec.embedding.shape.clone());
        jobs.push(Job { name, shape, place: Place::Table });
    }
    jobs
}

fn place(tensor: &Tensor, offload_embedding: bool) -> Place {
    match (tensor.is_weight, tensor.module.role) {
        (true, Role::Embedding) if offload_embedding => Place::HostTable,
        (true, role) if role.kind() == Kind::Table => Place::Table,
        (true, role) if role.kind() == Kind::Linear => Place::Projection,
        _ => Place::Vector,
    }
}

/// Refuses tensors that no part of the model reads: the model is then not the one that its configuration describes.
fn check_all_used(source: &dyn WeightSource, jobs: &[Job]) -> Result<()> {
    let tied = source.config().tie_word_embeddings;
    let harmless = |name: &str| ignorable(name) || (tied && name == HEAD_WEIGHT);
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
fn check_quantization(asked: Quantization, stored: &StoredQuantization, source: &dyn WeightSource) -> Result<()> {
    let asked = match (asked, stored) {
        (Quantization::None, _)
        | (Quantization::Bits4(_), StoredQuantization::Bnb4bit)
        | (Quantization::Int8, StoredQuantization::Bnb8bit { .. }) => return Ok(()),
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
