//! Groups of layers over a few tokens, as in generation: 4-bit weights are read as they are stored, once, and never
//! dequantized into memory (`nf4_gemv.cu`, `nf4_small_gemm.cu`). The adapters' `S = x A^T` is a launch of its own, in f32;
//! `s S B^T`, the residual and, for gate and up, `silu(gate) up` happen in the product.
//!
//! Up to [`most_tokens`] tokens this beats dequantization and cuBLAS for every weight of an 8B model (on an H100,
//! 14336x4096: 32 against 100 us for 64 tokens, 63 against 101 for 128, 126 against 107 for 256).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::buffer::Buffer;
use super::ffi;
use super::gpu::Gpu;
use super::linear_group::{add_biases, check_gpu, keeps_fp8};
use super::step_memory::lasting;
use super::view::{CudaView, CudaViewMut, one_gpu};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::ops::linear_group::{AdapterPass, Group, InputNorm, margin};

/// The most tokens that take this way on this GPU.
fn most_tokens(gpu: &Gpu) -> usize {
    // SAFETY: a pure function of the limits.
    unsafe { ffi::qlora_few_tokens_most(gpu.launch_limits()) as usize }
}

/// The most tokens of the kernel for single tokens.
const MOST_OF_GEMV: usize = 16;

/// Up to here one column tile of the tensor cores holds all tokens.
const MOST_OF_EIGHT: usize = 8;

/// From here on a product with weights that are kept in fp8 is faster, although the adapters are launches of their own there: one byte
/// a weight is read and none is decoded. On an H200 a step of an 8B model takes 7.0 ms for 7.6 with 64 rows, 8.0 for 13.1 with 128,
/// but 6.5 for 5.3 with 32.
const LEAST_OF_FP8: usize = 64;

/// Memory of the kernels' own, zero at first; each leaves its counters, which lie at the beginning, as it found them.
#[derive(Debug, Default)]
pub(super) struct Workspaces {
    gemv: Mutex<Option<Buffer>>,
    gemm: Mutex<Option<Buffer>>,
    pub(super) attention: Mutex<Option<Buffer>>,
    /// The number of times one of them got another address, which graphs have.
    pub(super) moves: AtomicU64,
    moving: Mutex<()>,
}

impl Workspaces {
    /// While it lives, none gets another address.
    pub(super) fn still(&self) -> MutexGuard<'_, ()> {
        self.moving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs `launch` with the address of at least `bytes` bytes that were zero at first (none for 0 bytes). No other call
/// gets them before the launch is enqueued: a larger request frees them behind it.
pub(super) fn with_zeroed(
    gpu: &Gpu,
    op: &'static str,
    slot: &Mutex<Option<Buffer>>,
    bytes: usize,
    launch: impl FnOnce(*mut u8) -> Result<()>,
) -> Result<()> {
    if bytes == 0 {
        return launch(std::ptr::null_mut());
    }
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    let buffer = match &mut *slot {
        Some(buffer) if buffer.bytes() >= bytes => buffer,
        _ => {
            let mut buffer = lasting(|| Buffer::new(&gpu.arc(), op, bytes.next_power_of_two()))?;
            buffer.fill_bytes(0)?;
            let workspaces = gpu.workspaces();
            let _alone = workspaces.still();
            workspaces.moves.fetch_add(1, Ordering::Relaxed);
            slot.insert(buffer)
        }
    };
    launch(buffer.as_mut_ptr())
}

/// Whether a launch took place: a kernel that does not take the arguments on this GPU says so before it starts.
fn taken(launched: Result<()>) -> Result<bool> {
    const INVALID_VALUE: i32 = 1;
    /// More shared memory than there is.
    const OUT_OF_RESOURCES: i32 = 701;
    match launched {
        Ok(()) => Ok(true),
        Err(Error::Cuda { code: INVALID_VALUE | OUT_OF_RESOURCES, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes `y` (or, with `swiglu`, `silu(gate) up` of a group of two) if the kernels take these arguments; says whether. With
/// `norm`, the group's input is the norm of `x`.
pub(crate) fn forward(
    op: &'static str,
    group: &Group,
    x: CudaView,
    norm: Option<&InputNorm>,
    adapter: Option<&AdapterPass>,
    residual: Option<CudaView>,
    y: CudaViewMut,
    swiglu: bool,
    workspace: &Workspace,
) -> Result<bool> {
    let tokens = x.rows();
    let aligned = |v: CudaView| v.ptr().is_multiple_of(16) && v.stride().is_multiple_of(8);
    let types = [Some(y.dtype()), residual.map(|residual| residual.dtype())];
    let same = types.into_iter().flatten().all(|dtype| dtype == x.dtype());
    let fits = (1..=most_tokens(y.gpu())).contains(&tokens) && x.dtype() != Dtype::F32 && same;
    if tokens >= LEAST_OF_FP8 && keeps_fp8(group) {
        return Ok(false);
    }
    let biased = group.members.iter().any(|member| member.bias.is_some());
    let rounds = y.gpu().peft_rounding() && adapter.is_some();
    if !fits || !aligned(x) || (swiglu && biased) || rounds || adapter.is_some_and(AdapterPass::drops) {
        return Ok(false);
    }
    let Some(mut weights) = weights(group) else { return Ok(false) };
    let gpu = y.gpu();
    let values = adapter.and_then(|adapter| adapter.values.gpu());
    check_gpu(op, group, gpu, [Some(x.gpu()), residual.map(|residual| residual.gpu()), values])?;
    let adapters = adapter.map(|adapter| places(op, group, adapter, &mut weights)).transpose()?.flatten();
    let (s, normed) = match (adapters, norm) {
        (Some((adapters, columns)), None) => (Some(shrink(op, x, adapters, columns, workspace)?), None),
        (None, None) => (None, None),
        (Some((adapters, columns)), Some(norm)) => {
            let Some((s, normed)) = norm_shrink(op, x, norm, adapters, columns, workspace)? else { return Ok(false) };
            (Some(s), Some(normed))
        }
        // Without adapters there is nothing to save: the norm is a launch in any case.
        (None, Some(_)) => return Ok(false),
    };
    let x = match &normed {
        Some(normed) => normed.view().cuda(op)?,
        None => x,
    };
    let (s, lds) = match &s {
        Some(s) => (s.view().cuda(op)?.ptr() as *const f32, s.cols() as i64),
        None => (std::ptr::null(), 0),
    };
    let (residual, ldr) = residual.map_or((std::ptr::null(), 0), |r| (r.ptr() as *const _, r.ld()));
    let (dtype, swiglu) = (x.dtype().code(), i32::from(swiglu));
    let rows: i64 = weights.m[..weights.count as usize].iter().map(|member| member.rows).sum();
    let product = |kernel: ffi::FewProduct, scratch: *mut u8| {
        // SAFETY: all windows, weights and the workspace are live and have the sizes passed. Launched early: weights and
        // adapters are read before the launches before this one are done; they were settled earlier (see `Group::infer`).
        gpu.launch(op, |stream| unsafe {
            kernel(
                dtype,
                weights,
                x.ptr() as *const _,
                x.ld(),
                s,
                lds,
                residual,
                ldr,
                y.ptr() as *mut _,
                y.ld(),
                tokens as i64,
                swiglu,
                gpu.early(),
                scratch.cast(),
                gpu.launch_limits(),
                stream,
            )
        })
    };
    let mut done = false;
    if (MOST_OF_EIGHT + 1..=MOST_OF_GEMV).contains(&tokens) {
        done = taken(product(ffi::qlora_nf4_gemv16, std::ptr::null_mut()))?;
    }
    if tokens <= MOST_OF_GEMV && !done {
        // SAFETY: a pure function of its arguments.
        let bytes = unsafe { ffi::qlora_nf4_gemv_workspace(rows, weights.k, tokens as i64, gpu.launch_limits()) };
        let launch = |scratch| product(ffi::qlora_nf4_gemv, scratch);
        done = taken(with_zeroed(gpu, op, &gpu.workspaces().gemv, bytes as usize, launch))?;
    }
    if !done {
        // SAFETY: a pure function of its arguments.
        let bytes = unsafe { ffi::qlora_nf4_small_gemm_workspace(weights, tokens as i64, swiglu, gpu.launch_limits()) };
        let launch = |scratch| product(ffi::qlora_nf4_small_gemm, scratch);
        if !taken(with_zeroed(gpu, op, &gpu.workspaces().gemm, bytes as usize, launch))? {
            return Ok(false);
        }
    }
    add_biases(op, group, y)?;
    Ok(true)
}

/// The group's weights as the kernels take them, if they do.
fn weights(group: &Group) -> Option<ffi::FewWeights> {
    let mut weights =
        ffi::FewWeights { k: group.inputs() as i64, count: group.members.len() as i32, ..Default::default() };
    for (index, member) in group.members.iter().enumerate() {
        let (format, few) = member.weight.as_cuda()?.few_member()?;
        if index > 0 && format != [weights.blocksize, weights.nested_blocksize, i64::from(weights.quant_type)] {
            return None;
        }
        [weights.blocksize, weights.nested_blocksize] = [format[0], format[1]];
        weights.quant_type = format[2] as i32;
        weights.m[index] = few;
    }
    let plain = !weights.m[0].absmax.is_null();
    let same = weights.m[..group.members.len()].iter().all(|member| member.absmax.is_null() != plain);
    let nested = plain || weights.nested_blocksize >= 4;
    (weights.k % 64 == 0 && weights.blocksize >= 64 && same && nested).then_some(weights)
}

/// The adapters' A for the launches that make S, the columns of S, and the adapters' places in `weights`; none if no member has
/// an adapter.
fn places(
    op: &'static str,
    group: &Group,
    adapter: &AdapterPass,
    weights: &mut ffi::FewWeights,
) -> Result<Option<(ffi::Shrink, usize)>> {
    let columns = margin(group.members.iter().map(|member| member.lora));
    if columns == 0 {
        return Ok(None);
    }
    let values = adapter.values.cuda(op)?;
    let flat = super::ops::vector(op, "the adapter", values, values.rows() * values.cols())?;
    let len = values.rows() * values.cols();
    let mut shrink = ffi::Shrink::default();
    let mut column = 0;
    for (index, member) in group.members.iter().enumerate() {
        let Some(slot) = member.lora else { continue };
        Error::check_shape(op, "A", &[slot.a.len()], &[slot.rank * group.inputs()])?;
        Error::check_shape(op, "B", &[slot.b.len()], &[slot.rank * member.weight.rows()])?;
        if slot.a.end.max(slot.b.end) > len {
            let message = format!("an adapter lies beyond the buffer of {len} elements");
            return Err(Error::invalid(op, message));
        }
        let place = shrink.count as usize;
        // In the bounds that were just checked.
        shrink.a[place] = flat.wrapping_add(slot.a.start);
        (shrink.rank[place], shrink.r0[place]) = (slot.rank as i32, column);
        shrink.count += 1;
        let few = &mut weights.m[index];
        few.lora_b = flat.wrapping_add(slot.b.start);
        (few.scale, few.rank, few.r0) = (slot.scale, slot.rank as i32, column);
        column += slot.rank as i32;
    }
    Ok(Some((shrink, columns)))
}

/// `S = x A^T` of all members side by side, f32.
fn shrink(
    op: &'static str,
    x: CudaView,
    adapters: ffi::Shrink,
    columns: usize,
    workspace: &Workspace,
) -> Result<Matrix> {
    let mut s = workspace.matrix_f32(x.rows(), columns)?;
    let target = s.view_mut().cuda(op)?;
    // SAFETY: all windows are live; the adapters lie in the flat buffer.
    target.gpu().launch(op, |stream| unsafe {
        ffi::qlora_lora_shrink_few(
            x.dtype().code(),
            x.ptr() as *const _,
            x.ld(),
            adapters,
            target.ptr() as *mut f32,
            target.ld(),
            columns as i64,
            x.rows() as i64,
            x.cols() as i64,
            target.gpu().early(),
            stream,
        )
    })?;
    Ok(s)
}

/// S of the norm of `x`, and the norm of `x`, if there is a kernel that makes both.
fn norm_shrink(
    op: &'static str,
    x: CudaView,
    norm: &InputNorm,
    adapters: ffi::Shrink,
    columns: usize,
    workspace: &Workspace,
) -> Result<Option<(Matrix, Matrix)>> {
    let weight = norm.weight.cuda(op)?;
    one_gpu(op, x.gpu(), [weight.gpu()])?;
    let weight = super::ops::vector(op, "the norm's weight", weight, x.cols())?;
    let mut s = workspace.matrix_f32(x.rows(), columns)?;
    let mut normed = workspace.matrix(x.rows(), x.cols())?;
    if workspace.dtype() != x.dtype() {
        return Ok(None);
    }
    let (target, y) = (s.view_mut().cuda(op)?, normed.view_mut().cuda(op)?);
    // SAFETY: all windows are live and have the sizes passed; the adapters lie in the flat buffer. The norm's weight is read
    // early; it was settled when the model was loaded.
    let launched = target.gpu().launch(op, |stream| unsafe {
        ffi::qlora_norm_shrink_few(
            x.dtype().code(),
            x.ptr() as *const _,
            x.ld(),
            weight,
            norm.eps,
            y.ptr() as *mut _,
            y.ld(),
            adapters,
            target.ptr() as *mut f32,
            target.ld(),
            columns as i64,
            x.rows() as i64,
            x.cols() as i64,
            target.gpu().early(),
            stream,
        )
    });
    Ok(taken(launched)?.then_some((s, normed)))
}

/// `y = x W^T` for a weight in the activations' own 16-bit type and at most 16 tokens, if the kernel takes it. `settled`:
/// nothing on the stream is still writing the weight, so it may be read ahead.
pub(super) fn plain(
    op: &'static str,
    x: CudaView,
    (w, settled): (CudaView, bool),
    y: &mut CudaViewMut,
) -> Result<bool> {
    let aligned = |v: CudaView| v.ptr().is_multiple_of(16) && v.stride().is_multiple_of(8);
    let (tokens, k) = (x.rows(), x.cols());
    let fits = (1..=MOST_OF_GEMV).contains(&tokens) && k.is_multiple_of(32) && k <= 8192;
    let types =
        x.dtype() != Dtype::F32 && x.dtype() == w.dtype() && (y.dtype() == x.dtype() || y.dtype() == Dtype::F32);
    if !fits || !types || !aligned(x) || !aligned(w) {
        return Ok(false);
    }
    one_gpu(op, y.gpu(), [x.gpu(), w.gpu()])?;
    // SAFETY: all windows are live and have the sizes passed.
    let launched = y.gpu().launch(op, |stream| unsafe {
        ffi::qlora_bf16_gemv(
            x.dtype().code(),
            w.ptr() as *const _,
            w.ld(),
            x.ptr() as *const _,
            x.ld(),
            y.dtype().code(),
            y.ptr() as *mut _,
            y.ld(),
            tokens as i64,
            w.rows() as i64,
            k as i64,
            if settled { y.gpu().early() } else { 0 },
            y.gpu().launch_limits(),
            stream,
        )
    });
    taken(launched)
}
