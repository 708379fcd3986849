//! Quantized weights, LoRA adapters, Llama-style models, the ecosystem's file formats, and generation.

#![forbid(unsafe_code)]

pub mod adapter;
pub mod atomic;
pub mod autograd;
pub mod batch;
pub mod config;
pub mod error;
pub mod generate;
pub mod lora;
pub mod model;
pub mod nn;
pub mod safetensors_file;
pub mod sampling;
pub mod source;

pub use error::{Error, Result};
