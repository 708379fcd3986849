//! Blocks of 256 whose groups have a scale and a minimum: `x ~ d s q - e t`.
//!
//! 1. Each group alone: of a dozen step widths around (max - min) / top, codes, then scale and minimum by least squares, then codes
//!    again and another fit; the pair of the least error is kept. The minimum is at most zero, as the formats have no other.
//! 2. d and e so that the largest scale and the largest minimum are the largest integers; s and t are the nearest integers.
//! 3. By turns: every group's s and t move to a neighbour with a smaller error as it will be read; d and e are fitted to all
//!    groups by least squares and rounded to f16. This ends when nothing gets better.
//!
//! Where integers are few, or all that is left is the rounding of d and e (blocks of one value), steps 2 and 3 are made from other
//! largest integers too.

use half::f16;

use super::lanes::{self, NOISE, STEPS, TINY, error, moments, squares, sums};
use super::pack::KBlock;
use super::{EXACT, SUPER, stored};

/// Most turns of step 3; few blocks need more.
const TURNS: usize = 4;

#[inline(always)]
pub(super) fn search<const N: usize, const G: usize>(
    x: &[f32; SUPER],
    w: &[f32; SUPER],
    top: f32,
    limit: f32,
) -> KBlock {
    let (xs, ws) = (x.as_chunks::<G>().0, w.as_chunks::<G>().0);
    let (mut a, mut b, mut m) = ([0f32; N], [0f32; N], [(0f32, 0f32); N]);
    for j in 0..N {
        m[j] = moments(&xs[j], &ws[j]);
        (a[j], b[j]) = group(&xs[j], &ws[j], m[j], top);
    }
    let largest = |values: &[f32; N]| values.iter().fold(0f32, |max, &x| if x > max { x } else { max });
    let (max_a, max_b) = (largest(&a), largest(&b));
    // Values beyond f32's squares leave no fit, which its caller is told by a d that is no number.
    let mut best = Fit::<N> { error: f32::INFINITY, d_stored: f16::NAN, ..Fit::default() };
    let exact = EXACT * squares(x, w);
    for (index, start) in [0.0, 0.7, 1.4, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0].into_iter().enumerate() {
        let few = limit < 16.0 && index < 3;
        let rounding = best.error < exact && best.error > 0.0;
        if index > 0 && !few && !rounding {
            break;
        }
        let mut fit = Fit::<N>::default();
        (fit.d_stored, fit.d) = stored(max_a / (limit - start));
        (fit.e_stored, fit.e) = stored(max_b / (limit - start));
        for j in 0..N {
            fit.s[j] = lanes::nearest(a[j] * lanes::inverse(fit.d), 0.0, limit);
            fit.t[j] = lanes::nearest(b[j] * lanes::inverse(fit.e), 0.0, limit);
        }
        fit.measure::<G>(xs, ws, top);
        for _ in 0..TURNS {
            let moved = fit.step::<G>(xs, ws, top, limit);
            let refitted = fit.refit::<G>(xs, ws, &m, top);
            if !(moved || refitted) {
                break;
            }
        }
        if fit.error < best.error {
            best = fit;
        }
    }
    best.block::<G>(xs, top)
}

/// Scale and minimum of a group, not yet rounded.
#[inline(always)]
fn group<const G: usize>(x: &[f32; G], w: &[f32; G], moments: (f32, f32), top: f32) -> (f32, f32) {
    let (mut low, mut high) = (0f32, f32::NEG_INFINITY);
    for &x in x {
        low = if x < low { x } else { low };
        high = if x > high { x } else { high };
    }
    let range = high - low;
    // All of one value, zero or less.
    if !(range > TINY) {
        return (0.0, -low);
    }
    let noise = NOISE * squares(x, w);
    let mut best = (f32::INFINITY, range / top, -low);
    for step in STEPS {
        let inverse = (top + step) / range;
        let mut fit = least_squares(sums(x, w, -low, inverse, 0.0, top), moments);
        for _ in 0..2 {
            let Some((scale, min)) = fit else { break };
            let error = error(x, w, scale, min, 0.0, top);
            if error + noise < best.0 {
                best = (error, scale, min);
            }
            fit = least_squares(sums(x, w, min, 1.0 / scale, 0.0, top), moments);
        }
    }
    (best.1, best.2)
}

/// The scale and the minimum (at least zero, subtracted) of the least squares for fixed codes.
#[inline(always)]
fn least_squares(sums: lanes::Sums, (w, wx): (f32, f32)) -> Option<(f32, f32)> {
    let determinant = w * sums.qq - sums.q * sums.q;
    let (mut scale, mut min) =
        ((w * sums.xq - wx * sums.q) / determinant, (sums.q * sums.xq - sums.qq * wx) / determinant);
    // Codes that are all the same say nothing of a minimum.
    if !(determinant > 1e-5 * w * sums.qq && min > 0.0) {
        (scale, min) = (sums.xq / sums.qq, 0.0);
    }
    (scale > TINY && scale.is_finite() && min.is_finite()).then_some((scale, min))
}

/// A block's numbers, as they will be read.
struct Fit<const N: usize> {
    d: f32,
    e: f32,
    d_stored: f16,
    e_stored: f16,
    s: [f32; N],
    t: [f32; N],
    errors: [f32; N],
    error: f32,
}

impl<const N: usize> Default for Fit<N> {
    fn default() -> Self {
        Self {
            d: 0.0,
            e: 0.0,
            d_stored: f16::ZERO,
            e_stored: f16::ZERO,
            s: [0.0; N],
            t: [0.0; N],
            errors: [0.0; N],
            error: 0.0,
        }
    }
}

impl<const N: usize> Fit<N> {
    #[inline(always)]
    fn measure<const G: usize>(&mut self, xs: &[[f32; G]], ws: &[[f32; G]], top: f32) {
        self.error = 0.0;
        for j in 0..N {
            self.errors[j] = error(&xs[j], &ws[j], self.d * self.s[j], self.e * self.t[j], 0.0, top);
            self.error += self.errors[j];
        }
    }

    /// Moves every group's integers by at most one; whether any moved.
    #[inline(always)]
    fn step<const G: usize>(&mut self, xs: &[[f32; G]], ws: &[[f32; G]], top: f32, limit: f32) -> bool {
        let mut moved = false;
        for j in 0..N {
            let (s, t) = (self.s[j], self.t[j]);
            for ds in [-1.0, 0.0, 1.0] {
                for dt in [-1.0, 0.0, 1.0] {
                    let (s, t) = (s + ds, t + dt);
                    if (ds == 0.0 && dt == 0.0) || s < 0.0 || t < 0.0 || s > limit || t > limit {
                        continue;
                    }
                    let error = error(&xs[j], &ws[j], self.d * s, self.e * t, 0.0, top);
                    if error < self.errors[j] {
                        (self.errors[j], self.s[j], self.t[j]) = (error, s, t);
                        moved = true;
                    }
                }
            }
        }
        self.error = self.errors.iter().sum();
        moved
    }

    /// Fits d and e to the codes as they are; whether the block got better.
    #[inline(always)]
    fn refit<const G: usize>(&mut self, xs: &[[f32; G]], ws: &[[f32; G]], moments: &[(f32, f32); N], top: f32) -> bool {
        // sum of w (x - d (s q) + e t)^2: its normal equations.
        let (mut uu, mut uv, mut vv, mut xu, mut xv) = (0f64, 0f64, 0f64, 0f64, 0f64);
        for j in 0..N {
            let (s, t) = (f64::from(self.s[j]), f64::from(self.t[j]));
            let inverse = lanes::inverse(self.d * self.s[j]);
            let sums = sums(&xs[j], &ws[j], self.e * self.t[j], inverse, 0.0, top);
            uu += s * s * f64::from(sums.qq);
            uv += s * t * f64::from(sums.q);
            vv += t * t * f64::from(moments[j].0);
            xu += s * f64::from(sums.xq);
            xv += t * f64::from(moments[j].1);
        }
        let determinant = uu * vv - uv * uv;
        let (d, e) = match determinant > 1e-9 * uu * vv && determinant > 0.0 {
            true => ((xu * vv - xv * uv) / determinant, (xu * uv - xv * uu) / determinant),
            false if uu > 0.0 => ((xu + f64::from(self.e) * uv) / uu, f64::from(self.e)),
            false => return false,
        };
        if !(d > 0.0 && e >= 0.0) {
            return false;
        }
        let mut other = Self { s: self.s, t: self.t, ..Self::default() };
        (other.d_stored, other.d) = stored(d as f32);
        (other.e_stored, other.e) = stored(e as f32);
        if (other.d, other.e) == (self.d, self.e) {
            return false;
        }
        other.measure(xs, ws, top);
        let better = other.error < self.error;
        if better {
            *self = other;
        }
        better
    }

    #[inline(always)]
    fn block<const G: usize>(&self, xs: &[[f32; G]], top: f32) -> KBlock {
        let mut block = KBlock { groups: N, d: self.d_stored, min: self.e_stored, ..KBlock::default() };
        let codes = block.codes.as_chunks_mut::<G>().0;
        for j in 0..N {
            (block.scales[j], block.mins[j]) = (self.s[j] as i8, self.t[j] as u8);
            let (inverse, min) = (lanes::inverse(self.d * self.s[j]), self.e * self.t[j]);
            for (code, &x) in codes[j].iter_mut().zip(&xs[j]) {
                *code = lanes::code(x, min, inverse, 0.0, top) as i8;
            }
        }
        block
    }
}
