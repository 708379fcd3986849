//! A group of linear layers that read the same input, each with a frozen weight and possibly a LoRA adapter: q, k and v;
//! gate and up; or one layer alone.
//!
//! With `x [tokens, in]`, the members' weights `W [out, in]`, adapters `A [r, in]`, `B [out, r]` and factors `s`:
//!
//! ```text
//! S = drop(x) A^T        y = residual + x W^T + bias + s S B^T
//! dS = s dy B            dx = sum over the members of (dy W + drop'(dS A))       dA += dS^T drop(x)    dB += s dy^T S
//! ```
//!
//! `y [tokens, sum of out]` holds the members' outputs side by side. The weights and biases are frozen. All adapters of a
//! model lie in one flat f32 buffer, in which a [`LoraSlot`] says where A and B are.
//!
//! On the CPU the members run one after the other, and so they do on CUDA where an adapter is of another kind than LoRA
//! ([`SlotKind`]). Otherwise, on CUDA, the group is one matrix product forward and one backward, by
//! **augmented K**: the weights are dequantized into one buffer with `R = sum of r` extra columns that hold `s B` (block
//! diagonal) and `R` extra rows that hold A. `S` is written into extra columns of x and `dS` into extra columns of dy
//! (their matrices' margin), so that
//!
//! ```text
//! y = [x | S] [W | sB]^T            dx = [dy | dS] [W ; A]
//! ```
//!
//! and neither y nor dx is read again to add the adapters' part (LoRAFusion, arXiv 2510.00206, measures what that costs).
//!
//! It is also more exact: the sum is rounded to bf16 once. Where the base's part is rounded first and the adapters' is added
//! to it, as PEFT does, a small update falls below the rounding and is lost: in 20 steps of SmolLM2 (bf16, NF4) PEFT's loss
//! is 5 to 9% above that of the same run in f32, ours within 0.5% (`tests/cuda_smollm2.rs`, and
//! `tests/fixtures/parity/smollm2_20_steps_gpu.json` for PEFT's).

pub(super) mod by_member;
mod lora;

use std::ops::Range;

use super::adapter_rows::AdapterRows;
use super::dropout::Dropout;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::view::{View, ViewMut};
use crate::weight::{FrozenWeight, WeightCache};

/// One layer of a group.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// The layer's name in the model: [`AdapterRows`] finds its changes by it.
    pub name: &'a str,
    /// The frozen weight `[out, in]`.
    pub weight: &'a dyn FrozenWeight,
    /// The frozen bias `[out]`, f32.
    pub bias: Option<View<'a>>,
    /// Its adapter's place.
    pub lora: Option<&'a LoraSlot>,
}

/// The places of a layer's A and B in the flat adapter buffer, and their use.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSlot {
    /// The elements of A `[rank, in]`.
    pub a: Range<usize>,
    /// The elements of B `[out, rank]`.
    pub b: Range<usize>,
    /// The rank.
    pub rank: usize,
    /// The factor of the adapter's output.
    pub scale: f32,
    /// Tells this layer's dropout mask from the others'.
    pub stream: u64,
    /// The kind of the adapter, with its parameters besides A and B.
    pub kind: SlotKind,
}

/// The kinds of adapters that are trained.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum SlotKind {
    /// LoRA: A and B alone.
    #[default]
    Lora,
    /// DoRA ([`super::dora_linear`]).
    Dora(DoraPlaces),
}

/// The places of DoRA's values besides A and B.
#[derive(Clone, Debug, PartialEq)]
pub struct DoraPlaces {
    /// The elements of m `[out]` in the flat adapter buffer.
    pub magnitude: Range<usize>,
    /// The elements of `1 / n [out]` in [`AdapterPass::inverse_norms`].
    pub norms: Range<usize>,
}

/// The norm that a group's input comes from: `y = weight x / sqrt(mean x^2 + eps)`.
#[derive(Clone, Copy, Debug)]
pub struct InputNorm<'a> {
    /// One f32 row.
    pub weight: View<'a>,
    /// Keeps a row of zeros from dividing by zero.
    pub eps: f32,
}

/// The adapter of one pass through the model: its values, and the dropout of this pass while training.
#[derive(Clone, Copy, Debug)]
pub struct AdapterPass<'a> {
    /// All adapters' elements, back to back, f32, one row.
    pub values: View<'a>,
    /// The probability of dropping an input of the adapter, and the seed of this pass.
    pub dropout: Option<(f32, u64)>,
    /// The batch's row that the first row of the activations is: not 0 where a part of a batch runs by itself.
    pub first_row: usize,
    /// Without a backward: the adapters of the rows, instead of the one whose places the layers know.
    pub rows: Option<&'a AdapterRows<'a>>,
    /// Of adapters with magnitudes: one over the norm of each row of the weights with their adapters, f32, one row.
    pub inverse_norms: Option<View<'a>>,
}

impl<'a> AdapterPass<'a> {
    /// A pass without dropout.
    pub fn new(values: impl Into<View<'a>>) -> Self {
        Self { values: values.into(), dropout: None, first_row: 0, rows: None, inverse_norms: None }
    }

    /// A pass without a backward in which rows have different adapters.
    pub fn by_rows(rows: &'a AdapterRows<'a>) -> Self {
        Self { rows: Some(rows), ..Self::new(View::vector(&[])) }
    }

    /// Whether inputs are dropped in this pass.
    pub fn drops(&self) -> bool {
        self.dropout.is_some_and(|(p, _)| p > 0.0)
    }

    /// The dropout of one layer in this pass.
    pub fn dropout_of(&self, slot: &LoraSlot) -> Option<Dropout> {
        let (p, seed) = self.dropout.filter(|&(p, _)| p > 0.0)?;
        Some(Dropout { p, seed, stream: slot.stream, first_row: self.first_row })
    }

    /// The same pass for the rows from `row` on.
    pub fn at_row(self, row: usize) -> Self {
        Self { first_row: self.first_row + row, ..self }
    }
}

/// `S` (or `dS`) of a group: the matrix of its forward that its backward needs besides the input.
#[derive(Debug, Default)]
pub struct Shrunk {
    pub(crate) parts: Vec<Option<Matrix>>,
    /// `dy^T S` of all members, f32, where it was made together with `dS`.
    #[cfg(feature = "cuda")]
    pub(crate) db: Option<Matrix>,
}

impl Shrunk {
    pub(crate) fn new(parts: Vec<Option<Matrix>>) -> Self {
        Self {
            parts,
            #[cfg(feature = "cuda")]
            db: None,
        }
    }
    /// That of one member (or, on CUDA, of all of them together).
    #[cfg(feature = "cuda")]
    pub(crate) fn part(&self, index: usize) -> Option<&Matrix> {
        self.parts.get(index).and_then(Option::as_ref)
    }
}

/// A group of layers and, on CUDA, where their dequantized weights may be kept.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a> {
    /// The layers, at most three.
    pub members: &'a [Member<'a>],
    /// The cache for the dequantized weights between uses.
    pub cache: &'a WeightCache,
    /// On CUDA: dequantize one member's weight at a time, for less memory; the sums are then made in another order.
    pub split: bool,
}

/// The columns of margin that matrices need on CUDA so that groups with these ranks can use it: none without adapters.
pub fn margin<'a>(members: impl IntoIterator<Item = Option<&'a LoraSlot>>) -> usize {
    let ranks: usize = members.into_iter().flatten().map(|slot| slot.rank).sum();
    // Whole 16-byte accesses in bf16.
    ranks.next_multiple_of(8)
}

impl Group<'_> {
    pub(crate) const OP: &'static str = "linear_group";

    /// Whether the members run one after the other even on a GPU: the fused product knows only LoRA.
    #[cfg(feature = "cuda")]
    fn is_by_member(&self, adapter: Option<&AdapterPass>) -> bool {
        let other = |member: &Member| member.lora.is_some_and(|slot| slot.kind != SlotKind::Lora);
        adapter.is_some() && self.members.iter().any(other)
    }

    /// Output features of all members.
    pub fn outputs(&self) -> usize {
        self.members.iter().map(|member| member.weight.rows()).sum()
    }

    /// Input features.
    pub fn inputs(&self) -> usize {
        self.members.first().map_or(0, |member| member.weight.cols())
    }

    /// Writes `y`; `x` is not changed, but its margin is used. Returns `S` for the backward.
    ///
    /// # Errors
    /// If a shape does not fit, or the views are not on the same device.
    pub fn forward(
        &self,
        x: ViewMut,
        adapter: Option<&AdapterPass>,
        residual: Option<View>,
        y: ViewMut,
        workspace: &Workspace,
    ) -> Result<Shrunk> {
        self.check(x.as_view(), y.as_view())?;
        if let Some(residual) = residual {
            residual.expect(Self::OP, "the residual", y.rows(), y.cols())?;
        }
        if let Some(rows) = adapter.and_then(|pass| pass.rows) {
            rows.forward(self, x, residual, y, workspace)?;
            return Ok(Shrunk::default());
        }
        #[cfg(feature = "cuda")]
        if y.gpu().is_some() && !self.is_by_member(adapter) {
            return crate::cuda::linear_group::forward(Self::OP, self, x, adapter, residual, y, workspace);
        }
        by_member::forward(self, x.as_view(), adapter, residual, y, workspace)
    }

    /// [`Self::forward`] where no backward follows: on CUDA, a few tokens are multiplied with 4-bit weights as they lie.
    /// Weights and adapters are then read ahead: between what wrote them on the GPU and this call lies at least one other
    /// operation (a norm, an embedding) or a synchronization.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn infer(
        &self,
        x: ViewMut,
        adapter: Option<&AdapterPass>,
        residual: Option<View>,
        mut y: ViewMut,
        workspace: &Workspace,
    ) -> Result<()> {
        self.check(x.as_view(), y.as_view())?;
        if let Some(residual) = residual {
            residual.expect(Self::OP, "the residual", y.rows(), y.cols())?;
        }
        if let Some(rows) = adapter.and_then(|pass| pass.rows) {
            return rows.infer(self, x, residual, y, workspace);
        }
        #[cfg(feature = "cuda")]
        if y.gpu().is_some() && !self.is_by_member(adapter) {
            use crate::cuda::few_tokens;
            let from = residual.map(|residual| residual.cuda(Self::OP)).transpose()?;
            let (x, y) = (x.as_view().cuda(Self::OP)?, y.reborrow().cuda(Self::OP)?);
            if few_tokens::forward(Self::OP, self, x, None, adapter, from, y, false, workspace)? {
                return Ok(());
            }
        }
        self.forward(x, adapter, residual, y.reborrow(), workspace).map(drop)
    }

    /// [`Self::infer`] of the norm of `x` (with `swiglu`, [`Self::infer_swiglu`]), if there are kernels that take these
    /// arguments without a launch for the norm; says whether.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn infer_normed(
        &self,
        x: View,
        norm: &InputNorm,
        adapter: Option<&AdapterPass>,
        y: ViewMut,
        swiglu: bool,
        workspace: &Workspace,
    ) -> Result<bool> {
        self.check_members(x)?;
        let width = if swiglu { self.members.first().map_or(0, |m| m.weight.rows()) } else { self.outputs() };
        y.expect(Self::OP, "the output", x.rows(), width)?;
        Error::check_shape(Self::OP, "the norm's weight", &[norm.weight.rows() * norm.weight.cols()], &[x.cols()])?;
        #[cfg(feature = "cuda")]
        if y.gpu().is_some()
            && adapter.is_some_and(|pass| pass.rows.is_none())
            && !self.is_by_member(adapter)
            && (!swiglu || self.members.len() == 2)
        {
            use crate::cuda::few_tokens;
            let (x, y) = (x.cuda(Self::OP)?, y.cuda(Self::OP)?);
            return few_tokens::forward(Self::OP, self, x, Some(norm), adapter, None, y, swiglu, workspace);
        }
        let _ = (adapter, workspace);
        Ok(false)
    }

    /// `h = silu(gate) up` of a group of gate and up in one pass, if there is a kernel that takes these arguments; says
    /// whether. No backward follows.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn infer_swiglu(
        &self,
        x: View,
        adapter: Option<&AdapterPass>,
        h: ViewMut,
        workspace: &Workspace,
    ) -> Result<bool> {
        self.check_members(x)?;
        let width = self.members.first().map_or(0, |member| member.weight.rows());
        h.expect(Self::OP, "h", x.rows(), width)?;
        if let Some(rows) = adapter.and_then(|pass| pass.rows) {
            return rows.infer_swiglu(self, x, h, workspace);
        }
        #[cfg(feature = "cuda")]
        if self.members.len() == 2 && h.gpu().is_some() && !self.is_by_member(adapter) {
            use crate::cuda::few_tokens;
            let (x, h) = (x.cuda(Self::OP)?, h.cuda(Self::OP)?);
            return few_tokens::forward(Self::OP, self, x, None, adapter, None, h, true, workspace);
        }
        let _ = (adapter, workspace);
        Ok(false)
    }

    /// `S` alone: all that a recomputed block needs of its last group.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn shrink(&self, x: View, adapter: Option<&AdapterPass>, workspace: &Workspace) -> Result<Shrunk> {
        let Some(pass) = adapter else { return Ok(Shrunk::default()) };
        #[cfg(feature = "cuda")]
        if x.gpu().is_some() && !self.is_by_member(adapter) {
            return crate::cuda::linear_group::shrink(Self::OP, self, x, pass, workspace);
        }
        by_member::shrink(self, x, pass, workspace)
    }

    /// Writes `dx` (unless nothing below needs it) and returns `dS` for [`Self::backward_adapter`]. `dy` is not changed,
    /// but its margin is used.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn backward_input(
        &self,
        dy: ViewMut,
        adapter: &AdapterPass,
        dx: Option<ViewMut>,
        workspace: &Workspace,
    ) -> Result<Shrunk> {
        self.backward_input_with(dy, None, adapter, dx, workspace)
    }

    /// [`Self::backward_input`] where the forward's `S` is at hand already: on CUDA, one pass over `dy` then makes `dS`
    /// and B's gradient.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn backward_input_with(
        &self,
        dy: ViewMut,
        s: Option<&Shrunk>,
        adapter: &AdapterPass,
        dx: Option<ViewMut>,
        workspace: &Workspace,
    ) -> Result<Shrunk> {
        if let Some(dx) = &dx {
            self.check(dx.as_view(), dy.as_view())?;
        }
        #[cfg(feature = "cuda")]
        if dy.gpu().is_some() && !self.is_by_member(Some(adapter)) {
            return crate::cuda::linear_group::backward_input(Self::OP, self, dy, s, adapter, dx, workspace);
        }
        let _ = s;
        by_member::backward_input(self, dy.as_view(), adapter, dx, workspace)
    }

    /// Adds the gradients of the members' adapters to their places in `gradient` (f32, one row, laid out as the adapter).
    ///
    /// `x`: the forward's input; `s`: from the forward; `dy` and `ds`: of [`Self::backward_input`].
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn backward_adapter(
        &self,
        x: View,
        s: &Shrunk,
        dy: View,
        ds: &Shrunk,
        adapter: &AdapterPass,
        gradient: ViewMut,
        workspace: &Workspace,
    ) -> Result<()> {
        self.check(x, dy)?;
        if self.members.iter().all(|member| member.lora.is_none()) {
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        if dy.gpu().is_some() && !self.is_by_member(Some(adapter)) {
            return crate::cuda::linear_group::backward_adapter(
                Self::OP,
                self,
                x,
                s,
                dy,
                ds,
                adapter,
                gradient,
                workspace,
            );
        }
        by_member::backward_adapter(self, x, s, dy, ds, adapter, gradient, workspace)
    }

    fn check(&self, x: View, y: View) -> Result<()> {
        self.check_members(x)?;
        y.expect(Self::OP, "y", x.rows(), self.outputs())
    }

    fn check_members(&self, x: View) -> Result<()> {
        if self.members.is_empty() || self.members.len() > 3 {
            return Err(Error::invalid(Self::OP, format!("{} members; expected 1 to 3", self.members.len())));
        }
        for member in self.members {
            Error::check_shape(Self::OP, "a member's inputs", &[member.weight.cols()], &[self.inputs()])?;
            member.weight.arrive()?;
        }
        x.expect(Self::OP, "x", x.rows(), self.inputs())
    }
}

impl LoraSlot {
    /// A and B.
    pub(super) fn factors<'a>(&self, values: View<'a>, inputs: usize, outputs: usize) -> (View<'a>, View<'a>) {
        let part = |range: &Range<usize>| values.slice_cols(range.clone());
        (part(&self.a).reshape(self.rank, inputs), part(&self.b).reshape(outputs, self.rank))
    }

    /// The gradients of A and B, which never overlap, whichever comes first in the buffer.
    pub(super) fn factors_mut<'a>(
        &self,
        values: ViewMut<'a>,
        inputs: usize,
        outputs: usize,
    ) -> (ViewMut<'a>, ViewMut<'a>) {
        let (a, b) = if self.a.end <= self.b.start {
            let (low, high) = values.split_cols(self.b.start);
            (low.slice_cols(self.a.clone()), high.slice_cols(0..self.b.len()))
        } else {
            let (low, high) = values.split_cols(self.a.start);
            (high.slice_cols(0..self.a.len()), low.slice_cols(self.b.clone()))
        };
        (a.reshape(self.rank, inputs), b.reshape(outputs, self.rank))
    }
}

/// Adds a bias to every row.
pub(super) fn add_bias(y: ViewMut, bias: View) -> Result<()> {
    const OP: &str = "bias";
    Error::check_shape(OP, "bias", &[bias.rows() * bias.cols()], &[y.cols()])?;
    #[cfg(feature = "cuda")]
    if y.gpu().is_some() {
        return crate::cuda::ops::add_bias(OP, y.cuda(OP)?, bias.cuda(OP)?);
    }
    let bias = bias.host(OP)?;
    let bias = bias.as_slice().ok_or_else(|| Error::invalid(OP, "a bias has gaps between its elements"))?;
    y.host(OP)?.rows_mut().for_each(|row| row.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
    Ok(())
}
