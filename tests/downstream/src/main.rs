//! Trains a two-layer network of a user's own over frozen 4-bit weights and checks that it learned.

use anyhow::ensure;
use candle_core::{Device, Tensor};
use candle_nn::Optimizer;
use qlora::kernels::quant::QuantConfig;
use qlora::lora::LoraConfig;
use qlora::nn::QLoraLinear;

fn main() -> anyhow::Result<()> {
    let device = Device::Cpu;
    let lora = LoraConfig { r: 8, lora_alpha: 16.0, ..LoraConfig::default() };
    let layer = |rows: usize, cols: usize, seed: u64| -> anyhow::Result<QLoraLinear> {
        let weight = Tensor::randn(0f32, 0.3, (rows, cols), &device)?;
        Ok(QLoraLinear::quantize(&weight, None, &QuantConfig::default(), &lora, seed)?)
    };
    let (first, second) = (layer(64, 32, 1)?, layer(4, 64, 2)?);
    let vars = [first.vars(), second.vars()].concat();
    let mut optimizer = candle_nn::AdamW::new_lr(vars.clone(), 1e-2)?;

    let x = Tensor::randn(0f32, 1.0, (128, 32), &device)?;
    let target = x.narrow(1, 0, 4)?.tanh()?.contiguous()?;
    let loss = || -> anyhow::Result<Tensor> {
        let y = second.forward(&first.forward(&x)?.relu()?)?;
        Ok((y - &target)?.sqr()?.mean_all()?)
    };
    let before = loss()?.to_scalar::<f32>()?;
    for _ in 0..100 {
        optimizer.backward_step(&loss()?)?;
    }
    let after = loss()?.to_scalar::<f32>()?;
    println!("downstream crate: loss {before:.4} -> {after:.4}");
    ensure!(after < before / 4.0, "the adapters did not learn");
    Ok(())
}
