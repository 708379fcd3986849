//! Blocks to codes: `absmax = max |w|`, `code = encode(w * reciprocal(absmax))`, in f32.
//!
//! The CUDA rules of bitsandbytes: subnormal inputs count as zeros; in a block of zeros the reciprocal is infinite, 0
//! times infinity is NaN, and NaN has code 0; a missing last element (odd length) is a zero.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::codebook::{QuantType, encode_fp4, encode_nf4};
use super::decode::flush;
use super::reciprocal::reciprocal;
use crate::simd::dispatch;

/// The type a weight had before it was quantized; dequantization returns to it.
pub type SourceDtype = crate::dtype::Dtype;

/// An element type that can be quantized: f32, bf16 or f16.
pub trait Element: Copy + Send + Sync + sealed::Sealed + 'static {
    /// The dtype of the elements.
    const DTYPE: SourceDtype;

    /// Converts to f32, exactly; both slices have the same length.
    #[doc(hidden)]
    fn widen(from: &[Self], to: &mut [f32]);
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

impl Element for f32 {
    const DTYPE: SourceDtype = SourceDtype::F32;

    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Element for bf16 {
    const DTYPE: SourceDtype = SourceDtype::Bf16;

    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = f32::from_bits(u32::from(from.to_bits()) << 16));
    }
}

impl Element for f16 {
    const DTYPE: SourceDtype = SourceDtype::F16;

    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

/// The largest magnitude whose reciprocal is a normal f32. bitsandbytes turns blocks with larger ones into zeros.
pub(super) const LARGEST: f32 = f32::from_bits((126 + 127) << 23);

const LARGEST_BLOCK: usize = 4096;

/// Elements that are encoded together: two registers of AVX-512, four of AVX2.
const LANES: usize = 32;

/// Elements that one thread quantizes at a time: whole blocks, and few enough to stay in its cache.
const PIECE: usize = 16 * LARGEST_BLOCK;

/// Quantizes `data` from a block boundary on, on all threads: `codes` takes `ceil(n / 2)` bytes, `absmax` `ceil(n /
/// blocksize)` values.
///
/// # Errors
/// The index of the first element that is not finite or is larger than [`LARGEST`].
pub(super) fn encode<T: Element>(
    quant_type: QuantType,
    blocksize: usize,
    data: &[T],
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Result<(), usize> {
    let refused = data
        .par_chunks(PIECE)
        .zip(codes.par_chunks_mut(PIECE / 2))
        .zip(absmax.par_chunks_mut(PIECE / blocksize))
        .enumerate()
        .filter_map(|(i, ((data, codes), absmax))| {
            let refused = dispatch(Piece { quant_type, blocksize, data, codes, absmax });
            refused.map(|at| i * PIECE + at)
        })
        .min();
    refused.map_or(Ok(()), Err)
}

/// The piece of the work that one thread does. Not a closure: the shim that calls one is not always inlined where the
/// vector instructions are.
struct Piece<'a, T> {
    quant_type: QuantType,
    blocksize: usize,
    data: &'a [T],
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl<T: Element> pulp::NullaryFnOnce for Piece<'_, T> {
    /// The index of the first element that cannot be quantized.
    type Output = Option<usize>;

    #[inline(always)]
    fn call(self) -> Option<usize> {
        let Self { quant_type, blocksize, data, codes, absmax } = self;
        encode_piece(quant_type, blocksize, data, codes, absmax)
    }
}

#[inline(always)]
fn encode_piece<T: Element>(
    quant_type: QuantType,
    blocksize: usize,
    data: &[T],
    codes: &mut [u8],
    absmax: &mut [f32],
) -> Option<usize> {
    let mut values = [0f32; LARGEST_BLOCK];
    for (i, block) in data.chunks(blocksize).enumerate() {
        T::widen(block, &mut values[..block.len()]);
        let mut largest = 0u32;
        for value in &values[..block.len()] {
            largest = largest.max(value.to_bits() & i32::MAX as u32);
        }
        if largest > LARGEST.to_bits() {
            let bad = values[..block.len()].iter().position(|value| value.abs().to_bits() > LARGEST.to_bits());
            return Some(i * blocksize + bad.unwrap_or(0));
        }
        let scale = flush(f32::from_bits(largest));
        absmax[i] = scale;
        // A whole number of lanes; what lies beyond the block is encoded and not stored, but for the padding.
        values[block.len()..block.len().next_multiple_of(LANES)].fill(0.0);
        let factor = reciprocal(scale);
        let packed = &mut codes[i * blocksize / 2..][..block.len().div_ceil(2)];
        let chunks = values.as_chunks::<LANES>().0.iter();
        for (values, packed) in chunks.zip(packed.chunks_mut(LANES / 2)) {
            let mut codes = [0u32; LANES];
            let scaled = values.iter().map(|value| flush(*value) * factor);
            match quant_type {
                QuantType::Nf4 => codes.iter_mut().zip(scaled).for_each(|(code, s)| *code = encode_nf4(s)),
                QuantType::Fp4 => codes.iter_mut().zip(scaled).for_each(|(code, s)| *code = encode_fp4(s)),
            }
            let mut bytes = [0u8; LANES / 2];
            for (byte, pair) in bytes.iter_mut().zip(codes.as_chunks::<2>().0) {
                *byte = (pair[0] << 4 | pair[1]) as u8;
            }
            match <&mut [u8; LANES / 2]>::try_from(&mut *packed) {
                Ok(packed) => *packed = bytes,
                Err(_) => packed.copy_from_slice(&bytes[..packed.len()]),
            }
        }
    }
    None
}
