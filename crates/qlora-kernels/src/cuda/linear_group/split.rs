//! A group whose weights are dequantized one member at a time into the same memory.
//!
//! Only the products with the frozen weights are made member by member. The adapters' part is made for the whole group
//! at once, as where the weights are there together: one `S = x A^T`, one `dS` and `dB`, one `dA`; the members' parts
//! of `dx` are summed by the products themselves (beta = 1), and the last one brings `dS A` along.

use std::ops::Range;

use super::backward::{add_adapters_part, shrink_gradient};
use super::{Plan, add_biases, dequantize, parts, shrink_into};
use crate::cuda::blas::Kind;
use crate::cuda::view::{CudaView, CudaViewMut};
use crate::cuda::{graph, int8_activations};
use crate::error::Result;
use crate::matrix::{Matrix, Workspace};
use crate::ops::linear_group::{AdapterPass, Group, Member, Shrunk};
use crate::weight::WeightCache;

/// Memory for the weight of any one member, with its extra columns and rows.
fn scratch(plan: &Plan, group: &Group, workspace: &Workspace) -> Result<Matrix> {
    // As for weights that are kept: nothing here can be recorded.
    graph::refuse(plan.op)?;
    let largest = group.members.iter().map(|member| member.weight.rows()).max().unwrap_or(0);
    workspace.with_margin(largest + plan.rp, plan.k, plan.rp)
}

/// Fills the memory with the weight of the member whose rows of the fused weight are `rows`; with an adapter also its B and
/// all members' A.
fn load(
    plan: &Plan,
    member: &Member,
    rows: &Range<usize>,
    adapter: Option<&AdapterPass>,
    memory: &mut Matrix,
) -> Result<()> {
    dequantize(plan.op, member.weight, memory.view_mut().cuda(plan.op)?.slice_rows(0..rows.len()))?;
    match adapter {
        Some(adapter) if plan.rp > 0 => plan.of_member(rows).write_factors(adapter, memory.view_mut().cuda(plan.op)?),
        _ => Ok(()),
    }
}

pub(super) fn forward(
    plan: &Plan,
    group: &Group,
    mut x: CudaViewMut,
    adapter: Option<&AdapterPass>,
    residual: Option<CudaView>,
    mut y: CudaViewMut,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let Plan { op, rp, .. } = *plan;
    let gpu = y.gpu();
    let mut memory = scratch(plan, group, workspace)?;
    let mut s: Option<Matrix> = None;
    let augmented = x.margin_width() >= rp;
    for (member, columns) in parts(group) {
        load(plan, member, &columns, adapter, &mut memory)?;
        let rows = columns.len();
        let all = memory.view().cuda(op)?;
        if let (None, true, Some(adapter)) = (&s, rp > 0, adapter) {
            let plan = plan.of_member(&columns);
            let mut made = workspace.matrix(x.rows(), rp)?;
            let target = made.view_mut().cuda(op)?;
            if augmented {
                let (columns, margin) = x.split_margin(rp);
                shrink_into(&plan, columns, all, adapter, margin, workspace)?;
                crate::cuda::ops::cast(x.as_view().margin(rp), target)?;
            } else {
                shrink_into(&plan, x.as_view(), all, adapter, target, workspace)?;
            }
            s = Some(made);
        }
        let w = all.slice_rows(0..rows);
        let one = Group { members: std::slice::from_ref(member), cache: &WeightCache::default(), split: false };
        let rounded = int8_activations::inputs(&one, x.as_view(), s.as_ref(), rp, workspace)?.pop();
        let rounded = rounded.and_then(|(_, rounded)| rounded);
        let mut y = y.reborrow().slice_cols(columns.clone());
        let residual = residual.map(|residual| residual.slice_cols(columns));
        // Adds the adapters' part to a product that does not include it.
        let add_adapters = |y| match &s {
            Some(s) => gpu.matmul(op, Kind::Nt, s.view().cuda(op)?, w.margin(rp), y, 1.0, 1.0),
            None => Ok(()),
        };
        if rounded.is_none() && gpu.peft_rounding() && rp > 0 {
            gpu.matmul(op, Kind::Nt, x.as_view(), w, y.reborrow(), 1.0, 0.0)?;
            // The bias is the base layer's.
            add_biases(op, &one, y.reborrow())?;
            add_adapters(y.reborrow())?;
            if let Some(residual) = residual {
                crate::cuda::ops::add(op, residual, y)?;
            }
            continue;
        }
        let beta = if residual.is_some() { 1.0 } else { 0.0 };
        let input = match &rounded {
            Some(rounded) => rounded.view().cuda(op)?.with_margin(rp),
            None if augmented => x.as_view().with_margin(rp),
            None => x.as_view(),
        };
        let weight = if input.cols() > plan.k { w.with_margin(rp) } else { w };
        gpu.blas().matmul(op, Kind::Nt, input, weight, residual, y.reborrow(), 1.0, beta)?;
        if input.cols() == plan.k {
            add_adapters(y.reborrow())?;
        }
        add_biases(op, &one, y)?;
    }
    Ok(s.map_or_else(Shrunk::default, |s| Shrunk::new(vec![Some(s)])))
}

pub(super) fn backward_input(
    plan: &Plan,
    group: &Group,
    mut dy: CudaViewMut,
    s: Option<&Shrunk>,
    adapter: &AdapterPass,
    dx: Option<CudaViewMut>,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let Plan { op, rp, .. } = *plan;
    let gpu = dy.gpu();
    let augmented = rp > 0 && dy.margin_width() >= rp && !adapter.drops();
    let mut made = None;
    if rp > 0 {
        let b = plan.columns(adapter, workspace)?;
        let s = s.and_then(|s| s.part(0));
        made = Some(shrink_gradient(plan, &mut dy, b.view().cuda(op)?, s, augmented, workspace)?);
    }
    if let Some(mut dx) = dx {
        let mut memory = scratch(plan, group, workspace)?;
        let last = group.members.len() - 1;
        for (index, (member, columns)) in parts(group).enumerate() {
            let adapter = Some(adapter).filter(|_| index == last);
            load(plan, member, &columns, adapter, &mut memory)?;
            let w = memory.view().cuda(op)?;
            let beta = if index == 0 { 0.0 } else { 1.0 };
            let (dy, rows) = match index == last && augmented {
                true => (dy.as_view().with_margin(rp).slice_cols(columns.start..columns.end + rp), columns.len() + rp),
                false => (dy.as_view().slice_cols(columns.clone()), columns.len()),
            };
            gpu.matmul(op, Kind::Nn, dy, w.slice_rows(0..rows), dx.reborrow(), 1.0, beta)?;
            if let (true, false, Some(adapter), Some((ds, _))) = (index == last, augmented, adapter, &made) {
                let a = w.slice_rows(columns.len()..columns.len() + rp);
                add_adapters_part(plan, ds.view().cuda(op)?, a, adapter, dx.reborrow(), workspace)?;
            }
        }
    }
    Ok(match made {
        Some((ds, db)) => Shrunk { parts: vec![Some(ds)], db },
        None => Shrunk::default(),
    })
}
