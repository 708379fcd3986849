//! Quantized weights, LoRA adapters, Llama-style models, the ecosystem's file formats, and generation.

#![forbid(unsafe_code)]

pub mod autograd;
pub mod batch;
pub mod config;
pub mod error;
pub mod lora;
pub mod model;
pub mod nn;
pub mod source;

pub use error::{Error, Result};
