//! The decoder: one implementation whose parts a [`ModelConfig`](crate::config::ModelConfig) chooses.

mod adapter_build;
mod adapter_ends;
mod adapters;
mod assemble;
pub(crate) mod block;
pub mod cache;
mod causal_lm;
mod checkpoints;
mod compute_dtype;
pub mod context;
#[cfg(feature = "cuda")]
mod decode;
#[cfg(feature = "cuda")]
mod decode_graph;
mod device;
mod inference;
mod load;
mod memory_use;
mod mlp;
pub mod placement;
pub mod plan;
mod policy;
pub(crate) mod projection;
pub(crate) mod stack;
mod train;
mod trained;
mod trained_adapter;
mod watch;
mod weights;

pub(crate) use adapter_build::embedding_gain;
pub use adapters::{AdapterChoice, AdapterChoices, Combination, LoadedAdapter};
pub use assemble::ModelPart;
pub use cache::KvCache;
pub use causal_lm::CausalLm;
pub use compute_dtype::{Capability, compute_dtype};
pub use device::{DeviceChoice, gpus};
pub use load::{LoadOptions, Quantization};
pub use memory_use::{MemoryUse, check_fp8};
pub use placement::{BaseMemory, BasePlacement, PlacementKind};
pub use plan::{BatchShape, MemoryPlan, Planner};
pub use policy::Keep;
pub use train::TrainPass;
pub use trained::TrainedAdapter;
pub use weights::LinearWeight;
