//! The small grain on a GPU: candle's own graph over this library's operations, against the same graph on the CPU.
#![cfg(feature = "cuda")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer};
use qlora::autograd::ops;
use qlora::kernels::ops::attention::AttentionConfig;
use qlora::kernels::ops::rope::{RopeConfig, RopeTable};
use qlora::kernels::quant::QuantConfig;
use qlora::kernels::{Dtype, SequenceLayout, Workspace, cuda};
use qlora::lora::LoraConfig;
use qlora::nn::QLoraLinear;

/// The first GPU; without one the test is skipped, or fails if `QLORA_REQUIRE_GPU` is set.
fn gpu() -> Option<Device> {
    match cuda::device(0, None) {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("QLORA_REQUIRE_GPU").is_some() => panic!("{error}"),
        Err(error) => {
            println!("skipped: no GPU ({error})");
            None
        }
    }
}

fn relative_error(got: &Tensor, want: &Tensor) -> f32 {
    let got = got.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let difference = (&got - want).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    let norm = want.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    (difference / norm).sqrt()
}

/// Norm, rotation, attention and SwiGLU in a row: the result, and the gradient of the input.
fn chain(x: &Tensor, device: &Device) -> (Tensor, Tensor) {
    let workspace = Workspace::with_dtype(device, Dtype::F32).unwrap();
    let x = Var::from_tensor(&x.to_device(device).unwrap()).unwrap();
    let lengths = [5, 9, 1];
    let layout = Arc::new(SequenceLayout::from_lengths(&lengths));
    let table = Arc::new(RopeTable::new(&RopeConfig { theta: 10_000.0, scaling: None }, 64, 16).unwrap());
    let weight: Arc<[f32]> = (0..256).map(|i| 1.0 + (i as f32 * 0.1).sin()).collect();
    let n = ops::rms_norm(x.as_tensor(), weight, 1e-5, &workspace).unwrap();
    let positions = Arc::new(layout.positions().clone());
    let q = ops::rotary(&n, 64, table, positions, &workspace).unwrap();
    let config = AttentionConfig { heads: 4, kv_heads: 4, head_dim: 64, scale: 0.125, window: None };
    let y = ops::causal_attention(&q, &q, &n, config, layout, &workspace).unwrap();
    let y = ops::swiglu(&y, &n, &workspace).unwrap();
    let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    (y.detach(), gradients.get(x.as_tensor()).unwrap().clone())
}

#[test]
fn a_chain_of_operations_has_the_values_and_gradients_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let x = Tensor::randn(0f32, 1.0, (15, 256), &Device::Cpu).unwrap();
    let (want, want_gradient) = chain(&x, &Device::Cpu);
    let (got, got_gradient) = chain(&x, &device);
    let errors = (relative_error(&got, &want), relative_error(&got_gradient, &want_gradient));
    println!("value {:.1e}, gradient {:.1e}", errors.0, errors.1);
    assert!(errors.0 < 1e-5 && errors.1 < 1e-5, "{errors:?}");
}

#[test]
fn a_layer_trains_on_the_gpu_as_on_the_cpu() {
    let Some(device) = gpu() else { return };
    let weight = Tensor::randn(0f32, 0.05, (96, 64), &Device::Cpu).unwrap();
    let x = Tensor::randn(0f32, 1.0, (2, 10, 64), &Device::Cpu).unwrap();
    let lora = LoraConfig { r: 8, lora_alpha: 16.0, ..LoraConfig::default() };
    let train = |device: &Device| -> Vec<f32> {
        let weight = weight.to_device(device).unwrap();
        let layer = QLoraLinear::quantize(&weight, None, &QuantConfig::default(), &lora, 3).unwrap();
        let mut optimizer = AdamW::new_lr(layer.vars(), 1e-2).unwrap();
        let x = x.to_device(device).unwrap();
        let step = |_| {
            let loss = layer.forward(&x).unwrap().sqr().unwrap().mean_all().unwrap();
            optimizer.backward_step(&loss).unwrap();
            loss.to_scalar::<f32>().unwrap()
        };
        (0..5).map(step).collect()
    };
    let (want, got) = (train(&Device::Cpu), train(&device));
    assert!(want[4] < want[0]);
    for (got, want) in got.iter().zip(&want) {
        assert!((got - want).abs() < 1e-4 * want.abs(), "{got} {want}");
    }
}
