//! The training loop, driven with a toy model that has an exact gradient.

mod invariance;
mod observers;
mod refusals;
mod resume;
mod toy;
