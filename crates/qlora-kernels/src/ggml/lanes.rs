//! Sums over a group of elements, in eight lanes that are added at the end: loops that a compiler vectorizes, in an order that does
//! not depend on the machine.

const LANES: usize = 8;

/// A range of elements below this is none: everything in it is one value.
pub(super) const TINY: f32 = 1e-30;

/// Of two errors that differ by less than this part of the squares, the first is as good: what differs is f32's rounding. Groups of
/// the same values then get the same scale.
pub(super) const NOISE: f32 = 2e-7;

/// Codes more or less at the widest range that a step width is made for, the range itself first.
pub(super) const STEPS: [f32; 13] = [0.0, 0.15, -0.15, 0.3, -0.3, 0.45, -0.45, 0.6, -0.6, 0.75, -0.75, 0.9, -0.9];

/// The sums over a group's codes that a least-squares fit of `x ~ a q + b` needs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sums {
    /// `sum w q`
    pub(super) q: f32,
    /// `sum w q^2`
    pub(super) qq: f32,
    /// `sum w x q`
    pub(super) xq: f32,
}

/// Rounds halves to even, for magnitudes below 2^22.
#[inline(always)]
fn round(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// The nearest code to `(x + shift) inverse`.
#[inline(always)]
pub(super) fn code(x: f32, shift: f32, inverse: f32, low: f32, high: f32) -> f32 {
    round(clamp((x + shift) * inverse, low, high))
}

/// An integer's nearest neighbour in a range.
#[inline(always)]
pub(super) fn nearest(x: f32, low: f32, high: f32) -> f32 {
    round(clamp(x, low, high))
}

#[inline(always)]
fn total(lanes: [f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (b + f)) + ((c + g) + (d + h))
}

#[inline(always)]
pub(super) fn sums<const G: usize>(x: &[f32; G], w: &[f32; G], shift: f32, inverse: f32, low: f32, high: f32) -> Sums {
    let (mut sq, mut sqq, mut sxq) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
    let rows = x.as_chunks::<LANES>().0.iter().zip(w.as_chunks::<LANES>().0);
    for (x, w) in rows {
        for l in 0..LANES {
            let q = code(x[l], shift, inverse, low, high);
            let wq = w[l] * q;
            sq[l] += wq;
            sqq[l] += wq * q;
            sxq[l] += wq * x[l];
        }
    }
    Sums { q: total(sq), qq: total(sqq), xq: total(sxq) }
}

/// `sum w (scale q - min - x)^2`, as the group is read.
#[inline(always)]
pub(super) fn error<const G: usize>(x: &[f32; G], w: &[f32; G], scale: f32, min: f32, low: f32, high: f32) -> f32 {
    let inverse = inverse(scale);
    let mut sum = [0f32; LANES];
    let rows = x.as_chunks::<LANES>().0.iter().zip(w.as_chunks::<LANES>().0);
    for (x, w) in rows {
        for l in 0..LANES {
            let q = code(x[l], min, inverse, low, high);
            let difference = scale * q - min - x[l];
            sum[l] += w[l] * (difference * difference);
        }
    }
    total(sum)
}

/// `sum w` and `sum w x`.
#[inline(always)]
pub(super) fn moments<const G: usize>(x: &[f32; G], w: &[f32; G]) -> (f32, f32) {
    let (mut sw, mut swx) = ([0f32; LANES], [0f32; LANES]);
    let rows = x.as_chunks::<LANES>().0.iter().zip(w.as_chunks::<LANES>().0);
    for (x, w) in rows {
        for l in 0..LANES {
            sw[l] += w[l];
            swx[l] += w[l] * x[l];
        }
    }
    (total(sw), total(swx))
}

/// `sum w x^2`.
#[inline(always)]
pub(super) fn squares<const G: usize>(x: &[f32; G], w: &[f32; G]) -> f32 {
    let mut sum = [0f32; LANES];
    let rows = x.as_chunks::<LANES>().0.iter().zip(w.as_chunks::<LANES>().0);
    for (x, w) in rows {
        for l in 0..LANES {
            sum[l] += w[l] * x[l] * x[l];
        }
    }
    total(sum)
}

/// Nothing is divided by a scale of zero: all codes are then zero.
#[inline(always)]
pub(super) fn inverse(scale: f32) -> f32 {
    if scale.abs() < TINY { 0.0 } else { 1.0 / scale }
}
