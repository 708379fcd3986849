//! Operations as candle graph nodes, at two grains.
//!
//! [`ops`] has one node an operation, for models composed with candle's own graph.
//! [`CausalLm::hidden_states`](crate::model::CausalLm::hidden_states) is the whole decoder stack as one node over one flat adapter variable: candle keeps no intermediate of it, and one variable receives all
//! adapter gradients. Both run the same functions of `qlora-kernels`.
//!
//! candle's own `rms_norm`, `softmax_last_dim` and `rope` record no operation, which silently cuts the gradient; its
//! matrix product makes gradients for frozen weights too. The nodes here do neither: a frozen weight sits inside the
//! node, where the graph does not see it.

pub mod ops;
pub(crate) mod stack;
pub(crate) mod tables;
