// An adapter's changes between tokens and vectors (ops/adapter_tokens.rs): of rows that the embedding made, and of the
// logits of tokens whose rows of the head were trained.
//
//     x[m, j]          = gain[j] * (e[m, j] + scale * sum_c B[j, c] A[c, id[m]])     e = own row of id[m], or else x
//     logits[m, id[i]] = sum_k hidden[m, k] W[i, k]
//
// x: [rows, width]; A: f32 [rank, vocabulary]; B: f32 [width, rank]; gain: f32 [width]; own rows and W: f32, at offsets
// in the adapter's values (-1: none). A, gain and own rows are optional. Sums are f32, in a fixed order.
//
// Floor: latency; rows x width elements, or rows x (a few tokens) dot products.

#include "common.cuh"

namespace {

template <typename T> struct Embedded {
    T* x;
    int64_t ldx;
    const uint32_t* ids;
    const int64_t* own;
    const float *values, *a, *b, *gain;
    int64_t rank, vocabulary;
    float scale;

    __device__ void operator()(int64_t row, int64_t col) const {
        const int64_t from = own ? own[row] : -1;
        float value = from >= 0 ? values[from + col] : to_float(x[row * ldx + col]);
        if (a) {
            const float* column = a + ids[row];
            float sum = 0.0f;
            for (int64_t c = 0; c < rank; c++) sum = fmaf(column[c * vocabulary], b[col * rank + c], sum);
            value += scale * sum;
        }
        if (gain) value *= gain[col];
        x[row * ldx + col] = from_float<T>(value);
    }
};

// A warp a logit.
template <typename H, typename T>
__global__ void __launch_bounds__(256)
    head_kernel(const H* hidden, int64_t ldh, const float* values, const uint32_t* ids, const int64_t* own,
                Divisor count, T* logits, int64_t ldl, int64_t rows, int64_t width) {
    const uint32_t warp = blockIdx.x * 8 + threadIdx.x / 32;
    const uint32_t row = count.quotient(warp), i = warp - row * count.d;
    if (row >= rows) return;
    const H* h = hidden + row * ldh;
    const float* w = values + own[i];
    float sum = 0.0f;
    for (int64_t k = threadIdx.x % 32; k < width; k += 32) sum = fmaf(to_float(h[k]), w[k], sum);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) logits[row * ldl + ids[i]] = from_float<T>(sum);
}

}  // namespace

extern "C" int qlora_adapter_embedding(int dtype, void* x, int64_t ldx, const uint32_t* ids, const int64_t* own,
                                       const float* values, const float* a, const float* b, const float* gain,
                                       int64_t rank, int64_t vocabulary, float scale, int64_t rows, int64_t width,
                                       cudaStream_t stream) {
    if (!a != !b || (own && !values) || rank < 0) return static_cast<int>(cudaErrorInvalidValue);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Embedded<T> f{static_cast<T*>(x), ldx, ids, own, values, a, b, gain, rank, vocabulary, scale};
        return for_each_pack<1>(rows, width, f, stream);
    });
}

extern "C" int qlora_head_tokens(int dtype, const void* hidden, int64_t ldh, const float* values, const uint32_t* ids,
                                 const int64_t* own, int64_t count, int logits_dtype, void* logits, int64_t ldl,
                                 int64_t rows, int64_t width, cudaStream_t stream) {
    if (rows <= 0 || count <= 0) return static_cast<int>(cudaSuccess);
    if (rows > LARGEST_GRID / count - 8) return static_cast<int>(cudaErrorInvalidValue);
    const unsigned blocks = static_cast<unsigned>(divide_up(rows * count, 8));
    return with_dtype(dtype, [&](auto from) {
        return with_dtype(logits_dtype, [&](auto to) {
            using H = decltype(from);
            using T = decltype(to);
            head_kernel<<<blocks, 256, 0, stream>>>(static_cast<const H*>(hidden), ldh, values, ids, own,
                                                    Divisor(static_cast<uint32_t>(count)), static_cast<T*>(logits),
                                                    ldl, rows, width);
            return static_cast<int>(cudaGetLastError());
        });
    });
}
