#![doc = include_str!("../README.md")]
//!
//! # Where things are
//!
//! | module | what it is |
//! |---|---|
//! | [`trainer`] | configuration, data, the training loop, checkpoints; [`trainer::session`] puts a run together |
//! | [`model`], [`config`], [`source`], [`open`] | the decoder and where its weights come from |
//! | [`formats`] | safetensors, GGUF, bitsandbytes, GPTQ, AWQ, pickles: reading beside writing |
//! | [`lora`], [`adapter`] | LoRA's configuration and PEFT's files |
//! | [`companions`] | what goes wherever a model goes: tokenizer, chat template, end tokens, licence |
//! | [`merge`], [`export`] | merged models as folders, GGUF files, 4-bit folders, Modelfiles |
//! | [`inspect`], [`card`] | what a model takes, and what a run would be on a graphics card |
//! | [`nn`], [`autograd`] | layers and graph nodes for models of your own |
//! | [`tokenizer`], [`chat`], [`end_tokens`], [`generate`], [`sampling`] | text in and out |
//! | [`kernels`] | the operations, the 4-bit formats, frozen weights |

mod any_error;

pub use any_error::{Error, Result};
pub use qlora_core as core;
pub use qlora_core::*;
pub use qlora_kernels as kernels;
pub use qlora_trainer as trainer;

/// The code of the book is compiled.
#[cfg(doctest)]
#[doc = include_str!("../book/src/guide/code.md")]
struct Book;
