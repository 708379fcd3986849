//! [`crate::ops::linear_group`] on CUDA: augmented K, as described there.

use std::sync::PoisonError;

use super::blas::Kind;
use super::ffi;
use super::gpu::Gpu;
use super::int8_activations;
use super::ops::add_bias;
use super::view::{CudaView, CudaViewMut, one_gpu};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::ops::dropout;
use crate::ops::linear_group::{AdapterPass, Group, LoraSlot, Member, Shrunk, margin};
use crate::view::{View, ViewMut};
use crate::weight::{FrozenWeight, WeightCache};

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
    if group.split && group.members.len() > 1 {
        return forward_split(op, group, x, adapter, residual, y, workspace);
    }
    let plan = Plan::new(op, group, adapter.is_some());
    let Plan { n, rp, .. } = plan;
    let (mut x, mut y) = (x.cuda(op)?, y.cuda(op)?);
    let gpu = y.gpu();
    let residual = residual.map(|residual| residual.cuda(op)).transpose()?;
    let values = adapter.and_then(|adapter| adapter.values.gpu());
    check_gpu(op, group, gpu, [Some(x.gpu()), residual.map(|residual| residual.gpu()), values])?;
    let beta = if residual.is_some() { 1.0 } else { 0.0 };
    let mut shrunk = Shrunk::default();
    let rounds = group.members.iter().any(|member| member.weight.int8_activations().is_some());
    if let (true, false, Some(adapter)) = (gpu.peft_rounding() && rp > 0, rounds, adapter) {
        let s = forward_rounded(&plan, group, x.as_view(), adapter, residual, y.reborrow(), workspace)?;
        add_biases(op, group, y)?;
        return Ok(s);
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

/// One member after the other.
fn forward_split(
    op: &'static str,
    group: &Group,
    mut x: ViewMut,
    adapter: Option<&AdapterPass>,
    residual: Option<View>,
    mut y: ViewMut,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let mut shrunk = Shrunk::default();
    for (member, columns) in parts(group) {
        let residual = residual.map(|residual| residual.slice_cols(columns.clone()));
        let y = y.reborrow().slice_cols(columns);
        let one = Group { members: std::slice::from_ref(member), cache: &WeightCache::default(), split: false };
        let mut s = forward(op, &one, x.reborrow(), adapter, residual, y, workspace)?;
        shrunk.parts.push(s.parts.pop().flatten());
    }
    Ok(shrunk)
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

pub(crate) fn shrink(
    op: &'static str,
    group: &Group,
    x: View,
    adapter: &AdapterPass,
    workspace: &Workspace,
) -> Result<Shrunk> {
    if group.split && group.members.len() > 1 {
        let mut shrunk = Shrunk::default();
        for member in group.members {
            let one = Group { members: std::slice::from_ref(member), cache: &WeightCache::default(), split: false };
            shrunk.parts.push(shrink(op, &one, x, adapter, workspace)?.parts.pop().flatten());
        }
        return Ok(shrunk);
    }
    let plan = Plan::new(op, group, true);
    let Plan { k, rp, .. } = plan;
    if rp == 0 {
        return Ok(Shrunk::default());
    }
    let x = x.cuda(op)?;
    one_gpu(op, x.gpu(), adapter.values.gpu())?;
    // The A rows alone: an augmented weight of a layer without outputs.
    let mut a = workspace.with_margin(rp, k, rp)?;
    let mut only_a = Plan { n: 0, ..plan };
    for member in &mut only_a.members.m {
        (member.row0, member.rows) = (0, 0);
    }
    only_a.write_factors(adapter, a.view_mut().cuda(op)?)?;
    let mut s = workspace.matrix(x.rows(), rp)?;
    shrink_into(&only_a, x, a.view().cuda(op)?, adapter, s.view_mut().cuda(op)?, workspace)?;
    Ok(Shrunk::new(vec![Some(s)]))
}

pub(crate) fn backward_input(
    op: &'static str,
    group: &Group,
    dy: ViewMut,
    s: Option<&Shrunk>,
    adapter: &AdapterPass,
    dx: Option<ViewMut>,
    workspace: &Workspace,
) -> Result<Shrunk> {
    if group.split && group.members.len() > 1 {
        return backward_input_split(op, group, dy, adapter, dx, workspace);
    }
    let plan = Plan::new(op, group, true);
    let Plan { n, rp, .. } = plan;
    let mut dy = dy.cuda(op)?;
    let gpu = dy.gpu();
    let dx = dx.map(|dx| dx.cuda(op)).transpose()?;
    check_gpu(op, group, gpu, [dx.as_ref().map(|dx| dx.gpu()), adapter.values.gpu()])?;
    if rp == 0 {
        let Some(dx) = dx else { return Ok(Shrunk::default()) };
        if let (1, Some(plain)) = (group.members.len(), group.members[0].weight.as_cuda().and_then(|w| w.plain_view()))
        {
            gpu.matmul(op, Kind::Nn, dy.as_view(), plain, dx, 1.0, 0.0)?;
        } else {
            let fused = weights(&plan, group, None, workspace)?;
            let w = fused.view().cuda(op)?.slice_rows(0..n);
            gpu.matmul(op, Kind::Nn, dy.as_view(), w, dx, 1.0, 0.0)?;
            put_back(group, fused);
        }
        return Ok(Shrunk::default());
    }
    let fused = weights(&plan, group, Some(adapter), workspace)?;
    let mut ds = workspace.matrix(dy.rows(), rp)?;
    let mut db = None;
    {
        let w = fused.view().cuda(op)?;
        let b = w.slice_rows(0..n).margin(rp);
        let dropped = adapter.drops();
        let augmented = dy.margin_width() >= rp && !dropped;
        if augmented {
            let (columns, mut target) = dy.split_margin(rp);
            let s = s.and_then(|s| s.part(0));
            db = match s {
                Some(s) => factors_in_one_pass(op, columns, b, s, target.reborrow(), workspace)?,
                None => None,
            };
            if db.is_none() {
                gpu.matmul(op, Kind::Nn, columns, b, target, 1.0, 0.0)?;
            }
            super::ops::cast(dy.as_view().margin(rp), ds.view_mut().cuda(op)?)?;
        } else {
            gpu.matmul(op, Kind::Nn, dy.as_view(), b, ds.view_mut().cuda(op)?, 1.0, 0.0)?;
        }
        if let Some(mut dx) = dx {
            if augmented {
                let dy = dy.as_view().with_margin(rp);
                gpu.matmul(op, Kind::Nn, dy, w.slice_rows(0..n + rp), dx, 1.0, 0.0)?;
            } else {
                gpu.matmul(op, Kind::Nn, dy.as_view(), w.slice_rows(0..n), dx.reborrow(), 1.0, 0.0)?;
                let a = w.slice_rows(n..n + rp);
                if dropped {
                    let mut part = workspace.matrix(dx.rows(), dx.cols())?;
                    for (slot, _, r0) in &plan.adapted {
                        let columns = *r0..r0 + slot.rank;
                        let ds = ds.view().cuda(op)?.slice_cols(columns.clone());
                        gpu.matmul(op, Kind::Nn, ds, a.slice_rows(columns), part.view_mut().cuda(op)?, 1.0, 0.0)?;
                        let mask = adapter.dropout_of(slot).expect("the probability is positive");
                        dropout::backward(&mask, part.view(), dx.reborrow().into())?;
                    }
                } else {
                    gpu.matmul(op, Kind::Nn, ds.view().cuda(op)?, a, dx, 1.0, 1.0)?;
                }
            }
        }
    }
    put_back(group, fused);
    Ok(Shrunk { parts: vec![Some(ds)], db })
}

/// `dS = dy B`, written, and `dB = dy^T S`, returned, from one pass over `dy`: where the kernel takes the sizes and beats
/// two matrix products (on an H100 up to 32 columns: 235 against 367 us for 8192 x 28672).
fn factors_in_one_pass(
    op: &'static str,
    dy: CudaView,
    b: CudaView,
    s: &Matrix,
    ds: CudaViewMut,
    workspace: &Workspace,
) -> Result<Option<Matrix>> {
    const MOST_COLUMNS: usize = 32;
    let (tokens, n, rp) = (dy.rows(), dy.cols(), ds.cols());
    let s = s.view().cuda(op)?;
    let aligned = |v: CudaView| v.ptr().is_multiple_of(16) && v.stride().is_multiple_of(8);
    let fits = rp.is_multiple_of(16) && rp <= MOST_COLUMNS && n.is_multiple_of(8) && dy.dtype() != Dtype::F32;
    if !fits || !aligned(dy) || !aligned(s) || !aligned(b) || tokens == 0 {
        return Ok(None);
    }
    // SAFETY: a pure function of its arguments.
    let floats = unsafe { ffi::qlora_lora_ds_db_workspace(tokens as i64, n as i64, rp as i64) };
    if floats <= 0 {
        return Ok(None);
    }
    let mut db = workspace.matrix_f32(n, rp)?;
    let gpu = ds.gpu();
    let scratch = gpu.alloc(op, 4 * floats as usize)?;
    let target = db.view_mut().cuda(op)?;
    // SAFETY: all windows are live and have the sizes passed; the scratch memory has the size asked for.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_lora_ds_db(
            dy.dtype().code(),
            dy.ptr() as *const _,
            dy.ld(),
            b.ptr() as *const _,
            b.ld(),
            s.ptr() as *const _,
            s.ld(),
            ds.ptr() as *mut _,
            ds.ld(),
            target.ptr() as *mut f32,
            scratch.ptr() as *mut f32,
            tokens as i64,
            n as i64,
            rp as i64,
            stream,
        )
    })?;
    Ok(Some(db))
}

fn backward_input_split(
    op: &'static str,
    group: &Group,
    mut dy: ViewMut,
    adapter: &AdapterPass,
    mut dx: Option<ViewMut>,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let mut shrunk = Shrunk::default();
    for (index, (member, columns)) in parts(group).enumerate() {
        let dy = dy.reborrow().slice_cols(columns);
        let one = Group { members: std::slice::from_ref(member), cache: &WeightCache::default(), split: false };
        let mut ds = match (&mut dx, index) {
            (None, _) => backward_input(op, &one, dy, None, adapter, None, workspace)?,
            (Some(dx), 0) => backward_input(op, &one, dy, None, adapter, Some(dx.reborrow()), workspace)?,
            (Some(dx), _) => {
                let mut part = workspace.matrix(dx.rows(), dx.cols())?;
                let ds = backward_input(op, &one, dy, None, adapter, Some(part.view_mut()), workspace)?;
                super::ops::add(op, part.view().cuda(op)?, dx.reborrow().cuda(op)?)?;
                ds
            }
        };
        shrunk.parts.push(ds.parts.pop().flatten());
    }
    Ok(shrunk)
}

pub(crate) fn backward_adapter(
    op: &'static str,
    group: &Group,
    x: View,
    s: &Shrunk,
    dy: View,
    ds: &Shrunk,
    adapter: &AdapterPass,
    gradient: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    if group.split && group.members.len() > 1 {
        let mut gradient = gradient;
        for (index, (member, columns)) in parts(group).enumerate().filter(|(_, (member, _))| member.lora.is_some()) {
            let one = Group { members: std::slice::from_ref(member), cache: &WeightCache::default(), split: false };
            let (s, ds) = (s.part(index), ds.part(index));
            let dy = dy.slice_cols(columns);
            adapter_gradient(op, &one, x, s, dy, (ds, None), adapter, gradient.reborrow(), workspace)?;
        }
        return Ok(());
    }
    adapter_gradient(op, group, x, s.part(0), dy, (ds.part(0), ds.db.as_ref()), adapter, gradient, workspace)
}

fn adapter_gradient(
    op: &'static str,
    group: &Group,
    x: View,
    s: Option<&Matrix>,
    dy: View,
    (ds, db): (Option<&Matrix>, Option<&Matrix>),
    adapter: &AdapterPass,
    gradient: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    let plan = Plan::new(op, group, true);
    let Plan { n, k, rp, .. } = plan;
    let (x, dy, gradient) = (x.cuda(op)?, dy.cuda(op)?, gradient.cuda(op)?);
    let gpu = dy.gpu();
    one_gpu(op, gpu, [x.gpu(), gradient.gpu()])?;
    let (Some(s), Some(ds)) = (s, ds) else {
        return Err(Error::invalid(op, "a backward without its forward's S"));
    };
    let mut da = workspace.matrix_f32(rp, k)?;
    let made: Matrix;
    let db = match db {
        Some(db) => db,
        None => {
            let mut product = workspace.matrix_f32(n, rp)?;
            gpu.matmul(op, Kind::Tn, dy, s.view().cuda(op)?, product.view_mut().cuda(op)?, 1.0, 0.0)?;
            made = product;
            &made
        }
    };
    if !adapter.drops() {
        gpu.matmul(op, Kind::Tn, ds.view().cuda(op)?, x, da.view_mut().cuda(op)?, 1.0, 0.0)?;
    } else {
        let mut dropped = workspace.matrix(x.rows(), x.cols())?;
        for (slot, _, r0) in &plan.adapted {
            let mask = adapter.dropout_of(slot).expect("the probability is positive");
            dropout::forward(&mask, x.into(), dropped.view_mut())?;
            let columns = *r0..r0 + slot.rank;
            let ds = ds.view().cuda(op)?.slice_cols(columns.clone());
            let da = da.view_mut().cuda(op)?.slice_rows(columns);
            gpu.matmul(op, Kind::Tn, ds, dropped.view().cuda(op)?, da, 1.0, 0.0)?;
        }
    }
    let flat = plan.flat(gradient.as_view())?.cast_mut();
    let (da, db) = (da.view().cuda(op)?, db.view().cuda(op)?);
    debug_assert_eq!((da.dtype(), db.dtype()), (Dtype::F32, Dtype::F32));
    // SAFETY: da and db have no gaps; the slots lie in the gradient.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_lora_accumulate(
            da.ptr() as *const _,
            db.ptr() as *const _,
            plan.members,
            flat,
            n as i64,
            k as i64,
            rp as i64,
            stream,
        )
    })
}
