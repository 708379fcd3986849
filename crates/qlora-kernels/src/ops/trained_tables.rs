//! Trained parts of a model's two tables: the embedding's and the head's `[vocabulary, width]`, of which an adapter holds rows
//! of some tokens or the whole, or A and B, in its f32 values.
//!
//! ```text
//! x[t]      = W'[id[t]] + s B A[:, id[t]]                      dW'[id[t]] += dx[t]
//!                                      dB += s dx[t] A[:, id[t]]^T      dA[:, id[t]] += s B^T dx[t]
//! logits    = hidden W'^T + s drop(hidden) A^T B^T             dW' += dlogits^T hidden
//!                                      dhidden = dlogits W' + the part of A and B (lora_linear)
//! ```
//!
//! Embedding: A `[r, vocabulary]`, B `[width, r]`; head: A `[r, width]`, B `[vocabulary, r]`. `W'` is the frozen table with the adapter's rows in place of its own. `x`, `hidden`: `[tokens, width]`, `logits`:
//! `[tokens, vocabulary]`. Only the adapter's rows get a gradient. The frozen table's products run as ever; those of single
//! tokens are one more small product each, with the tokens' columns of `dlogits` side by side. Of a tied model both ends name the
//! same rows, whose gradient is the sum of both.
//!
//! On CUDA rows of tokens are trained by copies and products that other operations use; a whole table, and A and B, are refused.

use std::collections::HashMap;
use std::ops::Range;

use super::adapter_tokens::{self, EmbeddingDelta};
use super::dropout::Dropout;
use super::linear_group::LoraSlot;
use super::{embedding, frozen_linear, lora_linear, matmul};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::view::{View, ViewMut};
use crate::weight::FrozenWeight;

const OP: &str = "trained_table";

/// The parts of a table that an adapter holds; ranges are elements of its values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableChange {
    /// All rows, one after the other.
    pub whole: Option<Range<usize>>,
    /// Rows by token, one after the other in the values.
    pub tokens: HashMap<u32, Range<usize>>,
    /// A and B.
    pub lora: Option<LoraSlot>,
}

impl TableChange {
    /// Whether the adapter holds nothing of the table.
    pub fn is_empty(&self) -> bool {
        self.whole.is_none() && self.tokens.is_empty() && self.lora.is_none()
    }

    /// The tokens in the order in which their rows lie in the values, and the place of all of them.
    fn rows(&self, width: usize) -> Result<(Vec<u32>, Range<usize>)> {
        let mut tokens: Vec<(u32, &Range<usize>)> = self.tokens.iter().map(|(&id, range)| (id, range)).collect();
        tokens.sort_by_key(|(_, range)| range.start);
        let start = tokens.first().map_or(0, |(_, range)| range.start);
        for (position, (id, range)) in tokens.iter().enumerate() {
            let from = start + position * width;
            if **range != (from..from + width) {
                let message = format!("token {id} is trained at {range:?}, expected {:?}", from..from + width);
                return Err(Error::invalid(OP, message));
            }
        }
        let end = start + tokens.len() * width;
        Ok((tokens.into_iter().map(|(id, _)| id).collect(), start..end))
    }
}

/// A `[r, width]` and B `[vocabulary, r]` of a head.
struct HeadFactors<'a> {
    slot: &'a LoraSlot,
    a: View<'a>,
    b: View<'a>,
}

/// A table in a pass: the frozen weight, and the parts that an adapter has instead.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    /// `[vocabulary, width]`.
    pub weight: &'a dyn FrozenWeight,
    /// The adapter's parts, and its values: f32, one row. None: the frozen table alone.
    pub change: Option<(&'a TableChange, View<'a>)>,
    /// The dropout of the head's input on its way to A.
    pub dropout: Option<Dropout>,
}

impl<'a> Table<'a> {
    /// The frozen table alone.
    pub fn frozen(weight: &'a dyn FrozenWeight) -> Self {
        Self { weight, change: None, dropout: None }
    }

    /// The same table for the rows from `row` on.
    pub(crate) fn at_row(self, row: usize) -> Self {
        Self { dropout: self.dropout.map(|dropout| dropout.at_row(row)), ..self }
    }

    /// A and B of the head, with their scale.
    fn head_factors(&self) -> Result<Option<HeadFactors<'a>>> {
        let Some((change, values)) = self.change else { return Ok(None) };
        let Some(slot) = &change.lora else { return Ok(None) };
        let (inputs, outputs) = (self.weight.cols(), self.weight.rows());
        Error::check_shape(OP, "A and B", &[slot.a.len(), slot.b.len()], &[slot.rank * inputs, slot.rank * outputs])?;
        if slot.a.end.max(slot.b.end) > values.cols() {
            return Err(Error::invalid(OP, format!("A and B lie beyond the adapter's {} values", values.cols())));
        }
        #[cfg(feature = "cuda")]
        if values.gpu().is_some() {
            return Err(Error::invalid(OP, "LoRA on the head (lm_head) can be trained on the CPU only"));
        }
        let (a, b) = slot.factors(values, inputs, outputs);
        Ok(Some(HeadFactors { slot, a, b }))
    }

    /// Whether no part of it is an adapter's.
    pub(crate) fn is_frozen(&self) -> bool {
        self.change.is_none_or(|(change, _)| change.is_empty())
    }

    /// The whole table of the adapter, if it has one.
    fn whole(&self) -> Result<Option<(View<'a>, Range<usize>)>> {
        let Some((change, values)) = self.change else { return Ok(None) };
        let Some(range) = change.whole.clone() else { return Ok(None) };
        let (rows, width) = (self.weight.rows(), self.weight.cols());
        Error::check_shape(OP, "the adapter's rows", &[values.rows()], &[1])?;
        if range.len() != rows * width || range.end > values.cols() {
            let message = format!("elements {range:?} of {} are no table of {rows} x {width}", values.cols());
            return Err(Error::invalid(OP, message));
        }
        #[cfg(feature = "cuda")]
        if values.gpu().is_some() {
            let message = "a whole table (modules_to_save) can be trained on the CPU only";
            return Err(Error::invalid(OP, message));
        }
        Ok(Some((values.slice_cols(range.clone()).reshape(rows, width), range)))
    }

    /// The adapter's rows of single tokens, `[tokens, width]` in the type of the activations.
    fn token_rows(&self, range: Range<usize>, workspace: &Workspace) -> Result<Option<Matrix>> {
        let (width, Some((_, values))) = (self.weight.cols(), self.change) else { return Ok(None) };
        let mut rows = workspace.matrix(range.len() / width.max(1), width)?;
        let from = values.slice_cols(range).reshape(rows.rows(), width);
        rows.view_mut().copy_from(from)?;
        Ok(Some(rows))
    }

    /// `x[t] = W'[tokens[t]]`.
    ///
    /// # Errors
    /// If `x` is not `[tokens, width]` or not where the table is, a token is outside the table, or the adapter does not fit.
    pub fn embed(&self, tokens: &[u32], mut x: ViewMut) -> Result<()> {
        let Some((change, values)) = self.change.filter(|(change, _)| !change.is_empty()) else {
            return embedding::forward(tokens, self.weight, x);
        };
        match self.whole()? {
            None => embedding::forward(tokens, self.weight, x.reborrow())?,
            Some((table, _)) => {
                x.expect(OP, "x", tokens.len(), table.cols())?;
                check_tokens(tokens, table.rows())?;
                let table = table.host(OP)?;
                let rows = x.reborrow().host(OP)?;
                rows.rows_mut().zip(tokens).for_each(|(row, &id)| row.copy_from_slice(table.row(id as usize)));
            }
        }
        EmbeddingDelta { values, tokens: &change.tokens, lora: change.lora.as_ref(), gain: None }.apply(tokens, x)
    }

    /// Adds the gradient of the adapter's rows to their places in `gradient`, which is laid out as the values; `dx` is that of the
    /// rows that [`Table::embed`] made of these tokens.
    ///
    /// # Errors
    /// If sizes do not fit.
    pub fn embed_backward(&self, tokens: &[u32], dx: View, gradient: ViewMut, workspace: &Workspace) -> Result<()> {
        let Some((change, values)) = self.change.filter(|(change, _)| !change.is_empty()) else { return Ok(()) };
        let width = self.weight.cols();
        dx.expect(OP, "dx", tokens.len(), width)?;
        gradient.expect(OP, "the gradient", 1, values.cols())?;
        check_tokens(tokens, self.weight.rows())?;
        let whole = self.whole()?.map(|(_, range)| range);
        let (ids, range) = change.rows(width)?;
        #[cfg(feature = "cuda")]
        if dx.gpu().is_some() {
            if change.lora.is_some() {
                return Err(Error::invalid(OP, "LoRA on the embedding (embed_tokens) can be trained on the CPU only"));
            }
            return spread(&ids, range, tokens, dx, gradient, workspace);
        }
        let _ = (ids, range, workspace);
        let dx = dx.host(OP)?;
        let mut gradient = gradient.host(OP)?;
        let gradient = gradient.row_mut(0);
        for (t, id) in tokens.iter().enumerate() {
            let row = |whole: &Range<usize>| whole.start + *id as usize * width;
            let Some(start) = change.tokens.get(id).map(|own| own.start).or(whole.as_ref().map(row)) else { continue };
            gradient[start..start + width].iter_mut().zip(dx.row(t)).for_each(|(sum, d)| *sum += d);
        }
        let Some(slot) = &change.lora else { return Ok(()) };
        // The forward checked the places.
        let (values, vocabulary) = (values.host(OP)?.row(0), self.weight.rows());
        for (t, &id) in tokens.iter().enumerate() {
            for (j, d) in dx.row(t).iter().enumerate() {
                for c in 0..slot.rank {
                    let (a, b) = (slot.a.start + c * vocabulary + id as usize, slot.b.start + j * slot.rank + c);
                    gradient[a] += slot.scale * d * values[b];
                    gradient[b] += slot.scale * d * values[a];
                }
            }
        }
        Ok(())
    }

    /// `logits = hidden W'^T`.
    ///
    /// # Errors
    /// If sizes do not fit, or the device fails.
    pub fn logits(&self, hidden: View, mut logits: ViewMut, workspace: &Workspace) -> Result<()> {
        match self.whole()? {
            None => frozen_linear::forward(hidden, self.weight, logits.reborrow(), 0.0, workspace)?,
            Some((table, _)) => matmul::nt(hidden, table, logits.reborrow(), 1.0, 0.0)?,
        }
        if let Some(HeadFactors { slot, a, b }) = self.head_factors()? {
            let mut s = workspace.matrix(hidden.rows(), slot.rank)?;
            let (s, logits) = (s.view_mut(), logits.reborrow());
            lora_linear::forward(hidden, a, b, slot.scale, self.dropout, s, logits, workspace)?;
        }
        match self.change {
            Some((change, values)) => adapter_tokens::head(values, &change.tokens, hidden, logits),
            None => Ok(()),
        }
    }

    /// Writes `dhidden = dlogits W'` and, if `gradient` is given, adds the gradient of the adapter's rows to their places in it.
    /// `dlogits` is spoilt.
    ///
    /// # Errors
    /// If sizes do not fit, or the device fails.
    pub fn logits_backward(
        &self,
        hidden: View,
        mut dlogits: ViewMut,
        mut dhidden: ViewMut,
        mut gradient: Option<ViewMut>,
        workspace: &Workspace,
    ) -> Result<()> {
        let width = self.weight.cols();
        let change = self.change.filter(|(change, _)| !change.is_empty());
        let Some((change, _)) = change else {
            return frozen_linear::backward(dlogits.as_view(), self.weight, dhidden, 0.0, workspace);
        };
        let (ids, range) = change.rows(width)?;
        // The tokens' columns side by side, and zeros in their place: the rest of the product is the other rows'.
        let mut columns = workspace.matrix(dlogits.rows(), ids.len())?;
        for (position, &id) in ids.iter().enumerate() {
            let own = id as usize..id as usize + 1;
            columns
                .view_mut()
                .slice_cols(position..position + 1)
                .copy_from(dlogits.as_view().slice_cols(own.clone()))?;
            dlogits.reborrow().slice_cols(own).fill(0.0)?;
        }
        match self.whole()? {
            None => frozen_linear::backward(dlogits.as_view(), self.weight, dhidden.reborrow(), 0.0, workspace)?,
            Some((table, range)) => {
                matmul::nn(dlogits.as_view(), table, dhidden.reborrow(), 1.0, 0.0)?;
                if let Some(gradient) = &mut gradient {
                    let dtable = gradient.reborrow().slice_cols(range).reshape(table.rows(), width);
                    matmul::tn(dlogits.as_view(), hidden, dtable, 1.0, 1.0)?;
                }
            }
        }
        if let Some(HeadFactors { slot, a, b }) = self.head_factors()? {
            let (mut s, mut ds) =
                (workspace.matrix(hidden.rows(), slot.rank)?, workspace.matrix(hidden.rows(), slot.rank)?);
            let (scale, dy, dx) = (slot.scale, dlogits.as_view(), Some(dhidden.reborrow()));
            lora_linear::shrink(hidden, a, self.dropout, s.view_mut(), workspace)?;
            lora_linear::backward_input(dy, a, b, scale, self.dropout, ds.view_mut(), dx, workspace)?;
            if let Some(gradient) = &mut gradient {
                let (da, db) = slot.factors_mut(gradient.reborrow(), width, self.weight.rows());
                let (s, ds) = (s.view(), ds.view());
                lora_linear::backward_adapter(hidden, scale, self.dropout, s, dy, ds, da, db, workspace)?;
            }
        }
        let Some(rows) = self.token_rows(range.clone(), workspace)?.filter(|_| !ids.is_empty()) else { return Ok(()) };
        matmul::nn(columns.view(), rows.view(), dhidden, 1.0, 1.0)?;
        let Some(gradient) = gradient else { return Ok(()) };
        let drows = gradient.slice_cols(range).reshape(ids.len(), width);
        matmul::tn(columns.view(), hidden, drows, 1.0, 1.0)
    }
}

fn check_tokens(tokens: &[u32], rows: usize) -> Result<()> {
    match tokens.iter().find(|&&id| id as usize >= rows) {
        None => Ok(()),
        Some(id) => Err(Error::invalid(OP, format!("token id {id} is outside the vocabulary of {rows}"))),
    }
}

/// Adds the rows `dx` to the gradients of their tokens by a product with a matrix of ones and zeros.
#[cfg(feature = "cuda")]
fn spread(
    ids: &[u32],
    range: Range<usize>,
    tokens: &[u32],
    dx: View,
    gradient: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    if ids.is_empty() || tokens.is_empty() {
        return Ok(());
    }
    let columns: HashMap<u32, usize> = ids.iter().enumerate().map(|(column, &id)| (id, column)).collect();
    let mut ones = vec![0.0; tokens.len() * ids.len()];
    for (row, id) in tokens.iter().enumerate() {
        if let Some(column) = columns.get(id) {
            ones[row * ids.len() + column] = 1.0;
        }
    }
    let uploaded = workspace.upload(&ones, tokens.len(), ids.len())?;
    let mut chosen = workspace.matrix(tokens.len(), ids.len())?;
    chosen.view_mut().copy_from(uploaded.view())?;
    let width = dx.cols();
    matmul::tn(chosen.view(), dx, gradient.slice_cols(range).reshape(ids.len(), width), 1.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, numeric_gradient, random, to_f64};
    use crate::weight::{PlainData, PlainWeight};

    const VOCABULARY: usize = 11;
    const WIDTH: usize = 7;

    /// Weight, values and what the adapter holds: rows of tokens, or the whole table, or both.
    fn case(whole: bool, tokens: bool) -> (PlainWeight, Vec<f32>, TableChange) {
        let mut random = random(9);
        let weight = PlainWeight::new(PlainData::F32(random(VOCABULARY * WIDTH)), VOCABULARY, WIDTH);
        let values = random(5 + (VOCABULARY + 2) * WIDTH);
        let own = 5 + VOCABULARY * WIDTH;
        let rows = [(9, own..own + WIDTH), (2, own + WIDTH..own + 2 * WIDTH)];
        let tokens = if tokens { HashMap::from(rows) } else { HashMap::new() };
        (weight, values, TableChange { whole: whole.then_some(5..own), tokens, lora: None })
    }

    /// The table with the adapter's rows.
    fn table(weight: &PlainWeight, values: &[f64], change: &TableChange) -> Vec<f64> {
        let mut frozen = vec![0.0; VOCABULARY * WIDTH];
        weight.dequantize_rows(0..VOCABULARY, &mut frozen);
        let mut table = change.whole.clone().map_or_else(|| to_f64(&frozen), |whole| values[whole].to_vec());
        for (id, own) in &change.tokens {
            table[*id as usize * WIDTH..][..WIDTH].copy_from_slice(&values[own.clone()]);
        }
        table
    }

    #[test]
    fn both_ends_and_their_gradients_match_f64() {
        let ids = [4u32, 2, 9, 2, 0, 10];
        for (whole, tokens) in [(false, true), (true, false), (true, true)] {
            let (weight, values, change) = case(whole, tokens);
            let workspace = Workspace::poisoned();
            let of = Table { weight: &weight, change: Some((&change, View::vector(&values))), dropout: None };
            let exact = to_f64(&values);

            let mut x = workspace.matrix(ids.len(), WIDTH).unwrap();
            of.embed(&ids, x.view_mut()).unwrap();
            let w = table(&weight, &exact, &change);
            let want: Vec<f64> = ids.iter().flat_map(|&id| w[id as usize * WIDTH..][..WIDTH].to_vec()).collect();
            assert_close("x", x.as_slice(), &want, 1e-7);

            let mut random = random(3);
            let dx = random(ids.len() * WIDTH);
            let loss = |v: &[f64]| -> f64 {
                let w = table(&weight, v, &change);
                let rows = ids.iter().zip(dx.chunks_exact(WIDTH));
                rows.map(|(&id, d)| dot(&w[id as usize * WIDTH..][..WIDTH], &to_f64(d))).sum()
            };
            let before = random(values.len());
            let mut gradient = before.clone();
            of.embed_backward(&ids, View::new(&dx, ids.len(), WIDTH), ViewMut::vector(&mut gradient), &workspace)
                .unwrap();
            let added: Vec<f32> = gradient.iter().zip(&before).map(|(after, before)| after - before).collect();
            assert_close("embedding", &added, &numeric_gradient(&exact, &[1.0], |v| vec![loss(v)]), 1e-5);

            let hidden = random(ids.len() * WIDTH);
            let product = |w: &[f64], hidden: &[f64]| -> Vec<f64> {
                hidden
                    .chunks_exact(WIDTH)
                    .flat_map(|h| w.chunks_exact(WIDTH).map(|w| dot(w, h)).collect::<Vec<_>>())
                    .collect()
            };
            let mut logits = workspace.matrix(ids.len(), VOCABULARY).unwrap();
            let view = View::new(&hidden, ids.len(), WIDTH);
            of.logits(view, logits.view_mut(), &workspace).unwrap();
            assert_close("logits", logits.as_slice(), &product(&w, &to_f64(&hidden)), 1e-5);

            let dlogits = random(ids.len() * VOCABULARY);
            let d = to_f64(&dlogits);
            logits.as_mut_slice().copy_from_slice(&dlogits);
            let mut dhidden = workspace.matrix(ids.len(), WIDTH).unwrap();
            let mut gradient = before.clone();
            let target = Some(ViewMut::vector(&mut gradient));
            of.logits_backward(view, logits.view_mut(), dhidden.view_mut(), target, &workspace).unwrap();
            let of_hidden = numeric_gradient(&to_f64(&hidden), &d, |h| product(&w, h));
            assert_close("dhidden", dhidden.as_slice(), &of_hidden, 1e-5);
            let added: Vec<f32> = gradient.iter().zip(&before).map(|(after, before)| after - before).collect();
            let of_values = numeric_gradient(&exact, &d, |v| product(&table(&weight, v, &change), &to_f64(&hidden)));
            assert_close("head", &added, &of_values, 1e-5);
        }
    }

    fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn factors_at_both_ends_match_f64() {
        const RANK: usize = 3;
        let (weight, _, _) = case(false, false);
        let mut random = random(21);
        let values = random(2 + RANK * (VOCABULARY + WIDTH));
        let (ids, middle) = ([4u32, 2, 9, 2], 2 + RANK * VOCABULARY);
        let slot = |a, b| LoraSlot { a, b, rank: RANK, scale: -0.7, stream: 0, kind: Default::default() };
        let (exact, workspace) = (to_f64(&values), Workspace::poisoned());
        let w = table(&weight, &exact, &TableChange::default());
        // `long [r, vocabulary]` and `short [width, r]` of the embedding; of the head the other way round, transposed.
        let changed = |long: &dyn Fn(usize, usize) -> f64, short: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
            let element = |id: usize, j: usize| {
                w[id * WIDTH + j] - 0.7 * (0..RANK).map(|c| long(c, id) * short(j, c)).sum::<f64>()
            };
            (0..VOCABULARY).flat_map(|id| (0..WIDTH).map(|j| element(id, j)).collect::<Vec<_>>()).collect()
        };

        let change = TableChange { lora: Some(slot(2..middle, middle..values.len())), ..TableChange::default() };
        let of = Table { weight: &weight, change: Some((&change, View::vector(&values))), dropout: None };
        let embedded = |v: &[f64]| -> Vec<f64> {
            let w = changed(&|c, id| v[2 + c * VOCABULARY + id], &|j, c| v[middle + j * RANK + c]);
            ids.iter().flat_map(|&id| w[id as usize * WIDTH..][..WIDTH].to_vec()).collect()
        };
        let mut x = workspace.matrix(ids.len(), WIDTH).unwrap();
        of.embed(&ids, x.view_mut()).unwrap();
        assert_close("x", x.as_slice(), &embedded(&exact), 1e-6);
        let (dx, mut gradient) = (random(ids.len() * WIDTH), vec![0.0; values.len()]);
        let target = ViewMut::vector(&mut gradient);
        of.embed_backward(&ids, View::new(&dx, ids.len(), WIDTH), target, &workspace).unwrap();
        assert_close("embedding", &gradient, &numeric_gradient(&exact, &to_f64(&dx), embedded), 1e-6);

        // A [r, width] first, then B [vocabulary, r].
        let middle = 2 + RANK * WIDTH;
        let change = TableChange { lora: Some(slot(2..middle, middle..values.len())), ..TableChange::default() };
        let of = Table { weight: &weight, change: Some((&change, View::vector(&values))), dropout: None };
        let hidden = random(ids.len() * WIDTH);
        let logits_of = |v: &[f64], hidden: &[f64]| -> Vec<f64> {
            let w = changed(&|c, id| v[middle + id * RANK + c], &|j, c| v[2 + c * WIDTH + j]);
            let row = |h: &[f64]| w.chunks_exact(WIDTH).map(|w| dot(w, h)).collect::<Vec<_>>();
            hidden.chunks_exact(WIDTH).flat_map(row).collect()
        };
        let mut logits = workspace.matrix(ids.len(), VOCABULARY).unwrap();
        let view = View::new(&hidden, ids.len(), WIDTH);
        of.logits(view, logits.view_mut(), &workspace).unwrap();
        assert_close("logits", logits.as_slice(), &logits_of(&exact, &to_f64(&hidden)), 1e-6);
        let dlogits = random(ids.len() * VOCABULARY);
        logits.as_mut_slice().copy_from_slice(&dlogits);
        let (mut dhidden, mut gradient) = (workspace.matrix(ids.len(), WIDTH).unwrap(), vec![0.0; values.len()]);
        let target = Some(ViewMut::vector(&mut gradient));
        of.logits_backward(view, logits.view_mut(), dhidden.view_mut(), target, &workspace).unwrap();
        let d = to_f64(&dlogits);
        let of_hidden = numeric_gradient(&to_f64(&hidden), &d, |h| logits_of(&exact, h));
        assert_close("dhidden", dhidden.as_slice(), &of_hidden, 1e-5);
        let of_values = numeric_gradient(&exact, &d, |v| logits_of(v, &to_f64(&hidden)));
        assert_close("head", &gradient, &of_values, 1e-5);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (weight, values, change) = case(true, true);
        let workspace = Workspace::poisoned();
        let mut x = [0.0; WIDTH];
        let mut embed = |change: &TableChange, id: u32| {
            let table = Table { weight: &weight, change: Some((change, View::vector(&values))), dropout: None };
            table.embed(&[id], ViewMut::new(&mut x, 1, WIDTH)).unwrap_err().to_string()
        };
        assert!(embed(&change, 11).contains("token id 11 is outside the vocabulary of 11"));
        let short = TableChange { whole: Some(0..WIDTH), ..change.clone() };
        assert!(embed(&short, 0).contains("no table of 11 x 7"));
        let tokens = HashMap::from([(1, 0..WIDTH), (2, WIDTH + 1..2 * WIDTH + 1)]);
        let apart = TableChange { tokens, ..TableChange::default() };
        let table = Table { weight: &weight, change: Some((&apart, View::vector(&values))), dropout: None };
        let (dx, mut gradient) = ([0.0; WIDTH], vec![0.0; values.len()]);
        let gradient = ViewMut::vector(&mut gradient);
        let error = table.embed_backward(&[1], View::vector(&dx), gradient, &workspace).unwrap_err().to_string();
        assert!(error.contains("token 2 is trained at 8..15, expected 7..14"), "{error}");
    }
}
