//! The elementwise passes over scores `[keys, width]`, `width` a multiple of 16.

use crate::math;
use crate::simd::vectorize;

/// `max[c] = max(max[c], scores[j][c] over all j)`; NaN is passed over (the exponentials keep it).
pub(super) fn column_max(scores: &[f32], max: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for row in scores.chunks_exact(max.len()) {
                for (max, &s) in max.iter_mut().zip(row) {
                    *max = if s > *max { s } else { *max };
                }
            }
        },
    );
}

/// Prepares for a larger maximum: `factor` becomes what earlier sums have to be multiplied by (0 where nothing was visible
/// before), `shift` what is subtracted from the scores (0 where nothing is visible yet) and `before` the maximum.
pub(super) fn raise(max: &[f32], before: &mut [f32], shift: &mut [f32], factor: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            let columns = max.iter().zip(before.iter_mut()).zip(shift.iter_mut()).zip(factor.iter_mut());
            for (((&max, before), shift), factor) in columns {
                *shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
                *factor = math::exp(*before - *shift);
                *before = max;
            }
        },
    );
}

/// `scores[j][c] = exp(scores[j][c] - shift[c])`.
pub(super) fn exp_shifted(scores: &mut [f32], shift: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for row in scores.chunks_exact_mut(shift.len()) {
                for (s, shift) in row.iter_mut().zip(shift) {
                    *s = math::exp(*s - shift);
                }
            }
        },
    );
}

/// `sum[c] = factor[c] * sum[c] + (sum over j of x[j][c])`.
pub(super) fn add_columns(x: &[f32], factor: &[f32], sum: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            let width = sum.len();
            for c in (0..width).step_by(16) {
                let mut lanes = [0f32; 16];
                for row in x.chunks_exact(width) {
                    for (lane, x) in lanes.iter_mut().zip(&row[c..c + 16]) {
                        *lane += x;
                    }
                }
                for ((sum, factor), lane) in sum[c..c + 16].iter_mut().zip(&factor[c..c + 16]).zip(lanes) {
                    *sum = factor * *sum + lane;
                }
            }
        },
    );
}

/// `dp[j][c] = p[j][c] * (dp[j][c] - delta[c])`: the gradient of the scores from that of the probabilities.
pub(super) fn score_gradient(p: &[f32], dp: &mut [f32], delta: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            for (p, dp) in p.chunks_exact(delta.len()).zip(dp.chunks_exact_mut(delta.len())) {
                for ((dp, p), delta) in dp.iter_mut().zip(p).zip(delta) {
                    *dp = p * (*dp - delta);
                }
            }
        },
    );
}

/// Multiplies row `c` of `x [factor.len(), width]` by `factor[c]`.
pub(super) fn scale_rows(x: &mut [f32], factor: &[f32]) {
    vectorize(
        #[inline(always)]
        || {
            let width = x.len() / factor.len();
            for (row, factor) in x.chunks_exact_mut(width).zip(factor) {
                for x in row {
                    *x *= factor;
                }
            }
        },
    );
}

/// `sum_i a[i] b[i]`.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    vectorize(
        #[inline(always)]
        || math::dot(a, b),
    )
}
