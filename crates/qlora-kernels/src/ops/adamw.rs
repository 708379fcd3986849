//! AdamW (arXiv 1711.05101) as PyTorch's `torch.optim.AdamW` computes it, over flat f32 buffers, in one pass.
//!
//! With `g = grad_scale * grad` and step `t` counted from 1:
//!
//! ```text
//! param *= 1 - lr * weight_decay
//! m += (1 - beta1) (g - m)                v = beta2 v + (1 - beta2) g^2
//! param -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//! ```
//!
//! Scalars are computed in f64 and rounded once; elements are f32. Every element is computed by itself, so results do
//! not depend on the number of threads.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use crate::error::{Error, Result};
use crate::parallel::TASK;
use crate::simd::vectorize;
use crate::view::{View, ViewMut};

/// The settings of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// The learning rate.
    pub lr: f64,
    /// The decay of the gradient's moving average (0.9).
    pub beta1: f64,
    /// The decay of the squared gradient's moving average (0.999).
    pub beta2: f64,
    /// The term added to the denominator for numerical stability (1e-8).
    pub eps: f64,
    /// The share of the parameter, times `lr`, that is taken away in each step.
    pub weight_decay: f64,
}

const OP: &str = "adamw";

/// The numbers of one step, rounded once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scalars {
    grad_scale: f32,
    decay: f32,
    step_size: f32,
    v_correction: f32,
    new_m: f32,
    old_v: f32,
    new_v: f32,
    eps: f32,
}

impl Scalars {
    #[inline(always)]
    pub(super) fn apply(&self, param: &mut f32, grad: f32, m: &mut f32, v: &mut f32) {
        let g = grad * self.grad_scale;
        *m += (g - *m) * self.new_m;
        *v = *v * self.old_v + self.new_v * g * g;
        *param = *param * self.decay - self.step_size * *m / (v.sqrt() / self.v_correction + self.eps);
    }
}

/// One step, the `step`-th from 1: updates `param` and the moments `m` and `v` (zeros before the first step).
///
/// `grad_scale` multiplies the gradient: the coefficient of gradient clipping, or 1.
///
/// # Errors
/// If the buffers differ in length, `step` is 0, or a setting is out of range; nothing is written then.
pub fn step<'a>(
    config: &AdamW,
    step: u64,
    grad_scale: f32,
    param: impl Into<ViewMut<'a>>,
    grad: impl Into<View<'a>>,
    m: impl Into<ViewMut<'a>>,
    v: impl Into<ViewMut<'a>>,
) -> Result<()> {
    let scalars = config.scalars(OP, step, grad_scale)?;
    let (param, grad, m, v) = (param.into(), grad.into(), m.into(), v.into());
    let len = param.rows() * param.cols();
    Error::check_shape(OP, "grad", &[grad.rows() * grad.cols()], &[len])?;
    Error::check_shape(OP, "m", &[m.rows() * m.cols()], &[len])?;
    Error::check_shape(OP, "v", &[v.rows() * v.cols()], &[len])?;
    #[cfg(feature = "cuda")]
    if param.gpu().is_some() {
        return crate::cuda::optimizer::adamw(OP, config, step, grad_scale, param, grad, m, v);
    }
    let (mut param, grad, mut m, mut v) = (param.host(OP)?, grad.host(OP)?, m.host(OP)?, v.host(OP)?);
    let gaps = || Error::invalid(OP, "a buffer has gaps between its elements");
    let (param, grad) = (param.as_mut_slice().ok_or_else(gaps)?, grad.as_slice().ok_or_else(gaps)?);
    let (m, v) = (m.as_mut_slice().ok_or_else(gaps)?, v.as_mut_slice().ok_or_else(gaps)?);

    param
        .par_chunks_mut(TASK)
        .zip(grad.par_chunks(TASK))
        .zip(m.par_chunks_mut(TASK))
        .zip(v.par_chunks_mut(TASK))
        .for_each(|(((param, grad), m), v)| {
            vectorize(
                #[inline(always)]
                move || {
                    for (((param, grad), m), v) in param.iter_mut().zip(grad).zip(m.iter_mut()).zip(v.iter_mut()) {
                        scalars.apply(param, *grad, m, v);
                    }
                },
            );
        });
    Ok(())
}

impl AdamW {
    /// The numbers of step `step`, if it and the settings are in range.
    pub(super) fn scalars(&self, op: &'static str, step: u64, grad_scale: f32) -> Result<Scalars> {
        self.check(op)?;
        if step == 0 {
            return Err(Error::invalid(op, "steps are counted from 1"));
        }
        let Self { lr, beta1, beta2, eps, weight_decay } = *self;
        let t = step as f64;
        Ok(Scalars {
            grad_scale,
            decay: (1.0 - lr * weight_decay) as f32,
            step_size: (lr / (1.0 - beta1.powf(t))) as f32,
            v_correction: (1.0 - beta2.powf(t)).sqrt() as f32,
            new_m: (1.0 - beta1) as f32,
            old_v: beta2 as f32,
            new_v: (1.0 - beta2) as f32,
            eps: eps as f32,
        })
    }

    fn check(&self, op: &'static str) -> Result<()> {
        let positive = |x: f64| x.is_finite() && x >= 0.0;
        let fraction = |x: f64| (0.0..1.0).contains(&x);
        for (what, x, fits, range) in [
            ("lr", self.lr, positive(self.lr), "at least 0"),
            ("beta1", self.beta1, fraction(self.beta1), "at least 0 and less than 1"),
            ("beta2", self.beta2, fraction(self.beta2), "at least 0 and less than 1"),
            ("eps", self.eps, positive(self.eps), "at least 0"),
            ("weight_decay", self.weight_decay, positive(self.weight_decay), "at least 0"),
        ] {
            if !fits {
                return Err(Error::invalid(op, format!("{what} is {x}; it must be {range}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random, to_f64};

    const CONFIG: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };

    /// Two steps in f64 by the textbook: bias-corrected moments first.
    #[test]
    fn steps_follow_the_formula_in_f64() {
        for len in [1, 7, 123, 40_000] {
            let mut random = random(len as u64);
            let (mut param, grads) = (random(len), [random(len), random(len)]);
            let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
            let mut want = to_f64(&param);
            let (mut m64, mut v64) = (vec![0f64; len], vec![0f64; len]);
            for (t, grad) in (1..).zip(&grads) {
                step(&CONFIG, t, 0.5, &mut param, grad, &mut m, &mut v).unwrap();
                for i in 0..len {
                    let g = 0.5 * f64::from(grad[i]);
                    m64[i] = 0.9 * m64[i] + 0.1 * g;
                    v64[i] = 0.999 * v64[i] + 0.001 * g * g;
                    let m_hat = m64[i] / (1.0 - 0.9f64.powi(t as i32));
                    let v_hat = v64[i] / (1.0 - 0.999f64.powi(t as i32));
                    want[i] = want[i] * (1.0 - 1e-3) - 1e-2 * m_hat / (v_hat.sqrt() + 1e-8);
                }
                assert_close("param", &param, &want, 1e-6);
                assert_close("m", &m, &m64, 1e-6);
                assert_close("v", &v, &v64, 1e-6);
            }
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let len = 5 * TASK + 321;
        let run = |threads: usize| {
            let mut random = random(6);
            let (mut param, grad) = (random(len), random(len));
            let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                for t in 1..4 {
                    step(&CONFIG, t, 0.9, &mut param, &grad, &mut m, &mut v).unwrap();
                }
            });
            (param, m, v)
        };
        let one = run(1);
        assert!(one.0.iter().all(|x| x.is_finite()));
        assert!(one == run(3));
    }

    #[test]
    fn what_is_out_of_range_is_named_and_nothing_is_written() {
        let mut param = [1.0; 3];
        let mut run = |config: AdamW, t: u64, grad: &[f32]| {
            let error = step(&config, t, 1.0, &mut param, grad, &mut [0.0; 3], &mut [0.0; 3]).unwrap_err();
            error.to_string()
        };
        assert_eq!(run(CONFIG, 0, &[1.0; 3]), "adamw: steps are counted from 1");
        assert_eq!(run(CONFIG, 1, &[1.0; 2]), "adamw: grad has shape [2], expected [3]");
        let message = run(AdamW { beta2: 1.0, ..CONFIG }, 1, &[1.0; 3]);
        assert_eq!(message, "adamw: beta2 is 1; it must be at least 0 and less than 1");
        assert!(run(AdamW { lr: f64::NAN, ..CONFIG }, 1, &[1.0; 3]).contains("lr is NaN"));
        assert_eq!(param, [1.0; 3]);
    }
}
