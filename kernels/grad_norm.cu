// The sum of the squares of a flat f32 gradient, in f64, and the index of its first element that is not finite.
//
// The sum is the same bits on every device and in every run: a fixed number of blocks and threads, each with its own
// elements, then the blocks' sums in a fixed order. f64 cannot overflow from f32 squares, so the sum is NaN or infinite
// exactly if an element is.
//
// Floor: memory, 4 bytes per element, read once.

#include "common.cuh"

namespace {

constexpr int BLOCKS = 1024, THREADS = 256, AT_ONCE = 4;

// Calls `f(index, place in its access, value)` for this thread's elements of [0, n), 16 bytes at a time if `vectors`.
template <typename F> __device__ __forceinline__ void for_my_elements(const float* in, int64_t n, bool vectors, F f) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    constexpr int64_t ALL = static_cast<int64_t>(BLOCKS) * THREADS;
    const int64_t packs = vectors ? n / 4 : 0;
    for (int64_t start = thread; start < packs; start += AT_ONCE * ALL) {
        Pack<float, 4> loaded[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (start + k * ALL < packs) loaded[k] = load_pack<float, 4>(in + (start + k * ALL) * 4);
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (start + k * ALL >= packs) break;
#pragma unroll
            for (int i = 0; i < 4; i++) f((start + k * ALL) * 4 + i, i, loaded[k].v[i]);
        }
    }
    for (int64_t i = packs * 4 + thread; i < n; i += ALL) f(i, 0, in[i]);
}

__global__ void __launch_bounds__(THREADS) squares_kernel(const float* grad, int64_t n, bool vectors, double* partial) {
    __shared__ double parts[THREADS / 32];
    double sums[4] = {0, 0, 0, 0};
    for_my_elements(grad, n, vectors, [&](int64_t, int lane, float x) {
        const double wide = x;
        sums[lane] += wide * wide;
    });
    const double sum = sum_lanes<THREADS>((sums[0] + sums[1]) + (sums[2] + sums[3]), parts);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(BLOCKS) total_kernel(const double* partial, double* out) {
    __shared__ double parts[BLOCKS / 32];
    const double sum = sum_lanes<BLOCKS>(partial[threadIdx.x], parts);
    if (threadIdx.x == 0) *out = sum;
}

__global__ void __launch_bounds__(THREADS)
    non_finite_kernel(const float* grad, int64_t n, bool vectors, unsigned long long* out) {
    int64_t first = INT64_MAX;
    for_my_elements(grad, n, vectors, [&](int64_t i, int, float x) {
        if ((__float_as_uint(x) & 0x7f800000) == 0x7f800000) first = min(first, i);
    });
    if (first != INT64_MAX) atomicMin(out, static_cast<unsigned long long>(first));
}

}  // namespace

// out = sum of grad^2; `partial` holds 1,024 values.
extern "C" int qlora_grad_norm(const float* grad, int64_t n, double* partial, double* out, cudaStream_t stream) {
    squares_kernel<<<BLOCKS, THREADS, 0, stream>>>(grad, n, allows_vectors(grad, 0, 0, 4), partial);
    total_kernel<<<1, BLOCKS, 0, stream>>>(partial, out);
    return static_cast<int>(cudaGetLastError());
}

// out = the index of the first element that is NaN or infinite, or the largest u64.
extern "C" int qlora_first_non_finite(const float* grad, int64_t n, uint64_t* out, cudaStream_t stream) {
    if (const cudaError_t error = cudaMemsetAsync(out, 0xff, sizeof(uint64_t), stream)) return static_cast<int>(error);
    if (n <= 0) return static_cast<int>(cudaSuccess);
    non_finite_kernel<<<BLOCKS, THREADS, 0, stream>>>(grad, n, allows_vectors(grad, 0, 0, 4),
                                                      reinterpret_cast<unsigned long long*>(out));
    return static_cast<int>(cudaGetLastError());
}
