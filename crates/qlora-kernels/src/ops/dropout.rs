//! Dropout whose mask is computed, not stored.
//!
//! Element `i` (counted row by row over the whole matrix) is kept if a hash of `(seed, stream, i)` says so, and is then
//! multiplied by `1 / (1 - p)`; otherwise it becomes 0. Forward, recomputation and backward see the same mask without
//! any memory for it, whatever the split of rows over calls and threads.
//!
//! The hash is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) used as a counter: `mix(key + i * GAMMA)`, where `mix` is its
//! finalizer, `GAMMA` its increment and `key = mix(mix(seed) + stream * GAMMA)`. The element is kept if the upper 32 bits
//! are at least `p * 2^32`. Two streams are two stretches of one cycle of 2^64 numbers from random starting points.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};

use crate::error::{Error, Result};
use crate::parallel::rows_per_task;
use crate::simd::vectorize;
use crate::view::{View, ViewMut};

/// The dropout of an input: its probability and the numbers that determine the mask.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability that an element is dropped: `0 <= p < 1`.
    pub p: f32,
    /// Picks the family of masks: one for each forward pass.
    pub seed: u64,
    /// Picks the mask in the family: one for each place in the model.
    pub stream: u64,
    /// The row of the matrix the mask belongs to that the first row of a view is: not 0 where a view is a part of it.
    pub first_row: usize,
}

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finalizer of SplitMix64: a bijection in which every input bit moves about half of the output bits.
#[inline(always)]
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A [`Dropout`] made ready for its inner loop.
#[derive(Clone, Copy)]
struct Mask {
    key: u64,
    threshold: u32,
    scale: f32,
}

impl Mask {
    fn new(dropout: &Dropout) -> Self {
        let key = mix(mix(dropout.seed).wrapping_add(dropout.stream.wrapping_mul(GAMMA)));
        // For p < 1 in f32 this is at most 2^32 - 2^8.
        let threshold = (f64::from(dropout.p) * 2f64.powi(32)).round() as u32;
        Self { key, threshold, scale: 1.0 / (1.0 - dropout.p) }
    }

    #[inline(always)]
    fn keeps(self, index: u64) -> bool {
        let bits = mix(self.key.wrapping_add(index.wrapping_mul(GAMMA)));
        (bits >> 32) as u32 >= self.threshold
    }
}

impl Dropout {
    /// The same mask for the rows from `row` on.
    pub fn at_row(self, row: usize) -> Self {
        Self { first_row: self.first_row + row, ..self }
    }

    /// Whether element `index` of the whole matrix is kept.
    pub fn keeps(&self, index: u64) -> bool {
        Mask::new(self).keeps(index)
    }

    /// The factor of the elements that are kept: `1 / (1 - p)`.
    pub fn scale(&self) -> f32 {
        Mask::new(self).scale
    }

    /// An error that names `op` unless `0 <= p < 1`.
    pub fn check(&self, op: &'static str) -> Result<()> {
        if (0.0..1.0).contains(&self.p) {
            return Ok(());
        }
        Err(Error::invalid(op, format!("the dropout probability is {}; it must be at least 0 and less than 1", self.p)))
    }
}

/// `y = x * mask / (1 - p)`; `x`, `y`: `[rows, width]`.
///
/// # Errors
/// If the shapes differ, `p` is out of range, or a view is not on the CPU.
pub fn forward(dropout: &Dropout, x: View, y: ViewMut) -> Result<()> {
    run::<false>("dropout", dropout, x, y)
}

/// `dx = dx + dy * mask / (1 - p)`; `dy`, `dx`: `[rows, width]`.
///
/// # Errors
/// If the shapes differ, `p` is out of range, or a view is not on the CPU.
pub fn backward(dropout: &Dropout, dy: View, dx: ViewMut) -> Result<()> {
    run::<true>("dropout_backward", dropout, dy, dx)
}

fn run<const ADD: bool>(op: &'static str, dropout: &Dropout, x: View, y: ViewMut) -> Result<()> {
    dropout.check(op)?;
    let [rows, cols] = x.shape();
    y.expect(op, "the output", rows, cols)?;
    let (mask, first_row) = (Mask::new(dropout), dropout.first_row);
    #[cfg(feature = "cuda")]
    if y.gpu().is_some() {
        let Mask { key, threshold, scale } = mask;
        return crate::cuda::ops::dropout(op, ADD, x.cuda(op)?, y.cuda(op)?, first_row, key, threshold, scale);
    }
    let (x, y) = (x.host(op)?, y.host(op)?);
    y.par_rows_mut().enumerate().with_min_len(rows_per_task(cols)).for_each(|(i, y)| {
        let (x, first) = (x.row(i), (first_row + i) as u64 * cols as u64);
        vectorize(
            #[inline(always)]
            move || {
                for ((y, x), index) in y.iter_mut().zip(x).zip(first..) {
                    let kept = if mask.keeps(index) { x * mask.scale } else { 0.0 };
                    *y = if ADD { *y + kept } else { kept };
                }
            },
        );
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SHAPES, Window, random};

    #[test]
    fn values_are_dropped_or_scaled_as_the_mask_says_whatever_the_split() {
        for (rows, cols) in SHAPES {
            let dropout = Dropout { p: 0.3, seed: 5, stream: 11, first_row: 0 };
            let x = random(2)(rows * cols);
            let source = Window::of(&x, rows, cols, 3);
            let mut y = Window::poisoned(rows, cols, 1);
            let cut = rows / 2;
            forward(&dropout, source.view().slice_rows(0..cut), y.view_mut().slice_rows(0..cut)).unwrap();
            let rest = y.view_mut().slice_rows(cut..rows);
            forward(&dropout.at_row(cut), source.view().slice_rows(cut..rows), rest).unwrap();
            let scale = 1.0 / (1.0 - 0.3f32);
            let want: Vec<f32> =
                x.iter().zip(0..).map(|(x, i)| if dropout.keeps(i) { x * scale } else { 0.0 }).collect();
            assert_eq!(y.to_vec(), want);

            let mut sum = Window::of(&x, rows, cols, 2);
            backward(&dropout, source.view(), sum.view_mut()).unwrap();
            let want: Vec<f32> = x.iter().zip(&want).map(|(x, y)| x + y).collect();
            assert_eq!(sum.to_vec(), want);
        }
    }

    /// The mask as 1 (kept) and 0.
    fn bits(dropout: Dropout, len: usize) -> Vec<f64> {
        (0..len as u64).map(|i| f64::from(u8::from(dropout.keeps(i)))).collect()
    }

    /// The correlation of two masks of keep rate `q`, in standard deviations from 0.
    fn correlation(a: &[f64], b: &[f64], q: f64) -> f64 {
        let n = a.len().min(b.len()) as f64;
        a.iter().zip(b).map(|(a, b)| (a - q) * (b - q)).sum::<f64>() / (n.sqrt() * q * (1.0 - q))
    }

    #[test]
    fn the_mask_has_its_rate_and_its_elements_are_independent() {
        const N: usize = 1 << 18;
        // 5 standard deviations: for the 180 numbers below the chance of a false alarm is 1e-4; the mask is fixed, so it
        // either passes always or never.
        const LIMIT: f64 = 5.0;
        for (p, seed, stream) in [(0.05, 0, 0), (0.1, 1, 0), (0.5, 42, 3), (0.9, u64::MAX, u64::MAX)] {
            let dropout = Dropout { p, seed, stream, first_row: 0 };
            let (mask, q) = (bits(dropout, N), 1.0 - f64::from(p));
            let rate = (mask.iter().sum::<f64>() - N as f64 * q) / (N as f64 * q * (1.0 - q)).sqrt();
            assert!(rate.abs() < LIMIT, "p {p}: keep rate is {rate:.1} sigma off");
            // Neighbours, and neighbouring rows of usual widths.
            for lag in (1..=32).chain([64, 123, 576, 1024, 1536, 4096]) {
                let z = correlation(&mask, &mask[lag..], q);
                assert!(z.abs() < LIMIT, "p {p}: correlation at distance {lag} is {z:.1} sigma");
            }
            // Masks that differ in one bit of seed or stream, or swap the two.
            for other in [
                Dropout { seed: seed ^ 1, ..dropout },
                Dropout { stream: stream ^ 1, ..dropout },
                Dropout { seed: seed ^ (1 << 40), ..dropout },
                Dropout { seed: stream.wrapping_add(9), stream: seed, p, first_row: 0 },
            ] {
                let z = correlation(&mask, &bits(other, N), q);
                assert!(z.abs() < LIMIT, "{dropout:?} and {other:?}: correlation {z:.1} sigma");
            }
            // Kept counts of blocks of 64 vary as those of independent elements do.
            let variance = mask
                .chunks_exact(64)
                .map(|block| (block.iter().sum::<f64>() - 64.0 * q).powi(2) / (64.0 * q * (1.0 - q)))
                .sum::<f64>()
                / (N / 64) as f64;
            assert!((variance - 1.0).abs() < LIMIT * (2.5 / (N / 64) as f64).sqrt(), "p {p}: variance {variance}");
        }
    }

    #[test]
    fn zero_keeps_everything_and_one_is_refused() {
        let dropout = Dropout { p: 0.0, seed: 1, stream: 2, first_row: 0 };
        assert!((0..10_000).all(|i| dropout.keeps(i)));
        assert_eq!(dropout.scale(), 1.0);
        for p in [1.0, -0.1, f32::NAN] {
            let error = Dropout { p, ..dropout }.check("lora_linear").unwrap_err();
            assert!(error.to_string().starts_with("lora_linear: the dropout probability is"), "{error}");
        }
        // The largest p below 1 keeps next to nothing, and its threshold does not overflow.
        let most = Dropout { p: 1.0 - f32::EPSILON / 2.0, ..dropout };
        assert!((0..10_000).all(|i| !most.keeps(i)));
    }
}
