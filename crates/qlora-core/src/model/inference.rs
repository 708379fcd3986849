//! Running a model without gradients: losses, logits, and the next tokens of texts with a cache.

use candle_core::Tensor;
use qlora_kernels::ops::linear_cross_entropy::LossSum;
use qlora_kernels::ops::{embedding, frozen_linear};
use qlora_kernels::{Matrix, SequenceLayout, ViewMut};

use super::adapters::{AdapterChoices, Span};
use super::block::Pass;
use super::cache::KvCache;
use super::causal_lm::CausalLm;
use super::context::{SequenceExchange, Share, with_a_token_each};
use crate::batch::{Batch, IGNORE_INDEX};
use crate::error::{Error, Result};

impl CausalLm {
    /// The sum of the losses of a batch, without gradient and without dropout; of this rank's share of it, if
    /// [others share it](Self::set_sequence_exchange).
    ///
    /// # Errors
    /// If a token or target is outside the vocabulary, a sequence is too long, or a rank is gone.
    pub fn evaluate(&self, batch: &Batch) -> Result<LossSum> {
        if let Some(exchange) = &self.exchange {
            return self.evaluate_share(batch, &**exchange);
        }
        let spans = self.spans(batch.layout.sequences(), AdapterChoices::default())?;
        let hidden = self.hidden(&batch.tokens, &batch.layout, &spans)?;
        self.head_loss(&hidden, &batch.targets, &spans)
    }

    /// The logits of every token of a batch of sequences, `[tokens, vocab_size]`: for tests and analysis (training never makes them
    /// whole).
    ///
    /// # Errors
    /// If a token is outside the vocabulary, a sequence is too long, there is not one choice a sequence, or a chosen adapter is not
    /// loaded.
    pub fn logits<'a>(
        &self,
        tokens: &[u32],
        layout: &SequenceLayout,
        adapters: impl Into<AdapterChoices<'a>>,
    ) -> Result<Tensor> {
        let spans = self.spans(layout.sequences(), adapters.into())?;
        let hidden = self.hidden(tokens, layout, &spans)?;
        let logits = self.head_logits(&hidden, &spans)?;
        Ok(logits.into_tensor((tokens.len(), self.config.vocab_size))?)
    }

    /// An empty cache for a text of at most `capacity` tokens.
    pub fn new_cache(&self, capacity: usize) -> KvCache {
        let width = self.config.num_key_value_heads * self.config.head_dim;
        KvCache::new(self.config.num_hidden_layers, width, capacity)
    }

    /// Runs the next tokens of each sequence, whose earlier ones are in its cache, and returns the logits that follow the last of
    /// them, `[sequences, vocab_size]`; each weight is read once for all. The contents of a cache were made with the adapter of its
    /// sequence: a sequence keeps its choice.
    ///
    /// # Errors
    /// If a sequence has no token, a cache is too small, a token is outside the vocabulary, there is not one cache or choice a
    /// sequence, or a chosen adapter is not loaded. The caches are then as before.
    pub fn next_logits<'a>(
        &self,
        sequences: &[&[u32]],
        caches: &mut [&mut KvCache],
        adapters: impl Into<AdapterChoices<'a>>,
    ) -> Result<Matrix> {
        if sequences.len() != caches.len() {
            let (got, expected) = (caches.len(), sequences.len());
            return Err(Error::Invalid(format!("{expected} sequences need as many caches, {got} were given")));
        }
        if sequences.is_empty() || sequences.iter().any(|tokens| tokens.is_empty()) {
            return Err(Error::Invalid("generation needs at least one token to start from".into()));
        }
        let seen: Vec<usize> = caches.iter().map(|cache| cache.len()).collect();
        let result = self.run_cached(sequences, caches, &seen, adapters.into());
        if result.is_err() {
            caches.iter_mut().zip(&seen).for_each(|(cache, &len)| cache.truncate(len));
        }
        result
    }

    fn run_cached(
        &self,
        sequences: &[&[u32]],
        caches: &mut [&mut KvCache],
        seen: &[usize],
        choices: AdapterChoices,
    ) -> Result<Matrix> {
        let tokens = sequences.concat();
        let lengths: Vec<usize> = sequences.iter().map(|tokens| tokens.len()).collect();
        let layout = SequenceLayout::from_lengths(&lengths);
        let ends = || seen.iter().zip(&lengths).map(|(seen, len)| seen + len);
        let rope = self.stack.rope(ends().max().unwrap_or(0))?;
        let positions: Vec<u32> = seen.iter().zip(ends()).flat_map(|(&seen, end)| seen as u32..end as u32).collect();
        let spans = self.spans(layout.sequences(), choices)?;
        #[cfg(feature = "cuda")]
        if layout.uniform_len() == Some(1)
            && let Some(logits) = self.decode_step(&tokens, caches, &rope, &spans)?
        {
            return Ok(logits);
        }
        let x = self.embed_with(&tokens, &spans)?;
        let hidden = self.with_pass(&spans, |adapter| {
            let pass = Pass { adapter, layout: &layout, share: None, rope: &rope, workspace: &self.workspace };
            self.stack.infer_cached(x, &positions.into(), caches, &pass)
        })?;
        let last = match hidden.rows() == sequences.len() {
            true => hidden,
            false => {
                let mut last = self.workspace.matrix(sequences.len(), hidden.cols())?;
                for (row, range) in layout.sequences().enumerate() {
                    let from = hidden.view().slice_rows(range.end - 1..range.end);
                    last.view_mut().slice_rows(row..row + 1).copy_from(from)?;
                }
                last
            }
        };
        let rows: Vec<_> = (0..sequences.len()).map(|row| row..row + 1).collect();
        self.head_logits(&last, &self.spans(rows.into_iter(), choices)?)
    }

    /// The losses of this rank's rows.
    fn evaluate_share(&self, batch: &Batch, exchange: &dyn SequenceExchange) -> Result<LossSum> {
        let batch = with_a_token_each(batch, Some(exchange));
        let share = Share::new(exchange, &batch.layout);
        let (rows, layout) = (share.rows(), &batch.layout);
        let rope = self.stack.rope(layout.max_len())?;
        let spans = self.spans(std::iter::once(0..rows.len()), AdapterChoices::default())?;
        let x = self.embed_with(&batch.tokens[rows.clone()], &spans)?;
        let hidden = self.with_pass(&spans, |adapter| {
            let pass = Pass { adapter, layout, share: Some(&share), rope: &rope, workspace: &self.workspace };
            self.stack.infer(x, &pass)
        })?;
        let targets = &batch.targets[rows];
        if targets.iter().all(|&target| target == IGNORE_INDEX) {
            return Ok(LossSum::default());
        }
        self.head_loss(&hidden, targets, &spans)
    }

    pub(super) fn hidden(&self, tokens: &[u32], layout: &SequenceLayout, spans: &[Span]) -> Result<Matrix> {
        let rope = self.stack.rope(layout.max_len())?;
        let x = self.embed_with(tokens, spans)?;
        self.with_pass(spans, |adapter| {
            self.stack.infer(x, &Pass { adapter, layout, share: None, rope: &rope, workspace: &self.workspace })
        })
    }

    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Matrix> {
        let mut x = self.workspace.matrix(tokens.len(), self.config.hidden_size)?;
        embedding::forward(tokens, &*self.embedding, x.view_mut())?;
        Ok(x)
    }

    pub(super) fn base_logits(&self, hidden: &Matrix, logits: ViewMut) -> Result<()> {
        Ok(frozen_linear::forward(hidden.view(), &*self.head, logits, 0.0, &self.workspace)?)
    }
}
