//! Merging an adapter into its base, and writing the result as a model folder.
//!
//! ```text
//! W' = round(W + s B A)          s = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
//! ```
//!
//! The sum is made in f32 and rounded once, to the precision that the weight is stored in. W is either the original
//! weight, or what is left of it after quantization ([`MergeInto`]): an adapter that was trained over a 4-bit base has
//! learned with that base's errors. Peers disagree on which is better; [`gap::measure`] says it for a text.
//!
//! - [`MergeChoice`] says which weights an adapter belongs into, from what its folder says about its training
//!   ([`TrainedOver`](crate::adapter::TrainedOver)).
//! - [`MergedSource`] is a [`WeightSource`](crate::source::WeightSource): it can be loaded, written as a folder
//!   ([`write_folder`]) or as GGUF ([`crate::export::gguf`]), one tensor at a time.
//! - [`WeightUpdate`] is what an adapter does to a base's weights; [`LoraUpdate`] is LoRA's, [`PeftUpdate`] that of any
//!   of PEFT's kinds.
//! - [`Companions`] are the files that belong to a model beside its weights.
//! - [`gap`] measures how far the merged model is from base and adapter.
//!
//! Never requantized: a 4-bit base is dequantized, merged and written in 16 or 32 bits.

mod choice;
mod folder;
pub mod gap;
mod peft;
mod source;
#[cfg(test)]
mod tests;
mod update;

pub use crate::companions::Companions;
pub use choice::MergeChoice;
pub(crate) use folder::require_space;
pub use folder::{FolderOptions, WrittenFolder, write_folder};
pub use peft::PeftUpdate;
pub use source::{MergeFigures, MergeInto, MergedSource, Rounding};
pub use update::{LoraUpdate, WeightUpdate};
