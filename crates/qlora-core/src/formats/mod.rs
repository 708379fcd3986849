//! The files that models come in and go out as, reading beside writing, each format in a module of its own.
//!
//! | module | files |
//! |---|---|
//! | [`hf`] | a folder as `save_pretrained` writes it, its layers plain or stored quantized |
//! | [`safetensors`] | one file, or a model in shards |
//! | `pickle` | what PyTorch saved before safetensors: tensors only, nothing is executed |
//! | [`gguf`] | llama.cpp's files |
//! | `bitsandbytes`, `gptq`, `awq` | the tensors of a quantized linear layer, found and read by `packed` |
//!
//! Whole models are written by [`export`](crate::export) and [`merge`](crate::merge).

mod awq;
mod bitsandbytes;
pub mod gguf;
mod gptq;
pub mod hf;
pub(crate) mod packed;
pub(crate) mod pickle;
pub mod safetensors;
mod words;

pub use gguf::Gguf;
pub use hf::HfDirectory;
