//! The launchers of `kernels/*.cu`: plain C functions that enqueue on a stream and return a `cudaError_t`.
//!
//! Element types are passed as in `common.cuh`: 0 f32, 1 bf16, 2 f16. Sizes and strides count elements.

use std::ffi::{c_int, c_void};

/// `CUstream` and `cudaStream_t` are the same pointer.
/// A `cudaGraphExec_t`.
pub(super) type GraphExec = *mut std::ffi::c_void;
pub(super) type Stream = *mut c_void;
type Ptr = *const c_void;
type PtrMut = *mut c_void;

/// One adapted projection of a fused weight; `QloraMember` in `lora.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Member {
    pub(super) a: i64,
    pub(super) b: i64,
    pub(super) row0: i64,
    pub(super) rows: i64,
    pub(super) rank: i32,
    pub(super) r0: i32,
    pub(super) scale: f32,
    pub(super) pad: i32,
}

/// `QloraMembers` in `lora.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Members {
    pub(super) m: [Member; 3],
    pub(super) count: i32,
    pub(super) pad: i32,
}

/// One weight of a group over a few tokens; `QloraFewMember` in `few_tokens.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct FewMember {
    pub(super) codes: *const u8,
    pub(super) absmax: *const f32,
    pub(super) absmax_codes: *const u8,
    pub(super) nested_map: *const f32,
    pub(super) nested_absmax: *const f32,
    pub(super) bias: Ptr,
    pub(super) lora_b: *const f32,
    pub(super) rows: i64,
    pub(super) nested_offset: f32,
    pub(super) scale: f32,
    pub(super) rank: i32,
    pub(super) r0: i32,
}

impl Default for FewMember {
    fn default() -> Self {
        let (bytes, floats) = (std::ptr::null(), std::ptr::null());
        Self {
            codes: bytes,
            absmax: floats,
            absmax_codes: bytes,
            nested_map: floats,
            nested_absmax: floats,
            bias: std::ptr::null(),
            lora_b: floats,
            rows: 0,
            nested_offset: 0.0,
            scale: 0.0,
            rank: 0,
            r0: 0,
        }
    }
}

/// `QloraFewWeights` in `few_tokens.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FewWeights {
    pub(super) m: [FewMember; 3],
    pub(super) k: i64,
    pub(super) blocksize: i64,
    pub(super) nested_blocksize: i64,
    pub(super) count: i32,
    pub(super) quant_type: i32,
}

/// `QloraShrink` in `lora_shrink_few.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Shrink {
    pub(super) a: [*const f32; 3],
    pub(super) rank: [i32; 3],
    pub(super) r0: [i32; 3],
    pub(super) count: i32,
    pub(super) pad: i32,
}

impl Default for Shrink {
    fn default() -> Self {
        Self { a: [std::ptr::null(); 3], rank: [0; 3], r0: [0; 3], count: 0, pad: 0 }
    }
}

/// What an adapter does to one layer; `QloraRowsChange` in `adapter_rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct RowsChange {
    pub(super) a: *const f32,
    pub(super) b: *const f32,
    pub(super) gain: *const f32,
    pub(super) bias: *const f32,
    pub(super) scale: f32,
    pub(super) rank: i32,
    pub(super) r0: i32,
    pub(super) pad: i32,
}

impl Default for RowsChange {
    fn default() -> Self {
        let null = std::ptr::null();
        Self { a: null, b: null, gain: null, bias: null, scale: 0.0, rank: 0, r0: 0, pad: 0 }
    }
}

/// `QloraRowsSpan` in `adapter_rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RowsSpan {
    pub(super) m: [RowsChange; 3],
    pub(super) row0: i64,
    pub(super) rows: i64,
    pub(super) columns: i32,
    pub(super) pad: i32,
}

/// `QloraRowsSpans` in `adapter_rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RowsSpans {
    pub(super) s: [RowsSpan; 16],
    pub(super) count: i32,
    pub(super) layers: i32,
    pub(super) cols: [i64; 3],
}

/// [`qlora_nf4_gemv`] and [`qlora_nf4_small_gemm`], which take the same arguments.
pub(super) type FewProduct = unsafe extern "C" fn(
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
    stream: Stream,
) -> c_int;

unsafe extern "C" {
    pub(super) fn qlora_rows_shrink(
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
    pub(super) fn qlora_rows_finish(
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
    pub(super) fn qlora_adapter_embedding(
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
    pub(super) fn qlora_head_tokens(
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
    pub(super) fn qlora_int8_activations(
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
    pub(super) fn qlora_argmax(
        dtype: c_int,
        x: Ptr,
        ldx: i64,
        rows: i64,
        cols: i64,
        out: *mut u32,
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_nf4_gemv_workspace(rows: i64, k: i64, tokens: i64) -> i64;
    pub(super) fn qlora_nf4_gemv(
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
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_nf4_gemv16(
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
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_few_tokens_most() -> i64;
    pub(super) fn qlora_nf4_small_gemm_workspace(weights: FewWeights, tokens: i64, swiglu: c_int) -> i64;
    pub(super) fn qlora_nf4_small_gemm(
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
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_lora_shrink_few(
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
    pub(super) fn qlora_norm_shrink_few(
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
    pub(super) fn qlora_bf16_gemv(
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
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_decode_attention_workspace(
        sequences: i64,
        queries: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        capacity: i64,
    ) -> i64;
    pub(super) fn qlora_decode_attention(
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
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_decode_rope_append(
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
    pub(super) fn qlora_rms_norm_forward(
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
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_rms_norm_backward(
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
    pub(super) fn qlora_rope(
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
    pub(super) fn qlora_swiglu_forward(
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
    pub(super) fn qlora_swiglu_backward(
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
    pub(super) fn qlora_embedding(
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
    pub(super) fn qlora_dropout(
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
    pub(super) fn qlora_dequantize_4bit(
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
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_dequantize_int(
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
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_quantize_4bit(
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
    pub(super) fn qlora_cross_entropy(
        dtype: c_int,
        logits: PtrMut,
        ld: i64,
        targets: *const i64,
        losses: *mut f32,
        rows: i64,
        vocab: i64,
        grad_scale: f32,
        write_grad: c_int,
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_sum_f32(input: *const f32, n: i64, out: *mut f64, stream: Stream) -> c_int;
    pub(super) fn qlora_grad_norm(grad: *const f32, n: i64, partial: *mut f64, out: *mut f64, stream: Stream) -> c_int;
    pub(super) fn qlora_first_non_finite(grad: *const f32, n: i64, out: *mut u64, stream: Stream) -> c_int;
    pub(super) fn qlora_adamw(
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
    pub(super) fn qlora_adamw_8bit(
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
    pub(super) fn qlora_lora_prepare(
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
    pub(super) fn qlora_lora_accumulate(
        da: *const f32,
        db: *const f32,
        members: Members,
        gradient: *mut f32,
        n: i64,
        k: i64,
        rp: i64,
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_lora_ds_db_workspace(tokens: i64, n: i64, rp: i64) -> i64;
    pub(super) fn qlora_lora_ds_db(
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
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_cast(
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
    pub(super) fn qlora_add(
        dtype: c_int,
        x: Ptr,
        ldx: i64,
        y: PtrMut,
        ldy: i64,
        rows: i64,
        cols: i64,
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_add_bias(
        dtype: c_int,
        y: PtrMut,
        ldy: i64,
        bias: *const f32,
        rows: i64,
        cols: i64,
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_graph_begin(stream: Stream) -> c_int;
    pub(super) fn qlora_graph_end(stream: Stream, keep: c_int, exec: *mut GraphExec) -> c_int;
    pub(super) fn qlora_graph_launch(exec: GraphExec, stream: Stream) -> c_int;
    pub(super) fn qlora_graph_destroy(exec: GraphExec) -> c_int;
    pub(super) fn qlora_fill(
        dtype: c_int,
        y: PtrMut,
        ldy: i64,
        rows: i64,
        cols: i64,
        value: f32,
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_attention_forward(
        dtype: c_int,
        q: Ptr,
        ldq: i64,
        k: Ptr,
        ldk: i64,
        v: Ptr,
        ldv: i64,
        o: PtrMut,
        ldo: i64,
        lse: *mut f32,
        cu_q: *const i32,
        cu_k: *const i32,
        nseq: i64,
        max_q: i64,
        tokens_q: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        scale: f32,
        window: i64,
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_attention_forward_simple(
        dtype: c_int,
        q: Ptr,
        ldq: i64,
        k: Ptr,
        ldk: i64,
        v: Ptr,
        ldv: i64,
        o: PtrMut,
        ldo: i64,
        lse: *mut f32,
        cu_q: *const i32,
        cu_k: *const i32,
        nseq: i64,
        max_q: i64,
        tokens_q: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        scale: f32,
        window: i64,
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_attention_backward_workspace(
        tokens: i64,
        heads: i64,
        head_dim: i64,
        deterministic: c_int,
    ) -> i64;
    pub(super) fn qlora_attention_backward(
        dtype: c_int,
        q: Ptr,
        ldq: i64,
        k: Ptr,
        ldk: i64,
        v: Ptr,
        ldv: i64,
        o: Ptr,
        ldo: i64,
        lse: *const f32,
        dout: Ptr,
        lddo: i64,
        dq: PtrMut,
        lddq: i64,
        dk: PtrMut,
        lddk: i64,
        dv: PtrMut,
        lddv: i64,
        workspace: PtrMut,
        cu: *const i32,
        nseq: i64,
        max_len: i64,
        tokens: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        scale: f32,
        window: i64,
        deterministic: c_int,
        stream: Stream,
    ) -> c_int;
    pub(super) fn qlora_attention_backward_simple(
        dtype: c_int,
        q: Ptr,
        ldq: i64,
        k: Ptr,
        ldk: i64,
        v: Ptr,
        ldv: i64,
        o: Ptr,
        ldo: i64,
        lse: *const f32,
        dout: Ptr,
        lddo: i64,
        dq: PtrMut,
        lddq: i64,
        dk: PtrMut,
        lddk: i64,
        dv: PtrMut,
        lddv: i64,
        workspace: PtrMut,
        cu: *const i32,
        nseq: i64,
        max_len: i64,
        tokens: i64,
        heads: i64,
        kv_heads: i64,
        head_dim: i64,
        scale: f32,
        window: i64,
        deterministic: c_int,
        stream: Stream,
    ) -> c_int;
}
