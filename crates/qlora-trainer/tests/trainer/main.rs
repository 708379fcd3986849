//! The training loop, driven with a toy model that has an exact gradient.

#[cfg(unix)]
mod ctrl_c;
mod invariance;
mod loss_scaling;
mod observers;
mod refusals;
mod resume;
mod stores;
mod toy;
