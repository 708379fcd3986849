//! The row order of q and k projections in llama.cpp's files.

use qlora_kernels::weight::PlainData;

/// Brings the rows of a q or k projection `[heads * head_dim, cols]` (or its bias) into Hugging Face's order.
///
/// llama.cpp's converter interleaves the two halves of every head (`[heads, 2, d/2]` to `[heads, d/2, 2]`), because its
/// rotary embedding turns neighbouring elements where Hugging Face's turns element `i` with `i + d/2`.
pub(super) fn unpermute(data: &mut PlainData, heads: usize, head_dim: usize) {
    let half = head_dim / 2;
    reorder(data, heads, head_dim, |row| (row % half) * 2 + row / half);
}

/// The inverse of [`unpermute`]: Hugging Face's order to llama.cpp's.
pub(crate) fn permute(data: &mut PlainData, heads: usize, head_dim: usize) {
    let half = head_dim / 2;
    reorder(data, heads, head_dim, |row| (row % 2) * half + row / 2);
}

/// Fills every row of every head with the head's row that `source` names.
fn reorder(data: &mut PlainData, heads: usize, head_dim: usize, source: impl Fn(usize) -> usize) {
    match data {
        PlainData::F32(data) => reorder_rows(data, heads, head_dim, source),
        PlainData::Bf16(data) => reorder_rows(data, heads, head_dim, source),
        PlainData::F16(data) => reorder_rows(data, heads, head_dim, source),
    }
}

fn reorder_rows<T: Copy>(data: &mut [T], heads: usize, head_dim: usize, source: impl Fn(usize) -> usize) {
    let cols = data.len() / (heads * head_dim);
    let mut head_copy = Vec::with_capacity(head_dim * cols);
    for head in data.chunks_exact_mut(head_dim * cols) {
        head_copy.clear();
        head_copy.extend_from_slice(head);
        for (row, target) in head.chunks_exact_mut(cols).enumerate() {
            let source = source(row);
            target.copy_from_slice(&head_copy[source * cols..(source + 1) * cols]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_return_to_hugging_faces_order() {
        // Two heads of four rows of three columns, numbered in Hugging Face's order, then permuted as llama.cpp does:
        // reshape [heads, 2, d/2], swap the last two.
        let (heads, head_dim, cols) = (2, 4, 3);
        let original: Vec<f32> = (0..heads * head_dim * cols).map(|i| i as f32).collect();
        let mut permuted = Vec::new();
        for head in 0..heads {
            for pair in 0..head_dim / 2 {
                for half in 0..2 {
                    let row = head * head_dim + half * head_dim / 2 + pair;
                    permuted.extend_from_slice(&original[row * cols..(row + 1) * cols]);
                }
            }
        }
        assert_ne!(permuted, original);
        let mut data = PlainData::F32(permuted);
        unpermute(&mut data, heads, head_dim);
        let PlainData::F32(data) = data else { unreachable!() };
        assert_eq!(data, original);
    }

    #[test]
    fn halves_are_interleaved() {
        // One head of six rows of two columns.
        let mut data = PlainData::F32((0..12).map(|i| i as f32).collect());
        permute(&mut data, 1, 6);
        let PlainData::F32(data) = data else { unreachable!() };
        assert_eq!(data, [0., 1., 6., 7., 2., 3., 8., 9., 4., 5., 10., 11.]);
    }
}
