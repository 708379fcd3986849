//! [`crate::ops::adapter_tokens`] on CUDA: one launch a call. Sizes were checked there.

use std::collections::HashMap;
use std::ops::Range;

use super::buffer::Buffer;
use super::ffi;
use super::ops::vector;
use super::view::{CudaView, CudaViewMut, one_gpu};
use crate::error::Result;
use crate::ops::adapter_tokens::EmbeddingDelta;

pub(crate) fn embedding(
    op: &'static str,
    delta: &EmbeddingDelta,
    tokens: &[u32],
    vocabulary: usize,
    x: CudaViewMut,
) -> Result<()> {
    let (values, gpu) = (delta.values.cuda(op)?, x.gpu());
    one_gpu(op, gpu, [values.gpu()])?;
    let flat = vector(op, "the adapter", values, values.cols())?;
    let at = |range: &Range<usize>| flat.wrapping_add(range.start);
    let (a, b, rank, scale) = match delta.lora {
        Some(slot) => (at(&slot.a), at(&slot.b), slot.rank, slot.scale),
        None => (std::ptr::null(), std::ptr::null(), 0, 0.0),
    };
    let ids = Buffer::upload(&gpu.arc(), op, tokens)?;
    let own: Vec<i64> = tokens.iter().map(|id| delta.tokens.get(id).map_or(-1, |range| range.start as i64)).collect();
    let own = match own.iter().any(|&start| start >= 0) {
        true => Some(Buffer::upload(&gpu.arc(), op, &own)?),
        false => None,
    };
    // SAFETY: the window is live; tokens and ranges lie in the adapter, and the vectors have an element a column.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_adapter_embedding(
            x.dtype().code(),
            x.ptr() as *mut _,
            x.ld(),
            ids.as_ptr(),
            own.as_ref().map_or(std::ptr::null(), Buffer::as_ptr),
            flat,
            a,
            b,
            delta.gain.map_or(std::ptr::null(), at),
            rank as i64,
            vocabulary as i64,
            scale,
            x.rows() as i64,
            x.cols() as i64,
            stream,
        )
    })
}

pub(crate) fn head(
    op: &'static str,
    values: CudaView,
    tokens: &HashMap<u32, Range<usize>>,
    hidden: CudaView,
    logits: CudaViewMut,
) -> Result<()> {
    let gpu = logits.gpu();
    one_gpu(op, gpu, [values.gpu(), hidden.gpu()])?;
    let flat = vector(op, "the adapter", values, values.cols())?;
    let (ids, own): (Vec<u32>, Vec<i64>) = tokens.iter().map(|(id, range)| (*id, range.start as i64)).unzip();
    let (ids, own) = (Buffer::upload(&gpu.arc(), op, &ids)?, Buffer::upload(&gpu.arc(), op, &own)?);
    // SAFETY: the windows are live and have the same rows; the ids are columns of the logits, the ranges lie in the adapter
    // and have the hidden state's width.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_head_tokens(
            hidden.dtype().code(),
            hidden.ptr() as *const _,
            hidden.ld(),
            flat,
            ids.as_ptr(),
            own.as_ptr(),
            tokens.len() as i64,
            logits.dtype().code(),
            logits.ptr() as *mut _,
            logits.ld(),
            logits.rows() as i64,
            hidden.cols() as i64,
            stream,
        )
    })
}
