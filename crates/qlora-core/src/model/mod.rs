//! The decoder: one implementation whose parts a [`ModelConfig`](crate::config::ModelConfig) chooses.

mod adapter_build;
mod adapter_ends;
mod adapters;
pub mod block;
pub mod cache;
pub mod causal_lm;
mod checkpoints;
mod compute_dtype;
#[cfg(feature = "cuda")]
mod decode;
#[cfg(feature = "cuda")]
mod decode_graph;
mod device;
mod load;
mod mlp;
pub mod plan;
pub mod policy;
pub mod projection;
pub mod stack;
mod train;
mod trained;
mod watch;

pub(crate) use adapter_build::embedding_gain;
pub use adapters::{AdapterChoice, AdapterChoices, Combination, LoadedAdapter};
pub use cache::KvCache;
pub use causal_lm::{CausalLm, MemoryUse, check_fp8};
pub use compute_dtype::{Capability, compute_dtype};
pub use device::{DeviceChoice, gpus};
pub use load::{LoadOptions, Quantization};
pub use plan::{BatchShape, MemoryPlan, Planner};
pub use train::TrainPass;
pub use trained::Adapter;
