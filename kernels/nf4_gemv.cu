// Product of a few tokens with 4-bit weights, for decoding:
//
//     y[m, n] = residual[m, n] + x[m, :] W[n, :] + bias[n] + scale sum_c S[m, r0 + c] B[n, c]         m < tokens <= 16
//
// of up to three weights that share x (q|k|v, gate|up), whose outputs lie side by side in y; or, with `swiglu`, h[m, n] =
// silu(gate) up of two weights of the same size. x, y, residual, bias: bf16 or f16; S [tokens, lds], B: f32. Codes as
// bitsandbytes lays them out (nf4.cuh), k a multiple of 64, blocks of at least 64.
//
// Arithmetic: the 16 levels are rounded once to the activations' type, products and sums of 64 are f32 in the tensor
// cores, each partial sum is multiplied by the f32 absmax of its block: one rounding a weight, as when the product of
// level and absmax is rounded, and none of the absmax. The result is rounded once. Sums have a fixed order.
//
// Floor: memory, (1/2 + 1/64) bytes a weight. A block is persistent and takes tiles of 16 rows; its warps share k, each
// the same range in all tiles, so the fragments of x are loaded once and stay in registers. Codes go from memory to
// registers DEPTH tiles ahead and through a table in shared memory that has a copy for every lane (few_tokens.cuh).
// Behind k = 16 * KI * 256 blocks share a tile's k too; the last of them to finish adds the parts in their order.
// With gate and up, rows 0..7 of a tile are gate's and 8..15 up's, so that one thread gets both.

#include "few_tokens.cuh"

namespace {

using namespace few;

constexpr int CHUNKS = 4;       // chunks of 64 codes that a warp takes at a time
constexpr int MOST_WARPS = 16;
constexpr int RING_BYTES = 16 * CHUNKS * 32;   // a warp's stage of codes

template <int KI, int DEPTH> constexpr int AHEAD = DEPTH > KI ? DEPTH / KI : 1;   // tiles

struct Args {
    QloraFewWeights w;
    const void* x;
    const float* s;
    const void* residual;
    void* y;
    float* parts;       // [splits, tiles, 128 * NT] if there are several
    uint32_t* arrived;  // [gridDim.x], zeros before and after
    int64_t ldx, lds, ldr, ldy;
    int32_t first_tile[4];   // of each member; the last entry is the number of tiles
    int32_t tokens, chunks, split_chunks, splits;
    int32_t rank_stride, s_columns;
    int32_t block_shift, nested_shift;
    bool x_vectors, swiglu;
};

template <bool RING, bool NESTED, bool ALIGNED> struct Stage {
    uint2 codes[RING ? 1 : CHUNKS][2];
    // Scales of the two rows: four codes and their nested absmax (the first's and the last's), or four values.
    uint32_t scale_codes[NESTED ? 2 : 1];
    float nested[NESTED ? 2 : 1][ALIGNED ? 1 : 2];
    float scales[NESTED ? 1 : 2][CHUNKS];
};

// A tile's rows: slots 0..7 and 8..15.
struct Rows {
    int member[2];
    int64_t row[2];   // of the first slot
};

__device__ __forceinline__ Rows rows_of(const Args& a, int tile) {
    if (a.swiglu) return {{0, 1}, {static_cast<int64_t>(tile) * 8, static_cast<int64_t>(tile) * 8}};
    const int j = (tile >= a.first_tile[1]) + (tile >= a.first_tile[2]);
    const int64_t row = static_cast<int64_t>(tile - a.first_tile[j]) * 16;
    return {{j, j}, {row, row + 8}};
}

template <bool RING, bool NESTED, bool ALIGNED>
__device__ __forceinline__ void fetch(const Args& a, int tile, int chunk, int end, int lane, uint32_t ring,
                                      Stage<RING, NESTED, ALIGNED>& stage) {
    const Rows rows = rows_of(a, tile);
    if constexpr (RING) {
        // Eight lanes take the 128 bytes of a row; 32-byte pieces are permuted so that reads meet no bank twice.
        const int q = lane % 8;
        const bool valid = chunk + q / 2 < end;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const QloraFewMember& m = a.w.m[rows.member[i / 2]];
            const int r = lane / 8 + i % 2 * 4;
            const int64_t row = min(rows.row[i / 2] + r, m.rows - 1);
            const uint8_t* codes = m.codes + (row * a.w.k + static_cast<int64_t>(chunk) * 64) / 2 + q * 16;
            attention::copy_async16(ring + i / 2 * 1024 + r * 128 + ((q ^ ((r & 3) * 2)) << 4),
                                    valid ? codes : m.codes, valid);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const QloraFewMember& m = a.w.m[rows.member[h]];
        const int64_t row = min(rows.row[h] + lane / 4, m.rows - 1);
        const int64_t flat = row * a.w.k + static_cast<int64_t>(chunk) * 64;
        if constexpr (!RING) {
            const uint8_t* codes = m.codes + flat / 2 + lane % 4 * 8;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                stage.codes[c][h] = chunk + c < end ? load_stream8(codes + c * 32) : make_uint2(0, 0);
        }
        if constexpr (ALIGNED) {
            const int64_t block = flat >> 6;
            if constexpr (NESTED) {
                stage.scale_codes[h] =
                    chunk < end ? __ldg(reinterpret_cast<const uint32_t*>(m.absmax_codes + block)) : 0;
                stage.nested[h][0] = chunk < end ? __ldg(m.nested_absmax + (block >> a.nested_shift)) : 0.0f;
            } else {
                const float4 s = chunk < end ? __ldg(reinterpret_cast<const float4*>(m.absmax + block)) : float4{};
                stage.scales[h][0] = s.x, stage.scales[h][1] = s.y, stage.scales[h][2] = s.z, stage.scales[h][3] = s.w;
            }
        } else {
            if constexpr (NESTED) stage.scale_codes[h] = 0, stage.nested[h][0] = stage.nested[h][1] = 0.0f;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const int64_t block = (flat + c * 64) >> a.block_shift;
                if constexpr (NESTED) {
                    if (chunk + c >= end) continue;
                    stage.scale_codes[h] |= static_cast<uint32_t>(__ldg(m.absmax_codes + block)) << (8 * c);
                    // At most one border of nested blocks lies between four chunks.
                    const float nested = __ldg(m.nested_absmax + (block >> a.nested_shift));
                    if (c == 0) stage.nested[h][0] = nested;
                    stage.nested[h][1] = nested;
                } else {
                    stage.scales[h][c] = chunk + c < end ? __ldg(m.absmax + block) : 0.0f;
                }
            }
        }
    }
}

template <typename T, int NT, int KI, int DEPTH, bool RING, bool NESTED, bool ALIGNED>
__global__ void __launch_bounds__(MOST_WARPS * 32, 1) gemv_kernel(const __grid_constant__ Args a) {
    __shared__ __align__(16) uint32_t table[TABLE_WORDS];
    __shared__ float maps[3][256];
    __shared__ bool last;
    extern __shared__ __align__(128) float dynamic[];
    constexpr int TILES_AHEAD = AHEAD<KI, DEPTH>;
    static_assert(DEPTH >= KI ? DEPTH % KI == 0 : KI % DEPTH == 0, "stages are known at compile time");
    const int threads = blockDim.x, warps = threads / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int RING_FLOATS = RING ? DEPTH * RING_BYTES / 4 : 0;
    float* sums = dynamic + warps * RING_FLOATS;                  // [2][warps][128 NT]
    float* lora_b = sums + 2 * warps * 128 * NT;                  // [TILES_AHEAD + 2][16][rank_stride]
    float* lora_s = lora_b + (TILES_AHEAD + 2) * 16 * a.rank_stride;   // [8 NT][s_columns]
    const uint32_t ring = shared_address(dynamic + warp * RING_FLOATS);

    const int tiles = a.first_tile[3], split = blockIdx.y;
    const int first = split * a.split_chunks + warp * (CHUNKS * KI);
    const int end = min(a.chunks, (split + 1) * a.split_chunks);
    const auto fetch_lora = [&](int tile, int buffer) {
        if (a.rank_stride == 0 || split != 0) return;
        const Rows rows = rows_of(a, tile);
        for (int i = threadIdx.x; i < 16 * a.rank_stride; i += threads) {
            const int s = i / a.rank_stride, c = i - s * a.rank_stride;
            const QloraFewMember& m = a.w.m[s < 8 ? rows.member[0] : rows.member[1]];
            const int64_t row = (s < 8 ? rows.row[0] : rows.row[1]) + s % 8;
            const bool valid = c < m.rank && row < m.rows;
            attention::copy_async4(shared_address(lora_b + buffer * 16 * a.rank_stride + i),
                                   valid ? static_cast<const void*>(m.lora_b + row * m.rank + c) : m.codes, valid);
        }
    };
    let_dependents_start();
    Stage<RING, NESTED, ALIGNED> stages[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        const int tile = blockIdx.x + d / KI * gridDim.x;
        if (tile < tiles) {
            fetch(a, tile, first + d % KI * CHUNKS, end, lane, ring + d * RING_BYTES, stages[d]);
            if (d % KI == 0) fetch_lora(tile, d / KI);
        }
        attention::copy_async_commit();
    }
    fill_table<T>(table, a.w.quant_type, threads);
    if constexpr (NESTED) {
        for (int j = 0; j < a.w.count; j++)
            for (int i = threadIdx.x; i < 256; i += threads) maps[j][i] = __ldg(a.w.m[j].nested_map + i);
    }
    wait_for_predecessor();
    uint32_t x[KI * CHUNKS][NT][8];
#pragma unroll
    for (int c = 0; c < KI * CHUNKS; c++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int token = n * 8 + lane / 4;
            const bool valid = token < a.tokens && first + c < end;
            const T* p = static_cast<const T*>(a.x) + token * a.ldx + (first + c) * 64 + lane % 4 * 16;
            load_x(p, a.x_vectors, valid, x[c][n]);
        }
    for (int i = threadIdx.x; i < 8 * NT * a.s_columns; i += threads) {
        const int token = i / a.s_columns;
        lora_s[i] = token < a.tokens ? a.s[token * a.lds + i - token * a.s_columns] : 0.0f;
    }

    // The element of a tile that this thread finishes: the order is that of the accumulators.
    const int e = threadIdx.x % 128, slot = e / 16 + (e >> 1 & 1) * 8;
    const int token = threadIdx.x / 128 * 8 + (e >> 2 & 3) * 2 + (e & 1);
    const bool finishes = threadIdx.x < 128 * NT && token < a.tokens;

    const auto element = [&](int tile, int& member, int64_t& row, int64_t& column) {
        const Rows rows = rows_of(a, tile);
        member = slot < 8 ? rows.member[0] : rows.member[1];
        row = (slot < 8 ? rows.row[0] : rows.row[1]) + slot % 8;
        column = row;
        if (!a.swiglu) {
            if (member > 0) column += a.w.m[0].rows;
            if (member > 1) column += a.w.m[1].rows;
        }
        return row < a.w.m[member].rows;
    };
    // What is added to an element, apart from the adapter's part: fetched a tile ahead.
    const auto addends = [&](int tile) {
        float sum = 0.0f;
        int member;
        int64_t row, column;
        if (finishes && split == 0 && tile < tiles && element(tile, member, row, column)) {
            const T* bias = static_cast<const T*>(a.w.m[member].bias);
            const T* residual = static_cast<const T*>(a.residual);
            if (bias) sum = to_float(bias[row]);
            if (residual) sum += to_float(residual[token * a.ldr + column]);
        }
        return sum;
    };
    // Stores the sum of an element; with gate and up the threads of both are in a warp.
    const auto finish = [&](int tile, float sum) {
        int member;
        int64_t row, column;
        const bool valid = element(tile, member, row, column) && token < a.tokens;
        if (a.swiglu) {
            const float up = __shfl_down_sync(~0u, sum, 2);
            sum = sum / (1.0f + __expf(-sum)) * up;
            if (slot >= 8) return;
        }
        if (valid) static_cast<T*>(a.y)[token * a.ldy + column] = from_float<T>(sum);
    };

    float added = addends(blockIdx.x);
    __syncthreads();

    const uint32_t lane4 = lane * 4;
    // Where the lane's codes lie in a stage: row g, and 1024 bytes behind it row g + 8.
    const char* in_ring = reinterpret_cast<const char*>(dynamic + warp * RING_FLOATS) + lane / 4 * 128 + lane % 4 * 8;
    int buffer = 0, lora_buffer = 0, lora_next = TILES_AHEAD % (TILES_AHEAD + 2);
    for (int base = blockIdx.x; base < tiles; base += TILES_AHEAD * gridDim.x) {
#pragma unroll
        for (int u = 0; u < TILES_AHEAD; u++) {
            const int tile = base + u * gridDim.x;
            if (tile >= tiles) break;
            const Rows rows = rows_of(a, tile);
            float offsets[2] = {a.w.m[rows.member[0]].nested_offset, a.w.m[rows.member[1]].nested_offset};
            float sum[NT][4] = {};
#pragma unroll
            for (int ki = 0; ki < KI; ki++) {
                const int at = (u * KI + ki) % DEPTH;
                Stage<RING, NESTED, ALIGNED>& stage = stages[at];
                attention::copy_async_wait<DEPTH - 1>();
                __syncwarp();
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    float part[NT][4] = {};
                    uint2 low, high;
                    if constexpr (RING) {
                        const char* p = in_ring + at * RING_BYTES + ((c ^ (lane / 4 & 3)) << 5);
                        low = *reinterpret_cast<const uint2*>(p);
                        high = *reinterpret_cast<const uint2*>(p + 1024);
                    } else {
                        low = stage.codes[c][0], high = stage.codes[c][1];
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        uint32_t w[4];
                        decode_step(table, low, high, i, lane4, w);
#pragma unroll
                        for (int n = 0; n < NT; n++) {
                            const uint32_t(&b)[8] = x[ki * CHUNKS + c][n];
                            multiply_add<T>(part[n], w, b[2 * i], b[2 * i + 1]);
                        }
                    }
                    float scale[2];
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        if constexpr (NESTED) {
                            const float value = maps[rows.member[h]][stage.scale_codes[h] >> (8 * c) & 255];
                            float nested = stage.nested[h][0];
                            if constexpr (!ALIGNED) {
                                // Where the block of chunk c lies; as in `fetch`.
                                const int64_t row =
                                    min(rows.row[h] + lane / 4, a.w.m[rows.member[h]].rows - 1);
                                const int64_t flat = row * a.w.k + static_cast<int64_t>(first + ki * CHUNKS) * 64;
                                const int shift = a.block_shift + a.nested_shift;
                                if ((flat + c * 64) >> shift != flat >> shift) nested = stage.nested[h][1];
                            }
                            scale[h] = __fadd_rn(nf4::multiply_flushed(value, nested), offsets[h]);
                        } else {
                            scale[h] = stage.scales[h][c];
                        }
                    }
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) sum[n][i] = fmaf(scale[i / 2], part[n][i], sum[n][i]);
                }
                // The stage is free: its next use is DEPTH steps of the (tile, ki) sequence away.
                const int next = u * KI + ki + DEPTH;
                const int next_tile = base + next / KI * gridDim.x;
                __syncwarp();
                if (next_tile < tiles) {
                    fetch(a, next_tile, first + next % KI * CHUNKS, end, lane, ring + at * RING_BYTES, stage);
                    if (next % KI == 0) fetch_lora(next_tile, lora_next);
                }
                if (next % KI == 0) lora_next = lora_next == TILES_AHEAD + 1 ? 0 : lora_next + 1;
                attention::copy_async_commit();
            }
            float4* to = reinterpret_cast<float4*>(sums + (buffer * warps + warp) * 128 * NT);
#pragma unroll
            for (int n = 0; n < NT; n++) to[n * 32 + lane] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
            __syncthreads();
            const float now = added;
            added = addends(tile + gridDim.x);
            if (threadIdx.x < 128 * NT) {
                float total = now;
                if (a.rank_stride > 0 && split == 0) {
                    const QloraFewMember& m = a.w.m[slot < 8 ? rows.member[0] : rows.member[1]];
                    const float* b = lora_b + (lora_buffer * 16 + slot) * a.rank_stride;
                    const float* s = lora_s + token * a.s_columns + m.r0;
                    float dot = 0.0f;
#pragma unroll 4
                    for (int c = 0; c < m.rank; c++) dot = fmaf(b[c], s[c], dot);
                    total = fmaf(m.scale, dot, total);
                }
                const float* from = sums + buffer * warps * 128 * NT + threadIdx.x;
                for (int w = 0; w < warps; w++) total += from[w * 128 * NT];
                if (a.splits == 1) finish(tile, total);
                else __stcg(a.parts + (static_cast<int64_t>(split) * tiles + tile) * (128 * NT) + threadIdx.x, total);
            }
            buffer ^= 1;
            lora_buffer = lora_buffer == TILES_AHEAD + 1 ? 0 : lora_buffer + 1;
        }
    }
    if (a.splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(a.arrived + blockIdx.x, 1) == static_cast<uint32_t>(a.splits - 1);
        if (last) a.arrived[blockIdx.x] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    // Every group of 128 NT threads takes a tile (a thread has the same element of it as before, modulo 128 NT).
    if (threadIdx.x >= 128 * NT) return;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float total = 0.0f;
        for (int i = 0; i < a.splits; i++)
            total += __ldcg(a.parts + (static_cast<int64_t>(i) * tiles + tile) * (128 * NT) + threadIdx.x);
        finish(tile, total);
    }
}

struct Shape {
    int warps, splits, split_chunks, blocks;
    size_t shared;
};

template <int KI, int DEPTH, bool RING> Shape shape_of(int64_t k, int tiles, int nt, int rank_stride, int s_columns) {
    const int64_t chunks = k / 64, needed = divide_up(chunks, CHUNKS * KI);
    Shape s;
    s.splits = static_cast<int>(divide_up(needed, MOST_WARPS));
    s.warps = static_cast<int>(divide_up(needed, s.splits));
    if (s.warps < 4 * nt) s.warps = 4 * nt;   // one thread an element
    s.split_chunks = s.warps * CHUNKS * KI;
    const int64_t most = static_cast<int64_t>(device_limits().multiprocessors) * (MOST_WARPS / s.warps) / s.splits;
    s.blocks = static_cast<int>(tiles < most ? tiles : most < 1 ? 1 : most);
    s.shared = (RING ? s.warps * DEPTH * RING_BYTES : 0) +
               sizeof(float) * (2 * s.warps * 128 * nt + (AHEAD<KI, DEPTH> + 2) * 16 * rank_stride +
                                8 * nt * s_columns);
    return s;
}

}  // namespace

#ifdef GEMV_LAB
int gemv_variant = 0;
#endif

namespace {

template <typename T, int NT, int KI, int DEPTH, bool RING>
int launch_gemv(Args a, void* workspace, bool early, cudaStream_t stream) {
    const bool nested = !a.w.m[0].absmax;
    bool aligned = a.w.blocksize == 64 && a.w.k % (64 * CHUNKS) == 0;
    for (int j = 0; j < a.w.count; j++) {
        const void* scales = nested ? static_cast<const void*>(a.w.m[j].absmax_codes) : a.w.m[j].absmax;
        if (reinterpret_cast<uintptr_t>(scales) % (nested ? 4 : 16) != 0) aligned = false;
    }
    const Shape s = shape_of<KI, DEPTH, RING>(a.w.k, a.first_tile[3], NT, a.rank_stride, a.s_columns);
    a.splits = s.splits;
    a.split_chunks = s.split_chunks;
    a.arrived = static_cast<uint32_t*>(workspace);
    a.parts = reinterpret_cast<float*>(static_cast<char*>(workspace) + 4096);
    if (s.splits > 1 && !workspace) return static_cast<int>(cudaErrorInvalidValue);
    const auto go = [&](auto is_nested, auto is_aligned) {
        constexpr auto KERNEL = gemv_kernel<T, NT, KI, DEPTH, RING, is_nested(), is_aligned()>;
        const cudaError_t error = allow_shared<KERNEL>(s.shared);
        if (error != cudaSuccess) return static_cast<int>(error);
        return launch(KERNEL, dim3(s.blocks, s.splits), dim3(s.warps * 32), s.shared, early, stream, a);
    };
    if (nested) return aligned ? go(std::true_type{}, std::true_type{}) : go(std::true_type{}, std::false_type{});
    return aligned ? go(std::false_type{}, std::true_type{}) : go(std::false_type{}, std::false_type{});
}

}  // namespace

// Bytes of the workspace, which is zero before the first call; calls leave it so where it matters.
extern "C" int64_t qlora_nf4_gemv_workspace(int64_t rows, int64_t k, int64_t tokens) {
    const int nt = tokens > 8 ? 2 : 1;
    const int64_t splits = divide_up(divide_up(k / 64, CHUNKS), MOST_WARPS), tiles = divide_up(rows, 8) + 3;
    return splits <= 1 ? 0 : 4096 + splits * tiles * 128 * nt * static_cast<int64_t>(sizeof(float));
}

extern "C" int qlora_nf4_gemv(int dtype, QloraFewWeights weights, const void* x, int64_t ldx, const float* s,
                              int64_t lds, const void* residual, int64_t ldr, void* y, int64_t ldy, int64_t tokens,
                              int swiglu, int early, void* workspace, cudaStream_t stream) {
    if (tokens <= 0) return static_cast<int>(cudaSuccess);
    if (tokens > 16 || !is_activation(dtype) || !takes(weights)) return static_cast<int>(cudaErrorInvalidValue);
    if (swiglu && (weights.count != 2 || weights.m[0].rows != weights.m[1].rows || residual))
        return static_cast<int>(cudaErrorInvalidValue);
    Args a{};
    a.w = weights;
    a.x = x, a.ldx = ldx, a.s = s, a.lds = lds, a.residual = residual, a.ldr = ldr, a.y = y, a.ldy = ldy;
    a.tokens = static_cast<int32_t>(tokens);
    a.chunks = static_cast<int32_t>(weights.k / 64);
    a.block_shift = nf4::log2_of(weights.blocksize);
    a.nested_shift = nf4::log2_of(weights.nested_blocksize);
    a.swiglu = swiglu != 0;
    a.x_vectors = attention::aligned16(x, ldx);
    int64_t tiles = 0;
    for (int j = 0; j < 3; j++) {
        a.first_tile[j] = static_cast<int32_t>(tiles);
        if (j < weights.count) tiles += divide_up(weights.m[j].rows, 16);
        if (j >= weights.count) a.first_tile[j] = INT32_MAX;
        if (j < weights.count && s && weights.m[j].lora_b && weights.m[j].rank > 0) {
            const int rank = weights.m[j].rank, columns = weights.m[j].r0 + rank;
            if (columns > a.s_columns) a.s_columns = columns;
            if (rank > a.rank_stride) a.rank_stride = rank;
        } else {
            a.w.m[j].rank = 0;
        }
    }
    if (swiglu) tiles = divide_up(weights.m[0].rows, 8);
    if (tiles > LARGEST_GRID || a.s_columns > 1024) return static_cast<int>(cudaErrorInvalidValue);
    a.first_tile[3] = static_cast<int32_t>(tiles);
    const auto with_type = [&](auto zero) {
        using T = decltype(zero);
#ifdef GEMV_LAB
        const auto few_or_more = [&](auto f1, auto d1, auto r1, auto d2, auto r2) {
            return tokens <= 8 ? launch_gemv<T, 1, f1(), d1(), r1()>(a, workspace, early, stream)
                               : launch_gemv<T, 2, 1, d2(), r2()>(a, workspace, early, stream);
        };
        constexpr std::integral_constant<int, 1> I1; constexpr std::integral_constant<int, 2> I2;
        constexpr std::integral_constant<int, 3> I3; constexpr std::integral_constant<int, 4> I4;
        constexpr std::false_type F; constexpr std::true_type R;
        switch (gemv_variant) {
            case 0: return few_or_more(I1, I2, F, I1, F);
            case 1: return few_or_more(I1, I2, R, I2, R);
            case 2: return few_or_more(I1, I4, R, I4, R);
            case 3: return few_or_more(I2, I2, R, I3, R);
            default: return few_or_more(I2, I4, R, I3, R);
        }
#else
        return tokens <= 8 ? launch_gemv<T, 1, 1, 4, true>(a, workspace, early, stream)
                           : launch_gemv<T, 2, 1, 3, true>(a, workspace, early, stream);
#endif
    };
    return dtype == BF16 ? with_type(__nv_bfloat16{}) : with_type(__half{});
}
