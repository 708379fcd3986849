//! Attention: cuDNN's where it is there and faster, our tensor-core kernels where they fit, simple ones elsewhere.

use super::buffer::Buffer;
use super::cudnn::SdpaShape;
use super::cudnn_attention;
use super::ffi;
use super::gpu::Gpu;
use super::ops::same_dtype;
use super::view::{CudaView, CudaViewMut};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::ops::attention::AttentionConfig;
use crate::sequence::SequenceLayout;
use crate::view::{View, ViewMut};

/// Whether the tensor-core kernels take this shape and these windows.
fn is_fast(cfg: &AttentionConfig, windows: &[CudaView]) -> bool {
    let aligned = |v: &CudaView| v.ptr().is_multiple_of(16) && v.stride().is_multiple_of(8);
    windows.iter().all(|v| takes(cfg, v.dtype()) && aligned(v))
}

/// The call's shape, if cuDNN is to run it on `sequences` sequences of `len` tokens. The planner asks too.
fn shape_for_cudnn(
    gpu: &Gpu,
    cfg: &AttentionConfig,
    dtype: Dtype,
    sequences: usize,
    len: Option<usize>,
) -> Option<SdpaShape> {
    let len = len?;
    if cfg.window.is_some_and(|window| window < len) || gpu.deterministic() || !takes(cfg, dtype) {
        return None;
    }
    gpu.attention().shape(gpu, cfg, sequences, len, dtype)
}

/// [`shape_for_cudnn`] of a batch whose windows allow it. Forward and backward must agree, because the layout of `lse`
/// differs: both ask with the forward's windows.
fn shape_of_batch(
    gpu: &Gpu,
    cfg: &AttentionConfig,
    layout: &SequenceLayout,
    windows: &[CudaView; 4],
) -> Option<SdpaShape> {
    let (dtype, sequences) = (windows[0].dtype(), layout.sequences().len());
    is_fast(cfg, windows).then(|| shape_for_cudnn(gpu, cfg, dtype, sequences, layout.uniform_len())).flatten()
}

/// Bytes that the backward of our own kernels takes.
fn own_workspace(gpu: &Gpu, cfg: &AttentionConfig, tokens: usize) -> u64 {
    let deterministic = i32::from(gpu.deterministic());
    let (tokens, heads, head_dim) = (tokens as i64, cfg.heads as i64, cfg.head_dim as i64);
    // SAFETY: a pure function of its arguments.
    unsafe { ffi::qlora_attention_backward_workspace(tokens, heads, head_dim, deterministic) as u64 }
}

/// Bytes of workspace that [`forward`] and [`backward`] take for a batch.
///
/// # Errors
/// If the batch has more tokens than the kernels take.
pub fn workspace(
    gpu: &Gpu,
    cfg: &AttentionConfig,
    dtype: Dtype,
    tokens: usize,
    sequences: usize,
    uniform_len: Option<usize>,
) -> Result<[u64; 2]> {
    check_tokens("attention", tokens)?;
    match shape_for_cudnn(gpu, cfg, dtype, sequences, uniform_len) {
        Some(shape) => cudnn_attention::workspace(gpu, &shape),
        None => Ok([0, own_workspace(gpu, cfg, tokens)]),
    }
}

/// Whether there are tensor-core kernels for this kind.
pub(super) fn takes(cfg: &AttentionConfig, dtype: Dtype) -> bool {
    matches!(cfg.head_dim, 64 | 96 | 128) && dtype != Dtype::F32
}

fn lse_ptr(op: &'static str, lse: CudaView) -> Result<*const f32> {
    let len = lse.rows() * lse.cols();
    super::ops::vector(op, "lse", lse, len)
}

/// The number of tokens as the kernels index them.
fn check_tokens(op: &'static str, tokens: usize) -> Result<()> {
    if i32::try_from(tokens).is_err() {
        return Err(Error::invalid(op, format!("{tokens} tokens in one batch are more than 2^31 - 1")));
    }
    Ok(())
}

pub(crate) fn forward(
    op: &'static str,
    cfg: &AttentionConfig,
    q: View,
    k: View,
    v: View,
    layout: &SequenceLayout,
    out: ViewMut,
    lse: ViewMut,
) -> Result<()> {
    let (q, k, v, out, lse) = (q.cuda(op)?, k.cuda(op)?, v.cuda(op)?, out.cuda(op)?, lse.cuda(op)?);
    check_tokens(op, layout.tokens())?;
    if let Some(shape) = shape_of_batch(out.gpu(), cfg, layout, &[q, k, v, out.as_view()]) {
        lse_ptr(op, lse.as_view())?;
        return cudnn_attention::forward(&shape, cfg.scale, [q, k, v], out, lse);
    }
    let bounds = layout.on_device(out.gpu())?;
    let sequences = layout.sequences().len();
    launch_forward(op, cfg, [q, k, v], out, lse, [bounds, bounds], sequences, layout.max_len())
}

fn launch_forward(
    op: &'static str,
    cfg: &AttentionConfig,
    [q, k, v]: [CudaView; 3],
    out: CudaViewMut,
    lse: CudaViewMut,
    [bounds_q, bounds_k]: [&Buffer; 2],
    sequences: usize,
    max_q: usize,
) -> Result<()> {
    let dtype = same_dtype(op, &[q.dtype(), k.dtype(), v.dtype(), out.dtype()])?;
    let launcher = match is_fast(cfg, &[q, k, v, out.as_view()]) {
        true => ffi::qlora_attention_forward,
        false => ffi::qlora_attention_forward_simple,
    };
    let lse = lse_ptr(op, lse.as_view())?.cast_mut();
    // SAFETY: all windows are live and have the sizes that the caller checked; the bounds are those of the sequences.
    out.gpu().launch(op, |stream| unsafe {
        launcher(
            dtype,
            q.ptr() as *const _,
            q.ld(),
            k.ptr() as *const _,
            k.ld(),
            v.ptr() as *const _,
            v.ld(),
            out.ptr() as *mut _,
            out.ld(),
            lse,
            bounds_q.as_ptr(),
            bounds_k.as_ptr(),
            sequences as i64,
            max_q as i64,
            q.rows() as i64,
            cfg.heads as i64,
            cfg.kv_heads as i64,
            cfg.head_dim as i64,
            cfg.scale,
            cfg.window.unwrap_or(0) as i64,
            stream,
        )
    })
}

pub(crate) fn backward(
    op: &'static str,
    cfg: &AttentionConfig,
    [q, k, v, out, lse, dout]: [View; 6],
    layout: &SequenceLayout,
    [dq, dk, dv]: [ViewMut; 3],
) -> Result<()> {
    let (q, k, v) = (q.cuda(op)?, k.cuda(op)?, v.cuda(op)?);
    let (out, lse, dout) = (out.cuda(op)?, lse.cuda(op)?, dout.cuda(op)?);
    let (dq, dk, dv) = (dq.cuda(op)?, dk.cuda(op)?, dv.cuda(op)?);
    check_tokens(op, layout.tokens())?;
    let gpu = dq.gpu();
    let windows = [q, k, v, out, dout, dq.as_view(), dk.as_view(), dv.as_view()];
    let dtype = same_dtype(op, &windows.map(|v| v.dtype()))?;
    if let Some(shape) = shape_of_batch(gpu, cfg, layout, &[q, k, v, out]) {
        return cudnn_attention::backward(&shape, cfg.scale, [q, k, v, out, lse, dout], [dq, dk, dv]);
    }
    let bounds = layout.on_device(gpu)?;
    let deterministic = i32::from(gpu.deterministic());
    let (tokens, heads, head_dim) = (layout.tokens() as i64, cfg.heads as i64, cfg.head_dim as i64);
    let launcher = match is_fast(cfg, &windows) {
        true => ffi::qlora_attention_backward,
        false => ffi::qlora_attention_backward_simple,
    };
    let workspace = gpu.alloc(op, own_workspace(gpu, cfg, layout.tokens()) as usize)?;
    let lse = lse_ptr(op, lse)?;
    // SAFETY: all windows are live and have the sizes that the caller checked; the workspace has the size asked for.
    gpu.launch(op, |stream| unsafe {
        launcher(
            dtype,
            q.ptr() as *const _,
            q.ld(),
            k.ptr() as *const _,
            k.ld(),
            v.ptr() as *const _,
            v.ld(),
            out.ptr() as *const _,
            out.ld(),
            lse,
            dout.ptr() as *const _,
            dout.ld(),
            dq.ptr() as *mut _,
            dq.ld(),
            dk.ptr() as *mut _,
            dk.ld(),
            dv.ptr() as *mut _,
            dv.ld(),
            workspace.ptr() as *mut _,
            bounds.as_ptr(),
            layout.sequences().len() as i64,
            layout.max_len() as i64,
            tokens,
            heads,
            cfg.kv_heads as i64,
            head_dim,
            cfg.scale,
            cfg.window.unwrap_or(0) as i64,
            deterministic,
            stream,
        )
    })
}

/// The last `q.rows()` positions of `k.rows()`.
pub(crate) fn cached(op: &'static str, cfg: &AttentionConfig, q: View, k: View, v: View, out: ViewMut) -> Result<()> {
    let (q, k, v, out) = (q.cuda(op)?, k.cuda(op)?, v.cuda(op)?, out.cuda(op)?);
    check_tokens(op, k.rows())?;
    let gpu = out.gpu().arc();
    let bounds_q = Buffer::upload(&gpu, op, &[0, q.rows() as i32])?;
    let bounds_k = Buffer::upload(&gpu, op, &[0, k.rows() as i32])?;
    let mut lse = Buffer::new(&gpu, op, q.rows() * cfg.heads * 4)?;
    let shape = [q.rows(), cfg.heads];
    // SAFETY: the buffer was allocated for these elements.
    let lse = unsafe { CudaViewMut::of_buffer(&mut lse, Dtype::F32, shape, cfg.heads, 0) };
    launch_forward(op, cfg, [q, k, v], out, lse, [&bounds_q, &bounds_k], 1, q.rows())
}
