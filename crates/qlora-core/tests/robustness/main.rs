//! Damages at random: errors, in little memory. A process of its own, because what other tests map counts as its peak.

#[path = "../common/mod.rs"]
mod common;

mod loading;
mod quantized;
