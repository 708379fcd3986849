//! AdamW, the gradient's norm and the search for values that are not finite.

use super::buffer::Buffer;
use super::ffi;
use super::ops::{vector, vector_mut};
use super::view::CudaView;
use crate::error::Result;
use crate::ops::adamw::AdamW;
use crate::ops::adamw_8bit::CudaMoments;
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

pub(crate) fn adamw_8bit(
    op: &'static str,
    config: &AdamW,
    step: u64,
    grad_scale: f32,
    param: ViewMut,
    grad: View,
    moments: &mut CudaMoments,
) -> Result<()> {
    let (param, grad) = (param.cuda(op)?, grad.cuda(op)?);
    let len = param.rows() * param.cols();
    let gpu = param.gpu();
    let (param, grad) = (vector_mut(op, "param", param, len)?, vector(op, "grad", grad, len)?);
    let AdamW { lr, beta1, beta2, eps, weight_decay } = *config;
    let CudaMoments { exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, maps } = moments;
    let (m, v) = (exp_avg.as_mut_ptr::<u8>(), exp_avg_sq.as_mut_ptr::<u8>());
    let (m_absmax, v_absmax) = (exp_avg_absmax.as_mut_ptr::<f32>(), exp_avg_sq_absmax.as_mut_ptr::<f32>());
    let [signed, unsigned] = maps.each_ref().map(|map| map.as_ptr::<f32>());
    // SAFETY: two live vectors of `len` elements, codes of as many, a scale for each block of 256, maps of 256 values.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_adamw_8bit(
            param,
            grad,
            m,
            v,
            m_absmax,
            v_absmax,
            signed,
            unsigned,
            len as i64,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            step,
            grad_scale,
            stream,
        )
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
