// LLM.int8's rounding of activations, as values on the grid instead of integers (ops/int8_activations.rs says why). With
// x [tokens, width], h = f16(x) and a threshold (0: no outliers):
//
//     flags[c]  = 2  if c is a column that the weight itself holds in 16 bits
//                 1  if |h[t, c]| >= threshold for any token t
//                 0  elsewhere
//     absmax[t] = max |h[t, c]| over the elements below the threshold, columns with flag 2 left out
//     out[t, c] = x[t, c]                                             where there is a flag
//                 rint(h[t, c] * (127 / absmax[t])) * absmax[t] / 127  elsewhere, rounded to the type of x
//
// In f32 these are the bits of the CPU's. Floor: memory, three reads (two of them from a cache) and one write.

#include "common.cuh"

namespace {

constexpr int THREADS = 256;

template <typename T> __device__ __forceinline__ float narrow(T x) {
    return __half2float(__float2half_rn(to_float(x)));
}

__global__ void __launch_bounds__(THREADS) exact_kernel(const uint32_t* columns, int64_t count, uint8_t* flags) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i < count) flags[columns[i]] = 2;
}

template <typename T> struct FindOutliers {
    const T* x;
    int64_t ldx;
    float threshold;
    uint8_t* flags;

    // Several tokens may set the same flag: they write the same value.
    __device__ void operator()(int64_t row, int64_t col) const {
        if (fabsf(narrow(x[row * ldx + col])) >= threshold && flags[col] == 0) flags[col] = 1;
    }
};

// A block a token.
template <typename T>
__global__ void __launch_bounds__(THREADS) round_kernel(const T* x, int64_t ldx, const uint8_t* flags, float limit,
                                                        T* out, int64_t ldo, int64_t width) {
    __shared__ float parts[THREADS / 32];
    x += static_cast<int64_t>(blockIdx.x) * ldx;
    out += static_cast<int64_t>(blockIdx.x) * ldo;
    float absmax = 0.0f;
    for (int64_t c = threadIdx.x; c < width; c += THREADS) {
        const float h = fabsf(narrow(x[c]));
        if (h < limit && flags[c] != 2) absmax = fmaxf(absmax, h);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) absmax = fmaxf(absmax, __shfl_xor_sync(~0u, absmax, step));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = absmax;
    __syncthreads();
    absmax = parts[0];
#pragma unroll
    for (int i = 1; i < THREADS / 32; i++) absmax = fmaxf(absmax, parts[i]);
    const float factor = absmax > 0.0f ? __fdiv_rn(127.0f, absmax) : 0.0f, step = __fdiv_rn(absmax, 127.0f);
    for (int64_t c = threadIdx.x; c < width; c += THREADS) {
        const float rounded = __fmul_rn(rintf(__fmul_rn(narrow(x[c]), factor)), step);
        out[c] = flags[c] ? x[c] : from_float<T>(rounded);
    }
}

}  // namespace

// `flags`: width bytes, which this writes. x and out have the same type and are not the same.
extern "C" int qlora_int8_activations(int dtype, const void* x, int64_t ldx, float threshold, const uint32_t* exact,
                                      int64_t exact_count, uint8_t* flags, void* out, int64_t ldo, int64_t tokens,
                                      int64_t width, cudaStream_t stream) {
    if (tokens <= 0 || width <= 0) return static_cast<int>(cudaSuccess);
    if (tokens > LARGEST_GRID || exact_count < 0 || exact_count > width) return static_cast<int>(cudaErrorInvalidValue);
    const cudaError_t cleared = cudaMemsetAsync(flags, 0, width, stream);
    if (cleared != cudaSuccess) return static_cast<int>(cleared);
    if (exact_count > 0) {
        const unsigned blocks = static_cast<unsigned>(divide_up(exact_count, THREADS));
        exact_kernel<<<blocks, THREADS, 0, stream>>>(exact, exact_count, flags);
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) return static_cast<int>(error);
    }
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* xt = static_cast<const T*>(x);
        if (threshold > 0.0f) {
            const int found = for_each_pack<1>(tokens, width, FindOutliers<T>{xt, ldx, threshold, flags}, stream);
            if (found != static_cast<int>(cudaSuccess)) return found;
        }
        const float limit = threshold > 0.0f ? threshold : __builtin_huge_valf();
        round_kernel<T><<<static_cast<unsigned>(tokens), THREADS, 0, stream>>>(xt, ldx, flags, limit,
                                                                               static_cast<T*>(out), ldo, width);
        return static_cast<int>(cudaGetLastError());
    });
}
