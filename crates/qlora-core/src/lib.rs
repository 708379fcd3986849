//! Quantized weights, LoRA adapters, Llama-style models, the ecosystem's file formats, and generation.

pub mod adapter;
pub mod atomic;
pub mod batch;
pub mod config;
pub mod error;
pub mod lora;
pub mod safetensors_file;
pub mod sampling;

pub use error::{Error, Result};
