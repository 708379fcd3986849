//! Plain weights to integer codes, by rounding to the nearest step (ties to even).
//!
//! ```text
//! symmetric   scale = max |w| / (2^(bits-1) - 1)        code = round(w / scale)
//! zero point  scale = (max(w, 0) - min(w, 0)) / (2^bits - 1)
//!             zero  = round(-min(w, 0) / scale)         code = round(w / scale) + zero, kept within 0..2^bits
//! LLM.int8    w     = f16(w)                            code = round(w * (127 / max |w|)), scale = max |w| * f32(1 / 127)
//! ```
//!
//! over each group of columns of a row; LLM.int8's group is the row. All three come back within half a step of `w` (of
//! f16(w)), up to f32 rounding. A group of zeros has scale 0. The LLM.int8 formulas are bitsandbytes', operation by
//! operation, so that codes and scales are the same bits.

use half::f16;
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::encode::LARGEST;
use super::int_parts::{IntBits, IntParts, OutlierColumns, check_columns};
use super::quantized_int::QuantizedInt;
use crate::error::{Error, Result};
use crate::parallel::rows_per_task;
use crate::weight::{Int8Activations, PlainData};

const OP: &str = "quantize_int";

/// The parameters of integer quantization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntConfig {
    /// The width of a code.
    pub bits: IntBits,
    /// Neighbouring columns that share a scale; none for whole rows. The last group of a row may be smaller.
    pub group_size: Option<usize>,
    /// Whether groups have a zero point, so that their codes span from the least to the largest value; without, codes are
    /// symmetric around 0.
    pub zero_point: bool,
}

/// 4 bits in groups of 128 with zero points: AWQ's and GPTQ's usual shape.
impl Default for IntConfig {
    fn default() -> Self {
        Self { bits: IntBits::Four, group_size: Some(128), zero_point: true }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Scheme {
    Uniform(IntConfig),
    LlmInt8 { threshold: f32 },
}

impl Scheme {
    fn config(self) -> IntConfig {
        match self {
            Self::Uniform(config) => config,
            Self::LlmInt8 { .. } => IntConfig { bits: IntBits::Eight, group_size: None, zero_point: false },
        }
    }
}

pub(super) fn quantize(
    data: &PlainData,
    rows: usize,
    cols: usize,
    scheme: Scheme,
    outliers: &[u32],
) -> Result<QuantizedInt> {
    let IntConfig { bits, group_size, zero_point } = scheme.config();
    if rows.checked_mul(cols) != Some(data.len()) {
        return Err(Error::invalid(OP, format!("got {} elements for {rows} x {cols}", data.len())));
    }
    if group_size == Some(0) {
        return Err(Error::invalid(OP, "group_size is 0"));
    }
    check_columns(outliers, cols)?;
    let group_size = group_size.unwrap_or(cols).min(cols).max(1);
    let groups = cols.div_ceil(group_size);
    let mut codes = vec![0u8; bits.bytes(rows * cols)];
    let mut scales = vec![0f32; rows * groups];
    let mut zeros = vec![0f32; if zero_point { rows * groups } else { 0 }];
    // Whole bytes for each task: an even number of rows.
    let task = rows_per_task(cols).next_multiple_of(2);
    let zero_task = if zero_point { task * groups } else { 1 };
    let no_zeros = rayon::iter::repeat_n((), if zero_point { 0 } else { rows.div_ceil(task) });
    let tasks = codes.par_chunks_mut(bits.bytes(task * cols).max(1)).zip(scales.par_chunks_mut((task * groups).max(1)));
    let run =
        |index: usize, codes: &mut [u8], scales: &mut [f32], mut zeros: Option<&mut [f32]>| -> Option<(usize, f32)> {
            let (mut row, mut wide) = (vec![0f32; cols], vec![0u8; cols * task]);
            let here = scales.len() / groups;
            for r in 0..here {
                let at = (index * task + r) * cols;
                data.to_f32(at..at + cols, &mut row);
                if let Some(c) = row.iter().position(|x| !x.is_finite() || x.abs() > LARGEST) {
                    return Some((at + c, row[c]));
                }
                outliers.iter().for_each(|&column| row[column as usize] = 0.0);
                let out = &mut wide[r * cols..(r + 1) * cols];
                for (g, (values, codes)) in row.chunks_mut(group_size).zip(out.chunks_mut(group_size)).enumerate() {
                    let i = r * groups + g;
                    match scheme {
                        Scheme::LlmInt8 { .. } => {
                            if let Some(c) = values.iter().position(|x| !f16::from_f32(*x).is_finite()) {
                                return Some((at + g * group_size + c, values[c]));
                            }
                            scales[i] = llm_int8(values, codes);
                        }
                        Scheme::Uniform(_) => match &mut zeros {
                            Some(zeros) => (scales[i], zeros[i]) = asymmetric(values, codes, bits),
                            None => scales[i] = symmetric(values, codes, bits),
                        },
                    }
                }
            }
            let wide = &wide[..here * cols];
            match bits {
                IntBits::Eight => codes.copy_from_slice(wide),
                IntBits::Four => {
                    for (byte, pair) in codes.iter_mut().zip(wide.chunks(2)) {
                        *byte = (pair[0] & 15) << 4 | pair.get(1).map_or(0, |code| code & 15);
                    }
                }
            }
            None
        };
    let failure = if zero_point {
        tasks
            .zip(zeros.par_chunks_mut(zero_task.max(1)))
            .enumerate()
            .filter_map(|(i, ((codes, scales), zeros))| run(i, codes, scales, Some(zeros)))
            .min_by_key(|(at, _)| *at)
    } else {
        tasks
            .zip(no_zeros)
            .enumerate()
            .filter_map(|(i, ((codes, scales), ()))| run(i, codes, scales, None))
            .min_by_key(|(at, _)| *at)
    };
    if let Some((at, value)) = failure {
        let why = match scheme {
            _ if !value.is_finite() => String::new(),
            Scheme::LlmInt8 { .. } => "; LLM.int8 holds at most f16's 65504".to_owned(),
            Scheme::Uniform(_) => format!("; integers hold at most {LARGEST:e}"),
        };
        return Err(Error::invalid(OP, format!("row {}, column {} is {value}{why}", at / cols, at % cols)));
    }
    QuantizedInt::from_parts(IntParts {
        codes,
        bits,
        rows,
        cols,
        group_size,
        group_of: None,
        scales,
        zeros: zero_point.then_some(zeros),
        outliers: (!outliers.is_empty()).then(|| keep(data, rows, cols, outliers)).transpose()?,
        activations: match scheme {
            Scheme::LlmInt8 { threshold } => Some(Int8Activations { threshold }),
            Scheme::Uniform(_) => None,
        },
    })
}

/// The given columns in 16 bits.
fn keep(data: &PlainData, rows: usize, cols: usize, columns: &[u32]) -> Result<OutlierColumns> {
    let places = (0..rows).flat_map(|row| columns.iter().map(move |&column| row * cols + column as usize));
    let narrow = |(i, x): (usize, f32)| match f16::from_f32(x) {
        y if y.is_finite() => Ok(y),
        _ => Err(Error::invalid(OP, format!("row {}, column {} is {x}; f16 holds at most 65504", i / cols, i % cols))),
    };
    let values = match data {
        PlainData::Bf16(data) => PlainData::Bf16(places.map(|i| data[i]).collect()),
        PlainData::F16(data) => PlainData::F16(places.map(|i| data[i]).collect()),
        PlainData::F32(data) => PlainData::F16(places.map(|i| narrow((i, data[i]))).collect::<Result<_>>()?),
    };
    Ok(OutlierColumns { columns: columns.to_vec(), values })
}

fn symmetric(values: &[f32], codes: &mut [u8], bits: IntBits) -> f32 {
    let top = ((1u16 << (bits.bits() - 1)) - 1) as f32;
    let scale = values.iter().fold(0f32, |m, x| m.max(x.abs())) / top;
    for (code, &x) in codes.iter_mut().zip(values) {
        // 0 / 0 of a group of zeros is NaN, which `as` makes 0.
        *code = (x / scale).round_ties_even().clamp(-top, top) as i8 as u8;
    }
    scale
}

fn asymmetric(values: &[f32], codes: &mut [u8], bits: IntBits) -> (f32, f32) {
    let top = ((1u16 << bits.bits()) - 1) as f32;
    let (low, high) = values.iter().fold((0f32, 0f32), |(low, high), &x| (low.min(x), high.max(x)));
    let scale = (high - low) / top;
    if scale == 0.0 {
        codes.fill(0);
        return (0.0, 0.0);
    }
    let zero = (-low / scale).round_ties_even().clamp(0.0, top);
    for (code, &x) in codes.iter_mut().zip(values) {
        *code = ((x / scale).round_ties_even() + zero).clamp(0.0, top) as u8;
    }
    (scale, zero)
}

fn llm_int8(values: &mut [f32], codes: &mut [u8]) -> f32 {
    values.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
    let absmax = values.iter().fold(0f32, |m, x| m.max(x.abs()));
    let factor = 127.0 / absmax;
    for (code, &x) in codes.iter_mut().zip(&*values) {
        *code = (x * factor).round_ties_even() as i8 as u8;
    }
    absmax * (1.0 / 127.0)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::testing::random;
    use crate::weight::FrozenWeight;

    fn decode(weight: &QuantizedInt) -> Vec<f32> {
        let mut out = vec![f32::NAN; weight.rows() * weight.cols()];
        weight.dequantize_rows(0..weight.rows(), &mut out);
        out
    }

    const CONFIGS: [IntConfig; 6] = [
        IntConfig { bits: IntBits::Four, group_size: Some(32), zero_point: true },
        IntConfig { bits: IntBits::Four, group_size: Some(5), zero_point: false },
        IntConfig { bits: IntBits::Four, group_size: None, zero_point: false },
        IntConfig { bits: IntBits::Eight, group_size: Some(7), zero_point: true },
        IntConfig { bits: IntBits::Eight, group_size: None, zero_point: false },
        IntConfig { bits: IntBits::Eight, group_size: Some(1), zero_point: true },
    ];

    /// Half a step of the element's own group, and some roundings of f32.
    fn check(values: &[f32], rows: usize, cols: usize, config: &IntConfig) {
        let weight = QuantizedInt::quantize(&PlainData::F32(values.to_vec()), rows, cols, config).unwrap();
        let group_size = config.group_size.unwrap_or(cols).min(cols).max(1);
        for (i, (back, x)) in decode(&weight).iter().zip(values).enumerate() {
            let scale = weight.parts().scales[i / cols * weight.groups() + i % cols / group_size];
            let bound = 0.5 * scale * (1.0 + 1e-4) + 4.0 * f32::EPSILON * x.abs() + f32::MIN_POSITIVE;
            assert!((back - x).abs() <= bound, "{config:?}, element {i}: {x} came back as {back}, step {scale}");
        }
    }

    #[test]
    fn errors_stay_within_half_a_step() {
        for config in &CONFIGS {
            for (rows, cols) in [(1, 1), (3, 7), (7, 33), (2, 576), (170, 101)] {
                let values = random(rows as u64)(rows * cols);
                check(&values, rows, cols, config);
                check(&values.iter().map(|x| x + 3.0).collect::<Vec<_>>(), rows, cols, config);
                check(&values.iter().map(|x| x.abs() * -1e-3).collect::<Vec<_>>(), rows, cols, config);
            }
        }
    }

    #[test]
    fn constant_rows_come_back_and_zeros_stay_zeros() {
        for config in &CONFIGS {
            for value in [0.3f32, -0.3, 1e-30, -2e30, 8e37, -8e37] {
                let values = vec![value; 4 * 9];
                let weight = QuantizedInt::quantize(&PlainData::F32(values), 4, 9, config).unwrap();
                for back in decode(&weight) {
                    assert!((back / value - 1.0).abs() < 1e-6, "{config:?}: {value} came back as {back}");
                }
            }
            let mut values = random(5)(6 * 9);
            values[9..27].fill(0.0);
            let weight = QuantizedInt::quantize(&PlainData::F32(values), 6, 9, config).unwrap();
            assert_eq!(decode(&weight)[9..27], [0.0; 18], "{config:?}");
        }
        let weight = QuantizedInt::llm_int8(&PlainData::F32(vec![0.0; 8]), 2, 4, 6.0, &[]).unwrap();
        assert_eq!(decode(&weight), [0.0; 8]);
    }

    #[test]
    fn the_whole_span_is_used() {
        let data = PlainData::F32((0..16).map(|i| i as f32 * 0.5 - 2.0).collect());
        let weight = QuantizedInt::quantize(&data, 1, 16, &IntConfig::default()).unwrap();
        assert_eq!(weight.parts().codes, [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
        assert_eq!((weight.parts().scales[0], weight.parts().zeros.as_ref().unwrap()[0]), (0.5, 4.0));
        let config = IntConfig { zero_point: false, ..IntConfig::default() };
        let weight = QuantizedInt::quantize(&PlainData::F32(vec![-7.0, 7.0, 0.5, 1.5, -3.4]), 1, 5, &config).unwrap();
        assert_eq!((0..5).map(|c| weight.code(0, c)).collect::<Vec<_>>(), [-7, 7, 0, 2, -3]);
    }

    #[test]
    fn llm_int8_is_that_of_bitsandbytes() {
        // By bitsandbytes 0.50.2: functional.int8_vectorwise_quant on the CPU.
        let data = PlainData::F32(vec![0.1, -0.2, 0.33, 0.0499, 1.0, -3.0, 2.9999, 0.0118]);
        let weight = QuantizedInt::llm_int8(&data, 2, 4, 6.0, &[]).unwrap();
        let codes: Vec<i8> = weight.parts().codes.iter().map(|&code| code as i8).collect();
        assert_eq!(codes, [38, -77, 127, 19, 42, -127, 127, 0]);
        assert_eq!(weight.parts().scales, [0.330_078_13 * (1.0 / 127.0), 3.0 * (1.0 / 127.0)]);
        assert_eq!(weight.int8_activations(), Some(Int8Activations { threshold: 6.0 }));
    }

    #[test]
    fn outlier_columns_do_not_stretch_the_scale() {
        let mut values = random(9)(4 * 10);
        (0..4).for_each(|row| values[row * 10 + 3] = 1000.0 + row as f32);
        let data = PlainData::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect());
        let config = IntConfig { bits: IntBits::Eight, group_size: None, zero_point: false };
        let weight = QuantizedInt::quantize_except(&data, 4, 10, &config, &[3]).unwrap();
        assert!(weight.parts().scales.iter().all(|&scale| scale < 4.0 / 127.0));
        let back = decode(&weight);
        (0..4).for_each(|row| assert_eq!(back[row * 10 + 3], bf16::from_f32(1000.0 + row as f32).to_f32()));
        let int8 = QuantizedInt::llm_int8(&data, 4, 10, 6.0, &[3]).unwrap();
        assert_eq!(int8.exact_columns(), [3]);
        let error = QuantizedInt::quantize_except(&data, 4, 10, &config, &[10]).unwrap_err().to_string();
        assert!(error.contains("below 10"), "{error}");
        let error = QuantizedInt::quantize_except(&PlainData::F32(vec![1e6; 2]), 1, 2, &config, &[1]).unwrap_err();
        assert!(error.to_string().contains("row 0, column 1 is 1000000"), "{error}");
    }

    #[test]
    fn values_that_cannot_be_quantized_are_named() {
        for config in &CONFIGS {
            let mut values = vec![1.0; 300 * 100];
            values[250 * 100 + 3] = f32::NAN;
            values[299 * 100] = f32::INFINITY;
            let error = QuantizedInt::quantize(&PlainData::F32(values), 300, 100, config).unwrap_err().to_string();
            assert!(error.contains("row 250, column 3 is NaN"), "{error}");
        }
        let error = QuantizedInt::llm_int8(&PlainData::F32(vec![0.0, 7e4]), 1, 2, 6.0, &[]).unwrap_err().to_string();
        assert!(error.contains("column 1 is 70000; LLM.int8 holds at most"), "{error}");
        let five = PlainData::F32(vec![0.0; 5]);
        let error = QuantizedInt::quantize(&five, 2, 3, &CONFIGS[0]).unwrap_err().to_string();
        assert!(error.contains("got 5 elements for 2 x 3"), "{error}");
        let config = IntConfig { group_size: Some(0), ..IntConfig::default() };
        assert!(QuantizedInt::quantize(&five, 1, 5, &config).is_err());
        let empty = QuantizedInt::quantize(&PlainData::F32(Vec::new()), 0, 7, &IntConfig::default()).unwrap();
        assert_eq!(empty.bytes(), 0);
    }
}
