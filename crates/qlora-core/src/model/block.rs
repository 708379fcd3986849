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
//! matrix, and so are gate and up. The activations that the backward needs are kept in `Saved`; normed inputs and `h`
//! are cheap and made again. The residual sums happen inside the projections that end in them. Matrices that a
//! projection with adapters reads, and gradients of those it writes, have a margin for the adapters' small factors
//! ([`qlora_kernels::ops::linear_group`]).

use qlora_kernels::ops::attention::{self, AttentionConfig, LseOrder};
use qlora_kernels::ops::bias;
use qlora_kernels::ops::linear_group::{Group, Member, Shrunk, margin};
use qlora_kernels::ops::rms_norm;
use qlora_kernels::ops::rope;
use qlora_kernels::sequence::Positions;
use qlora_kernels::{Matrix, SequenceLayout, View, ViewMut, Workspace};

use super::cache::LayerCache;
use super::context::Share;
use super::mlp::MlpSaved;
pub(crate) use super::policy::{Keep, MemoryPolicy};
use super::projection::{AdapterPass, Projection};
use super::stack::Rotation;
use crate::error::Result;

/// A decoder block with its frozen weights and its adapters' places.
#[derive(Debug)]
pub(crate) struct Block {
    /// Weight of the norm before attention, one f32 row.
    pub(crate) input_norm: Matrix,
    /// Weight of the norm before the MLP, one f32 row.
    pub(crate) post_attention_norm: Matrix,
    /// Weights of the norms on every head of q and k (Qwen3).
    pub(crate) qk_norm: Option<(Matrix, Matrix)>,
    /// Added to the mean square in every norm.
    pub(crate) eps: f32,
    /// Heads, their width, scale and window.
    pub(crate) attention: AttentionConfig,
    /// Whether queries and keys are rotated by their position.
    pub(crate) rotary: bool,
    /// Query projection.
    pub(crate) q: Projection,
    /// Key projection.
    pub(crate) k: Projection,
    /// Value projection.
    pub(crate) v: Projection,
    /// Attention's output projection.
    pub(crate) o: Projection,
    /// The MLP's gate.
    pub(crate) gate: Projection,
    /// The MLP's value path.
    pub(crate) up: Projection,
    /// The MLP's output projection.
    pub(crate) down: Projection,
    /// The block's use of memory.
    pub(crate) policy: MemoryPolicy,
}

/// The inputs of a forward or backward pass that all blocks share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass<'a> {
    /// The adapter; none runs the base model.
    pub(crate) adapter: Option<AdapterPass<'a>>,
    /// The batch's sequences.
    pub(crate) layout: &'a SequenceLayout,
    /// The rows of the batch that this pass has, if other ranks have the others.
    pub(crate) share: Option<&'a Share<'a>>,
    /// Rotation angles by position.
    pub(crate) rope: &'a Rotation,
    /// The allocator of matrices.
    pub(crate) workspace: &'a Workspace,
}

impl Pass<'_> {
    /// The position of every row of the pass in its sequence.
    fn positions(&self) -> &Positions {
        self.share.map_or(self.layout.positions(), Share::positions)
    }

    /// The columns of margin that the input of a group needs in this pass.
    pub(super) fn margin_of(&self, members: &[Member]) -> usize {
        match self.adapter.and_then(|adapter| adapter.rows) {
            Some(rows) => rows.margin(members),
            None => margin_of(members),
        }
    }

    /// The same pass for the batch's rows from `row` on, for operations that work row by row.
    pub(super) fn at_row(self, row: usize) -> Self {
        Self { adapter: self.adapter.map(|adapter| adapter.at_row(row)), ..self }
    }
}

/// The activations that a block saves in its forward for its backward.
#[derive(Debug)]
pub(super) enum Saved {
    /// Everything the backward reads.
    Everything(Box<Attended>, Box<MlpSaved>),
    /// The activations up to the MLP, whose forward the backward runs again.
    Attention(Box<Attended>),
    /// The block's input alone: the backward runs the forward again, up to the last projection.
    Input(Matrix),
}

/// The activations that the backward of the block's first half reads, and `mid`, which is its output.
#[derive(Debug)]
pub(super) struct Attended {
    x: Matrix,
    qkv: Qkv,
    attn: Matrix,
    lse: Matrix,
    lse_order: LseOrder,
    mid: Matrix,
    s_o: Shrunk,
}

#[cfg(feature = "cuda")]
impl Saved {
    /// The matrices that are worth a copy to the host and back: all but those of a few columns.
    pub(super) fn large(&mut self) -> Vec<&mut Matrix> {
        match self {
            Self::Everything(..) => Vec::new(),
            Self::Attention(attended) => {
                let Attended { x, qkv, attn, mid, .. } = &mut **attended;
                let raw = qkv.raw.as_mut().map(|raw| &mut raw.qk);
                [x, &mut qkv.qkv, attn, mid].into_iter().chain(raw).collect()
            }
            Self::Input(x) => vec![x],
        }
    }
}

impl Attended {
    /// Input and output; the rest is freed.
    fn into_ends(self) -> (Matrix, Matrix) {
        (self.x, self.mid)
    }
}

/// Queries, keys and values side by side, normed and rotated, and the intermediate values that their backward needs.
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

/// A group with the array that its members are borrowed from.
macro_rules! group {
    ($name:ident, $block:expr, $pass:expr, $cache:ident, $($member:ident),+) => {
        let members = [$($block.$member.member($pass.adapter.as_ref())),+];
        let $name = Group { members: &members, cache: &$block.policy.$cache, split: $block.policy.is_split() };
    };
}
pub(super) use group;

impl Block {
    /// The projections in the order of the adapter's layout.
    pub(crate) fn projections(&self) -> [&Projection; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// The projections, to give them adapters.
    pub(crate) fn projections_mut(&mut self) -> [&mut Projection; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }

    /// Bytes of the norms and biases.
    pub(crate) fn vector_bytes(&self) -> usize {
        let qk = self.qk_norm.as_ref().map_or(0, |(q, k)| q.bytes() + k.bytes());
        let biases: usize = self.projections().iter().map(|p| p.bias().map_or(0, Matrix::bytes)).sum();
        self.input_norm.bytes() + self.post_attention_norm.bytes() + qk + biases
    }

    /// Whether an adapter trains anything of the block.
    pub(crate) fn is_trained(&self) -> bool {
        self.projections().iter().any(|projection| projection.is_trained())
    }

    /// The margin that the gradient of the residual stream needs: it is what o and down get.
    pub(crate) fn residual_margin(&self) -> usize {
        margin_of(&[self.o.member(None)]).max(margin_of(&[self.down.member(None)]))
    }

    /// The margin of the input of q, k and v, or of its gradient.
    fn qkv_margin(&self, pass: &Pass) -> usize {
        pass.margin_of(&[self.q.member(None), self.k.member(None), self.v.member(None)])
    }

    /// Runs the block on `x [tokens, hidden]`; also returns the activations that [`Self::backward`] needs, as `keep`
    /// says.
    pub(super) fn forward(&self, x: Matrix, pass: &Pass, keep: Keep) -> Result<(Matrix, Option<Saved>)> {
        let attended = self.attend(x, pass)?;
        let [tokens, hidden] = attended.mid.view().shape();
        let output = || pass.workspace.matrix(tokens, hidden);
        let mut y;
        let saved = match keep {
            Keep::Everything => {
                y = output()?;
                let mlp = self.mlp_kept(attended.mid.view(), y.view_mut(), pass)?;
                Some(Saved::Everything(Box::new(attended), Box::new(mlp)))
            }
            Keep::Attention | Keep::OffloadAttention => {
                y = output()?;
                self.mlp(attended.mid.view(), y.view_mut(), pass)?;
                Some(Saved::Attention(Box::new(attended)))
            }
            Keep::Nothing | Keep::Input | Keep::Offload => {
                let (x, mid) = attended.into_ends();
                let x = (keep != Keep::Nothing).then_some(x);
                y = output()?;
                self.mlp(mid.view(), y.view_mut(), pass)?;
                x.map(Saved::Input)
            }
        };
        Ok((y, saved))
    }

    /// Turns `dy` (with the margin of [`Self::residual_margin`]) into `dx` (or gives nothing, if the caller does not need
    /// it) and adds the adapters' gradients to `gradient`, which is laid out as the adapter.
    pub(super) fn backward(
        &self,
        saved: Saved,
        mut dy: Matrix,
        pass: &Pass,
        mut gradient: ViewMut,
        needs_dx: bool,
    ) -> Result<Option<Matrix>> {
        let mut shared = None;
        let (attended, mlp) = match saved {
            Saved::Everything(attended, mlp) => (*attended, Some(*mlp)),
            Saved::Attention(attended) => (*attended, None),
            Saved::Input(x) => {
                shared = Some(self.policy.share_attention());
                (self.attend(x, pass)?, None)
            }
        };
        self.backward_mlp(attended.mid.view(), mlp, dy.view_mut(), pass, gradient.reborrow())?;
        let dx = self.backward_attention(attended, dy, pass, gradient, needs_dx)?;
        drop(shared);
        Ok(dx)
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
        group!(o, self, pass, o, o);
        let mut attn = workspace.with_margin(x.rows(), q.cols(), pass.margin_of(o.members))?;
        for (rows, cache) in layout.sequences().zip(caches) {
            cache.append(k.slice_rows(rows.clone()), v.slice_rows(rows.clone()), workspace)?;
            let (q, out) = (q.slice_rows(rows.clone()), attn.view_mut().slice_rows(rows));
            attention::cached(&self.attention, q, cache.keys(), cache.values(), out, workspace)?;
        }
        let mut mid = workspace.matrix(x.rows(), x.cols())?;
        self.o.saw(attn.view())?;
        o.forward(attn.view_mut(), adapter, Some(x.view()), mid.view_mut(), workspace)?;
        let mut y = x;
        self.mlp(mid.view(), y.view_mut(), pass)?;
        Ok(y)
    }

    /// The block's first half.
    fn attend(&self, x: Matrix, pass: &Pass) -> Result<Attended> {
        let Pass { workspace, layout, .. } = *pass;
        let tokens = x.rows();
        let mut qkv = self.project_qkv(&x, pass.positions(), pass)?;
        group!(o, self, pass, o, o);
        let attn = || workspace.with_margin(tokens, self.q.outputs(), pass.margin_of(o.members));
        let [q, k, v] = self.split_qkv(qkv.qkv.view());
        let (mut attn, lse, lse_order) = match pass.share {
            None => {
                let (mut attn, mut lse) = (attn()?, workspace.matrix_f32(tokens, self.attention.heads)?);
                let (out, lse_view) = (attn.view_mut(), lse.view_mut());
                let order = attention::forward(&self.attention, q, k, v, layout, out, lse_view, workspace)?;
                (attn, lse, order)
            }
            Some(share) => {
                qkv.qkv = share.to_heads(&[q, k, v], self.attention.head_dim, workspace)?;
                let mut attn = attn()?;
                let (lse, order) = share.attend(&self.attention, &qkv.qkv, layout, attn.view_mut(), workspace)?;
                (attn, lse, order)
            }
        };
        let mut mid = workspace.matrix(tokens, x.cols())?;
        self.o.saw(attn.view())?;
        let s_o = o.forward(attn.view_mut(), pass.adapter.as_ref(), Some(x.view()), mid.view_mut(), workspace)?;
        Ok(Attended { x, qkv, attn, lse, lse_order, mid, s_o })
    }

    /// q, k and v, normed where the model does that, and rotated.
    fn project_qkv(&self, x: &Matrix, positions: &Positions, pass: &Pass) -> Result<Qkv> {
        let Pass { workspace, .. } = *pass;
        let tokens = x.rows();
        let (mut n1, rstd) = self.norm(x.view(), &self.input_norm, self.qkv_margin(pass), workspace)?;
        self.renorm("input_layernorm", x.view(), n1.view_mut(), pass)?;
        group!(group, self, pass, qkv, q, k, v);
        self.q.saw(n1.view())?;
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
        if self.rotary {
            let rotated = qkv.view_mut().slice_cols(0..qk_width);
            rope::forward(rotated, self.attention.head_dim, pass.rope.of(self), positions)?;
        }
        Ok(Qkv { qkv, rstd, raw, s })
    }

    fn split_qkv<'a>(&self, qkv: View<'a>) -> [View<'a>; 3] {
        let (q, k) = (self.q.outputs(), self.q.outputs() + self.k.outputs());
        [qkv.slice_cols(0..q), qkv.slice_cols(q..k), qkv.slice_cols(k..qkv.cols())]
    }

    /// The norm of `x`, with room for a group's small factors, and 1/rms of each row.
    pub(super) fn norm(
        &self,
        x: View,
        weight: &Matrix,
        margin: usize,
        workspace: &Workspace,
    ) -> Result<(Matrix, Matrix)> {
        let mut normed = workspace.with_margin(x.rows(), x.cols(), margin)?;
        let mut rstd = workspace.matrix_f32(x.rows(), 1)?;
        rms_norm::forward(x, weight.view(), self.eps, normed.view_mut(), rstd.view_mut())?;
        Ok((normed, rstd))
    }

    /// Norms rows again whose adapter has another weight for this norm.
    pub(super) fn renorm(&self, norm: &str, x: View, y: ViewMut, pass: &Pass) -> Result<()> {
        let Some(rows) = pass.adapter.and_then(|adapter| adapter.rows) else { return Ok(()) };
        let block = || self.q.name().trim_end_matches("self_attn.q_proj");
        Ok(rows.renorm(|| format!("{}{norm}", block()), x, self.eps, y, pass.workspace)?)
    }

    /// From `d mid` to `dx`, which takes its memory.
    fn backward_attention(
        &self,
        saved: Attended,
        mut dmid: Matrix,
        pass: &Pass,
        mut gradient: ViewMut,
        needs_dx: bool,
    ) -> Result<Option<Matrix>> {
        let Attended { x, qkv, attn, lse, lse_order, mid, s_o } = saved;
        drop(mid);
        let Pass { workspace, layout, .. } = *pass;
        let adapter = pass.adapter.as_ref().expect("a backward pass has an adapter");
        let tokens = dmid.rows();

        group!(o, self, pass, o, o);
        let mut dattn = workspace.matrix(tokens, attn.cols())?;
        let ds = o.backward_input_with(dmid.view_mut(), Some(&s_o), adapter, Some(dattn.view_mut()), workspace)?;
        o.backward_adapter(attn.view(), &s_o, dmid.view(), &ds, adapter, gradient.reborrow(), workspace)?;
        bias_gradients(&[&self.o], dmid.view(), gradient.reborrow(), workspace)?;
        drop((ds, s_o));

        let Qkv { qkv, rstd, raw, s } = qkv;
        let margin = self.qkv_margin(pass);
        let mut dqkv = match pass.share {
            None => {
                let [q, k, v] = self.split_qkv(qkv.view());
                let mut dqkv = workspace.with_margin(tokens, qkv.cols(), margin)?;
                let (dq, rest) = dqkv.view_mut().split_cols(q.cols());
                let (dk, dv) = rest.split_cols(k.cols());
                let (out, lse_view, dout) = (attn.view(), lse.view(), dattn.view());
                let config = &self.attention;
                attention::backward(config, q, k, v, out, lse_view, lse_order, dout, layout, dq, dk, dv, workspace)?;
                drop((dattn, attn, lse, qkv));
                dqkv
            }
            Some(share) => {
                let (saved, lse) = ((qkv, attn), (lse, lse_order));
                share.attend_backward(&self.attention, saved, lse, dattn, layout, margin, workspace)?
            }
        };
        let qk_width = self.q.outputs() + self.k.outputs();
        if self.rotary {
            let rotated = dqkv.view_mut().slice_cols(0..qk_width);
            rope::backward(rotated, self.attention.head_dim, pass.rope.of(self), pass.positions())?;
        }
        if let (Some(raw), Some(weights)) = (raw, &self.qk_norm) {
            self.backward_qk_norm(raw, weights, &mut dqkv, workspace)?;
        }

        group!(group, self, pass, qkv, q, k, v);
        let mut dn1 = match needs_dx {
            true => Some(workspace.matrix(tokens, group.inputs())?),
            false => None,
        };
        let target = dn1.as_mut().map(Matrix::view_mut);
        let ds = group.backward_input_with(dqkv.view_mut(), Some(&s), adapter, target, workspace)?;
        let (n1, _) = self.norm(x.view(), &self.input_norm, 0, workspace)?;
        group.backward_adapter(n1.view(), &s, dqkv.view(), &ds, adapter, gradient.reborrow(), workspace)?;
        bias_gradients(&[&self.q, &self.k, &self.v], dqkv.view(), gradient, workspace)?;
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

/// Adds the gradients of the trained biases of these projections, whose outputs' gradients are side by side in `dy`.
pub(super) fn bias_gradients(
    projections: &[&Projection],
    dy: View,
    mut gradient: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    let mut start = 0;
    for projection in projections {
        let columns = start..start + projection.outputs();
        start = columns.end;
        if let Some(place) = projection.bias_place() {
            bias::backward(dy.slice_cols(columns), gradient.reborrow().slice_cols(place.clone()), workspace)?;
        }
    }
    Ok(())
}

fn margin_of(members: &[Member]) -> usize {
    margin(members.iter().map(|member| member.lora))
}
