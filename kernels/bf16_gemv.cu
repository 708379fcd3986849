// Product of a few tokens with a weight of their own 16-bit type, for the head of a model while decoding:
//
//     y[m, n] = x[m, :] W[n, :]               m < tokens <= 16;   x, W: bf16 or f16;   y: the same type or f32
//
// Sums are f32 in the tensor cores, in a fixed order; one rounding. W [n, k] with its stride, k a multiple of 32.
//
// Floor: memory, 2 bytes a weight. As nf4_gemv.cu: a block is persistent and takes tiles of 16 rows, its warps share k,
// each the same range in all tiles, so that x stays in registers as fragments. W comes through a ring in shared memory
// (cp.async), DEPTH steps of 128 k a warp ahead. The order of k in a product is free: lane (g, t) takes the 8 elements
// 8 t ..+ 7 of 32, so that one 16-byte access is the operand of two steps.

#include "few_tokens.cuh"

namespace {

using namespace few;

constexpr int STEP = 4;                     // chunks of 32 k that a warp takes at a time
constexpr int STEP_BYTES = 16 * STEP * 64;
constexpr int MOST_WARPS = 16;

struct PlainArgs {
    const void* w;
    const void* x;
    void* y;
    int64_t ldw, ldx, ldy, rows;
    int32_t tokens, chunks, tiles;
};

template <typename T, typename Y, int NT, int KI, int DEPTH>
__global__ void __launch_bounds__(MOST_WARPS * 32, 1) plain_kernel(const __grid_constant__ PlainArgs a) {
    if constexpr (!mma::has_products<T>()) return;
    extern __shared__ __align__(128) char dynamic[];
    const int threads = blockDim.x, warps = threads / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4, first = warp * (STEP * KI);
    char* ring = dynamic + warp * (DEPTH * STEP_BYTES);
    const uint32_t ring_address = shared_address(ring);
    float* sums = reinterpret_cast<float*>(dynamic + warps * (DEPTH * STEP_BYTES));   // [2][warps][128 NT]

    // Step n of this block: k step n % KI of its tile n / KI.
    const auto fetch = [&](int n) {
        const int64_t tile = blockIdx.x + static_cast<int64_t>(n / KI) * gridDim.x;
        if (tile < a.tiles) {
            // 16 lanes take the 256 bytes of a row; 16-byte pieces are permuted so that reads meet no bank twice.
            const int q = lane % 16, chunk = first + n % KI * STEP + q / 4;
            const bool valid = chunk < a.chunks;
            const uint32_t to = ring_address + n % DEPTH * STEP_BYTES;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int r = i * 2 + lane / 16;
                const int64_t row = min(tile * 16 + r, a.rows - 1);
                const T* from = static_cast<const T*>(a.w);
                if (valid) from += row * a.ldw + chunk * 32 + q % 4 * 8;
                async::copy16(to + r * 256 + ((q ^ ((r & 1) * 4)) << 4), from, valid);
            }
        }
        async::commit();
    };
    let_next_begin();
#pragma unroll
    for (int n = 0; n < DEPTH; n++) fetch(n);
    wait_for_previous();
    uint4 x[KI * STEP][NT];
#pragma unroll
    for (int c = 0; c < KI * STEP; c++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int token = n * 8 + g;
            const bool valid = token < a.tokens && first + c < a.chunks;
            const T* p = static_cast<const T*>(a.x) + token * a.ldx + (first + c) * 32 + t * 8;
            x[c][n] = valid ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
        }

    const int e = threadIdx.x % 128, slot = e / 16 + (e >> 1 & 1) * 8;
    const int token = threadIdx.x / 128 * 8 + (e >> 2 & 3) * 2 + (e & 1);
    int step = 0, buffer = 0;
    for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        float sum[2][NT][4] = {};   // two chains
#pragma unroll
        for (int ki = 0; ki < KI; ki++, step++) {
            async::wait<DEPTH - 1>();
            __syncwarp();
            const char* from = ring + step % DEPTH * STEP_BYTES + g * 256;
#pragma unroll
            for (int c = 0; c < STEP; c++) {
                const int at = ((c * 4 + t) ^ ((g & 1) * 4)) << 4;
                const uint4 low = *reinterpret_cast<const uint4*>(from + at);
                const uint4 high = *reinterpret_cast<const uint4*>(from + 8 * 256 + at);
                const uint32_t w0[4] = {low.x, high.x, low.y, high.y}, w1[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const uint4 b = x[ki * STEP + c][n];
                    multiply_add<T>(sum[0][n], w0, b.x, b.y);
                    multiply_add<T>(sum[1][n], w1, b.z, b.w);
                }
            }
            __syncwarp();
            fetch(step + DEPTH);
        }
        float4* to = reinterpret_cast<float4*>(sums + (buffer * warps + warp) * 128 * NT);
#pragma unroll
        for (int n = 0; n < NT; n++)
            to[n * 32 + lane] = make_float4(sum[0][n][0] + sum[1][n][0], sum[0][n][1] + sum[1][n][1],
                                            sum[0][n][2] + sum[1][n][2], sum[0][n][3] + sum[1][n][3]);
        __syncthreads();
        const int64_t row = tile * 16 + slot;
        if (threadIdx.x < 128 * NT && token < a.tokens && row < a.rows) {
            const float* parts = sums + buffer * warps * 128 * NT + threadIdx.x;
            float total = 0.0f;
            for (int w = 0; w < warps; w++) total += parts[w * 128 * NT];
            static_cast<Y*>(a.y)[token * a.ldy + row] = from_float<Y>(total);
        }
        buffer ^= 1;
    }
    async::wait<0>();
}

template <int NT, int KI> int warps_of(int chunks) {
    const int warps = static_cast<int>(divide_up(chunks, STEP * KI));
    return warps < 4 * NT ? 4 * NT : warps;   // one thread an element
}

template <int NT, int DEPTH> size_t shared_of(int warps) {
    return warps * (DEPTH * STEP_BYTES + 2 * 128 * NT * sizeof(float));
}

template <typename T, typename Y, int NT, int KI, int DEPTH>
int launch_plain(const PlainArgs& a, const QloraLimits& limits, bool early, cudaStream_t stream) {
    const int warps = warps_of<NT, KI>(a.chunks);
    if (warps > MOST_WARPS) return static_cast<int>(cudaErrorInvalidValue);
    const size_t shared = shared_of<NT, DEPTH>(warps);
    const int64_t most = static_cast<int64_t>(limits.multiprocessors) * (MOST_WARPS / warps);
    constexpr auto KERNEL = plain_kernel<T, Y, NT, KI, DEPTH>;
    const cudaError_t error = allow_shared<KERNEL>(limits, shared);
    if (error != cudaSuccess) return static_cast<int>(error);
    return launch(KERNEL, dim3(static_cast<unsigned>(a.tiles < most ? a.tiles : most)), dim3(warps * 32), shared, early,
                  stream, a);
}

}  // namespace

extern "C" int qlora_bf16_gemv(int dtype, const void* w, int64_t ldw, const void* x, int64_t ldx, int y_dtype, void* y,
                               int64_t ldy, int64_t tokens, int64_t rows, int64_t k, int early, const QloraLimits* limits,
                               cudaStream_t stream) {
    if (tokens <= 0 || rows <= 0) return static_cast<int>(cudaSuccess);
    if (tokens > 16 || !is_activation(dtype, *limits) || (y_dtype != dtype && y_dtype != F32) || k <= 0 || k % 32 != 0 ||
        k > 8192 || divide_up(rows, 16) > INT32_MAX || !attention::aligned16(w, ldw) || !attention::aligned16(x, ldx)) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    PlainArgs a{w, x, y, ldw, ldx, ldy, rows, static_cast<int32_t>(tokens), static_cast<int32_t>(k / 32),
                static_cast<int32_t>(divide_up(rows, 16))};
    const auto with_types = [&](auto zero, auto y_zero) {
        using T = decltype(zero);
        using Y = decltype(y_zero);
        // Where k is long, or shared memory small, a warp takes more of k.
        const bool long_k = k > 4096 || limits->shared_per_block < 150 * 1024;
        // Where even that is too much, no step is fetched ahead.
        const auto eight = [&](const PlainArgs& part) {
            if (shared_of<1, 2>(warps_of<1, 4>(part.chunks)) <= static_cast<size_t>(limits->shared_per_block))
                return launch_plain<T, Y, 1, 4, 2>(part, *limits, early, stream);
            return launch_plain<T, Y, 1, 4, 1>(part, *limits, early, stream);
        };
        if (long_k && tokens > 8) {
            // The fragments of 16 tokens would not fit into the registers then: two passes.
            PlainArgs halves[2] = {a, a};
            halves[0].tokens = 8;
            halves[1].tokens -= 8;
            halves[1].x = static_cast<const T*>(x) + 8 * ldx;
            halves[1].y = static_cast<Y*>(y) + 8 * ldy;
            const int error = eight(halves[0]);
            return error ? error : eight(halves[1]);
        }
        if (long_k) return eight(a);
        return tokens <= 8 ? launch_plain<T, Y, 1, 2, 2>(a, *limits, early, stream)
                           : launch_plain<T, Y, 2, 2, 2>(a, *limits, early, stream);
    };
    const auto with_type = [&](auto zero) {
        return y_dtype == F32 ? with_types(zero, float{}) : with_types(zero, zero);
    };
    return dtype == BF16 ? with_type(__nv_bfloat16{}) : with_type(__half{});
}
