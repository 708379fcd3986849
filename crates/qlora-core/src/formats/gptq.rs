//! GPTQ's tensors of a linear layer `P` of shape `[N, K]`, as AutoGPTQ and GPTQModel write them, `p = 32 / bits`:
//!
//! | tensor | dtype, shape | |
//! |---|---|---|
//! | `P.qweight` | I32 `[K / p, N]` | a word holds the codes of `p` input features, the first in the lowest bits |
//! | `P.qzeros` | I32 `[groups, N / p]` | a word holds the zero points of `p` output features |
//! | `P.scales` | F16 (BF16, F32) `[groups, N]` | |
//! | `P.g_idx` | I32 `[K]` | the group of each input feature; without it `k / group_size` |
//!
//! `w[n][k] = (code - zero) * scale`. The format `gptq_v2` stores `zero`. The format `gptq` stores `zero - 1`, subtracted from
//! all zero points of a word at once, with a borrow where one is 0; so one is added to the word, as GPTQModel does. With `desc_act`, columns
//! were quantized in order of their activations and `g_idx` is no longer ascending; the columns themselves stay in place.

use qlora_kernels::quant::{IntBits, IntParts};
use safetensors::Dtype;

use super::packed::Raw;
use super::words::{self, SCALE_TYPES, words};
use crate::error::{Error, Result};

/// The packing of a layer.
#[derive(Debug)]
pub(super) struct Layout {
    bits: IntBits,
    group_size: usize,
    groups: usize,
    zero_offset: u8,
    has_g_idx: bool,
}

/// The layout, and the names of all tensors, that of the codes first. With `per_module`, bits and groups are those that the
/// shapes give.
pub(super) fn find(
    raw: &Raw<'_>,
    module: &str,
    [rows, cols]: [usize; 2],
    (mut bits, group_size): (usize, Option<usize>),
    zero_offset: u8,
    per_module: bool,
) -> Result<Option<(Layout, Vec<String>)>> {
    let names = ["qweight", "qzeros", "scales", "g_idx"].map(|part| format!("{module}.{part}"));
    let [qweight, qzeros, scales, g_idx] = &names;
    if !names.iter().any(|name| raw.has(name)) {
        return Ok(None);
    }
    let shape = |name: &String| raw.shard(name).and_then(|shard| shard.shape(name));
    let mut group_size = group_size.unwrap_or(cols).min(cols).max(1);
    if per_module {
        if let Some(&[words, _]) = shape(qweight) {
            bits = if words.checked_mul(4) == Some(cols) { 8 } else { 4 };
        }
        if let Some(&[groups, _]) = shape(scales)
            && groups > 0
        {
            group_size = cols.div_ceil(groups);
        }
    }
    let (pack, groups) = (32 / bits, cols.div_ceil(group_size));
    let owner = format!("{module} in GPTQ's {bits} bits with groups of {group_size}");
    if !cols.is_multiple_of(pack) || !rows.is_multiple_of(pack) {
        let message = format!("{rows} x {cols} features are not multiples of the {pack} codes in a word");
        return Err(Error::tensor(qweight, message));
    }
    raw.expect(qweight, &owner, &[Dtype::I32], &[&[cols / pack, rows]])?;
    raw.expect(qzeros, &owner, &[Dtype::I32], &[&[groups, rows / pack]])?;
    raw.expect(scales, &owner, &SCALE_TYPES, &[&[groups, rows]])?;
    let has_g_idx = raw.has(g_idx);
    if has_g_idx {
        raw.expect(g_idx, &owner, &[Dtype::I32], &[&[cols]])?;
    }
    let bits = if bits == 8 { IntBits::Eight } else { IntBits::Four };
    let layout = Layout { bits, group_size, groups, zero_offset, has_g_idx };
    Ok(Some((layout, names.into_iter().take(if has_g_idx { 4 } else { 3 }).collect())))
}

pub(super) fn read(raw: &Raw<'_>, module: &str, [rows, cols]: [usize; 2], layout: &Layout) -> Result<IntParts> {
    let Layout { bits, group_size, groups, zero_offset, has_g_idx } = *layout;
    let name = |part: &str| format!("{module}.{part}");
    let pack = 32 / bits.bits();
    let mask = (1u32 << bits.bits()) - 1;

    let packed = words(raw.bytes(&name("qzeros"))?);
    // A one for every code of a word.
    let ones = u32::MAX / mask * u32::from(zero_offset);
    let zero = |row: usize, group: usize| {
        let word = packed[group * (rows / pack) + row / pack].wrapping_add(ones);
        (word >> (bits.bits() * (row % pack)) & mask) as f32
    };
    let (zeros, flip) = words::zeros(rows, groups, bits, zero);
    let scales = words::transpose(&raw.scales(&name("scales"), f32::MIN)?, groups, rows);

    let group_of = match has_g_idx {
        false => None,
        true => group_of(raw, &name("g_idx"), group_size, groups)?,
    };
    let packed = words(raw.bytes(&name("qweight"))?);
    let row_bytes = bits.bytes(cols);
    let mut codes = vec![0; rows * row_bytes];
    words::by_rows(&mut codes, row_bytes, |first, block| {
        let count = block.len() / row_bytes;
        for (i, words) in packed.chunks_exact(rows).enumerate() {
            let bytes = 32 / 8 * i..32 / 8 * (i + 1);
            for (word, row) in words[first..first + count].iter().zip(block.chunks_exact_mut(row_bytes)) {
                let mut word = word.to_le_bytes();
                if bits == IntBits::Four {
                    // The even element moves to the upper nibble.
                    word = word.map(|byte| byte.rotate_left(4));
                }
                row[bytes.clone()].copy_from_slice(&word.map(|byte| byte ^ flip));
            }
        }
    });
    Ok(IntParts { codes, bits, rows, cols, group_size, group_of, scales, zeros, outliers: None, activations: None })
}

/// None if the groups are neighbouring columns in order.
fn group_of(raw: &Raw<'_>, name: &str, group_size: usize, groups: usize) -> Result<Option<Vec<u16>>> {
    let indices = words(raw.bytes(name)?);
    if indices.iter().enumerate().all(|(column, &group)| group as usize == column / group_size) {
        return Ok(None);
    }
    let mut group_of = Vec::with_capacity(indices.len());
    for (column, &group) in indices.iter().enumerate() {
        match u16::try_from(group) {
            Ok(narrow) if (group as usize) < groups => group_of.push(narrow),
            _ => {
                let message = format!("element {column} is {}, there are {groups} groups", group as i32);
                return Err(Error::tensor(name, format!("{message}, in {}", raw.place(name))));
            }
        }
    }
    Ok(Some(group_of))
}
