//! Functions of f32 numbers and sums of f32 rows in a form that the compiler turns into vector code: no branches, no
//! tables, no library calls.
//!
//! `exp(x) = 2^n exp(r)` with `n = round(x / ln 2)` and `r = x - n ln 2`, `|r| <= ln(2) / 2` (Cody and Waite's two-part
//! reduction); `exp(r) = 1 + r + r^2 P(r)`, where `P` has degree 4 and was fitted with the Remez exchange to the least
//! relative error (3.1e-9).
//!
//! Sums run in [`LANES`] separate f32 accumulators, element `i` in accumulator `i mod LANES`, which are then added in
//! pairs. The order is part of the definition and there is no fused multiply-add, so the results are the same on every
//! machine.
//!
//! Call these from loops inside [`crate::simd::vectorize`].

/// `e^x` with a relative error of at most 2e-7 where the result is a normal number (`x > -87.3`).
///
/// Below, the result is rounded to a subnormal number and reaches 0 at `-104`; above 88.72 it is infinite; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, which also is in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 = LN2_HIGH + LN2_LOW; LN2_HIGH has 9 significant bits, so that n * LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const P: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 8.368_745e-3, 1.381_454e-3];

    // Comparisons instead of min and max, which would replace NaN.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let p = (((P[4] * r + P[3]) * r + P[2]) * r + P[1]) * r + P[0];
    let exp_r = (p * r * r + r) + 1.0;
    // 2^n in two factors: n reaches from -150 to 128, beyond what one exponent field can hold.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    exp_r * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `2^n` for `-126 <= n <= 127`.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Replaces every element by [`exp`] of it.
#[allow(dead_code, reason = "for operations that are merged after this file")]
pub(crate) fn exp_inplace(x: &mut [f32]) {
    crate::simd::vectorize(
        #[inline(always)]
        || {
            for x in x.iter_mut() {
                *x = exp(*x);
            }
        },
    );
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The number of accumulators of a sum: two AVX-512 registers, enough to hide the latency of the addition.
const LANES: usize = 32;

/// `sum_i a[i] b[i]`.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks(), b.as_chunks());
    let mut sums = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        add_products(&mut sums, a, b);
    }
    add_products(&mut sums, &padded(a_rest), &padded(b_rest));
    add_in_pairs(sums)
}

/// `sum_i a[i] b[i] c[i]`.
#[inline(always)]
pub(crate) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest), (c, c_rest)) = (a.as_chunks(), b.as_chunks(), c.as_chunks());
    let mut sums = [0f32; LANES];
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        add_products(&mut sums, &products(a, b), c);
    }
    add_products(&mut sums, &products(&padded(a_rest), &padded(b_rest)), &padded(c_rest));
    add_in_pairs(sums)
}

#[inline(always)]
fn products(a: &[f32; LANES], b: &[f32; LANES]) -> [f32; LANES] {
    let mut products = *a;
    for (product, b) in products.iter_mut().zip(b) {
        *product *= b;
    }
    products
}

#[inline(always)]
fn add_products(sums: &mut [f32; LANES], a: &[f32; LANES], b: &[f32; LANES]) {
    for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
        *sum += a * b;
    }
}

/// The last, partial block with zeros behind it. (Adding it to the first few accumulators instead would index them by a
/// variable, which keeps the compiler from holding them in registers.)
#[inline(always)]
fn padded(rest: &[f32]) -> [f32; LANES] {
    let mut block = [0.0; LANES];
    block[..rest.len()].copy_from_slice(rest);
    block
}

#[inline(always)]
fn add_in_pairs(sums: [f32; LANES]) -> f32 {
    let mut sums = sums;
    let mut width = LANES / 2;
    while width > 0 {
        let (low, high) = sums.split_at_mut(width);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
        width /= 2;
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest relative error of `f` against `reference` over every `step`-th f32 from `from` to `to`.
    fn worst(from: f32, to: f32, step: usize, f: impl Fn(f32) -> f32, reference: impl Fn(f64) -> f64) -> f64 {
        assert!(from > 0.0 && to > from);
        let mut worst = 0f64;
        for bits in (from.to_bits()..=to.to_bits()).step_by(step) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let want = reference(f64::from(x));
                if want < f64::from(f32::MAX) && want > f64::from(f32::MIN_POSITIVE) {
                    worst = worst.max((f64::from(f(x)) - want).abs() / want);
                }
            }
        }
        worst
    }

    #[test]
    fn exp_is_within_2e_7_of_f64() {
        let error = worst(1e-30, 88.8, 97, exp, f64::exp);
        println!("exp: largest relative error {error:.2e}");
        assert!(error <= 2e-7, "{error:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
    }

    #[test]
    fn exp_at_its_limits() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::MIN), 0.0);
        assert_eq!(exp(-104.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(88.73), f32::INFINITY);
        assert!(exp(88.72) < f32::INFINITY);
        assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
        // Subnormal results: to one unit of the smallest number.
        for x in [-87.4f32, -90.0, -95.5, -100.0, -103.0, -103.9] {
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= 1.5e-45, "{x}");
        }
    }

    #[test]
    fn exp_inplace_gives_the_bits_of_exp() {
        let x: Vec<f32> = (0..1003).map(|i| (i as f32 - 500.0) * 0.2113).chain([f32::NAN, f32::NEG_INFINITY]).collect();
        let mut y = x.clone();
        exp_inplace(&mut y);
        assert!(x.iter().zip(&y).all(|(&x, y)| exp(x).to_bits() == y.to_bits()));
    }

    #[test]
    fn sigmoid_is_within_3e_7_of_f64() {
        let error = worst(1e-30, 87.0, 97, sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
        println!("sigmoid: largest relative error {error:.2e}");
        assert!(error <= 3e-7, "{error:e}");
        assert_eq!((sigmoid(f32::NEG_INFINITY), sigmoid(f32::INFINITY)), (0.0, 1.0));
        assert!(sigmoid(f32::NAN).is_nan());
    }
}
