//! One decoder block, forward and a hand-derived backward over the same operations.
//!
//! ```text
//! n1 = norm(x)            q, k, v = rope(norm?(n1 Wq)), rope(norm?(n1 Wk)), n1 Wv
//! m  = x + attention(q, k, v) Wo
//! n2 = norm(m)            h = silu(n2 Wg) * (n2 Wu)
//! y  = m + h Wd
//! ```
//!
//! All activations are `[tokens, width]`: f32 on the CPU, bf16 (or f16, f32) on CUDA. q, k and v are the columns of one
//! matrix, and so are gate and up. What the backward needs is kept in [`Saved`]; normed inputs and `h` are cheap and made
//! again. The residual sums happen inside the projections that end in them. Matrices that a projection with adapters
//! reads, and gradients of those it writes, have a margin for the adapters' small factors
//! ([`qlora_kernels::ops::linear_group`]).

use std::sync::atomic::{AtomicBool, Ordering};

use qlora_kernels::ops::attention::{self, AttentionConfig};
use qlora_kernels::ops::linear_group::{Group, Member, Shrunk, margin};
use qlora_kernels::ops::rope::{self, RopeTable};
use qlora_kernels::ops::{rms_norm, swiglu};
use qlora_kernels::sequence::Positions;
use qlora_kernels::weight::WeightCache;
use qlora_kernels::{Matrix, SequenceLayout, View, ViewMut, Workspace};

use super::cache::LayerCache;
use super::projection::{AdapterPass, Projection};
use crate::error::Result;

/// A decoder block with its frozen weights and its adapters' places.
#[derive(Debug)]
pub struct Block {
    /// Weight of the norm before attention, one f32 row.
    pub input_norm: Matrix,
    /// Weight of the norm before the MLP, one f32 row.
    pub post_attention_norm: Matrix,
    /// Weights of the norms on every head of q and k (Qwen3).
    pub qk_norm: Option<(Matrix, Matrix)>,
    /// Added to the mean square in every norm.
    pub eps: f32,
    /// Heads, their width, scale and window.
    pub attention: AttentionConfig,
    /// Query projection.
    pub q: Projection,
    /// Key projection.
    pub k: Projection,
    /// Value projection.
    pub v: Projection,
    /// Attention's output projection.
    pub o: Projection,
    /// The MLP's gate.
    pub gate: Projection,
    /// The MLP's value path.
    pub up: Projection,
    /// The MLP's output projection.
    pub down: Projection,
    /// Where dequantized weights may be kept.
    pub caches: WeightCaches,
}

/// Where the dequantized weights of a block's groups may be kept between uses.
#[derive(Debug, Default)]
pub struct WeightCaches {
    qkv: WeightCache,
    o: WeightCache,
    gate_up: WeightCache,
    down: WeightCache,
    split: AtomicBool,
}

impl WeightCaches {
    /// Dequantizes one weight at a time instead of those that share an input together (CUDA only): less memory, more
    /// time, sums in another order.
    pub fn set_split(&self, split: bool) {
        self.split.store(split, Ordering::Relaxed);
    }

    /// See [`Self::set_split`].
    pub fn is_split(&self) -> bool {
        self.split.load(Ordering::Relaxed)
    }

    /// Keeps the dequantized weights of the whole block from their next use on, or frees them.
    pub fn set_enabled(&self, enabled: bool) {
        [&self.qkv, &self.o, &self.gate_up, &self.down].iter().for_each(|cache| cache.set_enabled(enabled));
    }
}

/// What all blocks share in one pass.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// The adapter; none runs the base model.
    pub adapter: Option<AdapterPass<'a>>,
    /// The batch's sequences.
    pub layout: &'a SequenceLayout,
    /// Rotation angles by position.
    pub rope: &'a RopeTable,
    /// Where memory comes from.
    pub workspace: &'a Workspace,
}

/// What a block keeps from its forward for its backward.
#[derive(Debug)]
pub enum Saved {
    /// Everything the backward reads.
    Kept(Box<Activations>),
    /// The block's input alone: the backward runs the forward again, up to the last projection.
    Input(Matrix),
}

/// The activations that a backward reads.
#[derive(Debug)]
pub struct Activations {
    x: Matrix,
    qkv: Qkv,
    attn: Matrix,
    lse: Matrix,
    mid: Matrix,
    rstd_mid: Matrix,
    gate_up: Matrix,
    s: Factors,
}

/// Queries, keys and values side by side, normed and rotated, and what the backward needs of how they were made.
#[derive(Debug)]
struct Qkv {
    qkv: Matrix,
    rstd: Matrix,
    /// q and k as projected, side by side, with 1/rms of each head, where the model norms them.
    raw: Option<RawQk>,
    s: Shrunk,
}

#[derive(Debug)]
struct RawQk {
    qk: Matrix,
    rstd_q: Matrix,
    rstd_k: Matrix,
}

/// `S = drop(x) A^T` of the groups after attention.
#[derive(Debug, Default)]
struct Factors {
    o: Shrunk,
    gate_up: Shrunk,
    down: Shrunk,
}

/// A group with the array that its members are borrowed from.
macro_rules! group {
    ($name:ident, $block:expr, $cache:ident, $($member:ident),+) => {
        let members = [$($block.$member.member()),+];
        let $name = Group { members: &members, cache: &$block.caches.$cache, split: $block.caches.is_split() };
    };
}

impl Block {
    /// The projections in the order of the adapter's layout.
    pub fn projections(&self) -> [&Projection; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// The projections, to give them adapters.
    pub fn projections_mut(&mut self) -> [&mut Projection; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }

    /// Bytes of the norms and biases.
    pub fn vector_bytes(&self) -> usize {
        let qk = self.qk_norm.as_ref().map_or(0, |(q, k)| q.bytes() + k.bytes());
        let biases: usize = self.projections().iter().map(|p| p.bias().map_or(0, Matrix::bytes)).sum();
        self.input_norm.bytes() + self.post_attention_norm.bytes() + qk + biases
    }

    /// Whether any projection has an adapter.
    pub fn is_trained(&self) -> bool {
        self.projections().iter().any(|projection| projection.slot().is_some())
    }

    /// The margin that the gradient of the residual stream needs: it is what o and down get.
    pub fn residual_margin(&self) -> usize {
        margin_of(&[self.o.member()]).max(margin_of(&[self.down.member()]))
    }

    fn qkv_margin(&self) -> usize {
        margin_of(&[self.q.member(), self.k.member(), self.v.member()])
    }

    fn gate_up_margin(&self) -> usize {
        margin_of(&[self.gate.member(), self.up.member()])
    }

    /// Runs the block on `x [tokens, hidden]`; with `keep`, also what [`Self::backward`] needs.
    pub fn forward(&self, x: Matrix, pass: &Pass, keep: Keep) -> Result<(Matrix, Option<Saved>)> {
        let Pass { workspace, .. } = *pass;
        let mut activations = self.forward_to_mlp(x, pass)?;
        let mut h = self.mlp_hidden(&activations.gate_up, workspace)?;
        if keep != Keep::Everything {
            // Nothing reads it again: its memory can serve the last projection.
            activations.gate_up = workspace.matrix(0, 0)?;
        }
        let mut y = workspace.matrix(h.rows(), self.down.outputs())?;
        let residual = Some(activations.mid.view());
        group!(down, self, down, down);
        activations.s.down = down.forward(h.view_mut(), pass.adapter.as_ref(), residual, y.view_mut(), workspace)?;
        let saved = match keep {
            Keep::Nothing => None,
            Keep::Input | Keep::Offload => Some(Saved::Input(activations.x)),
            Keep::Everything => Some(Saved::Kept(Box::new(activations))),
        };
        Ok((y, saved))
    }

    /// Turns `dy` (with the margin of [`Self::residual_margin`]) into `dx` (or gives nothing, if the caller does not need
    /// it) and adds the adapters' gradients to `gradient`, which is laid out as the adapter.
    pub fn backward(
        &self,
        saved: Saved,
        dy: Matrix,
        pass: &Pass,
        mut gradient: ViewMut,
        needs_dx: bool,
    ) -> Result<Option<Matrix>> {
        let (saved, recomputed) = match saved {
            Saved::Kept(activations) => (*activations, false),
            Saved::Input(x) => (self.forward_to_mlp(x, pass)?, true),
        };
        let (activations, dmid) = self.backward_mlp(saved, dy, pass, gradient.reborrow(), recomputed)?;
        self.backward_attention(activations, dmid, pass, gradient, needs_dx)
    }

    /// Runs the block on the next tokens of several sequences, one after the other in `x` as `pass.layout` says; the
    /// earlier keys and values of each are in its cache.
    pub(crate) fn forward_cached(
        &self,
        x: Matrix,
        positions: &Positions,
        caches: &mut [&mut LayerCache],
        pass: &Pass,
    ) -> Result<Matrix> {
        let Pass { workspace, layout, .. } = *pass;
        let adapter = pass.adapter.as_ref();
        let made = self.project_qkv(&x, positions, pass)?;
        let [q, k, v] = self.split_qkv(made.qkv.view());
        group!(o, self, o, o);
        let mut attn = workspace.with_margin(x.rows(), q.cols(), margin_of(o.members))?;
        for (rows, cache) in layout.sequences().zip(caches) {
            cache.append(k.slice_rows(rows.clone()), v.slice_rows(rows.clone()), workspace)?;
            let (q, out) = (q.slice_rows(rows.clone()), attn.view_mut().slice_rows(rows));
            attention::cached(&self.attention, q, cache.keys(), cache.values(), out, workspace)?;
        }
        let mut mid = workspace.matrix(x.rows(), x.cols())?;
        o.forward(attn.view_mut(), adapter, Some(x.view()), mid.view_mut(), workspace)?;
        let (gate_up, _, _) = self.project_gate_up(&mid, pass)?;
        let mut h = self.mlp_hidden(&gate_up, workspace)?;
        let mut y = x;
        group!(down, self, down, down);
        down.forward(h.view_mut(), adapter, Some(mid.view()), y.view_mut(), workspace)?;
        Ok(y)
    }

    /// Everything but the last projection.
    fn forward_to_mlp(&self, x: Matrix, pass: &Pass) -> Result<Activations> {
        let Pass { workspace, layout, .. } = *pass;
        let tokens = x.rows();
        let qkv = self.project_qkv(&x, layout.positions(), pass)?;
        let [q, k, v] = self.split_qkv(qkv.qkv.view());
        group!(o, self, o, o);
        let mut attn = workspace.with_margin(tokens, q.cols(), margin_of(o.members))?;
        let mut lse = workspace.matrix_f32(tokens, self.attention.heads)?;
        attention::forward(&self.attention, q, k, v, layout, attn.view_mut(), lse.view_mut(), workspace)?;
        let mut mid = workspace.matrix(tokens, x.cols())?;
        let of_o = o.forward(attn.view_mut(), pass.adapter.as_ref(), Some(x.view()), mid.view_mut(), workspace)?;
        let (gate_up, rstd_mid, of_gate_up) = self.project_gate_up(&mid, pass)?;
        let s = Factors { o: of_o, gate_up: of_gate_up, down: Shrunk::default() };
        Ok(Activations { x, qkv, attn, lse, mid, rstd_mid, gate_up, s })
    }

    /// q, k and v, normed where the model does that, and rotated.
    fn project_qkv(&self, x: &Matrix, positions: &Positions, pass: &Pass) -> Result<Qkv> {
        let Pass { workspace, .. } = *pass;
        let tokens = x.rows();
        let (mut n1, rstd) = self.norm(x, &self.input_norm, self.qkv_margin(), workspace)?;
        self.renorm("input_layernorm", x.view(), n1.view_mut(), pass)?;
        group!(group, self, qkv, q, k, v);
        let mut qkv = workspace.matrix(tokens, group.outputs())?;
        let s = group.forward(n1.view_mut(), pass.adapter.as_ref(), None, qkv.view_mut(), workspace)?;
        drop(n1);
        let (q_width, qk_width) = (self.q.outputs(), self.q.outputs() + self.k.outputs());
        let mut raw = None;
        if let Some((q_weight, k_weight)) = &self.qk_norm {
            let mut qk = workspace.matrix(tokens, qk_width)?;
            qk.view_mut().copy_from(qkv.view().slice_cols(0..qk_width))?;
            let mut rstd_q = workspace.matrix_f32(tokens, self.attention.heads)?;
            let mut rstd_k = workspace.matrix_f32(tokens, self.attention.kv_heads)?;
            let (q, rest) = qkv.view_mut().split_cols(q_width);
            let k = rest.slice_cols(0..qk_width - q_width);
            let (raw_q, raw_k) = (qk.view().slice_cols(0..q_width), qk.view().slice_cols(q_width..qk_width));
            rms_norm::forward(raw_q, q_weight.view(), self.eps, q, rstd_q.view_mut())?;
            rms_norm::forward(raw_k, k_weight.view(), self.eps, k, rstd_k.view_mut())?;
            let (q, rest) = qkv.view_mut().split_cols(q_width);
            self.renorm("self_attn.q_norm", raw_q, q, pass)?;
            self.renorm("self_attn.k_norm", raw_k, rest.slice_cols(0..qk_width - q_width), pass)?;
            raw = Some(RawQk { qk, rstd_q, rstd_k });
        }
        let rotated = qkv.view_mut().slice_cols(0..qk_width);
        rope::forward(rotated, self.attention.head_dim, pass.rope, positions)?;
        Ok(Qkv { qkv, rstd, raw, s })
    }

    fn split_qkv<'a>(&self, qkv: View<'a>) -> [View<'a>; 3] {
        let (q, k) = (self.q.outputs(), self.q.outputs() + self.k.outputs());
        [qkv.slice_cols(0..q), qkv.slice_cols(q..k), qkv.slice_cols(k..qkv.cols())]
    }

    /// Gate and up side by side, 1/rms of `mid`, and the group's `S`.
    fn project_gate_up(&self, mid: &Matrix, pass: &Pass) -> Result<(Matrix, Matrix, Shrunk)> {
        let Pass { workspace, .. } = *pass;
        let (mut n2, rstd) = self.norm(mid, &self.post_attention_norm, self.gate_up_margin(), workspace)?;
        self.renorm("post_attention_layernorm", mid.view(), n2.view_mut(), pass)?;
        group!(group, self, gate_up, gate, up);
        // The backward turns it into its own gradient, so it has the gradient's margin.
        let mut gate_up = workspace.with_margin(mid.rows(), group.outputs(), self.gate_up_margin())?;
        let s = group.forward(n2.view_mut(), pass.adapter.as_ref(), None, gate_up.view_mut(), workspace)?;
        Ok((gate_up, rstd, s))
    }

    /// `h`, with the margin of the last projection.
    fn mlp_hidden(&self, gate_up: &Matrix, workspace: &Workspace) -> Result<Matrix> {
        let width = self.gate.outputs();
        let mut h = workspace.with_margin(gate_up.rows(), width, margin_of(&[self.down.member()]))?;
        let (gate, up) = (gate_up.view().slice_cols(0..width), gate_up.view().slice_cols(width..gate_up.cols()));
        swiglu::forward(gate, up, h.view_mut())?;
        Ok(h)
    }

    fn norm(&self, x: &Matrix, weight: &Matrix, margin: usize, workspace: &Workspace) -> Result<(Matrix, Matrix)> {
        let mut normed = workspace.with_margin(x.rows(), x.cols(), margin)?;
        let mut rstd = workspace.matrix_f32(x.rows(), 1)?;
        rms_norm::forward(x.view(), weight.view(), self.eps, normed.view_mut(), rstd.view_mut())?;
        Ok((normed, rstd))
    }

    /// Norms rows again whose adapter has another weight for this norm.
    fn renorm(&self, norm: &str, x: View, y: ViewMut, pass: &Pass) -> Result<()> {
        let Some(rows) = pass.adapter.and_then(|adapter| adapter.rows) else { return Ok(()) };
        let block = || self.q.name().trim_end_matches("self_attn.q_proj");
        Ok(rows.renorm(|| format!("{}{norm}", block()), x, self.eps, y, pass.workspace)?)
    }

    /// From `dy` to `d mid`, which takes `dy`'s memory. Frees gate and up. A recomputed block has no `S` of its last
    /// projection yet.
    fn backward_mlp(
        &self,
        mut saved: Activations,
        mut dy: Matrix,
        pass: &Pass,
        mut gradient: ViewMut,
        recomputed: bool,
    ) -> Result<(Activations, Matrix)> {
        let Pass { workspace, .. } = *pass;
        let adapter = pass.adapter.as_ref().expect("a backward pass has an adapter");
        let (tokens, width) = (dy.rows(), self.gate.outputs());

        group!(down, self, down, down);
        let mut dh = workspace.matrix(tokens, width)?;
        let at_hand = (!recomputed).then_some(&saved.s.down);
        let ds = down.backward_input_with(dy.view_mut(), at_hand, adapter, Some(dh.view_mut()), workspace)?;
        let mut gate_up = std::mem::replace(&mut saved.gate_up, workspace.matrix(0, 0)?);
        let (gate, up) = gate_up.view_mut().split_cols(width);
        swiglu::backward_in_place(gate, up, dh.view_mut())?;
        let h = dh;
        let s = match recomputed {
            true => down.shrink(h.view(), Some(adapter), workspace)?,
            false => std::mem::take(&mut saved.s.down),
        };
        down.backward_adapter(h.view(), &s, dy.view(), &ds, adapter, gradient.reborrow(), workspace)?;
        drop((h, s, ds));

        group!(group, self, gate_up, gate, up);
        let mut dn2 = workspace.matrix(tokens, group.inputs())?;
        let ds = group.backward_input_with(
            gate_up.view_mut(),
            Some(&saved.s.gate_up),
            adapter,
            Some(dn2.view_mut()),
            workspace,
        )?;
        let (n2, _) = self.norm(&saved.mid, &self.post_attention_norm, 0, workspace)?;
        group.backward_adapter(n2.view(), &saved.s.gate_up, gate_up.view(), &ds, adapter, gradient, workspace)?;
        drop((n2, gate_up));
        let (mid, rstd) = (saved.mid.view(), saved.rstd_mid.view());
        rms_norm::backward(mid, self.post_attention_norm.view(), rstd, dn2.view(), dy.view_mut(), true)?;
        Ok((saved, dy))
    }

    /// From `d mid` to `dx`, which takes its memory.
    fn backward_attention(
        &self,
        saved: Activations,
        mut dmid: Matrix,
        pass: &Pass,
        mut gradient: ViewMut,
        needs_dx: bool,
    ) -> Result<Option<Matrix>> {
        let Activations { x, qkv, attn, lse, mid, rstd_mid, s, .. } = saved;
        drop((mid, rstd_mid));
        let Pass { workspace, layout, .. } = *pass;
        let adapter = pass.adapter.as_ref().expect("a backward pass has an adapter");
        let tokens = dmid.rows();

        group!(o, self, o, o);
        let mut dattn = workspace.matrix(tokens, attn.cols())?;
        let ds = o.backward_input_with(dmid.view_mut(), Some(&s.o), adapter, Some(dattn.view_mut()), workspace)?;
        o.backward_adapter(attn.view(), &s.o, dmid.view(), &ds, adapter, gradient.reborrow(), workspace)?;

        let Qkv { qkv, rstd, raw, s } = qkv;
        let [q, k, v] = self.split_qkv(qkv.view());
        let mut dqkv = workspace.with_margin(tokens, qkv.cols(), self.qkv_margin())?;
        let (dq, rest) = dqkv.view_mut().split_cols(q.cols());
        let (dk, dv) = rest.split_cols(k.cols());
        let (out, lse_view, dout) = (attn.view(), lse.view(), dattn.view());
        attention::backward(&self.attention, q, k, v, out, lse_view, dout, layout, dq, dk, dv, workspace)?;
        drop((dattn, attn, lse, qkv));
        let qk_width = self.q.outputs() + self.k.outputs();
        let rotated = dqkv.view_mut().slice_cols(0..qk_width);
        rope::backward(rotated, self.attention.head_dim, pass.rope, layout.positions())?;
        if let (Some(raw), Some(weights)) = (raw, &self.qk_norm) {
            self.backward_qk_norm(raw, weights, &mut dqkv, workspace)?;
        }

        group!(group, self, qkv, q, k, v);
        let mut dn1 = match needs_dx {
            true => Some(workspace.matrix(tokens, group.inputs())?),
            false => None,
        };
        let target = dn1.as_mut().map(Matrix::view_mut);
        let ds = group.backward_input_with(dqkv.view_mut(), Some(&s), adapter, target, workspace)?;
        let (n1, _) = self.norm(&x, &self.input_norm, 0, workspace)?;
        group.backward_adapter(n1.view(), &s, dqkv.view(), &ds, adapter, gradient, workspace)?;
        drop((n1, dqkv));
        let Some(dn1) = dn1 else { return Ok(None) };
        rms_norm::backward(x.view(), self.input_norm.view(), rstd.view(), dn1.view(), dmid.view_mut(), true)?;
        Ok(Some(dmid))
    }

    /// Turns the gradients of the normed q and k into those of the projected ones, in place.
    fn backward_qk_norm(
        &self,
        raw: RawQk,
        (q_weight, k_weight): &(Matrix, Matrix),
        dqkv: &mut Matrix,
        workspace: &Workspace,
    ) -> Result<()> {
        let (q_width, qk_width) = (self.q.outputs(), raw.qk.cols());
        let mut dqk = workspace.matrix(raw.qk.rows(), qk_width)?;
        let parts = [(0..q_width, q_weight, &raw.rstd_q), (q_width..qk_width, k_weight, &raw.rstd_k)];
        for (columns, weight, rstd) in parts {
            let (x, dy) = (raw.qk.view().slice_cols(columns.clone()), dqkv.view().slice_cols(columns.clone()));
            let dx = dqk.view_mut().slice_cols(columns);
            rms_norm::backward(x, weight.view(), rstd.view(), dy, dx, false)?;
        }
        Ok(dqkv.view_mut().slice_cols(0..qk_width).copy_from(dqk.view())?)
    }
}

fn margin_of(members: &[Member]) -> usize {
    margin(members.iter().map(|member| member.lora))
}

/// What a block's forward keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: no backward follows.
    Nothing,
    /// The input: the backward recomputes the block (gradient checkpointing).
    Input,
    /// The input, in pinned host memory while the blocks above run (on the CPU the same as `Input`).
    Offload,
    /// Everything the backward reads.
    Everything,
}
