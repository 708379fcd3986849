//! In a program for several architectures candle's kernels are built for the oldest (`book/src/guide/cuda-builds.md`). Below 80 they have no
//! bf16, so no program may launch one.

use std::ops::ControlFlow;

use candle_core::{DType, Tensor};
use qlora::generate::generate;
use qlora::kernels::Dtype;
use qlora::sampling::GenerationConfig;

use super::common::{gpu, tiny_config};
use super::{document, lora, on_gpu, train, trained};

/// Built with `QLORA_CUDA_ARCHS=90 CUDA_COMPUTE_CAP=75`, a bf16 kernel of candle's is not there and its launch an error: a run, an
/// evaluation, checkpoints and generation must not see one. In other builds there is nothing to see.
#[test]
fn training_and_generation_launch_no_bf16_kernel_of_candles() {
    let Some(device) = gpu() else { return };
    let probe = Tensor::zeros((2, 2), DType::BF16, &device).and_then(|zeros| zeros.affine(2.0, 1.0));
    if probe.is_ok() {
        println!(
            "skipped: candle's kernels are built for an architecture with bf16 (CUDA_COMPUTE_CAP=75 builds them without)"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (log, values) = train(folder.path(), on_gpu(&device, Dtype::Bf16), None, false);
    assert!(!log.is_empty() && values.iter().all(|value| value.is_finite()));

    let model = trained(&tiny_config(), true, lora(0.0), on_gpu(&device, Dtype::Bf16));
    for temperature in [None, Some(0.8)] {
        let config = GenerationConfig { temperature, max_new_tokens: 8, ..GenerationConfig::default() };
        let answer = generate(&model, &document(9, 2).0, &config, |_| ControlFlow::Continue(())).unwrap();
        assert!(!answer.tokens.is_empty());
    }
}
