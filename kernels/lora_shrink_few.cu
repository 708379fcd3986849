// S = x A^T of the adapters of a group, for a few tokens: S[m, r0 + c] = sum_k x[m, k] A[c, k], all f32; A [rank, k] of
// every member lies in the flat buffer of the adapters (lora.cu). Columns of S that belong to nobody become zero.
//
// With a norm, x is the norm's input: S is that of its output y = weight x / sqrt(mean x^2 + eps), which is written too, by
// blocks of its own. A launch less, and the factor of a row is found by every block that needs it: it reads x anyway. (S then
// uses y before it is rounded.)
//
// Floor: memory, 4 bytes an element of A: under a microsecond, so what counts is latency. A block takes one row of A
// and up to 4 tokens; its threads share k and load A before the input is there
// (few_tokens.cuh, programmatic launch). Sums have a fixed order.

#include "few_tokens.cuh"

extern "C" {
typedef struct {
    const float* a[3];   // [rank, k] each
    int32_t rank[3], r0[3];
    int32_t count, pad;
} QloraShrink;
}

namespace {

using namespace few;

constexpr int PACKS = 2;   // of 8 elements, loaded ahead

template <typename T> struct Norm {
    const float* weight;   // [k]
    float eps;
    T* y;
    int64_t ldy;
};

// A block of 256 threads for each row of S (x = columns and up: of y) and up to M tokens; k <= 4096 elements, in packs of 8.
template <typename T, int M>
__global__ void __launch_bounds__(256)
    norm_shrink_kernel(const T* __restrict__ x, int64_t ldx, Norm<T> norm, QloraShrink adapters, float* s, int64_t lds,
                       int columns, int64_t k, int tokens) {
    constexpr int THREADS = 256;
    __shared__ float squares[M][THREADS / 32], parts[M][THREADS / 32];
    const int column = blockIdx.x, token0 = blockIdx.y * M;
    const float* a = nullptr;
#pragma unroll
    for (int j = 0; j < 3; j++) {
        const int c = column - adapters.r0[j];
        if (j < adapters.count && c >= 0 && c < adapters.rank[j]) a = adapters.a[j] + c * k;
    }
    let_next_begin();
    // The norm's weight, and with A: their product.
    float factors[PACKS][8];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int64_t at = (static_cast<int64_t>(p) * THREADS + threadIdx.x) * 8;
#pragma unroll
        for (int i = 0; i < 8; i++) factors[p][i] = 0;
        if (at < k) load_floats(norm.weight + at, factors[p]);
        if (at < k && column < columns) {
            float av[8] = {};
            if (a) load_floats(a + at, av);
#pragma unroll
            for (int i = 0; i < 8; i++) factors[p][i] *= av[i];
        }
    }
    wait_for_previous();
    float values[M][PACKS][8], square[M] = {}, sum[M] = {};
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int64_t at = (static_cast<int64_t>(p) * THREADS + threadIdx.x) * 8;
#pragma unroll
            for (int i = 0; i < 8; i++) values[m][p][i] = 0;
            if (token0 + m < tokens && at < k) load_floats(x + (token0 + m) * ldx + at, values[m][p]);
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                square[m] = fmaf(values[m][p][i], values[m][p][i], square[m]);
                sum[m] = fmaf(values[m][p][i], factors[p][i], sum[m]);
            }
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            square[m] += __shfl_xor_sync(~0u, square[m], step);
            sum[m] += __shfl_xor_sync(~0u, sum[m], step);
        }
        if (threadIdx.x % 32 == 0) {
            squares[m][threadIdx.x / 32] = square[m];
            parts[m][threadIdx.x / 32] = sum[m];
        }
    }
    __syncthreads();
    const auto scale = [&](int m) {
        float total = squares[m][0];
#pragma unroll
        for (int w = 1; w < THREADS / 32; w++) total += squares[m][w];
        return 1.0f / sqrtf(total / static_cast<float>(k) + norm.eps);
    };
    if (column < columns) {
        const int m = threadIdx.x;
        if (m < M && token0 + m < tokens) {
            float total = parts[m][0];
#pragma unroll
            for (int w = 1; w < THREADS / 32; w++) total += parts[m][w];
            s[(token0 + m) * lds + column] = a ? total * scale(m) : 0.0f;
        }
        return;
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
        if (token0 + m >= tokens) break;
        const float factor = scale(m);
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            const int64_t at = (static_cast<int64_t>(p) * THREADS + threadIdx.x) * 8;
            if (at >= k) continue;
            float out[8];
#pragma unroll
            for (int i = 0; i < 8; i++) out[i] = values[m][p][i] * factor * factors[p][i];
            store_floats(norm.y + (token0 + m) * norm.ldy + at, out);
        }
    }
}

template <typename T, int M, bool VECTORS, int THREADS>
__global__ void __launch_bounds__(THREADS)
    shrink_kernel(const T* __restrict__ x, int64_t ldx, QloraShrink adapters, float* s, int64_t lds, int64_t k,
                  int tokens) {
    __shared__ float parts[M][THREADS / 32];
    const int column = blockIdx.x, token0 = blockIdx.y * M;
    const float* a = nullptr;
#pragma unroll
    for (int j = 0; j < 3; j++) {
        const int c = column - adapters.r0[j];
        if (j < adapters.count && c >= 0 && c < adapters.rank[j]) a = adapters.a[j] + c * k;
    }
    let_next_begin();
    float ahead[PACKS][8];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int64_t at = (static_cast<int64_t>(p) * THREADS + threadIdx.x) * 8;
        if (VECTORS && a && at < k) load_floats(a + at, ahead[p]);
    }
    wait_for_previous();
    float sum[M] = {};
    if (a) {
        const auto add = [&](int64_t at, const float(&av)[8]) {
#pragma unroll
            for (int m = 0; m < M; m++) {
                if (token0 + m >= tokens) break;
                float xv[8];
                load_floats(x + (token0 + m) * ldx + at, xv);
#pragma unroll
                for (int i = 0; i < 8; i++) sum[m] = fmaf(xv[i], av[i], sum[m]);
            }
        };
        if constexpr (VECTORS) {
#pragma unroll
            for (int p = 0; p < PACKS; p++) {
                const int64_t at = (static_cast<int64_t>(p) * THREADS + threadIdx.x) * 8;
                if (at < k) add(at, ahead[p]);
            }
            for (int64_t at = (static_cast<int64_t>(PACKS) * THREADS + threadIdx.x) * 8; at < k; at += THREADS * 8) {
                float av[8];
                load_floats(a + at, av);
                add(at, av);
            }
        } else {
            for (int64_t at = threadIdx.x; at < k; at += THREADS) {
                const float av = a[at];
#pragma unroll
                for (int m = 0; m < M; m++)
                    if (token0 + m < tokens) sum[m] = fmaf(to_float(x[(token0 + m) * ldx + at]), av, sum[m]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum[m] += __shfl_xor_sync(~0u, sum[m], step);
        if (threadIdx.x % 32 == 0) parts[m][threadIdx.x / 32] = sum[m];
    }
    __syncthreads();
    const int m = threadIdx.x;
    if (m < M && token0 + m < tokens) {
        float total = parts[m][0];
#pragma unroll
        for (int w = 1; w < THREADS / 32; w++) total += parts[m][w];
        s[(token0 + m) * lds + column] = total;
    }
}

}  // namespace

extern "C" int qlora_lora_shrink_few(int dtype, const void* x, int64_t ldx, QloraShrink adapters, float* s, int64_t lds,
                                     int64_t columns, int64_t tokens, int64_t k, int early, cudaStream_t stream) {
    if (tokens <= 0 || columns <= 0) return static_cast<int>(cudaSuccess);
    if (adapters.count < 0 || adapters.count > 3 || !is_16_bits(dtype) || k <= 0 || tokens > 65535)
        return static_cast<int>(cudaErrorInvalidValue);
    for (int j = 0; j < adapters.count; j++)
        if (adapters.r0[j] < 0 || adapters.rank[j] < 0 || adapters.r0[j] + adapters.rank[j] > columns)
            return static_cast<int>(cudaErrorInvalidValue);
    const auto with_type = [&](auto zero) {
        using T = decltype(zero);
        const T* xt = static_cast<const T*>(x);
        bool vectors = allows_vectors(xt, ldx, k, 8);
        for (int j = 0; j < adapters.count; j++) vectors = vectors && allows_vectors(adapters.a[j], k, k, 8);
        const auto go = [&](auto size) {
            constexpr int M = size();
            const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(divide_up(tokens, M)));
            const auto with_threads = [&](auto threads) {
                constexpr int THREADS = threads();
                const auto kernel = vectors ? shrink_kernel<T, M, true, THREADS> : shrink_kernel<T, M, false, THREADS>;
                return launch(kernel, grid, dim3(THREADS), 0, early, stream, xt, ldx, adapters, s, lds, k,
                              static_cast<int>(tokens));
            };
            // A thread takes two packs of 8 elements, or little more.
            return k > 4096 ? with_threads(std::integral_constant<int, 1024>{})
                            : with_threads(std::integral_constant<int, 256>{});
        };
        if (tokens == 1) return go(std::integral_constant<int, 1>{});
        if (tokens == 2) return go(std::integral_constant<int, 2>{});
        return go(std::integral_constant<int, 4>{});
    };
    return dtype == BF16 ? with_type(__nv_bfloat16{}) : with_type(__half{});
}

extern "C" int qlora_norm_shrink_few(int dtype, const void* x, int64_t ldx, const float* weight, float eps, void* y,
                                     int64_t ldy, QloraShrink adapters, float* s, int64_t lds, int64_t columns,
                                     int64_t tokens, int64_t k, int early, cudaStream_t stream) {
    if (tokens <= 0) return static_cast<int>(cudaSuccess);
    if (!is_16_bits(dtype) || k <= 0 || k > 256 * PACKS * 8 || tokens > 65535 || columns < 0 ||
        adapters.count < 0 || adapters.count > 3) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    for (int j = 0; j < adapters.count; j++)
        if (adapters.r0[j] < 0 || adapters.rank[j] < 0 || adapters.r0[j] + adapters.rank[j] > columns)
            return static_cast<int>(cudaErrorInvalidValue);
    const auto with_type = [&](auto zero) {
        using T = decltype(zero);
        const T* xt = static_cast<const T*>(x);
        T* yt = static_cast<T*>(y);
        bool vectors = allows_vectors(xt, ldx, k, 8) && allows_vectors(yt, ldy, k, 8) && allows_vectors(weight, k, k, 8);
        for (int j = 0; j < adapters.count; j++) vectors = vectors && allows_vectors(adapters.a[j], k, k, 8);
        if (!vectors) return static_cast<int>(cudaErrorInvalidValue);
        const Norm<T> norm{weight, eps, yt, ldy};
        const auto go = [&](auto size) {
            constexpr int M = size();
            const dim3 grid(static_cast<unsigned>(columns + 1), static_cast<unsigned>(divide_up(tokens, M)));
            return launch(norm_shrink_kernel<T, M>, grid, dim3(256), 0, early, stream, xt, ldx, norm, adapters, s, lds,
                          static_cast<int>(columns), k, static_cast<int>(tokens));
        };
        return tokens == 1 ? go(std::integral_constant<int, 1>{}) : go(std::integral_constant<int, 2>{});
    };
    return dtype == BF16 ? with_type(__nv_bfloat16{}) : with_type(__half{});
}
