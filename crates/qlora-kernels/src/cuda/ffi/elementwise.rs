//! Operations that pass over their operands once.

use std::ffi::c_int;

use super::{Ptr, PtrMut, Stream};

unsafe extern "C" {
    pub(in crate::cuda) fn qlora_rms_norm_forward(
        dtype: c_int,
        x: PtrMut,
        ldx: i64,
        delta: Ptr,
        ld_delta: i64,
        weight: *const f32,
        eps: f32,
        y: PtrMut,
        ldy: i64,
        rstd: *mut f32,
        rows: i64,
        width: i64,
        groups: i64,
        early: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_rms_norm_backward(
        dtype: c_int,
        x: Ptr,
        ldx: i64,
        weight: *const f32,
        rstd: *const f32,
        dy: Ptr,
        lddy: i64,
        dx: PtrMut,
        lddx: i64,
        accumulate: c_int,
        rows: i64,
        width: i64,
        groups: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_rope(
        dtype: c_int,
        x: PtrMut,
        ldx: i64,
        cos: *const f32,
        sin: *const f32,
        positions: *const u32,
        tokens: i64,
        heads: i64,
        head_dim: i64,
        transposed: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_swiglu_forward(
        dtype: c_int,
        gate: Ptr,
        ldg: i64,
        up: Ptr,
        ldu: i64,
        h: PtrMut,
        ldh: i64,
        rows: i64,
        cols: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_swiglu_backward(
        dtype: c_int,
        gate: PtrMut,
        ldg: i64,
        up: PtrMut,
        ldu: i64,
        dh: Ptr,
        lddh: i64,
        h: PtrMut,
        ldh: i64,
        rows: i64,
        cols: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_embedding(
        table_dtype: c_int,
        table: Ptr,
        ids: *const u32,
        out_dtype: c_int,
        out: PtrMut,
        ldo: i64,
        tokens: i64,
        width: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_dropout(
        dtype: c_int,
        add: c_int,
        x: Ptr,
        ldx: i64,
        y: PtrMut,
        ldy: i64,
        rows: i64,
        cols: i64,
        first_row: i64,
        key: u64,
        threshold: u32,
        scale: f32,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_cast(
        in_dtype: c_int,
        input: Ptr,
        ldi: i64,
        out_dtype: c_int,
        out: PtrMut,
        ldo: i64,
        rows: i64,
        cols: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_add(
        dtype: c_int,
        x: Ptr,
        ldx: i64,
        y: PtrMut,
        ldy: i64,
        rows: i64,
        cols: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_add_bias(
        dtype: c_int,
        y: PtrMut,
        ldy: i64,
        bias: *const f32,
        rows: i64,
        cols: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_scale(
        dtype: c_int,
        y: PtrMut,
        ldy: i64,
        rows: i64,
        cols: i64,
        factor: f32,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_fill(
        dtype: c_int,
        y: PtrMut,
        ldy: i64,
        rows: i64,
        cols: i64,
        value: f32,
        stream: Stream,
    ) -> c_int;
}
