//! The type in which a GPU computes: the one that was asked for, or the best that the GPU has.

use std::fmt;

use qlora_kernels::Dtype;

use crate::error::{Error, Result};

/// A GPU's compute capability: 8.0 is `Capability { major: 8, minor: 0 }`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Capability {
    /// The generation: 7 for Volta and Turing, 8 for Ampere and Ada, 9 for Hopper.
    pub major: u32,
    /// The variant within it.
    pub minor: u32,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl Capability {
    /// Whether there are instructions for bfloat16: from Ampere on.
    pub fn has_bf16(self) -> bool {
        self >= Self { major: 8, minor: 0 }
    }
}

/// The type for activations on a GPU of this capability: `asked`, or without it bfloat16 where the GPU has it and float16 where
/// not.
///
/// # Errors
/// If bfloat16 was asked for and the GPU does not have it.
pub fn compute_dtype(asked: Option<Dtype>, capability: Capability) -> Result<Dtype> {
    match asked {
        None if capability.has_bf16() => Ok(Dtype::Bf16),
        None => Ok(Dtype::F16),
        Some(Dtype::Bf16) if !capability.has_bf16() => Err(Error::Unsupported(format!(
            "bfloat16 needs a GPU of compute capability 8.0 (Ampere) or later, this one has {capability}: set \
             bnb_4bit_compute_dtype = \"float16\" in [model], or leave it out"
        ))),
        Some(dtype) => Ok(dtype),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURING: Capability = Capability { major: 7, minor: 5 };

    #[test]
    fn the_default_is_bf16_where_the_gpu_has_it() {
        for (major, minor) in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            let capability = Capability { major, minor };
            assert_eq!(compute_dtype(None, capability).unwrap(), Dtype::Bf16, "{capability}");
            assert_eq!(compute_dtype(Some(Dtype::F16), capability).unwrap(), Dtype::F16);
        }
        for capability in [TURING, Capability { major: 7, minor: 0 }, Capability { major: 6, minor: 1 }] {
            assert_eq!(compute_dtype(None, capability).unwrap(), Dtype::F16, "{capability}");
        }
    }

    #[test]
    fn bf16_is_refused_by_name_where_there_is_none() {
        let refusal = compute_dtype(Some(Dtype::Bf16), TURING).unwrap_err().to_string();
        assert!(refusal.contains("bfloat16") && refusal.contains("7.5") && refusal.contains("float16"), "{refusal}");
        assert_eq!(compute_dtype(Some(Dtype::F32), TURING).unwrap(), Dtype::F32);
    }
}
