//! One decoder block, forward and a hand-derived backward over the same operations.
//!
//! ```text
//! n1 = norm(x)            q, k, v = rope(norm?(n1 Wq)), rope(norm?(n1 Wk)), n1 Wv
//! m  = x + attention(q, k, v) Wo
//! n2 = norm(m)            h = silu(n2 Wg) * (n2 Wu)
//! y  = m + h Wd
//! ```
//!
//! All activations are `[tokens, width]`, f32 on the CPU. What the backward needs is kept in [`Saved`]; normed inputs
//! and `h` are cheap and made again. The residual sums happen inside the projections that end in them.

use qlora_kernels::ops::attention::{self, AttentionConfig};
use qlora_kernels::ops::rope::{self, RopeTable};
use qlora_kernels::ops::{rms_norm, swiglu};
use qlora_kernels::{Matrix, SequenceLayout, View, Workspace};

use super::cache::LayerCache;
use super::projection::{AdapterPass, Projection};
use crate::error::Result;

/// A decoder block with its frozen weights and its adapters' places.
#[derive(Clone, Debug)]
pub struct Block {
    /// Weight of the norm before attention.
    pub input_norm: Vec<f32>,
    /// Weight of the norm before the MLP.
    pub post_attention_norm: Vec<f32>,
    /// Weights of the norms on every head of q and k (Qwen3).
    pub qk_norm: Option<(Vec<f32>, Vec<f32>)>,
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
    rstd_in: Matrix,
    /// q and k as projected, with 1/rms of each head, where the model norms them.
    raw_qk: Option<RawQk>,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    attn: Matrix,
    lse: Matrix,
    mid: Matrix,
    rstd_mid: Matrix,
    gate: Matrix,
    up: Matrix,
    s: Shrunk,
}

#[derive(Debug)]
struct RawQk {
    q: Matrix,
    k: Matrix,
    rstd_q: Matrix,
    rstd_k: Matrix,
}

/// `S = drop(x) A^T` of every projection that has an adapter.
#[derive(Debug, Default)]
struct Shrunk {
    q: Option<Matrix>,
    k: Option<Matrix>,
    v: Option<Matrix>,
    o: Option<Matrix>,
    gate: Option<Matrix>,
    up: Option<Matrix>,
    down: Option<Matrix>,
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
        let qk = self.qk_norm.as_ref().map_or(0, |(q, k)| q.len() + k.len());
        let biases: usize = self.projections().iter().map(|p| p.bias().map_or(0, <[f32]>::len)).sum();
        (self.input_norm.len() + self.post_attention_norm.len() + qk + biases) * size_of::<f32>()
    }

    /// Whether any projection has an adapter.
    pub fn is_trained(&self) -> bool {
        self.projections().iter().any(|projection| projection.slot().is_some())
    }

    /// Runs the block on `x [tokens, hidden]`; with `keep`, also what [`Self::backward`] needs.
    pub fn forward(&self, x: Matrix, pass: &Pass, keep: Keep) -> Result<(Matrix, Option<Saved>)> {
        let mut activations = self.forward_to_mlp(x, pass)?;
        let h = self.mlp_hidden(&activations, pass.workspace)?;
        let mut y = copy(&activations.mid, pass.workspace);
        activations.s.down = self.down.forward(h.view(), y.view_mut(), 1.0, pass.adapter.as_ref(), pass.workspace)?;
        let saved = match keep {
            Keep::Nothing => None,
            Keep::Input => Some(Saved::Input(activations.x)),
            Keep::Everything => Some(Saved::Kept(Box::new(activations))),
        };
        Ok((y, saved))
    }

    /// Turns `dy` into `dx` (or gives nothing, if the caller does not need it) and adds the adapters' gradients to
    /// `gradient`, which is laid out as the adapter.
    pub fn backward(
        &self,
        saved: Saved,
        dy: Matrix,
        pass: &Pass,
        gradient: &mut [f32],
        needs_dx: bool,
    ) -> Result<Option<Matrix>> {
        let saved = match saved {
            Saved::Kept(activations) => *activations,
            Saved::Input(x) => {
                let mut activations = self.forward_to_mlp(x, pass)?;
                let h = self.mlp_hidden(&activations, pass.workspace)?;
                activations.s.down = self.down.shrink(h.view(), pass.adapter.as_ref(), pass.workspace)?;
                activations
            }
        };
        let (activations, dmid) = self.backward_mlp(saved, dy, pass, gradient)?;
        self.backward_attention(activations, dmid, pass, gradient, needs_dx)
    }

    /// Runs the block on the next tokens of several sequences, one after the other in `x` as `pass.layout` says; the
    /// earlier keys and values of each are in its cache.
    pub(crate) fn forward_cached(
        &self,
        x: Matrix,
        positions: &[u32],
        caches: &mut [&mut LayerCache],
        pass: &Pass,
    ) -> Result<Matrix> {
        let Pass { workspace, layout, .. } = *pass;
        let (q, k, v, _, _) = self.project_qkv(&x, positions, pass)?;
        let mut attn = workspace.matrix(x.rows(), q.cols());
        for (rows, cache) in layout.sequences().zip(caches) {
            cache.append(k.view().slice_rows(rows.clone()), v.view().slice_rows(rows.clone()))?;
            let (q, out) = (q.view().slice_rows(rows.clone()), attn.view_mut().slice_rows(rows));
            attention::cached(&self.attention, q, cache.keys(), cache.values(), out, workspace)?;
        }
        let mut mid = x;
        self.o.forward(attn.view(), mid.view_mut(), 1.0, pass.adapter.as_ref(), workspace)?;
        let (n2, _) = self.norm(&mid, &self.post_attention_norm, workspace)?;
        let (gate, up, _, _) = self.project_gate_up(n2.view(), pass)?;
        let h = swiglu_hidden(&gate, &up, workspace)?;
        let mut y = mid;
        self.down.forward(h.view(), y.view_mut(), 1.0, pass.adapter.as_ref(), workspace)?;
        Ok(y)
    }

    /// Everything but the last projection.
    fn forward_to_mlp(&self, x: Matrix, pass: &Pass) -> Result<Activations> {
        let Pass { workspace, layout, .. } = *pass;
        let (q, k, v, rest, mut s) = self.project_qkv(&x, layout.positions(), pass)?;
        let mut attn = workspace.matrix(x.rows(), q.cols());
        let mut lse = workspace.matrix(x.rows(), self.attention.heads);
        let (out, lse_out) = (attn.view_mut(), lse.view_mut());
        attention::forward(&self.attention, q.view(), k.view(), v.view(), layout, out, lse_out, workspace)?;
        let mut mid = copy(&x, workspace);
        s.o = self.o.forward(attn.view(), mid.view_mut(), 1.0, pass.adapter.as_ref(), workspace)?;
        let (n2, rstd_mid) = self.norm(&mid, &self.post_attention_norm, workspace)?;
        let (gate, up, s_gate, s_up) = self.project_gate_up(n2.view(), pass)?;
        (s.gate, s.up) = (s_gate, s_up);
        let (rstd_in, raw_qk) = rest;
        Ok(Activations { x, rstd_in, raw_qk, q, k, v, attn, lse, mid, rstd_mid, gate, up, s })
    }

    /// q, k and v, normed where the model does that, and rotated; what the backward needs of it comes along.
    #[allow(clippy::type_complexity)]
    fn project_qkv(
        &self,
        x: &Matrix,
        positions: &[u32],
        pass: &Pass,
    ) -> Result<(Matrix, Matrix, Matrix, (Matrix, Option<RawQk>), Shrunk)> {
        let Pass { workspace, .. } = *pass;
        let adapter = pass.adapter.as_ref();
        let (n1, rstd) = self.norm(x, &self.input_norm, workspace)?;
        let mut s = Shrunk::default();
        let mut q = workspace.matrix(x.rows(), self.q.outputs());
        let mut k = workspace.matrix(x.rows(), self.k.outputs());
        let mut v = workspace.matrix(x.rows(), self.v.outputs());
        s.q = self.q.forward(n1.view(), q.view_mut(), 0.0, adapter, workspace)?;
        s.k = self.k.forward(n1.view(), k.view_mut(), 0.0, adapter, workspace)?;
        s.v = self.v.forward(n1.view(), v.view_mut(), 0.0, adapter, workspace)?;
        drop(n1);
        let mut raw_qk = None;
        if let Some((q_weight, k_weight)) = &self.qk_norm {
            let (normed_q, rstd_q) = self.norm_heads(&q, q_weight, workspace)?;
            let (normed_k, rstd_k) = self.norm_heads(&k, k_weight, workspace)?;
            let (q, k) = (std::mem::replace(&mut q, normed_q), std::mem::replace(&mut k, normed_k));
            raw_qk = Some(RawQk { q, k, rstd_q, rstd_k });
        }
        let head_dim = self.attention.head_dim;
        rope::forward(q.view_mut(), head_dim, pass.rope, positions)?;
        rope::forward(k.view_mut(), head_dim, pass.rope, positions)?;
        Ok((q, k, v, (rstd, raw_qk), s))
    }

    #[allow(clippy::type_complexity)]
    fn project_gate_up(&self, n2: View, pass: &Pass) -> Result<(Matrix, Matrix, Option<Matrix>, Option<Matrix>)> {
        let Pass { workspace, .. } = *pass;
        let mut gate = workspace.matrix(n2.rows(), self.gate.outputs());
        let mut up = workspace.matrix(n2.rows(), self.up.outputs());
        let s_gate = self.gate.forward(n2, gate.view_mut(), 0.0, pass.adapter.as_ref(), workspace)?;
        let s_up = self.up.forward(n2, up.view_mut(), 0.0, pass.adapter.as_ref(), workspace)?;
        Ok((gate, up, s_gate, s_up))
    }

    fn mlp_hidden(&self, activations: &Activations, workspace: &Workspace) -> Result<Matrix> {
        swiglu_hidden(&activations.gate, &activations.up, workspace)
    }

    fn norm(&self, x: &Matrix, weight: &[f32], workspace: &Workspace) -> Result<(Matrix, Matrix)> {
        let mut normed = workspace.matrix(x.rows(), x.cols());
        let mut rstd = workspace.matrix(x.rows(), 1);
        rms_norm::forward(x.view(), weight, self.eps, normed.view_mut(), rstd.as_mut_slice())?;
        Ok((normed, rstd))
    }

    /// The norm over every head: the same operation on `[tokens * heads, head_dim]`.
    fn norm_heads(&self, x: &Matrix, weight: &[f32], workspace: &Workspace) -> Result<(Matrix, Matrix)> {
        let (rows, width) = (x.rows() * (x.cols() / self.attention.head_dim), self.attention.head_dim);
        let mut normed = workspace.matrix(x.rows(), x.cols());
        let mut rstd = workspace.matrix(rows, 1);
        let (heads, out) = (View::new(x.as_slice(), rows, width), normed.view_mut().reshape(rows, width));
        rms_norm::forward(heads, weight, self.eps, out, rstd.as_mut_slice())?;
        Ok((normed, rstd))
    }

    /// From `dy` to `d mid`, which takes `dy`'s memory. Frees gate and up.
    fn backward_mlp(
        &self,
        mut saved: Activations,
        mut dy: Matrix,
        pass: &Pass,
        gradient: &mut [f32],
    ) -> Result<(Activations, Matrix)> {
        let Pass { workspace, .. } = *pass;
        let adapter = pass.adapter.as_ref().expect("a backward pass has an adapter");
        let tokens = dy.rows();

        let h = self.mlp_hidden(&saved, workspace)?;
        let mut dh = workspace.matrix(tokens, h.cols());
        let s = std::mem::take(&mut saved.s.down);
        let target = Some((dh.view_mut(), 0.0));
        self.down.backward(h.view(), s.as_ref(), dy.view(), target, adapter, gradient, workspace)?;
        drop(h);
        swiglu::backward(saved.gate.view_mut(), saved.up.view_mut(), dh.view(), None)?;
        drop(dh);
        let (dgate, dup) = (&saved.gate, &saved.up);

        let (n2, _) = self.norm(&saved.mid, &self.post_attention_norm, workspace)?;
        let mut dn2 = workspace.matrix(tokens, n2.cols());
        let (s_gate, s_up) = (saved.s.gate.as_ref(), saved.s.up.as_ref());
        let target = Some((dn2.view_mut(), 0.0));
        self.gate.backward(n2.view(), s_gate, dgate.view(), target, adapter, gradient, workspace)?;
        let target = Some((dn2.view_mut(), 1.0));
        self.up.backward(n2.view(), s_up, dup.view(), target, adapter, gradient, workspace)?;
        let (mid, rstd) = (saved.mid.view(), saved.rstd_mid.as_slice());
        rms_norm::backward(mid, &self.post_attention_norm, rstd, dn2.view(), dy.view_mut(), true)?;
        Ok((saved, dy))
    }

    /// From `d mid` to `dx`, which takes its memory.
    fn backward_attention(
        &self,
        saved: Activations,
        mut dmid: Matrix,
        pass: &Pass,
        gradient: &mut [f32],
        needs_dx: bool,
    ) -> Result<Option<Matrix>> {
        let Activations { x, rstd_in, raw_qk, q, k, v, attn, lse, mid, rstd_mid, gate, up, s } = saved;
        drop((mid, rstd_mid, gate, up));
        let Pass { workspace, layout, .. } = *pass;
        let adapter = pass.adapter.as_ref().expect("a backward pass has an adapter");
        let tokens = dmid.rows();

        let mut dattn = workspace.matrix(tokens, attn.cols());
        let target = Some((dattn.view_mut(), 0.0));
        self.o.backward(attn.view(), s.o.as_ref(), dmid.view(), target, adapter, gradient, workspace)?;

        let mut dq = workspace.matrix(tokens, q.cols());
        let mut dk = workspace.matrix(tokens, k.cols());
        let mut dv = workspace.matrix(tokens, v.cols());
        attention::backward(
            &self.attention,
            q.view(),
            k.view(),
            v.view(),
            attn.view(),
            lse.view(),
            dattn.view(),
            layout,
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            workspace,
        )?;
        drop((dattn, attn, lse, q, k, v));
        let head_dim = self.attention.head_dim;
        rope::backward(dq.view_mut(), head_dim, pass.rope, layout.positions())?;
        rope::backward(dk.view_mut(), head_dim, pass.rope, layout.positions())?;
        if let (Some(raw), Some((q_weight, k_weight))) = (&raw_qk, &self.qk_norm) {
            dq = self.backward_norm_heads(&raw.q, q_weight, &raw.rstd_q, &dq, workspace)?;
            dk = self.backward_norm_heads(&raw.k, k_weight, &raw.rstd_k, &dk, workspace)?;
        }

        let (n1, _) = self.norm(&x, &self.input_norm, workspace)?;
        let mut dn1 = needs_dx.then(|| workspace.matrix(tokens, n1.cols()));
        let parts = [(&self.q, &s.q, &dq), (&self.k, &s.k, &dk), (&self.v, &s.v, &dv)];
        for (index, (projection, s, dy)) in parts.into_iter().enumerate() {
            let beta = if index == 0 { 0.0 } else { 1.0 };
            let target = dn1.as_mut().map(|dn1| (dn1.view_mut(), beta));
            projection.backward(n1.view(), s.as_ref(), dy.view(), target, adapter, gradient, workspace)?;
        }
        let Some(dn1) = dn1 else { return Ok(None) };
        rms_norm::backward(x.view(), &self.input_norm, rstd_in.as_slice(), dn1.view(), dmid.view_mut(), true)?;
        Ok(Some(dmid))
    }

    fn backward_norm_heads(
        &self,
        x: &Matrix,
        weight: &[f32],
        rstd: &Matrix,
        dy: &Matrix,
        workspace: &Workspace,
    ) -> Result<Matrix> {
        let (rows, width) = (rstd.rows(), self.attention.head_dim);
        let mut dx = workspace.matrix(x.rows(), x.cols());
        let (x, dy) = (View::new(x.as_slice(), rows, width), View::new(dy.as_slice(), rows, width));
        rms_norm::backward(x, weight, rstd.as_slice(), dy, dx.view_mut().reshape(rows, width), false)?;
        Ok(dx)
    }
}

/// What a block's forward keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: no backward follows.
    Nothing,
    /// The input: the backward recomputes the block (gradient checkpointing).
    Input,
    /// Everything the backward reads.
    Everything,
}

fn swiglu_hidden(gate: &Matrix, up: &Matrix, workspace: &Workspace) -> Result<Matrix> {
    let mut h = workspace.matrix(gate.rows(), gate.cols());
    swiglu::forward(gate.view(), up.view(), h.view_mut())?;
    Ok(h)
}

fn copy(x: &Matrix, workspace: &Workspace) -> Matrix {
    let mut y = workspace.matrix(x.rows(), x.cols());
    y.as_mut_slice().copy_from_slice(x.as_slice());
    y
}
