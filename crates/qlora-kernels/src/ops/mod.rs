//! The operations, one a file. Each is a `forward` and a `backward` over views.

pub mod attention;
pub mod frozen_linear;
pub mod matmul;
pub mod rope;
