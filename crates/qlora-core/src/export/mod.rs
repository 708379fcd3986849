//! Whole models written for other programs.

pub mod bitsandbytes;
pub mod gguf;
pub mod modelfile;
