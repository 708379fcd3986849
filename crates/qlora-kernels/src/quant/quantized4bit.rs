//! A frozen weight in 4 bits.

use std::fmt;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::codebook::QuantType;
use super::decode::decode;
use super::encode::{Element, SourceDtype};
use super::nested::{Absmax, WithAbsmax};
use super::quantizer::Quantizer;
use super::{QuantConfig, check_blocksize};
use crate::error::{Error, Result};
use crate::weight::packed::{Packed, PackedForm, PackedKind};
use crate::weight::{FrozenWeight, PlainData};

/// A 4-bit weight `[rows, cols]`, as bitsandbytes quantizes it.
#[derive(Clone, PartialEq)]
pub struct Quantized4bit {
    parts: Parts,
}

/// The parts of a 4-bit weight, on its way from or to a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Two codes a byte, row-major over all elements (rows are not padded): the even element in the upper nibble.
    pub codes: Vec<u8>,
    /// One value for each block of `blocksize` elements.
    pub absmax: Absmax,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The 4-bit type.
    pub quant_type: QuantType,
    /// Elements that share an absmax.
    pub blocksize: usize,
    /// The dtype of the weight before quantization.
    pub source_dtype: SourceDtype,
}

impl Quantized4bit {
    /// Quantizes a weight on all threads.
    ///
    /// # Errors
    /// As [`Quantizer`]: values that are not finite (the error names row and column), a block size that does not exist,
    /// a number of elements other than `rows * cols`.
    pub fn quantize(data: &PlainData, rows: usize, cols: usize, config: &QuantConfig) -> Result<Self> {
        match data {
            PlainData::F32(data) => Self::quantize_slice(data, rows, cols, config),
            PlainData::Bf16(data) => Self::quantize_slice(data, rows, cols, config),
            PlainData::F16(data) => Self::quantize_slice(data, rows, cols, config),
        }
    }

    /// [`Self::quantize`] for a slice of one type.
    pub fn quantize_slice<T: Element>(data: &[T], rows: usize, cols: usize, config: &QuantConfig) -> Result<Self> {
        let mut quantizer = Quantizer::new(rows, cols, config)?;
        quantizer.push(data)?;
        quantizer.finish()
    }

    /// A weight read from a checkpoint.
    ///
    /// # Errors
    /// If a length does not follow from the shape, the block size does not exist, or a scale is not finite.
    pub fn from_parts(parts: Parts) -> Result<Self> {
        const OP: &str = "4-bit weight";
        let Parts { codes, absmax, rows, cols, blocksize, .. } = &parts;
        check_blocksize(OP, *blocksize)?;
        let Some(elements) = rows.checked_mul(*cols) else {
            return Err(Error::invalid(OP, format!("{rows} x {cols} elements are more than memory can hold")));
        };
        if codes.len() != elements.div_ceil(2) {
            let message =
                format!("{rows} x {cols} elements need {} bytes of codes, got {}", elements.div_ceil(2), codes.len());
            return Err(Error::invalid(OP, message));
        }
        absmax.check(OP, elements.div_ceil(*blocksize))?;
        Ok(Self { parts })
    }

    /// All of it, to write a checkpoint.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// All of it, without a copy.
    pub fn into_parts(self) -> Parts {
        self.parts
    }

    /// The 4-bit type.
    pub fn quant_type(&self) -> QuantType {
        self.parts.quant_type
    }

    /// Elements that share an absmax.
    pub fn blocksize(&self) -> usize {
        self.parts.blocksize
    }

    /// The absmax values.
    pub fn absmax(&self) -> &Absmax {
        &self.parts.absmax
    }

    /// Two codes a byte.
    pub fn codes(&self) -> &[u8] {
        &self.parts.codes
    }

    /// The dtype of the weight before quantization.
    pub fn source_dtype(&self) -> SourceDtype {
        self.parts.source_dtype
    }

    /// The whole weight in `dtype`, on all threads: each value is rounded to f32 and from there to `dtype`.
    pub fn dequantize(&self, dtype: SourceDtype) -> PlainData {
        match dtype {
            SourceDtype::F32 => PlainData::F32(self.dequantize_as(0.0, |piece, range| self.decode(range, piece))),
            SourceDtype::Bf16 => PlainData::Bf16(self.dequantize_as(bf16::ZERO, |piece, range| {
                self.decode_by_parts(range, piece, |narrow, wide| narrow.convert_from_f32_slice(wide))
            })),
            SourceDtype::F16 => PlainData::F16(self.dequantize_as(f16::ZERO, |piece, range| {
                self.decode_by_parts(range, piece, |narrow, wide| narrow.convert_from_f32_slice(wide))
            })),
        }
    }

    fn dequantize_as<T: Copy + Send>(&self, zero: T, decode: impl Fn(&mut [T], Range<usize>) + Sync) -> Vec<T> {
        const PIECE: usize = 1 << 16;
        let mut out = vec![zero; self.parts.rows * self.parts.cols];
        out.par_chunks_mut(PIECE).enumerate().for_each(|(i, piece)| {
            let range = i * PIECE..i * PIECE + piece.len();
            decode(piece, range);
        });
        out
    }

    fn decode_by_parts<T>(&self, range: Range<usize>, out: &mut [T], convert: impl Fn(&mut [T], &[f32])) {
        const PART: usize = 1024;
        let mut wide = [0f32; PART];
        for (i, part) in out.chunks_mut(PART).enumerate() {
            let wide = &mut wide[..part.len()];
            let start = range.start + i * PART;
            self.decode(start..start + part.len(), wide);
            convert(part, wide);
        }
    }

    /// Elements by flat index.
    fn decode(&self, range: Range<usize>, out: &mut [f32]) {
        struct Decode<'a>(&'a Parts, Range<usize>, &'a mut [f32]);

        impl WithAbsmax<()> for Decode<'_> {
            #[inline(always)]
            fn run(self, absmax: impl Fn(usize) -> f32) {
                let Self(parts, range, out) = self;
                decode(parts.quant_type, &parts.codes, parts.blocksize, absmax, range, out);
            }
        }

        self.parts.absmax.with(Decode(&self.parts, range, out));
    }
}

impl FrozenWeight for Quantized4bit {
    fn row_blocks_of_4bit(&self) -> Option<usize> {
        Some(self.parts.blocksize).filter(|&blocksize| self.parts.cols.is_multiple_of(blocksize))
    }

    fn rows(&self) -> usize {
        self.parts.rows
    }

    fn cols(&self) -> usize {
        self.parts.cols
    }

    /// # Panics
    /// If `range` does not lie in the weight, or `out` does not hold `range.len() * cols` elements.
    fn dequantize_rows(&self, range: Range<usize>, out: &mut [f32]) {
        let Parts { rows, cols, .. } = self.parts;
        assert!(range.start <= range.end && range.end <= rows, "rows {range:?} of {rows}");
        assert_eq!(out.len(), range.len() * cols, "{} rows of {cols} elements", range.len());
        self.decode(range.start * cols..range.end * cols, out);
    }

    fn bytes(&self) -> usize {
        self.parts.codes.len() + self.parts.absmax.bytes()
    }

    fn packed(&self) -> Option<Packed<'_>> {
        let Parts { codes, absmax, rows, cols, quant_type, blocksize, source_dtype } = &self.parts;
        let (nested, arrays) = match absmax {
            Absmax::Plain(values) => (None, vec![&codes[..], bytemuck::cast_slice(values)]),
            Absmax::Nested(nested) => {
                let (map, scales) = (bytemuck::cast_slice(&nested.quant_map), bytemuck::cast_slice(&nested.absmax));
                (Some((nested.offset, nested.blocksize)), vec![&codes[..], &nested.codes[..], map, scales])
            }
        };
        let kind =
            PackedKind::Bits4 { quant_type: *quant_type, blocksize: *blocksize, source_dtype: *source_dtype, nested };
        Some(Packed { form: PackedForm { rows: *rows, cols: *cols, kind }, arrays })
    }
}

impl fmt::Debug for Quantized4bit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { rows, cols, quant_type, blocksize, .. } = self.parts;
        let double = if matches!(self.parts.absmax, Absmax::Nested(_)) { ", double quantization" } else { "" };
        write!(f, "Quantized4bit({rows} x {cols}, {quant_type}, blocksize {blocksize}{double})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::BLOCKSIZES;

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin() * 0.05).collect()
    }

    #[test]
    fn a_byte_holds_the_even_element_above() {
        let config = QuantConfig { double_quant: false, ..Default::default() };
        let weight = Quantized4bit::quantize_slice(&[1.0f32, -1.0, 0.0], 1, 3, &config).unwrap();
        // 15, 0, then 7 for the zero and 7 for the padding.
        assert_eq!(weight.codes(), [0xf0, 0x77]);
        assert_eq!(*weight.absmax(), Absmax::Plain(vec![1.0]));
        let zero = Quantized4bit::quantize_slice(&[0.0f32], 1, 1, &config).unwrap();
        assert_eq!(zero.codes(), [0x00], "the code of zeros and of the padding beside them");
    }

    #[test]
    fn four_bits_and_an_eighth() {
        let config = QuantConfig::default();
        let weight = Quantized4bit::quantize_slice(&ramp(1024 * 1024), 1024, 1024, &config).unwrap();
        let bits = weight.bytes() as f64 * 8.0 / (1024.0 * 1024.0);
        assert!((4.126..4.14).contains(&bits), "{bits}");
    }

    #[test]
    fn pieces_make_no_difference() {
        let data = ramp(97 * 53);
        for blocksize in BLOCKSIZES {
            let config = QuantConfig { blocksize, ..Default::default() };
            let whole = Quantized4bit::quantize_slice(&data, 97, 53, &config).unwrap();
            for piece in [1, 31, 64, 1000, 5000] {
                let mut quantizer = Quantizer::new(97, 53, &config).unwrap();
                data.chunks(piece).for_each(|piece| quantizer.push(piece).unwrap());
                assert!(quantizer.finish().unwrap() == whole, "blocksize {blocksize}, pieces of {piece}");
            }
        }
    }

    #[test]
    fn values_that_cannot_be_quantized_are_named() {
        let config = QuantConfig::default();
        for (bad, said) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf"), (1e38, "at most")] {
            for at in [0, 70, 200_001, 399_999] {
                let mut data = ramp(400_000);
                data[at] = bad;
                data[399_999] = bad;
                let error = Quantized4bit::quantize_slice(&data, 400, 1000, &config).unwrap_err().to_string();
                assert!(error.contains(&format!("row {}, column {} is", at / 1000, at % 1000)), "{error}");
                assert!(error.contains(said), "{error}");
            }
        }
        let mut data = vec![bf16::ZERO; 100];
        data[99] = bf16::NAN;
        let error = Quantized4bit::quantize(&PlainData::Bf16(data), 10, 10, &config).unwrap_err();
        assert_eq!(error.to_string(), "quantize_4bit: row 9, column 9 is NaN");
    }

    #[test]
    fn counts_are_checked() {
        let config = QuantConfig::default();
        let error =
            |n, rows, cols| Quantized4bit::quantize_slice(&ramp(n), rows, cols, &config).unwrap_err().to_string();
        assert_eq!(error(5, 2, 3), "quantize_4bit: got 5 elements for 2 x 3");
        assert_eq!(error(7, 2, 3), "quantize_4bit: got more than the 6 elements of 2 x 3");
        assert!(error(7, usize::MAX, 2).contains("no memory for"));
        assert!(error(7, 1 << 31, 1 << 31).contains("no memory for"));
        let config = QuantConfig { blocksize: 48, ..config };
        let error = Quantized4bit::quantize_slice(&ramp(6), 2, 3, &config).unwrap_err().to_string();
        assert!(error.contains("blocksize 48 is not one of [32, 64,"), "{error}");
    }

    #[test]
    fn an_empty_weight() {
        let weight = Quantized4bit::quantize_slice::<f32>(&[], 0, 7, &QuantConfig::default()).unwrap();
        weight.dequantize_rows(0..0, &mut []);
        assert_eq!(weight.dequantize(SourceDtype::F32).len(), 0);
    }

    #[test]
    #[should_panic(expected = "rows 1..4 of 3")]
    fn rows_outside_are_a_bug() {
        let weight = Quantized4bit::quantize_slice(&ramp(6), 3, 2, &QuantConfig::default()).unwrap();
        weight.dequantize_rows(1..4, &mut [0.0; 6]);
    }
}
