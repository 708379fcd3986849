//! LoRA: the target layers, the layout of the adapter's values, and their initialization.
//!
//! For a frozen weight W [out, in] an adapter is A [r, in] and B [out, r]; the layer computes
//! `y = x W^T + scaling * drop(x) A^T B^T`, with `scaling = lora_alpha / r`, or `lora_alpha / sqrt(r)` for
//! rank-stabilized LoRA. Source: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA); names and selection rules are those
//! of PEFT 0.21.
//!
//! - [`LoraConfig`]: the options, in PEFT's names; [`LoraConfig::resolve`] turns them into the layers of one model.
//! - [`TargetModules`], [`ModuleFilter`], [`ModulePattern`]: how a list or a regular expression selects layers.
//! - [`ByModule`], [`Layers`]: ranks, alphas and blocks that differ from module to module.
//! - [`TokenIndices`]: the tokens whose rows of the embedding are trained.
//! - [`AdapterLayout`]: all A and B of a model (and the magnitudes of DoRA), back to back in one flat f32 buffer.
//! - [`init`]: the start values; [`fingerprint`]: a hash of a buffer, to compare two runs.

mod by_module;
mod config;
mod init;
mod layout;
mod modules;
mod pattern;
mod tables;
mod targets;

pub use by_module::{ByModule, Layers};
pub(crate) use config::MAX_RANK;
pub use config::{Bias, InitLoraWeights, LoraConfig};
pub use init::{fingerprint, init};
pub use layout::{AdapterLayout, AdapterPair, Entry, Which};
pub use modules::{LinearModule, linear_modules};
pub use pattern::ModulePattern;
pub use tables::TokenIndices;
pub use targets::{ModuleFilter, TargetModules};

#[cfg(test)]
pub(crate) use modules::tests::tiny_model;
