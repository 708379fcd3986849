//! Every operation on a GPU against the same operation on the CPU, which its own tests check in f64.
//!
//! Both sides get the same random inputs, rounded to the type that the GPU computes in; outputs are poisoned with NaN,
//! and so is the memory around every window. Without a GPU each test says so and passes; with `QLORA_REQUIRE_GPU=1` it
//! fails.
#![cfg(feature = "cuda")]

mod adapter_rows;
mod attention;
mod copies;
mod dora_linear;
mod dropout;
mod elementwise;
mod few_tokens;
mod fp8;
mod frozen_linear;
mod graph;
mod harness;
mod huge;
mod int8;
mod linear_cross_entropy;
mod linear_group;
mod lora_linear;
mod matmul;
mod memory;
mod nccl;
mod optimizer;
mod packed_attention;
mod quantization;
mod rms_norm;
mod sanitized;
