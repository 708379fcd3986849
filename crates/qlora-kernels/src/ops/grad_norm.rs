//! The 2-norm of all gradients together, and the factor that clips them (`torch.nn.utils.clip_grad_norm_`).
//!
//! ```text
//! norm = sqrt(sum grad^2)         coefficient = min(1, max_norm / (norm + 1e-6))
//! ```
//!
//! Squares are summed in f64, in a fixed order: chunks of a fixed length, each in 16 accumulators, then the chunks one
//! after the other. The norm is therefore the same bits for any number of threads, and no f32 gradient overflows it: it
//! is NaN or infinite exactly if an element is, which [`first_non_finite`] then finds.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSlice;

use crate::error::{Error, Result};
use crate::parallel::TASK;
use crate::simd::vectorize;
use crate::view::View;

/// The square root of the sum of the squares of an f32 vector.
///
/// # Errors
/// If it has gaps, or its device fails.
pub fn global_norm<'a>(grad: impl Into<View<'a>>) -> Result<f64> {
    const OP: &str = "grad_norm";
    let grad = grad.into();
    #[cfg(feature = "cuda")]
    if grad.gpu().is_some() {
        return Ok(crate::cuda::optimizer::sum_of_squares(OP, grad.cuda(OP)?)?.sqrt());
    }
    let grad = contiguous(OP, grad)?;
    let sums: Vec<f64> = grad.par_chunks(TASK).map(sum_of_squares).collect();
    Ok(sums.iter().sum::<f64>().sqrt())
}

fn contiguous<'a>(op: &'static str, grad: View<'a>) -> Result<&'a [f32]> {
    grad.host(op)?.as_slice().ok_or_else(|| Error::invalid(op, "the gradient has gaps between its elements"))
}

fn sum_of_squares(chunk: &[f32]) -> f64 {
    const LANES: usize = 16;
    vectorize(
        #[inline(always)]
        move || {
            let mut sums = [0f64; LANES];
            let (blocks, rest) = chunk.as_chunks::<LANES>();
            for block in blocks {
                for (sum, &x) in sums.iter_mut().zip(block) {
                    *sum += f64::from(x) * f64::from(x);
                }
            }
            let rest: f64 = rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            sums.iter().sum::<f64>() + rest
        },
    )
}

/// The factor that scales a gradient of norm `norm` to a norm of at most `max_norm`; NaN if `norm` is NaN.
pub fn clip_coefficient(norm: f64, max_norm: f64) -> f32 {
    let coefficient = max_norm / (norm + 1e-6);
    // Not `min`, which would turn NaN into 1.
    if coefficient > 1.0 { 1.0 } else { coefficient as f32 }
}

/// The index of the first NaN or infinite element of an f32 vector.
///
/// # Errors
/// If it has gaps, or its device fails.
pub fn first_non_finite<'a>(grad: impl Into<View<'a>>) -> Result<Option<usize>> {
    const OP: &str = "first_non_finite";
    let grad = grad.into();
    #[cfg(feature = "cuda")]
    if grad.gpu().is_some() {
        return crate::cuda::optimizer::first_non_finite(OP, grad.cuda(OP)?);
    }
    let grad = contiguous(OP, grad)?;
    const EXPONENT: u32 = 0x7f80_0000;
    let largest = |chunk: &[f32]| {
        vectorize(
            #[inline(always)]
            move || {
                let mut largest = 0;
                for x in chunk {
                    largest = largest.max(x.to_bits() & 0x7fff_ffff);
                }
                largest
            },
        )
    };
    // Without its sign, a number is finite if and only if its bits are below those of infinity.
    let Some(chunk) = grad.par_chunks(TASK).position_first(|chunk| largest(chunk) >= EXPONENT) else {
        return Ok(None);
    };
    let start = chunk * TASK;
    Ok(grad[start..].iter().position(|x| !x.is_finite()).map(|i| start + i))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    #[test]
    fn the_norm_matches_f64_and_does_not_depend_on_threads() {
        for len in [0, 1, 7, 123, TASK, 3 * TASK + 77] {
            let grad = random(len as u64)(len);
            let want = grad.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let norm = global_norm(&grad).unwrap();
            assert!((norm - want).abs() <= 1e-13 * want, "{len}: {norm} {want}");
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                assert_eq!(pool.install(|| global_norm(&grad).unwrap()).to_bits(), norm.to_bits());
            }
        }
        assert!(global_norm(&[f32::MAX; 3]).unwrap().is_finite());
        assert_eq!(global_norm(&[1e-30, 0.0]).unwrap() as f32, 1e-30);
    }

    #[test]
    fn clipping_is_that_of_pytorch() {
        assert_eq!(clip_coefficient(0.5, 1.0), 1.0);
        assert_eq!(clip_coefficient(4.0, 1.0), (1.0 / 4.000_001) as f32);
        assert_eq!(clip_coefficient(0.0, 1.0), 1.0);
        assert_eq!(clip_coefficient(f64::INFINITY, 1.0), 0.0);
        assert!(clip_coefficient(f64::NAN, 1.0).is_nan());
    }

    #[test]
    fn the_first_non_finite_element_is_found() {
        let len = 4 * TASK + 5;
        let mut grad = random(1)(len);
        assert_eq!(first_non_finite(&grad).unwrap(), None);
        assert_eq!(first_non_finite(&[]).unwrap(), None);
        assert_eq!(first_non_finite(&[f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45]).unwrap(), None);
        for (at, x) in [(len - 1, f32::NAN), (2 * TASK + 3, f32::NEG_INFINITY), (TASK, -f32::NAN), (0, f32::INFINITY)] {
            grad[at] = x;
            assert_eq!(first_non_finite(&grad).unwrap(), Some(at));
            assert!(!global_norm(&grad).unwrap().is_finite());
        }
    }
}
