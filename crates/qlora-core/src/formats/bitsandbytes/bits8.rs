//! bitsandbytes' 8-bit tensors of a linear layer `P` of shape `[N, K]` (`Linear8bitLt`): `P.weight` I8 `[N, K]`, `P.SCB` F32
//! `[N]` (the largest magnitude of each row), `P.weight_format` U8 (0: row-major, the only one that is still written).
//! `w = code * SCB * f32(1 / 127)`.

use qlora_kernels::quant::{IntBits, IntParts};
use qlora_kernels::weight::Int8Activations;
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::formats::packed::Raw;

/// The names of all tensors, that of the codes first.
pub(in crate::formats) fn find(raw: &Raw<'_>, module: &str, [rows, cols]: [usize; 2]) -> Result<Option<Vec<String>>> {
    let [weight, scb, format] = ["weight", "SCB", "weight_format"].map(|part| format!("{module}.{part}"));
    if !raw.has(&scb) && raw.dtype(&weight) != Some(Dtype::I8) {
        return Ok(None);
    }
    let owner = format!("{weight} in 8 bits");
    raw.expect(&weight, &owner, &[Dtype::I8], &[&[rows, cols]])?;
    raw.expect(&scb, &owner, &[Dtype::F32], &[&[rows]])?;
    let mut parts = vec![weight, scb];
    if raw.has(&format) {
        raw.expect(&format, &owner, &[Dtype::U8], &[&[], &[1]])?;
        if raw.bytes(&format)? != [0] {
            let message = format!("is {:?} in {}; only 0 (row-major) is read", raw.bytes(&format)?, raw.place(&format));
            return Err(Error::tensor(&format, message));
        }
        parts.push(format);
    }
    Ok(Some(parts))
}

pub(in crate::formats) fn read(
    raw: &Raw<'_>,
    module: &str,
    [rows, cols]: [usize; 2],
    threshold: f32,
) -> Result<IntParts> {
    let scb = raw.scales(&format!("{module}.SCB"), 0.0)?;
    Ok(IntParts {
        codes: raw.bytes(&format!("{module}.weight"))?.to_vec(),
        bits: IntBits::Eight,
        rows,
        cols,
        group_size: cols,
        group_of: None,
        scales: scb.into_iter().map(|scb| scb * (1.0 / 127.0)).collect(),
        zeros: None,
        outliers: None,
        activations: Some(Int8Activations { threshold }),
    })
}
