//! ggml's blocks of 32 weights, in the arithmetic of the `gguf` package's `quants.py` (0.19), which is that of ggml's
//! reference functions.
//!
//! ```text
//! q8_0  d = max|x| / 127         q = round(x (1/d)), halves away from zero   f16 d, 32 x i8
//! q4_0  d = (x of largest |x|) / -8    q = min(15, trunc(x (1/d) + 8.5))     f16 d, 16 bytes: q[i] | q[i+16] << 4
//! ```
//!
//! All in f32: the integers are made with the unrounded d, and only the stored one is rounded to f16. 1/d is 0 where d is.

use half::f16;

/// Elements of a block.
pub const BLOCK: usize = 32;
/// Bytes of a q8_0 block.
pub const Q8_0_BYTES: usize = 34;
/// Bytes of a q4_0 block.
pub const Q4_0_BYTES: usize = 18;

/// Quantizes `values` to q8_0 blocks.
///
/// # Panics
/// If `values` are no whole number of blocks, or `out` has another number of them.
pub fn q8_0(values: &[f32], out: &mut [u8]) {
    let blocks = pairs::<Q8_0_BYTES>(values, out);
    for (x, out) in blocks {
        let d = x.iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0;
        let (scale, codes) = out.split_at_mut(2);
        scale.copy_from_slice(&f16::from_f32(d).to_le_bytes());
        let inverse = inverse(d);
        for (code, x) in codes.iter_mut().zip(x) {
            *code = round_half_away(x * inverse) as i8 as u8;
        }
    }
}

/// Quantizes `values` to q4_0 blocks.
///
/// # Panics
/// As [`q8_0`].
pub fn q4_0(values: &[f32], out: &mut [u8]) {
    let blocks = pairs::<Q4_0_BYTES>(values, out);
    for (x, out) in blocks {
        // Of equal magnitudes the first counts.
        let largest = x.iter().fold(x[0], |max, &x| if x.abs() > max.abs() { x } else { max });
        let d = largest / -8.0;
        let (scale, codes) = out.split_at_mut(2);
        scale.copy_from_slice(&f16::from_f32(d).to_le_bytes());
        let inverse = inverse(d);
        let code = |x: f32| ((x * inverse + 8.5) as u8).min(15);
        for (i, pair) in codes.iter_mut().enumerate() {
            *pair = code(x[i]) | code(x[i + BLOCK / 2]) << 4;
        }
    }
}

fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// numpy's floor-based rounding: halves away from zero.
fn round_half_away(x: f32) -> f32 {
    let magnitude = x.abs();
    let floor = magnitude.floor();
    (floor + (2.0 * (magnitude - floor)).floor()).copysign(x)
}

fn pairs<'a, const BYTES: usize>(
    values: &'a [f32],
    out: &'a mut [u8],
) -> impl Iterator<Item = (&'a [f32; BLOCK], &'a mut [u8; BYTES])> {
    let (blocks, rest) = values.as_chunks();
    assert!(rest.is_empty() && out.len() == blocks.len() * BYTES, "{} values for {} bytes", values.len(), out.len());
    blocks.iter().zip(out.as_chunks_mut().0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_by_hand() {
        // d = 127 / 127 = 1: the integers are the values, halves away from zero.
        let mut x = [0f32; BLOCK];
        x[..5].copy_from_slice(&[127.0, -0.5, 0.5, -2.4, 2.5]);
        let mut out = [0xaa; Q8_0_BYTES];
        q8_0(&x, &mut out);
        assert_eq!(out[..2], f16::ONE.to_le_bytes());
        assert_eq!(out[2..8].iter().map(|&b| b as i8).collect::<Vec<_>>(), [127, -1, 1, -2, 3, 0]);

        // The largest is 8 (before the equal -8): d = -1, so 8 becomes 0, -8 is clipped to 15, 0 is 8.
        let mut x = [0f32; BLOCK];
        (x[0], x[1], x[17]) = (8.0, -8.0, 3.0);
        let mut out = [0xaa; Q4_0_BYTES];
        q4_0(&x, &mut out);
        assert_eq!(out[..2], f16::NEG_ONE.to_le_bytes());
        assert_eq!(out[2..5], [0x80, 0x5f, 0x88]);
    }

    #[test]
    fn zeros_stay_zeros() {
        let mut out = [0xaa; Q8_0_BYTES];
        q8_0(&[0.0; BLOCK], &mut out);
        assert_eq!(out, [0; Q8_0_BYTES]);
        let mut out = [0xaa; Q4_0_BYTES];
        q4_0(&[0.0; BLOCK], &mut out);
        assert_eq!((&out[2..], f16::from_le_bytes([out[0], out[1]]).to_f32()), (&[0x88; 16][..], 0.0));
    }

    #[test]
    #[should_panic(expected = "33 values")]
    fn half_a_block_is_a_bug() {
        q8_0(&[0.0; 33], &mut [0; 68]);
    }
}
