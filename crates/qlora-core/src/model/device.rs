//! The choice of the device on which a model runs.

use std::str::FromStr;

use candle_core::Device;
use qlora_kernels::{Dtype, Workspace};

use crate::error::{Error, Result};

/// A device as users name it: `auto`, `cpu`, `cuda` or `cuda:1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceChoice {
    /// The first GPU if there is one and the program is built for it, otherwise the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU with this number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || Error::Invalid(format!("device {text:?} is not auto, cpu, cuda or such as cuda:1"));
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Self::Cuda).ok_or_else(unknown),
        }
    }
}

impl DeviceChoice {
    /// Memory on the device for activations of type `dtype` (the CPU always computes in f32; without a type a GPU computes in
    /// bfloat16, or in float16 where it has no bfloat16), at most `memory_limit` bytes of a GPU's.
    ///
    /// # Errors
    /// If the device is not there, does not have the type, or the program is not built for it; the message says what to do.
    pub fn open(self, dtype: impl Into<Option<Dtype>>, memory_limit: Option<u64>) -> Result<Workspace> {
        self.open_for_rank(0, dtype, memory_limit)
    }

    /// The GPU of a process that is number `local_rank` on its host: the one with that number, or the only one it can see.
    pub fn of_rank(local_rank: usize) -> usize {
        if gpus() == 1 { 0 } else { local_rank }
    }

    /// As [`Self::open`], where `auto` is the GPU of a process that is number `local_rank` on its host.
    ///
    /// # Errors
    /// As there.
    pub fn open_for_rank(
        self,
        local_rank: usize,
        dtype: impl Into<Option<Dtype>>,
        memory_limit: Option<u64>,
    ) -> Result<Workspace> {
        let dtype = dtype.into();
        match self {
            Self::Cpu => Ok(Workspace::new(&Device::Cpu)?),
            Self::Cuda(ordinal) => open_gpu(ordinal, dtype, memory_limit),
            Self::Auto if cfg!(not(feature = "cuda")) => Ok(Workspace::new(&Device::Cpu)?),
            Self::Auto => match open_gpu(Self::of_rank(local_rank), dtype, memory_limit) {
                Ok(workspace) => Ok(workspace),
                // There is a GPU: a run on the CPU would take days instead of saying what to change.
                Err(error @ Error::Unsupported(_)) => Err(error),
                Err(error) => {
                    tracing::warn!(%error, "no GPU: the CPU is used");
                    Ok(Workspace::new(&Device::Cpu)?)
                }
            },
        }
    }
}

/// The number of GPUs that this process can see; 0 in a program that is built without CUDA.
pub fn gpus() -> usize {
    #[cfg(feature = "cuda")]
    return qlora_kernels::cuda::device_count();
    #[cfg(not(feature = "cuda"))]
    0
}

#[cfg(feature = "cuda")]
fn open_gpu(ordinal: usize, dtype: Option<Dtype>, memory_limit: Option<u64>) -> Result<Workspace> {
    let device = qlora_kernels::cuda::device(ordinal, memory_limit)?;
    let (major, minor) = qlora_kernels::cuda::Gpu::of(&device)?.compute_capability()?;
    let dtype = super::compute_dtype(dtype, super::Capability { major, minor })?;
    Ok(Workspace::with_dtype(&device, dtype)?)
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(ordinal: usize, _: Option<Dtype>, _: Option<u64>) -> Result<Workspace> {
    Err(Error::Unsupported(format!(
        "GPU {ordinal}: this program was built without CUDA; build it with `--features cuda` (scripts/cuda-toolkit.sh makes \
         a toolkit where there is none)"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed() {
        let parse = |text: &str| text.parse::<DeviceChoice>();
        assert_eq!(parse("auto").unwrap(), DeviceChoice::Auto);
        assert_eq!(parse("cuda").unwrap(), DeviceChoice::Cuda(0));
        assert_eq!(parse("cuda:3").unwrap(), DeviceChoice::Cuda(3));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(parse(wrong).unwrap_err().to_string().contains("auto, cpu, cuda"), "{wrong}");
        }
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_program_without_cuda_says_how_to_build_one() {
        let error = DeviceChoice::Cuda(0).open(None, None).unwrap_err().to_string();
        assert!(error.contains("--features cuda"), "{error}");
        assert_eq!(DeviceChoice::Auto.open(None, None).unwrap().dtype(), Dtype::F32);
    }
}
