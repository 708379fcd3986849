//! Context parallelism: one micro-batch over several ranks, each with a share of its tokens.
//!
//! Everything but attention is computed token by token, so a rank computes it for its share alone. Attention needs whole sequences, but
//! a head knows no other: before it an all-to-all turns `[tokens of a rank, all heads]` into `[all tokens, heads of a rank]`, after it
//! another one turns the output back, and the backward does the same (Jacobs et al. 2023, "DeepSpeed Ulysses").
//!
//! ```text
//!            rank 0            rank 1                          rank 0        rank 1
//! rows 0..m  q0 q1 k0 k1 v0 v1                    to_heads     q0 k0 v0      q1 k1 v1     all rows
//! rows m..n                    q0 q1 k0 k1 v0 v1    --->
//! ```
//!
//! Attention runs on the packed batch as always, with fewer heads. Query heads have to divide over the ranks; key and value heads do, or
//! the ranks divide over them: then several ranks have the same head, and its gradients are added in the order of the ranks. The rows
//! of a share follow each other, and shares differ by at most one row. Rotations and dropout go by the rows of the whole batch.
//!
//! A saved block holds q, k and v by heads (as many bytes as by rows) and attention's output by rows, which the backward exchanges once
//! more: a second copy of it would take more memory than the exchange takes time.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use qlora_kernels::ops::attention::{self, AttentionConfig, LseOrder};
use qlora_kernels::ops::residual;
use qlora_kernels::sequence::Positions;
use qlora_kernels::{Matrix, SequenceLayout, View, ViewMut, Workspace};

use super::causal_lm::CausalLm;
use crate::batch::{Batch, IGNORE_INDEX};
use crate::error::{Error, Result};

/// The exchange between the ranks that share a micro-batch. All of them make the same calls in the same order.
pub trait SequenceExchange: fmt::Debug + Send + Sync {
    /// The number of this process among the ranks that share, from 0.
    fn rank(&self) -> usize;

    /// How many ranks share a micro-batch.
    fn ranks(&self) -> usize;

    /// Sends `outgoing[i]` to rank `i` and writes what rank `i` sends to `incoming[i]`. The entries of this rank are empty; the
    /// others have no gaps between their rows, and the shape and type of what is sent. On a GPU it need not be done when this
    /// returns: it is in order with the stream's work.
    ///
    /// # Errors
    /// If a rank is gone, or the device fails.
    fn all_to_all(&self, outgoing: &[View<'_>], incoming: Vec<ViewMut<'_>>) -> Result<()>;
}

/// An exchange of a run that is only planned: it knows how many ranks there will be.
#[derive(Clone, Copy, Debug)]
pub struct PlannedExchange {
    /// How many ranks share a micro-batch.
    pub ranks: usize,
}

impl SequenceExchange for PlannedExchange {
    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn all_to_all(&self, _: &[View<'_>], _: Vec<ViewMut<'_>>) -> Result<()> {
        Err(Error::Invalid("the model was opened to plan a run of several ranks, not to make one".into()))
    }
}

/// Checks that the heads of attention divide over `ranks`.
///
/// # Errors
/// If not, with the numbers of ranks that work.
pub fn check_heads(config: &AttentionConfig, ranks: usize) -> Result<()> {
    let AttentionConfig { heads, kv_heads, .. } = *config;
    let works = |ranks: usize| {
        heads.is_multiple_of(ranks) && (kv_heads.is_multiple_of(ranks) || ranks.is_multiple_of(kv_heads))
    };
    if ranks > 0 && works(ranks) {
        return Ok(());
    }
    let possible: Vec<_> = (1..=heads).filter(|&ranks| works(ranks)).map(|ranks| ranks.to_string()).collect();
    Err(Error::Invalid(format!(
        "the model's {heads} query heads and {kv_heads} key/value heads do not divide over {ranks} ranks: context_parallel_size can be {}",
        possible.join(", ")
    )))
}

/// The part of attention that one of `ranks` ranks computes.
pub fn heads_of_a_rank(config: &AttentionConfig, ranks: usize) -> AttentionConfig {
    AttentionConfig { heads: config.heads / ranks, kv_heads: (config.kv_heads / ranks).max(1), ..*config }
}

/// The columns of `x [rows, heads * head_dim]` that rank `rank` computes with.
fn columns_of(heads: usize, head_dim: usize, rank: usize, ranks: usize) -> Range<usize> {
    let (start, count) = (rank * heads / ranks, (heads / ranks).max(1));
    start * head_dim..(start + count) * head_dim
}

/// A rank's share of a micro-batch in a pass.
#[derive(Debug)]
pub(crate) struct Share<'a> {
    exchange: &'a dyn SequenceExchange,
    /// The first row of every rank's share, and the end.
    bounds: Vec<usize>,
    /// Of this rank's rows, in their sequences.
    positions: Positions,
}

impl<'a> Share<'a> {
    pub(crate) fn new(exchange: &'a dyn SequenceExchange, layout: &SequenceLayout) -> Self {
        let (tokens, ranks) = (layout.tokens(), exchange.ranks());
        let bounds: Vec<usize> = (0..=ranks).map(|rank| tokens * rank / ranks).collect();
        let rows = bounds[exchange.rank()]..bounds[exchange.rank() + 1];
        Self { exchange, bounds, positions: layout.positions()[rows].to_vec().into() }
    }

    /// The rows of the batch that this rank has.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.rows_of(self.exchange.rank())
    }

    /// The positions of these rows.
    pub(crate) fn positions(&self) -> &Positions {
        &self.positions
    }

    fn rows_of(&self, rank: usize) -> Range<usize> {
        self.bounds[rank]..self.bounds[rank + 1]
    }

    fn ranks(&self) -> usize {
        self.exchange.ranks()
    }

    /// Attention of the whole batch: `qkv` has its rows and this rank's heads, `out` this rank's rows and all heads.
    pub(super) fn attend(
        &self,
        config: &AttentionConfig,
        qkv: &Matrix,
        layout: &SequenceLayout,
        out: ViewMut,
        workspace: &Workspace,
    ) -> Result<(Matrix, LseOrder)> {
        let own = heads_of_a_rank(config, self.ranks());
        let [q, k, v] = split(qkv.view(), &own);
        let mut whole = workspace.matrix(qkv.rows(), q.cols())?;
        let mut lse = workspace.matrix_f32(qkv.rows(), own.heads)?;
        let order = attention::forward(&own, q, k, v, layout, whole.view_mut(), lse.view_mut(), workspace)?;
        self.to_rows(&whole, vec![out], config.head_dim, workspace)?;
        Ok((lse, order))
    }

    /// The backward of [`Self::attend`]: the gradient of q, k and v side by side, for this rank's rows, with a margin.
    pub(super) fn attend_backward(
        &self,
        config: &AttentionConfig,
        (qkv, out): (Matrix, Matrix),
        (lse, order): (Matrix, LseOrder),
        dout: Matrix,
        layout: &SequenceLayout,
        margin: usize,
        workspace: &Workspace,
    ) -> Result<Matrix> {
        let (rows, own, d) = (dout.rows(), heads_of_a_rank(config, self.ranks()), config.head_dim);
        let whole = self.to_heads(&[out.view()], d, workspace)?;
        drop(out);
        let dwhole = self.to_heads(&[dout.view()], d, workspace)?;
        drop(dout);
        let mut gradient = workspace.matrix(qkv.rows(), qkv.cols())?;
        {
            let [q, k, v] = split(qkv.view(), &own);
            let [dq, dk, dv] = split_mut(gradient.view_mut(), &own);
            let (out, lse, dout) = (whole.view(), lse.view(), dwhole.view());
            attention::backward(&own, q, k, v, out, lse, order, dout, layout, dq, dk, dv, workspace)?;
        }
        drop((whole, dwhole, qkv, lse));
        let mut dqkv = workspace.with_margin(rows, (config.heads + 2 * config.kv_heads) * d, margin)?;
        self.to_rows(&gradient, split_mut(dqkv.view_mut(), config).into(), d, workspace)?;
        Ok(dqkv)
    }

    /// `parts` have this rank's rows and all heads; the result all rows and this rank's heads, the parts side by side.
    pub(super) fn to_heads(&self, parts: &[View], head_dim: usize, workspace: &Workspace) -> Result<Matrix> {
        let (own, ranks) = (self.exchange.rank(), self.ranks());
        let columns = |part: &View, rank| columns_of(part.cols() / head_dim, head_dim, rank, ranks);
        let width: usize = parts.iter().map(|part| columns(part, own).len()).sum();
        let pack = |rank: usize, mut to: ViewMut| -> Result<()> {
            let mut at = 0;
            for part in parts {
                let columns = columns(part, rank);
                let end = at + columns.len();
                to.reborrow().slice_cols(at..end).copy_from(part.slice_cols(columns))?;
                at = end;
            }
            Ok(())
        };
        let mut whole = workspace.matrix(self.bounds[ranks], width)?;
        let mut packed = Vec::with_capacity(ranks);
        for rank in 0..ranks {
            let rows = if rank == own { 0 } else { self.rows().len() };
            let mut matrix = workspace.matrix(rows, width)?;
            if rank == own {
                pack(rank, whole.view_mut().slice_rows(self.rows()))?;
            } else {
                pack(rank, matrix.view_mut())?;
            }
            packed.push(matrix);
        }
        let outgoing: Vec<View> = packed.iter().map(Matrix::view).collect();
        // One row of all elements, because rows cannot be split and columns can.
        let (mut incoming, mut rest) =
            (Vec::with_capacity(ranks), Some(whole.view_mut().reshape(1, self.bounds[ranks] * width)));
        for rank in 0..ranks {
            let rows = self.rows_of(rank).len();
            let (part, behind) = rest.take().expect("one for each rank").split_cols(rows * width);
            rest = Some(behind);
            let part = part.reshape(rows, width);
            incoming.push(if rank == own { part.slice_rows(0..0) } else { part });
        }
        self.exchange.all_to_all(&outgoing, incoming)?;
        Ok(whole)
    }

    /// The way back: `whole` has all rows and this rank's heads, the parts side by side; `parts` get this rank's rows and all heads.
    /// Heads that several ranks have are added.
    fn to_rows(&self, whole: &Matrix, mut parts: Vec<ViewMut>, head_dim: usize, workspace: &Workspace) -> Result<()> {
        let (own, ranks) = (self.exchange.rank(), self.ranks());
        let mut received = Vec::with_capacity(ranks);
        for rank in 0..ranks {
            let rows = if rank == own { 0 } else { self.rows().len() };
            received.push(workspace.matrix(rows, whole.cols())?);
        }
        let part_of = |rank: usize| whole.view().slice_rows(if rank == own { 0..0 } else { self.rows_of(rank) });
        let outgoing: Vec<View> = (0..ranks).map(part_of).collect();
        self.exchange.all_to_all(&outgoing, received.iter_mut().map(Matrix::view_mut).collect())?;
        for (rank, received) in received.iter().enumerate() {
            let from = if rank == own { whole.view().slice_rows(self.rows()) } else { received.view() };
            let mut at = 0;
            for part in &mut parts {
                let heads = part.cols() / head_dim;
                let columns = columns_of(heads, head_dim, rank, ranks);
                let from = from.slice_cols(at..at + columns.len());
                at += columns.len();
                let is_first = rank == 0 || columns_of(heads, head_dim, rank - 1, ranks).start != columns.start;
                let to = part.reborrow().slice_cols(columns);
                if is_first { to.copy_from(from)? } else { residual::add(from, to)? }
            }
        }
        Ok(())
    }
}

/// q, k and v of matrices that have them side by side.
fn split<'a>(qkv: View<'a>, config: &AttentionConfig) -> [View<'a>; 3] {
    let (q, k) = (config.heads * config.head_dim, (config.heads + config.kv_heads) * config.head_dim);
    [qkv.slice_cols(0..q), qkv.slice_cols(q..k), qkv.slice_cols(k..qkv.cols())]
}

fn split_mut<'a>(qkv: ViewMut<'a>, config: &AttentionConfig) -> [ViewMut<'a>; 3] {
    let (q, rest) = qkv.split_cols(config.heads * config.head_dim);
    let (k, v) = rest.split_cols(config.kv_heads * config.head_dim);
    [q, k, v]
}

/// The batch, with a token for every rank: a smaller one gets a sequence that nobody trains on.
pub(super) fn with_a_token_each<'a>(batch: &'a Batch, exchange: Option<&dyn SequenceExchange>) -> Cow<'a, Batch> {
    let missing = exchange.map_or(0, |exchange| exchange.ranks().saturating_sub(batch.tokens.len()));
    if missing == 0 {
        return Cow::Borrowed(batch);
    }
    let mut padded = batch.clone();
    padded.tokens.resize(batch.tokens.len() + missing, 0);
    padded.targets.resize(batch.tokens.len() + missing, IGNORE_INDEX);
    let lengths = batch.layout.sequences().map(|rows| rows.len()).chain([missing]);
    padded.layout = SequenceLayout::from_lengths(&lengths.collect::<Vec<_>>());
    Cow::Owned(padded)
}

impl CausalLm {
    /// Shares every micro-batch of [`Self::accumulate_gradients`] and [`Self::evaluate`] with other ranks, or with none. All ranks are
    /// given the same batch; each computes its share of the rows, and the sums of losses and the gradients are those of its share:
    /// the caller adds them. Everything else (generation, [`Self::loss`]) is computed by this rank alone.
    ///
    /// # Errors
    /// If the heads of attention do not divide over the ranks.
    pub fn set_sequence_exchange(&mut self, exchange: Option<std::sync::Arc<dyn SequenceExchange>>) -> Result<()> {
        if let Some(exchange) = &exchange {
            for block in self.stack().blocks() {
                check_heads(&block.attention, exchange.ranks())?;
            }
        }
        self.exchange = exchange.filter(|exchange| exchange.ranks() > 1);
        Ok(())
    }

    /// How many ranks share a micro-batch.
    pub fn context_ranks(&self) -> usize {
        self.exchange.as_ref().map_or(1, |exchange| exchange.ranks())
    }
}

#[cfg(test)]
mod tests;
