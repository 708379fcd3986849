//! Generation: products of a few tokens, the decode step, adapters of rows, graphs.

use std::ffi::c_int;

use super::structs::{DeviceLimits, FewWeights, RowsSpans, Shrink};
use super::{GraphExec, Ptr, PtrMut, Stream};

unsafe extern "C" {
    pub(in crate::cuda) fn qlora_rows_shrink(
        dtype: c_int,
        spans: *const RowsSpans,
        x: Ptr,
        ldx: i64,
        s: *mut f32,
        lds: i64,
        k: i64,
        early: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_rows_finish(
        dtype: c_int,
        spans: *const RowsSpans,
        s: *const f32,
        lds: i64,
        residual: Ptr,
        ldr: i64,
        y: PtrMut,
        ldy: i64,
        early: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_adapter_embedding(
        dtype: c_int,
        x: PtrMut,
        ldx: i64,
        ids: *const u32,
        own: *const i64,
        values: *const f32,
        a: *const f32,
        b: *const f32,
        gain: *const f32,
        rank: i64,
        vocabulary: i64,
        scale: f32,
        rows: i64,
        width: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_head_tokens(
        dtype: c_int,
        hidden: Ptr,
        ldh: i64,
        values: *const f32,
        ids: *const u32,
        own: *const i64,
        count: i64,
        logits_dtype: c_int,
        logits: PtrMut,
        ldl: i64,
        rows: i64,
        width: i64,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_argmax(
        dtype: c_int,
        x: Ptr,
        ldx: i64,
        rows: i64,
        cols: i64,
        out: *mut u32,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_nf4_gemv_workspace(rows: i64, k: i64, tokens: i64, limits: *const DeviceLimits)
    -> i64;
    pub(in crate::cuda) fn qlora_nf4_gemv(
        dtype: c_int,
        weights: FewWeights,
        x: Ptr,
        ldx: i64,
        s: *const f32,
        lds: i64,
        residual: Ptr,
        ldr: i64,
        y: PtrMut,
        ldy: i64,
        tokens: i64,
        swiglu: c_int,
        early: c_int,
        workspace: PtrMut,
        limits: *const DeviceLimits,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_nf4_gemv16(
        dtype: c_int,
        weights: FewWeights,
        x: Ptr,
        ldx: i64,
        s: *const f32,
        lds: i64,
        residual: Ptr,
        ldr: i64,
        y: PtrMut,
        ldy: i64,
        tokens: i64,
        swiglu: c_int,
        early: c_int,
        workspace: PtrMut,
        limits: *const DeviceLimits,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_few_tokens_most(limits: *const DeviceLimits) -> i64;
    pub(in crate::cuda) fn qlora_nf4_small_gemm_workspace(
        weights: FewWeights,
        tokens: i64,
        swiglu: c_int,
        limits: *const DeviceLimits,
    ) -> i64;
    pub(in crate::cuda) fn qlora_nf4_small_gemm(
        dtype: c_int,
        weights: FewWeights,
        x: Ptr,
        ldx: i64,
        s: *const f32,
        lds: i64,
        residual: Ptr,
        ldr: i64,
        y: PtrMut,
        ldy: i64,
        tokens: i64,
        swiglu: c_int,
        early: c_int,
        workspace: PtrMut,
        limits: *const DeviceLimits,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_lora_shrink_few(
        dtype: c_int,
        x: Ptr,
        ldx: i64,
        adapters: Shrink,
        s: *mut f32,
        lds: i64,
        columns: i64,
        tokens: i64,
        k: i64,
        early: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_norm_shrink_few(
        dtype: c_int,
        x: Ptr,
        ldx: i64,
        weight: *const f32,
        eps: f32,
        y: PtrMut,
        ldy: i64,
        adapters: Shrink,
        s: *mut f32,
        lds: i64,
        columns: i64,
        tokens: i64,
        k: i64,
        early: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_bf16_gemv(
        dtype: c_int,
        w: Ptr,
        ldw: i64,
        x: Ptr,
        ldx: i64,
        y_dtype: c_int,
        y: PtrMut,
        ldy: i64,
        tokens: i64,
        rows: i64,
        k: i64,
        early: c_int,
        limits: *const DeviceLimits,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_decode_attention_workspace(
        sequences: i64,
        queries: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        capacity: i64,
        limits: *const DeviceLimits,
    ) -> i64;
    pub(in crate::cuda) fn qlora_decode_attention(
        dtype: c_int,
        q: Ptr,
        ldq: i64,
        keys: *const Ptr,
        values: *const Ptr,
        ldk: i64,
        positions: *const u32,
        o: PtrMut,
        ldo: i64,
        sequences: i64,
        queries: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        capacity: i64,
        scale: f32,
        window: i64,
        early: c_int,
        workspace: PtrMut,
        limits: *const DeviceLimits,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_decode_rope_append(
        dtype: c_int,
        qkv: PtrMut,
        ld: i64,
        cos: *const f32,
        sin: *const f32,
        positions: *const u32,
        keys: *const PtrMut,
        values: *const PtrMut,
        ldk: i64,
        sequences: i64,
        queries: i64,
        capacity: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        early: c_int,
        stream: Stream,
    ) -> c_int;
    pub(in crate::cuda) fn qlora_probe(out: *mut u32, stream: Stream) -> c_int;
    pub(in crate::cuda) fn qlora_graph_begin(stream: Stream) -> c_int;
    pub(in crate::cuda) fn qlora_graph_end(stream: Stream, keep: c_int, exec: *mut GraphExec) -> c_int;
    pub(in crate::cuda) fn qlora_graph_launch(exec: GraphExec, stream: Stream) -> c_int;
    pub(in crate::cuda) fn qlora_graph_destroy(exec: GraphExec) -> c_int;
}
