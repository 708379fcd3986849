//! llama.cpp's quantized blocks: encoding by a search for the least error, and decoding.
//!
//! | type | block | weight of code `q` | bits a weight |
//! |---|---|---|---|
//! | q4_0, q5_0 | 32 | `d (q - 8)`, `d (q - 16)` | 4.5, 5.5 |
//! | q4_1, q5_1 | 32 | `d q + m` | 5, 6 |
//! | q2_K | 16 groups of 16 | `d s q - e t`, s and t of 4 bits | 2.625 |
//! | q3_K | 16 groups of 16 | `d s q`, s of 6 bits, q from -4 to 3 | 3.4375 |
//! | q4_K, q5_K | 8 groups of 32 | `d s q - e t`, s and t of 6 bits | 4.5, 5.5 |
//! | q6_K | 16 groups of 16 | `d s q`, s of 8 bits, q from -32 to 31 | 6.5625 |
//!
//! d, e and m are f16, one a block; s and t are integers, one a group. A format fixes how blocks are read, not how the numbers in
//! them are found. Here they are those of the least
//!
//! ```text
//! sum of importance[column] (x - what is read)^2
//! ```
//!
//! that a search finds ([`quantize`]): the mean of the squared inputs that a column is multiplied with is the importance that makes
//! this the error of the product. ggml's own functions weigh large elements more by rules of thumb, and fit a block's scales apart
//! from its codes; the tests compare the two.
//!
//! | file | what it is |
//! |---|---|
//! | `affine` | groups with a scale and a minimum |
//! | `scaled` | groups with a scale |
//! | `single` | blocks of 32 |
//! | `pack` | the bytes of a block |
//! | `lanes` | sums over a group that do not depend on the machine |

#![allow(
    clippy::neg_cmp_op_on_partial_ord,
    clippy::needless_range_loop,
    reason = "comparisons that are false for what is no number are meant so; several arrays of a block go by one number of a group"
)]

mod affine;
mod lanes;
mod pack;
mod scaled;
mod single;
#[cfg(test)]
mod tests;

use half::f16;

use self::pack::KBlock;
use crate::simd::vectorize;

/// A type of block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BlockType {
    /// 4 bits around zero.
    Q4_0,
    /// 4 bits from a minimum.
    Q4_1,
    /// 5 bits around zero.
    Q5_0,
    /// 5 bits from a minimum.
    Q5_1,
    /// 2 bits, groups with a scale and a minimum.
    Q2K,
    /// 3 bits, groups with a scale.
    Q3K,
    /// 4 bits, groups with a scale and a minimum.
    Q4K,
    /// 5 bits, groups with a scale and a minimum.
    Q5K,
    /// 6 bits, groups with a scale.
    Q6K,
}

/// Elements of the blocks with groups.
const SUPER: usize = 256;
/// Elements of the others.
const SINGLE: usize = 32;

/// An error below this part of the squares is what rounding a block's factors to f16 leaves.
const EXACT: f32 = 5e-6;

impl BlockType {
    /// All of them.
    pub const ALL: [Self; 9] =
        [Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q2K, Self::Q3K, Self::Q4K, Self::Q5K, Self::Q6K];

    /// ggml's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q2K => "q2_K",
            Self::Q3K => "q3_K",
            Self::Q4K => "q4_K",
            Self::Q5K => "q5_K",
            Self::Q6K => "q6_K",
        }
    }

    /// ggml's number of the type, as GGUF files have it.
    pub const fn id(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
        }
    }

    /// Elements and bytes of a block.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::Q4_0 => (SINGLE, 18),
            Self::Q4_1 => (SINGLE, 20),
            Self::Q5_0 => (SINGLE, 22),
            Self::Q5_1 => (SINGLE, 24),
            Self::Q2K => (SUPER, 84),
            Self::Q3K => (SUPER, 110),
            Self::Q4K => (SUPER, 144),
            Self::Q5K => (SUPER, 176),
            Self::Q6K => (SUPER, 210),
        }
    }
}

/// Encodes whole blocks of a matrix.
///
/// `values` are elements of a row-major matrix from number `first` on, whose rows are whole blocks; `importance` has a weight of at
/// least zero for each of its columns (none: all count the same). The same values give the same bytes on every machine.
///
/// Returns whether all scales fit f16; where they do not, the values are beyond what the type can hold.
///
/// # Panics
/// If `values` and `out` are not the same number of whole blocks, or a block would reach past the end of `importance`.
pub fn quantize(kind: BlockType, values: &[f32], first: usize, importance: Option<&[f32]>, out: &mut [u8]) -> bool {
    let (elements, bytes) = kind.block();
    assert!(
        values.len().is_multiple_of(elements) && out.len() == values.len() / elements * bytes,
        "{} values for {} bytes of {}",
        values.len(),
        out.len(),
        kind.name()
    );
    vectorize(
        #[inline(always)]
        || {
            let mut fits = true;
            for (index, (x, out)) in values.chunks_exact(elements).zip(out.chunks_exact_mut(bytes)).enumerate() {
                let weights =
                    importance.map(|columns| &columns[(first + index * elements) % columns.len()..][..elements]);
                fits &= match elements {
                    SUPER => encode_super(kind, x, weights, out),
                    _ => encode_single(kind, x, weights, out),
                };
            }
            fits
        },
    )
}

/// Decodes whole blocks, in the arithmetic of ggml's reference functions: products and sums of f32, in their order.
///
/// # Panics
/// If `bytes` and `out` are not the same number of whole blocks.
pub fn dequantize(kind: BlockType, bytes: &[u8], out: &mut [f32]) {
    let (elements, size) = kind.block();
    assert!(
        bytes.len().is_multiple_of(size) && out.len() == bytes.len() / size * elements,
        "{} bytes of {} for {} values",
        bytes.len(),
        kind.name(),
        out.len()
    );
    for (block, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(elements)) {
        match elements {
            SUPER => pack::unpack(kind, block).decode(out),
            _ => single::decode(kind, block, out),
        }
    }
}

/// The weights of a block: its importance with a mean of 1, so that f32 holds the sums; a column that nothing is known of still
/// counts a little, and where nothing is known of any, all count the same.
#[inline(always)]
fn weights<const N: usize>(importance: Option<&[f32]>) -> [f32; N] {
    let mut weights = [1.0; N];
    if let Some(importance) = importance {
        let mean = importance.iter().sum::<f32>() / N as f32;
        if mean > 0.0 && mean.is_finite() {
            for (weight, importance) in weights.iter_mut().zip(importance) {
                *weight = importance / mean + 1e-6;
            }
        }
    }
    weights
}

#[inline(always)]
fn encode_super(kind: BlockType, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) -> bool {
    let Ok(x) = <&[f32; SUPER]>::try_from(x) else { return false };
    let weights = weights::<SUPER>(importance);
    let block: KBlock = match kind {
        BlockType::Q2K => affine::search::<16, 16>(x, &weights, 3.0, 15.0),
        BlockType::Q4K => affine::search::<8, 32>(x, &weights, 15.0, 63.0),
        BlockType::Q5K => affine::search::<8, 32>(x, &weights, 31.0, 63.0),
        BlockType::Q3K => scaled::search(x, &weights, -4.0, -32.0),
        _ => scaled::search(x, &weights, -32.0, -128.0),
    };
    pack::pack(kind, &block, out);
    block.d.is_finite() && block.min.is_finite()
}

#[inline(always)]
fn encode_single(kind: BlockType, x: &[f32], importance: Option<&[f32]>, out: &mut [u8]) -> bool {
    let Ok(x) = <&[f32; SINGLE]>::try_from(x) else { return false };
    let weights = weights::<SINGLE>(importance);
    match kind {
        BlockType::Q4_0 => single::around_zero(x, &weights, 8, out),
        BlockType::Q5_0 => single::around_zero(x, &weights, 16, out),
        BlockType::Q4_1 => single::from_minimum(x, &weights, 15, out),
        _ => single::from_minimum(x, &weights, 31, out),
    }
}

/// The f16 that is stored for a value, and the value it decodes to.
#[inline(always)]
fn stored(value: f32) -> (f16, f32) {
    let half = f16::from_f32(value);
    (half, half.to_f32())
}
