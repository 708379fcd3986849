// Causal grouped-query attention over packed sequences, forward: o = softmax(scale q k^T + mask) v and the natural
// log-sum-exp of every row, without a score matrix in memory.
//
// q, o: [tokens_q, heads * D]; k, v: [tokens_k, kv_heads * D] (windows with a row stride each); lse: f32 [tokens_q,
// heads]. Sequence s has the rows cu_q[s]..cu_q[s+1] and cu_k[s]..cu_k[s+1]; its query i sees the keys j <= i + lk - lq
// and, with a window, j > i + lk - lq - window. Query head h reads kv head h / (heads / kv_heads). bf16 or f16, D 64,
// 96 or 128, f32 sums; P is rounded to the element type for the second product.
//
// One CTA takes BM queries of one head and walks the visible key blocks from the diagonal down (online softmax, base
// 2). A warp owns whole rows of the score tile, so that P goes from the accumulators of q k^T straight into the A
// operand of P v. 32 rows a warp at D = 128: a fragment of K or V read from shared memory feeds two mma, without which
// mma.sync waits for shared memory. K and V of the next block arrive by cp.async during the whole of the current one.
// Grid: one linear index, the blocks with the most keys first, the heads of one kv head beside each other (K and V stay
// in L2). Floor: 4 D FLOP a visible pair and head; mma.sync reaches about 62% of the tensor rate of Hopper.

#include "attention.cuh"
#include "device.cuh"

namespace attention {

struct ForwardArguments {
    const void *q, *k, *v;
    void* o;
    float* lse;
    int64_t ldq, ldk, ldv, ldo;
    const int32_t *cu_q, *cu_k;
    int sequences, blocks, heads, group, window;
    float scale;
};

template <int D, int BM, int BN> constexpr int forward_shared_bytes() { return (BM + 4 * BN) * D * 2; }

// AHEAD: fragments fetched one step early, bits for Q, K and V.
template <typename T, int D, int BM, int BN, int WARPS, int CTAS, bool Q_IN_REGISTERS, int AHEAD = 0>
__global__ __launch_bounds__(WARPS * 32, CTAS) void forward_kernel(const ForwardArguments a) {
    if constexpr (!has_products<T>()) return;
    constexpr int THREADS = WARPS * 32;
    constexpr int MT = BM / WARPS / 16; // 16-row tiles of a warp
    constexpr int NT = BN / 8;          // 8-column tiles of the scores
    constexpr int DT = D / 8;           // 8-column tiles of the output
    using Rows = Tile<D>;

    const int head = blockIdx.x % a.heads;
    const int rest = blockIdx.x / a.heads;
    const int sequence = rest % a.sequences;
    const int block = a.blocks - 1 - rest / a.sequences;
    const int q_begin = a.cu_q[sequence], lq = a.cu_q[sequence + 1] - q_begin;
    const int i0 = block * BM;
    if (i0 >= lq) return;
    const int k_begin = a.cu_k[sequence], lk = a.cu_k[sequence + 1] - k_begin;
    const int shift = lk - lq;
    const int rows = min(BM, lq - i0);

    // Visible keys of the block: [from, to).
    const int to = min(lk, i0 + rows + shift);
    const int from = a.window > 0 ? max(0, i0 + shift - a.window + 1) : 0;
    const int last_block = from / BN;
    int key_block = to > 0 ? (to + BN - 1) / BN - 1 : -1;

    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t tile_q = shared_address(shared);
    const uint32_t tiles_k = tile_q + BM * Rows::PITCH;
    const uint32_t tiles_v = tiles_k + 2 * BN * Rows::PITCH;

    const T* q = static_cast<const T*>(a.q) + (q_begin + i0) * a.ldq + head * D;
    const T* k = static_cast<const T*>(a.k) + k_begin * a.ldk + head / a.group * D;
    const T* v = static_cast<const T*>(a.v) + k_begin * a.ldv + head / a.group * D;
    const auto load_keys = [&](int stage, int b) {
        const int count = lk - b * BN;
        load_tile<D, BN, THREADS>(tiles_k + stage * BN * Rows::PITCH, k + b * BN * a.ldk, a.ldk, 0, count);
        load_tile<D, BN, THREADS>(tiles_v + stage * BN * Rows::PITCH, v + b * BN * a.ldv, a.ldv, 0, count);
    };
    load_tile<D, BM, THREADS>(tile_q, q, a.ldq, 0, rows);
    if (key_block >= last_block) load_keys(0, key_block);
    async::commit();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp * MT * 16;
    const float scale2 = a.scale * LOG2E;
    const uint32_t lane_q = Rows::lane_down(tile_q, warp_row, lane);
    const uint32_t lane_k = Rows::lane_along(tiles_k, 0, lane);
    const uint32_t lane_v = Rows::lane_down(tiles_v, 0, lane);

    float out[MT][DT][4] = {};
    float top[MT][2], sum[MT][2]; // running maximum (of q k^T, unscaled) and this lane's part of the running sum
#pragma unroll
    for (int m = 0; m < MT; m++) {
        top[m][0] = top[m][1] = -INFINITY;
        sum[m][0] = sum[m][1] = 0.0f;
    }
    uint32_t q_fragment[Q_IN_REGISTERS ? D / 16 : 1][MT][4];
    const auto load_q = [&](int ks, uint32_t (&x)[MT][4]) {
#pragma unroll
        for (int m = 0; m < MT; m++) load_matrix(x[m], Rows::at(lane_q, 2 * ks) + m * 16 * Rows::PITCH);
    };
    if constexpr (Q_IN_REGISTERS) {
        async::wait<0>();
        __syncthreads();
#pragma unroll
        for (int ks = 0; ks < D / 16; ks++) load_q(ks, q_fragment[ks]);
    }

    for (int stage = 0; key_block >= last_block; key_block--, stage ^= 1) {
        async::wait<0>();
        __syncthreads(); // the block is here, and everyone has left the other stage
        if (key_block > last_block) load_keys(stage ^ 1, key_block - 1);
        async::commit();
        const int j0 = key_block * BN;
        // Rows of the warp, as the last key they see.
        const int first_seen = i0 + warp_row + shift, last_seen = first_seen + MT * 16 - 1;
        if (j0 > last_seen) continue; // the block lies beyond the diagonal for this warp

        float s[MT][NT][4];
        const uint32_t stage_k = lane_k + stage * BN * Rows::PITCH;
        product<T, true, !Q_IN_REGISTERS && (AHEAD & 1), (AHEAD & 2) != 0, MT, NT, D / 16>(
            s,
            [&](int ks, uint32_t (&x)[MT][4]) {
                if constexpr (Q_IN_REGISTERS) {
#pragma unroll
                    for (int m = 0; m < MT; m++)
#pragma unroll
                        for (int i = 0; i < 4; i++) x[m][i] = q_fragment[ks][m][i];
                } else {
                    load_q(ks, x);
                }
            },
            [&](int ks, int n, uint32_t (&b)[4]) { load_matrix(b, Rows::at(stage_k, 2 * ks) + n * 8 * Rows::PITCH); });

        const bool cut_right = j0 + BN - 1 > first_seen;
        const bool cut_left = a.window > 0 && j0 <= last_seen - a.window;
        if (cut_right || cut_left) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int seen = first_seen + m * 16 + half * 8 + lane / 4;
                    const int hidden = cut_left ? seen - a.window : -1; // the last key that is out of the window
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int c = 0; c < 2; c++) {
                            const int j = j0 + n * 8 + lane % 4 * 2 + c;
                            if (j > seen || j <= hidden) s[m][n][half * 2 + c] = -INFINITY;
                        }
                }
        }

        bool moved = false;
        float fix[MT][2];
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float high = top[m][half];
#pragma unroll
                for (int n = 0; n < NT; n++) high = fmaxf(high, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
                high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
                high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
                // A row that has seen no key yet: subtract 0, so that exp2(-inf) gives 0 and not NaN.
                const float base = high == -INFINITY ? 0.0f : high * scale2;
                fix[m][half] = exp2_fast(top[m][half] * scale2 - base);
                moved |= high != top[m][half];
                top[m][half] = high;
                float part = sum[m][half] * fix[m][half];
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        float& x = s[m][n][half * 2 + c];
                        x = exp2_fast(fmaf(x, scale2, -base));
                        part += x;
                    }
                sum[m][half] = part;
            }
        if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int d = 0; d < DT; d++)
#pragma unroll
                    for (int c = 0; c < 4; c++) out[m][d][c] *= fix[m][c / 2];
        }

        const uint32_t stage_v = lane_v + stage * BN * Rows::PITCH;
        product<T, false, false, (AHEAD & 4) != 0, MT, DT, BN / 16>(
            out,
            [&](int ks, uint32_t (&x)[MT][4]) {
#pragma unroll
                for (int m = 0; m < MT; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        x[m][i] = pack_pair<T>(s[m][2 * ks + i / 2][i % 2 * 2], s[m][2 * ks + i / 2][i % 2 * 2 + 1]);
            },
            [&](int ks, int d, uint32_t (&b)[4]) {
                load_matrix_transposed(b, Rows::at(stage_v, d) + ks * 16 * Rows::PITCH);
            });
    }
    async::wait<0>();
    // Q arrived by other threads' copies; a CTA without any visible key has not met a barrier since.
    __syncthreads();

    // The output goes through the warp's own rows of the Q tile, to leave in whole 16-byte chunks.
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[m][half];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            const float inverse = total > 0.0f ? 1.0f / total : (total == 0.0f ? 0.0f : total); // NaN stays NaN
            const int row = warp_row + m * 16 + half * 8 + lane / 4;
            if (lane % 4 == 0 && row < rows)
                a.lse[static_cast<int64_t>(q_begin + i0 + row) * a.heads + head] =
                    total == 0.0f ? -INFINITY : top[m][half] * a.scale + __logf(total);
#pragma unroll
            for (int d = 0; d < DT; d++)
                store_shared(Rows::address(tile_q, row, d) + lane % 4 * 4,
                             pack_pair<T>(out[m][d][half * 2] * inverse, out[m][d][half * 2 + 1] * inverse));
        }
    __syncwarp();
    T* o = static_cast<T*>(a.o) + (q_begin + i0) * a.ldo + head * D;
#pragma unroll
    for (int i = 0; i < MT * 16 * Rows::CHUNKS / 32; i++) {
        const int index = lane + i * 32;
        const int row = warp_row + index / Rows::CHUNKS, chunk = index % Rows::CHUNKS;
        const uint4 x = load_shared16(Rows::address(tile_q, row, chunk));
        if (row < rows) *reinterpret_cast<uint4*>(o + row * a.ldo + chunk * 8) = x;
    }
}

template <typename T, int D, int BM, int BN, int WARPS, int CTAS, bool Q_IN_REGISTERS, int AHEAD = 0>
int launch_forward(ForwardArguments a, int64_t max_q, const QloraLimits& limits, cudaStream_t stream) {
    constexpr int bytes = forward_shared_bytes<D, BM, BN>();
    constexpr auto kernel = forward_kernel<T, D, BM, BN, WARPS, CTAS, Q_IN_REGISTERS, AHEAD>;
    const cudaError_t ready = allow_shared<kernel>(limits, bytes);
    if (ready != cudaSuccess) return static_cast<int>(ready);
    a.blocks = static_cast<int>((max_q + BM - 1) / BM);
    const int64_t grid = static_cast<int64_t>(a.blocks) * a.sequences * a.heads;
    if (grid > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
    kernel<<<static_cast<unsigned>(grid), WARPS * 32, bytes, stream>>>(a);
    return static_cast<int>(cudaGetLastError());
}

// Blocks of 64 keys take 48, 72 and 96 KB: every device from sm_80 on has them (99 KB on sm_86, sm_89 and sm_120). Turing
// has 64 KB, which are 32 keys.
template <typename T, int D>
int run_forward(const ForwardArguments& a, int64_t max_q, const QloraLimits& limits, cudaStream_t s) {
    constexpr int bytes = forward_shared_bytes<D, 128, 64>();
    if constexpr (bytes > SMALLEST_SHARED) {
        if (limits.shared_per_block < bytes)
            return launch_forward<T, D, 128, 32, 4, 2, false, 7>(a, max_q, limits, s);
    }
    return launch_forward<T, D, 128, 64, 4, 2, false, 7>(a, max_q, limits, s);
}

template <typename T> int dispatch_forward(const ForwardArguments& a, int64_t head_dim, int64_t max_q,
                                           const QloraLimits& limits, cudaStream_t s) {
    switch (head_dim) {
    case 64: return run_forward<T, 64>(a, max_q, limits, s);
    case 96: return run_forward<T, 96>(a, max_q, limits, s);
    case 128: return run_forward<T, 128>(a, max_q, limits, s);
    default: return static_cast<int>(cudaErrorInvalidValue);
    }
}

} // namespace attention

extern "C" int qlora_attention_forward(int dtype, const void* q, int64_t ldq, const void* k, int64_t ldk, const void* v,
                                       int64_t ldv, void* o, int64_t ldo, float* lse, const int32_t* cu_q,
                                       const int32_t* cu_k, int64_t nseq, int64_t max_q, int64_t tokens_q,
                                       int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, int64_t window,
                                       const QloraLimits* limits, cudaStream_t stream) {
    using namespace attention;
    const bool shape = heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && heads * head_dim <= 1 << 20 && nseq >= 0 &&
                       nseq <= INT32_MAX && max_q >= 0 && max_q <= INT32_MAX / 2 && tokens_q <= INT32_MAX &&
                       window >= 0;
    if (!shape || !(scale > 0.0f)) return static_cast<int>(cudaErrorInvalidValue);
    if (!aligned16(q, ldq) || !aligned16(k, ldk) || !aligned16(v, ldv) || !aligned16(o, ldo))
        return static_cast<int>(cudaErrorInvalidValue);
    if (nseq == 0 || max_q == 0 || tokens_q == 0) return static_cast<int>(cudaSuccess);
    ForwardArguments a{q, k, v, o, lse, ldq, ldk, ldv, ldo, cu_q, cu_k};
    a.sequences = static_cast<int>(nseq);
    a.heads = static_cast<int>(heads);
    a.group = static_cast<int>(heads / kv_heads);
    a.window = window > INT32_MAX / 2 ? 0 : static_cast<int>(window); // longer than any sequence: none
    a.scale = scale;
    switch (dtype) {
    case BF16:
        if (!limits->bf16) return static_cast<int>(cudaErrorNotSupported);
        return dispatch_forward<__nv_bfloat16>(a, head_dim, max_q, *limits, stream);
    case F16: return dispatch_forward<__half>(a, head_dim, max_q, *limits, stream);
    default: return static_cast<int>(cudaErrorInvalidValue);
    }
}
