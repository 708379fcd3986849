// The column of the largest element of every row, of equal ones the first: the next token of greedy decoding.
//
//     out[row] = argmax_c x[row, c], or 0xffffffff if the row holds a NaN or +infinity, or nothing but -infinity
//
// x: [rows, cols] with its stride; out: u32 [rows]. Floor: memory, one read; a row of 128,256 bf16 logits is 256 KB in
// the L2 cache, which a block reads in some microseconds.

#include "common.cuh"

namespace {

constexpr int THREADS = 1024;
constexpr float INFINITE = __builtin_huge_valf();

struct Best {
    float value;
    uint32_t at;
    bool bad;

    __device__ __forceinline__ void take(float v, uint32_t i) {
        bad = bad || !(v < INFINITE);
        if (v > value || (v == value && i < at)) value = v, at = i;
    }

    __device__ __forceinline__ void take(const Best& other) {
        bad = bad || other.bad;
        if (other.value > value || (other.value == value && other.at < at)) value = other.value, at = other.at;
    }
};

template <typename T>
__global__ void __launch_bounds__(THREADS) argmax_kernel(const T* x, int64_t ldx, int64_t cols, uint32_t* out) {
    __shared__ Best parts[THREADS / 32];
    const T* row = x + static_cast<int64_t>(blockIdx.x) * ldx;
    Best best{-INFINITE, 0xffffffffu, false};
    // Several reads are under way at a time: a row is one block's, and all there is to hide their latency.
    constexpr int READS = 32;
    for (int64_t first = threadIdx.x; first < cols; first += READS * THREADS) {
        T values[READS];
#pragma unroll
        for (int i = 0; i < READS; i++) {
            const int64_t c = first + i * THREADS;
            values[i] = row[c < cols ? c : first];
        }
#pragma unroll
        for (int i = 0; i < READS; i++) {
            const int64_t c = first + i * THREADS;
            if (c < cols) best.take(to_float(values[i]), static_cast<uint32_t>(c));
        }
    }
    const auto over_warp = [](Best best) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            best.take(Best{__shfl_xor_sync(~0u, best.value, step), __shfl_xor_sync(~0u, best.at, step),
                           __shfl_xor_sync(~0u, best.bad ? 1 : 0, step) != 0});
        }
        return best;
    };
    best = over_warp(best);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x < 32) {
        best = over_warp(parts[threadIdx.x]);
        if (threadIdx.x == 0) out[blockIdx.x] = best.bad || best.value == -INFINITE ? 0xffffffffu : best.at;
    }
}

}  // namespace

extern "C" int qlora_argmax(int dtype, const void* x, int64_t ldx, int64_t rows, int64_t cols, uint32_t* out,
                            cudaStream_t stream) {
    if (rows <= 0) return static_cast<int>(cudaSuccess);
    if (cols <= 0 || cols >= 0xffffffff || rows > LARGEST_GRID) return static_cast<int>(cudaErrorInvalidValue);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        argmax_kernel<T><<<static_cast<unsigned>(rows), THREADS, 0, stream>>>(static_cast<const T*>(x), ldx, cols, out);
        return static_cast<int>(cudaGetLastError());
    });
}
