//! The indispensable parts of a step, measured piece by piece on the same card in the same run: the floor that a step
//! is compared with.
//!
//! - the matrix products of the frozen layers forward and for dX, those that the plan recomputes, and the head's, each
//!   alone and without adapters;
//! - attention, forward, backward, and again where it is recomputed;
//! - dequantization, as often as the plan says;
//! - everything elementwise by its bytes at the rate of a large copy: norms, RoPE, SwiGLU, the loss, the adapters' reads
//!   of activations, AdamW.

use anyhow::{Context, bail};
use qlora::kernels::ops::attention::{self, AttentionConfig, LseOrder};
use qlora::kernels::ops::matmul;
use qlora::kernels::{Matrix, SequenceLayout, Workspace, cuda::Gpu};
use qlora::model::{CausalLm, Keep, LinearWeight, MemoryPlan};

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Parts {
    pub(crate) products: f64,
    pub(crate) attention: f64,
    pub(crate) dequantize: f64,
    pub(crate) bytes: f64,
}

impl Parts {
    pub(crate) fn sum(&self) -> f64 {
        self.products + self.attention + self.dequantize + self.bytes
    }
}

struct Meter<'a> {
    gpu: &'a Gpu,
    workspace: &'a Workspace,
}

impl Meter<'_> {
    /// The median time of a call.
    fn time(&self, mut call: impl FnMut() -> qlora::kernels::Result<()>) -> anyhow::Result<f64> {
        call()?;
        let mut times = Vec::new();
        for _ in 0..5 {
            times.push(self.gpu.time(|| (0..2).try_for_each(|_| call()))? / 2.0);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[2])
    }

    /// Random numbers: with zeros a GPU draws less power and is faster.
    fn random(&self, rows: usize, cols: usize) -> anyhow::Result<Matrix> {
        let pattern: Vec<f32> =
            (0..1 << 16).map(|i: u32| (i.wrapping_mul(2_654_435_769) >> 16) as f32 / 32768.0 - 1.0).collect();
        let pattern = self.workspace.upload(&pattern, 1, 1 << 16)?;
        let mut matrix = self.workspace.matrix(rows, cols)?;
        {
            let mut flat = matrix.view_mut().reshape(1, rows * cols);
            let mut start = 0;
            while start < rows * cols {
                let end = (start + pattern.cols()).min(rows * cols);
                flat.reborrow().slice_cols(start..end).copy_from(pattern.view().slice_cols(0..end - start))?;
                start = end;
            }
        }
        Ok(matrix)
    }

    /// `[y = x W^T, dx = dy W]` for `W [n, k]`.
    fn products(&self, tokens: usize, n: usize, k: usize) -> anyhow::Result<[f64; 2]> {
        let (mut x, w, mut y) = (self.random(tokens, k)?, self.random(n, k)?, self.random(tokens, n)?);
        let forward = self.time(|| matmul::nt(x.view(), w.view(), y.view_mut(), 1.0, 0.0))?;
        y = self.random(tokens, n)?;
        let backward = self.time(|| matmul::nn(y.view(), w.view(), x.view_mut(), 1.0, 0.0))?;
        Ok([forward, backward])
    }

    fn attention(&self, config: &AttentionConfig, sequences: usize, len: usize) -> anyhow::Result<[f64; 2]> {
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let tokens = sequences * len;
        let layout = SequenceLayout::from_lengths(&vec![len; sequences]);
        let qkv = self.random(tokens, q + 2 * kv)?;
        let (mut out, dout) = (self.random(tokens, q)?, self.random(tokens, q)?);
        let mut lse = self.workspace.matrix_f32(tokens, config.heads)?;
        let mut dqkv = self.random(tokens, q + 2 * kv)?;
        let part = |from: usize, to: usize| qkv.view().slice_cols(from..to);
        let [qv, kv_, vv] = [part(0, q), part(q, q + kv), part(q + kv, q + 2 * kv)];
        let mut order = LseOrder::default();
        let forward = self.time(|| {
            let (out, lse) = (out.view_mut(), lse.view_mut());
            order = attention::forward(config, qv, kv_, vv, &layout, out, lse, self.workspace)?;
            Ok(())
        })?;
        let backward = self.time(|| {
            let (dq, rest) = dqkv.view_mut().split_cols(q);
            let (dk, dv) = rest.split_cols(kv);
            let (out, lse, dout) = (out.view(), lse.view(), dout.view());
            attention::backward(config, qv, kv_, vv, out, lse, order, dout, &layout, dq, dk, dv, self.workspace)
        })?;
        Ok([forward, backward])
    }
}

/// The parts of a step over `sequences` of `len` tokens, run as `plan` says.
pub(crate) fn measure(model: &CausalLm, plan: &MemoryPlan, sequences: usize, len: usize) -> anyhow::Result<Parts> {
    let workspace = model.workspace();
    let gpu = workspace.gpu().context("the model is on a GPU")?;
    let (meter, config) = (Meter { gpu, workspace }, model.config());
    let spec = config.spec();
    let block = spec.blocks.first().context("the model has blocks")?;
    let linear: Vec<LinearWeight> = model.linear_weights().take(7).collect();
    let [q_proj, k_proj, v_proj, o_proj, gate, up, down] = *linear else { bail!("a block has seven linear layers") };
    let (tokens, layers) = (sequences * len, plan.keep.len() as f64);
    let (hidden, mlp, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let q = q_proj.weight.rows();
    let qkv = q + k_proj.weight.rows() + v_proj.weight.rows();
    let count = |of: &[Keep]| plan.keep.iter().filter(|keep| of.contains(keep)).count() as f64;
    let again_attend = count(&[Keep::Input, Keep::Offload]);
    let again_gate_up = again_attend + count(&[Keep::Attention, Keep::OffloadAttention]);

    let mut parts = Parts::default();
    for (n, k, again) in
        [(qkv, hidden, again_attend), (hidden, q, again_attend), (2 * mlp, hidden, again_gate_up), (hidden, mlp, 0.0)]
    {
        let [forward, backward] = meter.products(tokens, n, k)?;
        parts.products += (layers + again) * forward + layers * backward;
    }
    let chunk = qlora::kernels::ops::linear_cross_entropy::rows_of_chunk_on_gpu(vocab).min(tokens);
    let [forward, backward] = meter.products(chunk, vocab, hidden)?;
    parts.products += (forward + backward) * tokens as f64 / chunk as f64;

    let [forward, backward] = meter.attention(&block.attention, sequences, len)?;
    parts.attention = (layers + again_attend) * forward + layers * backward;

    // Of all seven weights, and of gate and up with those of the first half.
    let mut dequantized = workspace.matrix(mlp.max(qkv), hidden.max(mlp))?;
    let mut once = |linear: &[LinearWeight]| -> anyhow::Result<f64> {
        let mut ms = 0.0;
        for LinearWeight { weight, .. } in linear {
            let (rows, cols) = (weight.rows(), weight.cols());
            let cuda = weight.as_cuda().context("the weight is on the GPU")?;
            ms += meter.time(|| cuda.dequantize(dequantized.view_mut().slice_rows(0..rows).slice_cols(0..cols)))?;
        }
        Ok(ms)
    };
    let first = once(&[q_proj, k_proj, v_proj, o_proj])?;
    let (gate_up, down) = (once(&[gate, up])?, once(&[down])?);
    let uncached = 1.0 - plan.cached_blocks as f64 / layers;
    // The second pass over a recomputed block's weights can be shared with the backward's.
    parts.dequantize = uncached * 2.0 * layers * (first + gate_up + down);

    // A copy of 1 GiB, read and written.
    let rows = (1 << 29) / hidden;
    let (from, mut to) = (meter.random(rows, hidden)?, workspace.matrix(rows, hidden)?);
    let copy = meter.time(|| to.view_mut().copy_from(from.view()))?;
    let rate = 2.0 * (2 * rows * hidden) as f64 / copy;
    let [hidden, mlp, vocab, q, qkv] = [hidden, mlp, vocab, q, qkv].map(|cols| cols as f64);
    // bf16 elements read or written a token in each block.
    let norm = 2.0 * hidden;
    let rotated = 2.0 * (qkv - (qkv - q) / 2.0);
    let adapters_forward = 2.0 * hidden + q + mlp;
    let forward = 2.0 * norm + rotated + 3.0 * mlp + adapters_forward;
    let backward =
        2.0 * (norm + 4.0 * hidden) + rotated + 6.0 * mlp + (qkv + hidden + 2.0 * mlp + hidden) + adapters_forward;
    let again = again_attend * (norm + rotated + hidden + q) + again_gate_up * (norm + hidden);
    let per_token = layers * (forward + backward) + again + 2.0 * 2.0 * vocab + 10.0 * hidden;
    let optimizer = 36.0 * model.adapter().map_or(0, |adapter| adapter.layout().len()) as f64;
    parts.bytes = (2.0 * per_token * tokens as f64 + optimizer) / rate;
    Ok(parts)
}
