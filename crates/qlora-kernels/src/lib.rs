//! The operations of QLoRA training as plain functions, forward and backward.
//!
//! Nothing here knows of autograd. An operation reads [`View`]s and writes into [`ViewMut`]s that its caller gives it
//! (in place, accumulating, into a window of a wider buffer), so that models can be written without a copy that is not
//! needed. The layers above (`qlora-core`) turn the same functions into candle custom ops.
//!
//! | module | what it is |
//! |---|---|
//! | [`view`], [`matrix`] | windows into memory, and the memory itself with the pool it returns to |
//! | [`mapped`] | read-only memory-mapped files |
//! | [`dtype`] | element types |
//! | [`libraries`] | where NVIDIA's libraries lie |
//! | [`device_limits`] | what a GPU allows, and how to try another card's limits |
//! | `cuda` (with the feature `cuda`) | GPUs: streams, memory, kernels |
//! | [`sequence`] | how the tokens of a batch fall into sequences |
//! | [`tensor`] | the bridge to and from candle tensors, without copies |
//! | [`ggml`] | llama.cpp's quantized blocks |
//! | [`quant`] | bitsandbytes' 4-bit formats, bit for bit |
//! | [`weight`] | the one interface of a frozen weight: dequantize, multiply, bytes |
//! | [`weight::packed`], [`weight::travel`] | weights as pieces of bytes, and those that are on a device only while their block runs |
//! | [`ops`] | one operation a file |
//!
//! This is the one crate of the workspace that holds unsafe code.

#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device_limits;
#[cfg(any(test, feature = "cuda"))]
mod driver;
pub mod dtype;
pub mod error;
pub mod ggml;
pub mod libraries;
#[cfg(any(test, feature = "cuda"))]
mod lru;
pub mod mapped;
mod math;
pub mod matrix;
pub mod ops;
mod parallel;
mod platform;
pub mod quant;
pub mod sequence;
mod simd;
pub mod tensor;
#[cfg(test)]
mod testing;
mod transpose;
pub mod view;
pub mod weight;

pub use device_limits::DeviceLimits;
pub use dtype::Dtype;
pub use error::{Error, ErrorKind, Result};
pub use mapped::{FileBytes, MappedFile};
pub use matrix::{Matrix, Workspace};
pub use sequence::SequenceLayout;
pub use view::{View, ViewMut};
