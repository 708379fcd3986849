//! Matrix products through cuBLASLt, with f32 accumulation.
//!
//! cuBLASLt is column-major. A row-major `C[m, n] = A B` is the column-major `C^T[n, m] = B^T A^T`, so its first operand
//! is our `b`, its second our `a`, and nothing is copied or transposed. Unlike `cublasGemmEx` it reads the addend from
//! another matrix than it writes (`D = A B + beta C`): a residual connection costs no copy.
//!
//! The algorithm that the library's heuristics name first is kept for every combination of sizes, strides, types and
//! alignments. With a fixed stream all of them give the same bits in every run.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self as lt, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use candle_core::cuda_backend::cudarc::driver::CudaStream;

use super::counters::count;
use super::gpu::Gpu;
use super::view::{CudaView, CudaViewMut};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// The most scratch memory an algorithm may ask for: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// A cuBLASLt handle and the plans made so far.
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Key, Arc<Plan>>>,
}

// SAFETY: cuBLASLt handles may be used from any thread; the plans are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// Which operand is stored transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// `a [m, k]`, `b [n, k]`: `c = a b^T`.
    Nt,
    /// `a [m, k]`, `b [k, n]`: `c = a b`.
    Nn,
    /// `a [k, m]`, `b [k, n]`: `c = a^T b`.
    Tn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    kind: Kind,
    m: usize,
    n: usize,
    k: usize,
    strides: [usize; 4],
    alignments: [u32; 4],
    input: Dtype,
    output: Dtype,
}

struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    /// Of `b`, `a`, the addend and the result.
    layouts: [sys::cublasLtMatrixLayout_t; 4],
    algo: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
}

// SAFETY: descriptors are plain memory that is only read after `Plan::new`.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `Plan::new`, destroyed once.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.desc);
            for layout in self.layouts {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

fn blas_error(op: &'static str, error: CublasError) -> Error {
    Error::invalid(op, format!("cuBLASLt refuses the matrix product ({error:?})"))
}

fn cuda_type(dtype: Dtype) -> sys::cudaDataType {
    match dtype {
        Dtype::F32 => sys::cudaDataType::CUDA_R_32F,
        Dtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        Dtype::F16 => sys::cudaDataType::CUDA_R_16F,
    }
}

/// The largest power of two up to 256 that divides an address.
fn alignment(ptr: u64) -> u32 {
    1 << ptr.trailing_zeros().min(8)
}

impl Blas {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        const OP: &str = "cuBLASLt";
        stream.context().bind_to_thread().map_err(|error| super::gpu::cuda_error(OP, error))?;
        let handle = lt::create_handle().map_err(|error| blas_error(OP, error))?;
        Ok(Self { handle, plans: Mutex::default() })
    }

    /// `d = alpha * (a, b as kind says) + beta * c`, where `c` is `d` itself unless an addend is given.
    pub(crate) fn matmul(
        &self,
        op: &'static str,
        kind: Kind,
        a: CudaView,
        b: CudaView,
        addend: Option<CudaView>,
        d: CudaViewMut,
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        let (m, k) = match kind {
            Kind::Nt | Kind::Nn => (a.rows(), a.cols()),
            Kind::Tn => (a.cols(), a.rows()),
        };
        let (n, b_k) = match kind {
            Kind::Nt => (b.rows(), b.cols()),
            Kind::Nn | Kind::Tn => (b.cols(), b.rows()),
        };
        Error::check_shape(op, "the second factor", &[b_k], &[k])?;
        Error::check_shape(op, "the product", &[d.rows(), d.cols()], &[m, n])?;
        if let Some(c) = addend {
            Error::check_shape(op, "the addend", &[c.rows(), c.cols()], &[m, n])?;
        }
        let types = [Some(b.dtype()), addend.map(|c| c.dtype())];
        if types[0] != Some(a.dtype()) || types[1].is_some_and(|dtype| dtype != d.dtype()) {
            return Err(Error::invalid(op, format!("element types differ: {:?} and {:?}", a.dtype(), b.dtype())));
        }
        if m == 0 || n == 0 {
            return Ok(());
        }
        let gpu = d.gpu();
        if k == 0 {
            return match (addend, beta == 0.0) {
                (None, true) => super::ops::fill(d, 0.0),
                (None, false) if beta == 1.0 => Ok(()),
                _ => Err(Error::invalid(op, "a product over no elements cannot be added")),
            };
        }
        let c = addend.unwrap_or_else(|| d.alias());
        let stride = |stride: usize, rows: usize, cols: usize| if rows <= 1 { cols } else { stride };
        let key = Key {
            kind,
            m,
            n,
            k,
            strides: [
                stride(b.stride(), b.rows(), b.cols()),
                stride(a.stride(), a.rows(), a.cols()),
                stride(c.stride(), m, n),
                stride(d.stride(), m, n),
            ],
            alignments: [alignment(b.ptr()), alignment(a.ptr()), alignment(c.ptr()), alignment(d.ptr())],
            input: a.dtype(),
            output: d.dtype(),
        };
        let plan = self.plan(op, key, gpu)?;
        let workspace = match plan.workspace {
            0 => None,
            bytes => Some(gpu.alloc(op, bytes)?),
        };
        let workspace_ptr = workspace.as_ref().map_or(0, |memory| memory.ptr());
        gpu.bind(op)?;
        // SAFETY: the views are windows of live memory with the sizes and strides that the plan was made for; the
        // workspace lives until the stream has used it (it is freed on the same stream).
        let product = || unsafe {
            lt::matmul(
                self.handle,
                plan.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                b.ptr() as *const c_void,
                plan.layouts[0],
                a.ptr() as *const c_void,
                plan.layouts[1],
                c.ptr() as *const c_void,
                plan.layouts[2],
                d.ptr() as *mut c_void,
                plan.layouts[3],
                &raw const plan.algo,
                workspace_ptr as *mut c_void,
                plan.workspace,
                gpu.stream().cu_stream().cast(),
            )
        };
        gpu.span(
            op,
            || format!("product {kind:?} {m} x {n} x {k}"),
            || product().map_err(|error| blas_error(op, error)),
        )
    }

    fn plan(&self, op: &'static str, key: Key, gpu: &Gpu) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.clone());
        }
        // Sequences of ever new lengths must not pile up plans.
        if plans.len() >= 4096 {
            plans.clear();
        }
        count(&gpu.counting().cublaslt);
        let plan = Arc::new(Plan::new(self.handle, &key).map_err(|error| {
            let Key { m, n, k, .. } = key;
            Error::invalid(op, format!("cuBLASLt has no algorithm for {m} x {n} x {k} ({error:?})"))
        })?);
        plans.insert(key, plan.clone());
        Ok(plan)
    }
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, key: &Key) -> std::result::Result<Self, CublasError> {
        let Key { kind, m, n, k, strides, alignments, input, output } = *key;
        let desc = lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)?;
        // The shapes as column-major matrices, and which operand is to be transposed.
        let (b_shape, b_transposed) = match kind {
            Kind::Nt => ((k, n), true),
            Kind::Nn | Kind::Tn => ((n, k), false),
        };
        let (a_shape, a_transposed) = match kind {
            Kind::Nt | Kind::Nn => ((k, m), false),
            Kind::Tn => ((m, k), true),
        };
        let transpose = |transposed: bool| match transposed {
            true => cublasOperation_t::CUBLAS_OP_T as i32,
            false => cublasOperation_t::CUBLAS_OP_N as i32,
        };
        let attributes = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        let (first, second) = (transpose(b_transposed), transpose(a_transposed));
        // SAFETY: the attributes are 32-bit integers; the descriptor was just made.
        unsafe {
            lt::set_matmul_desc_attribute(desc, attributes, (&raw const first).cast(), 4)?;
            let attributes = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB;
            lt::set_matmul_desc_attribute(desc, attributes, (&raw const second).cast(), 4)?;
        }
        let layout = |dtype, (rows, cols): (usize, usize), stride: usize| {
            lt::create_matrix_layout(cuda_type(dtype), rows as u64, cols as u64, stride as i64)
        };
        let layouts = [
            layout(input, b_shape, strides[0])?,
            layout(input, a_shape, strides[1])?,
            layout(output, (n, m), strides[2])?,
            layout(output, (n, m), strides[3])?,
        ];
        let preference = lt::create_matmul_pref()?;
        let limit = WORKSPACE as u64;
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let sides = [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ];
        // SAFETY: the workspace limit is 64-bit, the alignments are 32-bit; all descriptors are alive.
        let chosen = unsafe {
            let attribute = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            lt::set_matmul_pref_attribute(preference, attribute, (&raw const limit).cast(), 8)?;
            for (attribute, alignment) in sides.into_iter().zip(&alignments) {
                lt::set_matmul_pref_attribute(preference, attribute, (&raw const *alignment).cast(), 4)?;
            }
            let [b, a, c, d] = layouts;
            let chosen = lt::get_matmul_algo_heuristic(handle, desc, b, a, c, d, preference);
            lt::destroy_matmul_pref(preference)?;
            chosen?
        };
        Ok(Self { desc, layouts, algo: chosen.algo, workspace: chosen.workspaceSize })
    }
}

impl Gpu {
    /// See [`Blas::matmul`]; without an addend.
    pub(crate) fn matmul(
        &self,
        op: &'static str,
        kind: Kind,
        a: CudaView,
        b: CudaView,
        d: CudaViewMut,
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        self.blas().matmul(op, kind, a, b, None, d, alpha, beta)
    }
}
