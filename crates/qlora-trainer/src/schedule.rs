//! The learning rate of every optimizer step.
//!
//! With peak `lr`, `w` warmup steps and `n` steps in all, step `i` (from 0) uses `lr * f(i)`:
//! - warmup, `i < w`: `f = i / w`, so the very first step of a warmup has a learning rate of zero;
//! - linear: `f = max(0, (n - i) / max(1, n - w))`;
//! - cosine: `f = max(0, (1 + cos(pi (i - w) / max(1, n - w))) / 2)`;
//! - constant: `f = 1`, without a warmup; constant with warmup: `f = 1` after it.
//!
//! These are the formulas of transformers' `get_scheduler`, in f64.

use crate::config::{Scheduler, TrainingOptions};

/// Learning rates of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The shape after the warmup.
    pub kind: Scheduler,
    /// The peak.
    pub learning_rate: f64,
    /// Steps of the warmup.
    pub warmup_steps: u64,
    /// Steps of the run.
    pub total_steps: u64,
}

impl Schedule {
    /// The schedule that `options` ask for in a run of `total_steps`.
    pub fn new(options: &TrainingOptions, total_steps: u64) -> Self {
        Self {
            kind: options.lr_scheduler_type,
            learning_rate: options.learning_rate,
            warmup_steps: options.resolved_warmup_steps(total_steps),
            total_steps,
        }
    }

    /// The learning rate of a step, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        self.learning_rate * self.factor(step)
    }

    /// Whether the learning rate is zero in every step: a warmup that is as long as a run of one step. Nothing would be trained.
    pub fn trains_nothing(&self) -> bool {
        self.total_steps <= 1 && self.at(0) == 0.0
    }

    /// Whether the run ends before the warmup does.
    pub fn is_all_warmup(&self) -> bool {
        self.kind != Scheduler::Constant && self.warmup_steps > 0 && self.warmup_steps >= self.total_steps
    }

    fn factor(&self, step: u64) -> f64 {
        if self.kind == Scheduler::Constant {
            return 1.0;
        }
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        match self.kind {
            Scheduler::Constant | Scheduler::ConstantWithWarmup => 1.0,
            Scheduler::Linear => self.total_steps.saturating_sub(step) as f64 / decay_steps,
            Scheduler::Cosine => {
                let progress = (step - self.warmup_steps) as f64 / decay_steps;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// Written by `scripts/fixtures/schedules.py` with transformers.
    const FIXTURE: &str = include_str!("../tests/fixtures/schedule/transformers.json");

    #[test]
    fn equals_transformers() {
        let fixture: Value = serde_json::from_str(FIXTURE).unwrap();
        let cases = fixture["cases"].as_array().unwrap();
        assert!(cases.len() >= 16);
        for case in cases {
            let schedule = Schedule {
                kind: serde_json::from_value(case["lr_scheduler_type"].clone()).unwrap(),
                learning_rate: case["learning_rate"].as_f64().unwrap(),
                warmup_steps: case["num_warmup_steps"].as_u64().unwrap(),
                total_steps: case["num_training_steps"].as_u64().unwrap(),
            };
            for (step, expected) in case["values"].as_array().unwrap().iter().enumerate() {
                let (got, expected) = (schedule.at(step as u64), expected.as_f64().unwrap());
                assert!(
                    (got - expected).abs() <= 1e-12 * schedule.learning_rate,
                    "{schedule:?} step {step}: {got} {expected}"
                );
            }
        }
    }
}
