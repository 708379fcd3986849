//! Dynamic loss scaling for float16, as PyTorch's `GradScaler` does it.
//!
//! float16 has no number below 6e-8, and a gradient that is divided by the tokens of a large batch is often smaller. So the
//! loss is multiplied by a power of two before the backward, and the gradient divided by it where the optimizer reads the f32
//! buffer; a power of two changes no other bit on the way. A gradient that overflows shows as an infinite norm: the step is
//! skipped (the step count advances, the learning rate's schedule and the optimizer's step count do not) and the scale halved.
//! After 2,000 steps without, it is doubled.

use serde::{Deserialize, Serialize};

/// Steps without an overflow after which the scale is doubled.
const GROWTH_INTERVAL: u64 = 2000;

/// The scale of a float16 run's loss, and its recent history; part of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LossScale {
    /// The factor of the loss in the next step: a power of two.
    pub scale: f32,
    /// Steps since the last change of the scale.
    pub growth_tracker: u64,
    /// Steps of the run that were skipped because a gradient overflowed.
    pub skipped_steps: u64,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: 65_536.0, growth_tracker: 0, skipped_steps: 0 }
    }
}

impl LossScale {
    /// Whether an overflow can be met by a smaller scale. At 1 the gradient itself is out of range, or NaN for another reason.
    pub(crate) fn can_shrink(&self) -> bool {
        self.scale > 1.0
    }

    /// A gradient was not finite.
    pub(crate) fn overflowed(&mut self) {
        self.scale /= 2.0;
        self.growth_tracker = 0;
        self.skipped_steps += 1;
    }

    /// The gradient of a step was finite.
    pub(crate) fn fitted(&mut self) {
        self.fitted_of(GROWTH_INTERVAL);
    }

    fn fitted_of(&mut self, growth_interval: u64) {
        self.growth_tracker += 1;
        if self.growth_tracker == growth_interval {
            let larger = self.scale * 2.0;
            self.scale = if larger.is_finite() { larger } else { self.scale };
            self.growth_tracker = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The scales of PyTorch's `GradScaler(init_scale=4, growth_interval=2)` after each of these steps.
    #[test]
    fn scales_are_those_of_pytorch() {
        let mut scale = LossScale { scale: 4.0, ..LossScale::default() };
        let after = [true, true, false, true, true, true].map(|finite| {
            if finite {
                scale.fitted_of(2)
            } else {
                scale.overflowed()
            }
            scale.scale
        });
        assert_eq!(after, [4.0, 8.0, 4.0, 4.0, 8.0, 8.0]);
        assert_eq!((scale.growth_tracker, scale.skipped_steps), (1, 1));
    }

    #[test]
    fn the_scale_stays_finite_and_at_least_one() {
        let mut scale = LossScale::default();
        (0..300 * GROWTH_INTERVAL).for_each(|_| scale.fitted());
        assert_eq!(scale.scale, 2f32.powi(127));
        let halvings = std::iter::repeat(()).take_while(|()| scale.can_shrink().then(|| scale.overflowed()).is_some());
        assert_eq!(halvings.count(), 127);
        assert_eq!(scale.scale, 1.0);
    }
}
