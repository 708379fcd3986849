// Rounding to 8 bits (e4m3) with one scale for many values: value = e4m3 * scale, scale = largest magnitude / 448.
#pragma once

#include <cuda_fp8.h>

#include "common.cuh"

namespace fp8 {

// The largest number of e4m3.
constexpr float LARGEST = 448.0f;

__device__ __forceinline__ uint16_t two(float a, float b) {
    return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}

// The factor of values with this largest magnitude; NaN if it is not finite, so that all of them become NaN. Values so small that the
// factor would be infinite become zeros.
__device__ __forceinline__ float factor_of(float absmax) {
    constexpr float SMALLEST = 2e-36f;   // 448 over it is finite
    if (absmax < SMALLEST) return 0.0f;
    return isfinite(absmax) ? __fdiv_rn(LARGEST, absmax) : __int_as_float(0x7fffffff);
}

__device__ __forceinline__ float scale_of(float absmax) { return __fdiv_rn(absmax, LARGEST); }

// The larger of two magnitudes, which are ordered as their bits are, NaN above infinity.
__device__ __forceinline__ float larger(float a, float b) {
    return __uint_as_float(max(__float_as_uint(a), __float_as_uint(b)));
}

// Of all threads of the block, a multiple of 32 up to MOST; once a kernel.
template <int MOST> __device__ __forceinline__ float largest_of_block(float x) {
    __shared__ float parts[MOST / 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(~0u, x, step));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.0f;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

}  // namespace fp8
