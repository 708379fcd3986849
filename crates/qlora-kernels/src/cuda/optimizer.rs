//! AdamW, the gradient's norm and the search for values that are not finite.

use super::buffer::Buffer;
use super::ffi;
use super::ops::{vector, vector_mut};
use super::view::CudaView;
use crate::error::Result;
use crate::ops::adamw::AdamW;
use crate::view::{View, ViewMut};

/// Blocks that `qlora_grad_norm` may use, each with a partial sum.
const PARTIAL_SUMS: usize = 4096;

pub(crate) fn adamw(
    op: &'static str,
    config: &AdamW,
    step: u64,
    grad_scale: f32,
    param: ViewMut,
    grad: View,
    m: ViewMut,
    v: ViewMut,
) -> Result<()> {
    let (param, grad, m, v) = (param.cuda(op)?, grad.cuda(op)?, m.cuda(op)?, v.cuda(op)?);
    let len = param.rows() * param.cols();
    let gpu = param.gpu();
    let (param, grad) = (vector_mut(op, "param", param, len)?, vector(op, "grad", grad, len)?);
    let (m, v) = (vector_mut(op, "m", m, len)?, vector_mut(op, "v", v, len)?);
    let AdamW { lr, beta1, beta2, eps, weight_decay } = *config;
    // SAFETY: four live vectors of `len` elements.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_adamw(param, grad, m, v, len as i64, lr, beta1, beta2, eps, weight_decay, step, grad_scale, stream)
    })
}

pub(crate) fn sum_of_squares(op: &'static str, grad: CudaView) -> Result<f64> {
    let len = grad.rows() * grad.cols();
    let gpu = grad.gpu().arc();
    let grad = vector(op, "the gradient", grad, len)?;
    let mut partial = Buffer::new(&gpu, op, PARTIAL_SUMS * 8)?;
    let mut out = Buffer::new(&gpu, op, 8)?;
    let (partial_ptr, out_ptr) = (partial.as_mut_ptr(), out.as_mut_ptr());
    // SAFETY: the vector and both buffers are live and have the sizes that the launcher expects.
    gpu.launch(op, |stream| unsafe { ffi::qlora_grad_norm(grad, len as i64, partial_ptr, out_ptr, stream) })?;
    Ok(out.download::<f64>()?[0])
}

pub(crate) fn first_non_finite(op: &'static str, grad: CudaView) -> Result<Option<usize>> {
    let len = grad.rows() * grad.cols();
    let gpu = grad.gpu().arc();
    let grad = vector(op, "the gradient", grad, len)?;
    let mut out = Buffer::new(&gpu, op, 8)?;
    let out_ptr = out.as_mut_ptr();
    // SAFETY: the vector and the result are live.
    gpu.launch(op, |stream| unsafe { ffi::qlora_first_non_finite(grad, len as i64, out_ptr, stream) })?;
    let first = out.download::<u64>()?[0];
    Ok((first != u64::MAX).then_some(first as usize))
}
