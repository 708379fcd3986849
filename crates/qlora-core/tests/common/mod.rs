//! Checkpoints that tests take apart and put together again.
#![allow(dead_code)]

pub(crate) mod tally;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The folders that `scripts/fixtures/quantized_checkpoints.py` wrote.
pub(crate) const FOLDERS: [&str; 11] = [
    "bnb_nf4_nested_u8",
    "bnb_nf4_bf16",
    "bnb_fp4_f32",
    "bnb_fp4_nested_f16",
    "bnb_nf4_skip",
    "bnb_int8",
    "gptq",
    "gptq_act_order",
    "gptq_v2",
    "gptq_8bit",
    "awq",
];

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

pub(crate) fn quantized(name: &str) -> PathBuf {
    fixtures().join("quantized").join(name)
}

#[derive(Clone, Debug)]
pub(crate) struct Raw {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

/// `config.json` and `model.safetensors`.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoint {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Raw>,
}

impl Checkpoint {
    pub(crate) fn read(folder: &Path) -> Self {
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let raw = |t: TensorView| Raw { dtype: t.dtype(), shape: t.shape().to_vec(), bytes: t.data().to_vec() };
        let config = serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
        Self { config, tensors: file.tensors().into_iter().map(|(name, t)| (name, raw(t))).collect() }
    }

    pub(crate) fn write(&self, folder: &Path) {
        let views = self.tensors.iter().map(|(name, t)| {
            (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap_or_else(|e| panic!("{name}: {e}")))
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        fs::write(folder.join("model.safetensors"), bytes).unwrap();
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
    }

    /// The first tensor whose name ends so.
    pub(crate) fn ending(&mut self, suffix: &str) -> (&str, &mut Raw) {
        let found = self.tensors.iter_mut().find(|(name, _)| name.ends_with(suffix));
        let (name, raw) = found.unwrap_or_else(|| panic!("no tensor ends with {suffix}"));
        (name, raw)
    }
}
