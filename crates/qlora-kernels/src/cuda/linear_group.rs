//! [`crate::ops::linear_group`] on CUDA: augmented K, as described there.

mod backward;
mod fp8;
mod split;

use std::sync::PoisonError;

use super::blas::Kind;
use super::ffi;
use super::gpu::Gpu;
use super::graph;
use super::int8_activations;
use super::ops::add_bias;
use super::view::{CudaView, CudaViewMut, one_gpu};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::ops::dropout;
use crate::ops::linear_group::{AdapterPass, Group, LoraSlot, Member, Shrunk, margin};
use crate::view::{View, ViewMut};
use crate::weight::FrozenWeight;

pub(crate) use backward::{backward_adapter, backward_input};
pub(crate) use fp8::Fp8Weights;
pub(super) use fp8::keeps_fp8;

/// Sizes of a group and the places of its adapters.
struct Plan<'a> {
    op: &'static str,
    n: usize,
    k: usize,
    /// The extra columns and rows: the ranks' sum, rounded up.
    rp: usize,
    members: ffi::Members,
    /// Per adapted member: its slot, its rows of the fused weight, its first extra column.
    adapted: Vec<(&'a LoraSlot, std::ops::Range<usize>, usize)>,
}

impl<'a> Plan<'a> {
    fn new(op: &'static str, group: &Group<'a>, adapter: bool) -> Self {
        let slots = || group.members.iter().map(|member| member.lora.filter(|_| adapter));
        let mut plan = Self {
            op,
            n: group.outputs(),
            k: group.inputs(),
            rp: margin(slots()),
            members: ffi::Members::default(),
            adapted: Vec::new(),
        };
        let (mut row0, mut r0) = (0, 0);
        for (member, slot) in group.members.iter().zip(slots()) {
            let rows = member.weight.rows();
            if let Some(slot) = slot {
                plan.members.m[plan.adapted.len()] = ffi::Member {
                    a: slot.a.start as i64,
                    b: slot.b.start as i64,
                    row0: row0 as i64,
                    rows: rows as i64,
                    rank: slot.rank as i32,
                    r0: r0 as i32,
                    scale: slot.scale,
                    pad: 0,
                };
                plan.adapted.push((slot, row0..row0 + rows, r0));
                r0 += slot.rank;
            }
            row0 += rows;
        }
        plan.members.count = plan.adapted.len() as i32;
        plan
    }

    /// Checks that the slots lie in the flat buffer and have the layers' sizes, and gives its address.
    fn flat(&self, values: CudaView) -> Result<*const f32> {
        let len = values.rows() * values.cols();
        for (slot, rows, _) in &self.adapted {
            Error::check_shape(self.op, "A", &[slot.a.len()], &[slot.rank * self.k])?;
            Error::check_shape(self.op, "B", &[slot.b.len()], &[slot.rank * rows.len()])?;
            if slot.a.end.max(slot.b.end) > len {
                return Err(Error::invalid(self.op, format!("an adapter lies beyond the buffer of {len} elements")));
            }
        }
        super::ops::vector(self.op, "the adapter", values, len)
    }

    /// The plan of one member alone, with the extra columns of all: `rows` are its rows of the fused weight.
    fn of_member(&self, rows: &std::ops::Range<usize>) -> Self {
        let mut members = self.members;
        for member in &mut members.m[..members.count as usize] {
            let here = member.row0 == rows.start as i64;
            (member.row0, member.rows) = (0, if here { member.rows } else { 0 });
        }
        Self { n: rows.len(), members, adapted: self.adapted.clone(), ..*self }
    }

    /// The plan of a layer without outputs: of the A rows alone.
    fn without_outputs(&self) -> Self {
        let mut members = self.members;
        for member in &mut members.m {
            (member.row0, member.rows) = (0, 0);
        }
        Self { n: 0, members, adapted: self.adapted.clone(), ..*self }
    }

    /// `s B` of all members, `[n, rp]`, block diagonal.
    fn columns(&self, adapter: &AdapterPass, workspace: &Workspace) -> Result<Matrix> {
        let flat = self.flat(adapter.values.cuda(self.op)?)?;
        let mut columns = workspace.matrix(self.n, self.rp)?;
        let target = columns.view_mut().cuda(self.op)?;
        // SAFETY: the target has n rows of rp columns; the slots lie in the flat buffer.
        target.gpu().launch(self.op, |stream| unsafe {
            ffi::qlora_lora_columns(
                target.dtype().code(),
                flat,
                self.members,
                target.ptr() as *mut _,
                target.ld(),
                self.n as i64,
                self.rp as i64,
                stream,
            )
        })?;
        Ok(columns)
    }

    /// Writes `s B` into the extra columns and A into the extra rows of the fused weight.
    fn write_factors(&self, adapter: &AdapterPass, target: CudaViewMut) -> Result<()> {
        let flat = self.flat(adapter.values.cuda(self.op)?)?;
        debug_assert!(target.rows() >= self.n + self.rp && target.margin_width() >= self.rp);
        // SAFETY: the target has n + rp rows of k + rp columns; the slots lie in the flat buffer.
        target.gpu().launch(self.op, |stream| unsafe {
            ffi::qlora_lora_prepare(
                target.dtype().code(),
                flat,
                self.members,
                target.ptr() as *mut _,
                target.ld(),
                self.n as i64,
                self.k as i64,
                self.rp as i64,
                stream,
            )
        })
    }
}

/// The fused weight `[n, k]` with its extra columns (the margin) and rows.
fn weights(plan: &Plan, group: &Group, adapter: Option<&AdapterPass>, workspace: &Workspace) -> Result<Matrix> {
    let Plan { op, n, k, rp, .. } = *plan;
    let mut kept = group.cache.weights.lock().unwrap_or_else(PoisonError::into_inner);
    // The cache is filled with room for the adapters, which may come later than the first use.
    let usable = |matrix: &Matrix| matrix.rows() >= n + rp && matrix.margin() >= rp;
    let mut fused = match kept.take().filter(usable) {
        Some(fused) => fused,
        None => {
            // Weights that are not written yet must not get into the cache.
            graph::refuse(op)?;
            let mut fused = workspace.with_margin(n + rp, k, rp)?;
            let mut row = 0;
            for member in group.members {
                let rows = row..row + member.weight.rows();
                row = rows.end;
                let target = fused.view_mut().cuda(op)?.slice_rows(rows);
                dequantize(op, member.weight, target)?;
            }
            fused
        }
    };
    if let (true, Some(adapter)) = (rp > 0, adapter) {
        plan.write_factors(adapter, fused.view_mut().cuda(op)?)?;
    }
    Ok(fused)
}

/// Gives the fused weight back to the cache, if it may keep it.
fn put_back(group: &Group, fused: Matrix) {
    if group.cache.enabled() {
        *group.cache.weights.lock().unwrap_or_else(PoisonError::into_inner) = Some(fused);
    }
}

pub(super) fn dequantize(op: &'static str, weight: &dyn FrozenWeight, target: CudaViewMut) -> Result<()> {
    match weight.as_cuda() {
        Some(weight) => weight.dequantize_into(0, target),
        None => Err(Error::invalid(op, "the weight is on the CPU, the activations are on the GPU")),
    }
}

pub(crate) fn forward(
    op: &'static str,
    group: &Group,
    x: ViewMut,
    adapter: Option<&AdapterPass>,
    residual: Option<View>,
    y: ViewMut,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let plan = Plan::new(op, group, adapter.is_some());
    let Plan { n, rp, .. } = plan;
    let (mut x, mut y) = (x.cuda(op)?, y.cuda(op)?);
    let gpu = y.gpu();
    let residual = residual.map(|residual| residual.cuda(op)).transpose()?;
    let values = adapter.and_then(|adapter| adapter.values.gpu());
    check_gpu(op, group, gpu, [Some(x.gpu()), residual.map(|residual| residual.gpu()), values])?;
    if fp8::takes(group) && !gpu.peft_rounding() {
        return fp8::forward(&plan, group, x.as_view(), adapter, residual, y, workspace);
    }
    if group.split && group.members.len() > 1 {
        return split::forward(&plan, group, x, adapter, residual, y, workspace);
    }
    let beta = if residual.is_some() { 1.0 } else { 0.0 };
    let mut shrunk = Shrunk::default();
    let rounds = group.members.iter().any(|member| member.weight.int8_activations().is_some());
    if let (true, false, Some(adapter)) = (gpu.peft_rounding() && rp > 0, rounds, adapter) {
        return forward_rounded(&plan, group, x.as_view(), adapter, residual, y, workspace);
    }
    let single = group.members.len() == 1 && rp == 0;
    if let Some(plain) = group.members[0].weight.as_cuda().and_then(|w| w.plain_view()).filter(|_| single) {
        // Nothing to dequantize and nothing to add: the weight is used where it lies.
        gpu.blas().matmul(op, Kind::Nt, x.as_view(), plain, residual, y.reborrow(), 1.0, beta)?;
    } else {
        let fused = weights(&plan, group, adapter, workspace)?;
        {
            let w = fused.view().cuda(op)?;
            if rp == 0 {
                for (part, rounded) in int8_activations::inputs(group, x.as_view(), None, rp, workspace)? {
                    let input = match &rounded {
                        Some(rounded) => rounded.view().cuda(op)?,
                        None => x.as_view(),
                    };
                    let (residual, w) = (residual.map(|all| all.slice_cols(part.clone())), w.slice_rows(part.clone()));
                    let y = y.reborrow().slice_cols(part);
                    gpu.blas().matmul(op, Kind::Nt, input, w, residual, y, 1.0, beta)?;
                }
            } else {
                let adapter = adapter.expect("ranks are counted with an adapter only");
                let mut s = workspace.matrix(x.rows(), rp)?;
                if x.margin_width() >= rp && !rounds {
                    let (columns, target) = x.split_margin(rp);
                    shrink_into(&plan, columns, w, adapter, target, workspace)?;
                    super::ops::cast(x.as_view().margin(rp), s.view_mut().cuda(op)?)?;
                    let (x, w) = (x.as_view().with_margin(rp), w.slice_rows(0..n).with_margin(rp));
                    gpu.blas().matmul(op, Kind::Nt, x, w, residual, y.reborrow(), 1.0, beta)?;
                } else {
                    // The adapters read x as it is.
                    shrink_into(&plan, x.as_view(), w, adapter, s.view_mut().cuda(op)?, workspace)?;
                    for (part, rounded) in int8_activations::inputs(group, x.as_view(), Some(&s), rp, workspace)? {
                        let (residual, w) =
                            (residual.map(|all| all.slice_cols(part.clone())), w.slice_rows(part.clone()));
                        let mut y = y.reborrow().slice_cols(part);
                        match &rounded {
                            Some(rounded) => {
                                let (x, w) = (rounded.view().cuda(op)?.with_margin(rp), w.with_margin(rp));
                                gpu.blas().matmul(op, Kind::Nt, x, w, residual, y, 1.0, beta)?;
                            }
                            None => {
                                gpu.blas().matmul(op, Kind::Nt, x.as_view(), w, residual, y.reborrow(), 1.0, beta)?;
                                gpu.matmul(op, Kind::Nt, s.view().cuda(op)?, w.margin(rp), y, 1.0, 1.0)?;
                            }
                        }
                    }
                }
                shrunk = Shrunk::new(vec![Some(s)]);
            }
        }
        put_back(group, fused);
    }
    add_biases(op, group, y)?;
    Ok(shrunk)
}

/// With PEFT's roundings ([`Gpu::set_peft_rounding`]): the base's product is rounded before the adapter's is added, and their
/// sum before the residual is.
fn forward_rounded(
    plan: &Plan,
    group: &Group,
    x: CudaView,
    adapter: &AdapterPass,
    residual: Option<CudaView>,
    mut y: CudaViewMut,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let Plan { op, n, rp, .. } = *plan;
    let gpu = y.gpu();
    let fused = weights(plan, group, Some(adapter), workspace)?;
    let w = fused.view().cuda(op)?;
    let mut s = workspace.matrix(x.rows(), rp)?;
    shrink_into(plan, x, w, adapter, s.view_mut().cuda(op)?, workspace)?;
    let w = w.slice_rows(0..n);
    gpu.matmul(op, Kind::Nt, x, w, y.reborrow(), 1.0, 0.0)?;
    // The bias is the base layer's.
    add_biases(op, group, y.reborrow())?;
    gpu.matmul(op, Kind::Nt, s.view().cuda(op)?, w.margin(rp), y.reborrow(), 1.0, 1.0)?;
    if let Some(residual) = residual {
        super::ops::add(op, residual, y)?;
    }
    put_back(group, fused);
    Ok(Shrunk::new(vec![Some(s)]))
}

/// An error unless a group's weights and biases are where its activations are.
pub(super) fn check_gpu<'a>(
    op: &'static str,
    group: &Group<'a>,
    gpu: &Gpu,
    others: impl IntoIterator<Item = Option<&'a Gpu>>,
) -> Result<()> {
    let weights = group.members.iter().filter_map(|member| member.weight.as_cuda()).map(|weight| &**weight.gpu());
    let biases = group.members.iter().filter_map(|member| member.bias.and_then(|bias| bias.gpu()));
    one_gpu(op, gpu, weights.chain(biases))?;
    one_gpu(op, gpu, others.into_iter().flatten())
}

/// The members and their columns of the group's output.
pub(super) fn parts<'a>(group: &Group<'a>) -> impl Iterator<Item = (&'a Member<'a>, std::ops::Range<usize>)> {
    group.members.iter().scan(0, |start, member| {
        let columns = *start..*start + member.weight.rows();
        *start = columns.end;
        Some((member, columns))
    })
}

/// Adds the members' biases to their columns of the group's output.
pub(super) fn add_biases(op: &'static str, group: &Group, mut y: CudaViewMut) -> Result<()> {
    for (member, columns) in parts(group) {
        if let Some(bias) = member.bias {
            add_bias(op, y.reborrow().slice_cols(columns), bias.cuda(op)?)?;
        }
    }
    Ok(())
}

/// `S = drop(x) A^T` of all members side by side, `[tokens, rp]`.
fn shrink_into(
    plan: &Plan,
    x: CudaView,
    w: CudaView,
    adapter: &AdapterPass,
    mut s: CudaViewMut,
    workspace: &Workspace,
) -> Result<()> {
    let Plan { op, n, rp, .. } = *plan;
    let a = w.slice_rows(n..n + rp);
    let gpu = s.gpu();
    if !adapter.drops() {
        return gpu.matmul(op, Kind::Nt, x, a, s, 1.0, 0.0);
    }
    super::ops::fill(s.reborrow(), 0.0)?;
    let mut dropped = workspace.matrix(x.rows(), x.cols())?;
    for (slot, _, r0) in &plan.adapted {
        let mask = adapter.dropout_of(slot).expect("the probability is positive");
        dropout::forward(&mask, x.into(), dropped.view_mut())?;
        let columns = *r0..r0 + slot.rank;
        let (a, s) = (a.slice_rows(columns.clone()), s.reborrow().slice_cols(columns));
        gpu.matmul(op, Kind::Nt, dropped.view().cuda(op)?, a, s, 1.0, 0.0)?;
    }
    Ok(())
}

/// The A of all members, `[rp, k]`: an augmented weight of a layer without outputs.
fn rows_of_a(plan: &Plan, adapter: &AdapterPass, workspace: &Workspace) -> Result<Matrix> {
    let mut a = workspace.with_margin(plan.rp, plan.k, plan.rp)?;
    plan.without_outputs().write_factors(adapter, a.view_mut().cuda(plan.op)?)?;
    Ok(a)
}

pub(crate) fn shrink(
    op: &'static str,
    group: &Group,
    x: View,
    adapter: &AdapterPass,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let plan = Plan::new(op, group, true);
    let rp = plan.rp;
    if rp == 0 {
        return Ok(Shrunk::default());
    }
    let x = x.cuda(op)?;
    one_gpu(op, x.gpu(), adapter.values.gpu())?;
    let a = rows_of_a(&plan, adapter, workspace)?;
    let mut s = workspace.matrix(x.rows(), rp)?;
    shrink_into(&plan.without_outputs(), x, a.view().cuda(op)?, adapter, s.view_mut().cuda(op)?, workspace)?;
    Ok(Shrunk::new(vec![Some(s)]))
}
