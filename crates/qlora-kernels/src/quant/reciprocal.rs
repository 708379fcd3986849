//! The GPU's approximate reciprocal, bit for bit.
//!
//! bitsandbytes is compiled with `--use_fast_math`: its `1.0f / absmax` is one `MUFU.RCP` instruction, which is off by
//! one unit in the last place for 13% of the mantissas. Where a scaled value falls on a threshold, that decides the
//! code (FP4 from bf16 weights: 7 codes in 100,000), so this function computes what the instruction does:
//!
//! with the f32 `x = 2^e (1 + (2^16 s + l) / 2^23)`, `s` the upper 7 and `l` the lower 16 mantissa bits,
//! `1/x = 2^(-e-24) * ((c0[s] * 2^13 + 2023 - c1[s] * l + c2[s] * square(l)) >> 15)`, where `square(l)` is `l^2 / 2^17`
//! without the partial products below 2^17. Subnormals are zeros on both sides.
//!
//! Scheme: Oberman and Siu, "A high-performance area-efficient multifunction interpolator" (ARITH 2005). The
//! coefficients were recovered from the answers of an NVIDIA H100 by `scripts/fixtures/gpu_reciprocal.py`; the test
//! below compares all 2^23 mantissas with them.

/// 1 / x for x >= 0 as the GPU computes it: infinity for zeros and subnormals, 0 where the result would be subnormal.
#[inline(always)]
pub(super) fn reciprocal(x: f32) -> f32 {
    let bits = x.to_bits();
    let exponent = bits >> 23;
    if exponent == 0 {
        return f32::INFINITY;
    }
    let (c0, c1, c2) = COEFFICIENTS[(bits >> 16 & 127) as usize];
    let low = bits & 0xffff;
    let sum = (i64::from(c0) << 13) + 2023 - i64::from(c1) * i64::from(low) + i64::from(c2) * i64::from(square(low));
    // The sum is in [2^38, 2^39], so this has 24 significant bits: the conversion is exact.
    let significand = ((sum >> 15) as f32).to_bits();
    // The exponents: the significand carries 2^23 or 2^24 and stands for a value in [1/2, 1].
    let result = significand as i32 - ((exponent as i32 - 127 + 24) << 23);
    if result < 1 << 23 { 0.0 } else { f32::from_bits(result as u32) }
}

/// `l^2 >> 17` of a 16-bit number, summed from the partial products `bit i * bit j` of weight 2^17 and more.
#[inline(always)]
fn square(l: u32) -> u32 {
    let mut terms = [0u32; 16];
    for (i, term) in terms.iter_mut().enumerate() {
        // Bit i with itself (weight 2i) and with the bits j > i (weight i + j + 1), if it is set.
        let products = OWN[i] + ((l & OTHERS[i]) << (i + 1));
        *term = products & (l >> i & 1).wrapping_neg();
    }
    terms.iter().sum::<u32>() >> 17
}

/// The weight of bit i with itself, where it is kept.
const OWN: [u32; 16] = {
    let mut own = [0; 16];
    let mut i = 9;
    while i < 16 {
        own[i] = 1 << (2 * i);
        i += 1;
    }
    own
};

/// The bits j > i whose product with bit i is kept: i + j + 1 >= 17.
const OTHERS: [u32; 16] = {
    let mut others = [0; 16];
    let mut i = 1;
    while i < 16 {
        let first = if 16 - i > i + 1 { 16 - i } else { i + 1 };
        others[i] = 0xffff >> first << first;
        i += 1;
    }
    others
};

#[rustfmt::skip]
const COEFFICIENTS: [(u32, u16, u16); 128] = [
    (0x4000000, 65534, 1013), (0x3f80fe2, 64522, 989), (0x3f03f06, 63533, 966), (0x3e88cb5, 62567, 945),
    (0x3e0f83e, 61622, 923), (0x3d980f8, 60699, 902), (0x3d22638, 59797, 883), (0x3cae75a, 58914, 863),
    (0x3c3c3c4, 58051, 845), (0x3bcbade, 57207, 827), (0x3b5cc11, 56381, 809), (0x3aef6cb, 55572, 791),
    (0x3a83a85, 54781, 774), (0x3a196b4, 54007, 758), (0x39b0ad3, 53249, 742), (0x3949662, 52507, 727),
    (0x38e38e5, 51780, 711), (0x387f1e2, 51068, 696), (0x381c0e2, 50371, 682), (0x37ba572, 49688, 669),
    (0x3759f23, 49019, 656), (0x36fad89, 48363, 642), (0x369d037, 47721, 631), (0x36406ca, 47091, 618),
    (0x35e50d9, 46473, 605), (0x358ae06, 45868, 594), (0x3531dee, 45274, 582), (0x34da036, 44692, 572),
    (0x3483486, 44121, 561), (0x342da81, 43560, 549), (0x33d91d5, 43011, 540), (0x3385a2b, 42471, 529),
    (0x3333335, 41942, 519), (0x32e1ca1, 41423, 510), (0x3291620, 40913, 501), (0x3241f6b, 40412, 490),
    (0x31f3833, 39921, 482), (0x31a6034, 39439, 474), (0x3159724, 38965, 465), (0x310dcc1, 38500, 457),
    (0x30c30c5, 38043, 449), (0x30792f1, 37594, 441), (0x3030305, 37153, 433), (0x2fe80c2, 36720, 426),
    (0x2fa0bea, 36294, 418), (0x2f5a443, 35876, 412), (0x2f14992, 35464, 403), (0x2ecfb9e, 35060, 397),
    (0x2e8ba31, 34663, 390), (0x2e48511, 34272, 383), (0x2e05c0c, 33888, 377), (0x2dc3ef0, 33511, 371),
    (0x2d82d85, 33140, 366), (0x2d4279c, 32774, 358), (0x2d02d04, 32415, 353), (0x2cc3d8e, 32062, 348),
    (0x2c8590d, 31714, 341), (0x2c47f52, 31373, 337), (0x2c0b02e, 31036, 331), (0x2bceb78, 30705, 326),
    (0x2b93107, 30379, 320), (0x2b580b0, 30059, 316), (0x2b1da49, 29743, 310), (0x2ae3da9, 29432, 305),
    (0x2aaaaac, 29127, 302), (0x2a7212c, 28826, 297), (0x2a3a100, 28529, 291), (0x2a02a04, 28237, 287),
    (0x29cbc17, 27950, 283), (0x2995712, 27667, 279), (0x295fad6, 27388, 274), (0x292a73f, 27114, 271),
    (0x28f5c2b, 26843, 266), (0x28c197b, 26577, 263), (0x288df0e, 26314, 258), (0x285acc6, 26056, 256),
    (0x2828285, 25801, 251), (0x27f602a, 25550, 248), (0x27c459a, 25302, 243), (0x27932b6, 25058, 240),
    (0x2762764, 24818, 237), (0x2732388, 24581, 233), (0x2702705, 24348, 231), (0x26d31c1, 24117, 226),
    (0x26a43a1, 23890, 223), (0x2675c8d, 23667, 222), (0x2647c6b, 23446, 218), (0x261a322, 23228, 214),
    (0x25ed09a, 23014, 212), (0x25c04bb, 22802, 208), (0x2593f6b, 22593, 205), (0x2568098, 22388, 204),
    (0x253c827, 22184, 199), (0x2511604, 21984, 197), (0x24e6a19, 21787, 196), (0x24bc450, 21592, 193),
    (0x2492494, 21399, 189), (0x2468ad1, 21209, 186), (0x243f6f3, 21022, 184), (0x24168e3, 20837, 182),
    (0x23ee092, 20655, 180), (0x23c5de9, 20475, 178), (0x239e0d7, 20297, 175), (0x237694a, 20122, 173),
    (0x234f72e, 19949, 171), (0x2328a71, 19778, 169), (0x2302304, 19609, 166), (0x22dc0d3, 19443, 165),
    (0x22b63ce, 19278, 161), (0x2290be4, 19116, 160), (0x226b904, 18956, 159), (0x2246b1f, 18797, 155),
    (0x2222224, 18641, 154), (0x21fde04, 18487, 153), (0x21d9eaf, 18334, 150), (0x21b6418, 18184, 149),
    (0x2192e2c, 18035, 147), (0x216fcdf, 17888, 145), (0x214d024, 17743, 143), (0x212a7e8, 17600, 143),
    (0x2108423, 17458, 140), (0x20e64c4, 17318, 138), (0x20c49bd, 17180, 137), (0x20a3301, 17043, 135),
    (0x2082084, 16908, 133), (0x2061239, 16775, 132), (0x2040811, 16643, 131), (0x2020203, 16513, 130),
];

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn all_mantissas_agree_with_the_h100() {
        let mut hash = Sha256::new();
        let mut answers = Vec::new();
        for high in 0..128u32 {
            answers.clear();
            for low in 0..1 << 16 {
                answers.extend(reciprocal(f32::from_bits(0x3f80_0000 | high << 16 | low)).to_le_bytes());
            }
            hash.update(&answers);
        }
        let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(digest, "c408381446132e07fa5581e930dc33fb790bea7ec4276ef3621e322df2492a55");
    }

    #[test]
    fn exponents_and_limits() {
        for exponent in -126..=126 {
            let x = 2f32.powi(exponent);
            assert_eq!(reciprocal(x), x.recip());
            let y = 1.7f32 * x;
            let expected = if exponent == 126 { 0.0 } else { reciprocal(1.7) * 2f32.powi(-exponent) };
            assert_eq!(reciprocal(y), expected, "1.7 * 2^{exponent}");
        }
        assert_eq!(reciprocal(f32::from_bits(2f32.powi(126).to_bits() + 1)), 0.0, "seen on the H100");
        assert_eq!(reciprocal(f32::MAX), 0.0);
        assert_eq!(reciprocal(0.0), f32::INFINITY);
        assert_eq!(reciprocal(f32::MIN_POSITIVE / 2.0), f32::INFINITY);
    }
}
