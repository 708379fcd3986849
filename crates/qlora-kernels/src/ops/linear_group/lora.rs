//! LoRA (arXiv 2106.09685) of one layer: `y = x W^T + bias + s drop(x) A^T B^T`.

use super::by_member::{AdaptedLinear, Layer, base};
use crate::error::Result;
use crate::matrix::{Matrix, Workspace};
use crate::ops::{frozen_linear, lora_linear};
use crate::view::{View, ViewMut};

/// The adapter of one layer.
pub(super) struct Lora<'a>(pub(super) Layer<'a>);

impl AdaptedLinear for Lora<'_> {
    fn forward(&self, x: View, residual: Option<View>, mut y: ViewMut, workspace: &Workspace) -> Result<Matrix> {
        let Layer { member, slot, pass } = self.0;
        base(member, x, residual, y.reborrow(), workspace)?;
        let (a, b) = self.0.factors();
        let mut s = workspace.matrix(x.rows(), slot.rank)?;
        lora_linear::forward(x, a, b, slot.scale, pass.dropout_of(slot), s.view_mut(), y, workspace)?;
        Ok(s)
    }

    fn shrink(&self, x: View, workspace: &Workspace) -> Result<Matrix> {
        let Layer { slot, pass, .. } = self.0;
        let mut s = workspace.matrix(x.rows(), slot.rank)?;
        lora_linear::shrink(x, self.0.factors().0, pass.dropout_of(slot), s.view_mut(), workspace)?;
        Ok(s)
    }

    fn backward_input(&self, dy: View, mut dx: Option<ViewMut>, add: bool, workspace: &Workspace) -> Result<Matrix> {
        let Layer { member, slot, pass } = self.0;
        if let Some(dx) = &mut dx {
            frozen_linear::backward(dy, member.weight, dx.reborrow(), if add { 1.0 } else { 0.0 }, workspace)?;
        }
        let (a, b) = self.0.factors();
        let mut ds = workspace.matrix(dy.rows(), slot.rank)?;
        lora_linear::backward_input(dy, a, b, slot.scale, pass.dropout_of(slot), ds.view_mut(), dx, workspace)?;
        Ok(ds)
    }

    fn backward_adapter(
        &self,
        x: View,
        s: View,
        dy: View,
        ds: View,
        gradient: ViewMut,
        workspace: &Workspace,
    ) -> Result<()> {
        let Layer { slot, pass, .. } = self.0;
        let (da, db) = slot.factors_mut(gradient, x.cols(), dy.cols());
        lora_linear::backward_adapter(x, slot.scale, pass.dropout_of(slot), s, dy, ds, da, db, workspace)
    }
}
