//! LLM.int8's rounding of activations (arXiv 2208.07339), as values on the grid instead of integers.
//!
//! With `x [tokens, width]`, `h = f16(x)` and a threshold (0: there are no outliers):
//!
//! ```text
//! outlier column c  <=>  |h[t][c]| >= threshold for any token t of the call
//! absmax[t]         =    max |h[t][c]| over the elements below the threshold
//! out[t][c]         =    x[t][c]                                              in an outlier column
//!                        round(h[t][c] * (127 / absmax[t])) * absmax[t] / 127  elsewhere
//! ```
//!
//! A product of `out` with a weight on its own 8-bit grid in f32 is bitsandbytes' sum of an integer product and a product of
//! the outlier columns, up to f32 rounding. As there, whether a column is an outlier depends on all tokens of the call, so a
//! token's result can depend on what it is packed with. Columns that the weight itself keeps in 16 bits are never rounded.

use half::f16;
use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use crate::parallel::rows_per_task;
use crate::view::HostView;

/// Writes the rounded activations into `out`, `[tokens, width]` without gaps; `exact` are columns to leave alone.
pub(crate) fn round(x: HostView, threshold: f32, exact: &[u32], out: &mut [f32]) {
    let (tokens, width) = (x.rows(), x.cols());
    assert_eq!(out.len(), tokens * width, "activations of {tokens} x {width}");
    if out.is_empty() {
        return;
    }
    let limit = if threshold > 0.0 { threshold } else { f32::INFINITY };
    let task = rows_per_task(width);
    let mut keep = vec![false; width];
    if threshold > 0.0 {
        let columns = |task_index: usize| {
            let mut columns = Vec::new();
            for t in task_index * task..tokens.min((task_index + 1) * task) {
                let outliers = x.row(t).iter().enumerate().filter(|(_, x)| narrow(**x).abs() >= limit);
                columns.extend(outliers.map(|(c, _)| c));
            }
            columns
        };
        let found: Vec<Vec<usize>> = (0..tokens.div_ceil(task)).into_par_iter().map(columns).collect();
        found.into_iter().flatten().for_each(|c| keep[c] = true);
    }
    let mut skip = keep;
    let mut fixed = vec![false; width];
    for &c in exact {
        (skip[c as usize], fixed[c as usize]) = (true, true);
    }
    out.par_chunks_exact_mut(width).with_min_len(task).enumerate().for_each(|(t, out)| {
        let x = x.row(t);
        out.iter_mut().zip(x).for_each(|(out, x)| *out = narrow(*x));
        let within = |(h, fixed): (&f32, &bool)| if h.abs() < limit && !fixed { h.abs() } else { 0.0 };
        let absmax = out.iter().zip(&fixed).map(within).fold(0.0, f32::max);
        let factor = if absmax > 0.0 { 127.0 / absmax } else { 0.0 };
        let step = absmax / 127.0;
        for ((out, x), skip) in out.iter_mut().zip(x).zip(&skip) {
            *out = if *skip { *x } else { (*out * factor).round_ties_even() * step };
        }
    });
}

fn narrow(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    fn rounded(x: &[f32], rows: usize, threshold: f32, exact: &[u32]) -> Vec<f32> {
        let cols = x.len() / rows.max(1);
        let mut out = vec![f32::NAN; x.len()];
        round(HostView::new(x, rows, cols), threshold, exact, &mut out);
        out
    }

    #[test]
    fn values_move_to_the_grid_of_their_row() {
        let x = [127.0, 1.4, -2.5, 0.5, 12.7, 0.14, -0.25, 0.0];
        assert_eq!(rounded(&x, 2, 0.0, &[])[..4], [127.0, 1.0, -2.0, 0.0]);
        let second = &rounded(&x, 2, 0.0, &[])[4..];
        // 12.7 in f16 is 12.703125.
        let step = 12.703_125 / 127.0;
        assert_eq!(second, [127.0 * step, step, -2.0 * step, 0.0]);
    }

    #[test]
    fn an_outlier_keeps_its_column_for_all_tokens() {
        let x = [1.27, 0.301, 6.0, 0.304, -7.001, 1.27, 1.0, 0.301];
        let out = rounded(&x, 2, 6.0, &[]);
        assert_eq!((out[0], out[2], out[4], out[6]), (1.27, 6.0, -7.001, 1.0), "columns 0 and 2 are exact");
        assert!((out[1] - 0.30).abs() < 1e-3 && (out[3] - 0.30).abs() < 1e-3);
        // The outlier itself does not stretch the scale; the other element of its column may.
        assert!((out[5] - 1.27).abs() < 1e-3 && (out[7] - 0.30).abs() < 1e-3);
        assert_eq!(rounded(&x, 2, 6.0, &[1])[1], 0.301);
        let alone = rounded(&x[..4], 1, 6.0, &[]);
        assert!((alone[0] - 1.27).abs() < 1e-3 && alone[2] == 6.0);
    }

    #[test]
    fn errors_stay_within_half_a_step() {
        let x = random(3)(40 * 300);
        let out = rounded(&x, 40, 3.0, &[]);
        let mut exact = 0;
        for (x, out) in x.chunks(300).zip(out.chunks(300)) {
            let absmax = x.iter().map(|x| x.abs()).filter(|x| *x < 3.0).fold(0.0, f32::max);
            for (x, out) in x.iter().zip(out) {
                assert!((x - out).abs() <= absmax / 254.0 * 1.001 + x.abs() / 2048.0, "{x} became {out}");
                exact += usize::from(x == out);
            }
        }
        assert!((1000..9000).contains(&exact), "{exact} of 12000 are exact");
    }

    /// bitsandbytes' sum: an integer product in i32, scaled, and the outlier columns in floating point.
    #[test]
    fn the_forward_is_an_integer_product_and_the_backward_is_not() {
        use crate::matrix::Workspace;
        use crate::ops::frozen_linear;
        use crate::quant::QuantizedInt;
        use crate::view::{View, ViewMut};
        use crate::weight::{FrozenWeight, PlainData, PlainWeight};

        let workspace = Workspace::poisoned();
        let mut random = random(8);
        for tokens in [1, 3, 20] {
            let (rows, cols) = (19, 70);
            let weight = QuantizedInt::llm_int8(&PlainData::F32(random(rows * cols)), rows, cols, 6.0, &[5]).unwrap();
            let mut values = vec![f32::NAN; rows * cols];
            weight.dequantize_rows(0..rows, &mut values);
            let plain = PlainWeight::new(PlainData::F32(values.clone()), rows, cols);
            let mut x = random(tokens * cols);
            (0..tokens).for_each(|t| x[t * cols + 33] *= 10.0);
            x[33] = 9.0;

            let outlier = |c: usize| c == 5 || (0..tokens).any(|t| narrow(x[t * cols + c]).abs() >= 6.0);
            let mut want = vec![0f64; tokens * rows];
            for t in 0..tokens {
                let x = &x[t * cols..(t + 1) * cols];
                let within = |(c, x): (usize, &f32)| if c != 5 && x.abs() < 6.0 { narrow(*x).abs() } else { 0.0 };
                let absmax = x.iter().enumerate().map(within).fold(0.0, f32::max);
                let code = |x: f32| (narrow(x) * (127.0 / absmax)).round_ties_even() as i32;
                for r in 0..rows {
                    let (mut integers, mut exact) = (0i32, 0f64);
                    for c in 0..cols {
                        match outlier(c) {
                            true => exact += f64::from(x[c]) * f64::from(values[r * cols + c]),
                            false => integers += code(x[c]) * i32::from(weight.code(r, c)),
                        }
                    }
                    let scale = f64::from(absmax) / 127.0 * f64::from(weight.parts().scales[r]);
                    want[t * rows + r] = f64::from(integers) * scale + exact;
                }
            }
            let mut y = vec![f32::NAN; tokens * rows];
            let target = ViewMut::new(&mut y, tokens, rows);
            frozen_linear::forward(View::new(&x, tokens, cols), &weight, target, 0.0, &workspace).unwrap();
            crate::testing::assert_close("y", &y, &want, 1e-5);

            let dy = random(tokens * rows);
            let (mut dx, mut plain_dx) = (vec![f32::NAN; tokens * cols], vec![f32::NAN; tokens * cols]);
            for (weight, dx) in [(&weight as &dyn FrozenWeight, &mut dx), (&plain, &mut plain_dx)] {
                let dx = ViewMut::new(dx, tokens, cols);
                frozen_linear::backward(View::new(&dy, tokens, rows), weight, dx, 0.0, &workspace).unwrap();
            }
            let plain_dx: Vec<f64> = plain_dx.into_iter().map(f64::from).collect();
            crate::testing::assert_close("dx", &dx, &plain_dx, 1e-6);
        }
    }

    #[test]
    fn zeros_and_numbers_that_are_none() {
        assert_eq!(rounded(&[0.0; 6], 2, 6.0, &[]), [0.0; 6]);
        assert!(rounded(&[f32::NAN, 1.0], 1, 6.0, &[])[0].is_nan());
        assert_eq!(rounded(&[1e6, 1.0], 1, 6.0, &[])[0], 1e6, "beyond f16");
        assert!(rounded(&[], 0, 6.0, &[]).is_empty());
    }
}
