//! A causal language model: embedding, decoder stack, head, at most one adapter that is trained, and any number of loaded ones.
//!
//! The methods of [`CausalLm`] are in files by use: its weights (`load`, `assemble`, `weights`), its memory (`memory_use`, `plan`), the
//! adapter that is trained (`trained_adapter`) and the loaded ones (`adapters`), training (`train`), and inference (`inference`).

use std::sync::Arc;

use qlora_kernels::Workspace;
use qlora_kernels::weight::FrozenWeight;

use super::adapters::AdapterSet;
use super::context::SequenceExchange;
use super::placement::BaseMemory;
use super::stack::Stack;
use super::trained::TrainedAdapter;
use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// A model with frozen weights and, once [`Self::add_adapter`] or [`Self::set_adapter`] was called, a trainable adapter.
#[derive(Debug)]
pub struct CausalLm {
    pub(super) config: ModelConfig,
    pub(super) embedding: Arc<dyn FrozenWeight>,
    pub(super) head: Arc<dyn FrozenWeight>,
    pub(super) stack: Arc<Stack>,
    pub(super) adapter: Option<TrainedAdapter>,
    pub(super) adapters: AdapterSet,
    pub(super) enabled: bool,
    /// The ranks that have the rest of every micro-batch, if there are any.
    pub(super) exchange: Option<Arc<dyn SequenceExchange>>,
    pub(super) workspace: Workspace,
    /// Of a base that is not whole on the device.
    pub(super) base: Option<BaseMemory>,
    #[cfg(feature = "cuda")]
    pub(super) steps: super::decode_graph::DecodeSteps,
}

impl CausalLm {
    pub(super) fn new(
        config: ModelConfig,
        embedding: Arc<dyn FrozenWeight>,
        head: Arc<dyn FrozenWeight>,
        stack: Stack,
        workspace: Workspace,
    ) -> Self {
        let stack = Arc::new(stack);
        Self {
            config,
            embedding,
            head,
            stack,
            adapter: None,
            adapters: AdapterSet::default(),
            enabled: true,
            exchange: None,
            workspace,
            base: None,
            #[cfg(feature = "cuda")]
            steps: super::decode_graph::DecodeSteps::default(),
        }
    }

    /// The model's description.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The adapter that is trained, if there is one.
    pub fn adapter(&self) -> Option<&TrainedAdapter> {
        self.adapter.as_ref()
    }

    /// The device and allocator of this model's activations.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// Drops recorded steps of generation: they hold addresses and scales that are about to change.
    pub(super) fn forget_steps(&mut self) {
        #[cfg(feature = "cuda")]
        self.steps.forget();
    }

    pub(super) fn stack_mut(&mut self) -> Result<&mut Stack> {
        self.forget_steps();
        Arc::get_mut(&mut self.stack).ok_or_else(|| {
            Error::Invalid("a loss of this model is still alive: drop it before changing the model".into())
        })
    }
}
