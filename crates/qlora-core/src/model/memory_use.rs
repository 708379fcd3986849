//! The memory of a model: the bytes it holds, and what its blocks keep, make again and put together in training.

use std::sync::Arc;

use qlora_kernels::Workspace;
use qlora_kernels::weight::FrozenCompute;

use super::causal_lm::CausalLm;
use super::placement::BaseMemory;
use super::policy::Keep;
#[cfg(feature = "cuda")]
use super::weights::LinearWeight;
use crate::error::{Error, Result};

/// Bytes held by a model, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryUse {
    /// The blocks' frozen projections.
    pub projections: usize,
    /// Room for projections that are on the device only while their block runs.
    pub slots: usize,
    /// The embedding, and the head where it is not the embedding.
    pub embeddings: usize,
    /// Norm weights and biases.
    pub vectors: usize,
    /// The values of the adapter that is trained.
    pub adapter: usize,
    /// The loaded adapters: their values and the weights that they hold whole.
    pub loaded_adapters: usize,
}

impl MemoryUse {
    /// All parts.
    pub fn total(&self) -> usize {
        self.projections + self.slots + self.embeddings + self.vectors + self.adapter + self.loaded_adapters
    }
}

impl CausalLm {
    /// Bytes held, by part.
    pub fn memory(&self) -> MemoryUse {
        let mut memory = MemoryUse { embeddings: self.embedding.bytes(), ..MemoryUse::default() };
        if !Arc::ptr_eq(&self.embedding, &self.head) {
            memory.embeddings += self.head.bytes();
        }
        for block in self.stack.blocks() {
            memory.projections += block.projections().iter().map(|p| p.weight().bytes()).sum::<usize>();
            memory.vectors += block.vector_bytes();
        }
        memory.slots = self.base.map_or(0, |base| base.slots as usize);
        memory.vectors += self.stack.final_norm().bytes();
        memory.loaded_adapters = self.loaded_bytes();
        memory.adapter = self.adapter.as_ref().map_or(0, |adapter| adapter.layout().len() * size_of::<f32>());
        memory
    }

    /// Where the blocks' projections are, if they are not all on the device.
    pub fn base_memory(&self) -> Option<&BaseMemory> {
        self.base.as_ref()
    }

    /// Recompute every block in the backward instead of keeping its activations: less memory, more time, same bits.
    pub fn set_gradient_checkpointing(&mut self, on: bool) -> Result<()> {
        self.stack_mut()?.set_gradient_checkpointing(on);
        Ok(())
    }

    /// Chooses the arithmetic of the products with the frozen weights of all blocks, forward and backward: in the type of the
    /// activations, or in fp8: in training, in evaluation, and over prompts. Generation's steps of a few tokens read 4-bit weights as
    /// they are stored, and so are not changed by it; those of 64 sequences and more are, if the weights stay in fp8
    /// ([`Self::keep_fp8_weights`]).
    ///
    /// # Errors
    /// If it is fp8 and the model is not on a Hopper GPU, or its adapter is a DoRA, whose layers are multiplied one by one.
    pub fn set_frozen_compute(&self, compute: FrozenCompute) -> Result<()> {
        if compute == FrozenCompute::Fp8 {
            check_fp8(&self.workspace)?;
            if self.adapter().is_some_and(|adapter| adapter.config().use_dora) {
                return Err(Error::Invalid(FP8_WITH_DORA.into()));
            }
            if !self.has_fp8_layers() {
                let message = "frozen_compute = \"fp8\" has no layer to run in: LLM.int8's layers round their inputs in their own \
                               way, and sizes have to be multiples of 16. Leave it out";
                return Err(Error::Invalid(message.into()));
            }
        }
        self.stack.blocks().iter().for_each(|block| block.policy.set_frozen_compute(compute));
        Ok(())
    }

    /// For generation with [`FrozenCompute::Fp8`]: keeps the weights in 8 bits beside those that are loaded, a byte each, if that takes
    /// no more than half of the free memory. Says whether. Without, they are made again for every prompt.
    ///
    /// # Errors
    /// If the GPU fails.
    pub fn keep_fp8_weights(&self) -> Result<bool> {
        #[cfg(feature = "cuda")]
        if let (Some(gpu), FrozenCompute::Fp8) = (self.workspace.gpu(), self.frozen_compute()) {
            let elements = |weight: LinearWeight| weight.weight.rows() * weight.weight.cols();
            let fits = self.linear_weights().map(elements).sum::<usize>() as u64 <= gpu.pool().available()? / 2;
            self.set_weight_cache(fits);
            return Ok(fits);
        }
        Ok(false)
    }

    /// Whether there are layers that [`Self::set_frozen_compute`] can run in fp8.
    pub fn has_fp8_layers(&self) -> bool {
        let fits = |size: usize| size.is_multiple_of(16);
        self.stack.blocks().iter().flat_map(|block| block.projections()).any(|projection| {
            let weight = projection.weight();
            weight.int8_activations().is_none() && fits(weight.rows()) && fits(weight.cols())
        })
    }

    /// See [`Self::set_frozen_compute`].
    pub fn frozen_compute(&self) -> FrozenCompute {
        self.stack.blocks().first().map_or_else(FrozenCompute::default, |block| block.policy.frozen_compute())
    }

    /// Sets the activations that each block keeps for its backward (one choice a block).
    ///
    /// # Errors
    /// If there is not one choice a block, or a loss of this model is still alive.
    pub fn set_keep(&mut self, keep: Vec<Keep>) -> Result<()> {
        self.stack_mut()?.set_keep(keep)
    }

    /// The choice of each block; see [`Self::set_keep`].
    pub fn keep(&self) -> &[Keep] {
        self.stack.keep()
    }

    /// Dequantize one weight at a time (CUDA only): less memory, more time.
    pub fn set_split_weights(&self, on: bool) {
        self.stack.blocks().iter().for_each(|block| block.policy.set_split(on));
    }

    /// Let a recomputed block's forward and its backward share the weights that were dequantized for it (CUDA only).
    pub fn set_shared_weights(&self, on: bool) {
        self.stack.blocks().iter().for_each(|block| block.policy.set_weights_shared(on));
    }

    /// The rows of a batch that a block's MLP sees at a time, or all of them: less memory; the gradients of A and B are then summed in
    /// another order.
    pub fn set_mlp_rows(&self, rows: Option<usize>) {
        self.stack.blocks().iter().for_each(|block| block.policy.set_mlp_rows(rows));
    }

    /// Keep the dequantized weights of every block between uses (CUDA only): 2 bytes a parameter for the time of
    /// dequantizing; same bits.
    pub fn set_weight_cache(&self, on: bool) {
        self.stack.blocks().iter().for_each(|block| block.policy.set_weights_kept(on));
    }
}

pub(super) const FP8_WITH_DORA: &str = "frozen_compute = \"fp8\" is not there for DoRA: leave one of the two out";

/// Whether the memory's device multiplies frozen weights in fp8 ([`CausalLm::set_frozen_compute`]).
///
/// # Errors
/// If it does not: on the CPU, and on GPUs other than Hopper.
pub fn check_fp8(workspace: &Workspace) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = workspace.gpu() {
        return Ok(gpu.check_fp8()?);
    }
    let _ = workspace;
    Err(Error::Invalid(FrozenCompute::fp8_is_not_for("this run is on the CPU")))
}
