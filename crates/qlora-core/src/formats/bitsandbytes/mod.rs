//! The tensors of linear layers as bitsandbytes stores them.

pub(super) mod bits4;
pub(super) mod bits8;
