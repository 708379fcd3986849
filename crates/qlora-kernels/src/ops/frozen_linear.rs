//! Products with a frozen weight of any kind: `y = x W^T` and `dx = dy W`.
//!
//! `x [tokens, in]`, `W [out, in]`, `y [tokens, out]`; f32, accumulated in f32. The weight has no gradient.
//!
//! A quantized weight is never f32 as a whole. With many tokens, slabs of rows are dequantized (in parallel) into a buffer
//! that stays in the cache, and multiplied by `gemm`. With few tokens (generation) the product is bound by reading the
//! weight: each row is dequantized once into the first-level cache and multiplied with all tokens there.

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use crate::error::Result;
use crate::math;
use crate::matrix::Workspace;
use crate::ops::matmul;
use crate::simd::vectorize;
use crate::view::{HostView, HostViewMut, View, ViewMut};
use crate::weight::FrozenWeight;

/// Elements of a slab: 4 MiB as f32, a share of the last-level cache.
const SLAB: usize = 1 << 20;

/// Up to this many tokens a row is multiplied as soon as it is dequantized.
const FEW_TOKENS: usize = 4;

/// `y = x W^T + beta y`.
///
/// # Errors
/// If the shapes do not fit.
pub fn forward(x: View, weight: &dyn FrozenWeight, y: ViewMut, beta: f32, workspace: &Workspace) -> Result<()> {
    const OP: &str = "frozen_linear";
    x.expect(OP, "x", x.rows(), weight.cols())?;
    y.expect(OP, "y", x.rows(), weight.rows())?;
    if x.rows() <= FEW_TOKENS {
        few_tokens(x.host(OP)?, weight, y.host(OP)?, beta);
        return Ok(());
    }
    let mut rest = y;
    for_each_slab(weight, workspace, |slab, rows| {
        let (window, after) = std::mem::replace(&mut rest, ViewMut::vector(&mut [])).split_cols(rows.len());
        rest = after;
        matmul::nt(x, slab, window, 1.0, beta)
    })
}

/// `dx = dy W + beta dx`.
///
/// # Errors
/// If the shapes do not fit.
pub fn backward(dy: View, weight: &dyn FrozenWeight, mut dx: ViewMut, beta: f32, workspace: &Workspace) -> Result<()> {
    const OP: &str = "frozen_linear_backward";
    dy.expect(OP, "dy", dy.rows(), weight.rows())?;
    dx.expect(OP, "dx", dy.rows(), weight.cols())?;
    let mut beta = beta;
    for_each_slab(weight, workspace, |slab, rows| {
        matmul::nn(dy.slice_cols(rows), slab, dx.reborrow(), 1.0, beta)?;
        beta = 1.0;
        Ok(())
    })
}

/// Calls `multiply` with consecutive rows of the weight as f32, from the first to the last.
fn for_each_slab(
    weight: &dyn FrozenWeight,
    workspace: &Workspace,
    mut multiply: impl FnMut(View, std::ops::Range<usize>) -> Result<()>,
) -> Result<()> {
    let (rows, cols) = (weight.rows(), weight.cols());
    if let Some(data) = weight.as_f32() {
        return multiply(View::new(data, rows, cols), 0..rows);
    }
    // Slabs of equal size: a small last one would be multiplied at a lower rate.
    let slabs = (rows * cols).div_ceil(SLAB).clamp(1, rows.max(1));
    let height = rows.div_ceil(slabs).next_multiple_of(16).min(rows);
    let mut buffer = workspace.matrix(height, cols);
    for start in (0..rows).step_by(height.max(1)) {
        let range = start..rows.min(start + height);
        let slab = &mut buffer.as_mut_slice()[..range.len() * cols];
        dequantize(weight, range.clone(), slab);
        multiply(View::new(slab, range.len(), cols), range)?;
    }
    Ok(())
}

/// Dequantizes rows on all threads.
fn dequantize(weight: &dyn FrozenWeight, range: std::ops::Range<usize>, out: &mut [f32]) {
    let cols = weight.cols();
    let task = crate::parallel::rows_per_task(cols);
    out.par_chunks_mut((task * cols).max(1)).enumerate().for_each(|(i, out)| {
        let start = range.start + i * task;
        weight.dequantize_rows(start..start + out.len() / cols, out);
    });
}

/// Each row of the weight is read once and multiplied with every token.
fn few_tokens(x: HostView, weight: &dyn FrozenWeight, y: HostViewMut, beta: f32) {
    let (rows, cols) = (weight.rows(), weight.cols());
    // 8 Ki elements, 32 KiB: a row and more in the first-level cache.
    let block = (8192 / cols.max(1)).clamp(1, rows.max(1));
    let mut windows = Vec::with_capacity(rows.div_ceil(block));
    let mut rest = y;
    for start in (0..rows).step_by(block) {
        let (window, after) = rest.split_cols(block.min(rows - start));
        windows.push((start, window));
        rest = after;
    }
    // A few blocks a task: fewer would cost more to hand out than to run.
    windows.into_par_iter().with_min_len(4).for_each_init(
        || vec![0.0; block * cols],
        |buffer, (start, mut window)| {
            let height = window.cols();
            let plain = weight.as_f32().map(|data| &data[start * cols..(start + height) * cols]);
            let block = match plain {
                Some(data) => data,
                None => {
                    let buffer = &mut buffer[..height * cols];
                    weight.dequantize_rows(start..start + height, buffer);
                    buffer
                }
            };
            for token in 0..x.rows() {
                let (x, y) = (x.row(token), window.row_mut(token));
                vectorize(
                    #[inline(always)]
                    || {
                        for (row, y) in block.chunks_exact(cols).zip(y.iter_mut()) {
                            let product = math::dot(x, row);
                            *y = if beta == 0.0 { product } else { product + beta * *y };
                        }
                    },
                );
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::testing::{Window, assert_close, random, to_f64};
    use crate::weight::{PlainData, PlainWeight};

    fn weights(rows: usize, cols: usize) -> (Vec<f64>, [PlainWeight; 2]) {
        let values: Vec<bf16> = random(rows as u64)(rows * cols).iter().map(|&x| bf16::from_f32(x)).collect();
        let wide: Vec<f32> = values.iter().map(|x| x.to_f32()).collect();
        let (f64s, f32s) = (to_f64(&wide), PlainWeight::new(PlainData::F32(wide), rows, cols));
        (f64s, [f32s, PlainWeight::new(PlainData::Bf16(values), rows, cols)])
    }

    #[test]
    fn both_products_match_f64_over_plain_and_odd_shapes() {
        let workspace = Workspace::poisoned();
        // The last one has several slabs, the last of them small.
        for (rows, cols) in [(1, 1), (7, 3), (64, 576), (33, 65), (1, 300), (5000, 257)] {
            let (w, kinds) = weights(rows, cols);
            for tokens in [1, 2, 4, 5, 9, 33] {
                let mut random = random(tokens as u64);
                let (x, dy, y0, dx0) =
                    (random(tokens * cols), random(tokens * rows), random(tokens * rows), random(tokens * cols));
                for weight in &kinds {
                    for beta in [0.0, 1.0, 0.5] {
                        let dot = |t: usize, n: usize| -> f64 {
                            (0..cols).map(|k| f64::from(x[t * cols + k]) * w[n * cols + k]).sum()
                        };
                        let want: Vec<f64> = (0..tokens * rows)
                            .map(|i| dot(i / rows, i % rows) + f64::from(beta) * f64::from(y0[i]))
                            .collect();
                        let mut y = if beta == 0.0 { vec![f32::NAN; y0.len()] } else { y0.clone() };
                        let out = ViewMut::new(&mut y, tokens, rows);
                        forward(View::new(&x, tokens, cols), weight, out, beta, &workspace).unwrap();
                        assert_close("y", &y, &want, 1e-5);
                        if rows * tokens > 50_000 {
                            continue;
                        }
                        let dot = |t: usize, k: usize| -> f64 {
                            (0..rows).map(|n| f64::from(dy[t * rows + n]) * w[n * cols + k]).sum()
                        };
                        let want: Vec<f64> = (0..tokens * cols)
                            .map(|i| dot(i / cols, i % cols) + f64::from(beta) * f64::from(dx0[i]))
                            .collect();
                        let mut dx = if beta == 0.0 { vec![f32::NAN; dx0.len()] } else { dx0.clone() };
                        let out = ViewMut::new(&mut dx, tokens, cols);
                        backward(View::new(&dy, tokens, rows), weight, out, beta, &workspace).unwrap();
                        assert_close("dx", &dx, &want, 1e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn windows_of_a_wider_output_are_written_and_nothing_else() {
        let workspace = Workspace::poisoned();
        let (_, [weight, _]) = weights(5, 7);
        for tokens in [2, 9] {
            let x = random(1)(tokens * 7);
            let mut alone = workspace.matrix(tokens, 5);
            forward(View::new(&x, tokens, 7), &weight, alone.view_mut(), 0.0, &workspace).unwrap();
            let mut window = Window::poisoned(tokens, 5, 3);
            forward(View::new(&x, tokens, 7), &weight, window.view_mut(), 0.0, &workspace).unwrap();
            assert_eq!(window.to_vec(), alone.as_slice());
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let (_, [weight, _]) = weights(5, 7);
        let mut y = vec![0.0; 10];
        let out = ViewMut::new(&mut y, 2, 5);
        let error = forward(View::new(&[0.0; 12], 2, 6), &weight, out, 0.0, &Workspace::poisoned()).unwrap_err();
        assert_eq!(error.to_string(), "frozen_linear: x has shape [2, 6], expected [2, 7]");
    }
}
