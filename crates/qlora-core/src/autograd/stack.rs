//! The large grain: the whole decoder stack as one candle node over one flat adapter variable.
//!
//! The result is computed before the node is made; the node's forward only hands it over. What the blocks kept is owned
//! by the node and freed block by block during the backward. The node's arguments are `x` (the embedding's output,
//! which gets a gradient only if candle tracks it) and `flat`, the variable that holds all adapters back to back: an op
//! without a tracked argument would record nothing, and nothing would be trained.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};
use qlora_kernels::tensor::TensorView;
use qlora_kernels::{Matrix, SequenceLayout, Workspace};

use crate::adapter::kinds::dora;
use crate::error::{Error, Result};
use crate::model::block::Pass;
use crate::model::projection::AdapterPass;
use crate::model::stack::{SavedStack, Stack};

const OP: &str = "decoder_stack";

struct StackNode {
    stack: Arc<Stack>,
    layout: Arc<SequenceLayout>,
    dropout: Option<(f32, u64)>,
    /// Of the weights with an adapter with magnitudes, which the backward takes for constants.
    inverse_norms: Option<Matrix>,
    workspace: Workspace,
    result: Mutex<Option<Matrix>>,
    saved: Mutex<Option<SavedStack>>,
}

/// Runs the stack on `x [tokens, hidden]` (f32) with the adapters in `flat`; the result `[tokens, hidden]` is tracked.
///
/// # Errors
/// If shapes, dtypes or the device do not fit. The backward fails on a second call: what the first one read is gone.
pub(crate) fn apply(
    stack: &Arc<Stack>,
    x: &Tensor,
    flat: &Tensor,
    layout: Arc<SequenceLayout>,
    dropout: Option<(f32, u64)>,
    workspace: &Workspace,
) -> Result<Tensor> {
    let (result, saved, inverse_norms) = {
        let input = TensorView::new(OP, x)?;
        let values = TensorView::new(OP, flat)?;
        let mut copy = workspace.matrix(input.view().rows(), input.view().cols())?;
        copy.view_mut().copy_from(input.view())?;
        let rope = stack.rope(layout.max_len())?;
        let norms = dora::inverse_norms(stack.adapted(), values.view(), workspace)?;
        let inverse_norms = norms.as_ref().map(Matrix::view);
        let adapter = Some(AdapterPass { dropout, inverse_norms, ..AdapterPass::new(values.view()) });
        let pass = Pass { adapter, layout: &layout, share: None, rope: &rope, workspace };
        let (result, saved) = stack.forward(copy, &pass, x.track_op())?;
        (result, saved, norms)
    };
    let node = StackNode {
        stack: stack.clone(),
        layout,
        dropout,
        inverse_norms,
        workspace: workspace.clone(),
        result: Mutex::new(Some(result)),
        saved: Mutex::new(Some(saved)),
    };
    Ok(x.apply_op2(flat, node)?)
}

impl CustomOp2 for StackNode {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        x: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let result = take(&self.result)
            .ok_or_else(|| candle_core::Error::from(Error::Invalid(format!("{OP}: the node runs once"))))?;
        Ok((result.into_storage(x.shape())?, x.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        x: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        let result = take(&self.result)
            .ok_or_else(|| candle_core::Error::from(Error::Invalid(format!("{OP}: the node runs once"))))?;
        Ok((result.into_cuda_storage(x.shape())?, x.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        flat: &Tensor,
        _result: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let saved = take(&self.saved).ok_or_else(|| {
            let message = format!("{OP}: backward ran already; run the forward again before a second backward");
            candle_core::Error::from(Error::Invalid(message))
        })?;
        let gradient = gradient.contiguous()?;
        let mut dflat = self.workspace.zeros_f32(1, flat.elem_count())?;
        let dx = {
            let gradient = TensorView::new(OP, &gradient)?;
            let mut dy = self.workspace.matrix(gradient.view().rows(), gradient.view().cols())?;
            dy.view_mut().copy_from(gradient.view())?;
            let values = TensorView::new(OP, flat)?;
            let rope = self.stack.rope(self.layout.max_len())?;
            let inverse_norms = self.inverse_norms.as_ref().map(Matrix::view);
            let adapter = Some(AdapterPass { dropout: self.dropout, inverse_norms, ..AdapterPass::new(values.view()) });
            let pass = Pass { adapter, layout: &self.layout, share: None, rope: &rope, workspace: &self.workspace };
            self.stack.backward(saved, dy, &pass, dflat.view_mut(), x.track_op())?
        };
        let dx = match dx {
            None => None,
            // Its memory has a margin on CUDA, a tensor's has not.
            Some(dx) if dx.margin() > 0 => {
                let mut plain = self.workspace.matrix(dx.rows(), dx.cols())?;
                plain.view_mut().copy_from(dx.view())?;
                Some(plain.into_tensor(x.shape().clone())?)
            }
            Some(dx) => Some(dx.into_tensor(x.shape().clone())?),
        };
        Ok((dx, Some(dflat.into_tensor(flat.shape().clone())?)))
    }
}

fn take<T>(slot: &Mutex<Option<T>>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}
