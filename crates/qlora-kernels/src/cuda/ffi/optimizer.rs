//! The loss, the gradient's norm and the optimizer's step.

use std::ffi::c_int;

use super::structs::DeviceLimits;
use super::{PtrMut, Stream};

unsafe extern "C" {
    pub(in crate::cuda) fn qlora_cross_entropy(
        dtype: c_int,
        logits: PtrMut,
        ld: i64,
        targets: *const i64,
        losses: *mut f32,
        rows: i64,
        vocab: i64,
        grad_scale: f32,
        grad_scales: *const f32,
        write_grad: c_int,
        limits: *const DeviceLimits,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_sum_f32(input: *const f32, n: i64, out: *mut f64, stream: Stream) -> c_int;
    pub(in crate::cuda) fn qlora_grad_norm(
        grad: *const f32,
        n: i64,
        partial: *mut f64,
        out: *mut f64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_first_non_finite(grad: *const f32, n: i64, out: *mut u64, stream: Stream) -> c_int;
    pub(in crate::cuda) fn qlora_adamw(
        param: *mut f32,
        grad: *const f32,
        m: *mut f32,
        v: *mut f32,
        n: i64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
        step: u64,
        grad_scale: f32,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_adamw_8bit(
        param: *mut f32,
        grad: *const f32,
        m: *mut u8,
        v: *mut u8,
        m_absmax: *mut f32,
        v_absmax: *mut f32,
        map_signed: *const f32,
        map_unsigned: *const f32,
        n: i64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
        step: u64,
        grad_scale: f32,
        stream: Stream,
    ) -> c_int;
}
