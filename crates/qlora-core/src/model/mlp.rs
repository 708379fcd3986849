//! The MLP of a block: `y = mid + (silu(n2 Wg) * (n2 Wu)) Wd`, `n2 = norm(mid)`.
//!
//! It knows no neighbours: each token is computed by itself. So a long batch can run a piece of its rows at a time
//! ([`MemoryPolicy::set_mlp_rows`](super::policy::MemoryPolicy::set_mlp_rows)), and gate, up and hidden layer, which are ten times as
//! wide as the residual stream together, exist for one piece only. Pieces add the adapters' gradients in another order
//! than the whole; everything else is the same arithmetic.

use qlora_kernels::ops::linear_group::{Group, Shrunk};
use qlora_kernels::ops::{rms_norm, swiglu};
use qlora_kernels::{Matrix, View, ViewMut};

use super::block::{Block, Pass, bias_gradients, group};
use super::policy::pieces;
use crate::error::Result;

/// The activations that the backward of the MLP reads besides its input.
#[derive(Debug)]
pub(super) struct MlpSaved {
    rstd: Matrix,
    gate_up: Matrix,
    s_gate_up: Shrunk,
    /// None where the last projection did not run.
    s_down: Option<Shrunk>,
}

impl Block {
    fn gate_up_margin(&self, pass: &Pass) -> usize {
        pass.margin_of(&[self.gate.member(None), self.up.member(None)])
    }

    /// Writes `y`; returns the activations that the backward needs.
    pub(super) fn mlp_kept(&self, mid: View, mut y: ViewMut, pass: &Pass) -> Result<MlpSaved> {
        let mut saved = self.mlp_to_gate_up(mid, pass)?;
        let mut h = self.mlp_hidden(&saved.gate_up, pass)?;
        group!(down, self, pass, down, down);
        let adapter = pass.adapter.as_ref();
        saved.s_down = Some(down.forward(h.view_mut(), adapter, Some(mid), y.reborrow(), pass.workspace)?);
        Ok(saved)
    }

    /// Writes `y` and keeps nothing, piece by piece.
    pub(super) fn mlp(&self, mid: View, mut y: ViewMut, pass: &Pass) -> Result<()> {
        let _shared = self.policy.share_mlp(mid.rows(), false);
        // Adapters by rows count the rows of the whole batch.
        let by_rows = pass.adapter.is_some_and(|adapter| adapter.rows.is_some());
        let step = if by_rows { None } else { self.policy.mlp_rows() };
        for rows in pieces(mid.rows(), step) {
            let (mid, pass) = (mid.slice_rows(rows.clone()), pass.at_row(rows.start));
            let MlpSaved { gate_up, .. } = self.mlp_to_gate_up(mid, &pass)?;
            let mut h = self.mlp_hidden(&gate_up, &pass)?;
            drop(gate_up);
            group!(down, self, pass, down, down);
            let y = y.reborrow().slice_rows(rows);
            down.forward(h.view_mut(), pass.adapter.as_ref(), Some(mid), y, pass.workspace)?;
        }
        Ok(())
    }

    /// Turns `dy` into `d mid` in place and adds the adapters' gradients. Without what the forward saved, it is computed
    /// again, piece by piece.
    pub(super) fn backward_mlp(
        &self,
        mid: View,
        saved: Option<MlpSaved>,
        mut dy: ViewMut,
        pass: &Pass,
        mut gradient: ViewMut,
    ) -> Result<()> {
        if let Some(saved) = saved {
            return self.backward_mlp_piece(mid, saved, dy, pass, gradient);
        }
        let _shared = self.policy.share_mlp(mid.rows(), true);
        for rows in pieces(mid.rows(), self.policy.mlp_rows()) {
            let (mid, dy) = (mid.slice_rows(rows.clone()), dy.reborrow().slice_rows(rows.clone()));
            let pass = pass.at_row(rows.start);
            let saved = self.mlp_to_gate_up(mid, &pass)?;
            self.backward_mlp_piece(mid, saved, dy, &pass, gradient.reborrow())?;
        }
        Ok(())
    }

    fn backward_mlp_piece(
        &self,
        mid: View,
        saved: MlpSaved,
        mut dy: ViewMut,
        pass: &Pass,
        mut gradient: ViewMut,
    ) -> Result<()> {
        let Pass { workspace, .. } = *pass;
        let MlpSaved { rstd, mut gate_up, s_gate_up, s_down } = saved;
        let adapter = pass.adapter.as_ref().expect("a backward pass has an adapter");
        let (tokens, width) = (dy.rows(), self.gate.outputs());

        group!(down, self, pass, down, down);
        let mut dh = workspace.matrix(tokens, width)?;
        let ds = down.backward_input_with(dy.reborrow(), s_down.as_ref(), adapter, Some(dh.view_mut()), workspace)?;
        let (gate, up) = gate_up.view_mut().split_cols(width);
        swiglu::backward_in_place(gate, up, dh.view_mut())?;
        let h = dh;
        let s = match s_down {
            Some(s) => s,
            None => down.shrink(h.view(), Some(adapter), workspace)?,
        };
        down.backward_adapter(h.view(), &s, dy.as_view(), &ds, adapter, gradient.reborrow(), workspace)?;
        bias_gradients(&[&self.down], dy.as_view(), gradient.reborrow(), workspace)?;
        drop((h, s, ds));

        group!(group, self, pass, gate_up, gate, up);
        let mut dn2 = workspace.matrix(tokens, group.inputs())?;
        let (s, target) = (Some(&s_gate_up), Some(dn2.view_mut()));
        let ds = group.backward_input_with(gate_up.view_mut(), s, adapter, target, workspace)?;
        let (n2, _) = self.norm(mid, &self.post_attention_norm, 0, workspace)?;
        group.backward_adapter(n2.view(), &s_gate_up, gate_up.view(), &ds, adapter, gradient.reborrow(), workspace)?;
        bias_gradients(&[&self.gate, &self.up], gate_up.view(), gradient, workspace)?;
        drop((n2, gate_up));
        rms_norm::backward(mid, self.post_attention_norm.view(), rstd.view(), dn2.view(), dy, true)?;
        Ok(())
    }

    /// Gate and up side by side, 1/rms of `mid`, and the group's `S`.
    fn mlp_to_gate_up(&self, mid: View, pass: &Pass) -> Result<MlpSaved> {
        let Pass { workspace, .. } = *pass;
        let (mut n2, rstd) = self.norm(mid, &self.post_attention_norm, self.gate_up_margin(pass), workspace)?;
        self.renorm("post_attention_layernorm", mid, n2.view_mut(), pass)?;
        self.gate.saw(n2.view())?;
        group!(group, self, pass, gate_up, gate, up);
        // The backward turns it into its own gradient, so it has the gradient's margin.
        let mut gate_up = workspace.with_margin(mid.rows(), group.outputs(), self.gate_up_margin(pass))?;
        let s_gate_up = group.forward(n2.view_mut(), pass.adapter.as_ref(), None, gate_up.view_mut(), workspace)?;
        Ok(MlpSaved { rstd, gate_up, s_gate_up, s_down: None })
    }

    /// `h`, with the margin of the last projection.
    fn mlp_hidden(&self, gate_up: &Matrix, pass: &Pass) -> Result<Matrix> {
        let width = self.gate.outputs();
        let margin = pass.margin_of(&[self.down.member(None)]);
        let mut h = pass.workspace.with_margin(gate_up.rows(), width, margin)?;
        let (gate, up) = (gate_up.view().slice_cols(0..width), gate_up.view().slice_cols(width..gate_up.cols()));
        swiglu::forward(gate, up, h.view_mut())?;
        self.down.saw(h.view())?;
        Ok(h)
    }
}
