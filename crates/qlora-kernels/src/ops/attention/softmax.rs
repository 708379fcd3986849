//! The elementwise passes over scores `[keys, width]`, `width` a multiple of 16.

use crate::math;
use crate::simd::vectorize;

/// `max[c] = max(max[c], scores[j][c] over all j)`; NaN is passed over (the exponentials keep it).
pub(super) fn column_max(scores: &[f32], max: &mut [f32]) {
    vectorize(
        #[inline(always)]
        || {
            for row in scores.chunks_exact(max.len()) {
                max.iter_mut().zip(row).for_each(|(max, &s)| *max = if s > *max { s } else { *max });
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
            for (((&max, before), shift), factor) in
                max.iter().zip(before.iter_mut()).zip(shift.iter_mut()).zip(factor.iter_mut())
            {
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
                row.iter_mut().zip(shift).for_each(|(s, &shift)| *s = math::exp(*s - shift));
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
                    lanes.iter_mut().zip(&row[c..c + 16]).for_each(|(lane, x)| *lane += x);
                }
                let (sum, factor) = (&mut sum[c..c + 16], &factor[c..c + 16]);
                sum.iter_mut().zip(factor).zip(lanes).for_each(|((sum, factor), lane)| *sum = factor * *sum + lane);
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
                dp.iter_mut().zip(p).zip(delta).for_each(|((dp, p), delta)| *dp = p * (*dp - delta));
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
                row.iter_mut().for_each(|x| *x *= factor);
            }
        },
    );
}

/// The sum of `a[i] * b[i]`, in 16 lanes.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    vectorize(
        #[inline(always)]
        || {
            let mut lanes = [0f32; 16];
            let (a16, b16) = (a.chunks_exact(16), b.chunks_exact(16));
            let tail: f32 = a16.remainder().iter().zip(b16.remainder()).map(|(a, b)| a * b).sum();
            for (a, b) in a16.zip(b16) {
                lanes.iter_mut().zip(a).zip(b).for_each(|((lane, a), b)| *lane += a * b);
            }
            lanes.iter().sum::<f32>() + tail
        },
    )
}
