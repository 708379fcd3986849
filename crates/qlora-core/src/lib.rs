//! Quantized weights, LoRA adapters, Llama-style models, the ecosystem's file formats, and generation.

pub mod batch;
pub mod config;
pub mod error;

pub use error::{Error, Result};
