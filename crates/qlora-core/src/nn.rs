//! Layers for models of your own, composed with candle's graph and trained by candle's optimizers.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::Optimizer;
//! use qlora_core::lora::LoraConfig;
//! use qlora_core::nn::QLoraLinear;
//! use qlora_kernels::quant::QuantConfig;
//!
//! # fn main() -> qlora_core::Result<()> {
//! let weight = Tensor::randn(0f32, 0.02, (64, 128), &Device::Cpu)?; // [out, in]
//! let lora = LoraConfig { r: 4, lora_alpha: 8.0, ..LoraConfig::default() };
//! let layer = QLoraLinear::quantize(&weight, None, &QuantConfig::default(), &lora, 42)?;
//! let mut optimizer = candle_nn::AdamW::new_lr(layer.vars(), 1e-3)?;
//! let x = Tensor::randn(0f32, 1.0, (2, 10, 128), &Device::Cpu)?;
//! let loss = layer.forward(&x)?.sqr()?.mean_all()?;
//! optimizer.backward_step(&loss)?;
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::ModuleT;
use qlora_kernels::Workspace;
use qlora_kernels::ops::dropout::Dropout;
use qlora_kernels::quant::{QuantConfig, Quantized4bit};
use qlora_kernels::weight::{FrozenWeight, PlainData};

use crate::autograd::ops;
use crate::error::{Error, Result};
use crate::lora::{self, AdapterLayout, LinearModule, LoraConfig};

/// A linear layer with a frozen weight `W [out, in]` (4-bit or plain) and a trainable adapter:
/// `y = x W^T + bias + scale drop(x) A^T B^T`, with `A [r, in]`, `B [out, r]`.
///
/// Inputs are f32, `[.., in]`. [`Self::forward`] is the deterministic form; [`ModuleT::forward_t`] with `train = true`
/// applies the configuration's dropout (candle gives every `Module` a `forward_t` that ignores `train`, which is why this
/// layer is a `ModuleT` alone, like candle's batch norm).
#[derive(Debug)]
pub struct QLoraLinear {
    weight: Arc<dyn FrozenWeight>,
    bias: Option<Tensor>,
    a: Var,
    b: Var,
    scale: f32,
    dropout: f32,
    seed: u64,
    /// Every training forward draws its own mask.
    forwards: AtomicU64,
    workspace: Workspace,
}

impl QLoraLinear {
    /// A layer over a frozen weight of any kind; A is drawn from `seed`, B is zero.
    ///
    /// # Errors
    /// If the configuration is not valid or the bias does not have one element an output.
    pub fn new(weight: Arc<dyn FrozenWeight>, bias: Option<Tensor>, lora: &LoraConfig, seed: u64) -> Result<Self> {
        Self::new_in(weight, bias, lora, seed, Workspace::cpu())
    }

    /// [`Self::new`] for a weight that is where `workspace` is: inputs, A and B have its type.
    ///
    /// # Errors
    /// As there.
    pub fn new_in(
        weight: Arc<dyn FrozenWeight>,
        bias: Option<Tensor>,
        lora: &LoraConfig,
        seed: u64,
        workspace: Workspace,
    ) -> Result<Self> {
        lora.validate()?;
        if lora.use_dora {
            let message = "use_dora: a QLoraLinear has A and B alone; CausalLm::add_adapter trains DoRA";
            return Err(Error::Unsupported(message.into()));
        }
        if let Some(bias) = bias.as_ref().filter(|bias| bias.dims() != [weight.rows()]) {
            let (got, rows) = (bias.dims(), weight.rows());
            return Err(Error::tensor("bias", format!("has shape {got:?}, the weight has {rows} rows")));
        }
        let (out_features, in_features) = (weight.rows(), weight.cols());
        let module = LinearModule { name: "linear".into(), out_features, in_features };
        let layout = AdapterLayout::new(&[module], lora.r);
        let a = &lora::init(&layout, seed)[layout.entries()[0].range()];
        let (device, dtype) = (workspace.device(), candle_dtype(workspace.dtype()));
        let a = Var::from_tensor(&Tensor::from_slice(a, (lora.r, in_features), &device)?.to_dtype(dtype)?)?;
        let b = Var::zeros((weight.rows(), lora.r), dtype, &device)?;
        Ok(Self {
            bias: bias
                .map(|bias| bias.detach().to_device(&device).and_then(|bias| bias.to_dtype(dtype)))
                .transpose()?,
            scale: lora.scaling() as f32,
            dropout: lora.lora_dropout as f32,
            a,
            b,
            seed,
            forwards: AtomicU64::new(0),
            workspace,
            weight,
        })
    }

    /// A layer over a weight `[out, in]` (f32, bf16 or f16) that is quantized here. It runs on the weight's device; on a GPU
    /// inputs have the weight's type.
    ///
    /// # Errors
    /// If the weight is not a matrix of one of these types or holds values that are not finite.
    pub fn quantize(
        weight: &Tensor,
        bias: Option<Tensor>,
        quantization: &QuantConfig,
        lora: &LoraConfig,
        seed: u64,
    ) -> Result<Self> {
        let (rows, cols) = weight.dims2()?;
        let flat = weight.to_device(&Device::Cpu)?.flatten_all()?;
        let data = match weight.dtype() {
            DType::F32 => PlainData::F32(flat.to_vec1()?),
            DType::BF16 => PlainData::Bf16(flat.to_vec1()?),
            DType::F16 => PlainData::F16(flat.to_vec1()?),
            other => return Err(Error::Unsupported(format!("quantizing a weight of type {other:?}"))),
        };
        #[cfg(feature = "cuda")]
        if weight.device().is_cuda() {
            let dtype = match data {
                PlainData::F32(_) => qlora_kernels::Dtype::F32,
                PlainData::Bf16(_) => qlora_kernels::Dtype::Bf16,
                PlainData::F16(_) => qlora_kernels::Dtype::F16,
            };
            let workspace = Workspace::with_dtype(weight.device(), dtype)?;
            let weight = qlora_kernels::cuda::CudaWeight::quantize(&data, rows, cols, quantization, &workspace)?;
            return Self::new_in(Arc::new(weight), bias, lora, seed, workspace);
        }
        let quantized = Quantized4bit::quantize(&data, rows, cols, quantization)?;
        Self::new(Arc::new(quantized), bias, lora, seed)
    }

    /// The trainable variables, `[A, B]`.
    pub fn vars(&self) -> Vec<Var> {
        vec![self.a.clone(), self.b.clone()]
    }

    /// The frozen weight.
    pub fn weight(&self) -> &Arc<dyn FrozenWeight> {
        &self.weight
    }

    /// The deterministic form, without dropout.
    ///
    /// # Errors
    /// If the last dimension of `x` is not `in`, or `x` has another type or device than the layer.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    fn run(&self, x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        let (a, b) = (self.a.as_tensor(), self.b.as_tensor());
        let y = ops::qlora_linear(x, a, b, self.weight.clone(), self.scale, dropout, &self.workspace)?;
        match &self.bias {
            Some(bias) => Ok(y.broadcast_add(bias)?),
            None => Ok(y),
        }
    }
}

fn candle_dtype(dtype: qlora_kernels::Dtype) -> DType {
    match dtype {
        qlora_kernels::Dtype::F32 => DType::F32,
        qlora_kernels::Dtype::Bf16 => DType::BF16,
        qlora_kernels::Dtype::F16 => DType::F16,
    }
}

impl ModuleT for QLoraLinear {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let dropout = (train && self.dropout > 0.0).then(|| {
            let stream = self.forwards.fetch_add(1, Ordering::Relaxed);
            Dropout { p: self.dropout, seed: self.seed, stream, first_row: 0 }
        });
        Ok(self.run(x, dropout)?)
    }
}
