//! A frozen weight in 8- or 4-bit integers: LLM.int8, GPTQ, AWQ, and uniform quantization while loading.
//!
//! ```text
//! w[r][c] = (code[r][c] - zero[r][g]) * scale[r][g]        g = c / group_size, or group_of[c]
//! ```
//!
//! | part | type | shape | |
//! |---|---|---|---|
//! | codes | u8 | 8 bits: `rows * cols`; 4 bits: `ceil(rows * cols / 2)` | row-major, rows are not padded; of two 4-bit codes in a byte the even element is in the upper nibble |
//! | scale | f32 | `[rows, groups]` | |
//! | zero | f32 | `[rows, groups]` | optional. With it codes are unsigned; **without it they are signed**, two's complement (-128..=127, -8..=7), and the zero is 0 |
//! | group_of | u16 | `[cols]` | optional: the group of each column, where columns were quantized in another order (GPTQ's `g_idx`) |
//! | outliers | bf16 or f16 | `[rows, n]` | optional: columns that are not quantized; their codes mean nothing |
//!
//! The difference is exact for whole zeros, so there is one rounding in f32. LLM.int8 (arXiv 2208.07339) is the signed
//! 8-bit kind with one group a row, `scale = absmax / 127`, and [`Int8Activations`]: its forward product rounds the
//! activations to 8 bits too.

use std::fmt;
use std::ops::Range;

use super::int_encode::{self, IntConfig, Scheme};
pub use super::int_parts::{IntBits, IntParts, OutlierColumns};
use crate::error::Result;
use crate::simd::vectorize;
use crate::weight::{FrozenWeight, Int8Activations, PlainData};

pub(super) const OP: &str = "integer weight";

/// An integer weight `[rows, cols]`.
#[derive(Clone, PartialEq)]
pub struct QuantizedInt {
    parts: IntParts,
    groups: usize,
}

impl QuantizedInt {
    /// Quantizes a weight by rounding to the nearest step, on all threads.
    ///
    /// # Errors
    /// If a value is not finite or larger than 2^126 (the error names row and column), or the group size is 0.
    pub fn quantize(data: &PlainData, rows: usize, cols: usize, config: &IntConfig) -> Result<Self> {
        int_encode::quantize(data, rows, cols, Scheme::Uniform(*config), &[])
    }

    /// [`Self::quantize`] that keeps the given columns (ascending) in 16 bits: bf16 if the data is bf16, else f16.
    ///
    /// # Errors
    /// As there; also if a column does not exist or is out of order, or a value in one is beyond f16's range.
    pub fn quantize_except(
        data: &PlainData,
        rows: usize,
        cols: usize,
        config: &IntConfig,
        columns: &[u32],
    ) -> Result<Self> {
        int_encode::quantize(data, rows, cols, Scheme::Uniform(*config), columns)
    }

    /// Quantizes a weight as bitsandbytes' `Linear8bitLt` does (LLM.int8): the same codes and scales. `threshold` is that
    /// of [`Int8Activations`]; the given columns (ascending) stay in 16 bits.
    ///
    /// # Errors
    /// If a value is not finite or beyond f16's range: LLM.int8 begins with a rounding to f16.
    pub fn llm_int8(data: &PlainData, rows: usize, cols: usize, threshold: f32, columns: &[u32]) -> Result<Self> {
        int_encode::quantize(data, rows, cols, Scheme::LlmInt8 { threshold }, columns)
    }

    /// A weight read from a checkpoint.
    ///
    /// # Errors
    /// If a length does not follow from the shape, a group or column does not exist, or a scale, zero or outlier is not
    /// finite.
    pub fn from_parts(parts: IntParts) -> Result<Self> {
        let groups = parts.check()?;
        Ok(Self { parts, groups })
    }

    /// All of it.
    pub fn parts(&self) -> &IntParts {
        &self.parts
    }

    /// All of it, without a copy.
    pub fn into_parts(self) -> IntParts {
        self.parts
    }

    /// Scales of a row.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// The width of the codes.
    pub fn bits(&self) -> IntBits {
        self.parts.bits
    }

    /// The code of one element: -128..=127 or -8..=7 without zeros, else 0..=255 or 0..=15.
    ///
    /// # Panics
    /// If there is no such element.
    pub fn code(&self, row: usize, col: usize) -> i16 {
        let IntParts { codes, bits, rows, cols, zeros, .. } = &self.parts;
        assert!(row < *rows && col < *cols, "element {row}, {col} of {rows} x {cols}");
        let i = row * cols + col;
        let (code, sign) = match bits {
            IntBits::Eight => (codes[i], 0x80),
            IntBits::Four => (codes[i / 2] >> (4 * (1 - i % 2)) & 15, 8),
        };
        if zeros.is_some() { i16::from(code) } else { i16::from(code ^ sign) - i16::from(sign) }
    }

    /// One row as f32.
    fn decode_row(&self, row: usize, out: &mut [f32]) {
        let IntParts { codes, bits, cols, group_size, group_of, scales, zeros, outliers, .. } = &self.parts;
        let start = row * cols;
        // Without zeros, flipping the sign bit and subtracting it gives the signed value.
        let sign: u8 = match (zeros, bits) {
            (Some(_), _) => 0,
            (None, IntBits::Eight) => 0x80,
            (None, IntBits::Four) => 8,
        };
        match bits {
            IntBits::Eight => widen_bytes(&codes[start..start + cols], sign, out),
            IntBits::Four => widen_nibbles(codes, start, sign, out),
        }
        let of_row = |values: &'_ [f32]| -> Range<usize> {
            debug_assert_eq!(values.len(), scales.len());
            row * self.groups..(row + 1) * self.groups
        };
        let scales = &scales[of_row(scales)];
        let zeros = zeros.as_ref().map(|zeros| &zeros[of_row(zeros)]);
        match group_of {
            Some(group_of) => match zeros {
                Some(zeros) => {
                    for (x, &group) in out.iter_mut().zip(group_of) {
                        *x = (*x - zeros[usize::from(group)]) * scales[usize::from(group)];
                    }
                }
                None => out.iter_mut().zip(group_of).for_each(|(x, &group)| *x *= scales[usize::from(group)]),
            },
            None => {
                for (group, out) in out.chunks_mut(*group_size).enumerate() {
                    let (scale, zero) = (scales[group], zeros.map_or(0.0, |zeros| zeros[group]));
                    vectorize(
                        #[inline(always)]
                        || {
                            for x in out.iter_mut() {
                                *x = (*x - zero) * scale;
                            }
                        },
                    );
                }
            }
        }
        if let Some(OutlierColumns { columns, values }) = outliers {
            let mut value = [0.0];
            for (i, &column) in columns.iter().enumerate() {
                let at = row * columns.len() + i;
                values.to_f32(at..at + 1, &mut value);
                out[column as usize] = value[0];
            }
        }
    }
}

fn widen_bytes(codes: &[u8], sign: u8, out: &mut [f32]) {
    let offset = f32::from(sign);
    vectorize(
        #[inline(always)]
        || {
            for (x, &code) in out.iter_mut().zip(codes) {
                *x = f32::from(code ^ sign) - offset;
            }
        },
    );
}

/// The elements from flat index `start` on.
fn widen_nibbles(codes: &[u8], start: usize, sign: u8, out: &mut [f32]) {
    let offset = f32::from(sign);
    let one = |code: u8| f32::from((code & 15) ^ sign) - offset;
    let (first, out) = out.split_at_mut((start % 2).min(out.len()));
    if let [first] = first {
        *first = one(codes[start / 2]);
    }
    let bytes = &codes[start.div_ceil(2)..];
    let (pairs, last) = out.as_chunks_mut::<2>();
    vectorize(
        #[inline(always)]
        || {
            for (pair, &byte) in pairs.iter_mut().zip(bytes) {
                *pair = [f32::from((byte >> 4) ^ sign) - offset, f32::from((byte & 15) ^ sign) - offset];
            }
        },
    );
    if let [last] = last {
        *last = one(bytes[pairs.len()] >> 4);
    }
}

impl FrozenWeight for QuantizedInt {
    fn rows(&self) -> usize {
        self.parts.rows
    }

    fn cols(&self) -> usize {
        self.parts.cols
    }

    /// # Panics
    /// If `range` does not lie in the weight, or `out` does not hold `range.len() * cols` elements.
    fn dequantize_rows(&self, range: Range<usize>, out: &mut [f32]) {
        let IntParts { rows, cols, .. } = self.parts;
        assert!(range.start <= range.end && range.end <= rows, "rows {range:?} of {rows}");
        assert_eq!(out.len(), range.len() * cols, "{} rows of {cols} elements", range.len());
        for (row, out) in range.zip(out.chunks_exact_mut(cols.max(1))) {
            self.decode_row(row, out);
        }
    }

    fn bytes(&self) -> usize {
        let IntParts { codes, group_of, scales, zeros, outliers, .. } = &self.parts;
        codes.len()
            + size_of_val(scales.as_slice())
            + zeros.as_ref().map_or(0, |zeros| size_of_val(zeros.as_slice()))
            + group_of.as_ref().map_or(0, |group_of| size_of_val(group_of.as_slice()))
            + outliers.as_ref().map_or(0, |outliers| 4 * outliers.columns.len() + 2 * outliers.values.len())
    }

    fn int8_activations(&self) -> Option<Int8Activations> {
        self.parts.activations
    }

    fn exact_columns(&self) -> &[u32] {
        self.parts.outliers.as_ref().map_or(&[], |outliers| &outliers.columns)
    }
}

impl fmt::Debug for QuantizedInt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let IntParts { bits, rows, cols, group_size, group_of, zeros, outliers, activations, .. } = &self.parts;
        write!(f, "QuantizedInt({rows} x {cols}, {} bits, ", bits.bits())?;
        match group_of {
            Some(_) => write!(f, "{} groups in any order", self.groups)?,
            None => write!(f, "groups of {}", group_size.min(cols))?,
        }
        f.write_str(if zeros.is_some() { ", zero points" } else { ", symmetric" })?;
        if let Some(outliers) = outliers {
            write!(f, ", {} columns in 16 bits", outliers.columns.len())?;
        }
        f.write_str(if activations.is_some() { ", LLM.int8)" } else { ")" })
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn parts() -> IntParts {
        // 3 x 5 codes: odd rows begin in the middle of a byte.
        IntParts {
            codes: vec![0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xe0],
            bits: IntBits::Four,
            rows: 3,
            cols: 5,
            group_size: 3,
            group_of: None,
            scales: vec![1.0, 10.0, 1.0, 1.0, 2.0, 0.5],
            zeros: Some(vec![0.0, 1.0, 0.0, 0.0, 8.0, 8.0]),
            outliers: None,
            activations: None,
        }
    }

    fn all(weight: &QuantizedInt) -> Vec<f32> {
        let mut out = vec![f32::NAN; weight.rows() * weight.cols()];
        weight.dequantize_rows(0..weight.rows(), &mut out);
        let mut row = vec![f32::NAN; weight.cols()];
        for r in 0..weight.rows() {
            weight.dequantize_rows(r..r + 1, &mut row);
            assert_eq!(row, out[r * weight.cols()..(r + 1) * weight.cols()], "row {r} alone");
        }
        out
    }

    #[test]
    fn four_bits_with_zeros() {
        let weight = QuantizedInt::from_parts(parts()).unwrap();
        #[rustfmt::skip]
        let expected = [
            0.0, 1.0, 2.0, 20.0, 30.0,
            5.0, 6.0, 7.0, 8.0, 9.0,
            4.0, 6.0, 8.0, 2.5, 3.0,
        ];
        assert_eq!(all(&weight), expected);
        assert_eq!((weight.code(0, 4), weight.code(1, 0), weight.code(2, 4)), (4, 5, 14));
        assert_eq!(weight.bytes(), 8 + 6 * 4 + 6 * 4);
    }

    #[test]
    fn without_zeros_codes_are_signed() {
        let weight = QuantizedInt::from_parts(IntParts { zeros: None, ..parts() }).unwrap();
        assert_eq!(all(&weight)[5..], [5.0, 6.0, 7.0, -8.0, -7.0, -12.0, -10.0, -8.0, -1.5, -1.0]);
        assert_eq!((weight.code(1, 3), weight.code(2, 4)), (-8, -2));
        assert_eq!(weight.bytes(), 8 + 6 * 4);
        let eight = IntParts {
            codes: vec![0x80, 0xff, 0x00, 0x7f],
            bits: IntBits::Eight,
            rows: 2,
            cols: 2,
            group_size: 2,
            group_of: None,
            scales: vec![0.5, 2.0],
            zeros: None,
            outliers: None,
            activations: None,
        };
        let weight = QuantizedInt::from_parts(eight.clone()).unwrap();
        assert_eq!(all(&weight), [-64.0, -0.5, 0.0, 254.0]);
        let unsigned = QuantizedInt::from_parts(IntParts { zeros: Some(vec![128.0; 2]), ..eight }).unwrap();
        assert_eq!(all(&unsigned), [0.0, 63.5, -256.0, -2.0]);
        assert_eq!(unsigned.code(0, 1), 255);
    }

    #[test]
    fn columns_in_any_order_and_outliers() {
        let outliers = OutlierColumns {
            columns: vec![1, 4],
            values: PlainData::Bf16([1.5, -2.5, 3.5, -4.5, 5.5, -6.5].map(bf16::from_f32).to_vec()),
        };
        let changed = IntParts { group_of: Some(vec![1, 0, 1, 0, 1]), outliers: Some(outliers), ..parts() };
        let weight = QuantizedInt::from_parts(changed).unwrap();
        #[rustfmt::skip]
        let expected = [
            -10.0, 1.5, 10.0, 3.0, -2.5,
            5.0, 3.5, 7.0, 8.0, -4.5,
            1.0, 5.5, 2.0, 10.0, -6.5,
        ];
        assert_eq!(all(&weight), expected);
        assert_eq!(weight.bytes(), 8 + 6 * 4 + 6 * 4 + 5 * 2 + 2 * 4 + 6 * 2);
        assert_eq!(weight.exact_columns(), [1, 4]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let check = |change: &dyn Fn(&mut IntParts)| {
            let mut parts = parts();
            change(&mut parts);
            QuantizedInt::from_parts(parts).map_err(|error| error.to_string())
        };
        check(&|_| ()).unwrap();
        assert!(check(&|p| p.codes.truncate(7)).unwrap_err().contains("need 8 bytes of codes, got 7"));
        assert!(check(&|p| p.rows = usize::MAX).unwrap_err().contains("more than memory"));
        assert!(check(&|p| p.scales.truncate(5)).unwrap_err().contains("5 scales"));
        assert!(check(&|p| p.scales.clear()).unwrap_err().contains("0 scales"));
        assert!(check(&|p| p.group_size = 0).unwrap_err().contains("group_size is 0"));
        assert!(check(&|p| p.group_size = 5).unwrap_err().contains("need 1 scales a row, got 2"));
        assert!(check(&|p| p.scales[3] = f32::NAN).unwrap_err().contains("the scale of row 1, group 1 is NaN"));
        assert!(check(&|p| p.zeros = Some(vec![0.0])).unwrap_err().contains("1 zeros for 6"));
        assert!(check(&|p| p.zeros.as_mut().unwrap()[0] = f32::INFINITY).unwrap_err().contains("the zero of row 0"));
        assert!(check(&|p| p.group_of = Some(vec![0; 4])).unwrap_err().contains("4 entries for 5"));
        assert!(
            check(&|p| p.group_of = Some(vec![0, 1, 2, 0, 0])).unwrap_err().contains("column 2 is in group 2 of 2")
        );
        let outliers = |columns: Vec<u32>, n| {
            let values = PlainData::Bf16(vec![bf16::ONE; n]);
            check(&move |p| p.outliers = Some(OutlierColumns { columns: columns.clone(), values: values.clone() }))
        };
        outliers(vec![0, 4], 6).unwrap();
        assert!(outliers(vec![4, 0], 6).unwrap_err().contains("must ascend"));
        assert!(outliers(vec![5], 3).unwrap_err().contains("below 5"));
        assert!(outliers(vec![0], 2).unwrap_err().contains("got 2"));
        let threshold = |threshold| check(&move |p| p.activations = Some(Int8Activations { threshold }));
        threshold(6.0).unwrap();
        assert!(threshold(f32::NAN).is_err() && threshold(-1.0).is_err());
    }

    #[test]
    #[should_panic(expected = "rows 1..4 of 3")]
    fn rows_outside_are_a_bug() {
        QuantizedInt::from_parts(parts()).unwrap().dequantize_rows(1..4, &mut [0.0; 15]);
    }
}
