// Attention forward and backward on the CUDA cores: f32, and bf16 or f16 with any head size up to 256.
//
// Formulas, shapes, layouts and masks as in attention_forward.cu and attention_backward.cu; f32 sums; no atomics, the
// same bits each run; no score matrix in memory. Made to be right where the tensor kernels do not apply, not to be
// fast: the floor is 4 (forward) and 10 (backward) FLOP a visible pair, head and column; this takes 4 and 20, with the
// operands from the caches.
//
// One warp owns a row: a query and its head (forward, dq), or a key and its kv head (dk, dv). It takes 32 counterparts
// at a time: each lane computes whole dot products for one of them, then all lanes go over the 32 with the columns
// spread over the lanes.

#include "common.cuh"
#include "device.cuh"

namespace attention_simple {

constexpr int WARPS = 4;
constexpr int MAX_D = 256;
constexpr int COLUMNS = MAX_D / 32; // of a lane

struct Problem {
    const int32_t *cu_q, *cu_k;
    int sequences, heads, kv_heads, head_dim, window;
    int64_t tokens_q, tokens_k;
    float scale;
};

// The sequence of packed row t: the last s with cu[s] <= t.
__device__ __forceinline__ int sequence_of(const int32_t* cu, int sequences, int64_t t) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (cu[middle] <= t) low = middle;
        else high = middle - 1;
    }
    return low;
}

template <typename T> __device__ __forceinline__ float dot(const float* x, const T* y, int n) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum = fmaf(x[i], to_float(y[i]), sum);
    return sum;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

template <typename T> __global__ void forward_kernel(Problem p, const T* q, int64_t ldq, const T* k, int64_t ldk,
                                                     const T* v, int64_t ldv, T* o, int64_t ldo, float* lse) {
    __shared__ float row[WARPS][MAX_D];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = p.head_dim;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
    if (index >= p.tokens_q * p.heads) return;
    const int64_t t = index / p.heads;
    const int head = static_cast<int>(index % p.heads), kv_head = head / (p.heads / p.kv_heads);
    const int s = sequence_of(p.cu_q, p.sequences, t);
    const int64_t shift = (p.cu_k[s + 1] - p.cu_k[s]) - (p.cu_q[s + 1] - p.cu_q[s]);
    const int64_t seen = t - p.cu_q[s] + shift; // the last visible key of the sequence
    const int64_t first = p.window > 0 ? max(static_cast<int64_t>(0), seen - p.window + 1) : 0;

    for (int i = lane; i < n; i += 32) row[warp][i] = to_float(q[t * ldq + head * n + i]);
    __syncwarp();
    float out[COLUMNS] = {};
    float top = -INFINITY, sum = 0.0f;
    for (int64_t j0 = first; j0 <= seen; j0 += 32) {
        const int count = static_cast<int>(min(static_cast<int64_t>(32), seen - j0 + 1));
        const int64_t u = p.cu_k[s] + j0;
        const float x = lane < count ? p.scale * dot(row[warp], k + (u + lane) * ldk + kv_head * n, n) : -INFINITY;
        const float high = fmaxf(top, warp_max(x));
        const float base = high == -INFINITY ? 0.0f : high;
        const float fix = expf(top - base), e = expf(x - base);
        top = high;
        sum = sum * fix + warp_sum(e);
        for (int c = 0; c < COLUMNS; c++) out[c] *= fix;
        for (int j = 0; j < count; j++) {
            const float w = __shfl_sync(0xffffffffu, e, j);
            const T* from = v + (u + j) * ldv + kv_head * n;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                if (c * 32 + lane < n) out[c] = fmaf(w, to_float(from[c * 32 + lane]), out[c]);
        }
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
        if (c * 32 + lane < n) o[t * ldo + head * n + c * 32 + lane] = from_float<T>(out[c] * inverse);
    if (lane == 0) lse[index] = sum == 0.0f ? -INFINITY : top + logf(sum);
}

// D = rowsum(do o) into row_d [tokens][heads], and dq.
template <typename T> __global__ void query_kernel(Problem p, const T* q, int64_t ldq, const T* k, int64_t ldk,
                                                   const T* v, int64_t ldv, const T* o, int64_t ldo, const float* lse,
                                                   const T* dout, int64_t lddo, T* dq, int64_t lddq, float* row_d) {
    __shared__ float row[WARPS][MAX_D], drow[WARPS][MAX_D];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = p.head_dim;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
    if (index >= p.tokens_q * p.heads) return;
    const int64_t t = index / p.heads;
    const int head = static_cast<int>(index % p.heads), kv_head = head / (p.heads / p.kv_heads);
    const int64_t begin = p.cu_q[sequence_of(p.cu_q, p.sequences, t)];
    const int64_t first = p.window > 0 ? max(begin, t - p.window + 1) : begin;

    float d = 0.0f;
    for (int i = lane; i < n; i += 32) {
        row[warp][i] = to_float(q[t * ldq + head * n + i]);
        drow[warp][i] = to_float(dout[t * lddo + head * n + i]);
        d = fmaf(drow[warp][i], to_float(o[t * ldo + head * n + i]), d);
    }
    __syncwarp();
    d = warp_sum(d);
    if (lane == 0) row_d[index] = d;
    float out[COLUMNS] = {};
    for (int64_t u0 = first; u0 <= t; u0 += 32) {
        const int count = static_cast<int>(min(static_cast<int64_t>(32), t - u0 + 1));
        float ds = 0.0f;
        if (lane < count) {
            const float w = expf(p.scale * dot(row[warp], k + (u0 + lane) * ldk + kv_head * n, n) - lse[index]);
            ds = w * (dot(drow[warp], v + (u0 + lane) * ldv + kv_head * n, n) - d);
        }
        for (int j = 0; j < count; j++) {
            const float w = __shfl_sync(0xffffffffu, ds, j);
            const T* from = k + (u0 + j) * ldk + kv_head * n;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                if (c * 32 + lane < n) out[c] = fmaf(w, to_float(from[c * 32 + lane]), out[c]);
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
        if (c * 32 + lane < n) dq[t * lddq + head * n + c * 32 + lane] = from_float<T>(out[c] * p.scale);
}

template <typename T> __global__ void key_kernel(Problem p, const T* q, int64_t ldq, const T* k, int64_t ldk,
                                                 const T* v, int64_t ldv, const float* lse, const T* dout, int64_t lddo,
                                                 T* dk, int64_t lddk, T* dv, int64_t lddv, const float* row_d) {
    __shared__ float row[WARPS][MAX_D], vrow[WARPS][MAX_D];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = p.head_dim;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
    if (index >= p.tokens_k * p.kv_heads) return;
    const int64_t u = index / p.kv_heads;
    const int kv_head = static_cast<int>(index % p.kv_heads), group = p.heads / p.kv_heads;
    int64_t end = p.cu_k[sequence_of(p.cu_k, p.sequences, u) + 1];
    if (p.window > 0) end = min(end, u + p.window);

    for (int i = lane; i < n; i += 32) {
        row[warp][i] = to_float(k[u * ldk + kv_head * n + i]);
        vrow[warp][i] = to_float(v[u * ldv + kv_head * n + i]);
    }
    __syncwarp();
    float sum_k[COLUMNS] = {}, sum_v[COLUMNS] = {};
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t t0 = u; t0 < end; t0 += 32) {
            const int count = static_cast<int>(min(static_cast<int64_t>(32), end - t0));
            float w = 0.0f, ds = 0.0f;
            if (lane < count) {
                const int64_t t = t0 + lane;
                w = expf(p.scale * dot(row[warp], q + t * ldq + head * n, n) - lse[t * p.heads + head]);
                ds = w * (dot(vrow[warp], dout + t * lddo + head * n, n) - row_d[t * p.heads + head]);
            }
            for (int j = 0; j < count; j++) {
                const float wj = __shfl_sync(0xffffffffu, w, j), dsj = __shfl_sync(0xffffffffu, ds, j);
                const T *from_q = q + (t0 + j) * ldq + head * n, *from_do = dout + (t0 + j) * lddo + head * n;
#pragma unroll
                for (int c = 0; c < COLUMNS; c++)
                    if (c * 32 + lane < n) {
                        sum_k[c] = fmaf(dsj, to_float(from_q[c * 32 + lane]), sum_k[c]);
                        sum_v[c] = fmaf(wj, to_float(from_do[c * 32 + lane]), sum_v[c]);
                    }
            }
        }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
        if (c * 32 + lane < n) {
            dk[u * lddk + kv_head * n + c * 32 + lane] = from_float<T>(sum_k[c] * p.scale);
            dv[u * lddv + kv_head * n + c * 32 + lane] = from_float<T>(sum_v[c]);
        }
}

inline bool make_problem(Problem& p, const int32_t* cu_q, const int32_t* cu_k, int64_t nseq, int64_t tokens_q,
                         int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, int64_t window) {
    if (heads <= 0 || kv_heads <= 0 || heads % kv_heads != 0 || heads > 1 << 16 || head_dim <= 0 || head_dim > MAX_D ||
        nseq < 0 || nseq > INT32_MAX || tokens_q < 0 || tokens_q > INT32_MAX || window < 0 ||
        tokens_q * heads / WARPS >= INT32_MAX)
        return false;
    p.cu_q = cu_q;
    p.cu_k = cu_k;
    p.sequences = static_cast<int>(nseq);
    p.heads = static_cast<int>(heads);
    p.kv_heads = static_cast<int>(kv_heads);
    p.head_dim = static_cast<int>(head_dim);
    p.window = window > INT32_MAX / 2 ? 0 : static_cast<int>(window); // longer than any sequence: none
    p.tokens_q = p.tokens_k = tokens_q;
    p.scale = scale;
    return true;
}

inline unsigned blocks_for(int64_t rows) { return static_cast<unsigned>((rows + WARPS - 1) / WARPS); }

} // namespace attention_simple

extern "C" int qlora_attention_forward_simple(int dtype, const void* q, int64_t ldq, const void* k, int64_t ldk,
                                              const void* v, int64_t ldv, void* o, int64_t ldo, float* lse,
                                              const int32_t* cu_q, const int32_t* cu_k, int64_t nseq, int64_t max_q,
                                              int64_t tokens_q, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                              float scale, int64_t window, const QloraLimits*, cudaStream_t stream) {
    using namespace attention_simple;
    Problem p;
    (void)max_q;
    if (!make_problem(p, cu_q, cu_k, nseq, tokens_q, heads, kv_heads, head_dim, scale, window))
        return static_cast<int>(cudaErrorInvalidValue);
    if (nseq == 0 || tokens_q == 0) return static_cast<int>(cudaSuccess);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        forward_kernel<T><<<blocks_for(tokens_q * heads), WARPS * 32, 0, stream>>>(
            p, static_cast<const T*>(q), ldq, static_cast<const T*>(k), ldk, static_cast<const T*>(v), ldv,
            static_cast<T*>(o), ldo, lse);
        return static_cast<int>(cudaGetLastError());
    });
}

// The workspace holds D: qlora_attention_backward_workspace gives enough bytes. `deterministic` changes nothing.
extern "C" int qlora_attention_backward_simple(int dtype, const void* q, int64_t ldq, const void* k, int64_t ldk,
                                               const void* v, int64_t ldv, const void* o, int64_t ldo, const float* lse,
                                               const void* dout, int64_t lddo, void* dq, int64_t lddq, void* dk,
                                               int64_t lddk, void* dv, int64_t lddv, void* workspace, const int32_t* cu,
                                               int64_t nseq, int64_t max_len, int64_t tokens, int64_t heads,
                                               int64_t kv_heads, int64_t head_dim, float scale, int64_t window,
                                               int deterministic, const QloraLimits*, cudaStream_t stream) {
    using namespace attention_simple;
    Problem p;
    (void)max_len, (void)deterministic;
    if (!make_problem(p, cu, cu, nseq, tokens, heads, kv_heads, head_dim, scale, window))
        return static_cast<int>(cudaErrorInvalidValue);
    if (nseq == 0 || tokens == 0) return static_cast<int>(cudaSuccess);
    float* row_d = static_cast<float*>(workspace);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T *tq = static_cast<const T*>(q), *tk = static_cast<const T*>(k), *tv = static_cast<const T*>(v);
        const T *to = static_cast<const T*>(o), *tdo = static_cast<const T*>(dout);
        query_kernel<T><<<blocks_for(tokens * heads), WARPS * 32, 0, stream>>>(
            p, tq, ldq, tk, ldk, tv, ldv, to, ldo, lse, tdo, lddo, static_cast<T*>(dq), lddq, row_d);
        const int status = static_cast<int>(cudaGetLastError());
        if (status != cudaSuccess) return status;
        key_kernel<T><<<blocks_for(tokens * kv_heads), WARPS * 32, 0, stream>>>(
            p, tq, ldq, tk, ldk, tv, ldv, lse, tdo, lddo, static_cast<T*>(dk), lddk, static_cast<T*>(dv), lddv, row_d);
        return static_cast<int>(cudaGetLastError());
    });
}
