//! The forward of [`attention`](super).

use std::ops::Range;

use super::{AttentionConfig, Columns, LseOrder, map, softmax, split_heads, take};
use crate::error::Result;
use crate::matrix::Workspace;
use crate::ops::matmul::{nn_serial, tn_serial};
use crate::sequence::SequenceLayout;
use crate::view::{HostView, HostViewMut, View, ViewMut};

/// Keys to a block.
const KEY_BLOCK: usize = 192;

/// Writes `out` and `lse`; says in which order `lse` is.
///
/// # Errors
/// If a shape does not fit, or `cfg` describes no attention.
pub fn forward(
    cfg: &AttentionConfig,
    q: View,
    k: View,
    v: View,
    layout: &SequenceLayout,
    out: ViewMut,
    lse: ViewMut,
    workspace: &Workspace,
) -> Result<LseOrder> {
    const OP: &str = "attention_forward";
    cfg.check(OP)?;
    let (tokens, q_cols, kv_cols) = (layout.tokens(), cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    q.expect(OP, "q", tokens, q_cols)?;
    k.expect(OP, "k", tokens, kv_cols)?;
    v.expect(OP, "v", tokens, kv_cols)?;
    out.expect(OP, "out", tokens, q_cols)?;
    lse.expect(OP, "lse", tokens, cfg.heads)?;
    #[cfg(feature = "cuda")]
    if out.gpu().is_some() {
        return crate::cuda::attention::forward(OP, cfg, q, k, v, layout, out, lse);
    }
    let (q, k, v) = (q.host(OP)?, k.host(OP)?, v.host(OP)?);
    let (mut out, mut lse) = (out.host(OP)?, lse.host(OP)?);

    let mut tiles = Vec::new();
    let mut pairs = 0;
    for sequence in layout.sequences() {
        pairs += cfg.pairs(0..sequence.len());
        for first in (0..sequence.len()).step_by(cfg.tile_queries()) {
            let positions = first..sequence.len().min(first + cfg.tile_queries());
            let (out_rows, lse_rows);
            (out_rows, out) = out.split_rows(positions.len());
            (lse_rows, lse) = lse.split_rows(positions.len());
            let keys = cfg.visible(&positions);
            let rows = |range: Range<usize>| sequence.start + range.start..sequence.start + range.end;
            let q = q.slice_rows(rows(positions));
            let (k, v) = (k.slice_rows(rows(keys.clone())), v.slice_rows(rows(keys)));
            tiles.extend(Tile::of_heads(cfg, q, k, v, out_rows, Some(lse_rows)));
        }
    }
    map(tiles, pairs * cfg.heads * 2 * cfg.head_dim, |tile| tile.run(cfg, workspace));
    Ok(LseOrder::ByToken)
}

/// The queries of one group at consecutive positions, and the keys and values that any of them sees: the last key is at
/// the position of the last query.
pub(super) struct Tile<'a> {
    pub(super) q: HostView<'a>,
    pub(super) k: HostView<'a>,
    pub(super) v: HostView<'a>,
    pub(super) out: HostViewMut<'a>,
    pub(super) lse: Option<HostViewMut<'a>>,
}

impl<'a> Tile<'a> {
    /// One tile to a key/value head, of windows that hold all heads.
    pub(super) fn of_heads(
        cfg: &AttentionConfig,
        q: HostView<'a>,
        k: HostView<'a>,
        v: HostView<'a>,
        out: HostViewMut<'a>,
        lse: Option<HostViewMut<'a>>,
    ) -> impl Iterator<Item = Self> {
        let (group, d) = (cfg.group(), cfg.head_dim);
        let mut lse = lse.map(|lse| split_heads(lse, group));
        split_heads(out, group * d).enumerate().map(move |(head, out)| Self {
            q: q.slice_cols(head * group * d..(head + 1) * group * d),
            k: k.slice_cols(head * d..(head + 1) * d),
            v: v.slice_cols(head * d..(head + 1) * d),
            out,
            lse: lse.as_mut().and_then(Iterator::next),
        })
    }

    /// The position of the first query, counted from the first key.
    pub(super) fn first_query(&self) -> usize {
        self.k.rows() - self.q.rows()
    }

    pub(super) fn run(mut self, cfg: &AttentionConfig, workspace: &Workspace) {
        let columns = Columns::new(cfg, self.q.rows());
        let mut memory = workspace.scratch(1, Running::elements(&columns, self.k.rows()));
        let mut running = Running::new(columns, self.q, cfg.scale, memory.as_mut_slice());
        running.attend(self.k, self.v, 0, self.first_query(), cfg.window);
        running.write_out(&mut self.out);
        if let Some(lse) = &mut self.lse {
            running.write_lse(lse);
        }
    }
}

/// The state of a tile between key blocks: for every column the maximum, the sum of exponentials and the sum of values
/// so far.
pub(super) struct Running<'a> {
    columns: Columns,
    /// `[head_dim, width]`, times the scale.
    q: &'a mut [f32],
    /// `[keys, width]`
    scores: &'a mut [f32],
    /// `[width, head_dim]`
    values: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// Temporaries of a block: see [`softmax::raise`].
    before: &'a mut [f32],
    shift: &'a mut [f32],
    factor: &'a mut [f32],
}

impl<'a> Running<'a> {
    /// The length of the memory that [`Self::new`] needs for up to `keys` keys.
    pub(super) fn elements(columns: &Columns, keys: usize) -> usize {
        columns.width() * (2 * columns.head_dim + keys.min(KEY_BLOCK) + 5)
    }

    pub(super) fn new(columns: Columns, q: HostView, scale: f32, memory: &'a mut [f32]) -> Self {
        let (mut memory, width) = (memory, columns.width());
        let keys = memory.len() / width - 2 * columns.head_dim - 5;
        let mut part = |rows: usize| take(&mut memory, rows * width);
        let (transposed, values, scores) = (part(columns.head_dim), part(columns.head_dim), part(keys));
        let [max, sum, before, shift, factor] = std::array::from_fn(|_| part(1));
        columns.gather_transposed(q, scale, transposed);
        values.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        before.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        Self { columns, q: transposed, scores, values, max, sum, before, shift, factor }
    }

    /// Takes in the keys and values; the first key is the `first_key`-th of the count in which the tile's first query
    /// is the `first_query`-th.
    pub(super) fn attend(
        &mut self,
        k: HostView,
        v: HostView,
        first_key: usize,
        first_query: usize,
        window: Option<usize>,
    ) {
        let (width, d) = (self.columns.width(), self.columns.head_dim);
        for from in (0..k.rows()).step_by(self.scores.len() / width) {
            let to = k.rows().min(from + self.scores.len() / width);
            let (k, v) = (k.slice_rows(from..to), v.slice_rows(from..to));
            let scores = &mut self.scores[..(to - from) * width];
            let q = HostView::new(self.q, d, width);
            nn_serial(k, q, HostViewMut::new(scores, to - from, width), 1.0, 0.0);
            self.columns.mask(scores, first_key + from, first_query, window);
            softmax::column_max(scores, self.max);
            softmax::raise(self.max, self.before, self.shift, self.factor);
            softmax::exp_shifted(scores, self.shift);
            softmax::add_columns(scores, self.factor, self.sum);
            if from > 0 {
                softmax::scale_rows(self.values, self.factor);
            }
            let p = HostView::new(scores, to - from, width);
            tn_serial(p, v, HostViewMut::new(self.values, width, d), 1.0, 1.0);
        }
    }

    /// Merges the state of other keys, for the same columns.
    pub(super) fn merge(&mut self, other: &Self) {
        let d = self.columns.head_dim;
        for column in 0..self.columns.width() {
            let max = self.max[column].max(other.max[column]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            // exp(-inf) is 0: a state that saw nothing has no weight.
            let (a, b) = ((self.max[column] - max).exp(), (other.max[column] - max).exp());
            self.sum[column] = a * self.sum[column] + b * other.sum[column];
            let (own, others) = (&mut self.values[column * d..][..d], &other.values[column * d..][..d]);
            own.iter_mut().zip(others).for_each(|(x, y)| *x = a * *x + b * y);
            self.max[column] = max;
        }
    }

    /// Writes the attention outputs, `[queries, group * head_dim]`.
    pub(super) fn write_out(&self, out: &mut HostViewMut) {
        let (n, d) = (self.columns.queries, self.columns.head_dim);
        for t in 0..n {
            for (g, head) in out.row_mut(t).chunks_exact_mut(d).enumerate() {
                let column = g * n + t;
                let inverse = 1.0 / self.sum[column];
                head.iter_mut().zip(&self.values[column * d..][..d]).for_each(|(out, x)| *out = x * inverse);
            }
        }
    }

    /// Writes the logarithms of the sums of exponentials, `[queries, group]`.
    fn write_lse(&self, lse: &mut HostViewMut) {
        let n = self.columns.queries;
        for t in 0..n {
            for (g, lse) in lse.row_mut(t).iter_mut().enumerate() {
                *lse = self.max[g * n + t] + self.sum[g * n + t].ln();
            }
        }
    }
}
