//! LLM.int8's rounding of a product's input on CUDA, as [`crate::ops::frozen_linear`] does it on the CPU.

use std::ops::Range;

use super::buffer::Buffer;
use super::ffi;
use super::linear_group::parts;
use super::ops::{cast, same_dtype};
use super::view::CudaView;
use super::weight::CudaWeight;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::ops::linear_group::{Group, Member};
use crate::weight::FrozenWeight;

const OP: &str = "int8_activations";

/// `x` as a weight's forward product takes it, in a matrix with room for `margin` more columns; none if the weight takes it as
/// it is.
pub(super) fn rounded(
    x: CudaView,
    weight: &dyn FrozenWeight,
    margin: usize,
    workspace: &Workspace,
) -> Result<Option<Matrix>> {
    let Some(rule) = weight.int8_activations() else { return Ok(None) };
    let exact = weight.as_cuda().and_then(CudaWeight::exact_on_device);
    Error::check_shape(OP, "x", &[x.cols()], &[weight.cols()])?;
    let mut out = workspace.with_margin(x.rows(), x.cols(), margin)?;
    let target = out.view_mut().cuda(OP)?;
    let dtype = same_dtype(OP, &[x.dtype(), target.dtype()])?;
    let gpu = target.gpu();
    let mut memory = Buffer::new(&gpu.arc(), OP, x.cols())?;
    let flags = memory.as_mut_ptr();
    // SAFETY: both windows are live, of the same shape and type; the flags have a byte a column, the exact columns are columns
    // of the weight. Memory is freed on the same stream.
    gpu.launch(OP, |stream| unsafe {
        ffi::qlora_int8_activations(
            dtype,
            x.ptr() as *const _,
            x.ld(),
            rule.threshold,
            exact.map_or(std::ptr::null(), |(columns, _)| columns.as_ptr()),
            exact.map_or(0, |(_, count)| count as i64),
            flags,
            target.ptr() as *mut _,
            target.ld(),
            x.rows() as i64,
            x.cols() as i64,
            stream,
        )
    })?;
    Ok(Some(out))
}

/// The input of each product: neighbouring members, by their rows of the fused weight, that read x as it is (none) or rounded
/// to 8 bits alike; a rounded one has S in its margin.
pub(super) fn inputs(
    group: &Group,
    x: CudaView,
    s: Option<&Matrix>,
    rp: usize,
    workspace: &Workspace,
) -> Result<Vec<(Range<usize>, Option<Matrix>)>> {
    let alike = |a: &Member, b: &Member| {
        let (a, b) = (a.weight, b.weight);
        a.int8_activations() == b.int8_activations() && a.exact_columns() == b.exact_columns()
    };
    let mut found: Vec<(Range<usize>, &Member)> = Vec::new();
    for (member, part) in parts(group) {
        match found.last_mut() {
            Some((last, other)) if alike(other, member) => last.end = part.end,
            _ => found.push((part, member)),
        }
    }
    let input = |(part, member): (Range<usize>, &Member)| {
        let mut input = rounded(x, member.weight, rp, workspace)?;
        if let (Some(rounded), Some(s)) = (&mut input, s) {
            cast(s.view().cuda(OP)?, rounded.view_mut().cuda(OP)?.split_margin(rp).1)?;
        }
        Ok((part, input))
    };
    found.into_iter().map(input).collect()
}
