//! Helpers for the tests of several modules.

use qlora_kernels::SequenceLayout;

use crate::model::{AdapterChoice, CausalLm, LoadOptions};
use crate::source::WeightSource;

/// The logits of the model in `source` for one sequence, `[tokens, vocabulary]`.
pub(crate) fn logits(source: &dyn WeightSource, tokens: &[u32]) -> Vec<f32> {
    let model = CausalLm::load(source, LoadOptions::default()).unwrap();
    let logits = model.logits(tokens, &SequenceLayout::from_lengths(&[tokens.len()]), AdapterChoice::Active).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, NaN if any is.
pub(crate) fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |max, d| if d.is_nan() { f32::NAN } else { max.max(d) })
}
