//! A step of training as PEFT made it: the adapter before it, documents, gradients and logits. The fixtures of `dora_step` and of
//! `replaced_step` have it in one form.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use qlora::adapter::{self, SavedAdapter};
use qlora::batch::Batch;
use qlora::formats::HfDirectory;
use qlora::model::{AdapterChoice, CausalLm, LoadOptions, Quantization, TrainPass};

use crate::common::relative_error;

pub(crate) fn fixture(folder: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(folder).join(name)
}

/// A model with PEFT's adapter, and what PEFT made of two documents.
pub(crate) struct Case {
    pub(crate) model: CausalLm,
    pub(crate) adapter: SavedAdapter,
    pub(crate) expected: HashMap<String, Tensor>,
    pub(crate) batches: Vec<Batch>,
    pub(crate) items: usize,
}

fn ints(tensor: &Tensor) -> Vec<i64> {
    tensor.to_dtype(DType::I64).unwrap().to_vec1().unwrap()
}

pub(crate) fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

impl Case {
    /// The case `name` of the fixtures in `fixtures`, over the base `base`.
    pub(crate) fn load(fixtures: &str, name: &str, base: &str, quantization: Quantization) -> Self {
        let source = HfDirectory::open(fixture("models", base)).unwrap();
        let mut model = CausalLm::load(&source, LoadOptions { quantization, ..LoadOptions::default() }).unwrap();
        let folder = fixture(fixtures, name);
        let adapter = adapter::load(&folder, model.config()).unwrap();
        let SavedAdapter { config, layout, weights } = adapter.clone();
        model.set_adapter(config.lora, layout, weights).unwrap();
        let expected = candle_core::safetensors::load(folder.join("step.safetensors"), &Device::Cpu).unwrap();
        let batch = |i: usize| {
            let ids: Vec<u32> = ints(&expected[&format!("input_ids.{i}")]).into_iter().map(|id| id as u32).collect();
            Batch::from_documents([(ids.as_slice(), ints(&expected[&format!("labels.{i}")]).as_slice())])
        };
        let batches: Vec<Batch> = (0..2).map(batch).collect();
        let items = batches.iter().map(Batch::trained_tokens).sum();
        Self { model, adapter, expected, batches, items }
    }

    /// The mean loss of the documents, and its gradient.
    pub(crate) fn gradient(&self) -> (f64, Vec<f32>) {
        let mut gradient = vec![0.0; self.model.adapter().unwrap().layout().len()];
        let mut sum = 0.0;
        for batch in &self.batches {
            let target = (&mut gradient).into();
            sum += self.model.accumulate_gradients(batch, self.items, TrainPass::default(), target).unwrap().sum;
        }
        (sum / self.items as f64, gradient)
    }

    /// Checks values in the adapter's order against the tensors under `prefix`.
    pub(crate) fn check(&self, prefix: &str, got: &[f32], tolerance: f32) {
        for entry in self.adapter.layout.entries() {
            let expected = floats(&self.expected[&format!("{prefix}.{}", entry.tensor_name())]);
            let error = relative_error(&got[entry.range()], &expected);
            assert!(error < tolerance, "{prefix}.{}: {error}", entry.tensor_name());
        }
    }

    pub(crate) fn check_logits(&self, model: &CausalLm) {
        for (i, batch) in self.batches.iter().enumerate() {
            let got = floats(&model.logits(&batch.tokens, &batch.layout, AdapterChoice::Active).unwrap());
            let error = relative_error(&got, &floats(&self.expected[&format!("logits.{i}")]));
            assert!(error < 1e-4, "logits of document {i}: {error}");
        }
    }

    /// The loss of the documents.
    pub(crate) fn loss(&self) -> f64 {
        f64::from(self.expected["loss"].to_scalar::<f32>().unwrap())
    }
}
