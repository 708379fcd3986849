//! The launchers of `kernels/*.cu`: plain C functions that enqueue on a stream and return a `cudaError_t`.
//!
//! Element types are passed as in `common.cuh`: 0 f32, 1 bf16, 2 f16. Sizes and strides count elements.

mod attention;
mod elementwise;
mod generation;
mod linear;
mod optimizer;
mod structs;

use std::ffi::c_void;

pub(super) use attention::*;
pub(super) use elementwise::*;
pub(super) use generation::*;
pub(super) use linear::*;
pub(super) use optimizer::*;
pub(super) use structs::*;

/// `CUstream` and `cudaStream_t` are the same pointer.
pub(super) type Stream = *mut c_void;
/// A `cudaGraphExec_t`.
pub(super) type GraphExec = *mut c_void;
type Ptr = *const c_void;
type PtrMut = *mut c_void;
