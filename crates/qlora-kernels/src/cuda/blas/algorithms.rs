//! The choice of cuBLASLt's algorithm for each product.
//!
//! The heuristics take up to 0.1 ms, and batches of varied length bring a new number of rows with nearly every step. So the
//! number of rows is rounded up to one of eight sizes an octave, and the algorithm chosen for that size multiplies every
//! batch that rounds to it; only the layouts, plain descriptions on the host, are those of the batch. An algorithm that
//! refuses fewer rows than it was chosen for is replaced by one for exactly these rows. The choice never depends on which
//! batch came first, so runs repeat their bits.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self as lt, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;

use super::Kind;
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// The most scratch memory an algorithm may ask for: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Numbers of rows up to this are not rounded.
const EXACT: usize = 16;
/// The least step between two sizes.
const STEP: usize = 16;
/// Sizes an octave.
const OCTAVE: usize = 8;
/// Products of more kinds than any model has are forgotten and chosen again.
const MOST: usize = 1 << 14;

/// All that the choice of an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) kind: Kind,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Of `b`, `a`, the addend and the result, in elements.
    pub(super) strides: [usize; 4],
    pub(super) alignments: [u32; 4],
    pub(super) input: Element,
    pub(super) output: Dtype,
}

/// The type of both factors' elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Element {
    Float(Dtype),
    /// 8 bits, with a scale a row of each factor ([`super::fp8`]).
    E4m3,
}

/// An algorithm with the description of its product.
pub(super) struct Algorithm {
    pub(super) desc: Description,
    pub(super) algo: sys::cublasLtMatmulAlgo_t,
    /// Bytes of scratch memory.
    pub(super) workspace: usize,
}

/// A product without its sizes.
pub(super) struct Description(pub(super) sys::cublasLtMatmulDesc_t);

/// Sizes and strides of a product's matrices.
pub(super) struct Layouts {
    pub(super) b: sys::cublasLtMatrixLayout_t,
    pub(super) a: sys::cublasLtMatrixLayout_t,
    pub(super) c: sys::cublasLtMatrixLayout_t,
    pub(super) d: sys::cublasLtMatrixLayout_t,
}

/// The algorithms chosen so far.
#[derive(Default)]
pub(super) struct Algorithms {
    known: Mutex<Known>,
    expected: AtomicUsize,
    searches: AtomicU64,
}

#[derive(Default)]
struct Known {
    chosen: HashMap<Key, Arc<Algorithm>>,
    /// Numbers of rows that the algorithm of their size refuses.
    refused: HashSet<Key>,
}

// SAFETY: the description is plain memory that is only read after `Algorithm::choose`.
unsafe impl Send for Algorithm {}
// SAFETY: as above.
unsafe impl Sync for Algorithm {}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `Description::new`, destroyed once.
        let _ = unsafe { lt::destroy_matmul_desc(self.0) };
    }
}

impl Drop for Layouts {
    fn drop(&mut self) {
        for layout in [self.b, self.a, self.c, self.d] {
            // SAFETY: made by `Layouts::new`, destroyed once.
            let _ = unsafe { lt::destroy_matrix_layout(layout) };
        }
    }
}

/// The size that a number of rows rounds up to.
fn rounded(rows: usize) -> usize {
    if rows <= EXACT {
        return rows;
    }
    let below = 1 << (rows - 1).ilog2();
    rows.next_multiple_of((below / OCTAVE).max(STEP))
}

/// All sizes above [`EXACT`] that up to `most` rows round to.
fn sizes(most: usize) -> impl Iterator<Item = usize> {
    let last = rounded(most);
    std::iter::successors(Some(rounded(EXACT + 1)), |&size| Some(rounded(size + 1)))
        .take_while(move |&size| size <= last)
}

impl Key {
    /// The rows of the batch, which differ from batch to batch.
    fn rows(&self) -> usize {
        match self.kind {
            Kind::Nt | Kind::Nn => self.m,
            Kind::Tn => self.k,
        }
    }

    fn with_rows(self, rows: usize) -> Self {
        match self.kind {
            Kind::Nt | Kind::Nn => Self { m: rows, ..self },
            Kind::Tn => Self { k: rows, ..self },
        }
    }
}

impl Algorithms {
    /// See [`super::Blas::expect_rows`].
    pub(super) fn expect_rows(&self, most: usize) {
        self.expected.fetch_max(most, Ordering::Relaxed);
    }

    pub(super) fn searches(&self) -> u64 {
        self.searches.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The algorithm for a product, and whether it was chosen for exactly these rows.
    pub(super) fn of(
        &self,
        op: &'static str,
        handle: sys::cublasLtHandle_t,
        key: &Key,
    ) -> Result<(Arc<Algorithm>, bool)> {
        let mut known = self.lock();
        let size = rounded(key.rows());
        let of_size = key.with_rows(size);
        if size == key.rows() || known.refused.contains(key) {
            return Ok((self.choose(&mut known, op, handle, *key)?, true));
        }
        if !known.chosen.contains_key(&of_size) {
            let expected = self.expected.load(Ordering::Relaxed);
            for size in sizes(expected) {
                // A product that the library has no algorithm for is reported where it is needed.
                let _ = self.choose(&mut known, op, handle, key.with_rows(size));
            }
        }
        Ok((self.choose(&mut known, op, handle, of_size)?, false))
    }

    /// The algorithm for exactly these rows, from now on.
    pub(super) fn exactly(&self, op: &'static str, handle: sys::cublasLtHandle_t, key: &Key) -> Result<Arc<Algorithm>> {
        let mut known = self.lock();
        known.refused.insert(*key);
        self.choose(&mut known, op, handle, *key)
    }

    fn choose(
        &self,
        known: &mut Known,
        op: &'static str,
        handle: sys::cublasLtHandle_t,
        key: Key,
    ) -> Result<Arc<Algorithm>> {
        if let Some(algorithm) = known.chosen.get(&key) {
            return Ok(algorithm.clone());
        }
        if known.chosen.len() >= MOST {
            *known = Known::default();
        }
        self.searches.fetch_add(1, Ordering::Relaxed);
        let algorithm = Arc::new(Algorithm::choose(handle, &key).map_err(|error| {
            let Key { m, n, k, .. } = key;
            Error::invalid(op, format!("cuBLASLt has no algorithm for {m} x {n} x {k} ({error:?})"))
        })?);
        known.chosen.insert(key, algorithm.clone());
        Ok(algorithm)
    }
}

fn cuda_type(dtype: Dtype) -> sys::cudaDataType {
    match dtype {
        Dtype::F32 => sys::cudaDataType::CUDA_R_32F,
        Dtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        Dtype::F16 => sys::cudaDataType::CUDA_R_16F,
    }
}

impl Element {
    fn cuda_type(self) -> sys::cudaDataType {
        match self {
            Self::Float(dtype) => cuda_type(dtype),
            Self::E4m3 => sys::cudaDataType::CUDA_R_8F_E4M3,
        }
    }
}

impl Layouts {
    /// As column-major matrices.
    pub(super) fn new(key: &Key) -> std::result::Result<Self, CublasError> {
        let Key { kind, m, n, k, strides, input, output, .. } = *key;
        let b = if kind == Kind::Nt { (k, n) } else { (n, k) };
        let a = if kind == Kind::Tn { (m, k) } else { (k, m) };
        let layout = |dtype, (rows, cols): (usize, usize), stride: usize| {
            lt::create_matrix_layout(dtype, rows as u64, cols as u64, stride as i64)
        };
        let (input, output) = (input.cuda_type(), cuda_type(output));
        // One that fails leaves the others behind; it fails where the host has no memory left.
        Ok(Self {
            b: layout(input, b, strides[0])?,
            a: layout(input, a, strides[1])?,
            c: layout(output, (n, m), strides[2])?,
            d: layout(output, (n, m), strides[3])?,
        })
    }
}

impl Description {
    /// Products of `kind`, accumulated in f32.
    pub(super) fn new(kind: Kind) -> std::result::Result<Self, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let made = Self(lt::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F)?);
        let transpose = |transposed: bool| match transposed {
            true => cublasOperation_t::CUBLAS_OP_T as i32,
            false => cublasOperation_t::CUBLAS_OP_N as i32,
        };
        let (first, second) = (transpose(kind == Kind::Nt), transpose(kind == Kind::Tn));
        for (attribute, value) in
            [(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, first), (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, second)]
        {
            // SAFETY: the attribute is 32-bit, the descriptor alive.
            unsafe { lt::set_matmul_desc_attribute(made.0, attribute, (&raw const value).cast(), 4)? };
        }
        Ok(made)
    }
}

impl Algorithm {
    fn choose(handle: sys::cublasLtHandle_t, key: &Key) -> std::result::Result<Self, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let layouts = Layouts::new(key)?;
        let desc = Description::new(key.kind)?;
        if key.input == Element::E4m3 {
            desc.set_scales([super::fp8::ANY_SCALES; 2])?;
        }
        let mut made = Self { desc, algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] }, workspace: 0 };
        let preference = lt::create_matmul_pref()?;
        let limit = WORKSPACE as u64;
        let sides = [
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ];
        // SAFETY: the workspace limit is 64-bit, all other attributes are 32-bit; all descriptors are alive.
        let chosen = unsafe {
            let attribute = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            lt::set_matmul_pref_attribute(preference, attribute, (&raw const limit).cast(), 8)?;
            for (attribute, alignment) in sides.into_iter().zip(&key.alignments) {
                lt::set_matmul_pref_attribute(preference, attribute, (&raw const *alignment).cast(), 4)?;
            }
            let Layouts { b, a, c, d } = layouts;
            let chosen = lt::get_matmul_algo_heuristic(handle, made.desc.0, b, a, c, d, preference);
            lt::destroy_matmul_pref(preference)?;
            chosen?
        };
        (made.algo, made.workspace) = (chosen.algo, chosen.workspaceSize);
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_round_up_to_few_sizes() {
        assert!((1..=EXACT).all(|rows| rounded(rows) == rows));
        for (rows, size) in [(17, 32), (128, 128), (129, 144), (257, 288), (4096, 4096), (4097, 4608), (8191, 8192)] {
            assert_eq!(rounded(rows), size, "{rows}");
        }
        for rows in 1..20_000 {
            let size = rounded(rows);
            assert!(size >= rows && rounded(size) == size, "{rows}");
            assert!(size - rows < STEP || (size - rows) * OCTAVE < rows, "{rows} becomes {size}");
        }
        let all: Vec<usize> = sizes(8192).collect();
        assert!(all.len() < 64 && all[0] == 32 && all.last() == Some(&8192), "{all:?}");
        assert!((EXACT + 1..=8192).all(|rows| all.contains(&rounded(rows))));
        assert_eq!(sizes(0).count() + sizes(EXACT).count(), 0);
    }
}
