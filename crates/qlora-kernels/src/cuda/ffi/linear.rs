//! Weights to and from their stored forms, and the adapters' part of a product.

use std::ffi::c_int;

use super::structs::{Bits4, DeviceLimits, Members};
use super::{Ptr, PtrMut, Stream};

unsafe extern "C" {
    pub(in crate::cuda) fn qlora_fp8_rows(
        dtype: c_int,
        x: Ptr,
        ldx: i64,
        out: *mut u8,
        scale: *mut f32,
        rows: i64,
        cols: i64,
        early: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_fp8_4bit_rows(
        weight: *const Bits4,
        out: *mut u8,
        scale: *mut f32,
        early: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_fp8_4bit_most(weight: *const Bits4, most: *mut f32, stream: Stream) -> c_int;
    pub(in crate::cuda) fn qlora_fp8_4bit_columns(
        weight: *const Bits4,
        most0: *const f32,
        most1: *const f32,
        most2: *const f32,
        out: *mut u8,
        ldo: i64,
        scale: *mut f32,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_fp8_columns(
        dtype: c_int,
        x: Ptr,
        ldx: i64,
        absmax: *mut f32,
        out: *mut u8,
        scale: *mut f32,
        rows: i64,
        cols: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_int8_activations(
        dtype: c_int,
        x: Ptr,
        ldx: i64,
        threshold: f32,
        exact: *const u32,
        exact_count: i64,
        flags: *mut u8,
        out: PtrMut,
        ldo: i64,
        tokens: i64,
        width: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_dequantize_4bit(
        out_dtype: c_int,
        codes: *const u8,
        absmax: *const f32,
        absmax_codes: *const u8,
        nested_map: *const f32,
        nested_absmax: *const f32,
        nested_offset: f32,
        quant_type: c_int,
        blocksize: i64,
        nested_blocksize: i64,
        out: PtrMut,
        ldo: i64,
        first_row: i64,
        rows: i64,
        cols: i64,
        early: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_dequantize_int(
        out_dtype: c_int,
        bits: c_int,
        is_signed: c_int,
        codes: *const u8,
        scale: *const f32,
        zero: *const f32,
        groups: i64,
        group_size: i64,
        group_of: *const u16,
        outlier_cols: *const u32,
        outliers: Ptr,
        outlier_count: i64,
        out: PtrMut,
        ldo: i64,
        first_row: i64,
        rows: i64,
        cols: i64,
        early: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_quantize_4bit(
        in_dtype: c_int,
        input: Ptr,
        n: i64,
        quant_type: c_int,
        blocksize: i64,
        codes: *mut u8,
        absmax: *mut f32,
        first_bad: *mut u64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_lora_prepare(
        dtype: c_int,
        flat: *const f32,
        members: Members,
        w: PtrMut,
        ldw: i64,
        n: i64,
        k: i64,
        rp: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_lora_columns(
        dtype: c_int,
        flat: *const f32,
        members: Members,
        b: PtrMut,
        ldb: i64,
        n: i64,
        rp: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_lora_accumulate(
        da: *const f32,
        db: *const f32,
        members: Members,
        gradient: *mut f32,
        n: i64,
        k: i64,
        rp: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_lora_ds_db_workspace(tokens: i64, n: i64, rp: i64, limits: *const DeviceLimits)
    -> i64;
    pub(in crate::cuda) fn qlora_lora_ds_db(
        dtype: c_int,
        dy: Ptr,
        ld_dy: i64,
        bs: Ptr,
        ld_bs: i64,
        s: Ptr,
        ld_s: i64,
        ds: PtrMut,
        ld_ds: i64,
        db: *mut f32,
        workspace: *mut f32,
        tokens: i64,
        n: i64,
        rp: i64,
        limits: *const DeviceLimits,
        stream: Stream,
    ) -> c_int;
}
