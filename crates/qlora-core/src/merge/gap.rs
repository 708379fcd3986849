//! The difference between a merged model and its base with the adapter, on a text.
//!
//! Both models see the same tokens. From their logits l and m at every position:
//!
//! ```text
//! largest and mean |l - m|
//! divergence   = mean over positions of KL(softmax l || softmax m), in nats
//! same best    = share of positions whose most probable token is the same
//! perplexity   = exp(mean over positions of -log softmax(l)[next token])
//! ```
//!
//! One model is loaded at a time; between them the first one's logits are kept, `tokens x vocab_size` f32.

use qlora_kernels::SequenceLayout;

use super::source::{MergeInto, MergedSource, Rounding};
use super::update::WeightUpdate;
use crate::error::{Error, Result};
use crate::model::{AdapterChoice, CausalLm, LoadOptions, Quantization};
use crate::source::WeightSource;

/// Tokens that are compared at most by default: the logits of 512 tokens over 128,256 entries are 0.26 GB.
pub const DEFAULT_TOKENS: usize = 512;

/// The difference of two models on a text.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Gap {
    /// Tokens of the text that were used.
    pub tokens: usize,
    /// Perplexity of the first model: base and adapter.
    pub perplexity_before: f64,
    /// Perplexity of the second: the merged one.
    pub perplexity_after: f64,
    /// The largest difference of two logits.
    pub largest: f32,
    /// The mean magnitude of the differences.
    pub mean: f64,
    /// The mean Kullback-Leibler divergence of the predictions, in nats.
    pub divergence: f64,
    /// The share of positions at which both find the same token most probable.
    pub same_best: f64,
}

/// The logits of a model on a text, to compare others with.
#[derive(Debug)]
pub struct Reference {
    tokens: Vec<u32>,
    vocab: usize,
    logits: Vec<f32>,
}

impl Reference {
    /// Runs a model over the first tokens of a text: at most `limit`, and at most as many as it takes.
    ///
    /// # Errors
    /// If there are fewer than two tokens, or one is outside the vocabulary.
    pub fn new(model: &CausalLm, tokens: &[u32], limit: usize) -> Result<Self> {
        let count = tokens.len().min(limit).min(model.config().max_position_embeddings);
        if count < 2 {
            return Err(Error::Invalid("a text of at least two tokens is needed to compare models on".to_owned()));
        }
        let tokens = tokens[..count].to_vec();
        let logits = logits(model, &tokens)?;
        Ok(Self { tokens, vocab: model.config().vocab_size, logits })
    }

    /// The tokens that are compared.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Compares another model with this one.
    ///
    /// # Errors
    /// If it has another vocabulary, or cannot be run.
    pub fn gap(&self, model: &CausalLm) -> Result<Gap> {
        if model.config().vocab_size < self.vocab {
            let (got, expected) = (model.config().vocab_size, self.vocab);
            return Err(Error::Invalid(format!("a vocabulary of {got} cannot be compared with one of {expected}")));
        }
        let other = logits(model, &self.tokens)?;
        let width = model.config().vocab_size;
        let rows = self.logits.chunks_exact(self.vocab).zip(other.chunks_exact(width));
        let mut gap = Gap {
            tokens: self.tokens.len(),
            perplexity_before: 0.0,
            perplexity_after: 0.0,
            largest: 0.0,
            mean: 0.0,
            divergence: 0.0,
            same_best: 0.0,
        };
        for (position, (before, after)) in rows.enumerate() {
            // Rows that a resized vocabulary has beyond are left out: the first model has nothing to compare them with.
            let after = &after[..self.vocab];
            let (norm_before, norm_after) = (log_sum_exp(before), log_sum_exp(after));
            for (&l, &m) in before.iter().zip(after) {
                let difference = (l - m).abs();
                gap.largest = if difference.is_nan() { f32::NAN } else { gap.largest.max(difference) };
                gap.mean += f64::from(difference);
                let (log_p, log_q) = (f64::from(l) - norm_before, f64::from(m) - norm_after);
                gap.divergence += log_p.exp() * (log_p - log_q);
            }
            gap.same_best += f64::from(u8::from(best(before) == best(after)));
            if let Some(&next) = self.tokens.get(position + 1) {
                gap.perplexity_before += norm_before - f64::from(before[next as usize]);
                gap.perplexity_after += norm_after - f64::from(after[next as usize]);
            }
        }
        let positions = self.tokens.len() as f64;
        gap.mean /= positions * self.vocab as f64;
        gap.divergence = (gap.divergence / positions).max(0.0);
        gap.same_best /= positions;
        gap.perplexity_before = (gap.perplexity_before / (positions - 1.0)).exp();
        gap.perplexity_after = (gap.perplexity_after / (positions - 1.0)).exp();
        Ok(gap)
    }
}

/// Measures what merging changes for each way of merging: `base`, held as `quantization` says, with the adapter that
/// `put_on` gives it (such as [`CausalLm::load_adapter`] and [`CausalLm::activate_adapter`]) and that `update` stands for,
/// against the merged weights in the precision they are stored in. Without quantization there is one way, the original.
/// The unmerged model, then each merged one, are loaded one after the other. The reference is returned for more
/// comparisons.
///
/// # Errors
/// If a model cannot be loaded, or the text has fewer than two tokens.
pub fn measure(
    base: &dyn WeightSource,
    update: &dyn WeightUpdate,
    put_on: impl FnOnce(&mut CausalLm) -> Result<()>,
    quantization: Quantization,
    tokens: &[u32],
    limit: usize,
) -> Result<(Reference, Vec<(MergeInto, Gap)>)> {
    let mut model = CausalLm::load(base, LoadOptions { quantization, ..LoadOptions::default() })?;
    put_on(&mut model)?;
    let reference = Reference::new(&model, tokens, limit)?;
    drop(model);
    let mut ways = vec![MergeInto::Original];
    if let Quantization::Bits4(config) = quantization {
        ways.push(MergeInto::Dequantized(config));
    }
    let gap = |into| {
        let merged = MergedSource::new(base, update, into, Rounding::Stored)?;
        let model = CausalLm::load(&merged, LoadOptions::default())?;
        Ok((into, reference.gap(&model)?))
    };
    let gaps = ways.into_iter().map(gap).collect::<Result<_>>()?;
    Ok((reference, gaps))
}

fn logits(model: &CausalLm, tokens: &[u32]) -> Result<Vec<f32>> {
    let logits = model.logits(tokens, &SequenceLayout::from_lengths(&[tokens.len()]), AdapterChoice::Active)?;
    Ok(logits.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1()?)
}

fn log_sum_exp(row: &[f32]) -> f64 {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x));
    f64::from(max) + row.iter().map(|&x| f64::from(x - max).exp()).sum::<f64>().ln()
}

fn best(row: &[f32]) -> usize {
    row.iter().enumerate().fold(0, |best, (i, x)| if *x > row[best] { i } else { best })
}
