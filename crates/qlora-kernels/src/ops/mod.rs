//! The operations, one a file. Each is a `forward` and a `backward` over views.

pub mod adamw;
pub mod adamw_8bit;
pub mod adapter_rows;
pub mod adapter_tokens;
pub mod argmax;
pub mod attention;
pub mod bias;
pub mod dora_linear;
pub mod dropout;
pub mod embedding;
pub mod frozen_linear;
pub mod grad_norm;
mod int8_activations;
pub mod linear_cross_entropy;
pub mod linear_group;
pub mod lora_linear;
pub mod matmul;
pub mod residual;
pub mod rms_norm;
pub mod rope;
pub mod scale;
pub mod swiglu;
pub mod trained_tables;
