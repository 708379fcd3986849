//! Token embedding: row `tokens[i]` of a frozen table `[vocabulary, width]` becomes row `i` of `[tokens, width]`, in f32.
//!
//! The table is frozen, so there is no backward.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};

use crate::error::{Error, Result};
use crate::parallel::rows_per_task;
use crate::view::ViewMut;
use crate::weight::FrozenWeight;

/// `out[i] = table[tokens[i]]`.
///
/// # Errors
/// If `out` is not `[tokens, width]` or not where the table is, or a token id is outside the table; nothing is written then.
pub fn forward(tokens: &[u32], table: &dyn FrozenWeight, out: ViewMut) -> Result<()> {
    const OP: &str = "embedding";
    out.expect(OP, "out", tokens.len(), table.cols())?;
    if let Some(i) = tokens.iter().position(|&id| id as usize >= table.rows()) {
        let (id, rows) = (tokens[i], table.rows());
        return Err(Error::invalid(
            OP,
            format!("token id {id} at position {i} is outside the vocabulary of {rows}; do tokenizer and model match?"),
        ));
    }
    #[cfg(feature = "cuda")]
    if out.gpu().is_some() {
        return crate::cuda::linear::embedding(OP, tokens, table, out.cuda(OP)?);
    }
    let rows = out.host(OP)?.par_rows_mut().zip_eq(tokens);
    rows.with_min_len(rows_per_task(table.cols())).for_each(|(row, &id)| {
        let id = id as usize;
        table.dequantize_rows(id..id + 1, row);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SHAPES, Window, random};
    use crate::weight::{PlainData, PlainWeight};

    #[test]
    fn rows_are_gathered() {
        for (rows, cols) in SHAPES {
            let data = random(1)(5 * cols);
            let table = PlainWeight::new(PlainData::F32(data.clone()), 5, cols);
            let tokens: Vec<u32> = (0..rows).map(|i| (i * 7 % 5) as u32).collect();
            let mut out = Window::poisoned(rows, cols, 2);
            forward(&tokens, &table, out.view_mut()).unwrap();
            let want: Vec<f32> =
                tokens.iter().flat_map(|&id| data[id as usize * cols..][..cols].iter().copied()).collect();
            assert_eq!(out.to_vec(), want);
        }
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_named_and_nothing_is_written() {
        let table = PlainWeight::new(PlainData::F32(vec![1.0; 8]), 4, 2);
        let mut out = vec![f32::NAN; 6];
        let error = forward(&[3, 0, 4], &table, ViewMut::new(&mut out, 3, 2)).unwrap_err();
        assert!(error.to_string().contains("token id 4 at position 2 is outside the vocabulary of 4"), "{error}");
        assert!(out.iter().all(|x| x.is_nan()));
        let error = forward(&[3, 0], &table, ViewMut::new(&mut out, 3, 2)).unwrap_err();
        assert_eq!(error.to_string(), "embedding: out has shape [3, 2], expected [2, 2]");
    }
}
