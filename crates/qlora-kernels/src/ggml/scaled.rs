//! Blocks of 256 in 16 groups with a scale each: `x ~ d s q`, q from `low` to `-low - 1`, s from `limit` to `-limit - 1`.
//!
//! The search is that of `affine` without minima. A code reaches one further below zero than above it, and so does a scale: of
//! both signs of a group's scale the better one is taken, and the block's largest scale becomes the lowest integer.

use half::f16;

use super::lanes::{self, NOISE, STEPS, TINY, error, squares, sums};
use super::pack::KBlock;
use super::{EXACT, SUPER, stored};

const GROUP: usize = 16;
const GROUPS: usize = SUPER / GROUP;
const TURNS: usize = 4;

#[inline(always)]
pub(super) fn search(x: &[f32; SUPER], w: &[f32; SUPER], low: f32, limit: f32) -> KBlock {
    let (xs, ws) = (x.as_chunks::<GROUP>().0, w.as_chunks::<GROUP>().0);
    let mut a = [0f32; GROUPS];
    for j in 0..GROUPS {
        a[j] = scale(&xs[j], &ws[j], low, -low - 1.0);
    }
    let largest = a.iter().fold(0f32, |max, &a| if a.abs() > max.abs() { a } else { max });
    let mut best = Fit { error: f32::INFINITY, d_stored: f16::NAN, ..Fit::new(xs, ws, 0.0, low) };
    let exact = EXACT * squares(x, w);
    for start in 0..64u8 {
        let few = low > -8.0 && start < 5;
        let rounding = best.error < exact && best.error > 0.0;
        if start > 0 && !few && !rounding {
            break;
        }
        let start = if few || start == 0 { 0.5 * f32::from(start) } else { f32::from(start) };
        let mut fit = Fit::new(xs, ws, largest / (limit + start), low);
        for j in 0..GROUPS {
            fit.s[j] = lanes::nearest(a[j] * lanes::inverse(fit.d), limit, -limit - 1.0);
        }
        fit.measure();
        for _ in 0..TURNS {
            let moved = fit.step(limit);
            let refitted = fit.refit();
            if !(moved || refitted) {
                break;
            }
        }
        if fit.error < best.error {
            best = fit;
        }
    }
    best.block(xs)
}

/// The scale of `x ~ scale q` of the least error, among step widths around those at which the largest element becomes the lowest
/// or the highest code.
#[inline(always)]
pub(super) fn scale<const G: usize>(x: &[f32; G], w: &[f32; G], low: f32, high: f32) -> f32 {
    let largest = x.iter().fold(0f32, |max, &x| if x.abs() > max.abs() { x } else { max });
    if !(largest.abs() > TINY) {
        return 0.0;
    }
    // The error is `sum w x^2` less this gain: `(sum w x q)^2 / sum w q^2`.
    let noise = NOISE * squares(x, w);
    let mut best = (0f32, largest / low);
    for end in [low, high] {
        for step in STEPS {
            let mut inverse = (end + step) / largest;
            for _ in 0..2 {
                let sums = sums(x, w, 0.0, inverse, low, high);
                let scale = sums.xq / sums.qq;
                let gain = scale * sums.xq;
                if !(sums.qq > 0.0 && scale.abs() > TINY && scale.is_finite()) {
                    break;
                }
                if gain > best.0 + noise {
                    best = (gain, scale);
                }
                inverse = 1.0 / scale;
            }
        }
    }
    best.1
}

/// A block's numbers, as they will be read.
struct Fit<'a> {
    xs: &'a [[f32; GROUP]],
    ws: &'a [[f32; GROUP]],
    low: f32,
    d: f32,
    d_stored: f16,
    s: [f32; GROUPS],
    errors: [f32; GROUPS],
    error: f32,
}

impl<'a> Fit<'a> {
    #[inline(always)]
    fn new(xs: &'a [[f32; GROUP]], ws: &'a [[f32; GROUP]], d: f32, low: f32) -> Self {
        let (d_stored, d) = stored(d);
        Self { xs, ws, low, d, d_stored, s: [0.0; GROUPS], errors: [0.0; GROUPS], error: 0.0 }
    }

    #[inline(always)]
    fn error_of(&self, j: usize, s: f32) -> f32 {
        error(&self.xs[j], &self.ws[j], self.d * s, 0.0, self.low, -self.low - 1.0)
    }

    #[inline(always)]
    fn measure(&mut self) {
        self.error = 0.0;
        for j in 0..GROUPS {
            self.errors[j] = self.error_of(j, self.s[j]);
            self.error += self.errors[j];
        }
    }

    /// Moves every group's integer by at most two, or to the other sign; whether any moved.
    #[inline(always)]
    fn step(&mut self, limit: f32) -> bool {
        let mut moved = false;
        for j in 0..GROUPS {
            let old = self.s[j];
            for candidate in [old - 2.0, old - 1.0, old + 1.0, old + 2.0, -old] {
                if candidate < limit || candidate > -limit - 1.0 {
                    continue;
                }
                let error = self.error_of(j, candidate);
                if error < self.errors[j] {
                    (self.errors[j], self.s[j], moved) = (error, candidate, true);
                }
            }
        }
        self.error = self.errors.iter().sum();
        moved
    }

    /// Fits d to the codes as they are; whether the block got better.
    #[inline(always)]
    fn refit(&mut self) -> bool {
        let (mut over, mut under) = (0f64, 0f64);
        for j in 0..GROUPS {
            let inverse = lanes::inverse(self.d * self.s[j]);
            let sums = sums(&self.xs[j], &self.ws[j], 0.0, inverse, self.low, -self.low - 1.0);
            let s = f64::from(self.s[j]);
            over += s * f64::from(sums.xq);
            under += s * s * f64::from(sums.qq);
        }
        if !(under > 0.0) {
            return false;
        }
        let mut other = Self { s: self.s, ..Self::new(self.xs, self.ws, (over / under) as f32, self.low) };
        if other.d == self.d || other.d == 0.0 {
            return false;
        }
        other.measure();
        let better = other.error < self.error;
        if better {
            *self = other;
        }
        better
    }

    #[inline(always)]
    fn block(&self, xs: &[[f32; GROUP]]) -> KBlock {
        let mut block = KBlock { groups: GROUPS, d: self.d_stored, ..KBlock::default() };
        let codes = block.codes.as_chunks_mut::<GROUP>().0;
        for j in 0..GROUPS {
            block.scales[j] = self.s[j] as i8;
            let inverse = lanes::inverse(self.d * self.s[j]);
            for (code, &x) in codes[j].iter_mut().zip(&xs[j]) {
                *code = lanes::code(x, 0.0, inverse, self.low, -self.low - 1.0) as i8;
            }
        }
        block
    }
}
