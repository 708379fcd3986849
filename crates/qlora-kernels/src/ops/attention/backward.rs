//! The backward of [`attention`](super).
//!
//! A task is one key/value head of one sequence, or some of its query tiles. It walks over the tiles and adds to `dk` and
//! `dv` of its keys as it goes; where a sequence has more than one task, all but the last add to memory of their own,
//! which is added at the end in order. So nothing is written by two threads, and the heads of a group are summed within
//! one product.

use std::ops::Range;

use super::{AttentionConfig, Columns, LseOrder, map, softmax, split_heads, take};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::ops::matmul::{nn_serial, tn_serial};
use crate::sequence::SequenceLayout;
use crate::view::{HostView, HostViewMut, View, ViewMut};

/// Keys to a block: scores, their gradients and the operands of the five products stay in the L2 cache.
const KEY_BLOCK: usize = 192;

/// Tasks to a head of a sequence, each of which but the last needs sums of its own: in all at most about five times the
/// memory of `dk` and `dv`.
const MAX_PARTS: usize = 8;

/// About how many tasks the work is cut into: three for each of 16 threads even out. Not of the threads that there are: how the
/// sums over queries are grouped decides their rounding, and a run that goes on elsewhere must end with the same bits.
const TASKS: usize = 48;

/// Overwrites `dq`, `dk` and `dv` with the gradients of the loss, given its gradient `dout` and what
/// [`forward`](super::forward) wrote; `order` is what it returned.
///
/// # Errors
/// If a shape does not fit, `cfg` describes no attention, or `lse` is in an order that only a GPU writes.
pub fn backward(
    cfg: &AttentionConfig,
    q: View,
    k: View,
    v: View,
    out: View,
    lse: View,
    order: LseOrder,
    dout: View,
    layout: &SequenceLayout,
    dq: ViewMut,
    dk: ViewMut,
    dv: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    const OP: &str = "attention_backward";
    cfg.check(OP)?;
    let (tokens, q_cols, kv_cols) = (layout.tokens(), cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    for (what, view) in [("q", q), ("out", out), ("dout", dout), ("dq", dq.as_view())] {
        view.expect(OP, what, tokens, q_cols)?;
    }
    for (what, view) in [("k", k), ("v", v), ("dk", dk.as_view()), ("dv", dv.as_view())] {
        view.expect(OP, what, tokens, kv_cols)?;
    }
    lse.expect(OP, "lse", tokens, cfg.heads)?;
    #[cfg(feature = "cuda")]
    if dq.gpu().is_some() {
        return crate::cuda::attention::backward(OP, cfg, [q, k, v, out, lse, dout], order, layout, [dq, dk, dv]);
    }
    if order != LseOrder::ByToken {
        return Err(Error::invalid(OP, "lse comes from a forward on a GPU"));
    }
    let inputs = Inputs {
        q: q.host(OP)?,
        k: k.host(OP)?,
        v: v.host(OP)?,
        out: out.host(OP)?,
        lse: lse.host(OP)?,
        dout: dout.host(OP)?,
    };
    let (mut dq, mut dk, mut dv) = (dq.host(OP)?, dk.host(OP)?, dv.host(OP)?);

    let pairs: usize = layout.sequences().map(|sequence| cfg.pairs(0..sequence.len())).sum();
    let share = (pairs * cfg.kv_heads).div_ceil(TASKS);
    let mut units = Vec::new();
    for sequence in layout.sequences() {
        let (dk_rows, dv_rows, dq_rows);
        (dk_rows, dk) = dk.split_rows(sequence.len());
        (dv_rows, dv) = dv.split_rows(sequence.len());
        (dq_rows, dq) = dq.split_rows(sequence.len());
        let parts = cfg.split_queries(sequence.len(), share);
        let (dk_heads, dv_heads) = (split_heads(dk_rows, cfg.head_dim), split_heads(dv_rows, cfg.head_dim));
        let dq_heads = split_heads(dq_rows, cfg.group() * cfg.head_dim);
        for (head, ((dq, dk), dv)) in dq_heads.zip(dk_heads).zip(dv_heads).enumerate() {
            units.push(Unit::new(cfg, inputs.of(cfg, &sequence, head), &parts, dq, dk, dv, workspace));
        }
    }
    let work = pairs * cfg.heads * 5 * cfg.head_dim;
    let tasks: Vec<Task> = units.iter_mut().flat_map(Unit::tasks).collect();
    map(tasks, work, |task| task.run(cfg, workspace));
    units.retain(|unit| !unit.early.is_empty());
    map(units, work, Unit::finish);
    Ok(())
}

impl AttentionConfig {
    /// The positions of a sequence in runs of whole tiles, at most [`MAX_PARTS`], whose pairs are about `share` or less.
    fn split_queries(&self, len: usize, share: usize) -> Vec<Range<usize>> {
        let (total, tile) = (self.pairs(0..len), self.tile_queries());
        let parts = total.div_ceil(share.max(1)).clamp(1, MAX_PARTS.min(len.div_ceil(tile)));
        let mut runs = Vec::with_capacity(parts);
        let mut start = 0;
        for end in (tile..len).step_by(tile).chain([len]) {
            // The next run begins where its share of the pairs does.
            if end == len || self.pairs(0..end) * parts >= total * (runs.len() + 1) {
                runs.push(start..end);
                start = end;
            }
        }
        runs
    }
}

/// The inputs of the backward, of the whole batch or of one key/value head of a sequence.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: HostView<'a>,
    k: HostView<'a>,
    v: HostView<'a>,
    out: HostView<'a>,
    lse: HostView<'a>,
    dout: HostView<'a>,
}

impl<'a> Inputs<'a> {
    fn of(&self, cfg: &AttentionConfig, sequence: &Range<usize>, head: usize) -> Self {
        let window =
            |x: HostView<'a>, width: usize| x.slice_rows(sequence.clone()).slice_cols(head * width..(head + 1) * width);
        let (d, group) = (cfg.head_dim, cfg.group());
        Self {
            q: window(self.q, group * d),
            k: window(self.k, d),
            v: window(self.v, d),
            out: window(self.out, group * d),
            lse: window(self.lse, group),
            dout: window(self.dout, group * d),
        }
    }
}

/// One key/value head of one sequence.
struct Unit<'a> {
    inputs: Inputs<'a>,
    dq: Vec<(Range<usize>, HostViewMut<'a>)>,
    dk: HostViewMut<'a>,
    dv: HostViewMut<'a>,
    /// The sums of all tasks but the last, for the keys they see: `dk` above `dv`.
    early: Vec<(Range<usize>, Matrix)>,
}

impl<'a> Unit<'a> {
    fn new(
        cfg: &AttentionConfig,
        inputs: Inputs<'a>,
        parts: &[Range<usize>],
        dq: HostViewMut<'a>,
        dk: HostViewMut<'a>,
        dv: HostViewMut<'a>,
        workspace: &Workspace,
    ) -> Self {
        let mut rest = dq;
        let mut dq_parts = Vec::with_capacity(parts.len());
        for part in parts {
            let (rows, below) = rest.split_rows(part.len());
            dq_parts.push((part.clone(), rows));
            rest = below;
        }
        let early = parts[..parts.len() - 1].iter().map(|part| {
            let keys = cfg.visible(part);
            (keys.clone(), workspace.scratch(2 * keys.len(), cfg.head_dim))
        });
        Self { inputs, dq: dq_parts, dk, dv, early: early.collect() }
    }

    fn tasks(&mut self) -> Vec<Task<'_>> {
        let mut sums: Vec<Sums> = Vec::with_capacity(self.dq.len());
        for (keys, matrix) in &mut self.early {
            let (rows, cols) = (matrix.rows(), matrix.cols());
            let (dk, dv) = HostViewMut::new(matrix.as_mut_slice(), rows, cols).split_rows(keys.len());
            sums.push(Sums { first_key: keys.start, dk, dv });
        }
        sums.push(Sums { first_key: 0, dk: self.dk.reborrow(), dv: self.dv.reborrow() });
        let dq = self.dq.iter_mut().map(|(part, rows)| (part.clone(), rows.reborrow()));
        dq.zip(sums).map(|((positions, dq), sums)| Task { inputs: self.inputs, positions, dq, sums }).collect()
    }

    fn finish(mut self) {
        for (keys, matrix) in &self.early {
            let (dk, dv) = matrix.as_slice().split_at(matrix.as_slice().len() / 2);
            for (to, from) in [(&mut self.dk, dk), (&mut self.dv, dv)] {
                for (row, from) in keys.clone().zip(from.chunks_exact(matrix.cols())) {
                    to.row_mut(row).iter_mut().zip(from).for_each(|(to, from)| *to += from);
                }
            }
        }
    }
}

/// Some consecutive queries of a [`Unit`].
struct Task<'a> {
    inputs: Inputs<'a>,
    positions: Range<usize>,
    /// Of these queries.
    dq: HostViewMut<'a>,
    sums: Sums<'a>,
}

/// The sums of the gradients of keys and values of a task, from `first_key` on.
struct Sums<'a> {
    first_key: usize,
    dk: HostViewMut<'a>,
    dv: HostViewMut<'a>,
}

impl Task<'_> {
    fn run(mut self, cfg: &AttentionConfig, workspace: &Workspace) {
        self.sums.dk.reborrow().rows_mut().for_each(|row| row.fill(0.0));
        self.sums.dv.reborrow().rows_mut().for_each(|row| row.fill(0.0));
        let step = cfg.tile_queries().min(self.positions.len());
        let block = cfg.visible(&self.positions).len().min(KEY_BLOCK);
        let mut memory = workspace.scratch(Columns::new(cfg, step).width(), 5 * cfg.head_dim + 2 * block + 2);
        for start in self.positions.clone().step_by(step) {
            let tile = start..self.positions.end.min(start + step);
            self.run_tile(cfg, tile, block, memory.as_mut_slice());
        }
    }

    /// The queries at `tile`, with all keys that they see, `block` at a time.
    fn run_tile(&mut self, cfg: &AttentionConfig, tile: Range<usize>, block: usize, memory: &mut [f32]) {
        let (columns, d) = (Columns::new(cfg, tile.len()), cfg.head_dim);
        let width = columns.width();
        let mut memory = memory;
        let mut part = |rows: usize| take(&mut memory, rows * width);
        let [q, q_t, dout, dout_t, dq] = std::array::from_fn(|_| part(d));
        let (scores, gradients) = (part(block), part(block));
        let [lse, delta] = std::array::from_fn(|_| part(1));

        let x = self.inputs;
        let (q_tile, dout_tile) = (x.q.slice_rows(tile.clone()), x.dout.slice_rows(tile.clone()));
        columns.gather(q_tile, cfg.scale, q);
        columns.gather_transposed(q_tile, cfg.scale, q_t);
        columns.gather(dout_tile, 1.0, dout);
        columns.gather_transposed(dout_tile, 1.0, dout_t);
        columns.gather_scalars(|t, g| x.lse.row(tile.start + t)[g], lse);
        let dout_dot_out = |t: usize, g: usize| {
            let head = g * d..(g + 1) * d;
            softmax::dot(&x.dout.row(tile.start + t)[head.clone()], &x.out.row(tile.start + t)[head])
        };
        columns.gather_scalars(dout_dot_out, delta);
        let [q, dout] = [&*q, &*dout].map(|x| HostView::new(x, width, d));
        let [q_t, dout_t] = [&*q_t, &*dout_t].map(|x| HostView::new(x, d, width));

        let keys = cfg.visible(&tile);
        for from in keys.clone().step_by(block) {
            let to = keys.end.min(from + block);
            let (k, v) = (x.k.slice_rows(from..to), x.v.slice_rows(from..to));
            let sums = from - self.sums.first_key..to - self.sums.first_key;
            let (scores, gradients) = (&mut scores[..(to - from) * width], &mut gradients[..(to - from) * width]);
            let view = |x| HostView::new(x, to - from, width);

            nn_serial(k, q_t, HostViewMut::new(scores, to - from, width), 1.0, 0.0);
            columns.mask(scores, from, tile.start, cfg.window);
            softmax::exp_shifted(scores, lse);
            nn_serial(view(scores), dout, self.sums.dv.reborrow().slice_rows(sums.clone()), 1.0, 1.0);
            nn_serial(v, dout_t, HostViewMut::new(gradients, to - from, width), 1.0, 0.0);
            softmax::score_gradient(scores, gradients, delta);
            nn_serial(view(gradients), q, self.sums.dk.reborrow().slice_rows(sums), 1.0, 1.0);
            let beta = if from == keys.start { 0.0 } else { 1.0 };
            tn_serial(view(gradients), k, HostViewMut::new(dq, width, d), 1.0, beta);
        }
        for t in 0..columns.queries {
            let row = self.dq.row_mut(tile.start - self.positions.start + t);
            for (g, row) in row.chunks_exact_mut(d).enumerate() {
                let from = &dq[(g * columns.queries + t) * d..][..d];
                row.iter_mut().zip(from).for_each(|(out, x)| *out = cfg.scale * x);
            }
        }
    }
}
