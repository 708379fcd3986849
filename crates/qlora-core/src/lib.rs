//! Quantized weights, LoRA adapters, Llama-style models, the ecosystem's file formats, and generation.

#![forbid(unsafe_code)]

pub mod batch;
pub mod config;
pub mod error;

pub use error::{Error, Result};
