//! A group whose frozen weights are multiplied in fp8: `y = x W^T` and `dx = dy W` with 8 bits (e4m3) a value and a scale a
//! row of the reduction on either side. The adapters' products stay in the activations' type; they are made first, and
//! the frozen part is accumulated onto them.
//!
//! The forward reads `W [out, in]` with a scale for each output, the backward `W^T [in, out]` with one for each input: two
//! copies of one byte a weight. Where the cache keeps them they take the memory of a dequantized weight. Simulated on normal
//! weights, the roundings are 2.6% of a weight (NF4's own are 9.2%) and 3.7% of a product.

use std::ops::Range;
use std::sync::PoisonError;

use super::backward::{add_adapters_part, factors_in_one_pass};
use super::{Plan, add_biases, dequantize, parts, rows_of_a, shrink_into};
use crate::cuda::blas::Kind;
use crate::cuda::fp8::{Fp8, MULTIPLE};
use crate::cuda::graph;
use crate::cuda::step_memory::lasting;
use crate::cuda::view::{CudaView, CudaViewMut};
use crate::error::Result;
use crate::matrix::Workspace;
use crate::ops::linear_group::{AdapterPass, Group, Shrunk};
use crate::weight::FrozenCompute;

/// A group's weights in 8 bits; each copy is made where it is first needed.
#[derive(Default)]
pub(crate) struct Fp8Weights {
    forward: Option<Fp8>,
    backward: Option<Fp8>,
}

/// The product that a copy of the weights is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Forward,
    Backward,
}

/// Whether the group's products run in fp8. Those whose sizes fp8 cannot have, and LLM.int8's, which round their input in
/// their own way, stay in the activations' type.
pub(super) fn takes(group: &Group) -> bool {
    let fits = |size: usize| size.is_multiple_of(MULTIPLE);
    group.cache.compute() == FrozenCompute::Fp8
        && fits(group.inputs())
        && group.members.iter().all(|member| fits(member.weight.rows()) && member.weight.int8_activations().is_none())
}

/// Whether the group multiplies with weights in fp8 that stay from one product to the next.
pub(in crate::cuda) fn keeps_fp8(group: &Group) -> bool {
    takes(group) && group.cache.enabled() && !group.split
}

/// The weights that are multiplied together: of the whole group, or of one member at a time.
fn pieces(group: &Group) -> Vec<Range<usize>> {
    match group.split {
        true => parts(group).map(|(_, columns)| columns).collect(),
        false => std::iter::once(0..group.outputs()).collect(),
    }
}

/// Runs `multiply` with the copy of the weights for `side` whose outputs are `piece`.
fn with_weights(
    plan: &Plan,
    group: &Group,
    piece: &Range<usize>,
    side: Side,
    workspace: &Workspace,
    multiply: impl FnOnce(&Fp8) -> Result<()>,
) -> Result<()> {
    let inside = |columns: &Range<usize>| columns.start >= piece.start && columns.end <= piece.end;
    let make = || {
        // Weights that are not written yet must not get into the cache.
        graph::refuse(plan.op)?;
        let members = parts(group).filter(|(_, columns)| inside(columns)).map(|(member, _)| member.weight.as_cuda());
        if let Some(weights) = members.collect::<Option<Vec<_>>>() {
            let made = match side {
                Side::Forward => Fp8::of_bits4(&weights)?,
                Side::Backward => Fp8::of_bits4_transposed(&weights)?,
            };
            if let Some(made) = made {
                return Ok(made);
            }
        }
        let mut whole = workspace.matrix(piece.len(), plan.k)?;
        for (member, columns) in parts(group) {
            if inside(&columns) {
                let rows = columns.start - piece.start..columns.end - piece.start;
                dequantize(plan.op, member.weight, whole.view_mut().cuda(plan.op)?.slice_rows(rows))?;
            }
        }
        let whole = whole.view().cuda(plan.op)?;
        if side == Side::Forward { Fp8::of_rows(whole) } else { Fp8::of_columns(whole) }
    };
    if !keeps_fp8(group) {
        return multiply(&make()?);
    }
    let mut kept = group.cache.fp8.lock().unwrap_or_else(PoisonError::into_inner);
    let slot = if side == Side::Forward { &mut kept.forward } else { &mut kept.backward };
    let weights = match slot.take() {
        Some(weights) => weights,
        None => lasting(make)?,
    };
    multiply(slot.insert(weights))
}

pub(super) fn forward(
    plan: &Plan,
    group: &Group,
    x: CudaView,
    adapter: Option<&AdapterPass>,
    residual: Option<CudaView>,
    mut y: CudaViewMut,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let Plan { op, rp, .. } = *plan;
    let gpu = y.gpu();
    let mut shrunk = Shrunk::default();
    let mut addend = residual;
    let mut beta = if residual.is_some() { 1.0 } else { 0.0 };
    if let (true, Some(adapter)) = (rp > 0, adapter) {
        let (a, b) = (rows_of_a(plan, adapter, workspace)?, plan.columns(adapter, workspace)?);
        let mut s = workspace.matrix(x.rows(), rp)?;
        shrink_into(&plan.without_outputs(), x, a.view().cuda(op)?, adapter, s.view_mut().cuda(op)?, workspace)?;
        let (left, right) = (s.view().cuda(op)?, b.view().cuda(op)?);
        gpu.blas().matmul(op, Kind::Nt, left, right, residual, y.reborrow(), 1.0, beta)?;
        (addend, beta) = (None, 1.0);
        shrunk = Shrunk::new(vec![Some(s)]);
    }
    let rounded = Fp8::of_rows(x)?;
    for piece in pieces(group) {
        with_weights(plan, group, &piece, Side::Forward, workspace, |weights| {
            let addend = addend.map(|addend| addend.slice_cols(piece.clone()));
            let y = y.reborrow().slice_cols(piece.clone());
            gpu.blas().matmul_fp8(op, rounded.view(), weights.view(), addend, y, beta)
        })?;
    }
    add_biases(op, group, y)?;
    Ok(shrunk)
}

pub(super) fn backward_input(
    plan: &Plan,
    group: &Group,
    dy: CudaView,
    s: Option<&Shrunk>,
    adapter: &AdapterPass,
    dx: Option<CudaViewMut>,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let Plan { op, rp, .. } = *plan;
    let gpu = dy.gpu();
    let mut shrunk = Shrunk::default();
    if rp > 0 {
        let b = plan.columns(adapter, workspace)?;
        let mut ds = workspace.matrix(dy.rows(), rp)?;
        let (b, target) = (b.view().cuda(op)?, ds.view_mut().cuda(op)?);
        let db = match s.and_then(|s| s.part(0)) {
            Some(s) => factors_in_one_pass(op, dy, b, s, target, workspace)?,
            None => None,
        };
        if db.is_none() {
            gpu.matmul(op, Kind::Nn, dy, b, ds.view_mut().cuda(op)?, 1.0, 0.0)?;
        }
        shrunk = Shrunk { parts: vec![Some(ds)], db };
    }
    let Some(mut dx) = dx else { return Ok(shrunk) };
    let a = match rp {
        0 => None,
        _ => Some(rows_of_a(plan, adapter, workspace)?),
    };
    let mut beta = 0.0;
    if let (Some(a), Some(ds), false) = (&a, shrunk.part(0), adapter.drops()) {
        gpu.matmul(op, Kind::Nn, ds.view().cuda(op)?, a.view().cuda(op)?, dx.reborrow(), 1.0, 0.0)?;
        beta = 1.0;
    }
    for piece in pieces(group) {
        let rounded = Fp8::of_rows(dy.slice_cols(piece.clone()))?;
        with_weights(plan, group, &piece, Side::Backward, workspace, |weights| {
            gpu.blas().matmul_fp8(op, rounded.view(), weights.view(), None, dx.reborrow(), beta)
        })?;
        beta = 1.0;
    }
    if let (Some(a), Some(ds), true) = (&a, shrunk.part(0), adapter.drops()) {
        add_adapters_part(plan, ds.view().cuda(op)?, a.view().cuda(op)?, adapter, dx, workspace)?;
    }
    Ok(shrunk)
}
