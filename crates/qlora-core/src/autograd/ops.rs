//! The small grain: one candle node an operation.
//!
//! Tensors are f32 on the CPU; on a GPU they have the workspace's type, all arguments of an operation the same. They are seen as `[rows, last dimension]`; non-contiguous ones are copied first. Every function
//! returns a tensor that candle differentiates with respect to the arguments that are tensors; frozen weights are not.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use qlora_kernels::ops::attention::{self, AttentionConfig, LseOrder};
use qlora_kernels::ops::dropout::Dropout;
use qlora_kernels::ops::rope::{self, RopeTable};
use qlora_kernels::ops::{embedding as embed, frozen_linear as frozen, linear_cross_entropy as cross_entropy};
use qlora_kernels::ops::{lora_linear, rms_norm as norm, swiglu as glu};
use qlora_kernels::sequence::Positions;
#[cfg(feature = "cuda")]
use qlora_kernels::tensor::CudaStorageView;
use qlora_kernels::tensor::{TensorView, storage_view};
use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::{Matrix, SequenceLayout, View, Workspace};

use crate::error::{Error, Result};

type Forward = candle_core::Result<(CpuStorage, Shape)>;
type Gradient = candle_core::Result<Option<Tensor>>;

/// `x / rms(x) * weight` over the last dimension; the weight is frozen.
///
/// # Errors
/// If the weight does not have the width of `x`.
pub fn rms_norm(x: &Tensor, weight: Arc<[f32]>, eps: f32, workspace: &Workspace) -> Result<Tensor> {
    Ok(x.contiguous()?.apply_op1(RmsNorm { weight, eps, workspace: workspace.clone() })?)
}

/// Rotates the heads of `x [tokens, heads * head_dim]` by their tokens' positions.
///
/// # Errors
/// If there is not one position a token, or a position is beyond the table.
pub fn rotary(
    x: &Tensor,
    head_dim: usize,
    table: Arc<RopeTable>,
    positions: Arc<Positions>,
    workspace: &Workspace,
) -> Result<Tensor> {
    Ok(x.contiguous()?.apply_op1(Rotary { head_dim, table, positions, workspace: workspace.clone() })?)
}

/// `silu(gate) * up`.
///
/// # Errors
/// If the shapes differ.
pub fn swiglu(gate: &Tensor, up: &Tensor, workspace: &Workspace) -> Result<Tensor> {
    Ok(gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu { workspace: workspace.clone() })?)
}

/// Causal grouped-query attention: `q [tokens, heads * d]`, `k` and `v [tokens, kv_heads * d]`.
///
/// # Errors
/// If the shapes do not fit the configuration and the layout.
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    config: AttentionConfig,
    layout: Arc<SequenceLayout>,
    workspace: &Workspace,
) -> Result<Tensor> {
    let op = Attention { config, layout, lse: OnceLock::new(), workspace: workspace.clone() };
    Ok(q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)?)
}

/// Rows of a frozen table: `[tokens, width]`. Nothing is tracked.
///
/// # Errors
/// If a token is outside the table.
pub fn embedding(tokens: &[u32], table: &dyn FrozenWeight, workspace: &Workspace) -> Result<Tensor> {
    let mut out = workspace.matrix(tokens.len(), table.cols())?;
    embed::forward(tokens, table, out.view_mut())?;
    Ok(out.into_tensor((tokens.len(), table.cols()))?)
}

/// `x W^T` with a frozen weight: the gradient goes to `x` alone.
///
/// # Errors
/// If the last dimension of `x` is not the weight's number of columns.
pub fn frozen_linear(x: &Tensor, weight: Arc<dyn FrozenWeight>, workspace: &Workspace) -> Result<Tensor> {
    Ok(x.contiguous()?.apply_op1(FrozenLinear { weight, workspace: workspace.clone() })?)
}

/// `x W^T + scale drop(x) A^T B^T` with a frozen weight; gradients go to `x`, `A [r, in]` and `B [out, r]`.
///
/// # Errors
/// If the shapes do not fit.
pub fn qlora_linear(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    weight: Arc<dyn FrozenWeight>,
    scale: f32,
    dropout: Option<Dropout>,
    workspace: &Workspace,
) -> Result<Tensor> {
    let op = QLoraLinear { weight, scale, dropout, s: OnceLock::new(), workspace: workspace.clone() };
    Ok(x.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, op)?)
}

/// The sum of the cross-entropies of `hidden head^T` against `targets`, divided by `num_items`: a scalar. The logits
/// never exist whole; the gradient of `hidden` is made here and multiplied by the incoming one in the backward.
///
/// # Errors
/// If a target is outside the vocabulary. A second backward is an error.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    head: &dyn FrozenWeight,
    targets: &[i64],
    num_items: usize,
    workspace: &Workspace,
) -> Result<Tensor> {
    const OP: &str = "linear_cross_entropy";
    let hidden = hidden.contiguous()?;
    if num_items == 0 {
        return Err(Error::Invalid(format!("{OP}: there is no trained token to divide the loss by")));
    }
    let (loss, gradient) = {
        let input = TensorView::new(OP, &hidden)?;
        if !hidden.track_op() {
            (cross_entropy::forward(input.view(), head, targets, workspace)?, None)
        } else {
            let mut gradient = workspace.matrix(input.view().rows(), input.view().cols())?;
            let out = gradient.view_mut();
            let loss = cross_entropy::forward_backward(input.view(), head, targets, num_items, out, workspace)?;
            (loss, Some(gradient))
        }
    };
    let loss = (loss.sum / num_items as f64) as f32;
    Ok(hidden.apply_op1(LinearCrossEntropy {
        loss,
        #[cfg(feature = "cuda")]
        workspace: workspace.clone(),
        gradient: Mutex::new(gradient),
    })?)
}

/// The forwards of a custom op on both devices, from `run`, which takes the arguments as views and returns the result as a
/// matrix; the result has the first argument's shape but for the last dimension.
macro_rules! forwards {
    ($($storage:ident: $layout:ident),+) => {
        fn cpu_fwd(&self, $($storage: &CpuStorage, $layout: &Layout),+) -> Forward {
            let y = self.run($(storage_view(self.name(), $storage, $layout)?),+)?;
            let shape = with_last_dim(first!($($layout),+).dims(), y.cols());
            Ok((y.into_storage(&shape)?, shape))
        }

        #[cfg(feature = "cuda")]
        fn cuda_fwd(
            &self,
            $($storage: &CudaStorage, $layout: &Layout),+
        ) -> candle_core::Result<(CudaStorage, Shape)> {
            $(let $storage = CudaStorageView::new(self.name(), $storage, $layout)?;)+
            let y = self.run($($storage.view()),+)?;
            let shape = with_last_dim(first!($($layout),+).dims(), y.cols());
            Ok((y.into_cuda_storage(&shape)?, shape))
        }
    };
}

/// The first of one to three layouts.
macro_rules! first {
    ($first:expr $(, $rest:expr)*) => {{
        $(let _ = $rest;)*
        $first
    }};
}

struct RmsNorm {
    weight: Arc<[f32]>,
    eps: f32,
    workspace: Workspace,
}

impl RmsNorm {
    fn run(&self, x: View) -> qlora_kernels::Result<Matrix> {
        Ok(self.normalize(x)?.0)
    }

    /// The weight where the argument is.
    fn weight(&self) -> qlora_kernels::Result<Matrix> {
        self.workspace.upload(&self.weight, 1, self.weight.len())
    }

    fn normalize(&self, x: View) -> qlora_kernels::Result<(Matrix, Matrix)> {
        let mut y = self.workspace.matrix(x.rows(), x.cols())?;
        let mut rstd = self.workspace.matrix_f32(x.rows(), 1)?;
        norm::forward(x, self.weight()?.view(), self.eps, y.view_mut(), rstd.view_mut())?;
        Ok((y, rstd))
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    forwards!(x: layout);

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Gradient {
        let dy = dy.contiguous()?;
        let (input, dy) = (TensorView::new(self.name(), x)?, TensorView::new(self.name(), &dy)?);
        let (_, rstd) = self.normalize(input.view())?;
        let mut dx = self.workspace.matrix(rstd.rows(), self.weight.len())?;
        norm::backward(input.view(), self.weight()?.view(), rstd.view(), dy.view(), dx.view_mut(), false)?;
        Ok(Some(dx.into_tensor(x.shape().clone())?))
    }
}

struct Rotary {
    head_dim: usize,
    table: Arc<RopeTable>,
    positions: Arc<Positions>,
    workspace: Workspace,
}

impl Rotary {
    fn run(&self, x: View) -> qlora_kernels::Result<Matrix> {
        let mut y = copied(x, &self.workspace)?;
        rope::forward(y.view_mut(), self.head_dim, &self.table, &self.positions)?;
        Ok(y)
    }
}

impl CustomOp1 for Rotary {
    fn name(&self) -> &'static str {
        "rope"
    }

    forwards!(x: layout);

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Gradient {
        let dy = dy.contiguous()?;
        let mut dx = copied(TensorView::new(self.name(), &dy)?.view(), &self.workspace)?;
        rope::backward(dx.view_mut(), self.head_dim, &self.table, &self.positions)?;
        Ok(Some(dx.into_tensor(x.shape().clone())?))
    }
}

struct SwiGlu {
    workspace: Workspace,
}

impl SwiGlu {
    fn run(&self, gate: View, up: View) -> qlora_kernels::Result<Matrix> {
        let mut h = self.workspace.matrix(gate.rows(), gate.cols())?;
        glu::forward(gate, up, h.view_mut())?;
        Ok(h)
    }
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    forwards!(gate: layout, up: up_layout);

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        dh: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dh = dh.contiguous()?;
        let mut dgate = copied(TensorView::new(self.name(), gate)?.view(), &self.workspace)?;
        let mut dup = copied(TensorView::new(self.name(), up)?.view(), &self.workspace)?;
        let dh = TensorView::new(self.name(), &dh)?;
        glu::backward(dgate.view_mut(), dup.view_mut(), dh.view(), None)?;
        let (dgate, dup) = (dgate.into_tensor(gate.shape().clone())?, dup.into_tensor(up.shape().clone())?);
        Ok((Some(dgate), Some(dup)))
    }
}

struct Attention {
    config: AttentionConfig,
    layout: Arc<SequenceLayout>,
    lse: OnceLock<(Matrix, LseOrder)>,
    workspace: Workspace,
}

impl Attention {
    fn run(&self, q: View, k: View, v: View) -> qlora_kernels::Result<Matrix> {
        let mut out = self.workspace.matrix(q.rows(), q.cols())?;
        let mut lse = self.workspace.matrix_f32(q.rows(), self.config.heads)?;
        let (out_view, lse_view) = (out.view_mut(), lse.view_mut());
        let order = attention::forward(&self.config, q, k, v, &self.layout, out_view, lse_view, &self.workspace)?;
        // A second forward of the same node cannot happen; if it did, its lse would be the same.
        let _ = self.lse.set((lse, order));
        Ok(out)
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    forwards!(q: layout, k: k_layout, v: v_layout);

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let name = self.name();
        let dout = dout.contiguous()?;
        let (lse, order) = self.lse.get().ok_or_else(|| Error::Invalid(format!("{name}: backward before forward")))?;
        let matrix_like = |tensor: &Tensor| {
            let cols = tensor.dims().last().copied().unwrap_or(1);
            self.workspace.matrix(tensor.elem_count() / cols, cols)
        };
        let mut gradients = [matrix_like(q)?, matrix_like(k)?, matrix_like(v)?];
        {
            let (q, k, v) = (TensorView::new(name, q)?, TensorView::new(name, k)?, TensorView::new(name, v)?);
            let (out, dout) = (TensorView::new(name, out)?, TensorView::new(name, &dout)?);
            let [dq, dk, dv] = gradients.each_mut().map(Matrix::view_mut);
            attention::backward(
                &self.config,
                q.view(),
                k.view(),
                v.view(),
                out.view(),
                lse.view(),
                *order,
                dout.view(),
                &self.layout,
                dq,
                dk,
                dv,
                &self.workspace,
            )?;
        }
        let [dq, dk, dv] = gradients;
        let dq = dq.into_tensor(q.shape().clone())?;
        Ok((Some(dq), Some(dk.into_tensor(k.shape().clone())?), Some(dv.into_tensor(v.shape().clone())?)))
    }
}

struct FrozenLinear {
    weight: Arc<dyn FrozenWeight>,
    workspace: Workspace,
}

impl FrozenLinear {
    fn run(&self, x: View) -> qlora_kernels::Result<Matrix> {
        let mut y = self.workspace.matrix(x.rows(), self.weight.rows())?;
        frozen::forward(x, &*self.weight, y.view_mut(), 0.0, &self.workspace)?;
        Ok(y)
    }
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen_linear"
    }

    forwards!(x: layout);

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Gradient {
        let dy = dy.contiguous()?;
        let dy = TensorView::new(self.name(), &dy)?;
        let mut dx = self.workspace.matrix(dy.view().rows(), self.weight.cols())?;
        frozen::backward(dy.view(), &*self.weight, dx.view_mut(), 0.0, &self.workspace)?;
        Ok(Some(dx.into_tensor(x.shape().clone())?))
    }
}

struct QLoraLinear {
    weight: Arc<dyn FrozenWeight>,
    scale: f32,
    dropout: Option<Dropout>,
    s: OnceLock<Matrix>,
    workspace: Workspace,
}

impl QLoraLinear {
    fn run(&self, x: View, a: View, b: View) -> qlora_kernels::Result<Matrix> {
        let mut y = self.workspace.matrix(x.rows(), self.weight.rows())?;
        frozen::forward(x, &*self.weight, y.view_mut(), 0.0, &self.workspace)?;
        let mut s = self.workspace.matrix(x.rows(), a.rows())?;
        let dropout = self.dropout;
        lora_linear::forward(x, a, b, self.scale, dropout, s.view_mut(), y.view_mut(), &self.workspace)?;
        let _ = self.s.set(s);
        Ok(y)
    }
}

impl CustomOp3 for QLoraLinear {
    fn name(&self) -> &'static str {
        "qlora_linear"
    }

    forwards!(x: layout, a: a_layout, b: b_layout);

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let name = self.name();
        let dy = dy.contiguous()?;
        let s = self.s.get().ok_or_else(|| Error::Invalid(format!("{name}: backward before forward")))?;
        let (mut da, mut db) =
            (self.workspace.zeros(a.dim(0)?, a.dim(1)?)?, self.workspace.zeros(b.dim(0)?, b.dim(1)?)?);
        // candle panics on a missing gradient only for tracked tensors: untracked ones cost nothing.
        let dx = {
            let (input, dy) = (TensorView::new(name, x)?, TensorView::new(name, &dy)?);
            let (av, bv) = (TensorView::new(name, a)?, TensorView::new(name, b)?);
            let mut dx = match x.track_op() {
                true => Some(self.workspace.matrix(input.view().rows(), input.view().cols())?),
                false => None,
            };
            if let Some(dx) = &mut dx {
                frozen::backward(dy.view(), &*self.weight, dx.view_mut(), 0.0, &self.workspace)?;
            }
            lora_linear::backward(
                input.view(),
                av.view(),
                bv.view(),
                self.scale,
                self.dropout,
                s.view(),
                dy.view(),
                dx.as_mut().map(Matrix::view_mut),
                da.view_mut(),
                db.view_mut(),
                &self.workspace,
            )?;
            dx
        };
        let dx = dx.map(|dx| dx.into_tensor(x.shape().clone())).transpose()?;
        Ok((dx, Some(da.into_tensor(a.shape().clone())?), Some(db.into_tensor(b.shape().clone())?)))
    }
}

struct LinearCrossEntropy {
    loss: f32,
    #[cfg(feature = "cuda")]
    workspace: Workspace,
    gradient: Mutex<Option<Matrix>>,
}

impl CustomOp1 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Forward {
        Ok((CpuStorage::F32(vec![self.loss]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let loss = self.workspace.upload(&[self.loss], 1, 1)?;
        Ok((loss.into_cuda_storage(&Shape::from(()))?, Shape::from(())))
    }

    fn bwd(&self, hidden: &Tensor, _: &Tensor, incoming: &Tensor) -> Gradient {
        let gradient = self.gradient.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(|| {
            let message = format!("{}: backward ran already; run the forward again before a second one", self.name());
            candle_core::Error::from(Error::Invalid(message))
        })?;
        let gradient = gradient.into_tensor(hidden.shape().clone())?;
        let factor = incoming.to_scalar::<f32>()?;
        Ok(Some(if factor == 1.0 { gradient } else { gradient.affine(f64::from(factor), 0.0)? }))
    }
}

fn copied(x: View, workspace: &Workspace) -> qlora_kernels::Result<Matrix> {
    let mut y = workspace.matrix(x.rows(), x.cols())?;
    y.view_mut().copy_from(x)?;
    Ok(y)
}

fn with_last_dim(dims: &[usize], last: usize) -> Shape {
    let mut dims = dims.to_vec();
    match dims.last_mut() {
        Some(dim) => *dim = last,
        None => dims.push(last),
    }
    Shape::from(dims)
}
