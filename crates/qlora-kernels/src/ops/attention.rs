//! Grouped-query causal attention over packed sequences.
//!
//! For every sequence and query head `h`, with `h / group` the key/value head it reads (`group = heads / kv_heads`):
//!
//! ```text
//! s[i][j] = scale * q[i] . k[j]            for the visible j: j <= i, and i - j < window if there is a window
//! p[i]    = softmax(s[i]),  lse[i] = log sum_j exp(s[i][j])
//! out[i]  = sum_j p[i][j] v[j]
//! ```
//!
//! | argument | shape | |
//! |---|---|---|
//! | `q`, `out` and their gradients | `[tokens, heads * head_dim]` | head `h` is the columns from `h * head_dim` |
//! | `k`, `v` and their gradients | `[tokens, kv_heads * head_dim]` | |
//! | `lse` | `[tokens, heads]` | all that the backward needs of the softmax; a GPU may order it otherwise: [`LseOrder`] |
//!
//! The score matrix never exists: a tile of queries (all heads of a group together) meets one block of keys after the
//! other with a running maximum and sum (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022), and blocks that
//! nothing in the tile sees are skipped. The backward makes the probabilities again from `lse` and uses
//! `ds = p * (dp - rowsum(dout * out))`.
//!
//! Scores are held transposed, `[keys, queries of the tile]`. Then the softmax is elementwise arithmetic on rows (no
//! reduction within a vector, so the sums do not depend on the machine's vector width), and of the seven operands of the
//! backward's products only those made from the tile's queries need another layout: keys and values are read where
//! they lie.
//!
//! Everything is f32. The results do not depend on the number of threads.

mod backward;
mod cached;
mod forward;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod route;
mod softmax;
#[cfg(test)]
mod tests;

use std::ops::Range;

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

pub use backward::backward;
pub use cached::cached;
pub use forward::forward;
#[cfg(any(test, feature = "cuda"))]
pub use route::AttentionPath;

use crate::error::{Error, Result};
use crate::transpose::transpose;
use crate::view::{HostView, HostViewMut};

/// The shape of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// The factor of the attention scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// The number of positions that a token sees, itself included; none: all up to itself.
    pub window: Option<usize>,
}

impl AttentionConfig {
    /// Query heads to a key/value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn check(&self, op: &'static str) -> Result<()> {
        let Self { heads, kv_heads, head_dim, scale, window } = *self;
        if heads == 0 || kv_heads == 0 || head_dim == 0 || heads % kv_heads != 0 {
            let shape = format!("{heads} query heads, {kv_heads} key/value heads, head_dim {head_dim}");
            return Err(Error::invalid(
                op,
                format!("{shape}: expected positive numbers, the second dividing the first"),
            ));
        }
        if window == Some(0) {
            return Err(Error::invalid(op, "a window of 0 positions lets a token see nothing"));
        }
        if !scale.is_finite() {
            return Err(Error::invalid(op, format!("the scale is {scale}")));
        }
        Ok(())
    }

    /// The queries of a tile per head. All heads of the group together make 48 columns of scores: one panel of the
    /// matrix kernels, which was the fastest of 16 to 384 at all lengths (fewer columns waste less on the diagonal, more
    /// read the keys less often).
    fn tile_queries(&self) -> usize {
        (48 / self.group()).max(1)
    }

    /// The visible keys of the queries at `positions`, both counted from the start of the sequence.
    fn visible(&self, positions: &Range<usize>) -> Range<usize> {
        let from = self.window.map_or(0, |window| (positions.start + 1).saturating_sub(window));
        from..positions.end
    }

    /// The number of (query, key) pairs that the queries at `positions` see.
    fn pairs(&self, positions: Range<usize>) -> usize {
        let window = self.window.unwrap_or(usize::MAX);
        // The sum of min(i + 1, window): a triangle and, behind it, a rectangle.
        let below = |end: usize| {
            let triangle = end.min(window);
            triangle * (triangle + 1) / 2 + (end - triangle) * window.min(end)
        };
        below(positions.end) - below(positions.start)
    }
}

/// The order of the elements that a forward wrote to `lse`; its backward has to be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the backward needs it"]
pub enum LseOrder {
    /// `[tokens, heads]`.
    #[default]
    ByToken,
    /// `[sequences, heads, length]`: cuDNN's for sequences of one length.
    BySequence,
}

/// The columns of a tile's scores: queries `0..queries` of the group's first head, then of the next; then zeros up to a
/// multiple of 16, so that every row of scores is a whole number of vectors. The zeros go through the arithmetic and
/// contribute nothing.
#[derive(Clone, Copy)]
struct Columns {
    group: usize,
    queries: usize,
    head_dim: usize,
}

impl Columns {
    fn new(cfg: &AttentionConfig, queries: usize) -> Self {
        Self { group: cfg.group(), queries, head_dim: cfg.head_dim }
    }

    /// The number of columns, the zeros included.
    fn width(&self) -> usize {
        (self.group * self.queries).next_multiple_of(16)
    }

    /// `out [width, head_dim] = factor * x`, from `x [queries, group * head_dim]`.
    fn gather(&self, x: HostView, factor: f32, out: &mut [f32]) {
        let d = self.head_dim;
        let used = self.group * self.queries * d;
        for (g, head) in out[..used].chunks_exact_mut(self.queries * d).enumerate() {
            for (t, row) in head.chunks_exact_mut(d).enumerate() {
                row.iter_mut().zip(&x.row(t)[g * d..(g + 1) * d]).for_each(|(out, x)| *out = factor * x);
            }
        }
        out[used..].fill(0.0);
    }

    /// `out [head_dim, width] = factor * x^T`, from `x [queries, group * head_dim]`.
    fn gather_transposed(&self, x: HostView, factor: f32, out: &mut [f32]) {
        let (d, width, used) = (self.head_dim, self.width(), self.group * self.queries);
        let (mut rest, zeros) = HostViewMut::new(out, d, width).split_cols(used);
        zeros.rows_mut().for_each(|row| row.fill(0.0));
        for g in 0..self.group {
            let (head, behind) = rest.split_cols(self.queries);
            transpose(x.slice_cols(g * d..(g + 1) * d), factor, head);
            rest = behind;
        }
    }

    /// `out [width]` from `x [queries, group]`.
    fn gather_scalars(&self, x: impl Fn(usize, usize) -> f32, out: &mut [f32]) {
        let used = self.group * self.queries;
        for (g, head) in out[..used].chunks_exact_mut(self.queries).enumerate() {
            head.iter_mut().enumerate().for_each(|(t, out)| *out = x(t, g));
        }
        out[used..].fill(0.0);
    }

    /// Sets the scores that are not visible to minus infinity: `scores [keys, width]`, whose first key is the
    /// `first_key`-th and whose first query is the `first_query`-th of the same count.
    fn mask(&self, scores: &mut [f32], first_key: usize, first_query: usize, window: Option<usize>) {
        let (width, n) = (self.width(), self.queries);
        let last_key = first_key + scores.len() / width - 1;
        let all_seen = last_key <= first_query && window.is_none_or(|w| first_query + n - 1 - first_key < w);
        if all_seen {
            return;
        }
        for (key, row) in (first_key..).zip(scores.chunks_exact_mut(width)) {
            let from = key.saturating_sub(first_query).min(n);
            let to = window.map_or(n, |window| (key + window).saturating_sub(first_query).clamp(from, n));
            for head in row[..self.group * n].chunks_exact_mut(n) {
                head[..from].fill(f32::NEG_INFINITY);
                head[to..].fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Runs `task` on every item: in parallel, item by item, or on the calling thread if waking the others would cost more
/// than `work` (multiply-adds) is worth.
fn map<T: Send, R: Send>(items: Vec<T>, work: usize, task: impl Fn(T) -> R + Send + Sync) -> Vec<R> {
    if work < 1 << 18 {
        return items.into_iter().map(task).collect();
    }
    // One item at a time: they differ in work.
    items.into_par_iter().with_max_len(1).map(task).collect()
}

/// The columns of `x` in windows of `width`.
fn split_heads(x: HostViewMut<'_>, width: usize) -> impl Iterator<Item = HostViewMut<'_>> {
    let mut rest = Some(x);
    std::iter::from_fn(move || {
        let x = rest.take().filter(|x| x.cols() >= width)?;
        let (head, behind) = x.split_cols(width);
        rest = Some(behind);
        Some(head)
    })
}

/// Cuts the first `len` elements off `buffer`.
fn take<'a>(buffer: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, rest) = std::mem::take(buffer).split_at_mut(len);
    *buffer = rest;
    front
}
