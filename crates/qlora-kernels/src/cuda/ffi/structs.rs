//! Structs that launchers take by value, laid out as in C.

use std::ffi::c_int;

use super::{Ptr, PtrMut, Stream};

/// One adapted projection of a fused weight; `QloraMember` in `lora.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::cuda) struct Member {
    pub(in crate::cuda) a: i64,
    pub(in crate::cuda) b: i64,
    pub(in crate::cuda) row0: i64,
    pub(in crate::cuda) rows: i64,
    pub(in crate::cuda) rank: i32,
    pub(in crate::cuda) r0: i32,
    pub(in crate::cuda) scale: f32,
    pub(in crate::cuda) pad: i32,
}

/// `QloraMembers` in `lora.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::cuda) struct Members {
    pub(in crate::cuda) m: [Member; 3],
    pub(in crate::cuda) count: i32,
    pub(in crate::cuda) pad: i32,
}

/// One weight of a group over a few tokens; `QloraFewMember` in `few_tokens.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct FewMember {
    pub(in crate::cuda) codes: *const u8,
    pub(in crate::cuda) absmax: *const f32,
    pub(in crate::cuda) absmax_codes: *const u8,
    pub(in crate::cuda) nested_map: *const f32,
    pub(in crate::cuda) nested_absmax: *const f32,
    pub(in crate::cuda) bias: Ptr,
    pub(in crate::cuda) lora_b: *const f32,
    pub(in crate::cuda) rows: i64,
    pub(in crate::cuda) nested_offset: f32,
    pub(in crate::cuda) scale: f32,
    pub(in crate::cuda) rank: i32,
    pub(in crate::cuda) r0: i32,
}

impl Default for FewMember {
    fn default() -> Self {
        let (bytes, floats) = (std::ptr::null(), std::ptr::null());
        Self {
            codes: bytes,
            absmax: floats,
            absmax_codes: bytes,
            nested_map: floats,
            nested_absmax: floats,
            bias: std::ptr::null(),
            lora_b: floats,
            rows: 0,
            nested_offset: 0.0,
            scale: 0.0,
            rank: 0,
            r0: 0,
        }
    }
}

/// A 4-bit weight; `QloraBits4` in `fp8_4bit.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct Bits4 {
    pub(in crate::cuda) codes: *const u8,
    pub(in crate::cuda) absmax: *const f32,
    pub(in crate::cuda) absmax_codes: *const u8,
    pub(in crate::cuda) nested_map: *const f32,
    pub(in crate::cuda) nested_absmax: *const f32,
    pub(in crate::cuda) blocksize: i64,
    pub(in crate::cuda) nested_blocksize: i64,
    pub(in crate::cuda) rows: i64,
    pub(in crate::cuda) cols: i64,
    pub(in crate::cuda) nested_offset: f32,
    pub(in crate::cuda) quant_type: c_int,
}

/// `QloraFewWeights` in `few_tokens.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::cuda) struct FewWeights {
    pub(in crate::cuda) m: [FewMember; 3],
    pub(in crate::cuda) k: i64,
    pub(in crate::cuda) blocksize: i64,
    pub(in crate::cuda) nested_blocksize: i64,
    pub(in crate::cuda) count: i32,
    pub(in crate::cuda) quant_type: i32,
}

/// `QloraShrink` in `lora_shrink_few.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct Shrink {
    pub(in crate::cuda) a: [*const f32; 3],
    pub(in crate::cuda) rank: [i32; 3],
    pub(in crate::cuda) r0: [i32; 3],
    pub(in crate::cuda) count: i32,
    pub(in crate::cuda) pad: i32,
}

impl Default for Shrink {
    fn default() -> Self {
        Self { a: [std::ptr::null(); 3], rank: [0; 3], r0: [0; 3], count: 0, pad: 0 }
    }
}

/// An adapter's change of one layer; `QloraRowsChange` in `adapter_rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct RowsChange {
    pub(in crate::cuda) a: *const f32,
    pub(in crate::cuda) b: *const f32,
    pub(in crate::cuda) gain: *const f32,
    pub(in crate::cuda) bias: *const f32,
    pub(in crate::cuda) scale: f32,
    pub(in crate::cuda) rank: i32,
    pub(in crate::cuda) r0: i32,
    pub(in crate::cuda) pad: i32,
}

impl Default for RowsChange {
    fn default() -> Self {
        let null = std::ptr::null();
        Self { a: null, b: null, gain: null, bias: null, scale: 0.0, rank: 0, r0: 0, pad: 0 }
    }
}

/// `QloraRowsSpan` in `adapter_rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::cuda) struct RowsSpan {
    pub(in crate::cuda) m: [RowsChange; 3],
    pub(in crate::cuda) row0: i64,
    pub(in crate::cuda) rows: i64,
    pub(in crate::cuda) columns: i32,
    pub(in crate::cuda) pad: i32,
}

/// `QloraRowsSpans` in `adapter_rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::cuda) struct RowsSpans {
    pub(in crate::cuda) s: [RowsSpan; 16],
    pub(in crate::cuda) count: i32,
    pub(in crate::cuda) layers: i32,
    pub(in crate::cuda) cols: [i64; 3],
}

/// The device limits by which launchers choose tiles; `QloraLimits` in `device.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct DeviceLimits {
    pub(in crate::cuda) shared_per_block: i32,
    pub(in crate::cuda) shared_per_multiprocessor: i32,
    pub(in crate::cuda) multiprocessors: i32,
    pub(in crate::cuda) bf16: i32,
    pub(in crate::cuda) wgmma: i32,
}

impl From<crate::DeviceLimits> for DeviceLimits {
    fn from(limits: crate::DeviceLimits) -> Self {
        let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
        Self {
            shared_per_block: number(limits.shared_per_block),
            shared_per_multiprocessor: number(limits.shared_per_multiprocessor),
            multiprocessors: number(limits.multiprocessors),
            bf16: i32::from(limits.bf16),
            wgmma: i32::from(limits.wgmma),
        }
    }
}

/// [`qlora_nf4_gemv`] and [`qlora_nf4_small_gemm`], which take the same arguments.
pub(in crate::cuda) type FewProduct = unsafe extern "C" fn(
    dtype: c_int,
    weights: FewWeights,
    x: Ptr,
    ldx: i64,
    s: *const f32,
    lds: i64,
    residual: Ptr,
    ldr: i64,
    y: PtrMut,
    ldy: i64,
    tokens: i64,
    swiglu: c_int,
    early: c_int,
    workspace: PtrMut,
    limits: *const DeviceLimits,
    stream: Stream,
) -> c_int;
