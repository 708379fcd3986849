//! `optimizer.safetensors`: the state of the optimizer.
//!
//! Flat tensors in the order of the model's parameters: `master` (f32, the parameters before any rounding to the adapter's
//! precision) and AdamW's moments `exp_avg` and `exp_avg_sq`: f32, or with 8-bit moments their codes (U8) with
//! `exp_avg_absmax` and `exp_avg_sq_absmax` (f32, one for each block of 256).

use std::fs;
use std::path::Path;

use qlora_kernels::ops::adamw_8bit::HostMoments;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::fingerprint::Fingerprint;

/// The optimizer's tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerTensors {
    /// The f32 parameters.
    pub master: Vec<f32>,
    /// Both moments.
    pub moments: MomentTensors,
}

/// AdamW's moments.
#[derive(Clone, Debug, PartialEq)]
pub enum MomentTensors {
    /// As they are.
    F32 {
        /// The first moment.
        exp_avg: Vec<f32>,
        /// The second moment.
        exp_avg_sq: Vec<f32>,
    },
    /// Codes and scales.
    Bits8(HostMoments),
}

enum Data<'a> {
    Floats(&'a [f32]),
    Codes(&'a [u8]),
}

impl OptimizerTensors {
    fn named(&self) -> Vec<(&'static str, Data<'_>)> {
        let mut named = vec![("master", Data::Floats(&self.master))];
        match &self.moments {
            MomentTensors::F32 { exp_avg, exp_avg_sq } => {
                named.extend([("exp_avg", Data::Floats(exp_avg)), ("exp_avg_sq", Data::Floats(exp_avg_sq))]);
            }
            MomentTensors::Bits8(moments) => named.extend([
                ("exp_avg", Data::Codes(&moments.exp_avg)),
                ("exp_avg_sq", Data::Codes(&moments.exp_avg_sq)),
                ("exp_avg_absmax", Data::Floats(&moments.exp_avg_absmax)),
                ("exp_avg_sq_absmax", Data::Floats(&moments.exp_avg_sq_absmax)),
            ]),
        }
        named
    }

    /// Stands for every bit of the tensors.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut fingerprint = Fingerprint::new();
        for (_, data) in self.named() {
            match data {
                Data::Floats(values) => fingerprint.floats(values),
                Data::Codes(codes) => fingerprint.bytes(codes),
            };
        }
        fingerprint
    }

    pub(super) fn write(&self, path: &Path) -> qlora_core::Result<()> {
        let named = self.named();
        let views = named.iter().map(|(name, data)| {
            // The format is little-endian, as every machine this runs on.
            let (dtype, len, bytes) = match data {
                Data::Floats(values) => (Dtype::F32, values.len(), bytemuck::cast_slice(values)),
                Data::Codes(codes) => (Dtype::U8, codes.len(), *codes),
            };
            (*name, TensorView::new(dtype, vec![len], bytes).expect("the bytes are as many as the elements say"))
        });
        safetensors::serialize_to_file(views, None, path).map_err(|error| match error {
            safetensors::SafeTensorError::IoError(error) => qlora_core::Error::io(path, error),
            other => qlora_core::Error::format(path, other.to_string()),
        })
    }

    /// Reads the file; the error describes the problem.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        Self::parse(&fs::read(path).map_err(|error| error.to_string())?)
    }

    /// Reads the file's content.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
        let flat = |name: &str, expected: Dtype| {
            let view = file.tensor(name).map_err(|_| format!("tensor {name} is missing"))?;
            if view.dtype() != expected || view.shape().len() != 1 {
                let (dtype, shape) = (view.dtype(), view.shape());
                return Err(format!("tensor {name} is {dtype:?} {shape:?}, expected {expected:?} of one dimension"));
            }
            Ok(view.data())
        };
        let floats = |name: &str| {
            let bytes = flat(name, Dtype::F32)?;
            Ok::<_, String>(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect::<Vec<_>>())
        };
        let codes = |name: &str| flat(name, Dtype::U8).map(<[u8]>::to_vec);
        let master = floats("master")?;
        if file.tensor("exp_avg").is_ok_and(|view| view.dtype() == Dtype::U8) {
            let moments = HostMoments {
                exp_avg: codes("exp_avg")?,
                exp_avg_sq: codes("exp_avg_sq")?,
                exp_avg_absmax: floats("exp_avg_absmax")?,
                exp_avg_sq_absmax: floats("exp_avg_sq_absmax")?,
            };
            moments.check(master.len()).map_err(|error| error.to_string())?;
            return Ok(Self { master, moments: MomentTensors::Bits8(moments) });
        }
        let (exp_avg, exp_avg_sq) = (floats("exp_avg")?, floats("exp_avg_sq")?);
        let lengths = [&master, &exp_avg, &exp_avg_sq].map(Vec::len);
        if lengths != [lengths[0]; 3] {
            return Err(format!("the lengths of master, exp_avg and exp_avg_sq differ: {lengths:?}"));
        }
        Ok(Self { master, moments: MomentTensors::F32 { exp_avg, exp_avg_sq } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 3] = ["master", "exp_avg", "exp_avg_sq"];

    #[test]
    fn every_bit_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        let exp_avg_sq = vec![f32::MAX, 1e-45, 0.0];
        let tensors = OptimizerTensors {
            master: vec![1.0, -0.0, f32::MIN_POSITIVE / 4.0],
            moments: MomentTensors::F32 { exp_avg: vec![0.1, 0.2, 0.3], exp_avg_sq },
        };
        tensors.write(&path).unwrap();
        let back = OptimizerTensors::read(&path).unwrap();
        assert_eq!(back.fingerprint(), tensors.fingerprint());
        assert_eq!(back.master[1].to_bits(), (-0.0f32).to_bits());
        let mut moments = HostMoments::zeros(3);
        moments.exp_avg[1] = 200;
        moments.exp_avg_absmax[0] = 0.25;
        let tensors = OptimizerTensors { moments: MomentTensors::Bits8(moments), ..tensors };
        tensors.write(&path).unwrap();
        let back = OptimizerTensors::read(&path).unwrap();
        assert!(back == tensors && back.fingerprint() == tensors.fingerprint());
    }

    #[test]
    fn wrong_tensors_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let refusal = |names: [&str; 3], lengths: [usize; 3], dtype: Dtype| {
            let data = [0u8; 64];
            let views = names.into_iter().zip(lengths).map(|(name, len)| {
                (name, TensorView::new(dtype, vec![len], &data[..len * dtype.bitsize() / 8]).unwrap())
            });
            safetensors::serialize_to_file(views, None, &path).unwrap();
            OptimizerTensors::read(&path).unwrap_err()
        };
        assert_eq!(refusal(["master", "exp_avg", "other"], [2; 3], Dtype::F32), "tensor exp_avg_sq is missing");
        assert!(refusal(NAMES, [2, 2, 3], Dtype::F32).ends_with("differ: [2, 2, 3]"));
        assert!(refusal(NAMES, [2; 3], Dtype::F16).starts_with("tensor master is F16 [2]"));
        let data = [0u8; 64];
        let view = |dtype, len: usize, bytes: usize| TensorView::new(dtype, vec![len], &data[..bytes]).unwrap();
        let bits8 = |codes: usize, scales: usize| {
            let views = [
                ("master", view(Dtype::F32, 4, 16)),
                ("exp_avg", view(Dtype::U8, codes, codes)),
                ("exp_avg_sq", view(Dtype::U8, 4, 4)),
                ("exp_avg_absmax", view(Dtype::F32, scales, 4 * scales)),
                ("exp_avg_sq_absmax", view(Dtype::F32, 1, 4)),
            ];
            safetensors::serialize_to_file(views, None, &path).unwrap();
            OptimizerTensors::read(&path).map_err(|error| error.to_string())
        };
        assert!(bits8(4, 1).is_ok());
        assert!(bits8(3, 1).unwrap_err().contains("exp_avg has shape [3], expected [4]"));
        assert!(bits8(4, 2).unwrap_err().contains("exp_avg_absmax has shape [2], expected [1]"));
    }
}
