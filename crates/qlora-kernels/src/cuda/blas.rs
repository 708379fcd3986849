//! Matrix products through cuBLASLt, with f32 accumulation.
//!
//! cuBLASLt is column-major. A row-major `C[m, n] = A B` is the column-major `C^T[n, m] = B^T A^T`, so its first operand
//! is our `b`, its second our `a`, and nothing is copied or transposed. Unlike `cublasGemmEx` it reads the addend from
//! another matrix than it writes (`D = A B + beta C`): a residual connection costs no copy.
//!
//! The algorithm that the library's heuristics name first is kept ([`algorithms`]), so that batches of ever new lengths ask
//! for none. With a fixed stream all of them give the same bits in every run.

mod algorithms;
pub(super) mod fp8;

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cublaslt::result::{self as lt, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use candle_core::cuda_backend::cudarc::driver::CudaStream;

use self::algorithms::{Algorithm, Algorithms, Description, Element, Key, Layouts};
use super::gpu::Gpu;
use super::view::{CudaView, CudaViewMut};
use crate::error::{Error, Result};

/// A cuBLASLt handle and the algorithms chosen so far.
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    algorithms: Algorithms,
}

// SAFETY: cuBLASLt handles may be used from any thread; the algorithms are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// The operand that is stored transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// `a [m, k]`, `b [n, k]`: `c = a b^T`.
    Nt,
    /// `a [m, k]`, `b [k, n]`: `c = a b`.
    Nn,
    /// `a [k, m]`, `b [k, n]`: `c = a^T b`.
    Tn,
}

fn blas_error(op: &'static str, error: CublasError) -> Error {
    Error::invalid(op, format!("cuBLASLt refuses the matrix product ({error:?})"))
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
        Ok(Self { handle, algorithms: Algorithms::default() })
    }

    /// The most rows that a batch of the run will have: the algorithms of all smaller batches are then chosen together, at
    /// the first product of each kind.
    pub(super) fn expect_rows(&self, most: usize) {
        self.algorithms.expect_rows(most);
    }

    /// The number of times the library was asked for an algorithm.
    pub(super) fn searches(&self) -> u64 {
        self.algorithms.searches()
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
            input: Element::Float(a.dtype()),
            output: d.dtype(),
        };
        self.launch(op, gpu, &key, [b.ptr(), a.ptr(), c.ptr(), d.ptr()], None, [alpha, beta])
    }

    /// The product that `key` describes, of the matrices at these addresses (b, a, the addend, the result); of fp8 factors
    /// with their scales' addresses. The caller answers for the windows.
    fn launch(
        &self,
        op: &'static str,
        gpu: &Gpu,
        key: &Key,
        [b, a, c, d]: [u64; 4],
        scales: Option<[u64; 2]>,
        [alpha, beta]: [f32; 2],
    ) -> Result<()> {
        let layouts = Layouts::new(key).map_err(|error| blas_error(op, error))?;
        // The scales' addresses are part of the description, which products in flight share otherwise.
        let own = scales.map(|scales| Description::new(key.kind).and_then(|own| own.set_scales(scales).map(|()| own)));
        let own = own.transpose().map_err(|error| blas_error(op, error))?;
        let product = |algorithm: &Algorithm| -> Result<std::result::Result<(), CublasError>> {
            let workspace = match algorithm.workspace {
                0 => None,
                bytes => Some(gpu.alloc(op, bytes)?),
            };
            gpu.bind(op)?;
            let stream = gpu.launch_stream();
            // SAFETY: the addresses are windows of live memory with the sizes and strides of the layouts; the workspace
            // lives until the stream has used it (it is freed on the same stream; a recording notes its address).
            Ok(unsafe {
                lt::matmul(
                    self.handle,
                    own.as_ref().unwrap_or(&algorithm.desc).0,
                    (&raw const alpha).cast(),
                    (&raw const beta).cast(),
                    b as *const c_void,
                    layouts.b,
                    a as *const c_void,
                    layouts.a,
                    c as *const c_void,
                    layouts.c,
                    d as *mut c_void,
                    layouts.d,
                    &raw const algorithm.algo,
                    workspace.as_ref().map_or(0, |memory| memory.ptr()) as *mut c_void,
                    algorithm.workspace,
                    stream.cast(),
                )
            })
        };
        let name = || {
            let Key { kind, m, n, k, input, .. } = *key;
            let fp8 = if input == Element::E4m3 { " fp8" } else { "" };
            format!("product{fp8} {kind:?} {m} x {n} x {k}")
        };
        gpu.span(op, name, || {
            let (algorithm, exact): (Arc<Algorithm>, bool) = self.algorithms.of(op, self.handle, key)?;
            match product(&algorithm)? {
                // Nothing was launched: the algorithm of more rows does not take so few.
                Err(_) if !exact => {
                    let algorithm = self.algorithms.exactly(op, self.handle, key)?;
                    product(&algorithm)?
                }
                done => done,
            }
            .map_err(|error| blas_error(op, error))
        })
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

    /// Says how many tokens the largest batch of a run has. Matrix products of all smaller batches are planned together at
    /// the first of each kind, so that a batch of a new length plans nothing.
    pub fn expect_tokens(&self, most: usize) {
        self.blas().expect_rows(most);
    }
}
