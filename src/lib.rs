//! QLoRA fine-tuning of Llama-style models: a frozen NF4 base, trainable LoRA adapters, on candle.

pub use qlora_core::*;
pub use qlora_kernels as kernels;
pub use qlora_trainer as trainer;
