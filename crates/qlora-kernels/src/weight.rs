//! The one interface of a frozen weight.

pub mod packed;
pub mod travel;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};
use rayon::prelude::*;

use crate::dtype::Dtype;
use crate::error::Result;
use crate::weight::packed::{Packed, PackedForm, PackedKind};

/// A frozen weight `[rows = output features, cols = input features]`: plain, 4-bit, integers.
///
/// Training and inference only need to read rows of it; [`crate::ops::frozen_linear`] multiplies with any of them.
pub trait FrozenWeight: Send + Sync + fmt::Debug {
    /// Output features.
    fn rows(&self) -> usize;

    /// Input features.
    fn cols(&self) -> usize;

    /// Writes the given rows as f32, row-major, into `out` (`range.len() * cols` elements). Single-threaded: callers
    /// split the rows over their threads.
    fn dequantize_rows(&self, range: Range<usize>, out: &mut [f32]);

    /// Bytes held, tables and scales included.
    fn bytes(&self) -> usize;

    /// The rows as they lie in memory, where they are f32 already and need no dequantization.
    fn as_f32(&self) -> Option<&[f32]> {
        None
    }

    /// The rounding of the forward product's input, for kinds that have one (LLM.int8). The backward, and so every
    /// gradient, uses the dequantized weight.
    fn int8_activations(&self) -> Option<Int8Activations> {
        None
    }

    /// Columns that are held in 16 bits, ascending: [`Self::int8_activations`] leaves their inputs alone.
    fn exact_columns(&self) -> &[u32] {
        &[]
    }

    /// Elements that share a scale where the weight has 4 bits and its blocks do not cross rows.
    fn row_blocks_of_4bit(&self) -> Option<usize> {
        None
    }

    /// The weight's arrays as they lie in host memory, for kinds that can travel ([`crate::weight::packed`]).
    fn packed(&self) -> Option<Packed<'_>> {
        None
    }

    /// Waits until the weight is where it is read, for one that is not always there ([`crate::weight::travel`]). An operation that multiplies
    /// with it calls this before.
    ///
    /// # Errors
    /// If it cannot be had; the message names the process that holds it.
    fn arrive(&self) -> Result<()> {
        Ok(())
    }

    /// Whether the weight is not always in the memory of its device.
    fn travels(&self) -> bool {
        false
    }

    /// The weight on its GPU, if it is on one.
    #[cfg(feature = "cuda")]
    fn as_cuda(&self) -> Option<&crate::cuda::CudaWeight> {
        None
    }
}

/// LLM.int8's rounding of a product's input: each token's values to 8 bits, except columns with outliers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Int8Activations {
    /// A column in which any token's magnitude is at least this is not rounded (`llm_int8_threshold`); 0 rounds all.
    pub threshold: f32,
}

impl Int8Activations {
    /// bitsandbytes' and the paper's.
    pub const THRESHOLD: f32 = 6.0;
}

/// The arithmetic of the products with frozen weights, forward and backward. Everything else, the adapters' products
/// included, is computed in the activations' type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FrozenCompute {
    /// In the activations' type.
    #[default]
    Activations,
    /// In fp8 (e4m3) with a scale a row of either factor, accumulated in f32: Hopper GPUs (`Gpu::check_fp8`). On the CPU
    /// the same as [`Self::Activations`].
    Fp8,
}

impl FrozenCompute {
    /// The message for a device that does not multiply in fp8, of which `why` says that: "this run is on the CPU".
    pub fn fp8_is_not_for(why: &str) -> String {
        format!(
            "frozen_compute = \"fp8\" needs a Hopper GPU (H100, H200, GH200: compute capability 9.0), and {why}: leave it out"
        )
    }
}

/// A cache for the dequantized weights of a group of layers between uses, if it is enabled: memory for speed. Only CUDA
/// uses it.
#[derive(Default)]
pub struct WeightCache {
    enabled: AtomicBool,
    fp8_compute: AtomicBool,
    #[cfg(feature = "cuda")]
    pub(crate) weights: std::sync::Mutex<Option<crate::matrix::Matrix>>,
    #[cfg(feature = "cuda")]
    pub(crate) fp8: std::sync::Mutex<crate::cuda::linear_group::Fp8Weights>,
}

impl WeightCache {
    /// Lets the weights be kept from their next use on, or frees them.
    pub fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Relaxed);
        if !enabled {
            self.clear();
        }
    }

    /// Chooses the arithmetic of the group's products, and frees what is kept for another one.
    pub fn set_compute(&self, compute: FrozenCompute) {
        let fp8 = compute == FrozenCompute::Fp8;
        if self.fp8_compute.swap(fp8, Ordering::Relaxed) != fp8 {
            self.clear();
        }
    }

    /// See [`Self::set_compute`].
    pub fn compute(&self) -> FrozenCompute {
        if self.fp8_compute.load(Ordering::Relaxed) { FrozenCompute::Fp8 } else { FrozenCompute::Activations }
    }

    fn clear(&self) {
        #[cfg(feature = "cuda")]
        {
            use std::sync::PoisonError;
            *self.weights.lock().unwrap_or_else(PoisonError::into_inner) = None;
            *self.fp8.lock().unwrap_or_else(PoisonError::into_inner) = Default::default();
        }
    }

    /// See [`Self::set_enabled`].
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for WeightCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WeightCache(enabled: {}, {:?})", self.enabled(), self.compute())
    }
}

/// A weight that is not quantized, in the precision it was stored in.
pub struct PlainWeight {
    data: PlainData,
    rows: usize,
    cols: usize,
}

/// The elements of a [`PlainWeight`], row-major.
#[derive(Clone)]
pub enum PlainData {
    /// 32-bit.
    F32(Vec<f32>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// IEEE half.
    F16(Vec<f16>),
}

impl PlainData {
    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::F16(data) => data.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The index of the first element that is NaN or infinite.
    pub fn first_non_finite(&self) -> Option<usize> {
        fn find<T: Sync>(data: &[T], finite: impl Fn(&T) -> bool + Sync) -> Option<usize> {
            const CHUNK: usize = 1 << 16;
            let chunk = data.par_chunks(CHUNK).position_first(|chunk| !chunk.iter().all(&finite))?;
            data[chunk * CHUNK..].iter().position(|x| !finite(x)).map(|i| chunk * CHUNK + i)
        }
        match self {
            Self::F32(data) => find(data, |x| x.is_finite()),
            Self::Bf16(data) => find(data, |x| x.is_finite()),
            Self::F16(data) => find(data, |x| x.is_finite()),
        }
    }

    /// Writes the elements in `range` as f32.
    pub fn to_f32(&self, range: Range<usize>, out: &mut [f32]) {
        match self {
            Self::F32(data) => out.copy_from_slice(&data[range]),
            Self::Bf16(data) => {
                let data = &data[range];
                crate::simd::vectorize(
                    #[inline(always)]
                    || out.iter_mut().zip(data).for_each(|(o, x)| *o = f32::from_bits(u32::from(x.to_bits()) << 16)),
                );
            }
            Self::F16(data) => out.iter_mut().zip(&data[range]).for_each(|(o, x)| *o = x.to_f32()),
        }
    }
}

impl PlainWeight {
    /// # Panics
    /// If `data` does not have `rows * cols` elements.
    pub fn new(data: PlainData, rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "{} elements cannot be {rows} x {cols}", data.len());
        Self { data, rows, cols }
    }

    /// The elements.
    pub fn data(&self) -> &PlainData {
        &self.data
    }
}

impl FrozenWeight for PlainWeight {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn dequantize_rows(&self, range: Range<usize>, out: &mut [f32]) {
        self.data.to_f32(range.start * self.cols..range.end * self.cols, out);
    }

    fn bytes(&self) -> usize {
        self.data.len()
            * match self.data {
                PlainData::F32(_) => 4,
                PlainData::Bf16(_) | PlainData::F16(_) => 2,
            }
    }

    fn as_f32(&self) -> Option<&[f32]> {
        match &self.data {
            PlainData::F32(data) => Some(data),
            _ => None,
        }
    }

    fn packed(&self) -> Option<Packed<'_>> {
        let (dtype, bytes) = match &self.data {
            PlainData::F32(data) => (Dtype::F32, bytemuck::cast_slice(data)),
            PlainData::Bf16(data) => (Dtype::Bf16, bytemuck::cast_slice(data)),
            PlainData::F16(data) => (Dtype::F16, bytemuck::cast_slice(data)),
        };
        let form = PackedForm { rows: self.rows, cols: self.cols, kind: PackedKind::Plain(dtype) };
        Some(Packed { form, arrays: vec![bytes] })
    }
}

impl fmt::Debug for PlainWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = match self.data {
            PlainData::F32(_) => "f32",
            PlainData::Bf16(_) => "bf16",
            PlainData::F16(_) => "f16",
        };
        write!(f, "PlainWeight({} x {}, {dtype})", self.rows, self.cols)
    }
}
