//! Groups over some dozens of tokens whose weights are kept in fp8: the product by cuBLASLt, and the adapters' parts by the kernels
//! for a few tokens around it, in f32. A step of generation is bound by its number of launches here: there are four a group (the
//! input's rounding, S, the product, `y + s S B^T`), where the way of training has six.

use super::{norm_shrink, places, shrink};
use crate::cuda::adapter_rows::finish_one;
use crate::cuda::ffi;
use crate::cuda::fp8::Fp8;
use crate::cuda::linear_group::{add_biases, multiply_kept};
use crate::cuda::view::{CudaView, CudaViewMut};
use crate::error::Result;
use crate::matrix::Workspace;
use crate::ops::linear_group::{AdapterPass, Group, InputNorm};

/// From here on a product with weights that are kept in fp8 is faster: one byte a weight is read and none is decoded.
pub(super) const LEAST: usize = 32;

/// Writes `y`, unless there is no kernel for the norm with these arguments; says whether. `weights` are the group's 4-bit ones,
/// whose adapters' places are filled in.
pub(super) fn forward(
    op: &'static str,
    group: &Group,
    mut weights: ffi::FewWeights,
    x: CudaView,
    norm: Option<&InputNorm>,
    adapter: Option<&AdapterPass>,
    residual: Option<CudaView>,
    mut y: CudaViewMut,
    workspace: &Workspace,
) -> Result<bool> {
    let adapters = adapter.map(|adapter| places(op, group, adapter, &mut weights)).transpose()?.flatten();
    let (s, normed) = match (adapters, norm) {
        (Some((adapters, columns)), None) => (Some(shrink(op, x, adapters, columns, workspace)?), None),
        (None, None) => (None, None),
        (Some((adapters, columns)), Some(norm)) => {
            let Some((s, normed)) = norm_shrink(op, x, norm, adapters, columns, workspace)? else { return Ok(false) };
            (Some(s), Some(normed))
        }
        (None, Some(_)) => return Ok(false),
    };
    let x = match &normed {
        Some(normed) => normed.view().cuda(op)?,
        None => x,
    };
    let rounded = Fp8::of_rows(x)?;
    let Some(s) = s else {
        let beta = if residual.is_some() { 1.0 } else { 0.0 };
        multiply_kept(op, group, &rounded, residual, y.reborrow(), beta, workspace)?;
        add_biases(op, group, y)?;
        return Ok(true);
    };
    multiply_kept(op, group, &rounded, None, y.reborrow(), 0.0, workspace)?;
    finish_one(op, group, &weights, &s, residual, y.reborrow())?;
    add_biases(op, group, y)?;
    Ok(true)
}
