//! AdamW over a model's flat parameter buffer, with clipping by the global norm.
//!
//! The whole update of a step: `norm = |grad|`, `scale = min(1, max_grad_norm / (norm + 1e-6))`, then PyTorch's AdamW on
//! `scale * grad`. Gradient, moments and masters are flat f32 buffers of the same length; moments may have 8 bits.
//!
//! Weight decay leaves out parameters that say so ([`Parameter::decays`]), as transformers' Trainer does.

use std::ops::Range;

use crate::checkpoint::tensors::MomentTensors;
use crate::config::{Optim, TrainingOptions};
use crate::error::Result;
use crate::model::Parameter;
use qlora_kernels::ops::adamw::{self, AdamW};
use qlora_kernels::ops::adamw_8bit::{self, Moments8bit};
use qlora_kernels::ops::{grad_norm, scale};
use qlora_kernels::{Error as KernelError, Matrix, View, ViewMut, Workspace};

/// Gradient and moments of all trainable parameters, and the settings of the update.
#[derive(Debug)]
pub struct Optimizer {
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    /// The elements that decay, if not all do.
    decayed: Option<Vec<Range<usize>>>,
    max_grad_norm: f64,
    /// The gradient of the step that is being made, one row.
    pub grad: Matrix,
    moments: Moments,
}

#[derive(Debug)]
enum Moments {
    F32 { exp_avg: Matrix, exp_avg_sq: Matrix },
    Bits8(Moments8bit),
}

impl Optimizer {
    /// Zero moments for `len` parameters, where `workspace` is.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(options: &TrainingOptions, len: usize, workspace: &Workspace) -> Result<Self> {
        let moments = match options.optim {
            Optim::AdamwTorch => {
                Moments::F32 { exp_avg: workspace.zeros_f32(1, len)?, exp_avg_sq: workspace.zeros_f32(1, len)? }
            }
            Optim::Adamw8bit => Moments::Bits8(Moments8bit::new(len, workspace)?),
        };
        Ok(Self {
            beta1: options.adam_beta1,
            beta2: options.adam_beta2,
            eps: options.adam_epsilon,
            weight_decay: options.weight_decay,
            decayed: None,
            max_grad_norm: options.max_grad_norm,
            grad: workspace.zeros_f32(1, len)?,
            moments,
        })
    }

    /// Takes from the parameters which of them decay; without this, all do.
    #[must_use]
    pub fn with_decay_of(mut self, parameters: &[Parameter]) -> Self {
        self.decayed = parameters.iter().any(|parameter| !parameter.decays).then(|| {
            let mut ranges: Vec<Range<usize>> = Vec::new();
            for Parameter { range, .. } in parameters.iter().filter(|parameter| parameter.decays) {
                match ranges.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => ranges.push(range.clone()),
                }
            }
            ranges
        });
        self
    }

    /// Bytes of gradient and moments for `len` parameters.
    pub fn bytes_for(options: &TrainingOptions, len: usize) -> usize {
        let moments = match options.optim {
            Optim::AdamwTorch => 8 * len,
            // And the two maps that the codes are looked up in.
            Optim::Adamw8bit => Moments8bit::bytes_for(len) + 2 * 1024,
        };
        4 * len + moments
    }

    /// A copy of the moments, for a checkpoint.
    ///
    /// # Errors
    /// If the device fails.
    pub fn moments(&self) -> Result<MomentTensors> {
        Ok(match &self.moments {
            Moments::F32 { exp_avg, exp_avg_sq } => {
                MomentTensors::F32 { exp_avg: exp_avg.to_vec()?, exp_avg_sq: exp_avg_sq.to_vec()? }
            }
            Moments::Bits8(moments) => MomentTensors::Bits8(moments.to_host()?),
        })
    }

    /// Goes on from moments of a checkpoint, where `workspace` is.
    ///
    /// # Errors
    /// If they are of the other kind, or of another length.
    pub fn set_moments(&mut self, from: MomentTensors, workspace: &Workspace) -> qlora_kernels::Result<()> {
        match (&mut self.moments, from) {
            (Moments::F32 { exp_avg, exp_avg_sq }, MomentTensors::F32 { exp_avg: m, exp_avg_sq: v }) => {
                exp_avg.view_mut().copy_from(View::vector(&m))?;
                exp_avg_sq.view_mut().copy_from(View::vector(&v))
            }
            (Moments::Bits8(moments), MomentTensors::Bits8(from)) => {
                *moments = Moments8bit::from_host(from, self.grad.cols(), workspace)?;
                Ok(())
            }
            _ => Err(KernelError::invalid("optimizer", "8-bit moments and f32 moments do not replace each other")),
        }
    }

    /// The 2-norm of the gradient, before clipping. Not finite if any element is not.
    ///
    /// # Errors
    /// If the device fails.
    pub fn grad_norm(&self) -> Result<f64> {
        Ok(grad_norm::global_norm(self.grad.view())?)
    }

    /// The first element of the gradient that is not finite.
    ///
    /// # Errors
    /// If the device fails.
    pub fn first_non_finite(&self) -> Result<Option<usize>> {
        Ok(grad_norm::first_non_finite(self.grad.view())?)
    }

    /// Updates `masters` with the gradient, whose norm is `norm`; `step` counts from 1.
    ///
    /// # Errors
    /// If `masters` has another length.
    pub fn update(&mut self, step: u64, learning_rate: f64, norm: f64, masters: ViewMut) -> qlora_kernels::Result<()> {
        self.update_scaled(step, learning_rate, norm, 1.0, masters)
    }

    /// [`Self::update`] with a gradient that is `loss_scale` times the true one, whose norm is `norm`. The division is part of
    /// the update; for a power of two the result has the bits that a divided gradient gives.
    ///
    /// # Errors
    /// As there.
    pub fn update_scaled(
        &mut self,
        step: u64,
        learning_rate: f64,
        norm: f64,
        loss_scale: f32,
        mut masters: ViewMut,
    ) -> qlora_kernels::Result<()> {
        let scale = match self.max_grad_norm {
            max_norm if max_norm > 0.0 => grad_norm::clip_coefficient(norm, max_norm),
            _ => 1.0,
        } / loss_scale;
        let Self { beta1, beta2, eps, weight_decay, .. } = *self;
        let mut settings = AdamW { lr: learning_rate, beta1, beta2, eps, weight_decay };
        if let Some(decayed) = self.decayed.as_deref().filter(|_| weight_decay > 0.0) {
            // The step's own first product, with its rounding: what decays gets the bits that a step with decay gives.
            let factor = (1.0 - learning_rate * weight_decay) as f32;
            for range in decayed {
                scale::in_place(masters.reborrow().slice_cols(range.clone()), factor)?;
            }
            settings.weight_decay = 0.0;
        }
        let grad = self.grad.view();
        match &mut self.moments {
            Moments::F32 { exp_avg, exp_avg_sq } => {
                adamw::step(&settings, step, scale, masters, grad, exp_avg.view_mut(), exp_avg_sq.view_mut())
            }
            Moments::Bits8(moments) => adamw_8bit::step(&settings, step, scale, masters, grad, moments),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_scales_what_the_moments_see() {
        let moments = |max_grad_norm| {
            let options = TrainingOptions { max_grad_norm, ..Default::default() };
            let mut optimizer = Optimizer::new(&options, 2, &Workspace::cpu()).unwrap();
            optimizer.grad.as_mut_slice().copy_from_slice(&[3.0, 4.0]);
            let norm = optimizer.grad_norm().unwrap();
            assert_eq!(norm, 5.0);
            let mut masters = [0.0, 0.0];
            optimizer.update(1, 0.1, norm, (&mut masters).into()).unwrap();
            // The first step of Adam has the size of the learning rate.
            assert!(masters.iter().all(|x| (x + 0.1).abs() < 1e-6), "{masters:?}");
            let MomentTensors::F32 { exp_avg, .. } = optimizer.moments().unwrap() else { panic!("f32 moments") };
            exp_avg
        };
        assert_eq!(moments(0.0), moments(10.0));
        let (free, clipped) = (moments(0.0), moments(1.0));
        assert!((free[0] - 0.3).abs() < 1e-6 && (clipped[0] - 0.06).abs() < 1e-6, "{free:?} {clipped:?}");
    }

    #[test]
    fn a_scaled_gradient_gives_the_bits_of_a_divided_one() {
        let updated = |loss_scale: f32| {
            let options = TrainingOptions { max_grad_norm: 0.7, ..Default::default() };
            let mut optimizer = Optimizer::new(&options, 4, &Workspace::cpu()).unwrap();
            let mut masters = [0.3, -0.1, 1e-3, 7.0];
            for step in 1..4 {
                let gradient = [3e-4, 0.37, -1.1, 1e-9].map(|x: f32| x * step as f32 * loss_scale);
                optimizer.grad.as_mut_slice().copy_from_slice(&gradient);
                let norm = optimizer.grad_norm().unwrap() / f64::from(loss_scale);
                optimizer.update_scaled(step, 0.1, norm, loss_scale, (&mut masters).into()).unwrap();
            }
            (masters, optimizer.moments().unwrap())
        };
        assert_eq!(updated(1.0), updated(65_536.0));
    }

    #[test]
    fn what_does_not_decay_is_left_out_and_the_rest_gets_the_same_bits() {
        const LEN: usize = 700;
        let parameter = |range: Range<usize>, decays| Parameter {
            name: String::new(),
            shape: vec![range.len()],
            range,
            silenced_by: None,
            may_rest: false,
            decays,
        };
        // The limits of 8-bit blocks (256) are elsewhere.
        let parts = [(0..100, true), (100..300, true), (300..313, false), (313..350, false), (350..LEN, true)];
        let parameters = parts.clone().map(|(range, decays)| parameter(range, decays));
        for optim in [Optim::AdamwTorch, Optim::Adamw8bit] {
            let run = |weight_decay, parameters: &[Parameter]| {
                let options = TrainingOptions { optim, weight_decay, ..Default::default() };
                let optimizer = Optimizer::new(&options, LEN, &Workspace::cpu()).unwrap();
                let mut optimizer = optimizer.with_decay_of(parameters);
                let mut masters: Vec<f32> = (0..LEN).map(|i| (i as f32 * 0.37).sin()).collect();
                for step in 1..5 {
                    let gradient = optimizer.grad.as_mut_slice().iter_mut().enumerate();
                    gradient.for_each(|(i, g)| *g = (i as f32 * 0.11 + step as f32).cos());
                    optimizer.update(step, 0.01, 1.0, ViewMut::vector(&mut masters)).unwrap();
                }
                masters
            };
            let (all, none, mixed) = (run(0.3, &[]), run(0.0, &[]), run(0.3, &parameters));
            for (range, decays) in parts.clone() {
                let want = if decays { &all } else { &none };
                assert_eq!(mixed[range.clone()], want[range.clone()], "{optim:?} {range:?}");
                assert_ne!(all[range.clone()], none[range], "{optim:?}");
            }
        }
    }

    #[test]
    fn non_finite_gradients_are_found() {
        let mut optimizer = Optimizer::new(&TrainingOptions::default(), 3, &Workspace::cpu()).unwrap();
        assert_eq!(optimizer.first_non_finite().unwrap(), None);
        optimizer.grad.as_mut_slice()[2] = f32::INFINITY;
        assert!(!optimizer.grad_norm().unwrap().is_finite());
        assert_eq!(optimizer.first_non_finite().unwrap(), Some(2));
    }
}
