//! [`crate::ops::adapter_rows`] on CUDA: the base's product of all rows between two launches for the adapters' parts of all
//! spans of rows (`kernels/adapter_rows.cu`). A weight that an adapter has itself is multiplied with that adapter's rows.

use std::ops::Range;

use super::blas::Kind;
use super::ffi;
use super::linear_group::check_gpu;
use super::ops::{cast, same_dtype, vector};
use super::view::{CudaView, one_gpu};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::ops::adapter_rows::{LinearChange, RowAdapter, is_plain_on_gpu};
use crate::ops::frozen_linear;
use crate::ops::linear_group::{Group, Member};
use crate::view::{View, ViewMut};
use crate::weight::WeightCache;

/// The spans of a launch.
const MOST_SPANS: usize = 16;

/// Up to so many rows, a span's `x A^T` is made with those of the others in one launch, in f32; above, by cuBLAS with A in the
/// activations' type.
const FEW_ROWS: usize = 64;

/// Some rows and their adapter; none are the base's.
type Span<'a, 'b> = (Range<usize>, Option<&'a RowAdapter<'b>>);

/// Writes `y`. `few`: [`Group::infer`] makes the base's product.
pub(crate) fn forward(
    op: &'static str,
    group: &Group,
    parts: &[&RowAdapter],
    mut x: ViewMut,
    residual: Option<View>,
    mut y: ViewMut,
    few: bool,
    workspace: &Workspace,
) -> Result<()> {
    let (rows, columns) = (x.rows(), columns(group));
    // An adapter of all rows brings its weights into the base's product.
    let whole = parts.iter().find(|part| part.rows == (0..rows)).copied();
    let mut members = Vec::with_capacity(group.members.len());
    for member in group.members {
        let own = whole.and_then(|part| part.change(member)).and_then(|change| change.weight.as_deref());
        members.push(Member { lora: None, weight: own.unwrap_or(member.weight), ..*member });
    }
    let replaced = |change: &LinearChange| change.weight.is_some();
    let any = |of: &dyn Fn(&LinearChange) -> bool| {
        let has = |part: &&RowAdapter| group.members.iter().any(|member| part.change(member).is_some_and(of));
        parts.iter().any(has)
    };
    let only_adds =
        !any(&|change| change.gain.is_some() || change.bias.is_some() || (whole.is_none() && replaced(change)));
    if !only_adds {
        members.iter_mut().for_each(|member| member.bias = None);
    }
    let launch = Launch::new(op, group, spans(parts, rows, only_adds), !only_adds, y.as_view(), few)?;
    // Before the base's product, whose kernel then reads its weights ahead while these launches run.
    let s = launch.shrink(x.as_view(), workspace)?;
    let kept = WeightCache::default();
    let cache = if whole.is_some() && any(&replaced) { &kept } else { group.cache };
    let base = Group { members: &members, cache, split: group.split };
    base_product(&base, few, x.reborrow(), residual.filter(|_| only_adds), y.reborrow(), workspace)?;
    if whole.is_none() {
        for part in parts {
            for (member, columns) in group.members.iter().zip(&columns) {
                let Some(weight) = part.change(member).and_then(|change| change.weight.as_deref()) else { continue };
                let x = x.as_view().slice_rows(part.rows.clone());
                let y = y.reborrow().slice_rows(part.rows.clone()).slice_cols(columns.clone());
                frozen_linear::forward(x, weight, y, 0.0, workspace)?;
            }
        }
    }
    launch.finish(&s, residual.filter(|_| !only_adds), y)
}

/// Each member's columns of y.
fn columns(group: &Group) -> Vec<Range<usize>> {
    let next = |start: &mut usize, member: &Member| {
        let columns = *start..*start + member.weight.rows();
        *start = columns.end;
        Some(columns)
    };
    group.members.iter().scan(0, next).collect()
}

/// The adapters' rows, and, unless the base's are done, those between them.
fn spans<'a, 'b>(parts: &[&'a RowAdapter<'b>], rows: usize, base_is_done: bool) -> Vec<Span<'a, 'b>> {
    let mut spans: Vec<Span> = Vec::new();
    let mut from = 0;
    for part in parts {
        if !base_is_done && from < part.rows.start {
            spans.push((from..part.rows.start, None));
        }
        spans.push((part.rows.clone(), Some(part)));
        from = part.rows.end;
    }
    if !base_is_done && from < rows {
        spans.push((from..rows, None));
    }
    spans
}

/// `y = x W^T`, with biases and residual where the group has them. Plain weights are multiplied where they lie.
fn base_product(
    group: &Group,
    few: bool,
    mut x: ViewMut,
    residual: Option<View>,
    mut y: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    let run = |group: &Group, x: ViewMut, residual: Option<View>, y: ViewMut| match few {
        true => group.infer(x, None, residual, y, workspace),
        false => group.forward(x, None, residual, y, workspace).map(drop),
    };
    if !group.members.iter().any(|member| is_plain_on_gpu(member.weight)) {
        return run(group, x, residual, y);
    }
    for (member, columns) in group.members.iter().zip(columns(group)) {
        let mut y = y.reborrow().slice_cols(columns.clone());
        if is_plain_on_gpu(member.weight) && member.bias.is_none() && residual.is_none() {
            frozen_linear::forward(x.as_view(), member.weight, y, 0.0, workspace)?;
        } else {
            let one = Group { members: std::slice::from_ref(member), cache: &WeightCache::default(), split: false };
            run(&one, x.reborrow(), residual.map(|all| all.slice_cols(columns)), y.reborrow())?;
        }
    }
    Ok(())
}

/// The launches for a group's adapters.
struct Launch<'a, 'b> {
    op: &'static str,
    group: &'a Group<'a>,
    spans: Vec<Span<'a, 'b>>,
    /// The spans as the kernels take them.
    table: Vec<ffi::RowsSpan>,
    dtype: Dtype,
    /// Launches may begin before those before them have ended.
    early: i32,
}

impl<'a, 'b> Launch<'a, 'b> {
    /// With `biases`, the members' own are added too.
    fn new(
        op: &'static str,
        group: &'a Group<'a>,
        spans: Vec<Span<'a, 'b>>,
        biases: bool,
        y: View,
        early: bool,
    ) -> Result<Self> {
        let y = y.cuda(op)?;
        check_gpu(op, group, y.gpu(), [])?;
        one_gpu(op, y.gpu(), spans.iter().filter_map(|(_, part)| part.and_then(|part| part.values.gpu())))?;
        let table = spans.iter().map(|span| describe(op, group, span, biases)).collect::<Result<Vec<_>>>()?;
        Ok(Self { op, group, spans, table, dtype: y.dtype(), early: if early { y.gpu().early() } else { 0 } })
    }

    /// Whether a span's `x A^T` is made with the others'.
    fn is_short(span: &ffi::RowsSpan) -> bool {
        span.columns > 0 && span.rows as usize <= FEW_ROWS
    }

    /// `S = x A^T` of all spans, f32.
    fn shrink(&self, x: View, workspace: &Workspace) -> Result<Matrix> {
        let x = x.cuda(self.op)?;
        let dtype = same_dtype(self.op, &[self.dtype, x.dtype()])?;
        let columns = self.table.iter().map(|span| span.columns).max().unwrap_or(0) as usize;
        let mut s = workspace.matrix_f32(if columns == 0 { 0 } else { x.rows() }, columns.next_multiple_of(8))?;
        let short: Vec<ffi::RowsSpan> = self.table.iter().copied().filter(Self::is_short).collect();
        let target = s.view_mut().cuda(self.op)?;
        one_gpu(self.op, target.gpu(), [x.gpu()])?;
        for spans in short.chunks(MOST_SPANS) {
            let spans = launch_of(self.group, spans);
            // SAFETY: the windows are live; rows lie in x and S, A has been checked to lie in its adapter's values, which
            // nothing writes any more.
            target.gpu().launch(self.op, |stream| unsafe {
                ffi::qlora_rows_shrink(
                    dtype,
                    &raw const spans,
                    x.ptr() as *const _,
                    x.ld(),
                    target.ptr() as *mut f32,
                    target.ld(),
                    self.group.inputs() as i64,
                    self.early,
                    stream,
                )
            })?;
        }
        for ((rows, part), span) in self.spans.iter().zip(&self.table) {
            if let Some(part) = part.filter(|_| span.columns > 0 && !Self::is_short(span)) {
                shrink_many(self.op, self.group, part, x.slice_rows(rows.clone()), &mut s, rows.clone(), workspace)?;
            }
        }
        Ok(s)
    }

    /// Adds the adapters' part to the base's product, which `y` holds.
    fn finish(&self, s: &Matrix, residual: Option<View>, y: ViewMut) -> Result<()> {
        let changes = |m: &ffi::RowsChange| m.rank > 0 || !m.gain.is_null() || !m.bias.is_null();
        if residual.is_none() && !self.table.iter().any(|span| span.m.iter().any(changes)) {
            return Ok(());
        }
        let (y, residual) = (y.cuda(self.op)?, residual.map(|residual| residual.cuda(self.op)).transpose()?);
        let dtype = same_dtype(self.op, &[y.dtype(), residual.map_or(y.dtype(), |residual| residual.dtype())])?;
        one_gpu(self.op, y.gpu(), residual.map(|residual| residual.gpu()))?;
        let (residual, ldr) = residual.map_or((std::ptr::null(), 0), |view| (view.ptr() as *const _, view.ld()));
        let s = s.view().cuda(self.op)?;
        for spans in self.table.chunks(MOST_SPANS) {
            let spans = launch_of(self.group, spans);
            // SAFETY: the windows are live and have the rows and columns that the table names; S was written where it is
            // read; B, gains and biases have been checked, and nothing writes them any more.
            y.gpu().launch(self.op, |stream| unsafe {
                ffi::qlora_rows_finish(
                    dtype,
                    &raw const spans,
                    s.ptr() as *const f32,
                    s.ld(),
                    residual,
                    ldr,
                    y.ptr() as *mut _,
                    y.ld(),
                    self.early,
                    stream,
                )
            })?;
        }
        Ok(())
    }
}

fn launch_of(group: &Group, spans: &[ffi::RowsSpan]) -> ffi::RowsSpans {
    let mut launch =
        ffi::RowsSpans { count: spans.len() as i32, layers: group.members.len() as i32, ..Default::default() };
    launch.s[..spans.len()].copy_from_slice(spans);
    for (cols, member) in launch.cols.iter_mut().zip(group.members) {
        *cols = member.weight.rows() as i64;
    }
    launch
}

/// A span as the kernels take it.
fn describe(op: &'static str, group: &Group, (rows, part): &Span, biases: bool) -> Result<ffi::RowsSpan> {
    let mut span = ffi::RowsSpan { row0: rows.start as i64, rows: rows.len() as i64, ..Default::default() };
    for (target, member) in span.m.iter_mut().zip(group.members) {
        let (inputs, outputs) = (group.inputs(), member.weight.rows());
        let mut bias = member.bias.filter(|_| biases);
        let part = part.and_then(|part| Some((part, part.change(member)?)));
        if let Some((part, change)) = part {
            let address = |range: &Range<usize>, what, len: usize| -> Result<*const f32> {
                vector(op, what, part.slice(range)?.cuda(op)?, len)
            };
            if let Some(slot) = change.lora.as_ref().filter(|slot| slot.rank > 0) {
                target.a = address(&slot.a, "A", slot.rank * inputs)?;
                target.b = address(&slot.b, "B", outputs * slot.rank)?;
                (target.scale, target.rank, target.r0) = (slot.scale, slot.rank as i32, span.columns);
                span.columns += slot.rank as i32;
            }
            if let Some(gain) = &change.gain {
                target.gain = address(gain, "gain", outputs)?;
            }
            if let Some(own) = &change.bias {
                bias = Some(part.slice(own)?);
            }
        }
        if let Some(bias) = bias {
            target.bias = vector(op, "bias", bias.cuda(op)?, outputs)?;
        }
    }
    Ok(span)
}

/// `S = x A^T` of many rows of one adapter: A of all members in one matrix of the activations' type, and one product.
fn shrink_many(
    op: &'static str,
    group: &Group,
    part: &RowAdapter,
    x: CudaView,
    s: &mut Matrix,
    rows: Range<usize>,
    workspace: &Workspace,
) -> Result<()> {
    let slots = group.members.iter().filter_map(|member| part.change(member)?.lora.as_ref());
    let slots: Vec<_> = slots.filter(|slot| slot.rank > 0).collect();
    let columns = slots.iter().map(|slot| slot.rank).sum();
    let mut a = workspace.matrix(columns, group.inputs())?;
    let mut row = 0;
    for slot in slots {
        Error::check_shape(op, "A", &[slot.a.len()], &[slot.rank * group.inputs()])?;
        let from = part.slice(&slot.a)?.cuda(op)?.reshape(slot.rank, group.inputs());
        cast(from, a.view_mut().cuda(op)?.slice_rows(row..row + slot.rank))?;
        row += slot.rank;
    }
    let target = s.view_mut().cuda(op)?.slice_rows(rows).slice_cols(0..columns);
    target.gpu().matmul(op, Kind::Nt, x, a.view().cuda(op)?, target, 1.0, 0.0)
}
