//! Root mean square normalization (arXiv 1910.07467) over the rows of `[rows, width]`.
//!
//! ```text
//! rstd = 1 / sqrt(mean(x^2) + eps)          y = x * rstd * weight
//! dx   = rstd * (weight * dy - x * rstd^2 * mean(weight * dy * x))
//! ```
//!
//! The weight is frozen in QLoRA, so it gets no gradient. Sums are f32 in a fixed order of additions. The
//! normalization of single heads (Qwen3) is the same operation on a view reshaped to `[tokens * heads, head_dim]`.

use rayon::iter::{IndexedParallelIterator, IntoParallelRefMutIterator, ParallelIterator};

use crate::error::{Error, Result};
use crate::math;
use crate::parallel::rows_per_task;
use crate::simd::vectorize;
use crate::view::{View, ViewMut};

/// `y = x * rstd * weight`.
///
/// `x`, `y`: `[rows, width]`; `weight`: `width`; `rstd`: `rows`, written for [`backward`].
///
/// # Errors
/// If the shapes do not fit each other, or a view is not on the CPU.
pub fn forward(x: View, weight: &[f32], eps: f32, y: ViewMut, rstd: &mut [f32]) -> Result<()> {
    const OP: &str = "rms_norm";
    let [rows, cols] = x.shape();
    check_vectors(OP, rows, cols, weight, rstd)?;
    y.expect(OP, "y", rows, cols)?;
    let (x, y) = (x.host(OP)?, y.host(OP)?);
    y.par_rows_mut().zip(rstd.par_iter_mut()).enumerate().with_min_len(rows_per_task(cols)).for_each(
        |(i, (y, rstd))| {
            vectorize(
                #[inline(always)]
                move || *rstd = normalize(x.row(i), weight, eps, y),
            );
        },
    );
    Ok(())
}

/// `x = x + delta`, then `y = x * rstd * weight`: the residual addition before a norm, in one pass over memory.
///
/// `x`, `delta`, `y`: `[rows, width]`; `weight`: `width`; `rstd`: `rows`, written for [`backward`].
///
/// # Errors
/// If the shapes do not fit each other, or a view is not on the CPU.
pub fn forward_residual(x: ViewMut, delta: View, weight: &[f32], eps: f32, y: ViewMut, rstd: &mut [f32]) -> Result<()> {
    const OP: &str = "rms_norm_residual";
    let [rows, cols] = x.shape();
    check_vectors(OP, rows, cols, weight, rstd)?;
    delta.expect(OP, "delta", rows, cols)?;
    y.expect(OP, "y", rows, cols)?;
    let (x, delta, y) = (x.host(OP)?, delta.host(OP)?, y.host(OP)?);
    x.par_rows_mut()
        .zip(y.par_rows_mut())
        .zip(rstd.par_iter_mut())
        .enumerate()
        .with_min_len(rows_per_task(cols))
        .for_each(|(i, ((x, y), rstd))| {
            vectorize(
                #[inline(always)]
                move || {
                    for (x, delta) in x.iter_mut().zip(delta.row(i)) {
                        *x += delta;
                    }
                    *rstd = normalize(x, weight, eps, y);
                },
            );
        });
    Ok(())
}

/// The gradient of `x` from that of `y`; written to `dx`, or added to what it holds if `accumulate`.
///
/// `x`: what was normalized (after the residual addition); `rstd`: from the forward; `dy`, `dx`: `[rows, width]`.
///
/// # Errors
/// If the shapes do not fit each other, or a view is not on the CPU.
pub fn backward(x: View, weight: &[f32], rstd: &[f32], dy: View, dx: ViewMut, accumulate: bool) -> Result<()> {
    const OP: &str = "rms_norm_backward";
    let [rows, cols] = x.shape();
    check_vectors(OP, rows, cols, weight, rstd)?;
    dy.expect(OP, "dy", rows, cols)?;
    dx.expect(OP, "dx", rows, cols)?;
    let (x, dy, dx) = (x.host(OP)?, dy.host(OP)?, dx.host(OP)?);
    dx.par_rows_mut().enumerate().with_min_len(rows_per_task(cols)).for_each(|(i, dx)| {
        let (x, dy, rstd) = (x.row(i), dy.row(i), rstd[i]);
        vectorize(
            #[inline(always)]
            move || {
                let along = rstd * rstd * math::dot3(weight, dy, x) / cols as f32;
                for (((dx, weight), dy), x) in dx.iter_mut().zip(weight).zip(dy).zip(x) {
                    let term = rstd * (weight * dy - x * along);
                    *dx = if accumulate { *dx + term } else { term };
                }
            },
        );
    });
    Ok(())
}

fn check_vectors(op: &'static str, rows: usize, cols: usize, weight: &[f32], rstd: &[f32]) -> Result<()> {
    Error::check_shape(op, "weight", &[weight.len()], &[cols])?;
    Error::check_shape(op, "rstd", &[rstd.len()], &[rows])
}

/// Normalizes one row and returns its `rstd`.
#[inline(always)]
fn normalize(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) -> f32 {
    let rstd = 1.0 / (math::dot(x, x) / x.len() as f32 + eps).sqrt();
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = x * rstd * weight;
    }
    rstd
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SHAPES, Window, assert_close, numeric_gradient, random, to_f64};

    const EPS: f32 = 1e-5;

    fn reference(x: &[f64], weight: &[f32], cols: usize, eps: f32) -> Vec<f64> {
        let mut y = Vec::new();
        for x in x.chunks_exact(cols) {
            let rstd = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / cols as f64 + f64::from(eps)).sqrt();
            y.extend(x.iter().zip(weight).map(|(x, &weight)| x * rstd * f64::from(weight)));
        }
        y
    }

    #[test]
    fn forward_and_backward_match_f64() {
        for (seed, &(rows, cols)) in SHAPES.iter().enumerate() {
            for gap in [0, 5] {
                // A single column is divided by itself: its gradient is eps * rstd^3 and, with the usual eps, the difference
                // of two nearly equal numbers.
                let eps = if cols == 1 { 0.5 } else { EPS };
                let mut random = random(seed as u64);
                let (x, dy, weight) = (random(rows * cols), random(rows * cols), random(cols));
                let (window, dy_window) = (Window::of(&x, rows, cols, gap), Window::of(&dy, rows, cols, gap));
                let mut y = Window::poisoned(rows, cols, gap);
                let mut rstd = vec![f32::NAN; rows];
                forward(window.view(), &weight, eps, y.view_mut(), &mut rstd).unwrap();
                assert_close("y", &y.to_vec(), &reference(&to_f64(&x), &weight, cols, eps), 1e-6);

                let mut dx = Window::poisoned(rows, cols, gap);
                backward(window.view(), &weight, &rstd, dy_window.view(), dx.view_mut(), false).unwrap();
                let want = numeric_gradient(&to_f64(&x), &to_f64(&dy), |x| reference(x, &weight, cols, eps));
                assert_close("dx", &dx.to_vec(), &want, 2e-6);

                // Again, added to what is there.
                let start = random(rows * cols);
                let mut sum = Window::of(&start, rows, cols, gap);
                backward(window.view(), &weight, &rstd, dy_window.view(), sum.view_mut(), true).unwrap();
                let want: Vec<f64> = want.iter().zip(&start).map(|(a, &b)| a + f64::from(b)).collect();
                assert_close("dx accumulated", &sum.to_vec(), &want, 2e-6);
            }
        }
    }

    #[test]
    fn the_residual_form_is_an_addition_and_the_plain_form() {
        let (rows, cols) = (3, 123);
        let mut random = random(7);
        let (x, delta, weight) = (random(rows * cols), random(rows * cols), random(cols));
        let mut sum = Window::of(&x, rows, cols, 3);
        let (mut y, mut want) = (Window::poisoned(rows, cols, 1), Window::poisoned(rows, cols, 0));
        let (mut rstd, mut want_rstd) = (vec![f32::NAN; rows], vec![f32::NAN; rows]);
        let delta = Window::of(&delta, rows, cols, 2);
        forward_residual(sum.view_mut(), delta.view(), &weight, EPS, y.view_mut(), &mut rstd).unwrap();
        let added: Vec<f32> = x.iter().zip(delta.to_vec()).map(|(a, b)| a + b).collect();
        assert_eq!(sum.to_vec(), added);
        forward(View::new(&added, rows, cols), &weight, EPS, want.view_mut(), &mut want_rstd).unwrap();
        assert_eq!((y.to_vec(), rstd), (want.to_vec(), want_rstd));
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let (x, mut y) = ([0.0; 6], [0.0; 6]);
        let error = forward(View::new(&x, 2, 3), &[1.0; 2], EPS, ViewMut::new(&mut y, 2, 3), &mut [0.0; 2]);
        assert_eq!(error.unwrap_err().to_string(), "rms_norm: weight has shape [2], expected [3]");
        let error = forward(View::new(&x, 2, 3), &[1.0; 3], EPS, ViewMut::new(&mut y, 3, 2), &mut [0.0; 2]);
        assert_eq!(error.unwrap_err().to_string(), "rms_norm: y has shape [3, 2], expected [2, 3]");
        let error = forward(View::new(&x, 2, 3), &[1.0; 3], EPS, ViewMut::new(&mut y, 2, 3), &mut [0.0; 3]);
        assert_eq!(error.unwrap_err().to_string(), "rms_norm: rstd has shape [3], expected [2]");
    }
}
