//! AWQ's tensors of a linear layer `P` of shape `[N, K]` in the GEMM layout, as AutoAWQ writes them, 4 bits:
//!
//! | tensor | dtype, shape | |
//! |---|---|---|
//! | `P.qweight` | I32 `[K, N / 8]` | nibble `j` (from the lowest) of word `m` is output feature `8 m + ORDER[j]` |
//! | `P.qzeros` | I32 `[groups, N / 8]` | in the same order |
//! | `P.scales` | F16 (BF16, F32) `[groups, N]` | in plain order |
//!
//! `w[n][k] = (code - zero) * scale`, the group of `k` is `k / group_size`.

use qlora_kernels::quant::{IntBits, IntParts};
use safetensors::Dtype;

use super::packed::Raw;
use super::words::{self, SCALE_TYPES, words};
use crate::error::{Error, Result};

/// The output feature of each nibble.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// The names of all tensors, that of the codes first.
pub(super) fn find(
    raw: &Raw<'_>,
    module: &str,
    [rows, cols]: [usize; 2],
    group_size: Option<usize>,
) -> Result<Option<Vec<String>>> {
    let names = ["qweight", "qzeros", "scales"].map(|part| format!("{module}.{part}"));
    let [qweight, qzeros, scales] = &names;
    if !names.iter().any(|name| raw.has(name)) {
        return Ok(None);
    }
    let group_size = group_size.unwrap_or(cols);
    if !cols.is_multiple_of(group_size) || !rows.is_multiple_of(8) || !cols.is_multiple_of(2) {
        let message = format!("{rows} x {cols} features do not fall into words of 8 and groups of {group_size}");
        return Err(Error::tensor(qweight, message));
    }
    let owner = format!("{module} in AWQ's 4 bits with groups of {group_size}");
    let groups = cols / group_size;
    raw.expect(qweight, &owner, &[Dtype::I32], &[&[cols, rows / 8]])?;
    raw.expect(qzeros, &owner, &[Dtype::I32], &[&[groups, rows / 8]])?;
    raw.expect(scales, &owner, &SCALE_TYPES, &[&[groups, rows]])?;
    Ok(Some(names.into()))
}

pub(super) fn read(raw: &Raw<'_>, module: &str, [rows, cols]: [usize; 2], group_size: usize) -> Result<IntParts> {
    let name = |part: &str| format!("{module}.{part}");
    let groups = cols / group_size;
    // The nibble of each output feature of a word.
    let mut nibble = [0; 8];
    (0..8).for_each(|j| nibble[ORDER[j]] = j);

    let packed = words(raw.bytes(&name("qzeros"))?);
    let zero = |row: usize, group: usize| (packed[group * (rows / 8) + row / 8] >> (4 * nibble[row % 8]) & 15) as f32;
    let (zeros, flip) = words::zeros(rows, groups, IntBits::Four, zero);
    let scales = words::transpose(&raw.scales(&name("scales"), f32::MIN)?, groups, rows);

    let packed = words(raw.bytes(&name("qweight"))?);
    let row_bytes = cols / 2;
    let mut codes = vec![0; rows * row_bytes];
    words::by_rows(&mut codes, row_bytes, |first, block| {
        let words = first / 8..(first + block.len() / row_bytes) / 8;
        for (byte, pair) in packed.chunks_exact(2 * (rows / 8)).enumerate() {
            let (even, odd) = pair.split_at(rows / 8);
            for (m, (even, odd)) in even[words.clone()].iter().zip(&odd[words.clone()]).enumerate() {
                for (r, &j) in nibble.iter().enumerate() {
                    let (even, odd) = ((even >> (4 * j) & 15) as u8, (odd >> (4 * j) & 15) as u8);
                    block[(8 * m + r) * row_bytes + byte] = (even << 4 | odd) ^ flip;
                }
            }
        }
    });
    Ok(IntParts {
        codes,
        bits: IntBits::Four,
        rows,
        cols,
        group_size,
        group_of: None,
        scales,
        zeros,
        outliers: None,
        activations: None,
    })
}
