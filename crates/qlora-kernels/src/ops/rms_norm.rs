//! Root mean square normalization (arXiv 1910.07467) over the rows of `[rows, width]`.
//!
//! ```text
//! rstd = 1 / sqrt(mean(x^2) + eps)          y = x * rstd * weight
//! dx   = rstd * (weight * dy - x * rstd^2 * mean(weight * dy * x))
//! ```
//!
//! The weight is frozen in QLoRA, so it gets no gradient. Sums are f32 in a fixed order of additions. The
//! normalization of single heads (Qwen3) is the same operation on a view reshaped to `[tokens * heads, head_dim]`.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use crate::error::{Error, Result};
use crate::math;
use crate::parallel::rows_per_task;
use crate::simd::vectorize;
use crate::view::{HostView, HostViewMut, View, ViewMut};

/// `y = x * rstd * weight`.
///
/// `x`, `y`: `[rows, groups * width]`, every group of `width` columns normed on its own (one group is the usual norm, a
/// group per head that of Qwen3's queries and keys); `weight`: `width`, f32; `rstd`: `rows * groups`, f32, written for
/// [`backward`].
///
/// # Errors
/// If the shapes do not fit each other, or the views are not on the same device.
pub fn forward<'a, 'b>(
    x: View,
    weight: impl Into<View<'a>>,
    eps: f32,
    y: ViewMut,
    rstd: impl Into<ViewMut<'b>>,
) -> Result<()> {
    const OP: &str = "rms_norm";
    let ([rows, cols], weight, rstd) = (x.shape(), weight.into(), rstd.into());
    check_vectors(OP, rows, cols, weight, rstd.as_view())?;
    y.expect(OP, "y", rows, cols)?;
    #[cfg(feature = "cuda")]
    if y.gpu().is_some() {
        return crate::cuda::ops::rms_norm_forward(OP, x.cuda(OP)?, None, weight, eps, y, rstd);
    }
    let (x, y) = (x.host(OP)?, y.host(OP)?);
    let (weight, mut rstd) = (weight.host(OP)?, rstd.host(OP)?);
    let (weight, rstd) = (slice(OP, weight)?, slice_mut(OP, &mut rstd)?);
    let groups = cols / weight.len().max(1);
    y.par_rows_mut().zip(rstd.par_chunks_mut(groups.max(1))).enumerate().with_min_len(rows_per_task(cols)).for_each(
        |(i, (y, rstd))| {
            vectorize(
                #[inline(always)]
                move || {
                    let groups = x.row(i).chunks_exact(weight.len()).zip(y.chunks_exact_mut(weight.len()));
                    for ((x, y), rstd) in groups.zip(rstd.iter_mut()) {
                        *rstd = normalize(x, weight, eps, y);
                    }
                },
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
/// If the shapes do not fit each other, or the views are not on the same device.
pub fn forward_residual<'a, 'b>(
    x: ViewMut,
    delta: View,
    weight: impl Into<View<'a>>,
    eps: f32,
    y: ViewMut,
    rstd: impl Into<ViewMut<'b>>,
) -> Result<()> {
    const OP: &str = "rms_norm_residual";
    let ([rows, cols], weight, rstd) = (x.shape(), weight.into(), rstd.into());
    check_vectors(OP, rows, cols, weight, rstd.as_view())?;
    delta.expect(OP, "delta", rows, cols)?;
    y.expect(OP, "y", rows, cols)?;
    #[cfg(feature = "cuda")]
    if y.gpu().is_some() {
        return crate::cuda::ops::rms_norm_residual(OP, x.cuda(OP)?, delta.cuda(OP)?, weight, eps, y, rstd);
    }
    let (x, delta, y) = (x.host(OP)?, delta.host(OP)?, y.host(OP)?);
    let (weight, mut rstd) = (weight.host(OP)?, rstd.host(OP)?);
    let (weight, rstd) = (slice(OP, weight)?, slice_mut(OP, &mut rstd)?);
    let groups = cols / weight.len().max(1);
    x.par_rows_mut()
        .zip(y.par_rows_mut())
        .zip(rstd.par_chunks_mut(groups.max(1)))
        .enumerate()
        .with_min_len(rows_per_task(cols))
        .for_each(|(i, ((x, y), rstd))| {
            vectorize(
                #[inline(always)]
                move || {
                    for (x, delta) in x.iter_mut().zip(delta.row(i)) {
                        *x += delta;
                    }
                    let groups = x.chunks_exact(weight.len()).zip(y.chunks_exact_mut(weight.len()));
                    for ((x, y), rstd) in groups.zip(rstd.iter_mut()) {
                        *rstd = normalize(x, weight, eps, y);
                    }
                },
            );
        });
    Ok(())
}

/// The gradient of `x` from that of `y`; written to `dx`, or added to what it holds if `accumulate`.
///
/// `x`: what was normalized (after the residual addition); `rstd`: from the forward; `dy`, `dx`: as `x`.
///
/// # Errors
/// If the shapes do not fit each other, or the views are not on the same device.
pub fn backward<'a, 'b>(
    x: View,
    weight: impl Into<View<'a>>,
    rstd: impl Into<View<'b>>,
    dy: View,
    dx: ViewMut,
    accumulate: bool,
) -> Result<()> {
    const OP: &str = "rms_norm_backward";
    let ([rows, cols], weight, rstd) = (x.shape(), weight.into(), rstd.into());
    check_vectors(OP, rows, cols, weight, rstd)?;
    dy.expect(OP, "dy", rows, cols)?;
    dx.expect(OP, "dx", rows, cols)?;
    #[cfg(feature = "cuda")]
    if dx.gpu().is_some() {
        return crate::cuda::ops::rms_norm_backward(OP, x, weight, rstd, dy, dx, accumulate);
    }
    let (x, dy, dx) = (x.host(OP)?, dy.host(OP)?, dx.host(OP)?);
    let (weight, rstd) = (slice(OP, weight.host(OP)?)?, slice(OP, rstd.host(OP)?)?);
    let width = weight.len().max(1);
    let groups = cols / width;
    dx.par_rows_mut().enumerate().with_min_len(rows_per_task(cols)).for_each(|(i, dx)| {
        let (x, dy, rstd) = (x.row(i), dy.row(i), &rstd[i * groups..(i + 1) * groups]);
        vectorize(
            #[inline(always)]
            move || {
                let inputs = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(rstd);
                for (((x, dy), &rstd), dx) in inputs.zip(dx.chunks_exact_mut(width)) {
                    let along = rstd * rstd * math::dot3(weight, dy, x) / width as f32;
                    for (((dx, weight), dy), x) in dx.iter_mut().zip(weight).zip(dy).zip(x) {
                        let term = rstd * (weight * dy - x * along);
                        *dx = if accumulate { *dx + term } else { term };
                    }
                }
            },
        );
    });
    Ok(())
}

fn check_vectors(op: &'static str, rows: usize, cols: usize, weight: View, rstd: View) -> Result<()> {
    let width = weight.rows() * weight.cols();
    if width == 0 || !cols.is_multiple_of(width) {
        return Err(Error::Shape { op, what: "weight", got: vec![width], expected: vec![cols] });
    }
    Error::check_shape(op, "rstd", &[rstd.rows() * rstd.cols()], &[rows * (cols / width)])
}

fn slice<'a>(op: &'static str, vector: HostView<'a>) -> Result<&'a [f32]> {
    vector.as_slice().ok_or_else(|| Error::invalid(op, "a vector has gaps between its elements"))
}

fn slice_mut<'a>(op: &'static str, vector: &'a mut HostViewMut) -> Result<&'a mut [f32]> {
    vector.as_mut_slice().ok_or_else(|| Error::invalid(op, "a vector has gaps between its elements"))
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
