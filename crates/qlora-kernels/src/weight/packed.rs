//! A frozen weight as one piece of bytes, in which it travels where a device does not hold the whole base.
//!
//! The piece holds the weight's arrays one behind the other, each at a multiple of [`ALIGN`] bytes:
//!
//! ```text
//! plain                      elements
//! 4 bits                     codes | absmax (f32)
//! 4 bits, double quantized   codes | absmax codes | map of the codes (256 f32) | scales (f32)
//! ```
//!
//! Numbers that kernels take as arguments (shape, block sizes, the offset of the absmax values) are in the [`PackedForm`], which every
//! process has of every weight. The bytes are those of the weight in memory, so a weight that has travelled gives the same bits.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::quant::{Absmax, NestedAbsmax, Parts, QuantConfig, QuantType, Quantized4bit};
use crate::weight::{FrozenWeight, PlainData, PlainWeight};

/// The alignment of a weight and of each of its arrays, in bytes.
pub const ALIGN: usize = 256;

const OP: &str = "packed weight";

/// All of a weight but its arrays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PackedForm {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Its storage.
    pub kind: PackedKind,
}

/// The storage of a weight that can travel.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum PackedKind {
    /// Not quantized.
    Plain(Dtype),
    /// In 4 bits.
    Bits4 {
        /// The 4-bit type.
        quant_type: QuantType,
        /// Elements that share an absmax.
        blocksize: usize,
        /// The dtype of the weight before quantization, where it is known.
        source_dtype: Dtype,
        /// Of doubly quantized absmax values: their offset, and how many share a scale.
        nested: Option<(f32, usize)>,
    },
}

/// A weight's form and its arrays.
#[derive(Clone, Debug)]
pub struct Packed<'a> {
    /// The rest of it.
    pub form: PackedForm,
    /// The arrays in the order of the piece.
    pub arrays: Vec<&'a [u8]>,
}

impl Packed<'_> {
    /// The piece.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.form.bytes()];
        for (place, array) in self.form.arrays().into_iter().zip(&self.arrays) {
            bytes[place].copy_from_slice(array);
        }
        bytes
    }
}

impl PackedForm {
    /// The form that quantization by `config` gives a weight (whose values decide its offset).
    pub fn quantized(rows: usize, cols: usize, config: &QuantConfig) -> Self {
        let QuantConfig { quant_type, blocksize, double_quant } = *config;
        let nested = double_quant.then_some((0.0, NestedAbsmax::BLOCKSIZE));
        Self { rows, cols, kind: PackedKind::Bits4 { quant_type, blocksize, source_dtype: Dtype::Bf16, nested } }
    }

    /// The places of the arrays in the piece, in bytes.
    pub fn arrays(&self) -> Vec<Range<usize>> {
        const MAP: usize = 256;
        let n = self.rows * self.cols;
        let sizes = match self.kind {
            PackedKind::Plain(dtype) => vec![n * dtype.size()],
            PackedKind::Bits4 { blocksize, nested, .. } => {
                let blocks = n.div_ceil(blocksize);
                match nested {
                    None => vec![n.div_ceil(2), 4 * blocks],
                    Some((_, nested)) => vec![n.div_ceil(2), blocks, 4 * MAP, 4 * blocks.div_ceil(nested)],
                }
            }
        };
        let mut start = 0usize;
        let place = |size: usize| {
            let place = start..start + size;
            start = place.end.next_multiple_of(ALIGN);
            place
        };
        sizes.into_iter().map(place).collect()
    }

    /// The length of the piece, a multiple of [`ALIGN`].
    pub fn bytes(&self) -> usize {
        self.arrays().last().map_or(0, |last| last.end.next_multiple_of(ALIGN))
    }

    /// Elements that share an absmax, where the weight has 4 bits and blocks do not cross rows.
    pub fn row_blocks_of_4bit(&self) -> Option<usize> {
        match self.kind {
            PackedKind::Bits4 { blocksize, .. } => Some(blocksize).filter(|&size| self.cols.is_multiple_of(size)),
            PackedKind::Plain(_) => None,
        }
    }

    /// The weight of a piece, in host memory.
    ///
    /// # Errors
    /// If the piece has another length, or holds values that no weight has.
    pub fn unpack(&self, piece: &[u8]) -> Result<Arc<dyn FrozenWeight>> {
        if piece.len() != self.bytes() {
            return Err(Error::invalid(OP, format!("{} bytes, expected {}", piece.len(), self.bytes())));
        }
        let arrays = self.arrays();
        let array = |index: usize| &piece[arrays[index].clone()];
        let floats = |index: usize| {
            array(index).as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect::<Vec<_>>()
        };
        let halves = || array(0).as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
        let Self { rows, cols, kind } = *self;
        Ok(match kind {
            PackedKind::Plain(dtype) => {
                let data = match dtype {
                    Dtype::F32 => PlainData::F32(floats(0)),
                    Dtype::Bf16 => PlainData::Bf16(halves().map(bf16::from_bits).collect()),
                    Dtype::F16 => PlainData::F16(halves().map(f16::from_bits).collect()),
                };
                Arc::new(PlainWeight::new(data, rows, cols))
            }
            PackedKind::Bits4 { quant_type, blocksize, source_dtype, nested } => {
                let codes = array(0).to_vec();
                let absmax = match nested {
                    None => Absmax::Plain(floats(1)),
                    Some((offset, blocksize)) => Absmax::Nested(NestedAbsmax {
                        codes: array(1).to_vec(),
                        quant_map: floats(2),
                        absmax: floats(3),
                        offset,
                        blocksize,
                    }),
                };
                let parts = Parts { codes, absmax, rows, cols, quant_type, blocksize, source_dtype };
                Arc::new(Quantized4bit::from_parts(parts)?)
            }
        })
    }

    /// The form as numbers, to be sent to another process.
    pub fn to_words(&self) -> [u64; 8] {
        let dtype = |dtype| match dtype {
            Dtype::F32 => 0,
            Dtype::Bf16 => 1,
            Dtype::F16 => 2,
        };
        let [rows, cols] = [self.rows, self.cols].map(|n| n as u64);
        match self.kind {
            PackedKind::Plain(of) => [rows, cols, 0, dtype(of), 0, 0, 0, 0],
            PackedKind::Bits4 { quant_type, blocksize, source_dtype, nested } => {
                let quant_type = match quant_type {
                    QuantType::Nf4 => 1,
                    QuantType::Fp4 => 2,
                };
                let (offset, nested) = nested.map_or((0, 0), |(offset, size)| (u64::from(offset.to_bits()), size));
                [rows, cols, quant_type, dtype(source_dtype), blocksize as u64, nested as u64, offset, 0]
            }
        }
    }

    /// The form of [`Self::to_words`].
    ///
    /// # Errors
    /// If it is none.
    pub fn from_words(words: [u64; 8]) -> Result<Self> {
        let wrong = || Error::invalid(OP, format!("{words:?} is no form of a weight"));
        let [rows, cols, kind, dtype, blocksize, nested, offset, _] = words;
        let size = |n: u64| usize::try_from(n).ok().filter(|&n| n < 1 << 40).ok_or_else(wrong);
        let dtype = match dtype {
            0 => Dtype::F32,
            1 => Dtype::Bf16,
            2 => Dtype::F16,
            _ => return Err(wrong()),
        };
        let quant_type = match kind {
            0 => None,
            1 => Some(QuantType::Nf4),
            2 => Some(QuantType::Fp4),
            _ => return Err(wrong()),
        };
        let kind = match quant_type {
            None => PackedKind::Plain(dtype),
            Some(quant_type) => {
                let blocksize = size(blocksize)?;
                crate::quant::check_blocksize(OP, blocksize)?;
                let offset = f32::from_bits(u32::try_from(offset).map_err(|_| wrong())?);
                let nested = (nested > 0).then(|| size(nested).map(|nested| (offset, nested))).transpose()?;
                PackedKind::Bits4 { quant_type, blocksize, source_dtype: dtype, nested }
            }
        };
        let (rows, cols) = (size(rows)?, size(cols)?);
        rows.checked_mul(cols).filter(|n| *n < 1 << 48).ok_or_else(wrong)?;
        Ok(Self { rows, cols, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(rows: usize, cols: usize) -> PlainData {
        PlainData::F32((0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect())
    }

    fn values(weight: &dyn FrozenWeight) -> Vec<u32> {
        let mut out = vec![0.0; weight.rows() * weight.cols()];
        weight.dequantize_rows(0..weight.rows(), &mut out);
        out.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn a_weight_is_the_same_after_its_journey() {
        // An odd number of blocks and elements, a partial block.
        let (rows, cols) = (7, 99);
        let mut all: Vec<Arc<dyn FrozenWeight>> = vec![Arc::new(PlainWeight::new(data(rows, cols), rows, cols))];
        for (quant_type, double_quant) in [(QuantType::Nf4, true), (QuantType::Nf4, false), (QuantType::Fp4, true)] {
            let config = QuantConfig { quant_type, double_quant, ..QuantConfig::default() };
            all.push(Arc::new(Quantized4bit::quantize(&data(rows, cols), rows, cols, &config).unwrap()));
            let expected = PackedForm::quantized(rows, cols, &config);
            let form = all.last().unwrap().packed().unwrap().form;
            assert_eq!((form.bytes(), form.arrays()), (expected.bytes(), expected.arrays()));
        }
        let half: Vec<f16> = (0..rows * cols).map(|i| f16::from_f32(i as f32 / 8.0)).collect();
        all.push(Arc::new(PlainWeight::new(PlainData::F16(half), rows, cols)));
        for weight in all {
            let packed = weight.packed().unwrap();
            let piece = packed.to_bytes();
            assert!(piece.len().is_multiple_of(ALIGN));
            let form = PackedForm::from_words(packed.form.to_words()).unwrap();
            assert_eq!(form, packed.form);
            assert_eq!(values(&*form.unpack(&piece).unwrap()), values(&*weight), "{weight:?}");
            assert_eq!(form.unpack(&piece).unwrap().row_blocks_of_4bit(), form.row_blocks_of_4bit());
            assert!(form.unpack(&piece[1..]).is_err());
        }
    }

    #[test]
    fn numbers_that_are_no_form_are_refused() {
        let form = PackedForm::quantized(8, 64, &QuantConfig::default()).to_words();
        for (place, value) in [(0, u64::MAX), (2, 9), (3, 7), (4, 5), (6, u64::MAX)] {
            let mut words = form;
            words[place] = value;
            assert!(PackedForm::from_words(words).is_err(), "{words:?}");
        }
    }
}
