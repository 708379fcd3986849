// Product of up to 16 tokens with 4-bit weights, for decoding; nf4_gemv.cu is the faster one up to 8:
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
// Floor: memory, (1/2 + 1/64) bytes a weight. A block takes all of k of up to MOST tiles of 16 rows; its warps share k:
// in a step each has 128 of k, of which it loads x once for all tiles, whose sums stay in registers to the end. So
// nothing but codes moves in the loop, and the warps meet only when all is added. All scales of the block are decoded
// before. Each warp has a ring of DEPTH units in shared memory for its codes (cp.async) and decodes them through a
// table that has a copy for every lane (few_tokens.cuh): one integer operation and one access a byte. What limits it
// is the issue of instructions, 124 for 2048 weights. With gate and up, rows 0..7 of a tile are gate's and 8..15 up's,
// so that one warp gets both.

#include "few_tokens.cuh"

namespace {

using namespace few;

constexpr int CHUNKS = 2;       // chunks of 64 codes of a row that a warp takes at a time
constexpr int UNIT_BYTES = 16 * CHUNKS * 32;   // codes of a tile that a warp takes at a time
constexpr int MOST_TILES = 7;                  // of a block

struct Args {
    QloraFewWeights w;
    const void* x;
    const float* s;
    const void* residual;
    void* y;
    int64_t ldx, lds, ldr, ldy;
    int32_t first_tile[4];   // of each member; the last entry is the number of tiles
    int32_t rows[3];
    int32_t tokens, chunks;
    int32_t block_tiles;     // at most, of a block
    int32_t lora_columns;    // of a member's adapter that a warp takes
    int32_t s_columns;
    int32_t block_shift, nested_shift;
    int32_t scale_pitch;     // floats of a row's scales
    Divisor scale_packs;     // of a row: packs of four where `packed`, else single ones
    bool x_vectors, swiglu, packed;
};

// A row of the block.
struct RowInfo {
    const uint8_t* codes;
    int32_t row, member;
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

// Asks for a line of memory that is read a little later; the value is not waited for.
__device__ __forceinline__ void touch(const void* p) {
    uint32_t unused;
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(unused) : "l"(p));
    static_cast<void>(unused);
}

template <typename T, int NT, int MOST, int WARPS, int DEPTH>
__global__ void __launch_bounds__(WARPS * 32, 16 / WARPS) gemv_kernel(const __grid_constant__ Args a) {
    if constexpr (!mma::has_products<T>()) return;
    constexpr int SUMS = 128 * NT;   // of a tile
    __shared__ float maps[3][256];
    __shared__ __align__(16) RowInfo infos[16 * MOST];
    extern __shared__ __align__(128) float dynamic[];
    const int threads = blockDim.x, warps = threads / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t* table = reinterpret_cast<uint32_t*>(dynamic);
    char* ring = reinterpret_cast<char*>(table + TABLE_WORDS) + warp * (DEPTH * UNIT_BYTES);
    float* scales = dynamic + TABLE_WORDS + warps * (DEPTH * UNIT_BYTES / 4);   // [row][scale_pitch]
    float* lora_b = scales + a.block_tiles * 16 * a.scale_pitch;
    float* lora_s = lora_b + warps * (a.block_tiles * a.lora_columns * 16);   // [s_columns][8 NT]
    lora_b += warp * (a.block_tiles * a.lora_columns * 16);                    // [tile][column][row]

    const int tile0 = static_cast<int>(static_cast<int64_t>(a.first_tile[3]) * blockIdx.x / gridDim.x);
    const int tiles = static_cast<int>(static_cast<int64_t>(a.first_tile[3]) * (blockIdx.x + 1) / gridDim.x) - tile0;
    const int first = warp * CHUNKS, stride = warps * CHUNKS;   // of the warp's chunks
    const bool nested = a.w.m[0].absmax == nullptr;

    let_next_begin();
    if (threadIdx.x < 16 * tiles) {
        // Behind a member's last row that row is read again.
        const Rows rows = rows_of(a, tile0 + threadIdx.x / 16);
        const int h = threadIdx.x / 8 % 2, member = h == 0 ? rows.member[0] : rows.member[1];
        const int row = (h == 0 ? rows.row[0] : rows.row[1]) + threadIdx.x % 8;
        const int64_t from = min(row, a.rows[member] - 1);
        infos[threadIdx.x] = {a.w.m[member].codes + from * (a.w.k / 2), row, member};
    }
    __syncthreads();
    // Four lanes take the 64 bytes of a row; every other pair of rows has its halves swapped, so that reads meet no
    // bank twice.
    const int piece = lane % 4;
    uint32_t fetch_to = shared_address(ring) + g * 64 + (((piece >> 1) ^ (g >> 1 & 1)) << 5) + ((piece & 1) << 4);
    uint32_t fetch_info = shared_address(infos) + g * sizeof(RowInfo);
    uint32_t fetch_half = piece >> 1, fetch_offset = piece * 16;
    // Kept in registers: the compiler would work them out again for every unit.
    asm volatile("" : "+r"(fetch_to), "+r"(fetch_info), "+r"(fetch_half), "+r"(fetch_offset));
    int next_tile = 0, next_chunk = first;
    const auto fetch_next = [&](int at) {
        if (next_chunk < a.chunks) {
            const bool valid = next_chunk + static_cast<int>(fetch_half) < a.chunks;
            const uint32_t offset = next_chunk * 32 + fetch_offset;
            const uint8_t *low, *high;
            asm volatile("ld.shared.u64 %0, [%2]; ld.shared.u64 %1, [%2 + 128];"
                : "=l"(low), "=l"(high)
                : "r"(fetch_info + next_tile * (16 * static_cast<uint32_t>(sizeof(RowInfo)))));
            low += offset, high += offset;
            async::copy16(fetch_to + at * UNIT_BYTES, low, valid);
            async::copy16(fetch_to + at * UNIT_BYTES + 512, high, valid);
        }
        async::commit();
        if (++next_tile == tiles) next_tile = 0, next_chunk += stride;
    };
    // The scales' codes come from far: they are asked for before anything else, and decoded when the table is there.
    constexpr int TOGETHER = 4;
    const int packs = tiles * 16 * static_cast<int>(a.scale_packs.d);
    uint32_t scale_codes[TOGETHER] = {};
    float scale_absmax[TOGETHER] = {};
    const auto load_scales = [&](int i0) {
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            const int i = min(i0 + j * threads, packs - 1), slot = a.scale_packs.quotient(i);
            const RowInfo& info = infos[slot];
            const QloraFewMember& m = a.w.m[info.member];
            const int row = min(info.row, a.rows[info.member] - 1);
            const int64_t block = static_cast<int64_t>(row) * a.chunks + (i - slot * a.scale_packs.d) * 4;
            scale_codes[j] = __ldg(reinterpret_cast<const uint32_t*>(m.absmax_codes + block));
            scale_absmax[j] = __ldg(m.nested_absmax + (block >> a.nested_shift));
        }
    };
    const auto decode_scales = [&](int i0) {
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            const int i = i0 + j * threads, slot = a.scale_packs.quotient(i);
            if (i >= packs) continue;
            const int member = infos[slot].member;
            const float offset = a.w.m[member].nested_offset;
            float values[4];
#pragma unroll
            for (int e = 0; e < 4; e++)
                values[e] = __fadd_rn(
                    nf4::multiply_flushed(maps[member][scale_codes[j] >> (8 * e) & 255], scale_absmax[j]), offset);
            store_floats(scales + slot * a.scale_pitch + (i - slot * a.scale_packs.d) * 4, values);
        }
    };
    if (a.packed) load_scales(threadIdx.x);
#pragma unroll
    for (int d = 0; d < DEPTH; d++) fetch_next(d);
    if (a.lora_columns > 0) {
        // Each warp adds some columns of the adapters: warp, warp + warps, ...
        for (int i = lane / 16; i < tiles * a.lora_columns; i += 2) {
            const RowInfo& info = infos[i / a.lora_columns * 16 + lane % 16];
            const QloraFewMember& m = a.w.m[info.member];
            const int column = warp + i % a.lora_columns * warps;
            const bool valid = column < m.rank && info.row < a.rows[info.member];
            const void* from = m.codes;
            if (valid) from = m.lora_b + static_cast<int64_t>(info.row) * m.rank + column;
            async::copy4(shared_address(lora_b + i * 16 + lane % 16), from, valid);
        }
    }
    if (nested) {
        for (int j = 0; j < a.w.count; j++)
            for (int i = threadIdx.x; i < 256; i += threads) maps[j][i] = __ldg(a.w.m[j].nested_map + i);
    }
    fill_table<T>(table, a.w.quant_type, threads);
    __syncthreads();
    // All scales of the block, as floats.
    if (a.packed) {
        decode_scales(threadIdx.x);
        for (int i0 = threadIdx.x + TOGETHER * threads; i0 < packs; i0 += TOGETHER * threads) {
            load_scales(i0);
            decode_scales(i0);
        }
    } else {
        for (int i = threadIdx.x; i < packs; i += threads) {
            const int slot = a.scale_packs.quotient(i), chunk = i - slot * a.scale_packs.d;
            const RowInfo& info = infos[slot];
            const QloraFewMember& m = a.w.m[info.member];
            const int64_t row = min(info.row, a.rows[info.member] - 1);
            const int64_t block = (row * a.chunks + chunk) << 6 >> a.block_shift;
            float value;
            if (nested)
                value = __fadd_rn(nf4::multiply_flushed(maps[info.member][__ldg(m.absmax_codes + block)],
                                                        __ldg(m.nested_absmax + (block >> a.nested_shift))),
                                  m.nested_offset);
            else value = __ldg(m.absmax + block);
            scales[slot * a.scale_pitch + chunk] = value;
        }
        // The scales of the zeros behind the last chunk.
        for (int i = threadIdx.x; i < tiles * 16; i += threads) scales[i * a.scale_pitch + a.chunks] = 0.0f;
    }
    __syncthreads();
    wait_for_previous();
    // Asks for the x of a step: a warp's 256 bytes of each token.
    const auto touch_x = [&](int chunk) {
        for (int i = lane; i < a.tokens * CHUNKS; i += 32)
            if (chunk + i % CHUNKS < a.chunks)
                touch(static_cast<const T*>(a.x) + i / CHUNKS * a.ldx + (chunk + i % CHUNKS) * 64);
    };
    for (int i = threadIdx.x; i < 8 * NT * a.s_columns; i += threads) {
        const int column = i / (8 * NT), token = i % (8 * NT);
        const bool valid = token < a.tokens;
        async::copy4(shared_address(lora_s + i), a.s + (valid ? token * a.lds + column : 0), valid);
    }

    const uint32_t lane4 = lane * 4;
    float sum[MOST][NT][4];
#pragma unroll
    for (int i = 0; i < MOST; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[i][n][e] = 0.0f;
    // Where the lane's codes lie in a unit: row g, and 512 bytes behind it row g + 8.
    const char* in_ring = ring + g * 64 + t * 8;
    const int flip = (g >> 1 & 1) << 5;
    int at = 0;
    for (int chunk = first; chunk < a.chunks; chunk += stride) {
        uint32_t x[CHUNKS][NT][8];
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const int token = n * 8 + g;
                const bool valid = token < a.tokens && chunk + c < a.chunks;
                const T* p = static_cast<const T*>(a.x) + token * a.ldx + (chunk + c) * 64 + t * 16;
                load_x(p, a.x_vectors, valid, x[c][n]);
            }
        if (chunk + stride < a.chunks) touch_x(chunk + stride);
        const float* row_scales = scales + g * a.scale_pitch + chunk;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            if (i >= tiles) break;
            async::wait<DEPTH - 1>();
            __syncwarp();
            const char* unit = in_ring + at * UNIT_BYTES;
            const float2 low_scale = *reinterpret_cast<const float2*>(row_scales);
            const float2 high_scale = *reinterpret_cast<const float2*>(row_scales + 8 * a.scale_pitch);
            row_scales += 16 * a.scale_pitch;
            uint2 low[CHUNKS], high[CHUNKS];
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                low[c] = *reinterpret_cast<const uint2*>(unit + (flip ^ c << 5));
                high[c] = *reinterpret_cast<const uint2*>(unit + (flip ^ c << 5) + 512);
            }
            // The unit is free.
            __syncwarp();
            fetch_next(at);
            at = at + 1 == DEPTH ? 0 : at + 1;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                float part[NT][4] = {};
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    uint32_t w[4];
                    decode_step(table, low[c], high[c], s, lane4, w);
#pragma unroll
                    for (int n = 0; n < NT; n++) multiply_add<T>(part[n], w, x[c][n][2 * s], x[c][n][2 * s + 1]);
                }
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float2 scale = e < 2 ? low_scale : high_scale;
                        sum[i][n][e] = fmaf(c == 0 ? scale.x : scale.y, part[n][e], sum[i][n][e]);
                    }
            }
        }
    }
    // S and the adapters are there, table and rings are free.
    async::commit();
    async::wait<0>();
    __syncthreads();
    float* sums = dynamic;   // [warp][tile][SUMS]
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        if (i >= tiles) break;
        const QloraFewMember &m0 = a.w.m[infos[i * 16].member], &m1 = a.w.m[infos[i * 16 + 8].member];
        for (int j = 0; j < a.lora_columns; j++) {
            const int column = warp + j * warps;
            const float* b = lora_b + (i * a.lora_columns + j) * 16 + g;
            const float low = b[0] * m0.scale, high = b[8] * m1.scale;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const float* s = lora_s + n * 8 + t * 2;
                if (column < m0.rank) {
                    const float2 v = *reinterpret_cast<const float2*>(s + (m0.r0 + column) * (8 * NT));
                    sum[i][n][0] = fmaf(low, v.x, sum[i][n][0]), sum[i][n][1] = fmaf(low, v.y, sum[i][n][1]);
                }
                if (column < m1.rank) {
                    const float2 v = *reinterpret_cast<const float2*>(s + (m1.r0 + column) * (8 * NT));
                    sum[i][n][2] = fmaf(high, v.x, sum[i][n][2]), sum[i][n][3] = fmaf(high, v.y, sum[i][n][3]);
                }
            }
        }
        float4* to = reinterpret_cast<float4*>(sums + (warp * tiles + i) * SUMS);
#pragma unroll
        for (int n = 0; n < NT; n++)
            to[n * 32 + lane] = make_float4(sum[i][n][0], sum[i][n][1], sum[i][n][2], sum[i][n][3]);
    }
    __syncthreads();
    // Every thread finishes some elements; their order is that of the accumulators.
    for (int i = threadIdx.x; i < tiles * SUMS; i += threads) {
        const int in_tile = i % SUMS, e = in_tile % 128;
        const int slot = e / 16 + (e >> 1 & 1) * 8, token = in_tile / 128 * 8 + (e >> 2 & 3) * 2 + (e & 1);
        const RowInfo& info = infos[i / SUMS * 16 + slot];
        const bool valid = info.row < a.rows[info.member] && token < a.tokens;
        int64_t column = info.row;
        if (!a.swiglu && info.member > 0) column += a.rows[0];
        if (!a.swiglu && info.member > 1) column += a.rows[1];
        float total = 0.0f;
        if (valid) {
            const T* bias = static_cast<const T*>(a.w.m[info.member].bias);
            const T* residual = static_cast<const T*>(a.residual);
            if (bias) total = to_float(bias[info.row]);
            if (residual) total += to_float(residual[token * a.ldr + column]);
#pragma unroll 8
            for (int w = 0; w < warps; w++) total += sums[w * tiles * SUMS + i];
        }
        if (a.swiglu) {
            // The thread two further has up; whole warps are here.
            const float up = __shfl_down_sync(~0u, total, 2);
            total = total / (1.0f + __expf(-total)) * up;
        }
        if (valid && !(a.swiglu && slot >= 8)) static_cast<T*>(a.y)[token * a.ldy + column] = from_float<T>(total);
    }
}

struct Shape {
    int warps, blocks, block_tiles, lora_columns;
    int64_t shared;
};

// The shared memory of a block besides the dynamic part, in bytes: the maps, the rows, and a KiB that the system takes.
constexpr int64_t STATIC_SHARED = sizeof(float) * 3 * 256 + 1024 + 16 * 16 * MOST_TILES;

// The smallest number of blocks that need at most `limit` bytes each; 0 blocks if there is none.
Shape shape_of(int tiles, int most, int nt, int rank, int s_columns, int scale_pitch, int warps,
               int depth, int64_t limit, int multiprocessors) {
    Shape s{};
    s.warps = warps;
    s.lora_columns = static_cast<int>(divide_up(rank, warps));
    for (int64_t waves = 1;; waves++) {
        const int64_t all = multiprocessors * waves, blocks = all < tiles ? all : tiles;
        s.block_tiles = static_cast<int>(divide_up(tiles, blocks));
        const int64_t ring = sizeof(uint32_t) * TABLE_WORDS + warps * depth * UNIT_BYTES;
        s.shared = ring + sizeof(float) * (s.block_tiles * 16 * (scale_pitch + warps * s.lora_columns) +
                                           8 * nt * s_columns);
        const bool sums_fit = static_cast<int64_t>(sizeof(float)) * warps * s.block_tiles * 128 * nt <= ring;
        if (s.block_tiles <= most && sums_fit && s.shared + STATIC_SHARED <= limit) {
            s.blocks = static_cast<int>(blocks);
            return s;
        }
        if (blocks == tiles) return s;
    }
}

template <typename T, int NT, int MOST, int WARPS, int DEPTH>
int launch_gemv(Args a, int rank, const QloraLimits& limits, bool early, cudaStream_t stream) {
    // With half of the warps two blocks a multiprocessor, or one where shared memory is small.
    const int64_t limit = limits.shared_per_multiprocessor;
    a.packed = !a.w.m[0].absmax && a.w.blocksize == 64 && a.chunks % 4 == 0 && a.w.nested_blocksize >= 4;
    for (int j = 0; j < a.w.count; j++)
        if (reinterpret_cast<uintptr_t>(a.w.m[j].absmax_codes) % 4 != 0) a.packed = false;
    a.scale_packs = Divisor(static_cast<uint32_t>(a.packed ? a.chunks / 4 : a.chunks));
    // A multiple of four that is not one of 32: the rows of a fragment lie in different banks.
    a.scale_pitch = static_cast<int32_t>(round_up(a.chunks + 1, 4));
    if (a.scale_pitch % 8 == 0) a.scale_pitch += 4;
    Shape s{};
    for (int attempt = 0; attempt < 3 && s.blocks == 0; attempt++)
        s = shape_of(a.first_tile[3], MOST, NT, rank, a.s_columns, a.scale_pitch,
                     attempt < 2 ? WARPS : WARPS / 2, DEPTH, attempt == 0 ? limit / (16 / WARPS) : limit,
                     limits.multiprocessors);
    if (s.blocks == 0) return static_cast<int>(cudaErrorInvalidValue);
    a.block_tiles = s.block_tiles;
    a.lora_columns = s.lora_columns;
    constexpr auto KERNEL = gemv_kernel<T, NT, MOST, WARPS, DEPTH>;
    const cudaError_t error = allow_shared<KERNEL>(limits, s.shared);
    if (error != cudaSuccess) return static_cast<int>(error);
    return launch(KERNEL, dim3(s.blocks), dim3(s.warps * 32), s.shared, early, stream, a);
}

}  // namespace

extern "C" int qlora_nf4_gemv16(int dtype, QloraFewWeights weights, const void* x, int64_t ldx, const float* s,
                              int64_t lds, const void* residual, int64_t ldr, void* y, int64_t ldy, int64_t tokens,
                              int swiglu, int early, void*, const QloraLimits* limits, cudaStream_t stream) {
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
    int64_t tiles = 0;
    int most_rank = 0;
    for (int j = 0; j < 3; j++) {
        a.first_tile[j] = static_cast<int32_t>(tiles);
        if (j < weights.count) tiles += divide_up(weights.m[j].rows, 16);
        if (j >= weights.count) a.first_tile[j] = INT32_MAX;
        else if (weights.m[j].rows > INT32_MAX - 16) return static_cast<int>(cudaErrorInvalidValue);
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
        // The best launch shape measured on an H100: one block of 16 warps where it has many tiles or a long k, else
        // two of 8 warps.
        const int64_t sms = limits->multiprocessors;
        const bool wide = weights.k >= 8192 || (tiles > 4 * sms && tiles <= MOST_TILES * sms);
        if (!wide) return launch_gemv<T, 2, MOST_TILES, 8, 4>(a, most_rank, *limits, early, stream);
        // Adapters take some of the shared memory, and of the time that copies have.
        return a.s_columns > 0 ? launch_gemv<T, 2, MOST_TILES, 16, 5>(a, most_rank, *limits, early, stream)
                               : launch_gemv<T, 2, MOST_TILES, 16, 6>(a, most_rank, *limits, early, stream);
    };
    return dtype == BF16 ? with_type(__nv_bfloat16{}) : with_type(__half{});
}
