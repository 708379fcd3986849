//! Attention: cuDNN's where it is there and faster, our tensor-core kernels where they fit, simple ones elsewhere.

use super::buffer::Buffer;
use super::cudnn_attention::Task;
use super::ffi;
use super::gpu::Gpu;
use super::ops::same_dtype;
use super::view::{CudaView, CudaViewMut};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::ops::attention::{AttentionConfig, AttentionPath, LseOrder};
use crate::sequence::SequenceLayout;
use crate::view::{View, ViewMut};

/// Whether the tensor-core kernels take this shape and these windows.
fn is_fast(cfg: &AttentionConfig, windows: &[CudaView]) -> bool {
    let aligned = |v: &CudaView| v.ptr().is_multiple_of(16) && v.stride().is_multiple_of(8);
    windows.iter().all(|v| takes(cfg, v.dtype()) && aligned(v))
}

/// Whether cuDNN computes the attention of `cfg` for sequences of at most `longest` tokens, as exactly as was asked
/// for.
fn cudnn_computes(gpu: &Gpu, cfg: &AttentionConfig, dtype: Dtype, longest: usize) -> bool {
    cfg.window.is_none_or(|window| window >= longest) && !gpu.deterministic() && takes(cfg, dtype)
}

/// Bytes that the backward of our own kernels takes.
fn own_workspace(gpu: &Gpu, cfg: &AttentionConfig, tokens: usize) -> u64 {
    let deterministic = i32::from(gpu.deterministic());
    let (tokens, heads, head_dim) = (tokens as i64, cfg.heads as i64, cfg.head_dim as i64);
    // SAFETY: a pure function of its arguments.
    unsafe { ffi::qlora_attention_backward_workspace(tokens, heads, head_dim, deterministic) as u64 }
}

/// Bytes of workspace that [`forward`] and [`backward`] take for the batches of a run, at most: `sequences` sequences of
/// `uniform_len` tokens, or if there is no such length, of any lengths, `tokens` in all. (Where bins are filled with several
/// sequences, the number of bins.)
///
/// # Errors
/// If a batch has more tokens than the kernels take.
pub fn workspace(
    gpu: &Gpu,
    cfg: &AttentionConfig,
    dtype: Dtype,
    tokens: usize,
    sequences: usize,
    uniform_len: Option<usize>,
) -> Result<[u64; 2]> {
    check_tokens("attention", tokens)?;
    let own = [0, own_workspace(gpu, cfg, tokens)];
    let longest = uniform_len.unwrap_or(tokens / sequences.max(1));
    if !cudnn_computes(gpu, cfg, dtype, longest) {
        return Ok(own);
    }
    let library = gpu.attention().workspace(gpu, cfg, dtype, tokens, sequences, uniform_len);
    Ok([own[0].max(library[0]), own[1].max(library[1])])
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
) -> Result<LseOrder> {
    let (q, k, v, out, lse) = (q.cuda(op)?, k.cuda(op)?, v.cuda(op)?, out.cuda(op)?, lse.cuda(op)?);
    check_tokens(op, layout.tokens())?;
    let gpu = out.gpu();
    same_dtype(op, &[q.dtype(), k.dtype(), v.dtype(), out.dtype()])?;
    let fast = is_fast(cfg, &[q, k, v, out.as_view()]) && cudnn_computes(gpu, cfg, q.dtype(), layout.max_len());
    lse_ptr(op, lse.as_view())?;
    if let Some(task) = fast.then(|| gpu.attention().task(gpu, cfg, q.dtype(), layout)).flatten() {
        let order = match task.path() {
            AttentionPath::CudnnUniform => LseOrder::BySequence,
            AttentionPath::CudnnPacked | AttentionPath::Own => LseOrder::ByToken,
        };
        if task.forward(cfg, [q, k, v], out.as_view(), lse.as_view()) {
            return Ok(order);
        }
    }
    let bounds = layout.on_device(gpu)?;
    let sequences = layout.sequences().len();
    launch_forward(op, cfg, [q, k, v], out, lse, [bounds, bounds], sequences, layout.max_len())?;
    gpu.attention().called(AttentionPath::Own);
    Ok(LseOrder::ByToken)
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
            out.gpu().launch_limits(),
            stream,
        )
    })
}

pub(crate) fn backward(
    op: &'static str,
    cfg: &AttentionConfig,
    [q, k, v, out, lse, dout]: [View; 6],
    order: LseOrder,
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
    let (inputs, gradients) = ([q, k, v, out, lse, dout], [dq.as_view(), dk.as_view(), dv.as_view()]);
    let fast = is_fast(cfg, &windows) && cudnn_computes(gpu, cfg, q.dtype(), layout.max_len());
    let task = match order {
        _ if !fast || !gpu.attention().enabled() => None,
        LseOrder::BySequence => Task::after_uniform_forward(cfg, q.dtype(), layout),
        // cuDNN for sequences of one length does not read this order.
        LseOrder::ByToken => {
            let task = gpu.attention().task(gpu, cfg, q.dtype(), layout);
            task.filter(|task| task.path() == AttentionPath::CudnnPacked)
        }
    };
    if let Some(task) = task {
        lse_ptr(op, lse)?;
        if task.backward(cfg, inputs, gradients) {
            return Ok(());
        }
    }
    let by_token = match order {
        LseOrder::ByToken => None,
        LseOrder::BySequence => Some(lse_by_token(op, lse, layout)?),
    };
    let bounds = layout.on_device(gpu)?;
    let deterministic = i32::from(gpu.deterministic());
    let (tokens, heads, head_dim) = (layout.tokens() as i64, cfg.heads as i64, cfg.head_dim as i64);
    let launcher = match is_fast(cfg, &windows) {
        true => ffi::qlora_attention_backward,
        false => ffi::qlora_attention_backward_simple,
    };
    let workspace = gpu.alloc(op, own_workspace(gpu, cfg, layout.tokens()) as usize)?;
    let lse = match &by_token {
        Some(buffer) => buffer.as_ptr(),
        None => lse_ptr(op, lse)?,
    };
    gpu.attention().called(AttentionPath::Own);
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
            gpu.launch_limits(),
            stream,
        )
    })
}

/// A copy of `lse` in the order that our kernels read, where a forward by cuDNN wrote it by sequence.
fn lse_by_token(op: &'static str, lse: CudaView, layout: &SequenceLayout) -> Result<Buffer> {
    let len = layout.uniform_len().ok_or_else(|| Error::invalid(op, "lse of another batch: its lengths are one"))?;
    let gpu = lse.gpu().arc();
    let (from, heads) = (lse_ptr(op, lse)?, lse.cols());
    let mut to = Buffer::new(&gpu, op, lse.rows() * heads * 4)?;
    let to_ptr = to.as_mut_ptr();
    // SAFETY: both hold `tokens * heads` elements; `len` divides the number of tokens.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_attention_lse_by_token(from, to_ptr, lse.rows() as i64, len as i64, heads as i64, stream)
    })?;
    Ok(to)
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
