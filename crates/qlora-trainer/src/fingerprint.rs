//! A 64-bit fingerprint of data, to notice that a file was damaged or that a run was resumed with other data.
//!
//! For every 64-bit word `w`: `h = (h ^ w) * p; h ^= h >> 32`, with FNV's offset basis and prime. Not cryptographic: it
//! finds accidents, not attacks. The values are part of the checkpoint format and never change.

use std::fmt;

const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0000_0100_0000_01b3;

/// Collects values into a 64-bit fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(u64);

impl Default for Fingerprint {
    fn default() -> Self {
        Self(BASIS)
    }
}

impl Fingerprint {
    /// A fingerprint of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one word.
    pub fn word(&mut self, word: u64) -> &mut Self {
        self.0 = (self.0 ^ word).wrapping_mul(PRIME);
        self.0 ^= self.0 >> 32;
        self
    }

    /// Adds bytes and their number.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
        self.word(bytes.len() as u64)
    }

    /// Adds the bits of floats and their number.
    pub fn floats(&mut self, values: &[f32]) -> &mut Self {
        for value in values {
            self.word(u64::from(value.to_bits()));
        }
        self.word(values.len() as u64)
    }

    /// The fingerprint of everything added so far.
    pub fn value(&self) -> u64 {
        self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_single_changed_bit_changes_it() {
        let data: Vec<u8> = (0..37).collect();
        let of = |bytes: &[u8]| Fingerprint::new().bytes(bytes).value();
        let original = of(&data);
        for bit in 0..data.len() * 8 {
            let mut changed = data.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(of(&changed), original, "bit {bit}");
        }
        assert_ne!(of(&data[..36]), original);
        assert_ne!(of(&[0]), of(&[0, 0]));
    }

    #[test]
    fn floats_are_told_apart_by_their_bits() {
        let of = |values: &[f32]| Fingerprint::new().floats(values).value();
        assert_ne!(of(&[0.0]), of(&[-0.0]));
        assert_eq!(of(&[1.5, f32::NAN]), of(&[1.5, f32::NAN]));
    }
}
