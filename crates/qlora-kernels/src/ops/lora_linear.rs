//! The low-rank part of a LoRA linear layer (arXiv 2106.09685), added to the output of the frozen part.
//!
//! With `x [tokens, in]`, `A [r, in]`, `B [out, r]` and `drop` the dropout of `x`:
//!
//! ```text
//! s = drop(x) A^T        y += scale * s B^T
//! ds = scale * dy B      dB += scale * dy^T s      dA += ds^T drop(x)      dx += drop^T(ds A)
//! ```
//!
//! The forward keeps `s` (`r` columns) for the backward. The dropped-out `x` is never whole in memory: it is made for a
//! few hundred rows at a time, in the backward anew from the same mask. Products are f32 ([`crate::ops::matmul`]).

use crate::error::Result;
use crate::matrix::Workspace;
use crate::ops::dropout::{self, Dropout};
use crate::ops::matmul;
use crate::view::{View, ViewMut};

/// Elements of a tile of the dropped-out input: 1 MiB, which stays in the cache between its mask and its product.
const TILE: usize = 1 << 18;

/// The rows of a tile: at least 64, or the product would spend its time on packing `A`.
fn tile_rows(cols: usize) -> usize {
    (TILE / cols.max(1)).clamp(64, 1024)
}

/// `s = drop(x) A^T`, `y += scale * s B^T`.
///
/// `x`: `[tokens, in]`; `a`: `[r, in]`; `b`: `[out, r]`; `s`: `[tokens, r]`, written for [`backward`]; `y`:
/// `[tokens, out]`. No `dropout` is the same as one with `p = 0`.
///
/// # Errors
/// If the shapes do not fit each other, the dropout probability is out of range, or a view is not on the CPU.
pub fn forward(
    x: View,
    a: View,
    b: View,
    scale: f32,
    dropout: Option<Dropout>,
    mut s: ViewMut,
    y: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    const OP: &str = "lora_linear";
    check(OP, x, a, b, dropout)?;
    s.expect(OP, "s", x.rows(), a.rows())?;
    y.expect(OP, "y", x.rows(), b.rows())?;
    shrink(x, a, dropout, s.reborrow(), workspace)?;
    matmul::nt(s.as_view(), b, y, scale, 1.0)
}

/// `s = drop(x) A^T` alone: for a recomputed layer whose output is not read.
///
/// Shapes as in [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn shrink(x: View, a: View, dropout: Option<Dropout>, mut s: ViewMut, workspace: &Workspace) -> Result<()> {
    const OP: &str = "lora_linear_shrink";
    a.expect(OP, "a", a.rows(), x.cols())?;
    s.expect(OP, "s", x.rows(), a.rows())?;
    dropout.map_or(Ok(()), |dropout| dropout.check(OP))?;
    match dropout.filter(|dropout| dropout.p > 0.0) {
        None => matmul::nt(x, a, s.reborrow(), 1.0, 0.0)?,
        Some(dropout) => {
            let mut buffer = workspace.matrix(tile_rows(x.cols()).min(x.rows()), x.cols())?;
            for rows in tiles(x.rows(), x.cols()) {
                let mut tile = buffer.view_mut().slice_rows(0..rows.len());
                dropout::forward(&dropout.at_row(rows.start), x.slice_rows(rows.clone()), tile.reborrow())?;
                matmul::nt(tile.as_view(), a, s.reborrow().slice_rows(rows), 1.0, 0.0)?;
            }
        }
    }
    Ok(())
}

/// The gradients; all are added to what `dx`, `da` and `db` hold.
///
/// `s`: from the forward; `dy`: `[tokens, out]`; `dx`: `[tokens, in]`, or none where the input needs no gradient;
/// `da`: `[r, in]`; `db`: `[out, r]`; `dropout`: the same as in the forward.
///
/// # Errors
/// If the shapes do not fit each other, the dropout probability is out of range, or the views are not on the same device.
pub fn backward(
    x: View,
    a: View,
    b: View,
    scale: f32,
    dropout: Option<Dropout>,
    s: View,
    dy: View,
    dx: Option<ViewMut>,
    da: ViewMut,
    db: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    check("lora_linear_backward", x, a, b, dropout)?;
    let mut ds = workspace.matrix(x.rows(), a.rows())?;
    backward_input(dy, a, b, scale, dropout, ds.view_mut(), dx, workspace)?;
    backward_adapter(x, scale, dropout, s, dy, ds.view(), da, db, workspace)
}

/// The first half of [`backward`]: `ds = scale * dy B`, written, and `dx += drop'(ds A)`.
///
/// # Errors
/// As there.
pub fn backward_input(
    dy: View,
    a: View,
    b: View,
    scale: f32,
    dropout: Option<Dropout>,
    mut ds: ViewMut,
    dx: Option<ViewMut>,
    workspace: &Workspace,
) -> Result<()> {
    const OP: &str = "lora_linear_backward";
    let (tokens, [r, inputs]) = (dy.rows(), a.shape());
    b.expect(OP, "b", b.rows(), r)?;
    dy.expect(OP, "dy", tokens, b.rows())?;
    ds.expect(OP, "ds", tokens, r)?;
    dropout.map_or(Ok(()), |dropout| dropout.check(OP))?;
    matmul::nn(dy, b, ds.reborrow(), scale, 0.0)?;
    let Some(mut dx) = dx else { return Ok(()) };
    dx.expect(OP, "dx", tokens, inputs)?;
    let Some(dropout) = dropout.filter(|dropout| dropout.p > 0.0) else {
        return matmul::nn(ds.as_view(), a, dx, 1.0, 1.0);
    };
    let mut buffer = workspace.matrix(tile_rows(inputs).min(tokens), inputs)?;
    for rows in tiles(tokens, inputs) {
        let mut tile = buffer.view_mut().slice_rows(0..rows.len());
        matmul::nn(ds.as_view().slice_rows(rows.clone()), a, tile.reborrow(), 1.0, 0.0)?;
        dropout::backward(&dropout.at_row(rows.start), tile.as_view(), dx.reborrow().slice_rows(rows))?;
    }
    Ok(())
}

/// The second half of [`backward`]: `da += ds^T drop(x)`, `db += scale * dy^T s`.
///
/// # Errors
/// As there.
pub fn backward_adapter(
    x: View,
    scale: f32,
    dropout: Option<Dropout>,
    s: View,
    dy: View,
    ds: View,
    mut da: ViewMut,
    db: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    const OP: &str = "lora_linear_backward";
    let ([tokens, inputs], [outputs, r]) = (x.shape(), db.shape());
    s.expect(OP, "s", tokens, r)?;
    ds.expect(OP, "ds", tokens, r)?;
    dy.expect(OP, "dy", tokens, outputs)?;
    da.expect(OP, "da", r, inputs)?;
    matmul::tn(dy, s, db, scale, 1.0)?;
    let Some(dropout) = dropout.filter(|dropout| dropout.p > 0.0) else {
        return matmul::tn(ds, x, da, 1.0, 1.0);
    };
    let mut buffer = workspace.matrix(tile_rows(inputs).min(tokens), inputs)?;
    for rows in tiles(tokens, inputs) {
        let mut tile = buffer.view_mut().slice_rows(0..rows.len());
        dropout::forward(&dropout.at_row(rows.start), x.slice_rows(rows.clone()), tile.reborrow())?;
        matmul::tn(ds.slice_rows(rows), tile.as_view(), da.reborrow(), 1.0, 1.0)?;
    }
    Ok(())
}

fn check(op: &'static str, x: View, a: View, b: View, dropout: Option<Dropout>) -> Result<()> {
    a.expect(op, "a", a.rows(), x.cols())?;
    b.expect(op, "b", b.rows(), a.rows())?;
    dropout.map_or(Ok(()), |dropout| dropout.check(op))
}

/// The rows of a matrix in tiles.
fn tiles(rows: usize, cols: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let step = tile_rows(cols);
    (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Window, assert_close, numeric_gradient, random, to_f64};

    struct Case {
        tokens: usize,
        inputs: usize,
        outputs: usize,
        r: usize,
        dropout: Option<Dropout>,
    }

    /// `drop(x)` in f64.
    fn dropped(x: &[f64], dropout: Option<Dropout>) -> Vec<f64> {
        let Some(dropout) = dropout else { return x.to_vec() };
        x.iter().zip(0..).map(|(x, i)| if dropout.keeps(i) { x / (1.0 - f64::from(dropout.p)) } else { 0.0 }).collect()
    }

    /// `a [m, k] b^T [n, k]` in f64.
    fn product(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
        let row = |a: &[f64]| b.chunks_exact(k).map(|b| a.iter().zip(b).map(|(a, b)| a * b).sum()).collect::<Vec<_>>();
        a.chunks_exact(k).flat_map(row).collect()
    }

    fn check_case(case: &Case, gap: usize) {
        const SCALE: f32 = 0.625;
        let &Case { tokens, inputs, outputs, r, dropout } = case;
        let mut random = random((tokens * inputs + outputs + r) as u64);
        let (x, a, b) = (random(tokens * inputs), random(r * inputs), random(outputs * r));
        let (y0, dy) = (random(tokens * outputs), random(tokens * outputs));
        let (dx0, da0, db0) = (random(tokens * inputs), random(r * inputs), random(outputs * r));
        let [x64, a64, b64, dy64] = [&x, &a, &b, &dy].map(|data| to_f64(data));
        let f = |x: &[f64], a: &[f64], b: &[f64]| -> Vec<f64> {
            let s = product(&dropped(x, dropout), a, inputs);
            product(&s, b, r).iter().map(|y| f64::from(SCALE) * y).collect()
        };
        let plus = |start: &[f32], want: Vec<f64>| -> Vec<f64> {
            start.iter().zip(want).map(|(&start, want)| f64::from(start) + want).collect()
        };

        let workspace = Workspace::poisoned();
        let window = |data: &[f32], rows, cols| Window::of(data, rows, cols, gap);
        let (x, a, b) = (window(&x, tokens, inputs), window(&a, r, inputs), window(&b, outputs, r));
        let (mut y, dy) = (window(&y0, tokens, outputs), window(&dy, tokens, outputs));
        let mut s = Window::poisoned(tokens, r, gap);
        forward(x.view(), a.view(), b.view(), SCALE, dropout, s.view_mut(), y.view_mut(), &workspace).unwrap();
        assert_close("s", &s.to_vec(), &product(&dropped(&x64, dropout), &a64, inputs), 2e-6);
        assert_close("y", &y.to_vec(), &plus(&y0, f(&x64, &a64, &b64)), 2e-6);

        let (mut dx, mut da, mut db) =
            (window(&dx0, tokens, inputs), window(&da0, r, inputs), window(&db0, outputs, r));
        let (dx_mut, da_mut, db_mut) = (dx.view_mut(), da.view_mut(), db.view_mut());
        let (x, a, b, s, dy) = (x.view(), a.view(), b.view(), s.view(), dy.view());
        backward(x, a, b, SCALE, dropout, s, dy, Some(dx_mut), da_mut, db_mut, &workspace).unwrap();
        let want = numeric_gradient(&x64, &dy64, |x| f(x, &a64, &b64));
        assert_close("dx", &dx.to_vec(), &plus(&dx0, want), 2e-6);
        let want = numeric_gradient(&a64, &dy64, |a| f(&x64, a, &b64));
        assert_close("da", &da.to_vec(), &plus(&da0, want), 2e-6);
        let want = numeric_gradient(&b64, &dy64, |b| f(&x64, &a64, b));
        assert_close("db", &db.to_vec(), &plus(&db0, want), 2e-6);
    }

    #[test]
    fn forward_and_backward_match_f64() {
        for (tokens, inputs, outputs, r) in
            [(1, 1, 1, 1), (1, 7, 5, 2), (5, 33, 1, 3), (3, 123, 7, 1), (2, 96, 40, 8), (9, 16, 24, 16)]
        {
            for p in [None, Some(0.0), Some(0.1), Some(0.5)] {
                let dropout = p.map(|p| Dropout { p, seed: 3, stream: 9, first_row: 0 });
                for gap in [0, 3] {
                    check_case(&Case { tokens, inputs, outputs, r, dropout }, gap);
                }
            }
        }
    }

    #[test]
    fn tiles_of_the_dropped_input_join_without_a_seam() {
        // Two whole tiles of the smallest height and a part of a third.
        let (tokens, inputs, r) = (2 * 64 + 5, TILE / 64, 2);
        assert_eq!(tile_rows(inputs), 64);
        let dropout = Dropout { p: 0.25, seed: 8, stream: 1, first_row: 0 };
        let mut random = random(4);
        let (x, a, b, dy) = (random(tokens * inputs), random(r * inputs), random(3 * r), random(tokens * 3));
        let workspace = Workspace::poisoned();
        let run = |x: View, dropout: Option<Dropout>| {
            let (mut s, mut y) = (workspace.matrix(tokens, r).unwrap(), workspace.zeros(tokens, 3).unwrap());
            let (a, b) = (View::new(&a, r, inputs), View::new(&b, 3, r));
            forward(x, a, b, 2.0, dropout, s.view_mut(), y.view_mut(), &workspace).unwrap();
            let (mut dx, mut da) = (workspace.zeros(tokens, inputs).unwrap(), workspace.zeros(r, inputs).unwrap());
            let (mut db, dy) = (workspace.zeros(3, r).unwrap(), View::new(&dy, tokens, 3));
            let (dx_mut, da_mut, db_mut) = (dx.view_mut(), da.view_mut(), db.view_mut());
            backward(x, a, b, 2.0, dropout, s.view(), dy, Some(dx_mut), da_mut, db_mut, &workspace).unwrap();
            (y, dx, da, db)
        };
        let (y, dx, da, db) = run(View::new(&x, tokens, inputs), Some(dropout));
        // The same with the whole dropped-out input as the input, and the mask applied to its gradient.
        let mut whole = workspace.matrix(tokens, inputs).unwrap();
        dropout::forward(&dropout, View::new(&x, tokens, inputs), whole.view_mut()).unwrap();
        let (want_y, want_whole_dx, want_da, want_db) = run(whole.view(), None);
        let mut want_dx = workspace.zeros(tokens, inputs).unwrap();
        dropout::backward(&dropout, want_whole_dx.view(), want_dx.view_mut()).unwrap();
        for (what, got, want) in [("y", y, want_y), ("dx", dx, want_dx), ("da", da, want_da), ("db", db, want_db)] {
            assert_close(what, got.as_slice(), &to_f64(want.as_slice()), 2e-6);
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let workspace = Workspace::poisoned();
        let data = [0.0; 12];
        let (x, a, b) = (View::new(&data, 3, 4), View::new(&data[..8], 2, 4), View::new(&data[..10], 5, 2));
        let (mut s, mut y) = ([0.0; 6], [0.0; 15]);
        let mut run = |a, b, dropout| {
            let (s, y) = (ViewMut::new(&mut s, 3, 2), ViewMut::new(&mut y, 3, 5));
            forward(x, a, b, 1.0, dropout, s, y, &workspace).map_err(|error| error.to_string())
        };
        assert_eq!(run(a, b, None), Ok(()));
        let narrow = View::new(&data[..6], 2, 3);
        assert_eq!(run(narrow, b, None).unwrap_err(), "lora_linear: a has shape [2, 3], expected [2, 4]");
        let other_rank = View::new(&data, 4, 3);
        assert_eq!(run(a, other_rank, None).unwrap_err(), "lora_linear: b has shape [4, 3], expected [4, 2]");
        let dropout = Some(Dropout { p: 1.5, seed: 0, stream: 0, first_row: 0 });
        assert!(run(a, b, dropout).unwrap_err().contains("dropout probability is 1.5"));
    }

    #[test]
    fn the_parts_that_nobody_reads_can_be_left_out() {
        let mut random = random(9);
        let (x, a, b, dy) = (random(30 * 7), random(3 * 7), random(5 * 3), random(30 * 5));
        let (x, a, b) = (View::new(&x, 30, 7), View::new(&a, 3, 7), View::new(&b, 5, 3));
        let workspace = Workspace::poisoned();
        for dropout in [None, Some(Dropout { p: 0.4, seed: 1, stream: 2, first_row: 0 })] {
            let (mut s, mut alone, mut y) =
                (workspace.matrix(30, 3).unwrap(), workspace.matrix(30, 3).unwrap(), workspace.zeros(30, 5).unwrap());
            forward(x, a, b, 2.0, dropout, s.view_mut(), y.view_mut(), &workspace).unwrap();
            shrink(x, a, dropout, alone.view_mut(), &workspace).unwrap();
            assert_eq!(s.as_slice(), alone.as_slice());

            let gradients = |dx: Option<ViewMut>| {
                let (mut da, mut db) = (workspace.zeros(3, 7).unwrap(), workspace.zeros(5, 3).unwrap());
                let (da_mut, db_mut, dy) = (da.view_mut(), db.view_mut(), View::new(&dy, 30, 5));
                backward(x, a, b, 2.0, dropout, s.view(), dy, dx, da_mut, db_mut, &workspace).unwrap();
                (da.into_vec(), db.into_vec())
            };
            let mut dx = workspace.zeros(30, 7).unwrap();
            assert_eq!(gradients(Some(dx.view_mut())), gradients(None));
            assert!(dx.as_slice().iter().any(|&x| x != 0.0));
        }
    }
}
