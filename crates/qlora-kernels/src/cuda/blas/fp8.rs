//! Products of matrices in 8 bits (e4m3) with one scale a row of each factor: `d = (sa a)(sb b)^T + beta c`.
//!
//! Hopper's fp8 tensor cores want both factors along the reduction, so there is one kind of product (`a [m, k]`, `b [n, k]`),
//! and a backward needs its weight transposed. The scales are cuBLASLt's "outer vectors" (CUDA 12.9 and later): f32, one for
//! each row of `a` and of `b`. Sums are promoted to f32 as they grow (no fast accumulation): on an H200 that costs 6 to 12% of
//! a product and keeps its error at that of the roundings of its factors.

use std::ffi::{c_int, c_void};

use candle_core::cuda_backend::cudarc::cublaslt::result::{self as lt, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;

use super::algorithms::{Description, Element, Key};
use super::{Blas, Kind, alignment};
use crate::cuda::fp8::Fp8View;
use crate::cuda::view::{CudaView, CudaViewMut};
use crate::error::{Error, Result};

/// An address to choose algorithms with: the library reads nothing there, but asks for one.
pub(super) const ANY_SCALES: u64 = 256;

/// From cublasLt.h: cudarc's names follow the toolkit of the build, and toolkits before 12.9 have none for these.
const A_SCALE_MODE: c_int = 31;
const B_SCALE_MODE: c_int = 32;
const OUTER_VECTOR: i32 = 3;

/// The first version of cuBLASLt with a scale a row: CUDA 12.9's.
pub(in crate::cuda) const LEAST_VERSION: usize = 120_900;

unsafe extern "C" {
    #[link_name = "cublasLtGetVersion"]
    fn version() -> usize;
    #[link_name = "cublasLtMatmulDescSetAttribute"]
    fn set_attribute(desc: *mut c_void, attribute: c_int, value: *const c_void, bytes: usize) -> c_int;
}

/// The version of the library that the program runs with, such as 130000.
pub(in crate::cuda) fn library_version() -> usize {
    // SAFETY: it has no preconditions.
    unsafe { version() }
}

impl Description {
    /// Gives the factors (b, a) a scale for each of their rows.
    pub(super) fn set_scales(&self, scales: [u64; 2]) -> std::result::Result<(), CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let mode = OUTER_VECTOR;
        for attribute in [A_SCALE_MODE, B_SCALE_MODE] {
            // SAFETY: the attribute is 32-bit, the descriptor alive; a library that does not know it says so.
            let status = unsafe { set_attribute(self.0.cast(), attribute, (&raw const mode).cast(), 4) };
            if status != 0 {
                return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED));
            }
        }
        let pointers =
            [Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER];
        for (attribute, scale) in pointers.into_iter().zip(scales) {
            // SAFETY: the attribute is a pointer, the descriptor alive.
            unsafe { lt::set_matmul_desc_attribute(self.0, attribute, (&raw const scale).cast(), 8)? };
        }
        Ok(())
    }
}

impl Blas {
    /// `d = a b^T + beta c`, where `c` is `d` itself unless an addend is given.
    pub(in crate::cuda) fn matmul_fp8(
        &self,
        op: &'static str,
        a: Fp8View,
        b: Fp8View,
        addend: Option<CudaView>,
        d: CudaViewMut,
        beta: f32,
    ) -> Result<()> {
        let (m, n, k) = (a.rows, b.rows, a.cols);
        Error::check_shape(op, "the second factor", &[b.cols], &[k])?;
        Error::check_shape(op, "the product", &[d.rows(), d.cols()], &[m, n])?;
        if let Some(c) = addend {
            Error::check_shape(op, "the addend", &[c.rows(), c.cols()], &[m, n])?;
            if c.dtype() != d.dtype() {
                return Err(Error::invalid(op, "the addend has another type than the product"));
            }
        }
        if m == 0 || n == 0 {
            return Ok(());
        }
        let c = addend.unwrap_or_else(|| d.alias());
        let stride = |view: CudaView| if m <= 1 { n } else { view.stride() };
        let key = Key {
            kind: Kind::Nt,
            m,
            n,
            k,
            strides: [k, k, stride(c), stride(d.as_view())],
            alignments: [alignment(b.values), alignment(a.values), alignment(c.ptr()), alignment(d.ptr())],
            input: Element::E4m3,
            output: d.dtype(),
        };
        self.launch(op, d.gpu(), &key, [b.values, a.values, c.ptr(), d.ptr()], Some([b.scales, a.scales]), [1.0, beta])
    }
}
