//! The fingerprint of a model's weights, computed without reading all of them.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use qlora_core::source::WeightSource;

use crate::fingerprint::Fingerprint;

/// Pieces that are looked at, of a tensor or of a file with packed ones.
const TENSOR_PIECES: usize = 8;
const FILE_PIECES: usize = 256;
/// Bytes of a piece.
const PIECE: usize = 64;

/// Stands for a model: its shape and arithmetic, and of every tensor's bytes a sample. Two trainings of one model differ nearly
/// everywhere, so that a sample tells them apart; reading everything would take as long as loading. Where the files lie, what
/// they are called, and what only generation uses (end tokens) is left out. Errors of reading are left to loading.
pub(super) fn fingerprint(source: &dyn WeightSource) -> String {
    let mut config = source.config().clone();
    (config.bos_token_id, config.eos_token_ids) = (None, Vec::new());
    if config.rope.scaling.is_none() {
        // Only a limit then.
        config.max_position_embeddings = 0;
    }
    let mut fingerprint = Fingerprint::new();
    fingerprint.bytes(config.to_json().as_bytes());
    let mut packed = BTreeSet::new();
    for name in source.names() {
        fingerprint.bytes(name.as_bytes());
        source.shape(&name).unwrap_or_default().iter().for_each(|&size| {
            fingerprint.word(size as u64);
        });
        match source.stored(&name) {
            Some(stored) => {
                let len = stored.bytes.len();
                let read = |at: usize, to: &mut [u8]| stored.bytes.read_at(at, to).is_ok();
                sample(&mut fingerprint, len, TENSOR_PIECES, read);
            }
            // Quantized or rearranged on the way: its file stands for it.
            None => packed.extend(source.file_of(&name)),
        }
    }
    for path in packed {
        sample_file(&mut fingerprint, path);
    }
    fingerprint.to_string()
}

fn sample_file(fingerprint: &mut Fingerprint, path: &Path) {
    let Ok(mut file) = File::open(path) else { return };
    let len = file.metadata().map_or(0, |metadata| metadata.len() as usize);
    sample(fingerprint, len, FILE_PIECES, |at, to| {
        file.seek(SeekFrom::Start(at as u64)).and_then(|_| file.read_exact(to)).is_ok()
    });
}

/// Adds the length and evenly spread pieces.
fn sample(fingerprint: &mut Fingerprint, len: usize, pieces: usize, mut read: impl FnMut(usize, &mut [u8]) -> bool) {
    fingerprint.word(len as u64);
    let mut buffer = [0; PIECE];
    let size = len.min(PIECE);
    // Each in the middle of its share: the beginning of a file is a description, which may be written in several ways.
    let places = (0..pieces).map(|i| ((2 * i + 1) * len / (2 * pieces)).min(len - size));
    for at in places {
        if read(at, &mut buffer[..size]) {
            fingerprint.bytes(&buffer[..size]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_sees_every_part_of_a_tensor() {
        let of = |bytes: &[u8]| {
            let mut fingerprint = Fingerprint::new();
            let read = |at: usize, to: &mut [u8]| {
                to.copy_from_slice(&bytes[at..at + to.len()]);
                true
            };
            sample(&mut fingerprint, bytes.len(), TENSOR_PIECES, read);
            fingerprint
        };
        let bytes: Vec<u8> = (0..4096u32).map(|i| (i % 251) as u8).collect();
        let original = of(&bytes);
        for part in 0..TENSOR_PIECES {
            let mut other = bytes.clone();
            let range = part * 512..(part + 1) * 512;
            other[range].iter_mut().for_each(|byte| *byte ^= 1);
            assert!(of(&other) != original, "part {part}");
        }
        assert!(of(&bytes[..4095]) != original);
        let _ = (of(&[]), of(&[1]));
    }
}
