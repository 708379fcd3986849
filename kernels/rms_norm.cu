// Root mean square normalization of groups of columns (a whole row, or each head of it), forward and backward.
//
//     x += delta (optional, rounded to x's type)      rstd = 1 / sqrt(mean(x^2) + eps)      y = x * rstd * weight
//     dx (+)= rstd * (weight * dy - x * rstd^2 * mean(weight * dy * x))
//
// x, delta, y, dy, dx: [rows, groups * width] with their own strides; weight: f32 [width]; rstd: f32 [rows * groups].
// The weight is frozen and gets no gradient. Sums are f32 in a fixed order.
//
// Floor: memory. A group is read once into registers (as stored, so 16 bytes take 4 registers), summed by shuffles and,
// above 1024 bf16 columns, through shared memory, then written. The weight comes from the caches.
// Bytes per element of s bytes: forward 2s, with delta 4s; backward 3s, accumulating 4s.

#include "common.cuh"
#include "dependent.cuh"

namespace {

// LANES threads share a group, several groups a block of 128; LANES = 0: all threads of a block, a multiple of 32.
template <int LANES> constexpr int LARGEST_BLOCK = LANES > 0 ? 128 : 512;

// Where the group of a thread starts and how its columns are shared.
struct Groups {
    uint32_t total;   // rows * groups
    uint32_t width;
    Divisor groups;
    float mean;       // 1 / width
};

template <int LANES> struct Place {
    uint32_t item, lane, lanes;
    uint32_t cols;   // 0 for threads behind the last group: they only take part in the sums
    int64_t row, col;

    __device__ explicit Place(const Groups& g) {
        if constexpr (LANES > 0) {
            item = blockIdx.x * (LARGEST_BLOCK<LANES> / LANES) + threadIdx.x / LANES;
            lane = threadIdx.x % LANES;
            lanes = LANES;
        } else {
            item = blockIdx.x;
            lane = threadIdx.x;
            lanes = blockDim.x;
        }
        cols = item < g.total ? g.width : 0;
        if (item >= g.total) item = g.total - 1;
        row = g.groups.quotient(item);
        col = static_cast<int64_t>(item - static_cast<uint32_t>(row) * g.groups.d) * g.width;
    }
};

// The sum over the threads of a group, in a fixed order; all of them get it.
template <int LANES> __device__ __forceinline__ float sum_group(float x) {
    if constexpr (LANES > 0) {
        return sum_lanes<LANES, float>(x, nullptr);
    } else {
        __shared__ float parts[LARGEST_BLOCK<0> / 32];
        x = sum_lanes<32, float>(x, nullptr);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
        __syncthreads();
        const uint32_t lane = threadIdx.x % 32;
        return sum_lanes<32, float>(lane < blockDim.x / 32 ? parts[lane] : 0.0f, nullptr);
    }
}

template <int N> __device__ __forceinline__ float sum_of_squares(const float (&x)[N]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) sum += x[i] * x[i];
    return sum;
}

// PACKS accesses a thread hold a group in registers; PACKS = 0: a group of any width, read twice.
template <typename T, int N, int LANES, int PACKS, bool ADD>
__global__ void __launch_bounds__(LARGEST_BLOCK<LANES>)
    forward_kernel(T* x, int64_t ldx, const T* delta, int64_t ld_delta, const float* __restrict__ weight, float eps,
                   T* y, int64_t ldy, float* rstd, Groups g) {
    let_next_begin();
    wait_for_previous();
    const Place<LANES> at(g);
    x += at.row * ldx + at.col;
    y += at.row * ldy + at.col;
    if (ADD) delta += at.row * ld_delta + at.col;

    float sum = 0;
    Pack<T, N> kept[PACKS > 0 ? PACKS : 1];
    if constexpr (PACKS > 0) {
        Pack<T, N> added[PACKS];
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const uint32_t c = (k * at.lanes + at.lane) * N;
            if (c < at.cols) kept[k] = load_pack<T, N>(x + c);
            if (ADD && c < at.cols) added[k] = load_pack<T, N>(delta + c);
        }
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const uint32_t c = (k * at.lanes + at.lane) * N;
            if (c >= at.cols) continue;
            float values[N];
            if constexpr (ADD) {
#pragma unroll
                for (int i = 0; i < N; i++) {
                    kept[k].v[i] = from_float<T>(to_float(kept[k].v[i]) + to_float(added[k].v[i]));
                }
                *reinterpret_cast<Pack<T, N>*>(x + c) = kept[k];
            }
            unpack(kept[k], values);
            sum += sum_of_squares(values);
        }
    } else {
        for (uint32_t c = at.lane * N; c < at.cols; c += at.lanes * N) {
            float values[N];
            Pack<T, N> pack = load_pack<T, N>(x + c);
            if constexpr (ADD) {
                const Pack<T, N> added = load_pack<T, N>(delta + c);
#pragma unroll
                for (int i = 0; i < N; i++) pack.v[i] = from_float<T>(to_float(pack.v[i]) + to_float(added.v[i]));
                *reinterpret_cast<Pack<T, N>*>(x + c) = pack;
            }
            unpack(pack, values);
            sum += sum_of_squares(values);
        }
    }
    sum = sum_group<LANES>(sum);
    const float scale = 1.0f / sqrtf(sum * g.mean + eps);
    if (at.lane == 0 && at.cols > 0) rstd[at.item] = scale;

    const auto write = [&](const Pack<T, N>& pack, uint32_t c) {
        float values[N], w[N];
        unpack(pack, values);
        load_floats(weight + c, w);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = values[i] * scale * w[i];
        store_floats(y + c, values);
    };
    if constexpr (PACKS > 0) {
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const uint32_t c = (k * at.lanes + at.lane) * N;
            if (c < at.cols) write(kept[k], c);
        }
    } else {
        for (uint32_t c = at.lane * N; c < at.cols; c += at.lanes * N) write(load_pack<T, N>(x + c), c);
    }
}

template <int N>
__device__ __forceinline__ float dot3(const float (&x)[N], const float (&dy)[N], const float (&w)[N]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) sum += w[i] * dy[i] * x[i];
    return sum;
}

// `dx` may be `dy`: a thread reads its elements before it writes them.
template <typename T, int N, int LANES, int PACKS, bool ACCUMULATE>
__global__ void __launch_bounds__(LARGEST_BLOCK<LANES>)
    backward_kernel(const T* x, int64_t ldx, const float* __restrict__ weight, const float* __restrict__ rstd,
                    const T* dy, int64_t lddy, T* dx, int64_t lddx, Groups g) {
    const Place<LANES> at(g);
    x += at.row * ldx + at.col;
    dy += at.row * lddy + at.col;
    dx += at.row * lddx + at.col;
    const float scale = rstd[at.item];

    float sum = 0;
    Pack<T, N> kept_x[PACKS > 0 ? PACKS : 1], kept_dy[PACKS > 0 ? PACKS : 1], kept_dx[PACKS > 0 ? PACKS : 1];
    float values[N], grads[N], w[N];
    if constexpr (PACKS > 0) {
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const uint32_t c = (k * at.lanes + at.lane) * N;
            if (c < at.cols) {
                kept_x[k] = load_pack<T, N>(x + c);
                kept_dy[k] = load_pack<T, N>(dy + c);
                if (ACCUMULATE) kept_dx[k] = load_pack<T, N>(dx + c);
            }
        }
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const uint32_t c = (k * at.lanes + at.lane) * N;
            if (c >= at.cols) continue;
            unpack(kept_x[k], values);
            unpack(kept_dy[k], grads);
            load_floats(weight + c, w);
            sum += dot3(values, grads, w);
        }
    } else {
        for (uint32_t c = at.lane * N; c < at.cols; c += at.lanes * N) {
            load_floats(x + c, values);
            load_floats(dy + c, grads);
            load_floats(weight + c, w);
            sum += dot3(values, grads, w);
        }
    }
    const float along = scale * scale * sum_group<LANES>(sum) * g.mean;

    const auto write = [&](const Pack<T, N>& x_pack, const Pack<T, N>& dy_pack, const Pack<T, N>& dx_pack, uint32_t c) {
        unpack(x_pack, values);
        unpack(dy_pack, grads);
        load_floats(weight + c, w);
#pragma unroll
        for (int i = 0; i < N; i++) {
            values[i] = scale * (w[i] * grads[i] - values[i] * along);
            if (ACCUMULATE) values[i] += to_float(dx_pack.v[i]);
        }
        store_floats(dx + c, values);
    };
    if constexpr (PACKS > 0) {
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            const uint32_t c = (k * at.lanes + at.lane) * N;
            if (c < at.cols) write(kept_x[k], kept_dy[k], kept_dx[k], c);
        }
    } else {
        for (uint32_t c = at.lane * N; c < at.cols; c += at.lanes * N) {
            Pack<T, N> before{};
            if (ACCUMULATE) before = load_pack<T, N>(dx + c);
            write(load_pack<T, N>(x + c), load_pack<T, N>(dy + c), before, c);
        }
    }
}

// How a group is shared: calls `f` with LANES, PACKS and the threads of a block. `light` is the forward without an
// addition: it has the fewest bytes in flight, so a thread takes more of them. With `few` groups the card is idle and
// latency is all: as many threads as there are accesses.
template <typename F> int with_shape(int64_t width, int n, bool vectors, bool light, bool few, F f) {
    const int64_t packs = width / n;
    const auto threads = [&](int64_t each) { return static_cast<unsigned>(divide_up(packs, each * 32) * 32); };
    constexpr std::integral_constant<int, 0> block{};
    if (!vectors || packs > 2048) return f(block, std::integral_constant<int, 0>{}, 256u);
    if (packs <= 16) return f(std::integral_constant<int, 16>{}, std::integral_constant<int, 1>{}, 128u);
    if (packs <= 128) return f(std::integral_constant<int, 32>{}, std::integral_constant<int, 4>{}, 128u);
    if (few && packs <= LARGEST_BLOCK<0>) return f(block, std::integral_constant<int, 1>{}, threads(1));
    if (light) return f(block, std::integral_constant<int, 8>{}, threads(8));
    return f(block, std::integral_constant<int, 4>{}, threads(4));
}

bool fits(int64_t rows, int64_t width, int64_t groups) {
    return width > 0 && width < LARGEST_GRID / 2 && groups > 0 && groups <= LARGEST_GRID &&
           rows <= LARGEST_GRID / groups;
}

Groups describe(int64_t rows, int64_t width, int64_t groups) {
    return {static_cast<uint32_t>(rows * groups), static_cast<uint32_t>(width), Divisor(static_cast<uint32_t>(groups)),
            1.0f / static_cast<float>(width)};
}

template <int LANES> unsigned blocks(const Groups& g) {
    if constexpr (LANES == 0) return g.total;
    return static_cast<unsigned>(divide_up(g.total, LARGEST_BLOCK<LANES> / (LANES > 0 ? LANES : 1)));
}

}  // namespace

extern "C" int qlora_rms_norm_forward(int dtype, void* x, int64_t ldx, const void* delta, int64_t ld_delta,
                                      const float* weight, float eps, void* y, int64_t ldy, float* rstd, int64_t rows,
                                      int64_t width, int64_t groups, int early, cudaStream_t stream) {
    if (rows <= 0) return static_cast<int>(cudaSuccess);
    if (!fits(rows, width, groups)) return static_cast<int>(cudaErrorInvalidValue);
    const Groups g = describe(rows, width, groups);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        T *xt = static_cast<T*>(x), *yt = static_cast<T*>(y);
        const T* dt = static_cast<const T*>(delta);
        const bool vectors = allows_vectors(xt, ldx, width, VECTOR<T>) && allows_vectors(yt, ldy, width, VECTOR<T>) &&
                             (!dt || allows_vectors(dt, ld_delta, width, VECTOR<T>)) && allows_vectors(weight, 0, 0, 4);
        const bool few = rows * groups <= 64;
        const auto launch = [&](auto n, auto lanes, auto packs, unsigned threads, auto add) {
            const auto kernel = forward_kernel<T, n(), lanes(), packs(), add()>;
            const dim3 grid(blocks<lanes()>(g));
            // Between the short kernels of generation a launch that waits costs more than the norm.
            if (few) {
                return launch_early(kernel, grid, dim3(threads), early != 0, stream, xt, ldx, dt, ld_delta, weight, eps,
                                    yt, ldy, rstd, g);
            }
            kernel<<<grid, threads, 0, stream>>>(xt, ldx, dt, ld_delta, weight, eps, yt, ldy, rstd, g);
            return static_cast<int>(cudaGetLastError());
        };
        return with_shape(width, VECTOR<T>, vectors, !dt, few, [&](auto lanes, auto packs, unsigned threads) {
            const auto go = [&](auto n) {
                if (dt) return launch(n, lanes, packs, threads, std::true_type{});
                return launch(n, lanes, packs, threads, std::false_type{});
            };
            if (packs() == 0 && !vectors) return go(std::integral_constant<int, 1>{});
            return go(std::integral_constant<int, VECTOR<T>>{});
        });
    });
}

extern "C" int qlora_rms_norm_backward(int dtype, const void* x, int64_t ldx, const float* weight, const float* rstd,
                                       const void* dy, int64_t lddy, void* dx, int64_t lddx, int accumulate,
                                       int64_t rows, int64_t width, int64_t groups, cudaStream_t stream) {
    if (rows <= 0) return static_cast<int>(cudaSuccess);
    if (!fits(rows, width, groups)) return static_cast<int>(cudaErrorInvalidValue);
    const Groups g = describe(rows, width, groups);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T *xt = static_cast<const T*>(x), *dyt = static_cast<const T*>(dy);
        T* dxt = static_cast<T*>(dx);
        const bool vectors = allows_vectors(xt, ldx, width, VECTOR<T>) && allows_vectors(dyt, lddy, width, VECTOR<T>) &&
                             allows_vectors(dxt, lddx, width, VECTOR<T>) && allows_vectors(weight, 0, 0, 4);
        const auto launch = [&](auto n, auto lanes, auto packs, unsigned threads, auto add) {
            backward_kernel<T, n(), lanes(), packs(), add()><<<blocks<lanes()>(g), threads, 0, stream>>>(
                xt, ldx, weight, rstd, dyt, lddy, dxt, lddx, g);
            return static_cast<int>(cudaGetLastError());
        };
        return with_shape(width, VECTOR<T>, vectors, false, false, [&](auto lanes, auto packs, unsigned threads) {
            const auto go = [&](auto n) {
                if (accumulate) return launch(n, lanes, packs, threads, std::true_type{});
                return launch(n, lanes, packs, threads, std::false_type{});
            };
            if (packs() == 0 && !vectors) return go(std::integral_constant<int, 1>{});
            return go(std::integral_constant<int, VECTOR<T>>{});
        });
    });
}
