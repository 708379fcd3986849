//! The two ends of a model as candle nodes over the flat adapter variable, for adapters that hold rows of tokens, a whole embedding or
//! a whole head. Of other adapters the ends have no node of their own: their tensors are those of [`super::ops`].

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};
use qlora_kernels::ops::linear_cross_entropy::{self as cross_entropy, GradScale};
use qlora_kernels::tensor::TensorView;
use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::{Matrix, Workspace};

use super::ops;
use crate::adapter::kinds::tables::TrainedTables;
use crate::error::{Error, Result};

/// The adapter's parts of the tables, and its variable.
pub(crate) type Trained<'a> = (&'a Arc<TrainedTables>, &'a Tensor);

/// The rows `[tokens, width]` of a table; the variable gets the gradient of the rows that are the adapter's.
pub(crate) fn embedding(
    tokens: &[u32],
    weight: &Arc<dyn FrozenWeight>,
    (tables, flat): Trained,
    workspace: &Workspace,
) -> Result<Tensor> {
    if tables.embedding.is_empty() {
        return ops::embedding(tokens, &**weight, workspace);
    }
    let mut rows = workspace.matrix(tokens.len(), weight.cols())?;
    {
        let values = TensorView::new(Embedding::OP, flat)?;
        tables.embedding(&**weight, values.view()).embed(tokens, rows.view_mut())?;
    }
    let node = Embedding {
        tokens: tokens.to_vec(),
        weight: weight.clone(),
        tables: tables.clone(),
        result: Mutex::new(Some(rows)),
        workspace: workspace.clone(),
    };
    Ok(flat.apply_op1(node)?)
}

struct Embedding {
    tokens: Vec<u32>,
    weight: Arc<dyn FrozenWeight>,
    tables: Arc<TrainedTables>,
    result: Mutex<Option<Matrix>>,
    workspace: Workspace,
}

impl Embedding {
    const OP: &str = "trained_embedding";

    fn shape(&self) -> Shape {
        (self.tokens.len(), self.weight.cols()).into()
    }
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        Self::OP
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let shape = self.shape();
        Ok((take(Self::OP, &self.result)?.into_storage(&shape)?, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        let shape = self.shape();
        Ok((take(Self::OP, &self.result)?.into_cuda_storage(&shape)?, shape))
    }

    fn bwd(&self, flat: &Tensor, _: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let mut dflat = self.workspace.zeros_f32(1, flat.elem_count())?;
        {
            let (values, dx) = (TensorView::new(Self::OP, flat)?, TensorView::new(Self::OP, &gradient)?);
            let table = self.tables.embedding(&*self.weight, values.view());
            table.embed_backward(&self.tokens, dx.view(), dflat.view_mut(), &self.workspace)?;
        }
        Ok(Some(dflat.into_tensor(flat.shape().clone())?))
    }
}

/// [`ops::linear_cross_entropy`] with a head of which the adapter holds parts: the variable gets their gradient.
pub(crate) fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Arc<dyn FrozenWeight>,
    (tables, flat): Trained,
    dropout: Option<(f32, u64)>,
    targets: &[i64],
    num_items: usize,
    workspace: &Workspace,
) -> Result<Tensor> {
    if tables.head.is_empty() {
        return ops::linear_cross_entropy(hidden, &**weight, targets, num_items, workspace);
    }
    const OP: &str = "trained_head";
    let hidden = hidden.contiguous()?;
    if num_items == 0 {
        return Err(Error::Invalid(format!("{OP}: there is no trained token to divide the loss by")));
    }
    let (loss, gradients) = {
        let (input, values) = (TensorView::new(OP, &hidden)?, TensorView::new(OP, flat)?);
        let head = tables.head(&**weight, values.view(), dropout);
        let mut dhidden = workspace.matrix(input.view().rows(), input.view().cols())?;
        let mut dflat = workspace.zeros_f32(1, flat.elem_count())?;
        let (scale, target) = (GradScale::Uniform(1.0 / num_items as f32), Some(dflat.view_mut()));
        let loss =
            cross_entropy::enqueue_with(input.view(), head, targets, scale, dhidden.view_mut(), target, workspace)?;
        (loss.wait()?, [dhidden, dflat])
    };
    let loss = (loss.sum / num_items as f64) as f32;
    let [dhidden, dflat] = gradients;
    let gradients = [dhidden.into_tensor(hidden.shape().clone())?, dflat.into_tensor(flat.shape().clone())?];
    let node = Head {
        loss,
        gradients,
        #[cfg(feature = "cuda")]
        workspace: workspace.clone(),
    };
    Ok(hidden.apply_op2(flat, node)?)
}

struct Head {
    loss: f32,
    /// Of the hidden states and of the variable, for a gradient of 1.
    gradients: [Tensor; 2],
    #[cfg(feature = "cuda")]
    workspace: Workspace,
}

impl CustomOp2 for Head {
    fn name(&self) -> &'static str {
        "trained_head"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![self.loss]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        let loss = self.workspace.upload(&[self.loss], 1, 1)?;
        Ok((loss.into_cuda_storage(&Shape::from(()))?, Shape::from(())))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let factor = f64::from(gradient.to_dtype(candle_core::DType::F32)?.to_scalar::<f32>()?);
        let [dhidden, dflat] = &self.gradients;
        Ok((Some((dhidden * factor)?), Some((dflat * factor)?)))
    }
}

fn take(op: &str, slot: &Mutex<Option<Matrix>>) -> candle_core::Result<Matrix> {
    let result = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    result.ok_or_else(|| candle_core::Error::from(Error::Invalid(format!("{op}: the node runs once"))))
}
