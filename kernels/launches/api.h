// The launchers that launches.cpp calls and their arguments, as the .cu files and their headers declare them (those are for
// nvcc alone).
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

extern "C" {
typedef struct {
    int32_t shared_per_block;            // bytes that a block may have, static and dynamic together
    int32_t shared_per_multiprocessor;   // bytes that its blocks share
    int32_t multiprocessors;
    int32_t bf16;                        // whether the tensor cores take it
    int32_t wgmma;                       // whether Hopper's instructions are there and compiled in
} QloraLimits;

// One weight of a group that shares its input. Either absmax is set, or the four nested fields are.
typedef struct {
    const uint8_t* codes;
    const float* absmax;
    const uint8_t* absmax_codes;
    const float* nested_map;
    const float* nested_absmax;
    const void* bias;    // [rows] of the activations' type, or NULL
    const float* lora_b; // [rows, rank] f32, or NULL
    int64_t rows;
    float nested_offset;
    float scale;         // of the adapter
    int32_t rank, r0;    // the adapter's columns of S
} QloraFewMember;

typedef struct {
    QloraFewMember m[3];
    int64_t k, blocksize, nested_blocksize;
    int32_t count, quant_type;
} QloraFewWeights;

int qlora_attention_forward(int dtype, const void* q, int64_t ldq, const void* k, int64_t ldk, const void* v,
    int64_t ldv, void* o, int64_t ldo, float* lse, const int32_t* cu_q, const int32_t* cu_k, int64_t nseq, int64_t
    max_q, int64_t tokens_q, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, int64_t window, const
    QloraLimits* limits, cudaStream_t stream);
int qlora_attention_backward(int dtype, const void* q, int64_t ldq, const void* k, int64_t ldk, const void* v,
    int64_t ldv, const void* o, int64_t ldo, const float* lse, const void* dout, int64_t lddo, void* dq, int64_t
    lddq, void* dk, int64_t lddk, void* dv, int64_t lddv, void* workspace, const int32_t* cu, int64_t nseq, int64_t
    max_len, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, int64_t window, int
    deterministic, const QloraLimits* limits, cudaStream_t stream);
int qlora_cross_entropy(int dtype, void* logits, int64_t ld, const int64_t* targets, float* losses, int64_t rows,
    int64_t vocab, float grad_scale, const float* grad_scales, int write_grad, const QloraLimits* limits, cudaStream_t stream);
int64_t qlora_lora_ds_db_workspace(int64_t tokens, int64_t n, int64_t rp, const QloraLimits* limits);
int qlora_lora_ds_db(int dtype, const void* dy, int64_t ld_dy, const void* bs, int64_t ld_bs, const void* s, int64_t
    ld_s, void* ds, int64_t ld_ds, float* db, float* workspace, int64_t tokens, int64_t n, int64_t rp, const
    QloraLimits* limits, cudaStream_t stream);
int64_t qlora_few_tokens_most(const QloraLimits* limits);
int64_t qlora_nf4_gemv_workspace(int64_t rows, int64_t k, int64_t tokens, const QloraLimits* limits);
int qlora_nf4_gemv(int dtype, QloraFewWeights weights, const void* x, int64_t ldx, const float* s, int64_t lds,
    const void* residual, int64_t ldr, void* y, int64_t ldy, int64_t tokens, int swiglu, int early, void* workspace,
    const QloraLimits* limits, cudaStream_t stream);
int qlora_nf4_gemv16(int dtype, QloraFewWeights weights, const void* x, int64_t ldx, const float* s, int64_t lds,
    const void* residual, int64_t ldr, void* y, int64_t ldy, int64_t tokens, int swiglu, int early, void*, const
    QloraLimits* limits, cudaStream_t stream);
int64_t qlora_nf4_small_gemm_workspace(QloraFewWeights weights, int64_t tokens, int swiglu, const QloraLimits*
    limits);
int qlora_nf4_small_gemm(int dtype, QloraFewWeights weights, const void* x, int64_t ldx, const float* s, int64_t
    lds, const void* residual, int64_t ldr, void* y, int64_t ldy, int64_t tokens, int swiglu, int early, void*
    workspace, const QloraLimits* limits, cudaStream_t stream);
int qlora_bf16_gemv(int dtype, const void* w, int64_t ldw, const void* x, int64_t ldx, int y_dtype, void* y, int64_t
    ldy, int64_t tokens, int64_t rows, int64_t k, int early, const QloraLimits* limits, cudaStream_t stream);
int64_t qlora_decode_attention_workspace(int64_t sequences, int64_t queries, int64_t heads, int64_t kv_heads,
    int64_t head_dim, int64_t capacity, const QloraLimits* limits);
int qlora_decode_attention(int dtype, const void* q, int64_t ldq, const void* const* keys, const void* const*
    values, int64_t ldk, const uint32_t* positions, void* o, int64_t ldo, int64_t sequences, int64_t queries,
    int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t capacity, float scale, int64_t window, int early,
    void* workspace, const QloraLimits* limits, cudaStream_t stream);
int qlora_rms_norm_forward(int dtype, void* x, int64_t ldx, const void* delta, int64_t ld_delta, const float*
    weight, float eps, void* y, int64_t ldy, float* rstd, int64_t rows, int64_t width, int64_t groups, int early,
    cudaStream_t stream);
int qlora_dequantize_4bit(int out_dtype, const uint8_t* codes, const float* absmax, const uint8_t* absmax_codes,
    const float* nested_map, const float* nested_absmax, float nested_offset, int quant_type, int64_t blocksize,
    int64_t nested_blocksize, void* out, int64_t ldo, int64_t first_row, int64_t rows, int64_t cols, int early,
    cudaStream_t stream);
}
