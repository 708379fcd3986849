// The kernels around the main one of attention_backward.cu (which explains the whole): `prepare` before it, `finish`
// and `combine` after it, and the separate kernel for dq in the deterministic mode. Memory-bound except the last:
// `prepare` reads o and do and writes zeros to the f32 sums, `finish` reads the sums and writes dq.
#pragma once

#include "attention.cuh"
#include "device.cuh"

namespace attention {

constexpr int Q_BLOCK = 64; // query rows of a tile; the alignment of the sums of dq

struct BackwardArguments {
    const void *q, *k, *v, *o, *dout;
    void *dq, *dk, *dv;
    const float* lse;
    float *row_lse, *row_d; // [heads][padded]: lse * log2 e, D
    float* dq_sum;          // [heads][padded / Q_BLOCK][Q_BLOCK * D], fragment order
    float *dk_sum, *dv_sum; // [parts][tokens][kv_heads * D], only with several CTAs a group
    int64_t ldq, ldk, ldv, ldo, lddo, lddq, lddk, lddv;
    const int32_t* cu;
    int sequences, tokens, padded, heads, kv_heads, group, parts, window;
    int chunk, key_blocks;
    float scale;
};

// Adds the four values of a fragment at this lane's place of 128 floats. Vector atomics exist from sm_90 on; before,
// the lanes' values are interleaved so that each of the four instructions covers 128 contiguous bytes.
__device__ __forceinline__ void add_fragment(float* at, int lane, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(at + lane * 4), "f"(x[0]),
                 "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
#else
#pragma unroll
    for (int i = 0; i < 4; i++) atomicAdd(at + i * 32 + lane, x[i]);
#endif
}

__device__ __forceinline__ float4 read_fragment(const float* at, int lane) {
#if __CUDA_ARCH__ >= 900
    return *reinterpret_cast<const float4*>(at + lane * 4);
#else
    return make_float4(at[lane], at[32 + lane], at[64 + lane], at[96 + lane]);
#endif
}

// One CTA: Q_BLOCK rows of one head. Rows at and after `tokens` get zeros.
template <typename T, int D> __global__ __launch_bounds__(256) void prepare_kernel(const BackwardArguments a) {
    constexpr int LANES = D / 8; // a row of a head
    constexpr int ROWS = 256 / 16;
    const int head = blockIdx.x % a.heads;
    const int block = blockIdx.x / a.heads;
    const int lane = threadIdx.x % 16;
    constexpr int PASSES = Q_BLOCK / ROWS;
    // All loads first: the stores below would hold them back.
    Pack<T, 8> x[PASSES], y[PASSES];
    float lse[PASSES];
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        const int t = block * Q_BLOCK + i * ROWS + threadIdx.x / 16;
        if (t >= a.tokens || lane >= LANES) {
            x[i] = y[i] = {};
            lse[i] = 0.0f;
            continue;
        }
        x[i] = *reinterpret_cast<const Pack<T, 8>*>(static_cast<const T*>(a.o) + t * a.ldo + head * D + lane * 8);
        y[i] = *reinterpret_cast<const Pack<T, 8>*>(static_cast<const T*>(a.dout) + t * a.lddo + head * D + lane * 8);
        lse[i] = a.lse[static_cast<int64_t>(t) * a.heads + head];
    }
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (a.dq_sum) {
        float4* sum =
            reinterpret_cast<float4*>(a.dq_sum + (static_cast<int64_t>(head) * a.padded + block * Q_BLOCK) * D);
#pragma unroll
        for (int i = 0; i < Q_BLOCK * D / 4 / 256; i++) sum[threadIdx.x + i * 256] = zero;
    }
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        float d = 0.0f;
#pragma unroll
        for (int c = 0; c < 8; c++) d = fmaf(to_float(x[i].v[c]), to_float(y[i].v[c]), d);
#pragma unroll
        for (int step = 8; step > 0; step /= 2) d += __shfl_xor_sync(0xffffffffu, d, step);
        if (lane == 0) {
            const int64_t at = static_cast<int64_t>(head) * a.padded + block * Q_BLOCK + i * ROWS + threadIdx.x / 16;
            a.row_d[at] = d;
            a.row_lse[at] = lse[i] * LOG2E;
        }
    }
}

// dq from its sums. One CTA: Q_BLOCK rows of one head.
template <typename T, int D> __global__ __launch_bounds__(256) void finish_kernel(const BackwardArguments a) {
    using Rows = Tile<D>;
    __shared__ __align__(128) unsigned char shared[Q_BLOCK * Rows::PITCH];
    const uint32_t tile = shared_address(shared);
    const int head = blockIdx.x % a.heads;
    const int block = blockIdx.x / a.heads;
    const int lane = threadIdx.x % 32;
    const float* sum = a.dq_sum + (static_cast<int64_t>(head) * a.padded + block * Q_BLOCK) * D;
    constexpr int TILES = Q_BLOCK / 16 * (D / 8) / 8; // of a warp
    float4 x[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) x[i] = read_fragment(sum + (threadIdx.x / 32 + i * 8) * 128, lane);
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const int tile_index = threadIdx.x / 32 + i * 8;
        const int row = tile_index / (D / 8) * 16 + lane / 4, chunk = tile_index % (D / 8);
        store_shared(Rows::address(tile, row, chunk) + lane % 4 * 4, pack_pair<T>(x[i].x * a.scale, x[i].y * a.scale));
        store_shared(Rows::address(tile, row + 8, chunk) + lane % 4 * 4,
                     pack_pair<T>(x[i].z * a.scale, x[i].w * a.scale));
    }
    __syncthreads();
    for (int index = threadIdx.x; index < Q_BLOCK * Rows::CHUNKS; index += 256) {
        const int64_t t = block * Q_BLOCK + index / Rows::CHUNKS;
        const int chunk = index % Rows::CHUNKS;
        if (t >= a.tokens) continue;
        *reinterpret_cast<uint4*>(static_cast<T*>(a.dq) + t * a.lddq + head * D + chunk * 8) =
            load_shared16(Rows::address(tile, index / Rows::CHUNKS, chunk));
    }
}

// dk and dv where several CTAs had parts of a group: their f32 parts, added in the order of the parts.
template <typename T> __global__ __launch_bounds__(256) void combine_kernel(const BackwardArguments a, int columns) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    const int64_t t = index / (columns / 4), size = static_cast<int64_t>(a.tokens) * columns;
    const int column = static_cast<int>(index % (columns / 4)) * 4;
    if (t >= a.tokens) return;
    float k[4] = {}, v[4] = {};
    for (int part = 0; part < a.parts; part++) {
        float x[4], y[4];
        load_floats<float, 4>(a.dk_sum + part * size + t * columns + column, x);
        load_floats<float, 4>(a.dv_sum + part * size + t * columns + column, y);
#pragma unroll
        for (int c = 0; c < 4; c++) k[c] += x[c], v[c] += y[c];
    }
#pragma unroll
    for (int c = 0; c < 4; c++) k[c] *= a.scale;
    store_floats<T, 4>(static_cast<T*>(a.dk) + t * a.lddk + column, k);
    store_floats<T, 4>(static_cast<T*>(a.dv) + t * a.lddv + column, v);
}

template <int D, int BM, int BN> constexpr int query_shared_bytes() { return (2 * BM + 4 * BN) * D * 2; }

// dq without atomics: one CTA per BM queries of a head (aligned to the sequence) over the visible key blocks, as in the
// forward kernel; dS goes from the accumulators into the A operand of dS K.
template <typename T, int D, int BM, int BN, int WARPS, int CTAS>
__global__ __launch_bounds__(WARPS * 32, CTAS) void query_kernel(const BackwardArguments a) {
    if constexpr (!has_products<T>()) return;
    constexpr int THREADS = WARPS * 32, MT = BM / WARPS / 16, NT = BN / 8, DT = D / 8;
    using Rows = Tile<D>;
    const int head = blockIdx.x % a.heads;
    const int rest = blockIdx.x / a.heads;
    const int sequence = rest % a.sequences;
    const int block = gridDim.x / (a.heads * a.sequences) - 1 - rest / a.sequences;
    const int begin = a.cu[sequence], end = a.cu[sequence + 1];
    const int i0 = begin + block * BM;
    if (i0 >= end) return;
    const int rows = min(BM, end - i0), kv_head = head / a.group;
    const int first_key = a.window > 0 ? max(begin, i0 - a.window + 1) : begin;
    const int first_block = (first_key - begin) / BN;

    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t tile_q = shared_address(shared);
    const uint32_t tile_do = tile_q + BM * Rows::PITCH;
    const uint32_t tiles_k = tile_do + BM * Rows::PITCH;
    const uint32_t tiles_v = tiles_k + 2 * BN * Rows::PITCH;
    const auto load_keys = [&](int stage, int b) {
        const int64_t t = begin + b * BN;
        const int count = end - static_cast<int>(t);
        load_tile<D, BN, THREADS>(tiles_k + stage * BN * Rows::PITCH,
                                  static_cast<const T*>(a.k) + t * a.ldk + kv_head * D, a.ldk, 0, count);
        load_tile<D, BN, THREADS>(tiles_v + stage * BN * Rows::PITCH,
                                  static_cast<const T*>(a.v) + t * a.ldv + kv_head * D, a.ldv, 0, count);
    };
    load_tile<D, BM, THREADS>(tile_q, static_cast<const T*>(a.q) + i0 * a.ldq + head * D, a.ldq, 0, rows);
    load_tile<D, BM, THREADS>(tile_do, static_cast<const T*>(a.dout) + i0 * a.lddo + head * D, a.lddo, 0, rows);
    int key_block = (i0 + rows - 1 - begin) / BN;
    load_keys(0, key_block);
    async::commit();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp * MT * 16;
    const float scale2 = a.scale * LOG2E;
    float lse[MT][2], d[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = min(warp_row + m * 16 + half * 8 + lane / 4, rows - 1);
            lse[m][half] = a.row_lse[static_cast<int64_t>(head) * a.padded + i0 + row];
            d[m][half] = a.row_d[static_cast<int64_t>(head) * a.padded + i0 + row];
        }
    float dq[MT][DT][4] = {};
    for (int stage = 0; key_block >= first_block; key_block--, stage ^= 1) {
        async::wait<0>();
        __syncthreads(); // the block is here, and everyone has left the other stage
        if (key_block > first_block) load_keys(stage ^ 1, key_block - 1);
        async::commit();
        const int j0 = begin + key_block * BN;
        const int first_row = i0 + warp_row, last_row = first_row + MT * 16 - 1;
        if (j0 > last_row) continue; // the block lies beyond the diagonal for this warp

        const auto score_product = [&](float (&to)[MT][NT][4], uint32_t tile_a, uint32_t tile_b) {
            const uint32_t lane_a = Rows::lane_down(tile_a, warp_row, lane);
            const uint32_t lane_b = Rows::lane_along(tile_b, 0, lane);
            product<T, true, true, true, MT, NT, D / 16>(
                to,
                [&](int ks, uint32_t (&x)[MT][4]) {
#pragma unroll
                    for (int m = 0; m < MT; m++) load_matrix(x[m], Rows::at(lane_a, 2 * ks) + m * 16 * Rows::PITCH);
                },
                [&](int ks, int n, uint32_t (&b)[4]) {
                    load_matrix(b, Rows::at(lane_b, 2 * ks) + n * 8 * Rows::PITCH);
                });
        };
        float s[MT][NT][4], dp[MT][NT][4];
        score_product(s, tile_q, tiles_k + stage * BN * Rows::PITCH);
        score_product(dp, tile_do, tiles_v + stage * BN * Rows::PITCH);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const float p = exp2_fast(fmaf(s[m][n][c], scale2, -lse[m][c / 2]));
                    s[m][n][c] = p * (dp[m][n][c] - d[m][c / 2]);
                }
        if (j0 + BN - 1 > first_row || (a.window > 0 && j0 <= last_row - a.window)) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int i = first_row + m * 16 + half * 8 + lane / 4;
                    const int hidden = a.window > 0 ? i - a.window : -1;
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int c = 0; c < 2; c++) {
                            const int j = j0 + n * 8 + lane % 4 * 2 + c;
                            if (j > i || j <= hidden) s[m][n][half * 2 + c] = 0.0f;
                        }
                }
        }
        const uint32_t lane_b = Rows::lane_down(tiles_k + stage * BN * Rows::PITCH, 0, lane);
        product<T, false, false, true, MT, DT, BN / 16>(
            dq,
            [&](int ks, uint32_t (&x)[MT][4]) {
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        x[m][i] = pack_pair<T>(s[m][2 * ks + i / 2][i % 2 * 2], s[m][2 * ks + i / 2][i % 2 * 2 + 1]);
            },
            [&](int ks, int n, uint32_t (&b)[4]) {
                load_matrix_transposed(b, Rows::at(lane_b, n) + ks * 16 * Rows::PITCH);
            });
    }
    async::wait<0>();
    __syncwarp();
    // Through the warp's own rows of the Q tile, to leave in whole chunks.
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < DT; n++)
                store_shared(Rows::address(tile_q, warp_row + m * 16 + half * 8 + lane / 4, n) + lane % 4 * 4,
                             pack_pair<T>(dq[m][n][half * 2] * a.scale, dq[m][n][half * 2 + 1] * a.scale));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MT * 16 * Rows::CHUNKS / 32; i++) {
        const int index = lane + i * 32;
        const int row = warp_row + index / Rows::CHUNKS, chunk = index % Rows::CHUNKS;
        const uint4 x = load_shared16(Rows::address(tile_q, row, chunk));
        if (row < rows)
            *reinterpret_cast<uint4*>(static_cast<T*>(a.dq) + static_cast<int64_t>(i0 + row) * a.lddq + head * D +
                                      chunk * 8) = x;
    }
}

template <typename T, int D, int BM, int BN, int WARPS, int CTAS>
int launch_query(const BackwardArguments& a, int64_t max_len, const QloraLimits& limits, cudaStream_t stream) {
    constexpr int bytes = query_shared_bytes<D, BM, BN>();
    constexpr auto kernel = query_kernel<T, D, BM, BN, WARPS, CTAS>;
    const cudaError_t ready = allow_shared<kernel>(limits, bytes);
    if (ready != cudaSuccess) return static_cast<int>(ready);
    const int64_t grid = (max_len + BM - 1) / BM * a.sequences * a.heads;
    if (grid > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
    kernel<<<static_cast<unsigned>(grid), WARPS * 32, bytes, stream>>>(a);
    return static_cast<int>(cudaGetLastError());
}

} // namespace attention
