// Cross-entropy of rows of logits, and its gradient in their place.
//
//     loss = logsumexp(z) - z_target          z <- (softmax(z) - onehot_target) * grad_scale
//
// logits: [rows, vocab] with their stride; targets: i64 [rows], -100 for a row that is not trained (loss and gradient
// are 0); losses: f32 [rows]; grad_scales: f32 [rows], or null for the one grad_scale. f32 sums per thread in base 2 (the maximum is kept as M = max * log2 e, rounded once and
// then used for all terms, so its rounding cancels), the logarithm in f64. A row with NaN has loss NaN.
//
// Floor: memory, one read and one write of the logits (2s bytes per element); the exponentials of the two passes take
// almost half as long on an H100, one a clock and quarter SM. A block takes a row: pass 1 keeps a running maximum and
// sum, pass 2 writes. What fits of the row stays in shared memory between the passes (224 KB: most of 128,256 bf16
// logits), the rest is read again from the L2 cache.

#include <float.h>

#include "common.cuh"
#include "device.cuh"

namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int64_t IGNORE_INDEX = -100;

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// sum 2^(z log2 e - max) over some logits; max is at least -FLT_MAX, so that differences are never NaN for finite z.
struct Partial {
    float max, sum;

    __device__ __forceinline__ void merge(Partial other) {
        // No fused multiply-add: both sides of an exchange get the same bits.
        const float larger = fmaxf(max, other.max);
        const float mine = __fmul_rn(sum, exp2_fast(max - larger));
        sum = __fadd_rn(mine, __fmul_rn(other.sum, exp2_fast(other.max - larger)));
        max = larger;
    }

    template <int LANES> __device__ __forceinline__ void merge_lanes() {
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) {
            merge({__shfl_xor_sync(~0u, max, step), __shfl_xor_sync(~0u, sum, step)});
        }
    }

    template <int N> __device__ __forceinline__ void add(const float (&z)[N]) {
        float largest = z[0];
#pragma unroll
        for (int i = 1; i < N; i++) largest = fmaxf(largest, z[i]);
        largest = fmaxf(max, largest * LOG2_E);
        float part = 0;
#pragma unroll
        for (int i = 0; i < N; i++) part += exp2_fast(fmaf(z[i], LOG2_E, -largest));
        sum = sum * exp2_fast(max - largest) + part;
        max = largest;
    }
};

template <int THREADS> __device__ __forceinline__ Partial merge_block(Partial mine, Partial* parts) {
    mine.merge_lanes<32>();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = parts[threadIdx.x % (THREADS / 32)];
    mine.merge_lanes<THREADS / 32>();
    return mine;
}

struct Problem {
    int64_t ld;
    const int64_t* targets;
    float* losses;
    int vocab;
    int packs;   // a row is `packs` accesses and single elements behind them
    int kept;    // the first of them stay in shared memory: all of them or a multiple of the threads
    float grad_scale;
    const float* grad_scales;
    bool write_grad;
};

// A block a row. A thread reads, keeps and writes the same packs in both passes, those of its number modulo THREADS, so
// nothing but the sums is exchanged.
template <typename T, int N, int THREADS>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS) cross_entropy_kernel(T* logits, Problem p) {
    extern __shared__ __align__(16) unsigned char storage[];
    Pack<T, N>* cache = reinterpret_cast<Pack<T, N>*>(storage);
    __shared__ Partial parts[THREADS / 32];
    constexpr int AT_ONCE = 4;
    T* row = logits + static_cast<int64_t>(blockIdx.x) * p.ld;
    Pack<T, N>* row_packs = reinterpret_cast<Pack<T, N>*>(row);
    const int64_t target = p.targets[blockIdx.x];
    const int tail = p.packs * N + threadIdx.x;
    if (target == IGNORE_INDEX) {
        if (threadIdx.x == 0) p.losses[blockIdx.x] = 0.0f;
        if (!p.write_grad) return;
        Pack<T, N> zeros;
#pragma unroll
        for (int i = 0; i < N; i++) zeros.v[i] = from_float<T>(0.0f);
        for (int c = threadIdx.x; c < p.packs; c += THREADS) row_packs[c] = zeros;
        for (int c = tail; c < p.vocab; c += THREADS) row[c] = from_float<T>(0.0f);
        return;
    }

    Partial mine{-FLT_MAX, 0.0f};
    for (int start = threadIdx.x; start < p.packs; start += AT_ONCE * THREADS) {
        Pack<T, N> loaded[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            if (start + k * THREADS < p.packs) loaded[k] = row_packs[start + k * THREADS];
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int c = start + k * THREADS;
            if (c >= p.packs) break;
            float z[N];
            unpack(loaded[k], z);
            mine.add(z);
            if (c < p.kept) cache[c] = loaded[k];
        }
    }
    for (int c = tail; c < p.vocab; c += THREADS) {
        const float z[1] = {to_float(row[c])};
        mine.add(z);
    }
    const float target_logit = to_float(row[target]);
    const Partial all = merge_block<THREADS>(mine, parts);
    if (threadIdx.x == 0) {
        const double log_sum = all.max / static_cast<double>(LOG2_E) + log(static_cast<double>(all.sum));
        p.losses[blockIdx.x] = static_cast<float>(log_sum - target_logit);
    }
    if (!p.write_grad) return;

    const float grad_scale = p.grad_scales == nullptr ? p.grad_scale : p.grad_scales[blockIdx.x];
    const float factor = grad_scale / all.sum;
    const auto gradient = [&](float z) { return exp2_fast(fmaf(z, LOG2_E, -all.max)) * factor; };
    for (int start = threadIdx.x; start < p.packs; start += AT_ONCE * THREADS) {
        Pack<T, N> loaded[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int c = start + k * THREADS;
            if (c < p.packs) loaded[k] = c < p.kept ? cache[c] : row_packs[c];
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int c = start + k * THREADS;
            if (c >= p.packs) break;
            float z[N];
            unpack(loaded[k], z);
#pragma unroll
            for (int i = 0; i < N; i++) z[i] = gradient(z[i]);
            store_floats(row + static_cast<int64_t>(c) * N, z);
        }
    }
    for (int c = tail; c < p.vocab; c += THREADS) row[c] = from_float<T>(gradient(to_float(row[c])));
    // The thread that wrote the target's element writes it again.
    const int column = static_cast<int>(target);
    const int owner = column < p.packs * N ? column / N : column - p.packs * N;
    if (threadIdx.x == owner % THREADS) row[column] = from_float<T>(gradient(target_logit) - grad_scale);
}

template <typename T, int N, int THREADS>
int launch(T* logits, Problem p, int64_t rows, bool keep, const QloraLimits& limits, cudaStream_t stream) {
    constexpr auto kernel = cross_entropy_kernel<T, N, THREADS>;
    if (keep) {
        // The blocks of an SM share its memory; 2 KiB a block are for the driver and `parts`.
        p.kept = (limits.shared_per_multiprocessor / (1024 / THREADS) - 2048) / 16;
        p.kept = p.kept < p.packs ? p.kept / THREADS * THREADS : p.packs;
        const cudaError_t error = allow_shared<kernel>(limits, p.kept * 16);
        if (error != cudaSuccess) return static_cast<int>(error);
    }
    kernel<<<static_cast<unsigned>(rows), THREADS, p.kept * 16, stream>>>(logits, p);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace

extern "C" int qlora_cross_entropy(int dtype, void* logits, int64_t ld, const int64_t* targets, float* losses,
                                   int64_t rows, int64_t vocab, float grad_scale, const float* grad_scales, int write_grad,
                                   const QloraLimits* limits, cudaStream_t stream) {
    if (rows <= 0) return static_cast<int>(cudaSuccess);
    const bool fits = vocab > 0 && vocab <= LARGEST_GRID - 8192 && rows <= LARGEST_GRID;
    if (!fits) return static_cast<int>(cudaErrorInvalidValue);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = VECTOR<T>;
        T* z = static_cast<T*>(logits);
        const bool vectors = allows_vectors(z, ld, 0, N);
        const Problem p{ld, targets, losses, static_cast<int>(vocab), vectors ? static_cast<int>(vocab / N) : 0,
                        0, grad_scale, grad_scales, write_grad != 0};
        if (!vectors) return launch<T, 1, 512>(z, p, rows, false, *limits, stream);
        if (vocab < 16384 || !write_grad) return launch<T, N, 256>(z, p, rows, false, *limits, stream);
        // A row that fits into half of the shared memory leaves the other half to a second block.
        if (vocab * sizeof(T) <= 112 << 10) return launch<T, N, 512>(z, p, rows, true, *limits, stream);
        return launch<T, N, 1024>(z, p, rows, true, *limits, stream);
    });
}

namespace {

constexpr int SUM_THREADS = 1024;

__global__ void __launch_bounds__(SUM_THREADS) sum_kernel(const float* __restrict__ in, int64_t n, double* out) {
    __shared__ double parts[SUM_THREADS / 32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += SUM_THREADS) sum += in[i];
    sum = sum_lanes<SUM_THREADS>(sum, parts);
    if (threadIdx.x == 0) *out = sum;
}

}  // namespace

// out = sum of n floats in f64, in a fixed order; one block: for the losses of a batch.
extern "C" int qlora_sum_f32(const float* in, int64_t n, double* out, cudaStream_t stream) {
    sum_kernel<<<1, SUM_THREADS, 0, stream>>>(in, n, out);
    return static_cast<int>(cudaGetLastError());
}
