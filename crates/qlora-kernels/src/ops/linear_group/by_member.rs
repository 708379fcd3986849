//! A group of layers computed one member after the other: on the CPU always, on a GPU where a member's adapter is of a kind
//! that the fused product does not compute.
//!
//! [`AdaptedLinear`] is the seam between the group and the kinds of adapters: one implementation a kind, each in its file.

use super::lora::Lora;
use super::{AdapterPass, Group, LoraSlot, Member, Shrunk, SlotKind, add_bias};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::ops::dora_linear::Dora;
use crate::ops::frozen_linear;
use crate::view::{View, ViewMut};

/// One layer with its adapter in one pass.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Layer<'a> {
    pub(in crate::ops) member: &'a Member<'a>,
    pub(in crate::ops) slot: &'a LoraSlot,
    pub(in crate::ops) pass: &'a AdapterPass<'a>,
}

impl<'a> Layer<'a> {
    /// A and B.
    pub(in crate::ops) fn factors(&self) -> (View<'a>, View<'a>) {
        let weight = self.member.weight;
        self.slot.factors(self.pass.values, weight.cols(), weight.rows())
    }
}

/// Forward and backward of one layer with an adapter of one kind. `x` is `[tokens, in]`, `y` is `[tokens, out]`, `S` and `dS`
/// are `[tokens, r]`.
pub(in crate::ops) trait AdaptedLinear {
    /// Writes `y = residual + the layer with its adapter + bias` and returns `S`.
    fn forward(&self, x: View, residual: Option<View>, y: ViewMut, workspace: &Workspace) -> Result<Matrix>;

    /// `S` alone.
    fn shrink(&self, x: View, workspace: &Workspace) -> Result<Matrix>;

    /// Writes `dx` (with `add`, adds to it) unless nothing needs it, and returns `dS`.
    fn backward_input(&self, dy: View, dx: Option<ViewMut>, add: bool, workspace: &Workspace) -> Result<Matrix>;

    /// Adds the gradients of the adapter's parameters to their places in `gradient`.
    fn backward_adapter(
        &self,
        x: View,
        s: View,
        dy: View,
        ds: View,
        gradient: ViewMut,
        workspace: &Workspace,
    ) -> Result<()>;
}

/// Runs `f` with the layer's kind.
fn with_kind<R>(layer: Layer, f: impl FnOnce(&dyn AdaptedLinear) -> Result<R>) -> Result<R> {
    match &layer.slot.kind {
        SlotKind::Lora => f(&Lora(layer)),
        SlotKind::Dora(places) => f(&Dora::new(layer, places)?),
    }
}

/// The members with their adapters and their columns of the group's output.
fn layers<'a>(
    group: &'a Group,
    pass: Option<&'a AdapterPass<'a>>,
) -> impl Iterator<Item = (&'a Member<'a>, Option<Layer<'a>>, std::ops::Range<usize>)> {
    group.members.iter().scan(0, move |start, member| {
        let columns = *start..*start + member.weight.rows();
        *start = columns.end;
        let layer = member.lora.zip(pass).map(|(slot, pass)| Layer { member, slot, pass });
        Some((member, layer, columns))
    })
}

/// [`Group::forward`].
pub(in crate::ops) fn forward(
    group: &Group,
    x: View,
    adapter: Option<&AdapterPass>,
    residual: Option<View>,
    mut y: ViewMut,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let mut shrunk = Vec::with_capacity(group.members.len());
    for (member, layer, columns) in layers(group, adapter) {
        let residual = residual.map(|all| all.slice_cols(columns.clone()));
        let y = y.reborrow().slice_cols(columns);
        shrunk.push(match layer {
            None => {
                base(member, x, residual, y, workspace)?;
                None
            }
            Some(layer) => Some(with_kind(layer, |kind| kind.forward(x, residual, y, workspace))?),
        });
    }
    Ok(Shrunk::new(shrunk))
}

/// `y = residual + x W^T + bias`.
pub(in crate::ops) fn base(
    member: &Member,
    x: View,
    residual: Option<View>,
    mut y: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    let beta = match residual {
        None => 0.0,
        Some(residual) => {
            y.reborrow().copy_from(residual)?;
            1.0
        }
    };
    frozen_linear::forward(x, member.weight, y.reborrow(), beta, workspace)?;
    member.bias.map_or(Ok(()), |bias| add_bias(y, bias))
}

/// [`Group::shrink`].
pub(in crate::ops) fn shrink(group: &Group, x: View, pass: &AdapterPass, workspace: &Workspace) -> Result<Shrunk> {
    let of = |layer: Option<Layer>| layer.map(|layer| with_kind(layer, |kind| kind.shrink(x, workspace))).transpose();
    layers(group, Some(pass)).map(|(_, layer, _)| of(layer)).collect::<Result<_>>().map(Shrunk::new)
}

/// [`Group::backward_input`].
pub(in crate::ops) fn backward_input(
    group: &Group,
    dy: View,
    adapter: &AdapterPass,
    mut dx: Option<ViewMut>,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let mut shrunk = Vec::with_capacity(group.members.len());
    for (index, (member, layer, columns)) in layers(group, Some(adapter)).enumerate() {
        let dy = dy.slice_cols(columns);
        let dx = dx.as_mut().map(ViewMut::reborrow);
        shrunk.push(match layer {
            Some(layer) => Some(with_kind(layer, |kind| kind.backward_input(dy, dx, index > 0, workspace))?),
            None => {
                if let Some(dx) = dx {
                    frozen_linear::backward(dy, member.weight, dx, if index > 0 { 1.0 } else { 0.0 }, workspace)?;
                }
                None
            }
        });
    }
    Ok(Shrunk::new(shrunk))
}

/// [`Group::backward_adapter`].
pub(in crate::ops) fn backward_adapter(
    group: &Group,
    x: View,
    s: &Shrunk,
    dy: View,
    ds: &Shrunk,
    adapter: &AdapterPass,
    mut gradient: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    for (index, (_, layer, columns)) in layers(group, Some(adapter)).enumerate() {
        let Some(layer) = layer else { continue };
        let (Some(Some(s)), Some(Some(ds))) = (s.parts.get(index), ds.parts.get(index)) else {
            return Err(Error::invalid(Group::OP, "a backward without its forward's S"));
        };
        let (dy, gradient) = (dy.slice_cols(columns), gradient.reborrow());
        with_kind(layer, |kind| kind.backward_adapter(x, s.view(), dy, ds.view(), gradient, workspace))?;
    }
    Ok(())
}
