//! Quantized weights, LoRA adapters, Llama-style models, the ecosystem's file formats, and generation.

#![forbid(unsafe_code)]

pub mod adapter;
pub mod atomic;
pub mod autograd;
pub mod batch;
pub mod card;
pub mod chat;
pub mod companions;
pub mod end_tokens;
pub mod error;
pub mod export;
mod file;
pub mod formats;
pub mod generate;
pub mod hf_home;
#[cfg(feature = "hub")]
pub mod hub;
pub mod hub_id;
pub mod inspect;
mod licence;
pub mod lora;
pub mod merge;
pub mod model;
pub mod nn;
pub mod open;
mod platform;
pub mod sampling;
pub mod source;
pub mod spec;
#[cfg(test)]
mod test_support;
pub mod tokenizer;

pub use error::{Error, ErrorKind, Result};
pub use spec::config;
