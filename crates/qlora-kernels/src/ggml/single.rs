//! Blocks of 32 elements: a scale, or a scale and a minimum of either sign, in f16.
//!
//! The code of element i is in the low nibble of byte i, that of element i + 16 in its high one; a fifth bit is bit i of 4 bytes
//! before them.

use half::f16;

use super::lanes::{self, STEPS, TINY, error, moments, squares, sums};
use super::{BlockType, EXACT, SINGLE, scaled, stored};

type Block = [f32; SINGLE];

/// `x ~ d (q - half)`: q4_0 with half 8, q5_0 with 16. Whether d fits f16.
#[inline(always)]
pub(super) fn around_zero(x: &Block, w: &Block, half: u8, out: &mut [u8]) -> bool {
    let (low, high) = (-f32::from(half), f32::from(half) - 1.0);
    let (mut d_stored, mut d) = stored(scaled::scale(x, w, low, high));
    let mut least = error(x, w, d, 0.0, low, high);
    for _ in 0..3 {
        let sums = sums(x, w, 0.0, lanes::inverse(d), low, high);
        let neighbours = [f16::from_bits(d_stored.to_bits() ^ 1), stored(sums.xq / sums.qq).0];
        let before = least;
        for half in neighbours.into_iter().filter(|half| half.is_finite()) {
            let error = error(x, w, half.to_f32(), 0.0, low, high);
            if error < least {
                (d_stored, d, least) = (half, half.to_f32(), error);
            }
        }
        if least >= before {
            break;
        }
    }
    // All that is left is the rounding of d: other codes for the largest value round otherwise.
    if least > 0.0 && least < EXACT * squares(x, w) {
        let largest = x.iter().fold(0f32, |max, &x| if x.abs() > max.abs() { x } else { max });
        for code in (1..=half).map(f32::from) {
            for other in [stored(-largest / code), stored(largest / code)] {
                let error = error(x, w, other.1, 0.0, low, high);
                if error < least {
                    ((d_stored, d), least) = (other, error);
                }
            }
        }
    }
    let inverse = lanes::inverse(d);
    let mut codes = [0u8; SINGLE];
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = (lanes::code(x, 0.0, inverse, low, high) - low) as u8;
    }
    pack(&[d_stored], &codes, half > 8, out);
    d_stored.is_finite()
}

/// `x ~ d q + m`: q4_1 with codes up to 15, q5_1 up to 31. Whether d and m fit f16.
#[inline(always)]
pub(super) fn from_minimum(x: &Block, w: &Block, top: u8, out: &mut [u8]) -> bool {
    let high = f32::from(top);
    let (mut low_x, mut high_x) = (f32::INFINITY, f32::NEG_INFINITY);
    for &x in x {
        low_x = if x < low_x { x } else { low_x };
        high_x = if x > high_x { x } else { high_x };
    }
    let range = high_x - low_x;
    let (mut d, mut m) = (stored(range / high), stored(low_x));
    let mut least = error(x, w, d.1, -m.1, 0.0, high);
    if range > TINY {
        let moments = moments(x, w);
        for step in STEPS {
            let mut codes = (-low_x, (high + step) / range);
            for _ in 0..3 {
                let sums = sums(x, w, codes.0, codes.1, 0.0, high);
                let determinant = moments.0 * sums.qq - sums.q * sums.q;
                if !(determinant > 1e-5 * moments.0 * sums.qq) {
                    break;
                }
                let (next_d, next_m) = (
                    stored((moments.0 * sums.xq - moments.1 * sums.q) / determinant),
                    stored((sums.qq * moments.1 - sums.q * sums.xq) / determinant),
                );
                let error = error(x, w, next_d.1, -next_m.1, 0.0, high);
                if error < least {
                    (d, m, least) = (next_d, next_m, error);
                }
                codes = (-next_m.1, lanes::inverse(next_d.1));
            }
        }
    }
    let inverse = lanes::inverse(d.1);
    let mut codes = [0u8; SINGLE];
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = lanes::code(x, -m.1, inverse, 0.0, high) as u8;
    }
    pack(&[d.0, m.0], &codes, top > 15, out);
    d.0.is_finite() && m.0.is_finite()
}

#[inline(always)]
fn pack(scales: &[f16], codes: &[u8; SINGLE], fifth: bool, out: &mut [u8]) {
    let (head, rest) = out.split_at_mut(2 * scales.len());
    for (out, scale) in head.as_chunks_mut().0.iter_mut().zip(scales) {
        *out = scale.to_le_bytes();
    }
    let nibbles = match fifth {
        true => {
            let (high, nibbles) = rest.split_at_mut(4);
            let bits = codes.iter().enumerate().fold(0u32, |bits, (i, code)| bits | u32::from(code >> 4) << i);
            high.copy_from_slice(&bits.to_le_bytes());
            nibbles
        }
        false => rest,
    };
    for (i, byte) in nibbles.iter_mut().enumerate() {
        *byte = codes[i] & 0xf | codes[i + SINGLE / 2] << 4;
    }
}

/// Decodes one block.
pub(super) fn decode(kind: BlockType, block: &[u8], out: &mut [f32]) {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let (with_minimum, fifth) =
        (matches!(kind, BlockType::Q4_1 | BlockType::Q5_1), matches!(kind, BlockType::Q5_0 | BlockType::Q5_1));
    let rest = &block[if with_minimum { 4 } else { 2 }..];
    let (bits, nibbles) = match fifth {
        true => (u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]), &rest[4..]),
        false => (0, rest),
    };
    let zero = match kind {
        BlockType::Q4_0 => 8,
        BlockType::Q5_0 => 16,
        _ => 0,
    };
    let d = half(0);
    for (i, out) in out.iter_mut().enumerate() {
        let nibble = nibbles[i % (SINGLE / 2)] >> (4 * (i / (SINGLE / 2))) & 0xf;
        let code = i32::from(nibble) | ((bits >> i & 1) << 4) as i32;
        let value = d * (code - zero) as f32;
        *out = if with_minimum { value + half(2) } else { value };
    }
}
