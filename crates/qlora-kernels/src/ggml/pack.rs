//! The bytes of blocks of 256.
//!
//! ```text
//! q2_K   scales[16]: s | t << 4     codes[64]                          f16 d, f16 e
//! q3_K   third bits[32]             codes[64]     scales[12]           f16 d
//! q4_K   f16 d, f16 e               scales[12]    codes[128]
//! q5_K   f16 d, f16 e               scales[12]    fifth bits[32]       codes[128]
//! q6_K   low nibbles[128]           high pairs[64]                     scales[16]: i8    f16 d
//! ```
//!
//! Codes of 2 bits: of each half of 128 elements, byte l holds elements l, l + 32, l + 64 and l + 96, the first lowest. Nibbles of
//! q4_K and q5_K: of each 64 elements, byte l holds l and l + 32; those of q6_K: of each half, byte l holds l and l + 64 (of
//! each of the two 32 before). Bits of their own: bit g of byte l is that of element 32 g + l.

use half::f16;

use super::{BlockType, SUPER};

/// A block's numbers.
pub(super) struct KBlock {
    pub(super) groups: usize,
    pub(super) d: f16,
    /// The factor of the minima; zero where there are none.
    pub(super) min: f16,
    pub(super) scales: [i8; 16],
    pub(super) mins: [u8; 16],
    pub(super) codes: [i8; SUPER],
}

impl Default for KBlock {
    fn default() -> Self {
        Self { groups: 16, d: f16::ZERO, min: f16::ZERO, scales: [0; 16], mins: [0; 16], codes: [0; SUPER] }
    }
}

impl KBlock {
    pub(super) fn decode(&self, out: &mut [f32]) {
        let (d, e) = (self.d.to_f32(), self.min.to_f32());
        let size = SUPER / self.groups;
        for (j, (codes, out)) in self.codes.chunks_exact(size).zip(out.chunks_exact_mut(size)).enumerate() {
            let (scale, min) = (d * f32::from(self.scales[j]), e * f32::from(self.mins[j]));
            for (out, code) in out.iter_mut().zip(codes) {
                *out = scale * f32::from(*code) - min;
            }
        }
    }
}

#[inline(always)]
pub(super) fn pack(kind: BlockType, block: &KBlock, out: &mut [u8]) {
    let (d, e) = (block.d.to_le_bytes(), block.min.to_le_bytes());
    let code = |shift: i8| {
        let mut codes = [0u8; SUPER];
        for (out, code) in codes.iter_mut().zip(&block.codes) {
            *out = code.wrapping_add(shift) as u8;
        }
        codes
    };
    match kind {
        BlockType::Q2K => {
            for (out, (s, t)) in out.iter_mut().zip(block.scales.iter().zip(&block.mins)) {
                *out = *s as u8 | t << 4;
            }
            pairs(&code(0), &mut out[16..80]);
            out[80..82].copy_from_slice(&d);
            out[82..84].copy_from_slice(&e);
        }
        BlockType::Q3K => {
            let codes = code(4);
            bits(&codes, 2, &mut out[..32]);
            pairs(&codes, &mut out[32..96]);
            let scales = &mut out[96..108];
            scales.fill(0);
            for (j, scale) in block.scales.iter().enumerate() {
                let scale = (scale + 32) as u8;
                scales[j % 8] |= (scale & 0xf) << (4 * (j / 8));
                scales[8 + j % 4] |= scale >> 4 << (2 * (j / 4));
            }
            out[108..110].copy_from_slice(&d);
        }
        BlockType::Q4K | BlockType::Q5K => {
            out[..2].copy_from_slice(&d);
            out[2..4].copy_from_slice(&e);
            scales_and_mins(block, &mut out[4..16]);
            let codes = code(0);
            let nibbles_at = match kind {
                BlockType::Q5K => {
                    bits(&codes, 4, &mut out[16..48]);
                    48
                }
                _ => 16,
            };
            for (out, codes) in out[nibbles_at..].chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
                for (l, out) in out.iter_mut().enumerate() {
                    *out = codes[l] & 0xf | codes[l + 32] << 4;
                }
            }
        }
        _ => {
            let codes = code(32);
            for (half, codes) in codes.chunks_exact(128).enumerate() {
                let low = &mut out[64 * half..][..64];
                for (l, out) in low.iter_mut().enumerate() {
                    *out = codes[l] & 0xf | codes[l + 64] << 4;
                }
            }
            let high = codes.map(|code| code >> 4);
            pairs(&high, &mut out[128..192]);
            for (out, scale) in out[192..208].iter_mut().zip(&block.scales) {
                *out = *scale as u8;
            }
            out[208..210].copy_from_slice(&d);
        }
    }
}

/// The two lowest bits of all codes.
#[inline(always)]
fn pairs(codes: &[u8; SUPER], out: &mut [u8]) {
    for (out, codes) in out.chunks_exact_mut(32).zip(codes.chunks_exact(128)) {
        for (l, out) in out.iter_mut().enumerate() {
            *out = codes[l] & 3 | (codes[l + 32] & 3) << 2 | (codes[l + 64] & 3) << 4 | (codes[l + 96] & 3) << 6;
        }
    }
}

/// Bit `bit` of all codes.
#[inline(always)]
fn bits(codes: &[u8; SUPER], bit: u8, out: &mut [u8]) {
    for (l, out) in out.iter_mut().enumerate() {
        *out = (0..8).fold(0, |byte, group| byte | (codes[32 * group + l] >> bit & 1) << group);
    }
}

/// Eight pairs of 6 bits in 12 bytes: the first four scales, the first four minima, the low nibbles of the other pairs; the upper
/// two bits of these are the upper bits of the first eight bytes.
#[inline(always)]
fn scales_and_mins(block: &KBlock, out: &mut [u8]) {
    for j in 0..4 {
        let (s, t) = (block.scales[j + 4] as u8, block.mins[j + 4]);
        out[j] = block.scales[j] as u8 | s >> 4 << 6;
        out[j + 4] = block.mins[j] | t >> 4 << 6;
        out[j + 8] = s & 0xf | t << 4;
    }
}

pub(super) fn unpack(kind: BlockType, bytes: &[u8]) -> KBlock {
    let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let mut block = KBlock::default();
    match kind {
        BlockType::Q2K => {
            (block.d, block.min) = (half(80), half(82));
            for j in 0..16 {
                (block.scales[j], block.mins[j]) = ((bytes[j] & 0xf) as i8, bytes[j] >> 4);
            }
            for (i, code) in block.codes.iter_mut().enumerate() {
                *code = pair(&bytes[16..], i) as i8;
            }
        }
        BlockType::Q3K => {
            block.d = half(108);
            for (j, scale) in block.scales.iter_mut().enumerate() {
                let low = bytes[96 + j % 8] >> (4 * (j / 8)) & 0xf;
                let high = bytes[104 + j % 4] >> (2 * (j / 4)) & 3;
                *scale = (low | high << 4) as i8 - 32;
            }
            for (i, code) in block.codes.iter_mut().enumerate() {
                let third = bytes[i % 32] >> (i / 32) & 1;
                *code = (pair(&bytes[32..], i) | third << 2) as i8 - 4;
            }
        }
        BlockType::Q4K | BlockType::Q5K => {
            (block.groups, block.d, block.min) = (8, half(0), half(2));
            let packed = &bytes[4..16];
            for j in 0..4 {
                (block.scales[j], block.mins[j]) = ((packed[j] & 63) as i8, packed[j + 4] & 63);
                block.scales[j + 4] = (packed[j + 8] & 0xf | packed[j] >> 6 << 4) as i8;
                block.mins[j + 4] = packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4;
            }
            let (high, nibbles) = match kind {
                BlockType::Q5K => (Some(&bytes[16..48]), &bytes[48..]),
                _ => (None, &bytes[16..]),
            };
            for (i, code) in block.codes.iter_mut().enumerate() {
                let nibble = nibbles[i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 0xf;
                let fifth = high.map_or(0, |high| high[i % 32] >> (i / 32) & 1);
                *code = (nibble | fifth << 4) as i8;
            }
        }
        _ => {
            block.d = half(208);
            for (scale, byte) in block.scales.iter_mut().zip(&bytes[192..208]) {
                *scale = *byte as i8;
            }
            for (i, code) in block.codes.iter_mut().enumerate() {
                let nibble = bytes[i / 128 * 64 + i % 64] >> (4 * (i / 64 % 2)) & 0xf;
                *code = (nibble | pair(&bytes[128..], i) << 4) as i8 - 32;
            }
        }
    }
    block
}

/// Element i of codes of 2 bits.
fn pair(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3
}
