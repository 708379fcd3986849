// Causal grouped-query attention over packed sequences, backward. With P = exp(scale q k^T - lse) recomputed:
//   dv = P^T do,  dS = P (do v^T - D) with D = rowsum(do o),  dk = scale dS^T q,  dq = scale dS k.
// Layouts, masks and types as in attention_forward.cu, q and k with the same sequences (cu), so that query t sees key u
// of the same sequence iff u <= t (and u > t - window) in numbers of the packed rows. f32 sums; P and dS are rounded to
// the element type for the products they enter.
//
// 1. prepare: D and lse * log2 e, [heads][padded tokens] in the workspace, and zeros in the sums of dq.
//
// 2. main: one CTA of 8 warps per 128 keys of a sequence and one or more query heads of a group. dK and dV stay in
// registers while the CTA walks the blocks of 64 queries of all its heads: 5 products a tile, warp tiles of 32 x 32 and
// 32 x 64, P and dS through shared memory. Pipelined: between two barriers the scores of the next tile and the products
// of the current one, which are independent; the two warps of a scheduler take these halves in opposite order, so that
// the exponentials of one run under the mma of the other.
//
// dQ goes to f32 sums in the workspace by vector atomics, in the order of the mma fragments (512 contiguous bytes a
// warp); `finish` puts it in rows. Query blocks are aligned to the packed rows, not to the sequences, so that the sums
// of a block have one place; rows of other sequences are read as zeros and then add zeros. About one wave of CTAs works
// on few heads at a time, which keeps the sums in L2.
//
// With few CTAs (short inputs) each gets a part of the group's query heads and leaves its dK and dV as f32 in the
// workspace; `combine` adds the parts in a fixed order.
//
// 3. deterministic: no atomics. The main kernel leaves dQ out, and a kernel like the forward one computes it: 7
// products.
//
// Floor: 10 D FLOP a visible pair and head (14 D deterministic) at about 62% of the tensor rate of Hopper (mma.sync).

#include "attention_backward.cuh"

#include <algorithm>

namespace attention {

// STAGES tiles of queries and of do; with three of them P and dS are doubled as well.
template <int D, int BN, int STAGES> constexpr int backward_shared_bytes() {
    return (2 * BN * D + 2 * STAGES * Q_BLOCK * D + (STAGES == 3 ? 4 : 2) * Q_BLOCK * BN) * 2 +
           STAGES * 2 * Q_BLOCK * 4;
}

// SCORE_ROWS, KEY_ROWS, QUERY_ROWS: warps along the rows of the score tile (queries), of dK and dV (keys) and of dQ
// (queries); the others stand along the columns. AHEAD: fragments fetched one step early, bits for A and B of the
// scores, of dK and dV, of dQ.
template <typename T, int D, int BN, int WARPS, int CTAS, int STAGES, int SCORE_ROWS, int KEY_ROWS, int QUERY_ROWS,
          bool WITH_DQ, int AHEAD = 0, bool STAGGER = false>
__global__ __launch_bounds__(WARPS * 32, CTAS) void backward_kernel(const BackwardArguments a) {
    if constexpr (!has_products<T>()) return;
    constexpr int BM = Q_BLOCK, THREADS = WARPS * 32;
    constexpr int S_COLS = BN / (WARPS / SCORE_ROWS), K_COLS = D / (WARPS / KEY_ROWS),
                  Q_COLS = D / (WARPS / QUERY_ROWS);
    constexpr int SM = BM / SCORE_ROWS / 16, SN = S_COLS / 8; // tiles of 16 rows, of 8 columns
    constexpr int KM = BN / KEY_ROWS / 16, KN = K_COLS / 8;
    constexpr int QM = BM / QUERY_ROWS / 16, QN = Q_COLS / 8;
    static_assert(SM > 0 && KM > 0 && QM > 0 && SN % 2 == 0 && KN % 2 == 0 && QN % 2 == 0, "tiles of 16 x 16 at least");
    constexpr bool PIPELINED = STAGES == 3;
    using Rows = Tile<D>;
    using Scores = Tile<BN>;

    // Units (a sequence and a part of a group) go in chunks; within a chunk the first key blocks, which see the most
    // queries, start first.
    const int units = a.sequences * a.kv_heads * a.parts;
    const int chunk = blockIdx.x / (a.chunk * a.key_blocks);
    const int rest = blockIdx.x - chunk * a.chunk * a.key_blocks;
    const int size = min(a.chunk, units - chunk * a.chunk);
    const int unit = chunk * a.chunk + rest % size;
    const int part = unit % (a.kv_heads * a.parts), sequence = unit / (a.kv_heads * a.parts);
    const int begin = a.cu[sequence], end = a.cu[sequence + 1];
    const int j0 = begin + rest / size * BN;
    if (j0 >= end) return;
    const int kv_head = part / a.parts;
    const int heads = a.group / a.parts; // of this CTA
    const int first_head = part * heads;
    const int keys = min(BN, end - j0);
    const int last_query = a.window > 0 ? min(end - 1, j0 + keys - 1 + a.window - 1) : end - 1;
    const int first_block = j0 / BM, last_block = last_query / BM;
    const int steps = (last_block - first_block + 1) * heads;

    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t tile_k = shared_address(shared);
    const uint32_t tile_v = tile_k + BN * Rows::PITCH;
    const uint32_t tiles_q = tile_v + BN * Rows::PITCH;
    const uint32_t tiles_do = tiles_q + STAGES * BM * Rows::PITCH;
    const uint32_t tiles_p = tiles_do + STAGES * BM * Rows::PITCH;
    const uint32_t tiles_ds = tiles_p + (PIPELINED ? 2 : 1) * BM * Scores::PITCH;
    const uint32_t row_values = tiles_ds + (PIPELINED ? 2 : 1) * BM * Scores::PITCH; // [STAGES][lse, D][BM]

    // The walk: all query blocks of a head, then the next head.
    struct Place {
        int head, block, stage;
    };
    const auto advance = [&](Place& at) {
        if (++at.block > last_block) at.block = first_block, at.head++;
        if (++at.stage == STAGES) at.stage = 0;
    };
    const auto load_queries = [&](const Place& at) {
        const int64_t t0 = static_cast<int64_t>(at.block) * BM;
        const int first = max(0, begin - at.block * BM), last = end - at.block * BM;
        load_tile<D, BM, THREADS>(tiles_q + at.stage * BM * Rows::PITCH,
                                  static_cast<const T*>(a.q) + t0 * a.ldq + at.head * D, a.ldq, first, last);
        load_tile<D, BM, THREADS>(tiles_do + at.stage * BM * Rows::PITCH,
                                  static_cast<const T*>(a.dout) + t0 * a.lddo + at.head * D, a.lddo, first, last);
#pragma unroll
        for (int i = 0; i < 2 * BM; i += THREADS) {
            const int index = threadIdx.x + i, row = index % BM;
            if (index < 2 * BM) {
                const float* values = index < BM ? a.row_lse : a.row_d;
                async::copy4(row_values + (at.stage * 2 * BM + index) * 4,
                            values + static_cast<int64_t>(at.head) * a.padded + t0 + row, row >= first && row < last);
            }
        }
    };

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int s_row = warp % SCORE_ROWS * (SM * 16), s_col = warp / SCORE_ROWS * S_COLS;
    const int k_row = warp % KEY_ROWS * (KM * 16), k_col = warp / KEY_ROWS * K_COLS;
    const int q_row = warp % QUERY_ROWS * (QM * 16), q_col = warp / QUERY_ROWS * Q_COLS;
    const float scale2 = a.scale * LOG2E;

    // P and dS of a tile, from the registers to shared memory.
    const auto scores = [&](const Place& at, int buffer) {
        const int i0 = at.block * BM;
        // rows . columns^T of two [rows][D] tiles
        const auto score_product = [&](float (&d)[SM][SN][4], uint32_t tile_a, uint32_t tile_b) {
            const uint32_t lane_a = Rows::lane_down(tile_a, s_row, lane);
            const uint32_t lane_b = Rows::lane_along(tile_b, s_col, lane);
            product<T, true, (AHEAD & 1) != 0, (AHEAD & 2) != 0, SM, SN, D / 16>(
                d,
                [&](int ks, uint32_t (&x)[SM][4]) {
#pragma unroll
                    for (int m = 0; m < SM; m++) load_matrix(x[m], Rows::at(lane_a, 2 * ks) + m * 16 * Rows::PITCH);
                },
                [&](int ks, int n, uint32_t (&y)[4]) {
                    load_matrix(y, Rows::at(lane_b, 2 * ks) + n * 8 * Rows::PITCH);
                });
        };
        float s[SM][SN][4];
        score_product(s, tiles_q + at.stage * BM * Rows::PITCH, tile_k);
        const uint32_t lane_values = row_values + (at.stage * 2 * BM + s_row + lane / 4) * 4;
#pragma unroll
        for (int m = 0; m < SM; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float lse = load_shared(lane_values + (m * 16 + half * 8) * 4);
#pragma unroll
                for (int n = 0; n < SN; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        float& x = s[m][n][half * 2 + c];
                        x = exp2_fast(fmaf(x, scale2, -lse));
                    }
            }
        const bool cut_diagonal = j0 + BN - 1 > i0;
        const bool cut_window = a.window > 0 && j0 <= i0 + BM - 1 - a.window;
        if (cut_diagonal || cut_window) {
#pragma unroll
            for (int m = 0; m < SM; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int i = i0 + s_row + m * 16 + half * 8 + lane / 4;
                    const int hidden = a.window > 0 ? i - a.window : -1;
#pragma unroll
                    for (int n = 0; n < SN; n++)
#pragma unroll
                        for (int c = 0; c < 2; c++) {
                            const int j = j0 + s_col + n * 8 + lane % 4 * 2 + c;
                            if (j > i || j <= hidden) s[m][n][half * 2 + c] = 0.0f;
                        }
                }
        }

        float dp[SM][SN][4];
        score_product(dp, tiles_do + at.stage * BM * Rows::PITCH, tile_v);
#pragma unroll
        for (int m = 0; m < SM; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float d = load_shared(lane_values + (BM + m * 16 + half * 8) * 4);
                const int row = s_row + m * 16 + half * 8 + lane / 4;
#pragma unroll
                for (int n = 0; n < SN; n++) {
                    const float p0 = s[m][n][half * 2], p1 = s[m][n][half * 2 + 1];
                    const float ds0 = p0 * (dp[m][n][half * 2] - d), ds1 = p1 * (dp[m][n][half * 2 + 1] - d);
                    const uint32_t offset =
                        Scores::address(buffer * BM * Scores::PITCH, row, s_col / 8 + n) + lane % 4 * 4;
                    store_shared(tiles_p + offset, pack_pair<T>(p0, p1));
                    store_shared(tiles_ds + offset, pack_pair<T>(ds0, ds1));
                }
            }
    };

    float dk[KM][KN][4] = {}, dv[KM][KN][4] = {};
    // dV += P^T dO, dK += dS^T Q.
    const auto key_products = [&](const Place& at, int buffer) {
        const auto key_product = [&](float (&sum)[KM][KN][4], uint32_t tile_a, uint32_t tile_b) {
            const uint32_t lane_a = Scores::at(Scores::lane_along(tile_a, 0, lane), k_row / 8);
            const uint32_t lane_b = Rows::lane_down(tile_b, 0, lane);
            product<T, false, (AHEAD & 4) != 0, (AHEAD & 8) != 0, KM, KN, BM / 16>(
                sum,
                [&](int ks, uint32_t (&x)[KM][4]) {
#pragma unroll
                    for (int m = 0; m < KM; m++)
                        load_matrix_transposed(x[m], Scores::at(lane_a, m * 2) + ks * 16 * Scores::PITCH);
                },
                [&](int ks, int n, uint32_t (&y)[4]) {
                    load_matrix_transposed(y, Rows::at(lane_b, k_col / 8 + n) + ks * 16 * Rows::PITCH);
                });
        };
        key_product(dv, tiles_p + buffer * BM * Scores::PITCH, tiles_do + at.stage * BM * Rows::PITCH);
        key_product(dk, tiles_ds + buffer * BM * Scores::PITCH, tiles_q + at.stage * BM * Rows::PITCH);
    };
    // dQ of this tile, dS K, into its sums.
    const auto query_product = [&](const Place& at, int buffer) {
        if constexpr (WITH_DQ) {
            float dq[QM][QN][4];
            const uint32_t lane_a = Scores::lane_down(tiles_ds + buffer * BM * Scores::PITCH, q_row, lane);
            const uint32_t lane_b = Rows::lane_down(tile_k, 0, lane);
            product<T, true, (AHEAD & 16) != 0, (AHEAD & 32) != 0, QM, QN, BN / 16>(
                dq,
                [&](int ks, uint32_t (&x)[QM][4]) {
#pragma unroll
                    for (int m = 0; m < QM; m++) load_matrix(x[m], Scores::at(lane_a, 2 * ks) + m * 16 * Scores::PITCH);
                },
                [&](int ks, int n, uint32_t (&y)[4]) {
                    load_matrix_transposed(y, Rows::at(lane_b, q_col / 8 + n) + ks * 16 * Rows::PITCH);
                });
            float* sum = a.dq_sum + (static_cast<int64_t>(at.head) * a.padded + at.block * BM) * D;
#pragma unroll
            for (int m = 0; m < QM; m++)
#pragma unroll
                for (int n = 0; n < QN; n++)
                    add_fragment(sum + ((q_row / 16 + m) * (D / 8) + q_col / 8 + n) * 128, lane, dq[m][n]);
        }
    };

    load_tile<D, BN, THREADS>(tile_k, static_cast<const T*>(a.k) + j0 * a.ldk + kv_head * D, a.ldk, 0, keys);
    load_tile<D, BN, THREADS>(tile_v, static_cast<const T*>(a.v) + j0 * a.ldv + kv_head * D, a.ldv, 0, keys);
    Place here{first_head, first_block, 0}, next = here;
    load_queries(here);
    async::commit();
    advance(next);
    if constexpr (PIPELINED) {
        // One barrier a tile: between two of them the scores of the next tile and the products of this one, which do
        // not depend on each other, while the tile after the next arrives.
        Place coming = next;
        if (steps > 1) load_queries(coming);
        async::commit();
        advance(coming);
        async::wait<1>();
        __syncthreads();
        scores(here, 0);
        for (int step = 0; step < steps; step++) {
            async::wait<0>();
            __syncthreads(); // P and dS of this tile are complete; the products of the one before are done
            if (step + 2 < steps) load_queries(coming);
            async::commit();
            advance(coming);
            if constexpr (STAGGER) {
                // The two warps of a scheduler take the halves in opposite order: one's exponentials under the other's
                // mma.
#pragma unroll 1
                for (int half = 0; half < 2; half++) {
                    if (half == (warp / 4 & 1)) {
                        if (step + 1 < steps) scores(next, (step + 1) & 1);
                    } else {
                        key_products(here, step & 1);
                        query_product(here, step & 1);
                    }
                }
            } else {
                if (step + 1 < steps) scores(next, (step + 1) & 1);
                key_products(here, step & 1);
                query_product(here, step & 1);
            }
            here = next;
            advance(next);
        }
    } else {
        for (int step = 0; step < steps; step++) {
            async::wait<0>();
            __syncthreads(); // the tiles are here, and everyone has left the other stage, P and dS
            if (STAGES == 2) {
                if (step + 1 < steps) load_queries(next);
                async::commit();
            }
            scores(here, 0);
            __syncthreads();
            key_products(here, 0);
            if (STAGES == 1) {
                __syncthreads();
                if (step + 1 < steps) load_queries(next);
                async::commit();
            }
            query_product(here, 0);
            here = next;
            advance(next);
        }
    }
    async::wait<0>();

    if (a.parts > 1) {
#pragma unroll
        for (int m = 0; m < KM; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = k_row + m * 16 + half * 8 + lane / 4;
                if (row >= keys) continue;
                const int64_t at = (static_cast<int64_t>(part % a.parts) * a.tokens + j0 + row) * a.kv_heads * D +
                                   kv_head * D + k_col + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < KN; n++) {
                    *reinterpret_cast<float2*>(a.dk_sum + at + n * 8) =
                        make_float2(dk[m][n][half * 2], dk[m][n][half * 2 + 1]);
                    *reinterpret_cast<float2*>(a.dv_sum + at + n * 8) =
                        make_float2(dv[m][n][half * 2], dv[m][n][half * 2 + 1]);
                }
            }
        return;
    }
    __syncthreads(); // K and V are read no more: their tiles take dK and dV, to leave in whole chunks
#pragma unroll
    for (int m = 0; m < KM; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < KN; n++) {
                const int row = k_row + m * 16 + half * 8 + lane / 4;
                const uint32_t offset = Rows::address(0, row, k_col / 8 + n) + lane % 4 * 4;
                store_shared(tile_k + offset,
                             pack_pair<T>(dk[m][n][half * 2] * a.scale, dk[m][n][half * 2 + 1] * a.scale));
                store_shared(tile_v + offset, pack_pair<T>(dv[m][n][half * 2], dv[m][n][half * 2 + 1]));
            }
    __syncthreads();
    for (int index = threadIdx.x; index < keys * Rows::CHUNKS; index += THREADS) {
        const int row = index / Rows::CHUNKS, chunk = index % Rows::CHUNKS;
        const int64_t t = j0 + row;
        const int column = kv_head * D + chunk * 8;
        *reinterpret_cast<uint4*>(static_cast<T*>(a.dk) + t * a.lddk + column) =
            load_shared16(Rows::address(tile_k, row, chunk));
        *reinterpret_cast<uint4*>(static_cast<T*>(a.dv) + t * a.lddv + column) =
            load_shared16(Rows::address(tile_v, row, chunk));
    }
}

template <typename T, int D, int BN, int WARPS, int CTAS, int STAGES, int SCORE_ROWS, int KEY_ROWS, int QUERY_ROWS,
          bool WITH_DQ, int AHEAD = 0, bool STAGGER = false>
int launch_main(BackwardArguments a, int64_t max_len, const QloraLimits& limits, cudaStream_t stream) {
    constexpr int bytes = backward_shared_bytes<D, BN, STAGES>();
    constexpr auto kernel =
        backward_kernel<T, D, BN, WARPS, CTAS, STAGES, SCORE_ROWS, KEY_ROWS, QUERY_ROWS, WITH_DQ, AHEAD, STAGGER>;
    const cudaError_t ready = allow_shared<kernel>(limits, bytes);
    if (ready != cudaSuccess) return static_cast<int>(ready);
    const int64_t units = static_cast<int64_t>(a.sequences) * a.kv_heads * a.parts;
    const int64_t key_blocks = (max_len + BN - 1) / BN;
    const int64_t grid = key_blocks * units;
    if (grid > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
    a.key_blocks = static_cast<int>(key_blocks);
    // About one wave of CTAs a chunk: then the sums of dq that are being added to stay in L2, and the light CTAs of a
    // chunk run beside the heavy ones of the next.
    if (a.chunk <= 0)
        a.chunk = static_cast<int>(std::max(CTAS * limits.multiprocessors / key_blocks, int64_t{1}));
    if (a.chunk > units) a.chunk = static_cast<int>(units);
    kernel<<<static_cast<unsigned>(grid), WARPS * 32, bytes, stream>>>(a);
    return static_cast<int>(cudaGetLastError());
}

// The pipelined form where the shared memory is large enough (sm_90 at every D), else two stages (sm_80), else the
// small tiles (the 99 KB devices; at D = 64 Turing too), else tiles of 32 keys (Turing's 64 KB).
template <typename T, int D, bool WITH_DQ>
int dispatch_main(const BackwardArguments& a, int64_t max_len, const QloraLimits& limits, cudaStream_t stream) {
    constexpr int QUERY_ROWS = D == 96 ? 4 : 2; // 24 columns of dQ would be an odd number of tiles
    const int limit = limits.shared_per_block;
    if (limit >= backward_shared_bytes<D, 128, 3>())
        return launch_main<T, D, 128, 8, 1, 3, 2, 4, QUERY_ROWS, WITH_DQ, 0, true>(a, max_len, limits, stream);
    if (limit >= backward_shared_bytes<D, 128, 2>())
        return launch_main<T, D, 128, 8, 1, 2, 2, 4, QUERY_ROWS, WITH_DQ, 0>(a, max_len, limits, stream);
    if constexpr (backward_shared_bytes<D, 64, 1>() > SMALLEST_SHARED) {
        if (limit < backward_shared_bytes<D, 64, 1>())
            return launch_main<T, D, 32, 4, 1, 1, 2, 2, 2, WITH_DQ, 15>(a, max_len, limits, stream);
    }
    return launch_main<T, D, 64, 4, 1, 1, 2, 2, 2, WITH_DQ, 15>(a, max_len, limits, stream);
}

// dq alone, for the deterministic mode.
template <typename T, int D>
int dispatch_query(const BackwardArguments& a, int64_t max_len, const QloraLimits& limits, cudaStream_t stream) {
    constexpr int BN = D == 64 ? 64 : 32;
    if constexpr (query_shared_bytes<D, 128, BN>() > SMALLEST_SHARED) {
        if (limits.shared_per_block < query_shared_bytes<D, 128, BN>())
            return launch_query<T, D, 64, BN, 4, 2>(a, max_len, limits, stream);
    }
    return launch_query<T, D, 128, BN, 4, 2>(a, max_len, limits, stream);
}

template <typename T, int D>
int run_backward(const BackwardArguments& a, int64_t max_len, bool deterministic, const QloraLimits& limits,
                 cudaStream_t stream) {
    const int64_t small_grid = static_cast<int64_t>(a.padded / Q_BLOCK) * a.heads;
    if (small_grid > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
    prepare_kernel<T, D><<<static_cast<unsigned>(small_grid), 256, 0, stream>>>(a);
    int status = static_cast<int>(cudaGetLastError());
    if (status != cudaSuccess) return status;
    status = deterministic ? dispatch_main<T, D, false>(a, max_len, limits, stream)
                           : dispatch_main<T, D, true>(a, max_len, limits, stream);
    if (status != cudaSuccess) return status;
    if (a.parts > 1) {
        const int64_t threads = static_cast<int64_t>(a.tokens) * a.kv_heads * D / 4;
        combine_kernel<T><<<static_cast<unsigned>((threads + 255) / 256), 256, 0, stream>>>(a, a.kv_heads * D);
        status = static_cast<int>(cudaGetLastError());
        if (status != cudaSuccess) return status;
    }
    if (deterministic) return dispatch_query<T, D>(a, max_len, limits, stream);
    finish_kernel<T, D><<<static_cast<unsigned>(small_grid), 256, 0, stream>>>(a);
    return static_cast<int>(cudaGetLastError());
}

template <typename T> int dispatch_backward(const BackwardArguments& a, int64_t head_dim, int64_t max_len,
                                            bool deterministic, const QloraLimits& limits, cudaStream_t s) {
    switch (head_dim) {
    case 64: return run_backward<T, 64>(a, max_len, deterministic, limits, s);
    case 96: return run_backward<T, 96>(a, max_len, deterministic, limits, s);
    case 128: return run_backward<T, 128>(a, max_len, deterministic, limits, s);
    default: return static_cast<int>(cudaErrorInvalidValue);
    }
}

// Up to this many tokens the workspace has room for f32 parts of dk and dv, so that a group can be split among CTAs.
constexpr int64_t SPLIT_TOKENS = 2048;

// In how many parts to split a group. Under causality the first key block of a sequence has twice the mean work; it
// should not outlast the mean work of a multiprocessor. Both in tiles of 64 x 128: 2 N of a head for the first of N
// blocks, and N (N + 1) for all of them.
inline int group_parts(int64_t tokens, int64_t max_len, int64_t heads, int64_t group, int multiprocessors) {
    if (tokens > SPLIT_TOKENS) return 1;
    const double blocks = (max_len + 127) / 128;
    const double mean = tokens / (128.0 * blocks) * heads * blocks * (blocks + 1) / multiprocessors;
    for (int64_t parts = 1; parts < group; parts++)
        if (group % parts == 0 && group / parts * 2 * blocks <= 1.1 * mean) return static_cast<int>(parts);
    return static_cast<int>(group);
}

inline int64_t padded_tokens(int64_t tokens) { return (tokens + Q_BLOCK - 1) / Q_BLOCK * Q_BLOCK; }

} // namespace attention

extern "C" int64_t qlora_attention_backward_workspace(int64_t tokens, int64_t heads, int64_t head_dim,
                                                      int deterministic) {
    using namespace attention;
    const int64_t padded = padded_tokens(tokens);
    int64_t floats = 2 * padded * heads;
    if (!deterministic) floats += padded * heads * head_dim;
    if (tokens <= SPLIT_TOKENS) floats += 2 * tokens * heads * head_dim; // parts * kv_heads <= heads
    return floats * 4;
}

extern "C" int qlora_attention_backward(int dtype, const void* q, int64_t ldq, const void* k, int64_t ldk,
                                        const void* v, int64_t ldv, const void* o, int64_t ldo, const float* lse,
                                        const void* dout, int64_t lddo, void* dq, int64_t lddq, void* dk, int64_t lddk,
                                        void* dv, int64_t lddv, void* workspace, const int32_t* cu, int64_t nseq,
                                        int64_t max_len, int64_t tokens, int64_t heads, int64_t kv_heads,
                                        int64_t head_dim, float scale, int64_t window, int deterministic,
                                        const QloraLimits* limits, cudaStream_t stream) {
    using namespace attention;
    const bool shape = heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && heads * head_dim <= 1 << 20 && nseq >= 0 &&
                       nseq <= INT32_MAX && max_len >= 0 && max_len <= INT32_MAX / 4 && tokens >= 0 &&
                       tokens <= INT32_MAX / 4 && window >= 0;
    if (!shape || !(scale > 0.0f)) return static_cast<int>(cudaErrorInvalidValue);
    if (!aligned16(q, ldq) || !aligned16(k, ldk) || !aligned16(v, ldv) || !aligned16(o, ldo) ||
        !aligned16(dout, lddo) || !aligned16(dq, lddq) || !aligned16(dk, lddk) || !aligned16(dv, lddv) ||
        !aligned16(workspace, 0))
        return static_cast<int>(cudaErrorInvalidValue);
    if (nseq == 0 || max_len == 0 || tokens == 0) return static_cast<int>(cudaSuccess);
    BackwardArguments a{q, k, v, o, dout, dq, dk, dv, lse};
    a.ldq = ldq, a.ldk = ldk, a.ldv = ldv, a.ldo = ldo, a.lddo = lddo, a.lddq = lddq, a.lddk = lddk, a.lddv = lddv;
    a.cu = cu;
    a.sequences = static_cast<int>(nseq);
    a.tokens = static_cast<int>(tokens);
    a.padded = static_cast<int>(padded_tokens(tokens));
    a.heads = static_cast<int>(heads);
    a.kv_heads = static_cast<int>(kv_heads);
    a.group = static_cast<int>(heads / kv_heads);
    a.window = window > INT32_MAX / 4 ? 0 : static_cast<int>(window); // longer than any sequence: none
    a.scale = scale;
    a.parts = group_parts(tokens, max_len, heads, a.group, limits->multiprocessors);
    float* at = static_cast<float*>(workspace);
    a.row_lse = at, at += a.padded * heads;
    a.row_d = at, at += a.padded * heads;
    if (!deterministic) a.dq_sum = at, at += a.padded * heads * head_dim;
    a.dk_sum = at, at += a.parts * tokens * kv_heads * head_dim;
    a.dv_sum = at;
    switch (dtype) {
    case BF16:
        if (!limits->bf16) return static_cast<int>(cudaErrorNotSupported);
        return dispatch_backward<__nv_bfloat16>(a, head_dim, max_len, deterministic != 0, *limits, stream);
    case F16: return dispatch_backward<__half>(a, head_dim, max_len, deterministic != 0, *limits, stream);
    default: return static_cast<int>(cudaErrorInvalidValue);
    }
}
