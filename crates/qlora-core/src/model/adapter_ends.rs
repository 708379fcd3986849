//! The adapters' part at the two ends of a model, where rows may have different adapters: the embedding's output, the
//! logits, and the loss.

use std::ops::Range;

use qlora_kernels::Matrix;
use qlora_kernels::ops::adapter_tokens::{self, EmbeddingDelta};
use qlora_kernels::ops::linear_cross_entropy::LossSum;
use qlora_kernels::ops::linear_group::{Group, Member};
use qlora_kernels::ops::{embedding, linear_cross_entropy};
use qlora_kernels::tensor::TensorView;
use qlora_kernels::weight::WeightCache;

use super::adapters::{Chosen, Span};
use super::causal_lm::CausalLm;
use super::trained::TrainedAdapter;
use crate::adapter::kinds::HEAD;
use crate::batch::IGNORE_INDEX;
use crate::error::{Error, Result};

pub(super) fn loaded_changes_head((_, chosen): &Span) -> bool {
    matches!(chosen, Chosen::Loaded(adapter) if adapter.changes_head())
}

impl CausalLm {
    fn changes_head(&self, span: &Span) -> bool {
        let trained = || self.adapter().is_some_and(|adapter| !adapter.tables().head.is_empty());
        loaded_changes_head(span) || (matches!(span.1, Chosen::Trained) && trained())
    }

    /// The trained adapter and its values, where it holds parts of the embedding or the head.
    fn trained_tables(&self) -> Result<Option<(&TrainedAdapter, TensorView<'_>)>> {
        let Some(adapter) = self.adapter().filter(|adapter| !adapter.tables().is_empty()) else { return Ok(None) };
        Ok(Some((adapter, TensorView::new("adapter", adapter.flat.as_tensor())?)))
    }

    /// The embedding's output for rows of these adapters.
    pub(super) fn embed_with(&self, tokens: &[u32], spans: &[Span]) -> Result<Matrix> {
        let mut x = self.embed(tokens)?;
        let trained = self.trained_tables()?;
        for (rows, chosen) in spans {
            if let (Chosen::Trained, Some((adapter, values))) = (chosen, &trained) {
                let table = adapter.tables().embedding(&**self.embedding(), values.view());
                table.embed(&tokens[rows.clone()], x.view_mut().slice_rows(rows.clone()))?;
            }
            let Chosen::Loaded(adapter) = chosen else { continue };
            let (change, tokens) = (&adapter.embedding, &tokens[rows.clone()]);
            if let Some(table) = &change.table {
                embedding::forward(tokens, &**table, x.view_mut().slice_rows(rows.clone()))?;
            }
            let delta = EmbeddingDelta {
                values: adapter.values.view(),
                tokens: &change.tokens,
                lora: change.lora.as_ref(),
                gain: change.gain.as_ref(),
            };
            delta.apply(tokens, x.view_mut().slice_rows(rows.clone()))?;
        }
        Ok(x)
    }

    /// The logits of `hidden`, whose rows have these adapters.
    pub(super) fn head_logits(&self, hidden: &Matrix, spans: &[Span]) -> Result<Matrix> {
        let mut logits = self.workspace().matrix(hidden.rows(), self.config().vocab_size)?;
        if !spans.iter().any(|span| self.changes_head(span)) {
            self.base_logits(hidden, logits.view_mut())?;
            return Ok(logits);
        }
        let trained = self.trained_tables()?;
        if let (Some((adapter, values)), [(_, Chosen::Trained)]) = (&trained, spans) {
            let table = adapter.tables().head(&**self.head(), values.view(), None);
            table.logits(hidden.view(), logits.view_mut(), self.workspace())?;
            return Ok(logits);
        }
        let loaded: Vec<Span> = spans.iter().filter(|span| loaded_changes_head(span)).cloned().collect();
        let members = [Member { name: HEAD, weight: &**self.head(), bias: None, lora: None }];
        let cache = WeightCache::default();
        let group = Group { members: &members, cache: &cache, split: false };
        let rows = self.rows(&loaded, None)?;
        // A group asks for a mutable input, whose margin it may use on CUDA.
        let mut input = self.workspace().with_margin(hidden.rows(), hidden.cols(), rows.margin(&members))?;
        input.view_mut().copy_from(hidden.view())?;
        rows.infer(&group, input.view_mut(), None, logits.view_mut(), self.workspace())?;
        for (rows, chosen) in &loaded {
            let Chosen::Loaded(adapter) = chosen else { continue };
            let (hidden, logits) = (hidden.view().slice_rows(rows.clone()), logits.view_mut().slice_rows(rows.clone()));
            adapter_tokens::head(adapter.values.view(), &adapter.head_tokens, hidden, logits)?;
        }
        for (rows, chosen) in spans {
            if let (Chosen::Trained, Some((adapter, values))) = (chosen, &trained) {
                let table = adapter.tables().head(&**self.head(), values.view(), None);
                let part = hidden.view().slice_rows(rows.clone());
                table.logits(part, logits.view_mut().slice_rows(rows.clone()), self.workspace())?;
            }
        }
        Ok(logits)
    }

    /// The losses of rows whose head may be an adapter's: without one, in one pass that never has all logits.
    pub(super) fn head_loss(&self, hidden: &Matrix, targets: &[i64], spans: &[Span]) -> Result<LossSum> {
        if !spans.iter().any(|span| self.changes_head(span)) {
            return Ok(linear_cross_entropy::forward(hidden.view(), &**self.head(), targets, self.workspace())?);
        }
        if let (Some((adapter, values)), [(_, Chosen::Trained)]) = (self.trained_tables()?, spans) {
            let table = adapter.tables().head(&**self.head(), values.view(), None);
            return Ok(linear_cross_entropy::forward_with(hidden.view(), table, targets, self.workspace())?);
        }
        let sum = self.head_losses(hidden, targets, spans)?.iter().sum();
        let trained_tokens = targets.iter().filter(|target| **target != IGNORE_INDEX).count();
        Ok(LossSum { sum, trained_tokens })
    }

    /// The loss of every row, 0 without a target, where the heads of adapters are computed by their logits: a few rows at a time.
    pub(super) fn head_losses(&self, hidden: &Matrix, targets: &[i64], spans: &[Span]) -> Result<Vec<f64>> {
        const ROWS: usize = 64;
        let mut losses = vec![0.0; hidden.rows()];
        for start in (0..hidden.rows()).step_by(ROWS) {
            let rows = start..hidden.rows().min(start + ROWS);
            let mut part = self.workspace().matrix(rows.len(), hidden.cols())?;
            part.view_mut().copy_from(hidden.view().slice_rows(rows.clone()))?;
            let inside = spans.iter().filter(|(span, _)| span.start < rows.end && rows.start < span.end);
            let clip =
                |span: &Range<usize>| span.start.max(rows.start) - rows.start..span.end.min(rows.end) - rows.start;
            let spans: Vec<Span> = inside.map(|(span, chosen)| (clip(span), *chosen)).collect();
            let logits = self.head_logits(&part, &spans)?.to_vec()?;
            let of_rows = losses[rows.clone()].iter_mut().zip(&targets[rows]);
            for (row, (loss, &target)) in logits.chunks_exact(self.config().vocab_size).zip(of_rows) {
                if target == IGNORE_INDEX {
                    continue;
                }
                let chosen = usize::try_from(target).ok().and_then(|target| row.get(target)).ok_or_else(|| {
                    Error::Invalid(format!("the target {target} is outside the vocabulary of {}", row.len()))
                })?;
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
                *loss = sum.ln() + f64::from(largest) - f64::from(*chosen);
            }
        }
        Ok(losses)
    }
}
