//! A model of your own over frozen 4-bit weights: two `QLoraLinear` layers, a candle optimizer, `loss.backward()`.
//!
//!     cargo run --release --example custom_model
//!
//! The frozen layers are random; the adapters learn to sort each input's first four numbers into classes.

use candle_core::{Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use qlora::kernels::quant::QuantConfig;
use qlora::lora::LoraConfig;
use qlora::nn::QLoraLinear;

struct Classifier {
    hidden: QLoraLinear,
    output: QLoraLinear,
}

impl Classifier {
    fn new(inputs: usize, width: usize, classes: usize, device: &Device) -> anyhow::Result<Self> {
        let lora = LoraConfig { r: 8, lora_alpha: 16.0, ..LoraConfig::default() };
        let layer = |rows: usize, cols: usize, seed: u64| -> anyhow::Result<QLoraLinear> {
            let weight = Tensor::randn(0f32, 1.0 / (cols as f32).sqrt(), (rows, cols), device)?;
            Ok(QLoraLinear::quantize(&weight, None, &QuantConfig::default(), &lora, seed)?)
        };
        Ok(Self { hidden: layer(width, inputs, 1)?, output: layer(classes, width, 2)? })
    }

    fn forward(&self, x: &Tensor) -> anyhow::Result<Tensor> {
        Ok(self.output.forward(&self.hidden.forward(x)?.relu()?)?)
    }
}

fn main() -> anyhow::Result<()> {
    let device = Device::Cpu;
    let model = Classifier::new(64, 256, 4, &device)?;
    let variables = [model.hidden.vars(), model.output.vars()].concat();
    let trainable: usize = variables.iter().map(|var| var.elem_count()).sum();
    let frozen = model.hidden.weight().bytes() + model.output.weight().bytes();
    println!("{trainable} trainable parameters over {frozen} bytes of frozen weights");
    let mut optimizer = AdamW::new(variables, ParamsAdamW { lr: 5e-3, weight_decay: 0.0, ..Default::default() })?;

    for step in 0..=200 {
        let x = Tensor::randn(0f32, 1.0, (256, 64), &device)?;
        let classes = x.narrow(1, 0, 4)?.argmax(1)?;
        let logits = model.forward(&x)?;
        let loss = candle_nn::loss::cross_entropy(&logits, &classes)?;
        optimizer.backward_step(&loss)?;
        if step % 50 == 0 {
            let right = logits.argmax(1)?.eq(&classes)?.to_dtype(candle_core::DType::F32)?.mean_all()?;
            println!(
                "step {step:3}  loss {:.4}  right {:.1}%",
                loss.to_scalar::<f32>()?,
                100.0 * right.to_scalar::<f32>()?
            );
        }
    }
    Ok(())
}
