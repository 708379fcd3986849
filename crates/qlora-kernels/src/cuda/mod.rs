//! GPUs: the device, its memory, and the CUDA side of every operation.
//!
//! | module | what it is |
//! |---|---|
//! | [`Gpu`], [`device`] | one GPU: stream, errors, architecture checks |
//! | [`Pool`] | its memory pool: use, peak, limit |
//! | [`ProfileEntry`] | what [`Gpu::profile`] tells of where the time goes |
//! | [`Offloaded`] | matrices in pinned host memory |
//! | [`Buffer`], [`PinnedBuffer`] | owned memory |
//! | [`CudaView`], [`CudaViewMut`] | windows into it: the CUDA representation of [`crate::View`] |
//! | [`AttentionLibrary`] | whether cuDNN's attention may be used |
//! | [`DeviceFacts`], [`DeviceRates`] | what the driver says of it, and how fast it is |
//! | [`Counters`] | how much of what is slow to make was made |
//! | [`DeviceRing`], [`BaseShare`] | weights that come from host memory, or from another GPU, while their block runs |
//! | [`decode`] | the keys and values of a step of generation |
//! | [`nccl`] | sums between the GPUs of several processes |
//! | [`CudaWeight`] | a frozen weight on the GPU |
//!
//! The operations in [`crate::ops`] check shapes and then come here if their arguments are on a GPU. Each function
//! here is one or a few launches; the kernels are in `kernels/*.cu`. Everything is asynchronous on the GPU's one stream:
//! an error of a kernel shows at the next call that waits, which is when a loss or a norm is read.

pub(crate) mod adapter_rows;
pub(crate) mod adapter_tokens;
pub mod attention;
mod blas;
mod buffer;
mod cache;
mod counters;
pub mod cudnn;
mod cudnn_attention;
pub mod decode;
mod event;
pub(crate) mod few_tokens;
mod ffi;
mod fp8;
mod gpu;
mod graph;
mod int8_activations;
mod int_weight;
mod libraries;
pub(crate) mod linear;
pub(crate) mod linear_group;
pub(crate) mod loss;
pub mod nccl;
mod offload;
pub(crate) mod ops;
pub(crate) mod optimizer;
mod pool;
mod profile;
mod rates;
mod share;
mod step_memory;
mod timing;
mod travel;
mod upload;
mod view;
mod weight;

pub(crate) use blas::Kind;
pub use buffer::{Buffer, PinnedBuffer};
pub(crate) use cache::OnDevice;
pub use counters::Counters;
pub(crate) use cudnn_attention::AttentionBatch;
pub use cudnn_attention::{AttentionCalls, AttentionLibrary};
pub use gpu::{Gpu, device, device_count};
pub use graph::Graph;
pub use offload::{Arriving, Leaving, Offloaded};
pub use pool::Pool;
pub use profile::ProfileEntry;
pub use rates::{DeviceFacts, DeviceRates};
pub use share::{BaseShare, OtherShare, ShareHandle};
pub use step_memory::{MemoryReuse, StepMemory};
pub use travel::{DeviceRing, HostPiece, Traveller};
pub use upload::{Source, Uploader};
pub use view::{CudaView, CudaViewMut};
pub use weight::CudaWeight;
