//! Code shared by the formats that pack codes into 32-bit words.

use qlora_kernels::quant::IntBits;
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;
use safetensors::Dtype;

/// The dtypes that scales may be stored in.
pub(super) const SCALE_TYPES: [Dtype; 3] = [Dtype::F16, Dtype::BF16, Dtype::F32];

/// Rows of codes that a task unpacks: whole words in every format, and whole cache lines of the words.
const BLOCK: usize = 64;

/// The words of a tensor; the file may hold it at any byte.
pub(super) fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

/// Lets tasks write `codes`, some rows of `row_bytes` each; `write` gets the first row's number and the rows.
pub(super) fn by_rows(codes: &mut [u8], row_bytes: usize, write: impl Fn(usize, &mut [u8]) + Sync) {
    codes.par_chunks_mut((BLOCK * row_bytes).max(1)).enumerate().for_each(|(i, block)| write(i * BLOCK, block));
}

/// `[rows, cols]` as `[cols, rows]`.
pub(super) fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| values[row * cols + col])).collect()
}

/// The zero points `[rows, groups]`, and what turns a stored byte of codes into one of ours by exclusive or. Where every zero
/// point is the middle of the range, there are none: codes become signed, which flips their highest bit.
pub(super) fn zeros(
    rows: usize,
    groups: usize,
    bits: IntBits,
    zero: impl Fn(usize, usize) -> f32,
) -> (Option<Vec<f32>>, u8) {
    let (middle, flip) = match bits {
        IntBits::Four => (8.0, 0x88),
        IntBits::Eight => (128.0, 0x80),
    };
    let zero = &zero;
    let values: Vec<f32> = (0..rows).flat_map(|row| (0..groups).map(move |group| zero(row, group))).collect();
    if values.iter().all(|value| *value == middle) { (None, flip) } else { (Some(values), 0) }
}
