// Product of a few tokens with 4-bit weights, for decoding:
//
//     y[m, n] = residual[m, n] + x[m, :] W[n, :] + bias[n] + scale sum_c S[m, r0 + c] B[n, c]         m < tokens <= 16
//
// of up to three weights that share x (q|k|v, gate|up), whose outputs lie side by side in y; or, with `swiglu`, h[m, n]
// = silu(gate) up of two weights of the same size. x, y, residual, bias: bf16 or f16; S [tokens, lds], B: f32. Codes as
// bitsandbytes lays them out (nf4.cuh), k a multiple of 64, blocks of at least 64.
//
// Arithmetic: the 16 levels are rounded once to the activations' type, products and sums of 64 are f32 in the tensor
// cores, each partial sum is multiplied by the f32 absmax of its block: one rounding a weight, as when the product of
// level and absmax is rounded, and none of the absmax. The result is rounded once. Sums have a fixed order.
//
// Floor: memory, (1/2 + 1/64) bytes a weight. A block is persistent and takes tiles of 16 rows; its warps share k, each
// the same range in all tiles, so the fragments of x are loaded once and stay in registers. Each warp has a ring of
// DEPTH stages in shared memory for its codes (cp.async), and decodes them through a table that has a copy for every
// lane (few_tokens.cuh): one integer operation and one access a byte. The warps meet only after a batch of tiles, when
// every thread adds up and stores one element. A warp also adds some columns of the adapter.
// Behind k = 16 * KI * 256 blocks share a tile's k too; the last of them to finish adds the parts in order.
// With gate and up, rows 0..7 of a tile are gate's and 8..15 up's, so that one warp gets both.

#include "few_tokens.cuh"

namespace {

using namespace few;

constexpr int CHUNKS = 4;       // chunks of 64 codes that a warp takes at a time
constexpr int MOST_WARPS = 16;
constexpr int RING_BYTES = 16 * CHUNKS * 32;   // a warp's stage of codes

struct Args {
    QloraFewWeights w;
    const void* x;
    const float* s;
    const void* residual;
    void* y;
    float* parts;       // [splits, tiles, 128 * NT] if there are several
    uint32_t* arrived;  // [gridDim.x], zeros before and after
    int64_t ldx, lds, ldr, ldy;
    int64_t half;            // bytes from the codes of a tile's slot 0 to those of slot 8
    int32_t first_tile[4];   // of each member and, behind the last one, the number of tiles
    int32_t rows[3];
    int32_t tokens, chunks, split_chunks, splits;
    int32_t batch;           // tiles between two barriers
    int32_t lora_columns;    // of a member's adapter that a warp takes
    int32_t s_columns;
    int32_t block_shift, nested_shift;
    bool x_vectors, swiglu;
};

// Scales of a stage, as they lie in memory: a lane has those of row lane / 2 and of two chunks.
template <bool NESTED> struct StageScales {
    uint32_t codes;
    float values[2];   // or the nested absmax
};

// The rows of a tile: its slots 0..7 and 8..15.
struct Rows {
    int member[2], row[2];
};

__device__ __forceinline__ Rows rows_of(const Args& a, int tile) {
    if (a.swiglu) return {{0, 1}, {tile * 8, tile * 8}};
    const int j = (tile >= a.first_tile[1]) + (tile >= a.first_tile[2]);
    const int row = (tile - a.first_tile[j]) * 16;
    return {{j, j}, {row, row + 8}};
}

// Where a lane's part of the next tile to fetch lies. Most steps from tile to tile are of the same length: pointers
// move by it, and are worked out anew only where the next member begins.
struct Cursor {
    const uint8_t* codes;   // the lane's 16 bytes of the first of its rows (others are 4 rows and `half` bytes on)
    const float* lora_b;    // the lane's first column of its row
    int scale_chunk;        // the first of its two chunks of 64
    int left;               // rows of the member from the tile's first one on
    int member, tile;       // the member of slots 0..7

    __device__ __forceinline__ void place(const Args& a, int to, int lane, int warp, int warps) {
        tile = to;
        const Rows rows = rows_of(a, tile);
        member = rows.member[0];
        left = a.rows[member] - rows.row[0];
        codes = a.w.m[member].codes + (rows.row[0] + lane / 8) * (a.w.k / 2) + lane % 8 * 16;
        scale_chunk = ((lane < 16 ? rows.row[0] : rows.row[1]) + lane / 2 % 8) * a.chunks + lane % 2 * 2;
        const bool low = lane / 8 % 2 == 0;
        const QloraFewMember& m = a.w.m[low ? rows.member[0] : rows.member[1]];
        const int64_t row = (low ? rows.row[0] : rows.row[1]) + lane % 8;
        lora_b = m.lora_b + row * m.rank + warp + lane / 16 * warps;
    }

    // The member of the slots from 8 on.
    __device__ __forceinline__ int upper(const Args& a) const { return a.swiglu ? 1 : member; }

    __device__ __forceinline__ void advance(const Args& a, int stride, int lane, int warp, int warps) {
        const int next = tile + stride;
        if (!a.swiglu && next >= a.first_tile[member + 1]) {
            if (next < a.first_tile[3]) place(a, next, lane, warp, warps);
            tile = next;
            return;
        }
        tile = next;
        const int rows = stride * (a.swiglu ? 8 : 16);
        codes += rows * (a.w.k / 2);
        left -= rows;
        scale_chunk += rows * a.chunks;
        if (a.lora_columns > 0)
            lora_b += static_cast<int64_t>(rows) * a.w.m[lane / 8 % 2 == 0 ? member : upper(a)].rank;
    }
};

// Starts the copy of a stage's codes to the ring and loads its scales; rows behind the member's last are zeros.
template <bool NESTED, bool ALIGNED>
__device__ __forceinline__ void fetch(const Args& a, const Cursor& cursor, int chunk, int end, int lane, uint32_t to,
                                      StageScales<NESTED>& scales) {
    const bool valid = chunk + lane % 8 / 2 < end;
    const int64_t four_rows = a.w.k * 2;
    const int upper_row = a.swiglu ? 0 : 8;   // after the tile's first
    const uint8_t* codes = cursor.codes + chunk * 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int left = cursor.left - lane / 8 - h * upper_row;
        async::copy16(to + h * 1024, codes, valid && left > 0);
        async::copy16(to + h * 1024 + 512, codes + four_rows, valid && left > 4);
        codes += a.half;
    }
    const QloraFewMember& m = a.w.m[lane < 16 ? cursor.member : cursor.upper(a)];
    const int own = chunk + lane % 2 * 2;
    const int chunk_index = cursor.scale_chunk + chunk;
    scales.codes = 0;
    scales.values[0] = scales.values[1] = 0.0f;
    if (cursor.left <= lane / 2 % 8 + (lane < 16 ? 0 : upper_row)) return;
    if constexpr (ALIGNED) {
        if (own < end) {
            if constexpr (NESTED) {
                scales.codes = __ldg(reinterpret_cast<const uint16_t*>(m.absmax_codes + chunk_index));
                scales.values[0] = scales.values[1] = __ldg(m.nested_absmax + (chunk_index >> a.nested_shift));
            } else {
                const float2 s = __ldg(reinterpret_cast<const float2*>(m.absmax + chunk_index));
                scales.values[0] = s.x, scales.values[1] = s.y;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (own + i >= end) continue;
            const int64_t block = (static_cast<int64_t>(chunk_index + i) << 6) >> a.block_shift;
            if constexpr (NESTED) {
                scales.codes |= static_cast<uint32_t>(__ldg(m.absmax_codes + block)) << (8 * i);
                scales.values[i] = __ldg(m.nested_absmax + (block >> a.nested_shift));
            } else {
                scales.values[i] = __ldg(m.absmax + block);
            }
        }
    }
}

constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }
template <int KI, int DEPTH> constexpr int UNROLLED = DEPTH / common_divisor(DEPTH, KI);   // tiles

template <typename T, int NT, int KI, int DEPTH, bool NESTED, bool ALIGNED>
__global__ void __launch_bounds__(MOST_WARPS * 32, 1) gemv_kernel(const __grid_constant__ Args a) {
    if constexpr (!mma::has_products<T>()) return;
    __shared__ float maps[3][256];
    __shared__ bool last;
    extern __shared__ __align__(128) float dynamic[];
    const int threads = blockDim.x, warps = threads / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int lora_floats = 16 * a.lora_columns;
    uint32_t* table = reinterpret_cast<uint32_t*>(dynamic);
    char* ring = reinterpret_cast<char*>(table + TABLE_WORDS) + warp * (DEPTH * RING_BYTES);
    float* sums = dynamic + TABLE_WORDS + warps * (DEPTH * RING_BYTES / 4);   // [2][batch][warps][128 NT]
    float* decoded = sums + 2 * a.batch * warps * 128 * NT + warp * (16 * CHUNKS);   // scales: [16][CHUNKS]
    float* lora_s = sums + 2 * a.batch * warps * 128 * NT + warps * (16 * CHUNKS);   // [s_columns][8 NT], scaled
    float* lora_b = lora_s + a.s_columns * 8 * NT + warp * (DEPTH * lora_floats);   // [DEPTH][lora_columns][16]
    const uint32_t ring_address = shared_address(ring), lora_address = shared_address(lora_b);

    const int tiles = a.first_tile[3], split = blockIdx.y, stride = gridDim.x;
    const int first = split * a.split_chunks + warp * (CHUNKS * KI);
    const int end = min(a.chunks, (split + 1) * a.split_chunks);
    const bool with_lora = lora_floats > 0 && split == 0;
    StageScales<NESTED> scales[DEPTH];
    Cursor cursor;
    cursor.place(a, blockIdx.x, lane, warp, warps);
    // Eight lanes take the 128 bytes of a row; 32-byte pieces are permuted so that reads meet no bank twice.
    const uint32_t fetch_to = ring_address + lane / 8 * 128 + ((lane % 8 ^ (lane / 8 & 3) * 2) << 4);
    // The next step of the sequence (tile, ki); `at` is its stage.
    const auto fetch_next = [&](int ki, int at) {
        if (cursor.tile < tiles) {
            fetch<NESTED, ALIGNED>(a, cursor, first + ki * CHUNKS, end, lane, fetch_to + at * RING_BYTES, scales[at]);
            if (with_lora && ki == 0) {
                // Each warp adds some columns of the adapter: warp, warp + warps, ...
                const int rank = a.w.m[lane / 8 % 2 == 0 ? cursor.member : cursor.upper(a)].rank;
                const bool in_rows = cursor.left > lane % 8 + (a.swiglu || lane / 8 % 2 == 0 ? 0 : 8);
                const float* from = cursor.lora_b;
                for (int j = lane / 16; j < a.lora_columns; j += 2, from += 2 * warps) {
                    const bool valid = warp + j * warps < rank && in_rows;
                    const void* safe = a.w.m[0].codes;
                    async::copy4(lora_address + (at * lora_floats + j * 16 + lane % 16) * 4,
                                           valid ? from : safe, valid);
                }
            }
        }
        async::commit();
        if (ki == KI - 1) cursor.advance(a, stride, lane, warp, warps);
    };
    let_next_begin();
#pragma unroll
    for (int d = 0; d < DEPTH; d++) fetch_next(d % KI, d);
    fill_table<T>(table, a.w.quant_type, threads);
    if constexpr (NESTED) {
        for (int j = 0; j < a.w.count; j++)
            for (int i = threadIdx.x; i < 256; i += threads) maps[j][i] = __ldg(a.w.m[j].nested_map + i);
    }
    wait_for_previous();
    uint32_t x[KI * CHUNKS][NT][8];
#pragma unroll
    for (int c = 0; c < KI * CHUNKS; c++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            const int token = n * 8 + g;
            const bool valid = token < a.tokens && first + c < end;
            const T* p = static_cast<const T*>(a.x) + token * a.ldx + (first + c) * 64 + t * 16;
            load_x(p, a.x_vectors, valid, x[c][n]);
        }
    for (int i = threadIdx.x; i < 8 * NT * a.s_columns; i += threads) {
        const int column = i / (8 * NT), token = i % (8 * NT);
        float scale = 0.0f;
        for (int j = 0; j < a.w.count; j++)
            if (column >= a.w.m[j].r0 && column < a.w.m[j].r0 + a.w.m[j].rank) scale = a.w.m[j].scale;
        lora_s[i] = token < a.tokens ? scale * a.s[token * a.lds + column] : 0.0f;
    }

    // The element that this thread finishes in a batch of tiles: the order is that of the accumulators.
    const int of_batch = threadIdx.x / (128 * NT), in_tile = threadIdx.x % (128 * NT), e = in_tile % 128;
    const int slot = e / 16 + (e >> 1 & 1) * 8, token = in_tile / 128 * 8 + (e >> 2 & 3) * 2 + (e & 1);
    const auto element = [&](int tile, int& member, int& row, int64_t& column) {
        const Rows rows = rows_of(a, tile);
        member = slot < 8 ? rows.member[0] : rows.member[1];
        row = (slot < 8 ? rows.row[0] : rows.row[1]) + slot % 8;
        column = row;
        if (!a.swiglu && member > 0) column += a.rows[0];
        if (!a.swiglu && member > 1) column += a.rows[1];
        return row < a.rows[member] && token < a.tokens;
    };
    // The terms added to the element, apart from the adapter's part: fetched a batch ahead.
    const auto addends = [&](int base) {
        const int tile = base + of_batch * stride;
        float sum = 0.0f;
        int member, row;
        int64_t column;
        if (of_batch < a.batch && split == 0 && tile < tiles && element(tile, member, row, column)) {
            const T* bias = static_cast<const T*>(a.w.m[member].bias);
            const T* residual = static_cast<const T*>(a.residual);
            if (bias) sum = to_float(bias[row]);
            if (residual) sum += to_float(residual[token * a.ldr + column]);
        }
        return sum;
    };
    // Stores the sum of an element; with gate and up the threads of both are in a warp.
    const auto finish = [&](int tile, float sum) {
        int member, row;
        int64_t column;
        const bool valid = element(tile, member, row, column);
        if (a.swiglu) {
            const float up = __shfl_down_sync(~0u, sum, 2);
            sum = sum / (1.0f + __expf(-sum)) * up;
            if (slot >= 8) return;
        }
        if (valid) static_cast<T*>(a.y)[token * a.ldy + column] = from_float<T>(sum);
    };

    int batch_tile = blockIdx.x, in_batch = 0, buffer = 0;
    float added = addends(batch_tile);
    __syncthreads();

    const uint32_t lane4 = lane * 4;
    // Where the lane's codes lie in a stage: row g, and 1024 bytes behind it row g + 8.
    const char* in_ring = ring + g * 128 + t * 8;
    constexpr int U = UNROLLED<KI, DEPTH>;
    for (int base = blockIdx.x; base < tiles; base += U * stride) {
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int tile = base + u * stride;
            if (tile >= tiles) break;
            const Rows rows = rows_of(a, tile);
            float sum[NT][4] = {};
#pragma unroll
            for (int ki = 0; ki < KI; ki++) {
                const int at = (u * KI + ki) % DEPTH;
                async::wait<DEPTH - 1>();
                float2 values = make_float2(scales[at].values[0], scales[at].values[1]);
                if constexpr (NESTED) {
                    const int j = lane < 16 ? rows.member[0] : rows.member[1];
                    const float offset = a.w.m[j].nested_offset;
                    const float low = maps[j][scales[at].codes & 255], high = maps[j][scales[at].codes >> 8];
                    values.x = __fadd_rn(nf4::multiply_flushed(low, values.x), offset);
                    values.y = __fadd_rn(nf4::multiply_flushed(high, values.y), offset);
                }
                reinterpret_cast<float2*>(decoded)[lane] = values;
                __syncwarp();
                float scale[2][CHUNKS];
                load_floats(decoded + g * CHUNKS, scale[0]);
                load_floats(decoded + (g + 8) * CHUNKS, scale[1]);
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    const char* p = in_ring + at * RING_BYTES + ((c ^ (g & 3)) << 5);
                    const uint2 low = *reinterpret_cast<const uint2*>(p);
                    const uint2 high = *reinterpret_cast<const uint2*>(p + 1024);
                    float part[NT][4] = {};
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
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) sum[n][i] = fmaf(scale[i / 2][c], part[n][i], sum[n][i]);
                }
                if (ki == 0 && with_lora) {
                    const float* b = lora_b + at * lora_floats;
                    const QloraFewMember &m0 = a.w.m[rows.member[0]], &m1 = a.w.m[rows.member[1]];
                    for (int j = 0; j < a.lora_columns; j++) {
                        const int column = warp + j * warps;
                        const float low = b[j * 16 + g], high = b[j * 16 + g + 8];
#pragma unroll
                        for (int n = 0; n < NT; n++) {
                            const float* s = lora_s + n * 8 + t * 2;
                            if (column < m0.rank) {
                                const float2 v = *reinterpret_cast<const float2*>(s + (m0.r0 + column) * (8 * NT));
                                sum[n][0] = fmaf(low, v.x, sum[n][0]), sum[n][1] = fmaf(low, v.y, sum[n][1]);
                            }
                            if (column < m1.rank) {
                                const float2 v = *reinterpret_cast<const float2*>(s + (m1.r0 + column) * (8 * NT));
                                sum[n][2] = fmaf(high, v.x, sum[n][2]), sum[n][3] = fmaf(high, v.y, sum[n][3]);
                            }
                        }
                    }
                }
                // The stage is free: its next use is DEPTH steps away.
                __syncwarp();
                fetch_next((ki + DEPTH) % KI, at);
            }
            float4* to = reinterpret_cast<float4*>(sums + ((buffer * a.batch + in_batch) * warps + warp) * 128 * NT);
#pragma unroll
            for (int n = 0; n < NT; n++) to[n * 32 + lane] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
            if (++in_batch < a.batch && tile + stride < tiles) continue;
            __syncthreads();
            const int mine = batch_tile + of_batch * stride;
            float total = added;
            batch_tile = tile + stride;
            added = addends(batch_tile);
            if (of_batch < in_batch) {
                const float* from = sums + (buffer * a.batch + of_batch) * warps * 128 * NT + in_tile;
#pragma unroll 4
                for (int w = 0; w < warps; w++) total += from[w * 128 * NT];
                if (a.splits == 1) finish(mine, total);
                else __stcg(a.parts + (static_cast<int64_t>(split) * tiles + mine) * (128 * NT) + in_tile, total);
            }
            in_batch = 0;
            buffer ^= 1;
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
    if (!last || of_batch >= a.batch) return;
    constexpr int TOGETHER = 4;   // tiles, so that their loads are under way at once
    for (int base = blockIdx.x + of_batch * stride; base < tiles; base += TOGETHER * a.batch * stride) {
        float totals[TOGETHER] = {};
        for (int i = 0; i < a.splits; i++)
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                const int tile = min(base + k * a.batch * stride, tiles - 1);
                totals[k] += __ldcg(a.parts + (static_cast<int64_t>(i) * tiles + tile) * (128 * NT) + in_tile);
            }
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            const int tile = base + k * a.batch * stride;
            if (tile < tiles) finish(tile, totals[k]);
        }
    }
}

struct Shape {
    int warps, splits, split_chunks, blocks, batch, lora_columns;
    size_t shared;
};

// The warps of a block and the blocks that share k. MOST_WARPS do not fit where shared memory is small (Ada; Turing).
int warps_of(int64_t k, int ki, int nt, const QloraLimits& limits, int& splits) {
    const int shared = limits.shared_per_block;
    const int most = shared >= 160 * 1024 ? MOST_WARPS : shared >= 80 * 1024 ? MOST_WARPS / 2 : MOST_WARPS / 4;
    const int64_t needed = divide_up(k / 64, CHUNKS * ki);
    splits = static_cast<int>(divide_up(needed, most));
    const int warps = static_cast<int>(divide_up(needed, splits));
    return warps < 4 * nt ? 4 * nt : warps;   // at least one thread an element
}

template <int NT, int KI, int DEPTH> Shape shape_of(int64_t k, int tiles, int rank, int s_columns, const QloraLimits& limits) {
    Shape s;
    s.warps = warps_of(k, KI, NT, limits, s.splits);
    s.split_chunks = s.warps * CHUNKS * KI;
    s.lora_columns = static_cast<int>(divide_up(rank, s.warps));
    // The shared memory of a block besides the dynamic part, in bytes: the maps, and a KiB that the system takes.
    constexpr size_t STATIC = sizeof(float) * 3 * 256 + 1280;
    const size_t limit = limits.shared_per_multiprocessor;
    for (s.batch = s.warps * 32 / (128 * NT);; s.batch--) {
        s.shared = sizeof(uint32_t) * TABLE_WORDS + s.warps * DEPTH * (RING_BYTES + s.lora_columns * 64) +
                   sizeof(float) * ((2 * s.batch * 128 * NT + 16 * CHUNKS) * s.warps + 8 * NT * s_columns);
        if (s.batch == 1 || s.shared + STATIC <= limit) break;
    }
    // As many blocks on a multiprocessor as have registers (together MOST_WARPS warps') and shared memory.
    int per_sm = MOST_WARPS / s.warps;
    while (per_sm > 1 && per_sm * (s.shared + STATIC) > limit) per_sm--;
    const int64_t most = static_cast<int64_t>(limits.multiprocessors) * per_sm / s.splits;
    s.blocks = static_cast<int>(tiles < most ? tiles : most < 1 ? 1 : most);
    return s;
}

template <typename T, int NT, int KI, int DEPTH>
int launch_gemv(Args a, int rank, void* workspace, const QloraLimits& limits, bool early, cudaStream_t stream) {
    const bool nested = !a.w.m[0].absmax;
    bool aligned = a.w.blocksize == 64 && a.w.k % (64 * CHUNKS) == 0;
    for (int j = 0; j < a.w.count; j++) {
        const void* scales = nested ? static_cast<const void*>(a.w.m[j].absmax_codes) : a.w.m[j].absmax;
        if (reinterpret_cast<uintptr_t>(scales) % (nested ? 2 : 8) != 0) aligned = false;
    }
    const Shape s = shape_of<NT, KI, DEPTH>(a.w.k, a.first_tile[3], rank, a.s_columns, limits);
    a.splits = s.splits;
    a.split_chunks = s.split_chunks;
    a.batch = s.batch;
    a.lora_columns = s.lora_columns;
    a.arrived = static_cast<uint32_t*>(workspace);
    a.parts = reinterpret_cast<float*>(static_cast<char*>(workspace) + 4096);
    if (s.splits > 1 && !workspace) return static_cast<int>(cudaErrorInvalidValue);
    const auto go = [&](auto is_nested, auto is_aligned) {
        constexpr auto KERNEL = gemv_kernel<T, NT, KI, DEPTH, is_nested(), is_aligned()>;
        const cudaError_t error = allow_shared<KERNEL>(limits, s.shared);
        if (error != cudaSuccess) return static_cast<int>(error);
        return launch(KERNEL, dim3(s.blocks, s.splits), dim3(s.warps * 32), s.shared, early, stream, a);
    };
    if (nested) return aligned ? go(std::true_type{}, std::true_type{}) : go(std::true_type{}, std::false_type{});
    return aligned ? go(std::false_type{}, std::true_type{}) : go(std::false_type{}, std::false_type{});
}

}  // namespace

// Bytes of the workspace; its first 4 KiB are zero before the first call, and every call leaves them so: calls of all
// sizes can share one.
extern "C" int64_t qlora_nf4_gemv_workspace(int64_t rows, int64_t k, int64_t tokens, const QloraLimits* limits) {
    const int nt = tokens > 8 ? 2 : 1;
    int splits;
    warps_of(k, tokens > 8 ? 1 : 2, nt, *limits, splits);
    const int64_t tiles = divide_up(rows, 8) + 3;
    return splits == 1 ? 0 : 4096 + splits * tiles * 128 * nt * static_cast<int64_t>(sizeof(float));
}

extern "C" int qlora_nf4_gemv(int dtype, QloraFewWeights weights, const void* x, int64_t ldx, const float* s,
                              int64_t lds, const void* residual, int64_t ldr, void* y, int64_t ldy, int64_t tokens,
                              int swiglu, int early, void* workspace, const QloraLimits* limits, cudaStream_t stream) {
    if (tokens <= 0) return static_cast<int>(cudaSuccess);
    if (tokens > 16 || !is_activation(dtype, *limits) || !takes(weights)) return static_cast<int>(cudaErrorInvalidValue);
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
    a.half = swiglu ? weights.m[1].codes - weights.m[0].codes : 8 * (weights.k / 2);
    int64_t tiles = 0;
    int most_rank = 0;
    for (int j = 0; j < 3; j++) {
        a.first_tile[j] = static_cast<int32_t>(tiles);
        if (j < weights.count) tiles += divide_up(weights.m[j].rows, 16);
        if (j >= weights.count) a.first_tile[j] = INT32_MAX;
        else if (weights.m[j].rows > INT32_MAX / (weights.k / 64) - 16) return static_cast<int>(cudaErrorInvalidValue);
        else a.rows[j] = static_cast<int32_t>(weights.m[j].rows);
        if (j < weights.count && s && weights.m[j].lora_b && weights.m[j].rank > 0) {
            const int rank = weights.m[j].rank, columns = weights.m[j].r0 + rank;
            if (columns > a.s_columns) a.s_columns = columns;
            if (rank > most_rank) most_rank = rank;
        } else {
            a.w.m[j].rank = 0;
        }
    }
    if (swiglu) tiles = divide_up(weights.m[0].rows, 8);
    if (tiles > LARGEST_GRID || a.s_columns > 1024) return static_cast<int>(cudaErrorInvalidValue);
    a.first_tile[3] = static_cast<int32_t>(tiles);
    const auto with_type = [&](auto zero) {
        using T = decltype(zero);
        return tokens <= 8 ? launch_gemv<T, 1, 2, 2>(a, most_rank, workspace, *limits, early, stream)
                           : launch_gemv<T, 2, 1, 2>(a, most_rank, workspace, *limits, early, stream);
    };
    return dtype == BF16 ? with_type(__nv_bfloat16{}) : with_type(__half{});
}
