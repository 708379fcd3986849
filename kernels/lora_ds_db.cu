// Two skinny products of a LoRA layer's backward from one read of dY:
//
//     dS [tokens, rp] = dY Bs          dB [n, rp] = dY^T S          (Bs: scale * B in the extra columns of the weight)
//
// dY: [tokens, n], 16-bit; Bs: [n, rp], S: [tokens, rp] of the same type, all with strides; dS in that type, dB f32
// [n, rp] without stride. rp is 16, 32, 48 or 64, n a multiple of 8. f32 accumulators, tensor cores (mma.sync).
//
// Floor: memory, the bytes of dY once (two library calls read it twice). A block walks down a stripe of BN columns in
// tiles of 32 rows, fetched in the background. dB of the stripe grows in registers, where its Bs lies too. dS of a tile
// is summed over the warps in shared memory and written as a part of the sum over stripes; a second kernel adds the
// parts in a fixed order, so results are the same bits in every run on the same device. Writing and reading the parts
// costs about a quarter of dY's bytes at rp = 32 and an eighth at rp = 16. On an H100 with 8,192 tokens that makes it
// 1.6 times as fast as two library calls for rp <= 32, about as fast for 48, slower for 64.
//
// Tiles are stored with their 16-byte chunks permuted by the row (chunk ^ row % 8), which lets both the plain and the
// transposed ldmatrix read without bank conflicts.

#include "async.cuh"
#include "device.cuh"
#include "mma.cuh"

namespace {

using mma::load_matrix;
using mma::load_matrix_transposed;
using mma::multiply_add;

constexpr int BT = 32, THREADS = 256;

struct Operands {
    const void *dy, *bs, *s;
    int64_t ld_dy, ld_bs, ld_s;
    int tokens, n;
    int tiles, total, share;   // tiles of a stripe, of all stripes, of a block
    float *ds_parts, *db_parts;   // [stripes, tokens, rp], [slots, n, rp]
};

// The first block that works on a stripe; block b writes its part of dB to slot b - first.
__host__ __device__ inline int first_block(int stripe, int tiles, int share) {
    return static_cast<int>(static_cast<int64_t>(stripe) * tiles / share);
}

__host__ __device__ inline int slots_of(int stripe, int tiles, int share) {
    const int64_t last = (static_cast<int64_t>(stripe + 1) * tiles - 1) / share;
    return static_cast<int>(last) - first_block(stripe, tiles, share) + 1;
}

// Tiles: the columns of a stripe (what the registers hold of its Bs and dB), stages of the ring, and how many tiles' sums
// over the warps lie in shared memory: with one a barrier more is needed a tile.
template <int RP_, int BN_, int STAGES_, int SUM_BUFFERS_> struct Shape {
    static constexpr int RP = RP_, BN = BN_, STAGES = STAGES_, SUM_BUFFERS = SUM_BUFFERS_;
    static constexpr int S_PITCH = RP * 2 + 16;                      // bytes: an odd number of 16-byte chunks
    static constexpr int STAGE = BT * BN * 2 + BT * S_PITCH;         // bytes
    static constexpr int SUM_PITCH = RP + 8;                         // floats
    static constexpr int SUMS = 4 * BT * SUM_PITCH;                  // floats
    static constexpr int BYTES = STAGES * STAGE + SUM_BUFFERS * SUMS * 4;
};

// Calls `f` with the first of these shapes that the limits allow: Hopper and A100 (124 to 154 KB), Ampere and Ada for
// consumers (91 to 96 KB), Turing (51 to 61 KB).
template <typename Large, typename Middle, typename Small, typename F> auto first_that_fits(int bytes, F f) {
    if (Large::BYTES <= bytes) return f(Large{});
    if (Middle::BYTES <= bytes) return f(Middle{});
    return f(Small{});
}

template <typename F> auto with_shape(int64_t rp, const QloraLimits& limits, F f) {
    const int bytes = limits.shared_per_block;
    switch (rp) {
        case 16:
            return first_that_fits<Shape<16, 512, 3, 2>, Shape<16, 512, 2, 2>, Shape<16, 256, 2, 2>>(bytes, f);
        case 32:
            return first_that_fits<Shape<32, 512, 3, 2>, Shape<32, 256, 3, 2>, Shape<32, 256, 2, 1>>(bytes, f);
        case 48:
            return first_that_fits<Shape<48, 512, 3, 2>, Shape<48, 256, 2, 2>, Shape<48, 128, 2, 1>>(bytes, f);
        default:
            return first_that_fits<Shape<64, 256, 4, 2>, Shape<64, 256, 3, 1>, Shape<64, 128, 2, 1>>(bytes, f);
    }
}

template <typename T, typename Sh> __global__ void __launch_bounds__(THREADS, 1) parts_kernel(Operands o) {
    if constexpr (!mma::has_products<T>()) return;
    constexpr int RP = Sh::RP, BN = Sh::BN, STAGES = Sh::STAGES;
    constexpr int K_STEPS = BN / 64, M_TILES = BN / 128, R_TILES = RP / 8;
    extern __shared__ __align__(128) unsigned char storage[];
    float* sums = reinterpret_cast<float*>(storage + STAGES * Sh::STAGE);
    const uint32_t base = mma::shared_address(storage);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const T *dy = static_cast<const T*>(o.dy), *bs = static_cast<const T*>(o.bs), *s = static_cast<const T*>(o.s);
    const int begin = blockIdx.x * o.share, end = min(o.total, begin + o.share);
    if (begin >= end) return;

    const auto fetch_tile = [&](int unit) {
        if (unit < end) {
            const uint32_t to = base + (unit - begin) % STAGES * Sh::STAGE;
            const int t0 = unit % o.tiles * BT, n0 = unit / o.tiles * BN;
#pragma unroll
            for (int i = 0; i < BT * BN / 8 / THREADS; i++) {
                const int at = threadIdx.x + i * THREADS, row = at / (BN / 8), chunk = at % (BN / 8);
                const bool inside = t0 + row < o.tokens && n0 + chunk * 8 < o.n;
                const T* from = inside ? dy + (t0 + row) * o.ld_dy + n0 + chunk * 8 : dy;
                async::copy16<false>(to + row * (BN * 2) + (chunk ^ (row & 7)) * 16, from, inside);
            }
            if (threadIdx.x < BT * RP / 8) {
                const int row = threadIdx.x / (RP / 8), chunk = threadIdx.x % (RP / 8);
                const bool inside = t0 + row < o.tokens;
                const T* from = inside ? s + (t0 + row) * o.ld_s + chunk * 8 : s;
                async::copy16<false>(to + BT * BN * 2 + row * Sh::S_PITCH + chunk * 16, from, inside);
            }
        }
        async::commit();
    };

    // For dS a warp takes 16 rows of a tile and a quarter of its columns, for dB an eighth of the columns.
    const int half = warp % 2, quarter = warp / 2;
    uint32_t b[K_STEPS][R_TILES][2];
    float db[M_TILES][R_TILES][4];

    const auto start_stripe = [&](int stripe) {
        const int first = stripe * BN + quarter * (BN / 4);
        const auto element = [&](int row, int col) -> uint32_t {
            if (row >= o.n) return 0;
            return reinterpret_cast<const unsigned short*>(bs)[row * o.ld_bs + col];
        };
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
#pragma unroll
            for (int r = 0; r < R_TILES; r++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = first + k * 16 + h * 8 + 2 * q, col = r * 8 + g;
                    b[k][r][h] = element(row, col) | element(row + 1, col) << 16;
                }
            }
        }
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
#pragma unroll
            for (int r = 0; r < R_TILES; r++) db[m][r][0] = db[m][r][1] = db[m][r][2] = db[m][r][3] = 0.0f;
        }
    };
    const auto finish_stripe = [&](int stripe) {
        const int slot = blockIdx.x - first_block(stripe, o.tiles, o.share);
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = stripe * BN + warp * (BN / 8) + m * 16 + h * 8 + g;
                if (row >= o.n) continue;
                float* to = o.db_parts + (static_cast<int64_t>(slot) * o.n + row) * RP + 2 * q;
#pragma unroll
                for (int r = 0; r < R_TILES; r++) {
                    *reinterpret_cast<float2*>(to + r * 8) = make_float2(db[m][r][2 * h], db[m][r][2 * h + 1]);
                }
            }
        }
    };
    // Adds the quarters of dS of a tile.
    const auto write_sums = [&](int unit) {
        const float* from = sums + (unit & (Sh::SUM_BUFFERS - 1)) * Sh::SUMS;
        const int t0 = unit % o.tiles * BT, stripe = unit / o.tiles;
#pragma unroll
        for (int i = 0; i < RP / 16; i++) {
            const int at = threadIdx.x + i * THREADS, row = at / (RP / 2), col = at % (RP / 2) * 2;
            float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float2 x = *reinterpret_cast<const float2*>(from + (k * BT + row) * Sh::SUM_PITCH + col);
                sum.x += x.x;
                sum.y += x.y;
            }
            if (t0 + row < o.tokens) {
                const int64_t to = (static_cast<int64_t>(stripe) * o.tokens + t0 + row) * RP + col;
                *reinterpret_cast<float2*>(o.ds_parts + to) = sum;
            }
        }
    };

    for (int i = 0; i < STAGES - 1; i++) fetch_tile(begin + i);
    start_stripe(begin / o.tiles);
    for (int unit = begin; unit < end; unit++) {
        async::wait<STAGES - 2>();
        __syncthreads();
        // Nobody reads the oldest stage any more, and the sums of the tile before are complete.
        fetch_tile(unit + STAGES - 1);
        if (unit > begin) {
            write_sums(unit - 1);
            if (unit % o.tiles == 0) {
                finish_stripe(unit / o.tiles - 1);
                start_stripe(unit / o.tiles);
            }
            if constexpr (Sh::SUM_BUFFERS == 1) __syncthreads();   // everyone has added the sums of the tile before
        }
        const uint32_t tile = base + (unit - begin) % STAGES * Sh::STAGE, s_tile = tile + BT * BN * 2;

        float ds[R_TILES][4] = {};
        {
            const int row = half * 16 + lane % 16;
#pragma unroll
            for (int k = 0; k < K_STEPS; k++) {
                const int chunk = quarter * (BN / 32) + k * 2 + lane / 16;
                uint32_t a[4];
                load_matrix(a, tile + row * (BN * 2) + (chunk ^ (row & 7)) * 16);
#pragma unroll
                for (int r = 0; r < R_TILES; r++) multiply_add<T>(ds[r], a, b[k][r][0], b[k][r][1]);
            }
            float* to = sums + (unit & (Sh::SUM_BUFFERS - 1)) * Sh::SUMS + (quarter * BT + half * 16 + g) * Sh::SUM_PITCH + 2 * q;
#pragma unroll
            for (int r = 0; r < R_TILES; r++) {
                *reinterpret_cast<float2*>(to + r * 8) = make_float2(ds[r][0], ds[r][1]);
                *reinterpret_cast<float2*>(to + 8 * Sh::SUM_PITCH + r * 8) = make_float2(ds[r][2], ds[r][3]);
            }
        }
#pragma unroll
        for (int k = 0; k < BT / 16; k++) {
            uint32_t sb[R_TILES / 2][4];
#pragma unroll
            for (int r = 0; r < R_TILES / 2; r++) {
                const int row = k * 16 + (lane / 8 % 2) * 8 + lane % 8;
                load_matrix_transposed(sb[r], s_tile + row * Sh::S_PITCH + (r * 2 + lane / 16) * 16);
            }
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                const int row = k * 16 + (lane / 16) * 8 + lane % 8, chunk = warp * (BN / 64) + m * 2 + lane / 8 % 2;
                uint32_t a[4];
                load_matrix_transposed(a, tile + row * (BN * 2) + (chunk ^ (row & 7)) * 16);
#pragma unroll
                for (int r = 0; r < R_TILES; r++) {
                    multiply_add<T>(db[m][r], a, sb[r / 2][r % 2 * 2], sb[r / 2][r % 2 * 2 + 1]);
                }
            }
        }
    }
    __syncthreads();
    write_sums(end - 1);
    finish_stripe((end - 1) / o.tiles);
}

// dS: the sum over stripes; dB: the sum over slots. A thread adds four columns.
template <typename T, int RP, int BN>
__global__ void __launch_bounds__(256) add_kernel(Operands o, int stripes, T* ds, int64_t ld_ds, float* db) {
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * 4;
    const int64_t in_ds = static_cast<int64_t>(o.tokens) * RP, in_db = static_cast<int64_t>(o.n) * RP;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const auto add = [&](const float* from) {
        const float4 x = *reinterpret_cast<const float4*>(from);
        sum.x += x.x;
        sum.y += x.y;
        sum.z += x.z;
        sum.w += x.w;
    };
    if (i < in_ds) {
#pragma unroll 8
        for (int stripe = 0; stripe < stripes; stripe++) add(o.ds_parts + stripe * in_ds + i);
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
        store_floats(ds + i / RP * ld_ds + i % RP, values);
    } else if (i - in_ds < in_db) {
        const int64_t j = i - in_ds;
        const int slots = slots_of(static_cast<int>(j / RP / BN), o.tiles, o.share);
#pragma unroll 4
        for (int slot = 0; slot < slots; slot++) add(o.db_parts + slot * in_db + j);
        *reinterpret_cast<float4*>(db + j) = sum;
    }
}

struct Plan {
    int stripes, tiles, total, share, slots, blocks;
};

// How `total` tiles are shared out; false if the kernel cannot take the sizes.
bool make_plan(int64_t tokens, int64_t n, int64_t rp, const QloraLimits& limits, Plan& plan) {
    if (rp % 16 != 0 || rp < 16 || rp > 64 || n % 8 != 0 || n <= 0 || limits.multiprocessors <= 0) return false;
    const int width = with_shape(rp, limits, [](auto shape) { return decltype(shape)::BN; });
    const int64_t stripes = divide_up(n, width), tiles = divide_up(tokens, BT);
    if (tokens <= 0 || tokens > LARGEST_GRID / 64 || n > LARGEST_GRID / 64) return false;
    if (tiles > LARGEST_GRID / stripes) return false;
    plan.stripes = static_cast<int>(stripes);
    plan.tiles = static_cast<int>(tiles);
    plan.total = static_cast<int>(stripes * tiles);
    plan.share = static_cast<int>(divide_up(plan.total, limits.multiprocessors));
    plan.blocks = static_cast<int>(divide_up(plan.total, plan.share));
    plan.slots = (plan.tiles - 1) / plan.share + 2;
    return true;
}

}  // namespace

// The floats of the workspace; 0 if the kernel cannot take the sizes.
extern "C" int64_t qlora_lora_ds_db_workspace(int64_t tokens, int64_t n, int64_t rp, const QloraLimits* limits) {
    Plan plan;
    if (!make_plan(tokens, n, rp, *limits, plan)) return 0;
    return (plan.stripes * tokens + plan.slots * n) * rp;
}

extern "C" int qlora_lora_ds_db(int dtype, const void* dy, int64_t ld_dy, const void* bs, int64_t ld_bs, const void* s,
                                int64_t ld_s, void* ds, int64_t ld_ds, float* db, float* workspace, int64_t tokens,
                                int64_t n, int64_t rp, const QloraLimits* limits, cudaStream_t stream) {
    if (tokens == 0 && db) return static_cast<int>(cudaMemsetAsync(db, 0, n * rp * sizeof(float), stream));
    Plan plan;
    if (!make_plan(tokens, n, rp, *limits, plan) || dtype == F32) return static_cast<int>(cudaErrorInvalidValue);
    if (dtype == BF16 && !limits->bf16) return static_cast<int>(cudaErrorNotSupported);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        if constexpr (sizeof(T) == 4) {
            return static_cast<int>(cudaErrorInvalidValue);
        } else {
            T* out = static_cast<T*>(ds);
            const bool aligned = allows_vectors(static_cast<const T*>(dy), ld_dy, n, 8) &&
                                 allows_vectors(static_cast<const T*>(s), ld_s, rp, 8) &&
                                 allows_vectors(out, ld_ds, rp, 4) && allows_vectors(db, 0, 0, 4) &&
                                 allows_vectors(workspace, 0, 0, 4);
            if (!aligned) return static_cast<int>(cudaErrorInvalidValue);
            float* db_parts = workspace + static_cast<int64_t>(plan.stripes) * tokens * rp;
            const Operands o{dy, bs, s, ld_dy, ld_bs, ld_s, static_cast<int>(tokens), static_cast<int>(n),
                             plan.tiles, plan.total, plan.share, workspace, db_parts};
            const unsigned adders = static_cast<unsigned>(divide_up((tokens + n) * rp / 4, 256));
            return with_shape(rp, *limits, [&](auto shape) {
                using Sh = decltype(shape);
                constexpr auto kernel = parts_kernel<T, Sh>;
                const cudaError_t error = allow_shared<kernel>(*limits, Sh::BYTES);
                if (error != cudaSuccess) return static_cast<int>(error);
                kernel<<<plan.blocks, THREADS, Sh::BYTES, stream>>>(o);
                add_kernel<T, Sh::RP, Sh::BN><<<adders, 256, 0, stream>>>(o, plan.stripes, out, ld_ds, db);
                return static_cast<int>(cudaGetLastError());
            });
        }
    });
}
