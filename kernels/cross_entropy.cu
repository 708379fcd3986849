// Cross-entropy of rows of logits, and its gradient in their place.
//
//     loss = logsumexp(z) - z_target          z <- (softmax(z) - onehot_target) * grad_scale
//
// logits: [rows, vocab] with their stride; targets: i64 [rows], -100 for a row that is not trained (loss and gradient
// are 0); losses: f32 [rows]. f32 sums per thread in base 2 (the maximum is kept as M = max * log2 e, rounded once and
// then used for all terms, so its rounding cancels), the logarithm in f64. A row with NaN has loss NaN.
//
// Floor: memory, one read and one write of the logits (2s bytes per element). Pass 1 keeps a running maximum and sum,
// pass 2 writes. For large vocabularies a block stays on its SM and takes row after row: a row waits in shared memory
// between its passes (224 KB: most of 128,256 bf16 logits; the rest is read again from the L2 cache). A thread that has
// written a piece of the gradient fetches the same piece of the next row into the place and, when it has arrived, adds
// it up: pass 2 of a row and pass 1 of the next are one loop.

#include <float.h>

#include "common.cuh"

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
    int rows, vocab;
    int packs;           // a row is `packs` accesses and single elements behind them
    float grad_scale;
    bool write_grad;
};

// One row of logits, shared by THREADS threads.
template <typename T, int N, int THREADS> struct Row {
    static constexpr int AT_ONCE = 4;

    const Problem& p;
    int index;
    T* z;
    int64_t target;

    __device__ Row(const Problem& p, T* logits, int index)
        : p(p), index(index), z(logits + static_cast<int64_t>(index) * p.ld), target(p.targets[index]) {}

    __device__ bool trained() const { return target != IGNORE_INDEX; }

    __device__ void write_untrained() const {
        if (threadIdx.x == 0) p.losses[index] = 0.0f;
        if (!p.write_grad) return;
        float zeros[N];
#pragma unroll
        for (int i = 0; i < N; i++) zeros[i] = 0.0f;
        for (int c = threadIdx.x; c < p.packs; c += THREADS) store_floats(z + static_cast<int64_t>(c) * N, zeros);
        for (int c = p.packs * N + threadIdx.x; c < p.vocab; c += THREADS) z[c] = from_float<T>(0.0f);
    }

    // Adds the logits from pack `first` on.
    __device__ void add_rest(Partial& mine, int first) const {
        for (int start = first + threadIdx.x; start < p.packs; start += AT_ONCE * THREADS) {
            Pack<T, N> loaded[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const int c = start + k * THREADS;
                if (c < p.packs) loaded[k] = load_pack<T, N>(z + static_cast<int64_t>(c) * N);
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                if (start + k * THREADS >= p.packs) break;
                float values[N];
                unpack(loaded[k], values);
                mine.add(values);
            }
        }
        for (int c = p.packs * N + threadIdx.x; c < p.vocab; c += THREADS) {
            const float value[1] = {to_float(z[c])};
            mine.add(value);
        }
    }

    // All partial sums of the row; writes the loss. Every thread has read what it needs of the row's logits before any
    // thread returns, but for what `write_rest` reads itself.
    __device__ Partial finish(Partial mine, Partial* parts) const {
        const float target_logit = to_float(z[target]);
        const Partial all = merge_block<THREADS>(mine, parts);
        if (threadIdx.x == 0) {
            const double log_sum = all.max / static_cast<double>(LOG2_E) + log(static_cast<double>(all.sum));
            p.losses[index] = static_cast<float>(log_sum - target_logit);
        }
        return all;
    }

    __device__ void write_pack(const Pack<T, N>& pack, int c, float max, float factor) const {
        float values[N];
        unpack(pack, values);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = exp2_fast(fmaf(values[i], LOG2_E, -max)) * factor;
        if (c == target / N) {
#pragma unroll
            for (int i = 0; i < N; i++) values[i] -= i == target % N ? p.grad_scale : 0.0f;
        }
        store_floats(z + static_cast<int64_t>(c) * N, values);
    }

    // The gradient from pack `first` on.
    __device__ void write_rest(int first, float max, float factor) const {
        for (int start = first + threadIdx.x; start < p.packs; start += AT_ONCE * THREADS) {
            Pack<T, N> loaded[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const int c = start + k * THREADS;
                if (c < p.packs) loaded[k] = load_pack<T, N>(z + static_cast<int64_t>(c) * N);
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const int c = start + k * THREADS;
                if (c < p.packs) write_pack(loaded[k], c, max, factor);
            }
        }
        for (int c = p.packs * N + threadIdx.x; c < p.vocab; c += THREADS) {
            const float dz = exp2_fast(fmaf(to_float(z[c]), LOG2_E, -max)) * factor;
            z[c] = from_float<T>(c == target ? dz - p.grad_scale : dz);
        }
    }
};

// A block a row; pass 2 reads from the caches.
template <typename T, int N, int THREADS>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS) single_kernel(T* logits, Problem p) {
    __shared__ Partial parts[THREADS / 32];
    const Row<T, N, THREADS> row(p, logits, blockIdx.x);
    if (!row.trained()) return row.write_untrained();
    Partial mine{-FLT_MAX, 0.0f};
    row.add_rest(mine, 0);
    const Partial all = row.finish(mine, parts);
    if (p.write_grad) row.write_rest(0, all.max, p.grad_scale / all.sum);
}

// Fetches 16 bytes into shared memory in the background, as one group.
__device__ __forceinline__ void fetch(void* to, const void* from, bool wanted) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if (wanted) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's newest groups are under way.
template <int PENDING> __device__ __forceinline__ void wait_for_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Calls f(FIRST), ..., f(LAST - 1) with constants.
template <int FIRST, int LAST, typename F> __device__ __forceinline__ void for_each_slot(F f) {
    if constexpr (FIRST < LAST) {
        f(std::integral_constant<int, FIRST>{});
        for_each_slot<FIRST + 1, LAST>(f);
    }
}

// Rows blockIdx.x, blockIdx.x + gridDim.x, ... The first `kept` packs of a row are in `cache`, THREADS of them a slot;
// a thread touches only its own. Writing slot i of a row, it fetches slot i of the next row and adds slot i - LAG of
// it, which has arrived: both passes and all traffic overlap.
template <typename T, int N, int THREADS, int SLOTS, int LAG>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS) streaming_kernel(T* logits, Problem p, int kept) {
    extern __shared__ __align__(16) unsigned char storage[];
    Pack<T, N>* cache = reinterpret_cast<Pack<T, N>*>(storage);
    __shared__ Partial parts[2][THREADS / 32];
    const auto fetch_slot = [&](int slot, int index) {
        const int c = slot * THREADS + threadIdx.x;
        fetch(cache + c, logits + index * p.ld + static_cast<int64_t>(c) * N, c < kept && index < p.rows);
    };
    const auto add_slot = [&](Partial& sum, int slot) {
        const int c = slot * THREADS + threadIdx.x;
        if (c >= kept) return;
        float values[N];
        unpack(cache[c], values);
        sum.add(values);
    };
    // What `fetch_slot` does not fetch.
    const auto prefetch_rest = [&](int index) {
        if (index >= p.rows) return;
        constexpr int LINE = 128 / sizeof(T);
        const T* row = logits + index * p.ld;
        for (int c = kept * N + threadIdx.x * LINE; c < p.vocab; c += THREADS * LINE) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(row + c));
        }
    };

    Partial mine{-FLT_MAX, 0.0f};
    for_each_slot<0, SLOTS>([&](auto slot) { fetch_slot(slot.value, blockIdx.x); });
    for_each_slot<0, SLOTS>([&](auto slot) {
        wait_for_group<SLOTS - 1 - decltype(slot)::value>();
        if (blockIdx.x < p.rows) add_slot(mine, slot.value);
    });
    int turn = 0;
    for (int index = blockIdx.x; index < p.rows; index += gridDim.x) {
        const Row<T, N, THREADS> row(p, logits, index);
        const int next = index + gridDim.x;
        row.add_rest(mine, kept);
        Partial all{0.0f, 1.0f};
        if (row.trained()) {
            all = row.finish(mine, parts[turn]);
            // Two places in turn: a slow thread may still read this one.
            turn ^= 1;
        }
        prefetch_rest(next);
        const float factor = p.grad_scale / all.sum;
        mine = {-FLT_MAX, 0.0f};
        for_each_slot<0, SLOTS + LAG>([&](auto step) {
            constexpr int SLOT = decltype(step)::value;
            if constexpr (SLOT < SLOTS) {
                const int c = SLOT * THREADS + threadIdx.x;
                if (c < kept && row.trained()) row.write_pack(cache[c], c, all.max, factor);
                // The store has taken the values: their place is free.
                fetch_slot(SLOT, next);
            }
            if constexpr (SLOT >= LAG) {
                wait_for_group<(SLOT < SLOTS ? LAG : SLOTS + LAG - 1 - SLOT)>();
                if (next < p.rows) add_slot(mine, SLOT - LAG);
            }
        });
        if (row.trained()) {
            row.write_rest(kept, all.max, factor);
        } else {
            row.write_untrained();
        }
    }
}

constexpr int SLOTS = 14, LAG = 4;

// For the current device; asked once.
int multiprocessors() {
    static const int count = [] {
        int device = 0, count = 1;
        if (cudaGetDevice(&device) != cudaSuccess) return 1;
        return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 1;
    }();
    return count;
}

int largest_shared_memory() {
    static const int bytes = [] {
        int device = 0, limit = 0;
        if (cudaGetDevice(&device) != cudaSuccess) return 0;
        if (cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
        return limit;
    }();
    return bytes;
}

template <typename T, int N, int THREADS> int launch_single(T* logits, const Problem& p, cudaStream_t stream) {
    single_kernel<T, N, THREADS><<<p.rows, THREADS, 0, stream>>>(logits, p);
    return static_cast<int>(cudaGetLastError());
}

template <typename T, int THREADS> int launch_streaming(T* logits, const Problem& p, cudaStream_t stream) {
    constexpr int BLOCKS = 1024 / THREADS;   // on an SM
    const auto kernel = streaming_kernel<T, VECTOR<T>, THREADS, SLOTS, LAG>;
    // 2 KiB a block are for the driver and `parts`.
    int kept = ((largest_shared_memory() + 1024) / BLOCKS - 2048) / 16;
    kept = kept < SLOTS * THREADS ? kept : SLOTS * THREADS;
    kept = kept < p.packs ? kept : p.packs;
    // Set for the current device on every call: it costs less than a launch.
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kept * 16);
    if (error != cudaSuccess) return static_cast<int>(error);
    const int most = multiprocessors() * BLOCKS;
    kernel<<<p.rows < most ? p.rows : most, THREADS, kept * 16, stream>>>(logits, p, kept);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace

extern "C" int qlora_cross_entropy(int dtype, void* logits, int64_t ld, const int64_t* targets, float* losses,
                                   int64_t rows, int64_t vocab, float grad_scale, int write_grad, cudaStream_t stream) {
    if (rows <= 0) return static_cast<int>(cudaSuccess);
    const bool fits = vocab > 0 && vocab <= LARGEST_GRID - 8192 && rows <= LARGEST_GRID / 2;
    if (!fits) return static_cast<int>(cudaErrorInvalidValue);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = VECTOR<T>;
        T* z = static_cast<T*>(logits);
        const bool vectors = allows_vectors(z, ld, 0, N);
        const Problem p{ld, targets, losses, static_cast<int>(rows), static_cast<int>(vocab),
                        vectors ? static_cast<int>(vocab / N) : 0, grad_scale, write_grad != 0};
        if (!vectors) return launch_single<T, 1, 512>(z, p, stream);
        if (vocab < 16384 || !write_grad) return launch_single<T, N, 256>(z, p, stream);
        // A row that fits into half of the shared memory leaves the other half to a second block.
        if (vocab * sizeof(T) <= 112 << 10) return launch_streaming<T, 512>(z, p, stream);
        return launch_streaming<T, 1024>(z, p, stream);
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
