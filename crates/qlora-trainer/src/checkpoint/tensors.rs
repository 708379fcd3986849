//! `optimizer.safetensors`: what the optimizer needs to go on, as f32.
//!
//! Three flat tensors of the same length, in the order of the model's parameters: `master` (the parameters before any
//! rounding to the adapter's precision), `exp_avg` and `exp_avg_sq` (AdamW's moments).

use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::fingerprint::Fingerprint;

const NAMES: [&str; 3] = ["master", "exp_avg", "exp_avg_sq"];

/// The optimizer's tensors, owned or borrowed.
#[derive(Clone, Debug, PartialEq)]
pub struct OptimizerTensors<T> {
    /// The f32 parameters.
    pub master: T,
    /// The first moment.
    pub exp_avg: T,
    /// The second moment.
    pub exp_avg_sq: T,
}

impl<T: AsRef<[f32]>> OptimizerTensors<T> {
    fn as_slices(&self) -> [&[f32]; 3] {
        [self.master.as_ref(), self.exp_avg.as_ref(), self.exp_avg_sq.as_ref()]
    }

    /// Stands for every bit of the tensors.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut fingerprint = Fingerprint::new();
        for tensor in self.as_slices() {
            fingerprint.floats(tensor);
        }
        fingerprint
    }

    pub(super) fn write(&self, path: &Path) -> qlora_core::Result<()> {
        let views = NAMES.into_iter().zip(self.as_slices()).map(|(name, values)| {
            // The format is little-endian, as every machine this runs on.
            let view = TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values));
            (name, view.expect("four bytes an element"))
        });
        safetensors::serialize_to_file(views, None, path).map_err(|error| match error {
            safetensors::SafeTensorError::IoError(error) => qlora_core::Error::io(path, error),
            other => qlora_core::Error::format(path, other.to_string()),
        })
    }
}

impl OptimizerTensors<Vec<f32>> {
    /// The same tensors, borrowed.
    pub fn borrowed(&self) -> OptimizerTensors<&[f32]> {
        OptimizerTensors { master: &self.master, exp_avg: &self.exp_avg, exp_avg_sq: &self.exp_avg_sq }
    }

    /// Reads the file; the error is what is wrong with it.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        let bytes = fs::read(path).map_err(|error| error.to_string())?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| error.to_string())?;
        let read = |name: &str| {
            let view = file.tensor(name).map_err(|_| format!("tensor {name} is missing"))?;
            if view.dtype() != Dtype::F32 || view.shape().len() != 1 {
                let (dtype, shape) = (view.dtype(), view.shape());
                return Err(format!("tensor {name} is {dtype:?} {shape:?}, expected F32 of one dimension"));
            }
            Ok(view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect::<Vec<_>>())
        };
        let [master, exp_avg, exp_avg_sq] = NAMES.map(read);
        let tensors = Self { master: master?, exp_avg: exp_avg?, exp_avg_sq: exp_avg_sq? };
        let lengths = tensors.as_slices().map(<[f32]>::len);
        if lengths != [lengths[0]; 3] {
            return Err(format!("the lengths of {NAMES:?} differ: {lengths:?}"));
        }
        Ok(tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        let tensors = OptimizerTensors {
            master: vec![1.0, -0.0, f32::MIN_POSITIVE / 4.0],
            exp_avg: vec![0.1, 0.2, 0.3],
            exp_avg_sq: vec![f32::MAX, 1e-45, 0.0],
        };
        tensors.write(&path).unwrap();
        let back = OptimizerTensors::read(&path).unwrap();
        assert_eq!(back.fingerprint(), tensors.fingerprint());
        assert_eq!(back.master[1].to_bits(), (-0.0f32).to_bits());
    }

    #[test]
    fn wrong_tensors_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let refusal = |names: [&str; 3], lengths: [usize; 3], dtype| {
            let data = [0u8; 64];
            let views = names.into_iter().zip(lengths).map(|(name, len)| {
                let bytes = len * if dtype == Dtype::F32 { 4 } else { 2 };
                (name, TensorView::new(dtype, vec![len], &data[..bytes]).unwrap())
            });
            safetensors::serialize_to_file(views, None, &path).unwrap();
            OptimizerTensors::read(&path).unwrap_err()
        };
        assert_eq!(refusal(["master", "exp_avg", "other"], [2; 3], Dtype::F32), "tensor exp_avg_sq is missing");
        assert!(refusal(NAMES, [2, 2, 3], Dtype::F32).ends_with("differ: [2, 2, 3]"));
        assert!(refusal(NAMES, [2; 3], Dtype::F16).starts_with("tensor master is F16 [2]"));
    }
}
