//! The check that every trainable tensor is trained.
//!
//! At the first step each must get a gradient that is not all zeros. A lora_A may wait while its lora_B is zero: its
//! gradient is a multiple of B. In float16 it may wait longer: while B is still small, the multiple lies below the range, with a scaled
//! loss too. It is looked at again in each step until it had a gradient. Rows of an embedding may wait for their tokens.

use crate::error::{Error, Result};
use crate::model::Parameter;

/// The steps that a lora_A in float16 may wait for a gradient.
const PATIENCE: u64 = 50;

/// Remembers which tensors had a gradient.
#[derive(Debug)]
pub(crate) struct GradientGuard {
    waiting: Vec<usize>,
    total: usize,
    /// The checks in which a lora_A may go without.
    patience: u64,
}

impl GradientGuard {
    pub(crate) fn new(parameters: &[Parameter]) -> Self {
        let waiting = (0..parameters.len()).filter(|&i| !parameters[i].may_rest).collect();
        Self { waiting, total: parameters.len(), patience: 0 }
    }

    /// The guard of a run whose gradients are float16.
    pub(crate) fn of_float16(self) -> Self {
        Self { patience: PATIENCE, ..self }
    }

    /// Whether there is a tensor that had no gradient yet.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Looks at the gradients of `step` (from 1) before the update. The gradients are finite.
    pub(crate) fn check(&mut self, step: u64, parameters: &[Parameter], masters: &[f32], grad: &[f32]) -> Result<()> {
        let all_zero = |values: &[f32]| values.iter().all(|&value| value == 0.0);
        self.waiting.retain(|&i| all_zero(&grad[parameters[i].range.clone()]));
        let patient = self.patience > 0;
        self.patience = self.patience.saturating_sub(1);
        let excused = |i: usize| {
            let silencer = parameters[i].silenced_by.and_then(|j| parameters.get(j));
            silencer.is_some_and(|silencer| patient || all_zero(&masters[silencer.range.clone()]))
        };
        let missing = self.waiting.iter().filter(|&&i| !excused(i));
        let names: Vec<_> = missing.map(|&i| parameters[i].name.clone()).collect();
        if names.is_empty() {
            return Ok(());
        }
        Err(Error::NoGradient { step, total: self.total, names })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Vec<Parameter> {
        let parameter = |name: &str, range, silenced_by| Parameter {
            name: name.into(),
            range,
            shape: vec![2],
            silenced_by,
            may_rest: false,
            decays: true,
        };
        vec![parameter("x.lora_A", 0..2, Some(1)), parameter("x.lora_B", 2..4, None)]
    }

    #[test]
    fn a_may_wait_while_b_is_zero_and_no_longer() {
        let parameters = parameters();
        let mut guard = GradientGuard::new(&parameters);
        guard.check(1, &parameters, &[1.0, 1.0, 0.0, -0.0], &[0.0, 0.0, 0.0, 0.1]).unwrap();
        guard.check(2, &parameters, &[1.0, 1.0, 0.0, 0.0], &[0.0; 4]).unwrap();
        let error = guard.check(3, &parameters, &[1.0, 1.0, 0.0, 0.1], &[0.0, 0.0, 0.0, 0.1]).unwrap_err();
        assert_eq!(error.to_string(), "step 3: no gradient reaches 1 of 2 trainable tensors: x.lora_A");
        guard.check(4, &parameters, &[1.0, 1.0, 0.0, 0.1], &[0.0, 0.1, 0.0, 0.0]).unwrap();
        // Seen once is enough.
        guard.check(5, &parameters, &[1.0, 1.0, 0.0, 0.1], &[0.0; 4]).unwrap();
    }

    #[test]
    fn in_float16_a_may_wait_for_a_larger_b() {
        let parameters = parameters();
        let mut guard = GradientGuard::new(&parameters).of_float16();
        for step in 1..=PATIENCE {
            guard.check(step, &parameters, &[1.0, 1.0, 0.0, 0.1], &[0.0, 0.0, 0.0, 0.1]).unwrap();
        }
        assert!(guard.check(PATIENCE + 1, &parameters, &[1.0, 1.0, 0.0, 0.1], &[0.0, 0.0, 0.0, 0.1]).is_err());
    }

    #[test]
    fn b_needs_a_gradient_at_once() {
        let parameters = parameters();
        let mut guard = GradientGuard::new(&parameters).of_float16();
        let error = guard.check(1, &parameters, &[1.0, 1.0, 0.0, 0.0], &[0.1, 0.1, 0.0, 0.0]).unwrap_err();
        assert!(error.to_string().ends_with("x.lora_B"));
    }
}
