//! AdamW over a model's flat parameter buffer, with clipping by the global norm.
//!
//! The whole update of a step: `norm = |grad|`, `scale = min(1, max_grad_norm / (norm + 1e-6))`, then PyTorch's AdamW on
//! `scale * grad`. Gradient, moments and masters are flat f32 buffers of the same length.

use crate::config::TrainingOptions;
use crate::error::Result;
use qlora_kernels::ops::adamw::{self, AdamW};
use qlora_kernels::ops::grad_norm;

/// Gradient and moments of all trainable parameters, and the settings of the update.
#[derive(Clone, Debug)]
pub struct Optimizer {
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    max_grad_norm: f64,
    /// The gradient of the step that is being made.
    pub grad: Vec<f32>,
    /// The first moment.
    pub exp_avg: Vec<f32>,
    /// The second moment.
    pub exp_avg_sq: Vec<f32>,
}

impl Optimizer {
    /// Zero moments for `len` parameters.
    pub fn new(options: &TrainingOptions, len: usize) -> Self {
        Self {
            beta1: options.adam_beta1,
            beta2: options.adam_beta2,
            eps: options.adam_epsilon,
            weight_decay: options.weight_decay,
            max_grad_norm: options.max_grad_norm,
            grad: vec![0.0; len],
            exp_avg: vec![0.0; len],
            exp_avg_sq: vec![0.0; len],
        }
    }

    /// The 2-norm of the gradient, before clipping. Not finite if any element is not.
    pub fn grad_norm(&self) -> f64 {
        grad_norm::global_norm(&self.grad)
    }

    /// The first element of the gradient that is not finite.
    pub fn first_non_finite(&self) -> Option<usize> {
        grad_norm::first_non_finite(&self.grad)
    }

    /// Updates `masters` with the gradient, whose norm is `norm`; `step` counts from 1.
    ///
    /// # Errors
    /// If `masters` has another length.
    pub fn update(&mut self, step: u64, learning_rate: f64, norm: f64, masters: &mut [f32]) -> Result<()> {
        let scale = match self.max_grad_norm {
            max_norm if max_norm > 0.0 => grad_norm::clip_coefficient(norm, max_norm),
            _ => 1.0,
        };
        let Self { beta1, beta2, eps, weight_decay, .. } = *self;
        let settings = AdamW { lr: learning_rate, beta1, beta2, eps, weight_decay };
        adamw::step(&settings, step, scale, masters, &self.grad, &mut self.exp_avg, &mut self.exp_avg_sq)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_scales_what_the_moments_see() {
        let moments = |max_grad_norm| {
            let options = TrainingOptions { max_grad_norm, ..Default::default() };
            let mut optimizer = Optimizer::new(&options, 2);
            optimizer.grad.copy_from_slice(&[3.0, 4.0]);
            let norm = optimizer.grad_norm();
            assert_eq!(norm, 5.0);
            let mut masters = [0.0, 0.0];
            optimizer.update(1, 0.1, norm, &mut masters).unwrap();
            // The first step of Adam has the size of the learning rate.
            assert!(masters.iter().all(|x| (x + 0.1).abs() < 1e-6), "{masters:?}");
            optimizer.exp_avg
        };
        assert_eq!(moments(0.0), moments(10.0));
        let (free, clipped) = (moments(0.0), moments(1.0));
        assert!((free[0] - 0.3).abs() < 1e-6 && (clipped[0] - 0.06).abs() < 1e-6, "{free:?} {clipped:?}");
    }

    #[test]
    fn non_finite_gradients_are_found() {
        let mut optimizer = Optimizer::new(&TrainingOptions::default(), 3);
        assert_eq!(optimizer.first_non_finite(), None);
        optimizer.grad[2] = f32::INFINITY;
        assert!(!optimizer.grad_norm().is_finite());
        assert_eq!(optimizer.first_non_finite(), Some(2));
    }
}
