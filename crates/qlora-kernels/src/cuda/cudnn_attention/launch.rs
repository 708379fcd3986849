//! Calls of cuDNN's attention with the windows of a batch.

use super::{OP, PackedBatch};
use crate::cuda::cudnn::{
    Cudnn, CudnnError, Packing, Rows, SPARE_ROWS, SdpaBackward, SdpaForward, SdpaLaunch, SdpaShape,
};
use crate::cuda::gpu::Gpu;
use crate::cuda::view::CudaView;
use crate::error::{Error, Result};
use crate::ops::attention::AttentionConfig;

/// Bytes that plans may want besides what [`packed_workspace`] derives.
const SLACK: u64 = 4 << 20;

/// An attention task for cuDNN: sequences of one length, or packed ones.
#[derive(Clone, Copy)]
pub(in crate::cuda) struct Task<'a> {
    pub(super) shape: SdpaShape,
    pub(super) packed: Option<&'a PackedBatch>,
}

fn rows(view: CudaView) -> Rows {
    Rows { pointer: view.ptr(), stride: view.ld() }
}

/// The reason why a call did not run.
pub(super) enum Failure {
    /// There is no plan for its shape, or none that is to be used.
    Refused(String),
    /// Its workspace cannot be had. Another path may need less.
    Memory,
    /// It should have run.
    Failed(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::OutOfMemory { .. } => Self::Memory,
            error => Self::Failed(error.to_string()),
        }
    }
}

type Outcome = std::result::Result<(), Failure>;

fn refused(error: CudnnError) -> Failure {
    Failure::Refused(error.to_string())
}

fn invalid(error: CudnnError) -> Error {
    Error::invalid(OP, error.to_string())
}

/// The most bytes of workspace that a packed forward and backward may take, for bounds of so many rows: a plan that wants more
/// is not used, so that memory can be planned before any batch is there.
///
/// For grouped heads the backward keeps `dK` and `dV` of every query head for every row of the bounds (the engine cannot know
/// how few of them are tokens), and nothing else: measured with cuDNN 9.19 on an H200, for uniform and packed batches. Where
/// every head has its own keys, `dQ` and the row sums in f32 for every token are allowed for.
pub(super) fn packed_workspace(cfg: &AttentionConfig, rows: usize, tokens: usize, dq_stride: usize) -> [u64; 2] {
    let bytes = match cfg.heads == cfg.kv_heads {
        true => (tokens as u64 + SPARE_ROWS as u64) * (cfg.heads + dq_stride) as u64 * 4,
        false => 2 * rows as u64 * (cfg.heads * cfg.head_dim) as u64 * 2,
    };
    [SLACK, SLACK + bytes]
}

/// Runs a launch on the GPU's stream.
fn run(gpu: &Gpu, cudnn: &Cudnn, launch: &SdpaLaunch<'_>, most: Option<u64>) -> Outcome {
    let bytes = launch.workspace();
    if let Some(most) = most.filter(|most| bytes as u64 > *most) {
        let message = format!("a packed plan wants a workspace of {bytes} bytes, planned were {most}");
        return Err(Failure::Refused(message));
    }
    let retired = cudnn.take_retired();
    if !retired.is_empty() {
        // Kernels of theirs may be under way.
        gpu.synchronize(OP)?;
        drop(retired);
    }
    let workspace = gpu.alloc(OP, bytes)?;
    let enqueue = || {
        // SAFETY: all windows are live and have the sizes of the shape (checked by `ops::attention`); lengths and offsets are
        // those of the batch, within the shape's bounds, and live as long as it; the workspace is freed on the same stream.
        unsafe { launch.run(gpu.stream().cu_stream().cast(), workspace.ptr()) }.map_err(invalid)
    };
    Ok(gpu.span(OP, || "attention_cudnn".to_owned(), enqueue)?)
}

pub(super) fn forward(
    cudnn: &Cudnn,
    task: Task,
    cfg: &AttentionConfig,
    [q, k, v]: [CudaView; 3],
    out: CudaView,
    lse: CudaView,
) -> Outcome {
    let gpu = out.gpu();
    let strides = [q.ld(), k.ld(), v.ld(), out.ld(), cfg.heads as i64];
    let placed = task.packed.map(|packed| packed.on_device(gpu, &strides)).transpose()?;
    let tensors = SdpaForward {
        q: rows(q),
        k: rows(k),
        v: rows(v),
        o: rows(out),
        lse: lse.ptr(),
        scale: cfg.scale,
        packing: placed.as_ref().map(packing),
    };
    let most = task.packed.map(|packed| packed_workspace(cfg, packed.bounds.rows(), q.rows(), 0)[0]);
    run(gpu, cudnn, &cudnn.forward(&task.shape, &tensors).map_err(refused)?, most)
}

pub(super) fn backward(
    cudnn: &Cudnn,
    task: Task,
    cfg: &AttentionConfig,
    [q, k, v, out, lse, dout]: [CudaView; 6],
    [dq, dk, dv]: [CudaView; 3],
) -> Outcome {
    let gpu = dq.gpu();
    let strides = [q, k, v, out, dout, dq, dk, dv].map(|view| view.ld());
    let strides: Vec<i64> = strides.into_iter().chain([cfg.heads as i64]).collect();
    let placed = task.packed.map(|packed| packed.on_device(gpu, &strides)).transpose()?;
    let tensors = SdpaBackward {
        q: rows(q),
        k: rows(k),
        v: rows(v),
        o: rows(out),
        lse: lse.ptr(),
        d_o: rows(dout),
        dq: rows(dq),
        dk: rows(dk),
        dv: rows(dv),
        scale: cfg.scale,
        packing: placed.as_ref().map(packing),
    };
    let most = task.packed.map(|packed| {
        let [_, backward] = packed_workspace(cfg, packed.bounds.rows(), q.rows(), dq.ld() as usize);
        backward
    });
    run(gpu, cudnn, &cudnn.backward(&task.shape, &tensors).map_err(refused)?, most)
}

fn packing(placed: &super::batch::Placed) -> Packing<'_> {
    Packing { tokens: placed.tokens, lengths: placed.lengths, offsets: &placed.offsets }
}

/// Bytes of workspace of forward and backward for sequences of one length, as cuDNN plans them for windows of one fused buffer.
pub(super) fn uniform_workspace(cudnn: &Cudnn, shape: &SdpaShape) -> Result<[u64; 2]> {
    let (wide, fused) = (shape.heads * shape.head_dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    // No memory is touched: only a launch would.
    let rows = |stride| Rows { pointer: 256, stride };
    let forward = SdpaForward {
        q: rows(fused),
        k: rows(fused),
        v: rows(fused),
        o: rows(wide),
        lse: 256,
        scale: 1.0,
        packing: None,
    };
    let backward = SdpaBackward {
        q: rows(fused),
        k: rows(fused),
        v: rows(fused),
        o: rows(wide),
        lse: 256,
        d_o: rows(wide),
        dq: rows(fused),
        dk: rows(fused),
        dv: rows(fused),
        scale: 1.0,
        packing: None,
    };
    let forward = cudnn.forward(shape, &forward).map_err(invalid)?.workspace();
    Ok([forward as u64, cudnn.backward(shape, &backward).map_err(invalid)?.workspace() as u64])
}
