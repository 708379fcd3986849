//! Configuration, data, optimizer and training loop.
#![forbid(unsafe_code)]

pub mod config;
pub mod data;
pub mod error;
pub mod fingerprint;
pub mod interrupt;
pub mod memory;
mod rng;
pub mod schedule;

pub use error::{Error, Result};
