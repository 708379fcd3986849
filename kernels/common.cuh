// Code shared by all kernels: element types, conversions, vector access, sums over threads, launches over matrices.
//
// Matrices are row-major; row i starts at `ptr + i * ld` (ld in elements, at least the number of columns). Arithmetic
// is in f32; a value is rounded once, when it is stored. Sizes and indices are 64-bit: tokens x width passes 2^31.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };

template <typename T> __device__ __forceinline__ float to_float(T x);
template <> __device__ __forceinline__ float to_float(float x) { return x; }
template <> __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <> __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

// The elements of a 16-byte access.
template <typename T> constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));

// N consecutive elements, moved as one access of N * sizeof(T) bytes (at most 16).
template <typename T, int N> struct alignas(N * sizeof(T)) Pack {
    T v[N];
};

// N consecutive elements as floats, in accesses of at most 16 bytes: `p` is aligned to one of them.
template <typename T, int N> __device__ __forceinline__ void load_floats(const T* p, float (&out)[N]) {
    constexpr int M = N < VECTOR<T> ? N : VECTOR<T>;
    Pack<T, M> packs[N / M];
#pragma unroll
    for (int k = 0; k < N / M; k++) packs[k] = reinterpret_cast<const Pack<T, M>*>(p)[k];
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = to_float(packs[i / M].v[i % M]);
}

template <typename T, int N> __device__ __forceinline__ void store_floats(T* p, const float (&in)[N]) {
    constexpr int M = N < VECTOR<T> ? N : VECTOR<T>;
    Pack<T, M> packs[N / M];
#pragma unroll
    for (int i = 0; i < N; i++) packs[i / M].v[i % M] = from_float<T>(in[i]);
#pragma unroll
    for (int k = 0; k < N / M; k++) reinterpret_cast<Pack<T, M>*>(p)[k] = packs[k];
}

template <typename T, int N> __device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <typename T, int N> __device__ __forceinline__ void unpack(const Pack<T, N>& pack, float (&out)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = to_float(pack.v[i]);
}

// Whether every row of a matrix allows accesses of N elements.
template <typename T> inline bool allows_vectors(const T* p, int64_t ld, int64_t cols, int n) {
    const uintptr_t bytes = n * sizeof(T) < 16 ? n * sizeof(T) : 16;
    return reinterpret_cast<uintptr_t>(p) % bytes == 0 && ld % n == 0 && cols % n == 0;
}

// Calls `f` with a value of the element type that `dtype` names; anything else is cudaErrorInvalidValue.
template <typename F> inline int with_dtype(int dtype, F f) {
    switch (dtype) {
        case F32: return f(float{});
        case BF16: return f(__nv_bfloat16{});
        case F16: return f(__half{});
        default: return static_cast<int>(cudaErrorInvalidValue);
    }
}

// Sums.

// The sum over LANES neighbouring threads (a power of two), in a fixed order; all of them get it. Above 32 the block
// has exactly LANES threads, and `parts` is shared memory for LANES / 32 values that nobody else touches meanwhile.
template <int LANES, typename S> __device__ __forceinline__ S sum_lanes(S x, S* parts) {
#pragma unroll
    for (int step = (LANES < 32 ? LANES : 32) / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    if constexpr (LANES > 32) {
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
        __syncthreads();
        x = parts[0];
#pragma unroll
        for (int i = 1; i < LANES / 32; i++) x += parts[i];
    }
    return x;
}

// Launches.

// Division by a number that is fixed at launch, as a multiplication; for numerators below 2^31.
struct Divisor {
    uint32_t d, factor, shift;

    Divisor() = default;
    explicit Divisor(uint32_t divisor) : d(divisor), factor(1), shift(0) {
        while ((uint64_t{1} << shift) < d) shift++;
        factor = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
    }

    __device__ __forceinline__ uint32_t quotient(uint32_t x) const { return (__umulhi(x, factor) + x) >> shift; }
};

constexpr int64_t LARGEST_GRID = (int64_t{1} << 31) - 1;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int N, typename F>
__global__ void __launch_bounds__(256) packs_kernel(int64_t rows, int64_t packs, Divisor chunks, F f) {
    const uint32_t band = chunks.quotient(blockIdx.x);
    const int64_t pack = static_cast<int64_t>(blockIdx.x - band * chunks.d) * blockDim.x + threadIdx.x;
    const int64_t row = static_cast<int64_t>(band) * blockDim.y + threadIdx.y;
    if (row < rows && pack < packs) f(row, pack * N);
}

// Calls `f(row, col)` for every N-th column of a matrix, one thread a call; `cols` is a multiple of N. Neighbouring
// blocks are neighbours in memory, and no thread divides by more than a multiplication.
template <int N, typename F> inline int for_each_pack(int64_t rows, int64_t cols, F f, cudaStream_t stream) {
    const int64_t packs = cols / N;
    if (rows <= 0 || packs <= 0) return static_cast<int>(cudaSuccess);
    unsigned x = 256;
    while (x > 1 && x / 2 >= packs) x /= 2;
    const dim3 block(x, 256 / x);
    const int64_t chunks = divide_up(packs, x), bands = divide_up(rows, block.y);
    if (chunks > LARGEST_GRID || bands > LARGEST_GRID / chunks) return static_cast<int>(cudaErrorInvalidValue);
    const unsigned blocks = static_cast<unsigned>(chunks * bands);
    packs_kernel<N><<<blocks, block, 0, stream>>>(rows, packs, Divisor(static_cast<uint32_t>(chunks)), f);
    return static_cast<int>(cudaGetLastError());
}
