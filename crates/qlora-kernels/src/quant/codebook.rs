//! The 16 values of each 4-bit type, and the thresholds between them.
//!
//! A scaled value `s` in [-1, 1] becomes a code by comparing it with thresholds, a code `c` stands for `values[c]`. All
//! of it is f32 and equal to the constants in bitsandbytes' compiled CUDA kernels, bit for bit.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A 4-bit data type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// 4-bit NormalFloat: quantiles of the normal distribution (QLoRA, arXiv 2305.14314).
    Nf4,
    /// 4-bit float: a sign, two exponent bits, one mantissa bit, scaled to [-1, 1].
    Fp4,
}

const NF4: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.091050036,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];

/// Code = the number of thresholds below `s`. Written as bits: three of them lie almost halfway between two floats and
/// are easily rounded to the wrong one on the way through an f64.
const NF4_THRESHOLDS: [f32; 15] = [
    f32::from_bits(0xbf59_1cd9), // -0.84809643
    f32::from_bits(0xbf1c_5270), // -0.6106329
    f32::from_bits(0xbeeb_8480), // -0.45999527
    f32::from_bits(0xbead_ea76), // -0.33967942
    f32::from_bits(0xbe70_3cec), // -0.2346074
    f32::from_bits(0xbe0d_38bc), // -0.13791174
    f32::from_bits(0xbd3a_7871), // -0.045525018
    f32::from_bits(0x3d22_faff), // 0.03979015
    f32::from_bits(0x3df6_4863), // 0.120255254
    f32::from_bits(0x3e50_67e0), // 0.20352125
    f32::from_bits(0x3e95_82d4), // 0.29201376
    f32::from_bits(0x3ec7_53f9), // 0.38931254
    f32::from_bits(0x3f00_6d03), // 0.5016634
    f32::from_bits(0x3f24_8daf), // 0.6427869
    f32::from_bits(0x3f5c_89d9), // 0.8614784
];

/// `{0, 1/16, 8, 12, 4, 6, 2, 3} / 12`, then the same with a minus sign.
const FP4: [f32; 16] = [
    0.0,
    0.0052083335,
    0.6666667,
    1.0,
    0.33333333,
    0.5,
    0.16666667,
    0.25,
    -0.0,
    -0.0052083335,
    -0.6666667,
    -1.0,
    -0.33333333,
    -0.5,
    -0.16666667,
    -0.25,
];

/// Between the magnitudes in ascending order.
const FP4_PIVOTS: [f32; 7] = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333];

impl QuantType {
    /// The value of each code.
    pub fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// The table that bitsandbytes writes into checkpoints as `quant_map`. It is [`Self::values`], but for FP4 its
    /// negative zero (code 8) is written as 0.
    pub fn quant_map(self) -> [f32; 16] {
        // -0.0 + 0.0 is 0.0; everything else stays.
        self.values().map(|value| value + 0.0)
    }

    /// `nf4` or `fp4`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }
}

/// The NF4 code of a scaled value; a NaN (0 times the reciprocal of 0) becomes code 0, as on the GPU.
#[inline(always)]
pub(super) fn encode_nf4(s: f32) -> u32 {
    // A binary search in selects: a loop over the thresholds is vectorized across them instead of across the values.
    let t = &NF4_THRESHOLDS;
    let bit3 = s > t[7];
    let bit2 = s > if bit3 { t[11] } else { t[3] };
    let bit1 = s > select(bit3, bit2, [t[1], t[5], t[9], t[13]]);
    let low = select(bit2, bit1, [t[0], t[2], t[4], t[6]]);
    let high = select(bit2, bit1, [t[8], t[10], t[12], t[14]]);
    let bit0 = s > if bit3 { high } else { low };
    u32::from(bit3) << 3 | u32::from(bit2) << 2 | u32::from(bit1) << 1 | u32::from(bit0)
}

/// The FP4 code of a scaled value; a NaN becomes code 0.
#[inline(always)]
pub(super) fn encode_fp4(s: f32) -> u32 {
    let (t, magnitude) = (&FP4_PIVOTS, s.abs());
    let bit2 = magnitude > t[3];
    let bit1 = magnitude > if bit2 { t[5] } else { t[1] };
    let bit0 = magnitude > select(bit2, bit1, [t[0], t[2], t[4], t[6]]);
    // Levels 0..7 are the codes 0, 1, 6, 7, 4, 5, 2, 3. The GPU flushes subnormals before it looks at the sign.
    let code = u32::from(bit2 != bit1) << 2 | u32::from(bit1) << 1 | u32::from(bit0);
    code | u32::from(s <= -f32::MIN_POSITIVE) << 3
}

#[inline(always)]
fn select(upper: bool, lower: bool, values: [f32; 4]) -> f32 {
    let [a, b, c, d] = values;
    if upper {
        if lower { d } else { c }
    } else if lower {
        b
    } else {
        a
    }
}

impl fmt::Display for QuantType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for QuantType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "nf4" => Ok(Self::Nf4),
            "fp4" => Ok(Self::Fp4),
            _ => {
                Err(Error::invalid("quant_type", format!("{name:?} is not a 4-bit type, expected \"nf4\" or \"fp4\"")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(quant_type: QuantType, s: f32) -> u8 {
        let code = match quant_type {
            QuantType::Nf4 => encode_nf4(s),
            QuantType::Fp4 => encode_fp4(s),
        };
        code as u8
    }

    fn next_up(x: f32) -> f32 {
        x.next_up()
    }

    #[test]
    fn every_value_is_its_own_code() {
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            for (c, &value) in quant_type.values().iter().enumerate() {
                let expected = if value == 0.0 && quant_type == QuantType::Fp4 { 0 } else { c };
                assert_eq!(code(quant_type, value), expected as u8, "{quant_type} {value}");
            }
        }
    }

    #[test]
    fn a_threshold_belongs_to_the_code_below() {
        for (c, &threshold) in NF4_THRESHOLDS.iter().enumerate() {
            assert_eq!(code(QuantType::Nf4, threshold), c as u8);
            assert_eq!(code(QuantType::Nf4, next_up(threshold)), c as u8 + 1);
            let [below, above] = [NF4[c], NF4[c + 1]];
            assert!((threshold - (below + above) / 2.0).abs() < 1e-7, "{threshold} is not between {below} and {above}");
        }
        let order = [0, 1, 6, 7, 4, 5, 2, 3];
        for (level, &pivot) in FP4_PIVOTS.iter().enumerate() {
            assert_eq!(code(QuantType::Fp4, pivot), order[level]);
            assert_eq!(code(QuantType::Fp4, next_up(pivot)), order[level + 1]);
            assert_eq!(code(QuantType::Fp4, -pivot), order[level] | 8);
            assert_eq!(code(QuantType::Fp4, -next_up(pivot)), order[level + 1] | 8);
            let [below, above] = [FP4[order[level] as usize], FP4[order[level + 1] as usize]];
            assert!((pivot - (below + above) / 2.0).abs() < 1e-6, "{pivot} is not between {below} and {above}");
        }
    }

    /// The thresholds as decimals, rounded once, are those bits.
    #[test]
    fn thresholds_are_the_published_decimals() {
        #[allow(clippy::excessive_precision)]
        let published: [f32; 15] = [
            -0.8480964004993439,
            -0.6106329262256622,
            -0.4599952697753906,
            -0.33967943489551544,
            -0.23460740596055984,
            -0.13791173323988914,
            -0.045525018125772476,
            0.03979014977812767,
            0.1202552504837513,
            0.2035212516784668,
            0.2920137718319893,
            0.3893125355243683,
            0.5016634166240692,
            0.6427869200706482,
            0.8614784178118011,
        ];
        assert_eq!(published.map(f32::to_bits), NF4_THRESHOLDS.map(f32::to_bits));
    }

    #[test]
    fn zeros_nan_and_subnormals() {
        assert_eq!(code(QuantType::Nf4, 0.0), 7);
        assert_eq!(code(QuantType::Nf4, -0.0), 7);
        assert_eq!(code(QuantType::Nf4, f32::NAN), 0);
        assert_eq!(code(QuantType::Fp4, f32::NAN), 0);
        assert_eq!(code(QuantType::Fp4, -0.0), 0);
        assert_eq!(code(QuantType::Fp4, -f32::MIN_POSITIVE), 8);
        assert_eq!(code(QuantType::Fp4, -f32::MIN_POSITIVE / 2.0), 0);
    }

    #[test]
    fn names_round_trip() {
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            assert_eq!(quant_type.name().parse::<QuantType>().unwrap(), quant_type);
        }
        assert!("int4".parse::<QuantType>().unwrap_err().to_string().contains("int4"));
        assert!(QuantType::Fp4.quant_map().iter().all(|value| *value != 0.0 || value.is_sign_positive()));
    }
}
