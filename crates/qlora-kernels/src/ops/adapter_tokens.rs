//! The adapter's changes between tokens and vectors: of the embedding's output, and of the logits of tokens whose rows
//! of the head were trained.
//!
//! ```text
//! x[t]           = gain * (e[t] + scale * B A[:, id[t]])       e[t] = own row of id[t], or else what the embedding made
//! logits[t][id]  = hidden[t] . own row of id
//! ```
//!
//! `x`, `hidden`: `[tokens, width]`; A `[rank, vocabulary]`, B `[width, rank]`, gain and own rows `[width]`, all in the
//! adapter's f32 values; `logits`: `[tokens, vocabulary]`, of which only the trained tokens' columns are written. Sums are f32.

use std::collections::HashMap;
use std::ops::Range;

use super::linear_group::LoraSlot;
use crate::error::{Error, Result};
use crate::view::{View, ViewMut};

/// An adapter's change of the embedding's output; ranges are elements of `values`.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingDelta<'a> {
    /// The adapter's numbers, f32, one row.
    pub values: View<'a>,
    /// Rows of the table that it has itself, by token.
    pub tokens: &'a HashMap<u32, Range<usize>>,
    /// A `[rank, vocabulary]`, B `[width, rank]`.
    pub lora: Option<&'a LoraSlot>,
    /// DoRA's factor of every column.
    pub gain: Option<&'a Range<usize>>,
}

impl EmbeddingDelta<'_> {
    /// Changes the rows `x` that the embedding made of `tokens`.
    ///
    /// # Errors
    /// If a size does not fit, a token is outside the adapter's vocabulary, or `x` is not where the values are.
    pub fn apply(&self, tokens: &[u32], x: ViewMut) -> Result<()> {
        const OP: &str = "adapter_embedding";
        let width = x.cols();
        Error::check_shape(OP, "the tokens", &[tokens.len()], &[x.rows()])?;
        let mut vocabulary = usize::MAX;
        if let Some(slot) = self.lora {
            vocabulary = slot.a.len() / slot.rank.max(1);
            Error::check_shape(OP, "A", &[slot.a.len()], &[slot.rank * vocabulary])?;
            Error::check_shape(OP, "B", &[slot.b.len()], &[width * slot.rank])?;
        }
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocabulary) {
            return Err(Error::invalid(
                OP,
                format!("token id {id} is outside the adapter's vocabulary of {vocabulary}"),
            ));
        }
        let own = |id: &u32| self.tokens.get(id);
        let ranges = self.lora.into_iter().flat_map(|slot| [&slot.a, &slot.b]);
        check(OP, self.values, ranges.chain(self.gain).chain(tokens.iter().filter_map(own)))?;
        let mut vectors = self.gain.into_iter().chain(tokens.iter().filter_map(own));
        if let Some(range) = vectors.find(|range| range.len() != width) {
            return Err(Error::invalid(OP, format!("a vector of {} elements, expected {width}", range.len())));
        }
        if x.rows() * width == 0
            || (self.lora.is_none() && self.gain.is_none() && !tokens.iter().any(|id| own(id).is_some()))
        {
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        if x.gpu().is_some() {
            return crate::cuda::adapter_tokens::embedding(OP, self, tokens, vocabulary, x.cuda(OP)?);
        }
        let values = self.values.host(OP)?;
        let values = values.row(0);
        for (row, id) in x.host(OP)?.rows_mut().zip(tokens) {
            if let Some(own) = own(id) {
                row.copy_from_slice(&values[own.clone()]);
            }
            if let Some(slot) = self.lora {
                let (a, b) = (&values[slot.a.clone()], &values[slot.b.clone()]);
                for (y, b) in row.iter_mut().zip(b.chunks_exact(slot.rank.max(1))) {
                    let sum: f32 = b.iter().enumerate().map(|(c, b)| a[c * vocabulary + *id as usize] * b).sum();
                    *y += slot.scale * sum;
                }
            }
            if let Some(gain) = self.gain {
                row.iter_mut().zip(&values[gain.clone()]).for_each(|(y, g)| *y *= g);
            }
        }
        Ok(())
    }
}

/// Writes the logits of `tokens`, whose rows of the head are parts of `values` (f32, one row).
///
/// # Errors
/// If a size does not fit, a token is not a column of `logits`, or the views are not on the same device.
pub fn head(values: View, tokens: &HashMap<u32, Range<usize>>, hidden: View, logits: ViewMut) -> Result<()> {
    const OP: &str = "adapter_head";
    let (rows, width) = (hidden.rows(), hidden.cols());
    logits.expect(OP, "the logits", rows, logits.cols())?;
    check(OP, values, tokens.values())?;
    for (id, range) in tokens {
        Error::check_shape(OP, "a token's row", &[range.len()], &[width])?;
        if *id as usize >= logits.cols() {
            let message = format!("token id {id} is outside the vocabulary of {}", logits.cols());
            return Err(Error::invalid(OP, message));
        }
    }
    if tokens.is_empty() || rows == 0 {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if logits.gpu().is_some() {
        return crate::cuda::adapter_tokens::head(OP, values.cuda(OP)?, tokens, hidden.cuda(OP)?, logits.cuda(OP)?);
    }
    let (values, hidden) = (values.host(OP)?, hidden.host(OP)?);
    for (i, row) in logits.host(OP)?.rows_mut().enumerate() {
        for (&id, own) in tokens {
            row[id as usize] = hidden.row(i).iter().zip(&values.row(0)[own.clone()]).map(|(h, w)| h * w).sum();
        }
    }
    Ok(())
}

/// The values are one row, and the ranges lie in it.
fn check<'a>(op: &'static str, values: View, ranges: impl Iterator<Item = &'a Range<usize>>) -> Result<()> {
    Error::check_shape(op, "the adapter's rows", &[values.rows()], &[1])?;
    let len = values.cols();
    for range in ranges {
        if range.start > range.end || range.end > len {
            return Err(Error::invalid(op, format!("elements {range:?} of an adapter of {len}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Window, assert_close, random, to_f64};

    const WIDTH: usize = 7;
    const VOCABULARY: usize = 11;
    const RANK: usize = 3;

    #[test]
    fn the_embedding_gets_own_rows_then_the_low_rank_part_then_the_gain() {
        let mut random = random(5);
        let values = random(RANK * VOCABULARY + WIDTH * RANK + WIDTH + 2 * WIDTH);
        let (ab, gain) = (RANK * VOCABULARY, RANK * VOCABULARY + WIDTH * RANK);
        let slot = LoraSlot { a: 0..ab, b: ab..gain, rank: RANK, scale: -0.7, stream: 0, kind: Default::default() };
        let (gain, own) = (gain..gain + WIDTH, gain + WIDTH);
        let trained = HashMap::from([(4, own..own + WIDTH), (10, own + WIDTH..own + 2 * WIDTH)]);
        let (none, ids) = (HashMap::new(), [4u32, 0, 10, 4, 7]);
        let x = random(ids.len() * WIDTH);
        let v = to_f64(&values);
        for case in 0..8 {
            let (tokens, lora, g) = (case & 1 > 0, case & 2 > 0, case & 4 > 0);
            let delta = EmbeddingDelta {
                values: View::vector(&values),
                tokens: if tokens { &trained } else { &none },
                lora: lora.then_some(&slot),
                gain: g.then_some(&gain),
            };
            let mut got = Window::of(&x, ids.len(), WIDTH, 2);
            delta.apply(&ids, got.view_mut()).unwrap();
            let mut want = Vec::new();
            for (t, id) in ids.iter().enumerate() {
                for j in 0..WIDTH {
                    let mut y = f64::from(x[t * WIDTH + j]);
                    if let Some(own) = trained.get(id).filter(|_| tokens) {
                        y = v[own.start + j];
                    }
                    if lora {
                        let sum: f64 = (0..RANK).map(|c| v[c * VOCABULARY + *id as usize] * v[ab + j * RANK + c]).sum();
                        y += -0.7 * sum;
                    }
                    want.push(if g { y * v[gain.start + j] } else { y });
                }
            }
            assert_close("x", &got.to_vec(), &want, 2e-6);
        }
        let delta = EmbeddingDelta { values: View::vector(&values), tokens: &none, lora: Some(&slot), gain: None };
        let mut got = Window::of(&x, ids.len(), WIDTH, 0);
        let error = delta.apply(&[0, 1, 2, 3, 11], got.view_mut()).unwrap_err().to_string();
        assert!(error.contains("token id 11 is outside the adapter's vocabulary of 11"), "{error}");
        let (short, long) = (HashMap::from([(0, 0..WIDTH - 1)]), HashMap::from([(0, own..own + 3 * WIDTH)]));
        for (tokens, message) in [(&short, "a vector of 6 elements"), (&long, "of an adapter of")] {
            let delta = EmbeddingDelta { tokens, lora: None, ..delta };
            let error = delta.apply(&[0; 5], got.view_mut()).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn logits_of_trained_tokens_are_written_and_no_others() {
        let mut random = random(6);
        let (values, hidden) = (random(3 + 2 * WIDTH), random(4 * WIDTH));
        let tokens = HashMap::from([(9, 3..3 + WIDTH), (0, 3 + WIDTH..3 + 2 * WIDTH)]);
        let before = random(4 * VOCABULARY);
        let mut got = Window::of(&before, 4, VOCABULARY, 3);
        let hidden_view = View::new(&hidden, 4, WIDTH);
        head(View::vector(&values), &tokens, hidden_view, got.view_mut()).unwrap();
        let mut want = to_f64(&before);
        for t in 0..4 {
            for (id, own) in &tokens {
                let dot = hidden[t * WIDTH..][..WIDTH].iter().zip(&values[own.clone()]);
                want[t * VOCABULARY + *id as usize] = dot.map(|(h, w)| f64::from(*h) * f64::from(*w)).sum();
            }
        }
        assert_close("logits", &got.to_vec(), &want, 1e-6);
        for (tokens, message) in [
            (HashMap::from([(11, 0..WIDTH)]), "token id 11 is outside the vocabulary of 11"),
            (HashMap::from([(1, 0..WIDTH + 1)]), "a token's row"),
            (HashMap::from([(1, 11..11 + WIDTH)]), "of an adapter of 17"),
        ] {
            let error = head(View::vector(&values), &tokens, hidden_view, got.view_mut()).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
