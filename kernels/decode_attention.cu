// Attention of the newest tokens over caches of keys and values, for decoding: every sequence has Q new tokens (mostly
// one), whose own keys are already in its cache.
//
//     o[b Q + i, h] = sum_j softmax_j(scale q[b Q + i, h] . k_b[j, h / group]) v_b[j, h / group]
//     over the keys j <= p = positions[b Q + i] with, given a window, j > p - window
//
// q, o: [sequences * Q, heads * D]; k_b, v_b: [capacity, kv_heads * D], each at its own address, which the arrays
// `keys` and `values` hold. positions: u32 [sequences * Q], consecutive within a sequence. Addresses and positions are
// read on the device and the grid does not depend on them: a captured graph can be replayed while texts grow. bf16 or
// f16, D 64, 96 or 128.
//
// Floor: memory, keys and values once. All queries of a kv head are the 16 rows of mma.sync m16n8k16, so that a key is
// read once for the group. Keys are split over blocks, and a block's tile of 64 keys over its four warps, each with its
// own online softmax (base 2, f32 sums, P rounded to the element type); tiles arrive by cp.async STAGES - 1 ahead. The
// warps' parts meet in shared memory, the blocks' parts in the workspace: the last block of a kv head to finish adds
// them in their order, so results do not depend on who that is.

#include "few_tokens.cuh"

namespace {

using namespace few;
using attention::Tile;

constexpr int KEYS = 64;
constexpr int WARPS = 4;
constexpr int ROWS = 16;
constexpr int MOST_SPLITS = 64;
constexpr int64_t COUNTER_BYTES = 4096;   // enough: with more groups than multiprocessors there are no splits

struct DecodeArgs {
    const void* q;
    const void* const* keys;
    const void* const* values;
    void* o;
    const uint32_t* positions;
    float* parts;        // [sequence, head block, split][ROWS * D + 2 ROWS]
    uint32_t* arrived;   // [sequence, head block], zeros before and after
    int64_t ldq, ldo, ldk;
    int32_t queries, group, row_blocks, kv_heads, splits;
    int64_t window;
    float scale;
};

template <int D, int STAGES> constexpr int SHARED_BYTES = ROWS * D * 2 + STAGES * 2 * KEYS * D * 2;
// The static shared memory of a kernel, in bytes.
constexpr int STATIC_BYTES = 128;

template <typename T, int D, int STAGES>
__global__ void __launch_bounds__(WARPS * 32) decode_kernel(const __grid_constant__ DecodeArgs a) {
    if constexpr (!mma::has_products<T>()) return;
    using Rows = Tile<D>;
    constexpr int THREADS = WARPS * 32, NT = D / 8, PITCH = D + 4;
    constexpr int TILE_BYTES = KEYS * Rows::PITCH;
    // In the end they take the place of the tiles, with one stage that of q too, whose fragments are in registers.
    static_assert((WARPS * ROWS * PITCH + 2 * WARPS * ROWS) * 4 <= SHARED_BYTES<D, STAGES>, "the parts fit");
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ bool last;
    const uint32_t tiles = shared_address(shared), tile_q = tiles + STAGES * 2 * TILE_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int kv_head = blockIdx.x / a.row_blocks, row0 = blockIdx.x % a.row_blocks * ROWS;
    const int sequence = blockIdx.y, split = blockIdx.z;
    const int rows = min(ROWS, a.queries * a.group - row0);

    let_next_begin();
    wait_for_previous();
    const int64_t first_position = a.positions[static_cast<int64_t>(sequence) * a.queries];
    const int64_t count = first_position + a.queries;                      // of keys
    const int64_t visible = a.window > 0 && first_position >= a.window ? first_position - a.window + 1 : 0;
    const int64_t from_tile = visible / KEYS, all_tiles = (count + KEYS - 1) / KEYS - from_tile;
    const int64_t each = (all_tiles + a.splits - 1) / a.splits;
    const int64_t begin = from_tile + split * each;
    const int mine = static_cast<int>(max(static_cast<int64_t>(0), min(each, from_tile + all_tiles - begin)));
    const T* k = static_cast<const T*>(a.keys[sequence]) + kv_head * D;
    const T* v = static_cast<const T*>(a.values[sequence]) + kv_head * D;

    const auto fetch = [&](int i) {
        if (i < mine) {
            const int64_t key = (begin + i) * KEYS;
            const int valid = static_cast<int>(min(static_cast<int64_t>(KEYS), count - key));
            const uint32_t to = tiles + i % STAGES * 2 * TILE_BYTES;
            attention::load_tile<D, KEYS, THREADS>(to, k + key * a.ldk, a.ldk, 0, valid);
            attention::load_tile<D, KEYS, THREADS>(to + TILE_BYTES, v + key * a.ldk, a.ldk, 0, valid);
        }
        async::commit();
    };
    // The rows are (query, head of the group); those behind the last are zeros.
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        const int row = i / (D / 8), chunk = i % (D / 8), r = row0 + row;
        const bool valid = row < rows;
        const T* q = static_cast<const T*>(a.q);
        if (valid)
            q += (static_cast<int64_t>(sequence) * a.queries + r / a.group) * a.ldq +
                 (kv_head * a.group + r % a.group) * D + chunk * 8;
        async::copy16(Rows::address(tile_q, row, chunk), q, valid);
    }
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch(i);

    float out[NT][4] = {};
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    int64_t position[2];
#pragma unroll
    for (int h = 0; h < 2; h++) position[h] = first_position + (row0 + lane / 4 + 8 * h) / a.group;
    uint32_t q_fragment[D / 16][4];
    const float scale2 = a.scale * attention::LOG2E;
    for (int i = 0; i < mine; i++) {
        if constexpr (STAGES > 1) {
            async::wait<STAGES - 2>();
            __syncthreads();
            fetch(i + STAGES - 1);
        } else {
            if (i > 0) __syncthreads();   // everyone has left the tile before
            fetch(i);
            async::wait<0>();
            __syncthreads();
        }
        if (i == 0) {
            const uint32_t lane_q = Rows::lane_down(tile_q, 0, lane);
#pragma unroll
            for (int ks = 0; ks < D / 16; ks++) mma::load_matrix(q_fragment[ks], Rows::at(lane_q, 2 * ks));
        }
        const uint32_t tile_k = tiles + i % STAGES * 2 * TILE_BYTES, tile_v = tile_k + TILE_BYTES;
        const uint32_t lane_k = Rows::lane_along(tile_k, warp * 16, lane);
        const uint32_t lane_v = Rows::lane_down(tile_v, warp * 16, lane);
        float s[2][4] = {};
#pragma unroll
        for (int ks = 0; ks < D / 16; ks++) {
            uint32_t b[4];
            mma::load_matrix(b, Rows::at(lane_k, 2 * ks));
            multiply_add<T>(s[0], q_fragment[ks], b[0], b[1]);
            multiply_add<T>(s[1], q_fragment[ks], b[2], b[3]);
        }
        const int64_t key0 = (begin + i) * KEYS + warp * 16 + lane % 4 * 2;
        uint32_t p[4];
        float factor[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float highest = top[h];
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int64_t key = key0 + n * 8 + c;
                    const bool seen = key <= position[h] && (a.window <= 0 || key > position[h] - a.window);
                    float& x = s[n][h * 2 + c];
                    x = seen ? x : -INFINITY;
                    highest = fmaxf(highest, x);
                }
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
            const float base = highest == -INFINITY ? 0.0f : highest * scale2;
            factor[h] = attention::exp2_fast(top[h] * scale2 - base);
            top[h] = highest;
            sum[h] *= factor[h];
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const float e0 = attention::exp2_fast(fmaf(s[n][h * 2], scale2, -base));
                const float e1 = attention::exp2_fast(fmaf(s[n][h * 2 + 1], scale2, -base));
                sum[h] += e0 + e1;
                p[n * 2 + h] = pack_pair<T>(e0, e1);
            }
        }
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) out[n][c] *= factor[c / 2];
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t b[4];
            mma::load_matrix_transposed(b, Rows::at(lane_v, n));
            multiply_add<T>(out[n], p, b[0], b[1]);
            multiply_add<T>(out[n + 1], p, b[2], b[3]);
        }
    }
    async::wait<0>();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
    __syncthreads();
    // [warp][row][D], tops and sums [warp][row].
    float* outs = reinterpret_cast<float*>(shared);
    float* tops = outs + WARPS * ROWS * PITCH;
    float* sums = tops + WARPS * ROWS;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = warp * ROWS + lane / 4 + 8 * h;
        if (lane % 4 == 0) tops[row] = top[h], sums[row] = sum[h];
        if (lane / 4 + 8 * h >= rows) continue;
#pragma unroll
        for (int n = 0; n < NT; n++)
            *reinterpret_cast<float2*>(outs + row * PITCH + n * 8 + lane % 4 * 2) =
                make_float2(out[n][h * 2], out[n][h * 2 + 1]);
    }
    __syncthreads();

    const auto store = [&](int row, int col, float4 x, float total) {
        const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
        const int r = row0 + row;
        T* to = static_cast<T*>(a.o) + (static_cast<int64_t>(sequence) * a.queries + r / a.group) * a.ldo +
                (kv_head * a.group + r % a.group) * D + col;
        const float values[4] = {x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse};
        store_floats(to, values);
    };
    constexpr int PART = ROWS * D + 2 * ROWS;
    const int64_t group_index = static_cast<int64_t>(sequence) * gridDim.x + blockIdx.x;
    float* group_parts = a.parts + group_index * a.splits * PART;
    // A factor for each part of a row, and the row's sum: the parts' tops and sums are [part][ROWS] in shared memory,
    // and the factors take the tops' place. One thread a row.
    const auto weigh = [&](float* part_tops, const float* part_sums, int parts, float& highest, float& total) {
        const int row = threadIdx.x;
        highest = -INFINITY, total = 0.0f;
        for (int w = 0; w < parts; w++) highest = fmaxf(highest, part_tops[w * ROWS + row]);
        const float base = highest == -INFINITY ? 0.0f : highest * scale2;
        for (int w = 0; w < parts; w++) {
            const float factor = attention::exp2_fast(part_tops[w * ROWS + row] * scale2 - base);
            part_tops[w * ROWS + row] = factor;
            total = fmaf(factor, part_sums[w * ROWS + row], total);
        }
    };
    __shared__ float row_totals[ROWS];
    if (threadIdx.x < rows) {
        float highest, total;
        weigh(tops, sums, WARPS, highest, total);
        row_totals[threadIdx.x] = total;
        if (a.splits > 1) {
            float* part = group_parts + static_cast<int64_t>(split) * PART + ROWS * D + threadIdx.x;
            __stcg(part, highest);
            __stcg(part + ROWS, total);
        }
    }
    __syncthreads();
    const auto add = [](float4& x, float f, float4 y) {
        x.x = fmaf(f, y.x, x.x), x.y = fmaf(f, y.y, x.y), x.z = fmaf(f, y.z, x.z), x.w = fmaf(f, y.w, x.w);
    };
    for (int i = threadIdx.x; i < rows * (D / 4); i += THREADS) {
        const int row = i / (D / 4), col = i % (D / 4) * 4;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            add(x, tops[w * ROWS + row], *reinterpret_cast<const float4*>(outs + (w * ROWS + row) * PITCH + col));
        if (a.splits == 1) store(row, col, x, row_totals[row]);
        else __stcg(reinterpret_cast<float4*>(group_parts + static_cast<int64_t>(split) * PART + row * D + col), x);
    }
    if (a.splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(a.arrived + group_index, 1) == static_cast<uint32_t>(a.splits - 1);
        if (last) a.arrived[group_index] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    // The space of the warps' parts is free again.
    float* all_tops = outs;
    float* all_sums = outs + MOST_SPLITS * ROWS;
    for (int i = threadIdx.x; i < a.splits * ROWS; i += THREADS) {
        const float* part = group_parts + static_cast<int64_t>(i / ROWS) * PART + ROWS * D + i % ROWS;
        if (i % ROWS < rows) all_tops[i] = __ldcg(part), all_sums[i] = __ldcg(part + ROWS);
    }
    __syncthreads();
    if (threadIdx.x < rows) {
        float highest, total;
        weigh(all_tops, all_sums, a.splits, highest, total);
        row_totals[threadIdx.x] = total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * (D / 4); i += THREADS) {
        const int row = i / (D / 4), col = i % (D / 4) * 4;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 16
        for (int w = 0; w < a.splits; w++) {
            const float* part = group_parts + static_cast<int64_t>(w) * PART + row * D + col;
            add(x, all_tops[w * ROWS + row], __ldcg(reinterpret_cast<const float4*>(part)));
        }
        store(row, col, x, row_totals[row]);
    }
}

// Rotates q and k of new tokens in place, as rope.cu does, and copies k and v into the caches.
template <typename T, int N>
__global__ void __launch_bounds__(128)
    append_kernel(T* qkv, int64_t ld, const float* __restrict__ cos_table, const float* __restrict__ sin_table,
                  const uint32_t* __restrict__ positions, T* const* keys, T* const* values, int64_t ldk, int queries,
                  int64_t capacity, int heads, int kv_heads, int half) {
    let_next_begin();
    wait_for_previous();
    const int token = blockIdx.y, packs = half / N;
    const int i = blockIdx.x * 128 + threadIdx.x, head = i / packs, col = (i - head * packs) * N;
    if (head >= heads + 2 * kv_heads) return;
    const int64_t position = positions[token];
    T* at = qkv + token * ld + static_cast<int64_t>(head) * (2 * half) + col;
    const Pack<T, N> a = load_pack<T, N>(at), b = load_pack<T, N>(at + half);
    const bool fits = position < capacity;
    const int sequence = token / queries;
    if (head >= heads + kv_heads) {
        if (!fits) return;
        T* to = values[sequence] + position * ldk + static_cast<int64_t>(head - heads - kv_heads) * (2 * half) + col;
        *reinterpret_cast<Pack<T, N>*>(to) = a;
        *reinterpret_cast<Pack<T, N>*>(to + half) = b;
        return;
    }
    float cos[N], sin[N], low[N], high[N];
    load_floats(cos_table + position * half + col, cos);
    load_floats(sin_table + position * half + col, sin);
#pragma unroll
    for (int e = 0; e < N; e++) {
        const float x = to_float(a.v[e]), y = to_float(b.v[e]);
        low[e] = x * cos[e] - y * sin[e];
        high[e] = y * cos[e] + x * sin[e];
    }
    store_floats(at, low);
    store_floats(at + half, high);
    if (head < heads || !fits) return;
    T* to = keys[sequence] + position * ldk + static_cast<int64_t>(head - heads) * (2 * half) + col;
    store_floats(to, low);
    store_floats(to + half, high);
}

// Blocks for the whole device, some of each on a multiprocessor, but no more than the longest text has tiles.
int splits_for(int64_t groups, int64_t capacity, int multiprocessors) {
    const int64_t wanted = multiprocessors / groups;
    const int64_t most = divide_up(capacity, KEYS);
    const int64_t splits = wanted < most ? wanted : most;
    return static_cast<int>(splits < 1 ? 1 : splits > MOST_SPLITS ? MOST_SPLITS : splits);
}

int64_t groups_of(int64_t sequences, int64_t queries, int64_t heads, int64_t kv_heads) {
    return sequences * kv_heads * divide_up(queries * (heads / kv_heads), ROWS);
}

}  // namespace

// Bytes of the workspace; its first 4 KiB are zero before the first call, and every call leaves them so: calls of all
// sizes can share one.
extern "C" int64_t qlora_decode_attention_workspace(int64_t sequences, int64_t queries, int64_t heads, int64_t kv_heads,
                                                    int64_t head_dim, int64_t capacity, const QloraLimits* limits) {
    if (sequences <= 0 || queries <= 0 || kv_heads <= 0 || heads % kv_heads != 0) return 0;
    const int64_t groups = groups_of(sequences, queries, heads, kv_heads);
    const int64_t splits = splits_for(groups, capacity, limits->multiprocessors);
    return splits == 1 ? 0 : COUNTER_BYTES + groups * splits * (ROWS * head_dim + 2 * ROWS) * 4;
}

extern "C" int qlora_decode_attention(int dtype, const void* q, int64_t ldq, const void* const* keys,
                                      const void* const* values, int64_t ldk, const uint32_t* positions, void* o,
                                      int64_t ldo, int64_t sequences, int64_t queries, int64_t heads, int64_t kv_heads,
                                      int64_t head_dim, int64_t capacity, float scale, int64_t window, int early,
                                      void* workspace, const QloraLimits* limits, cudaStream_t stream) {
    if (sequences <= 0 || queries <= 0) return static_cast<int>(cudaSuccess);
    if (!is_activation(dtype, *limits) || kv_heads <= 0 || heads <= 0 || heads % kv_heads != 0 || sequences > 65535 ||
        queries > 1024 || !attention::aligned16(q, ldq) || !attention::aligned16(o, ldo) || ldk % 8 != 0 ||
        window < 0) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    const int64_t groups = groups_of(sequences, queries, heads, kv_heads);
    DecodeArgs a{};
    a.q = q, a.keys = keys, a.values = values, a.o = o, a.positions = positions;
    a.ldq = ldq, a.ldo = ldo, a.ldk = ldk;
    a.queries = static_cast<int32_t>(queries);
    a.group = static_cast<int32_t>(heads / kv_heads);
    a.row_blocks = static_cast<int32_t>(divide_up(queries * a.group, ROWS));
    a.kv_heads = static_cast<int32_t>(kv_heads);
    a.splits = splits_for(groups, capacity, limits->multiprocessors);
    a.window = window;
    a.scale = scale;
    a.arrived = static_cast<uint32_t*>(workspace);
    a.parts = reinterpret_cast<float*>(static_cast<char*>(workspace) + COUNTER_BYTES);
    if (a.splits > 1 && !workspace) return static_cast<int>(cudaErrorInvalidValue);
    const dim3 grid(static_cast<unsigned>(kv_heads * a.row_blocks), static_cast<unsigned>(sequences), a.splits);
    const auto with_stages = [&](auto zero, auto dim, auto stages) {
        constexpr int D = dim(), STAGES = stages();
        constexpr auto KERNEL = decode_kernel<decltype(zero), D, STAGES>;
        const cudaError_t error = allow_shared<KERNEL>(*limits, SHARED_BYTES<D, STAGES>);
        if (error != cudaSuccess) return static_cast<int>(error);
        return launch(KERNEL, grid, dim3(WARPS * 32), SHARED_BYTES<D, STAGES>, early, stream, a);
    };
    const auto go = [&](auto zero, auto dim) {
        const int limit = limits->shared_per_block;
        if (limit >= 110 * 1024) return with_stages(zero, dim, std::integral_constant<int, 3>{});
        constexpr int two = SHARED_BYTES<dim(), 2> + STATIC_BYTES;
        if constexpr (two > SMALLEST_SHARED) {
            if (limit < two) return with_stages(zero, dim, std::integral_constant<int, 1>{});
        }
        return with_stages(zero, dim, std::integral_constant<int, 2>{});
    };
    const auto with_dim = [&](auto zero) {
        switch (head_dim) {
            case 64: return go(zero, std::integral_constant<int, 64>{});
            case 96: return go(zero, std::integral_constant<int, 96>{});
            case 128: return go(zero, std::integral_constant<int, 128>{});
            default: return static_cast<int>(cudaErrorInvalidValue);
        }
    };
    return dtype == BF16 ? with_dim(__nv_bfloat16{}) : with_dim(__half{});
}

extern "C" int qlora_decode_rope_append(int dtype, void* qkv, int64_t ld, const float* cos, const float* sin,
                                        const uint32_t* positions, void* const* keys, void* const* values, int64_t ldk,
                                        int64_t sequences, int64_t queries, int64_t capacity, int64_t heads,
                                        int64_t kv_heads, int64_t head_dim, int early, cudaStream_t stream) {
    const int64_t tokens = sequences * queries;
    if (tokens <= 0) return static_cast<int>(cudaSuccess);
    if (heads <= 0 || kv_heads <= 0 || head_dim <= 0 || head_dim % 2 != 0 || tokens > 65535)
        return static_cast<int>(cudaErrorInvalidValue);
    const int64_t half = head_dim / 2, all = heads + 2 * kv_heads;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto go = [&](auto size) {
            constexpr int N = size();
            const dim3 grid(static_cast<unsigned>(divide_up(all * (half / N), 128)), static_cast<unsigned>(tokens));
            return launch(append_kernel<T, N>, grid, dim3(128), 0, early, stream, static_cast<T*>(qkv), ld, cos, sin,
                          positions, reinterpret_cast<T* const*>(keys), reinterpret_cast<T* const*>(values), ldk,
                          static_cast<int>(queries), capacity, static_cast<int>(heads), static_cast<int>(kv_heads),
                          static_cast<int>(half));
        };
        constexpr int N = VECTOR<T>;
        const bool vectors = allows_vectors(static_cast<T*>(qkv), ld, half, N) && ldk % N == 0 &&
                             allows_vectors(cos, half, half, 4) && allows_vectors(sin, half, half, 4);
        return vectors ? go(std::integral_constant<int, N>{}) : go(std::integral_constant<int, 1>{});
    });
}
