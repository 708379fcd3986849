//! One frozen layer, and the embedding.

use super::blas::Kind;
use super::buffer::Buffer;
use super::ffi;
use super::int8_activations;
use super::linear_group::dequantize;
use super::view::{CudaView, CudaViewMut, one_gpu};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::view::View;
use crate::weight::FrozenWeight;

/// Runs `multiply` with the weight in the activations' type: where it lies (true), or dequantized into scratch memory, which
/// the stream may still be writing.
fn with_weight(
    op: &'static str,
    weight: &dyn FrozenWeight,
    like: CudaView,
    multiply: impl FnOnce(CudaView, bool) -> Result<()>,
) -> Result<()> {
    let plain = weight.as_cuda().and_then(|weight| weight.plain_view()).filter(|plain| plain.dtype() == like.dtype());
    if let Some(plain) = plain {
        return multiply(plain, true);
    }
    let workspace = Workspace::with_dtype(&like.gpu().device(), like.dtype())?;
    let mut scratch = workspace.matrix(weight.rows(), weight.cols())?;
    dequantize(op, weight, scratch.view_mut().cuda(op)?)?;
    multiply(scratch.view().cuda(op)?, false)
}

/// `y = x W^T + beta y`.
pub(crate) fn frozen_forward(
    op: &'static str,
    x: CudaView,
    weight: &dyn FrozenWeight,
    y: CudaViewMut,
    beta: f32,
) -> Result<()> {
    one_gpu(op, y.gpu(), [x.gpu()].into_iter().chain(weight.as_cuda().map(|weight| &**weight.gpu())))?;
    let mut y = y;
    let rounded = match weight.int8_activations() {
        None => None,
        Some(_) => {
            let workspace = Workspace::with_dtype(&x.gpu().device(), x.dtype())?;
            int8_activations::rounded(x, weight, 0, &workspace)?
        }
    };
    let x = match &rounded {
        Some(rounded) => rounded.view().cuda(op)?,
        None => x,
    };
    with_weight(op, weight, x, |w, settled| {
        if beta == 0.0 && super::few_tokens::plain(op, x, (w, settled), &mut y)? {
            return Ok(());
        }
        w.gpu().matmul(op, Kind::Nt, x, w, y, 1.0, beta)
    })
}

/// `dx = dy W + beta dx`.
pub(crate) fn frozen_backward(
    op: &'static str,
    dy: CudaView,
    weight: &dyn FrozenWeight,
    dx: CudaViewMut,
    beta: f32,
) -> Result<()> {
    with_weight(op, weight, dy, |w, _| w.gpu().matmul(op, Kind::Nn, dy, w, dx, 1.0, beta))
}

/// Rows of the table by token id; the caller checked the ids.
pub(crate) fn embedding(
    op: &'static str,
    tokens: &[u32],
    table: &dyn FrozenWeight,
    mut out: CudaViewMut,
) -> Result<()> {
    let gpu = out.gpu().arc();
    let Some(on_device) = table.as_cuda() else {
        // The table stays on the host; only its rows travel.
        let width = table.cols();
        let mut rows = vec![0f32; tokens.len() * width];
        for (row, &id) in rows.chunks_exact_mut(width.max(1)).zip(tokens) {
            table.dequantize_rows(id as usize..id as usize + 1, row);
        }
        return out.upload(View::new(&rows, tokens.len(), width).host(op)?);
    };
    if let Some(plain) = on_device.plain_view() {
        let ids = Buffer::upload(&gpu, op, tokens)?;
        return gather(op, plain, &ids, out);
    }
    for (i, &id) in tokens.iter().enumerate() {
        on_device.dequantize_into(id as usize, out.reborrow().slice_rows(i..i + 1))?;
    }
    Ok(())
}

/// `out[i] = table[ids[i]]`; all ids must be rows of the table.
pub(super) fn gather(op: &'static str, table: CudaView, ids: &Buffer, out: CudaViewMut) -> Result<()> {
    if table.rows() > 1 && table.stride() != table.cols() {
        return Err(Error::invalid(op, "the table has gaps between its rows"));
    }
    Error::check_shape(op, "the ids", &[ids.bytes() / 4], &[out.rows()])?;
    // SAFETY: the table and the output are live; the caller checked the ids.
    out.gpu().launch(op, |stream| unsafe {
        ffi::qlora_embedding(
            table.dtype().code(),
            table.ptr() as *const _,
            ids.as_ptr(),
            out.dtype().code(),
            out.ptr() as *mut _,
            out.ld(),
            out.rows() as i64,
            out.cols() as i64,
            stream,
        )
    })
}

/// Rows of a matrix, gathered by index.
pub(super) fn gather_rows(op: &'static str, from: CudaView, rows: &[u32], workspace: &Workspace) -> Result<Matrix> {
    if from.rows() > 1 && from.stride() != from.cols() {
        let mut gapless = workspace.matrix(from.rows(), from.cols())?;
        super::ops::cast(from, gapless.view_mut().cuda(op)?)?;
        return gather_rows(op, gapless.view().cuda(op)?, rows, workspace);
    }
    let mut out = workspace.matrix(rows.len(), from.cols())?;
    let ids = Buffer::upload(&from.gpu().arc(), op, rows)?;
    gather(op, from, &ids, out.view_mut().cuda(op)?)?;
    Ok(out)
}
