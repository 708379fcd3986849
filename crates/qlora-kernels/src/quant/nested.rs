//! The absmax values of a 4-bit weight, plain or doubly quantized.
//!
//! Double quantization: `offset = mean(absmax)`, then `absmax - offset` in blocks of 256 with the signed dynamic 8-bit
//! map: `code8 = nearest(map, (absmax - offset) * reciprocal(absmax2))`. Back: `map[code8] * absmax2 + offset`, two
//! roundings (a fused multiply-add would give other bits).
//!
//! bitsandbytes leaves the order in which PyTorch sums the mean to the device; here it is summed in f64, rounded to f32
//! and divided by the f32 count. Against PyTorch on an H100 that is the same f32 or off by one or two units in the last
//! place, and about 1 code in 10^5 differs for f32 weights (94 of 10.1 million), none of 10.1 million for bf16 weights.

use super::decode::flush;
use super::dynamic_map::{nearest, signed_dynamic_map};
use super::reciprocal::reciprocal;
use crate::error::{Error, Result};

/// The absmax value of every block.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// As f32.
    Plain(Vec<f32>),
    /// Doubly quantized.
    Nested(NestedAbsmax),
}

/// Absmax values quantized to 8 bits, with the names bitsandbytes' checkpoints use.
#[derive(Clone, Debug, PartialEq)]
pub struct NestedAbsmax {
    /// One code a block (`absmax`).
    pub codes: Vec<u8>,
    /// The scale of each group of `blocksize` codes (`nested_absmax`).
    pub absmax: Vec<f32>,
    /// The value of each code, 256 of them (`nested_quant_map`); [`super::signed_dynamic_map`] unless a checkpoint has
    /// another.
    pub quant_map: Vec<f32>,
    /// The mean of the values (`nested_offset`).
    pub offset: f32,
    /// Codes that share a scale (`nested_blocksize`), a power of two.
    pub blocksize: usize,
}

impl NestedAbsmax {
    /// Codes that share a scale, where we quantize.
    pub const BLOCKSIZE: usize = 256;

    /// Quantizes absmax values around their mean.
    pub fn quantize(absmax: &[f32]) -> Self {
        Self::quantize_around(absmax, mean(absmax))
    }

    /// Quantizes absmax values around a given offset.
    pub fn quantize_around(absmax: &[f32], offset: f32) -> Self {
        let map = signed_dynamic_map();
        let mut codes = Vec::with_capacity(absmax.len());
        let mut scales = Vec::with_capacity(absmax.len().div_ceil(Self::BLOCKSIZE));
        for block in absmax.chunks(Self::BLOCKSIZE) {
            let largest = block.iter().fold(0f32, |largest, value| largest.max((value - offset).abs()));
            let scale = flush(largest);
            let factor = reciprocal(scale);
            codes.extend(block.iter().map(|value| nearest(map, flush(value - offset) * factor)));
            scales.push(scale);
        }
        Self { codes, absmax: scales, quant_map: map.to_vec(), offset, blocksize: Self::BLOCKSIZE }
    }

    /// The absmax of block `b`.
    #[inline(always)]
    fn get(&self, b: usize) -> f32 {
        let scale = flush(self.absmax[b >> self.blocksize.trailing_zeros()]);
        flush(self.quant_map[usize::from(self.codes[b])] * scale) + self.offset
    }
}

/// The f64 sum rounded to f32, over the number of values.
fn mean(values: &[f32]) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    values.iter().map(|&value| f64::from(value)).sum::<f64>() as f32 / values.len() as f32
}

impl Absmax {
    /// The number of blocks.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(values) => values.len(),
            Self::Nested(nested) => nested.codes.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::Plain(values) => values.clone(),
            Self::Nested(nested) => (0..nested.codes.len()).map(|b| nested.get(b)).collect(),
        }
    }

    /// Bytes held, the 8-bit map included.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Plain(values) => size_of_val(values.as_slice()),
            Self::Nested(nested) => {
                nested.codes.len() + 4 * (nested.absmax.len() + nested.quant_map.len()) + size_of::<f32>()
            }
        }
    }

    /// Gives `f` a function from block to absmax; each kind gets its own copy of `f`'s code.
    #[inline(always)]
    pub(super) fn with<R>(&self, f: impl WithAbsmax<R>) -> R {
        match self {
            Self::Plain(values) => f.run(|b| values[b]),
            Self::Nested(nested) => f.run(|b| nested.get(b)),
        }
    }

    /// Checks every length and value, so that nothing later can fail.
    pub(super) fn check(&self, op: &'static str, blocks: usize) -> Result<()> {
        let expect = |what: &str, got: usize, expected: usize| {
            if got == expected {
                return Ok(());
            }
            Err(Error::invalid(op, format!("{what} has {got} values, {blocks} blocks need {expected}")))
        };
        let finite = |what: &str, values: &[f32]| match values.iter().position(|value| !value.is_finite()) {
            Some(i) => Err(Error::invalid(op, format!("{what}[{i}] is {}", values[i]))),
            None => Ok(()),
        };
        match self {
            Self::Plain(values) => {
                expect("absmax", values.len(), blocks)?;
                finite("absmax", values)
            }
            Self::Nested(NestedAbsmax { codes, absmax, quant_map, offset, blocksize }) => {
                if !blocksize.is_power_of_two() {
                    return Err(Error::invalid(op, format!("nested_blocksize {blocksize} is not a power of two")));
                }
                expect("absmax", codes.len(), blocks)?;
                expect("nested_absmax", absmax.len(), blocks.div_ceil(*blocksize))?;
                if quant_map.len() != 256 {
                    let message = format!("nested_quant_map has {} values, 8-bit codes need 256", quant_map.len());
                    return Err(Error::invalid(op, message));
                }
                finite("nested_absmax", absmax)?;
                finite("nested_quant_map", quant_map)?;
                finite("nested_offset", &[*offset])
            }
        }
    }
}

/// The argument of [`Absmax::with`]: a closure that is generic over its argument.
pub(super) trait WithAbsmax<R> {
    fn run(self, absmax: impl Fn(usize) -> f32) -> R;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_their_mean() {
        let nested = NestedAbsmax::quantize(&[0.25; 300]);
        assert_eq!(nested.offset, 0.25);
        assert_eq!(nested.absmax, [0.0, 0.0]);
        assert_eq!(nested.codes, [0; 300], "0 * infinity is NaN, and NaN has code 0");
        assert_eq!(Absmax::Nested(nested).to_f32(), [0.25; 300]);
    }

    #[test]
    fn the_extremes_of_a_block_come_back() {
        // Offset 2, largest distance 1 upward: exact. Downward the map ends at -0.993.
        let nested = NestedAbsmax::quantize_around(&[3.0, 2.0, 1.0], 2.0);
        assert_eq!(nested.codes, [255, 127, 0]);
        assert_eq!(Absmax::Nested(nested).to_f32(), [3.0, 2.0, 2.0 - 0.99296875]);
    }

    #[test]
    fn relative_error_is_small() {
        let values: Vec<f32> = (0..1000).map(|i| 0.03 + 0.02 * (i as f32 * 0.7).sin()).collect();
        let back = Absmax::Nested(NestedAbsmax::quantize(&values)).to_f32();
        let worst = values.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Neighbours of the map are at most 0.0141 of the scale (0.02) apart.
        assert!(worst < 0.02 * 0.0141 / 2.0 + 1e-6, "{worst}");
    }

    #[test]
    fn an_empty_weight_has_no_blocks() {
        let absmax = Absmax::Nested(NestedAbsmax::quantize(&[]));
        assert!(absmax.is_empty());
        absmax.check("test", 0).unwrap();
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let plain = Absmax::Plain(vec![1.0, f32::NAN]);
        assert_eq!(plain.check("op", 3).unwrap_err().to_string(), "op: absmax has 2 values, 3 blocks need 3");
        assert_eq!(plain.check("op", 2).unwrap_err().to_string(), "op: absmax[1] is NaN");
        let good = NestedAbsmax::quantize(&[1.0, 2.0]);
        let check = |change: &dyn Fn(&mut NestedAbsmax)| {
            let mut nested = good.clone();
            change(&mut nested);
            Absmax::Nested(nested).check("op", 2).map_err(|error| error.to_string())
        };
        check(&|_| ()).unwrap();
        assert!(check(&|n| n.blocksize = 0).unwrap_err().contains("nested_blocksize 0"));
        assert!(check(&|n| n.blocksize = 3).unwrap_err().contains("nested_blocksize 3"));
        assert!(check(&|n| n.codes.push(0)).unwrap_err().contains("absmax has 3"));
        assert!(check(&|n| n.absmax.clear()).unwrap_err().contains("nested_absmax has 0"));
        assert!(check(&|n| n.quant_map.truncate(255)).unwrap_err().contains("nested_quant_map has 255"));
        assert!(check(&|n| n.quant_map[7] = f32::NAN).unwrap_err().contains("nested_quant_map[7]"));
        assert!(check(&|n| n.absmax[0] = f32::INFINITY).unwrap_err().contains("nested_absmax[0]"));
        assert!(check(&|n| n.offset = f32::NAN).unwrap_err().contains("nested_offset"));
    }
}
