//! One linear layer of a block: a frozen weight, its bias, and its slot in the flat adapter buffer.
//!
//! With `x [tokens, in]`, `W [out, in]`, `A [r, in]`, `B [out, r]` and `s = scale`:
//!
//! ```text
//! S = drop(x) A^T        y  += x W^T + bias + s S B^T
//! dS = s dy B            dx += dy W + drop'(dS A)      dA += dS^T drop(x)      dB += s dy^T S
//! ```
//!
//! W and the bias are frozen: they get no gradient.

use std::ops::Range;
use std::sync::Arc;

use qlora_kernels::ops::dropout::Dropout;
use qlora_kernels::ops::{frozen_linear, lora_linear};
use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::{Matrix, View, ViewMut, Workspace};

use crate::error::{Error, Result};

/// A linear layer of a block.
#[derive(Clone, Debug)]
pub struct Projection {
    name: String,
    weight: Arc<dyn FrozenWeight>,
    bias: Option<Vec<f32>>,
    slot: Option<LoraSlot>,
}

/// Where a projection's A and B lie in the flat adapter buffer, and how they are used.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSlot {
    /// The elements of A `[rank, in]`.
    pub a: Range<usize>,
    /// The elements of B `[out, rank]`.
    pub b: Range<usize>,
    /// The rank.
    pub rank: usize,
    /// What the adapter's output is multiplied by.
    pub scale: f32,
    /// Tells this projection's dropout mask from the others'.
    pub stream: u64,
}

/// The adapter of one pass through the model: its values, and the dropout of this pass while training.
#[derive(Clone, Copy, Debug)]
pub struct AdapterPass<'a> {
    /// All adapters' elements, back to back.
    pub values: &'a [f32],
    /// The probability of dropping an input of the adapter, and the seed of this pass.
    pub dropout: Option<(f32, u64)>,
}

impl<'a> AdapterPass<'a> {
    /// A pass without dropout.
    pub fn new(values: &'a [f32]) -> Self {
        Self { values, dropout: None }
    }
}

impl LoraSlot {
    fn views<'a>(&self, values: &'a [f32], inputs: usize, outputs: usize) -> (View<'a>, View<'a>) {
        let a = View::new(&values[self.a.clone()], self.rank, inputs);
        (a, View::new(&values[self.b.clone()], outputs, self.rank))
    }

    /// The gradients of A and B, which never overlap, whichever comes first in the buffer.
    fn views_mut<'a>(&self, values: &'a mut [f32], inputs: usize, outputs: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        let (a, b) = if self.a.end <= self.b.start {
            let (low, high) = values.split_at_mut(self.b.start);
            (&mut low[self.a.clone()], &mut high[..self.b.len()])
        } else {
            let (low, high) = values.split_at_mut(self.a.start);
            (&mut high[..self.a.len()], &mut low[self.b.clone()])
        };
        (ViewMut::new(a, self.rank, inputs), ViewMut::new(b, outputs, self.rank))
    }

    fn dropout(&self, pass: &AdapterPass) -> Option<Dropout> {
        let (p, seed) = pass.dropout.filter(|&(p, _)| p > 0.0)?;
        Some(Dropout { p, seed, stream: self.stream })
    }
}

impl Projection {
    /// A projection without an adapter.
    ///
    /// # Errors
    /// If the bias does not have one element an output feature.
    pub fn new(name: impl Into<String>, weight: Arc<dyn FrozenWeight>, bias: Option<Vec<f32>>) -> Result<Self> {
        let name = name.into();
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != weight.rows()) {
            let message = format!("has {} elements, its weight has {} rows", bias.len(), weight.rows());
            return Err(Error::tensor(format!("{name}.bias"), message));
        }
        Ok(Self { name, weight, bias, slot: None })
    }

    /// The module's name, such as `model.layers.0.self_attn.q_proj`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The frozen weight.
    pub fn weight(&self) -> &Arc<dyn FrozenWeight> {
        &self.weight
    }

    /// The bias, if there is one.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Input features.
    pub fn inputs(&self) -> usize {
        self.weight.cols()
    }

    /// Output features.
    pub fn outputs(&self) -> usize {
        self.weight.rows()
    }

    /// The adapter's place, if this projection has one.
    pub fn slot(&self) -> Option<&LoraSlot> {
        self.slot.as_ref()
    }

    /// Gives the projection an adapter, or takes it away.
    pub fn set_slot(&mut self, slot: Option<LoraSlot>) {
        self.slot = slot;
    }

    /// `y = x W^T + bias + s S B^T + beta y`; returns `S`, which [`Self::backward`] wants back.
    pub fn forward(
        &self,
        x: View,
        mut y: ViewMut,
        beta: f32,
        adapter: Option<&AdapterPass>,
        workspace: &Workspace,
    ) -> Result<Option<Matrix>> {
        frozen_linear::forward(x, &*self.weight, y.reborrow(), beta, workspace)?;
        if let Some(bias) = &self.bias {
            let rows = y.reborrow().host("bias")?.rows_mut();
            rows.for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
        }
        let (Some(slot), Some(pass)) = (&self.slot, adapter) else { return Ok(None) };
        let (a, b) = slot.views(pass.values, self.inputs(), self.outputs());
        let mut s = workspace.matrix(x.rows(), slot.rank);
        lora_linear::forward(x, a, b, slot.scale, slot.dropout(pass), s.view_mut(), y, workspace)?;
        Ok(Some(s))
    }

    /// `S` alone: all that a recomputed block needs of its last projection.
    pub fn shrink(&self, x: View, adapter: Option<&AdapterPass>, workspace: &Workspace) -> Result<Option<Matrix>> {
        let (Some(slot), Some(pass)) = (&self.slot, adapter) else { return Ok(None) };
        let (a, _) = slot.views(pass.values, self.inputs(), self.outputs());
        let mut s = workspace.matrix(x.rows(), slot.rank);
        lora_linear::shrink(x, a, slot.dropout(pass), s.view_mut(), workspace)?;
        Ok(Some(s))
    }

    /// `dx = dy W + drop'(dS A) + beta dx`, and the gradients of A and B added to their places in `gradient`.
    ///
    /// Without `dx` only the adapter's gradients are made: enough for the lowest layer with adapters.
    pub fn backward(
        &self,
        x: View,
        s: Option<&Matrix>,
        dy: View,
        mut dx: Option<(ViewMut, f32)>,
        adapter: &AdapterPass,
        gradient: &mut [f32],
        workspace: &Workspace,
    ) -> Result<()> {
        if let Some((dx, beta)) = &mut dx {
            frozen_linear::backward(dy, &*self.weight, dx.reborrow(), *beta, workspace)?;
        }
        let Some(slot) = &self.slot else { return Ok(()) };
        let s = s.ok_or_else(|| Error::Invalid(format!("{}: backward without the forward's S", self.name)))?;
        let (a, b) = slot.views(adapter.values, self.inputs(), self.outputs());
        let (da, db) = slot.views_mut(gradient, self.inputs(), self.outputs());
        let dx = dx.map(|(dx, _)| dx);
        lora_linear::backward(x, a, b, slot.scale, slot.dropout(adapter), s.view(), dy, dx, da, db, workspace)?;
        Ok(())
    }
}
