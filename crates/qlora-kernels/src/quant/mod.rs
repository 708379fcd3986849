//! Quantized weights: bitsandbytes' 4-bit formats, NF4 and FP4, bit for bit; and integers ([`quantized_int`]).
//!
//! A weight is a flat row-major sequence of blocks of `blocksize` elements; the last block may be shorter.
//!
//! ```text
//! absmax[b] = max |w| over block b                       f32
//! code      = the 4-bit code of w * (1 / absmax[b])      the upper nibble of a byte is the even element
//! w         ~ values[code] * absmax[b]                   one rounding in f32, one more to f16 or bf16
//! ```
//!
//! With double quantization the absmax values are themselves quantized, in blocks of 256, to 8 bits around their mean:
//! `absmax[b] = map[code8[b]] * absmax2[b / 256] + offset`, rounded after the product and after the sum (QLoRA, section
//! 3).
//!
//! The rules are those of bitsandbytes' CUDA backend, which its CPU backend follows only in part. They are visible in
//! bytes: the reciprocal is the GPU's approximate one (`reciprocal`), subnormal numbers count as zeros, the codes of a
//! block of zeros are 0, an odd number of elements is padded with the code of zero.
//!
//! | file | what it is |
//! |---|---|
//! | [`codebook`] | the 16 values and the thresholds of each type |
//! | `reciprocal` | 1 / absmax as the GPU computes it |
//! | `encode` | blocks to codes and absmax |
//! | `decode` | codes to f32, for any range of elements |
//! | `dynamic_map` | the 8-bit maps of double quantization and of 8-bit moments |
//! | [`nested`] | absmax values, plain or doubly quantized |
//! | [`quantizer`] | a weight quantized piece by piece, as it is read |
//! | [`quantized4bit`] | the frozen 4-bit weight |
//! | [`quantized_int`] | the frozen integer weight: LLM.int8, GPTQ, AWQ, uniform |
//! | `int_parts` | what an integer weight consists of, checked |
//! | `int_encode` | plain weights to integers |

pub mod codebook;
mod decode;
mod dynamic_map;
mod encode;
mod int_encode;
mod int_parts;
pub mod nested;
pub mod quantized4bit;
pub mod quantized_int;
pub mod quantizer;
mod reciprocal;

pub use codebook::QuantType;
pub use dynamic_map::{signed_dynamic_map, unsigned_dynamic_map};
pub use encode::{Element, SourceDtype};
pub use int_encode::IntConfig;
pub use nested::{Absmax, NestedAbsmax};
pub use quantized_int::{IntBits, IntParts, OutlierColumns, QuantizedInt};
pub use quantized4bit::{Parts, Quantized4bit};
pub use quantizer::Quantizer;

use crate::error::{Error, Result};

/// The block sizes that bitsandbytes has.
pub const BLOCKSIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The parameters of 4-bit quantization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantConfig {
    /// The 4-bit type.
    pub quant_type: QuantType,
    /// Elements that share an absmax: one of [`BLOCKSIZES`].
    pub blocksize: usize,
    /// Whether the absmax values are quantized too, which saves 0.37 bits a weight at blocksize 64.
    pub double_quant: bool,
}

/// The QLoRA paper's: NF4, blocks of 64, double quantization.
impl Default for QuantConfig {
    fn default() -> Self {
        Self { quant_type: QuantType::Nf4, blocksize: 64, double_quant: true }
    }
}

pub(crate) fn check_blocksize(op: &'static str, blocksize: usize) -> Result<()> {
    if BLOCKSIZES.contains(&blocksize) {
        return Ok(());
    }
    Err(Error::invalid(op, format!("blocksize {blocksize} is not one of {BLOCKSIZES:?}")))
}
