//! Quantized weights, LoRA adapters, Llama-style models, the ecosystem's file formats, and generation.

#![forbid(unsafe_code)]

pub mod batch;
pub mod chat;
pub mod config;
pub mod error;
mod file;
#[cfg(feature = "hub")]
pub mod hub;
pub mod open;
pub mod source;
pub mod tokenizer;

pub use error::{Error, Result};
