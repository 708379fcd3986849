// Product of some dozens to hundreds of tokens with 4-bit weights, without a dequantized copy:
//
//     y[m, n] = residual[m, n] + x[m, :] W[n, :] + bias[n] + scale sum_c S[m, r0 + c] B[n, c]
//
// for a group of weights, or h = silu(gate) up: arguments, formats and arithmetic as in nf4_gemv.cu. S B^T is
// computed on tensor cores too, with S and B split into two 16-bit parts each, so that it is as good as f32.
//
// Floor: memory up to some 64 tokens on an H100, the tensor cores behind. A block takes BN rows of the weight and BM
// tokens; WN warps share the rows, WK warps share k. Codes and x come through a ring in shared memory (cp.async, STAGES
// of 256 k); a warp decodes its rows' codes straight into A fragments, once a block, and uses each for all tokens. The
// scales of a stage are decoded by all threads, one stage ahead. What a thread copies lies a fixed number of rows
// apart, so an address costs an addition. Where there are few tiles, blocks share k as well; the last of them to
// finish adds the parts in their order.
// On Hopper the products are wgmma's (wgmma.cuh): x is read by the tensor cores from shared memory instead of by every
// warp, and the next chunk is decoded meanwhile. Elsewhere they are mma.sync's.

#include "few_tokens.cuh"
#include "wgmma.cuh"

namespace {

using namespace few;

constexpr int64_t COUNTER_BYTES = 16384;

struct GemmArgs {
    QloraFewWeights w;
    const void* x;
    const float* s;
    const void* residual;
    void* y;
    float* parts;        // [splits, tiles, BM * BN] if there are several
    uint32_t* arrived;   // [tiles], zeros before and after
    int64_t ldx, lds, ldr, ldy;
    int32_t first_tile[4];
    int32_t tokens, chunks, split_stages, splits, token_tiles;
    int32_t block_shift, nested_shift;
    bool swiglu, y_vectors;
};

// Tiles; UNROLL: chunks of a stage that are unrolled.
template <int BN_, int BM_, int WK_, int STAGES_, int UNROLL_ = 4, bool WGMMA_ = false, int CHUNKS_ = 4,
          int PER_SM_ = 1>
struct Config {
    static constexpr int BN = BN_, BM = BM_, WK = WK_, STAGES = STAGES_;
    [[maybe_unused]] static constexpr int UNROLL = UNROLL_;
    static constexpr bool WGMMA = WGMMA_;
    static constexpr int STAGE_CHUNKS = CHUNKS_, PER_SM = PER_SM_;   // chunks of 64 k; blocks on a multiprocessor
    static constexpr int RT = WGMMA ? 1 : 2, WN = BN / (16 * RT), THREADS = 32 * WN * WK, NT = BM / 8;
    static constexpr int X_BYTES = BM * STAGE_CHUNKS * 128, CODE_BYTES = BN * STAGE_CHUNKS * 32;
    static constexpr int STAGE_BYTES = X_BYTES + CODE_BYTES;
    static constexpr int PITCH = BN + 4;   // of the f32 tile in the end
    static constexpr int TILE_BYTES = BM * PITCH * 4;
    static constexpr int RING_BYTES = STAGES * STAGE_BYTES > TILE_BYTES ? STAGES * STAGE_BYTES : TILE_BYTES;
    static constexpr int SCALE_FLOATS = BN * STAGE_CHUNKS;
    static constexpr int SHARED = RING_BYTES + 2 * SCALE_FLOATS * 4 + 3 * 256 * 4 + TABLE_WORDS * 4 + 1024;
};

// Hopper's instructions, with codes in the order that is natural to them.
template <int BN, int BM, int WK, int STAGES, int CHUNKS = 4, int PER_SM = 1>
using HopperConfig = Config<BN, BM, WK, STAGES, 4, true, CHUNKS, PER_SM>;

// The member and the row of a slot (0 .. BN - 1) of a tile. With gate and up every 16 slots are 8 rows of each.
struct TileRows {
    int member;      // of all slots, unless `swiglu`
    int64_t first;
    bool swiglu;

    __device__ __forceinline__ int member_of(int slot) const { return swiglu ? slot >> 3 & 1 : member; }
    __device__ __forceinline__ int64_t row_of(int slot) const {
        return first + (swiglu ? slot / 16 * 8 + slot % 8 : slot);
    }
};

// Two floats as pairs of T: the rounded values and what is missing.
template <typename T> __device__ __forceinline__ void split_pair(float a, float b, uint32_t& high, uint32_t& low) {
    high = pack_pair<T>(a, b);
    T h[2];
    memcpy(h, &high, 4);
    low = pack_pair<T>(a - to_float(h[0]), b - to_float(h[1]));
}

// A warpgroup's products of a stage: the next chunk is decoded while the tensor cores are at work on the last.
template <typename T, typename C>
__device__ __forceinline__ void multiply_stage(const char* x_tile, const char* codes, const float* scales,
                                               const uint32_t* table, int row_warp, int k_warp,
                                               float (&sum)[1][C::NT][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, slot = row_warp * 16 + g;
    const uint32_t lane4 = lane * 4, pick = 0x80u << (8 * t), x_address = shared_address(x_tile);
    constexpr int STAGE_CHUNKS = C::STAGE_CHUNKS, MINE = STAGE_CHUNKS / C::WK;
    uint32_t w[2][4][4];
    const auto decode_chunk = [&](int c, uint32_t(&to)[4][4]) {
        // Byte t of each word of 8 codes: k = 2 t, 2 t + 1 of them.
        const char* row = codes + slot * (STAGE_CHUNKS * 32);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int piece = (((c * 2 + h) ^ (slot & 3) * 2) & (STAGE_CHUNKS * 2 - 1)) << 4;
            const uint4 low = *reinterpret_cast<const uint4*>(row + piece);
            const uint4 high = *reinterpret_cast<const uint4*>(row + 8 * STAGE_CHUNKS * 32 + piece);
            const uint32_t words[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32_t byte = __dp4a(words[i & 1][i >> 1], pick, lane4);
                to[h * 2 + (i >> 2)][i & 3] =
                    *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(table) + byte);
            }
        }
    };
    decode_chunk(k_warp, w[0]);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int c = i * C::WK + k_warp;
        float part[C::NT * 4];
        wgmma::fence();
#pragma unroll
        for (int s = 0; s < 4; s++)
            wgmma::Product<T, C::BM>::run(part, w[i & 1][s], wgmma::descriptor(x_address + c * (C::BM * 128), s), s);
        wgmma::commit();
        if (i + 1 < MINE) decode_chunk(c + C::WK, w[(i + 1) & 1]);
        const float low = scales[c * C::BN + slot], high = scales[c * C::BN + slot + 8];
        wgmma::wait(part);
#pragma unroll
        for (int n = 0; n < C::NT; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[0][n][e] = fmaf(e < 2 ? low : high, part[n * 4 + e], sum[0][n][e]);
    }
}

template <typename T, typename C>
__global__ void __launch_bounds__(C::THREADS, C::PER_SM) gemm_kernel(const __grid_constant__ GemmArgs a) {
    constexpr int RT = C::RT, NT = C::NT, STAGE_CHUNKS = C::STAGE_CHUNKS;
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (C::WGMMA) return;   // nobody launches it
#endif
    if constexpr (!mma::has_products<T>()) return;
    __shared__ bool last;
    extern __shared__ __align__(128) char dynamic[];
    // wgmma wants tiles at multiples of 1024.
    char* ring = dynamic + (-shared_address(dynamic) & 1023);
    float* scales = reinterpret_cast<float*>(ring + C::RING_BYTES);
    float* maps = scales + 2 * C::SCALE_FLOATS;
    uint32_t* table = reinterpret_cast<uint32_t*>(maps + 3 * 256);
    const uint32_t ring_address = shared_address(ring);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp % C::WN, k_warp = warp / C::WN;

    const int tile = blockIdx.x / a.token_tiles, token_tile = blockIdx.x - tile * a.token_tiles;
    const int token0 = token_tile * C::BM, split = blockIdx.y;
    TileRows rows{0, 0, a.swiglu};
    if (a.swiglu) {
        rows.first = static_cast<int64_t>(tile) * (C::BN / 2);
    } else {
        rows.member = (tile >= a.first_tile[1]) + (tile >= a.first_tile[2]);
        rows.first = static_cast<int64_t>(tile - a.first_tile[rows.member]) * C::BN;
    }
    const int all_stages = (a.chunks + STAGE_CHUNKS - 1) / STAGE_CHUNKS;
    const int first = split * a.split_stages, stages = min(a.split_stages, all_stages - first);

    // The pieces of a stage that a thread copies lie a fixed number of rows apart: its first row, and steps from there.
    constexpr int CODE_LINE = STAGE_CHUNKS * 2, CODE_STEP = C::THREADS / CODE_LINE;   // pieces of 16 bytes, slots
    static_assert(CODE_STEP % 16 == 0 && C::BN % CODE_STEP == 0, "the steps keep member and permutation");
    const auto code_from = [&] {
        const int slot = threadIdx.x / CODE_LINE, q = threadIdx.x % CODE_LINE;
        return a.w.m[rows.member_of(slot)].codes + rows.row_of(slot) * (a.w.k / 2) + first * (STAGE_CHUNKS * 32) +
               q * 16;
    }();
    const int64_t code_step = (a.swiglu ? CODE_STEP / 2 : CODE_STEP) * (a.w.k / 2);
    // Rows behind the member's last are zeros.
    const auto rows_left = [&](int slot) {
        return static_cast<int>(min(a.w.m[rows.member_of(slot)].rows - rows.row_of(slot), static_cast<int64_t>(C::BN)));
    };
    const int code_rows = rows_left(threadIdx.x / CODE_LINE);
    const auto fetch_codes = [&](int stage, int buffer) {
        const int slot = threadIdx.x / CODE_LINE, q = threadIdx.x % CODE_LINE;
        const uint32_t to = ring_address + buffer * C::STAGE_BYTES + C::X_BYTES + slot * (STAGE_CHUNKS * 32) +
                            (((q ^ ((slot & 3) * 2)) & (CODE_LINE - 1)) << 4);
        const uint8_t* from = code_from + stage * (STAGE_CHUNKS * 32);
        const bool in_k = (first + stage) * STAGE_CHUNKS + q / 2 < a.chunks;
#pragma unroll
        for (int i = 0; i < C::BN / CODE_STEP; i++) {
            const bool valid = in_k && i * (a.swiglu ? CODE_STEP / 2 : CODE_STEP) < code_rows;
            async::copy16(to + i * (CODE_STEP * STAGE_CHUNKS * 32), from, valid);
            from += code_step;
        }
    };
    constexpr int X_LINE = STAGE_CHUNKS * 8, X_STEP = C::THREADS / X_LINE;
    static_assert(X_STEP % 8 == 0 && C::BM % X_STEP == 0, "the steps keep the permutation");
    const T* x_from = static_cast<const T*>(a.x) + (token0 + threadIdx.x / X_LINE) * a.ldx +
                      first * (STAGE_CHUNKS * 64) + threadIdx.x % X_LINE * 8;
    const int64_t x_step = X_STEP * a.ldx;
    const int x_tokens = a.tokens - token0 - threadIdx.x / X_LINE;
    const auto fetch_x = [&](int stage, int buffer) {
        const int token = threadIdx.x / X_LINE, q = threadIdx.x % X_LINE;
        const uint32_t to = ring_address + buffer * C::STAGE_BYTES +
                            (C::WGMMA ? q / 8 * (C::BM * 128) + token * 128 + (((q ^ token) & 7) << 4)
                                      : token * (X_LINE * 16) + ((q ^ (token & 1)) << 4));
        const T* from = x_from + stage * (STAGE_CHUNKS * 64);
        const bool in_k = (first + stage) * STAGE_CHUNKS + q / 8 < a.chunks;
#pragma unroll
        for (int i = 0; i < C::BM / X_STEP; i++) {
            async::copy16(to + i * X_STEP * (C::WGMMA ? 128 : X_LINE * 16), from, in_k && i * X_STEP < x_tokens);
            from += x_step;
        }
    };
    // Scales of a stage: raw into registers, decoded into shared memory later.
    constexpr int MINE = C::SCALE_FLOATS / C::THREADS;
    static_assert(C::SCALE_FLOATS % C::THREADS == 0, "whole passes");
    float raw[MINE];
    uint8_t raw_codes[MINE];
    const bool nested = a.w.m[0].absmax == nullptr;
    constexpr int SCALE_STEP = C::THREADS / STAGE_CHUNKS;   // slots
    static_assert(SCALE_STEP % 16 == 0, "the steps keep the member");
    const int scale_slot = threadIdx.x / STAGE_CHUNKS, scale_rows = rows_left(scale_slot);
    const int64_t scale_chunk = rows.row_of(scale_slot) * a.chunks + first * STAGE_CHUNKS + threadIdx.x % STAGE_CHUNKS;
    const auto fetch_scales = [&](int stage) {
        const QloraFewMember& m = a.w.m[rows.member_of(scale_slot)];
        const bool in_k =
            stage < stages && (first + stage) * STAGE_CHUNKS + threadIdx.x % STAGE_CHUNKS < a.chunks;
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int step = i * (a.swiglu ? SCALE_STEP / 2 : SCALE_STEP);
            raw[i] = 0.0f, raw_codes[i] = 0;
            if (!in_k || step >= scale_rows) continue;
            const int64_t chunk = scale_chunk + stage * STAGE_CHUNKS + static_cast<int64_t>(step) * a.chunks;
            const int64_t block = chunk << 6 >> a.block_shift;
            if (nested) {
                raw_codes[i] = __ldg(m.absmax_codes + block);
                raw[i] = __ldg(m.nested_absmax + (block >> a.nested_shift));
            } else {
                raw[i] = __ldg(m.absmax + block);
            }
        }
    };
    const auto put_scales = [&](int stage) {
        const int member = rows.member_of(scale_slot);
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int p = i * C::THREADS + threadIdx.x;
            float value = raw[i];
            if (nested)
                value = __fadd_rn(nf4::multiply_flushed(maps[member * 256 + raw_codes[i]], value),
                                  a.w.m[member].nested_offset);
            // [chunk][slot]: the eight rows of a fragment are neighbours.
            scales[(stage & 1) * C::SCALE_FLOATS + p % STAGE_CHUNKS * C::BN + p / STAGE_CHUNKS] = value;
        }
    };

    let_next_begin();
#pragma unroll
    for (int i = 0; i < C::STAGES - 1; i++)
        if (i < stages) fetch_codes(i, i);
    fetch_scales(0);
    fill_table<T>(table, a.w.quant_type, C::THREADS);
    if (nested) {
        for (int j = 0; j < a.w.count; j++)
            for (int i = threadIdx.x; i < 256; i += C::THREADS) maps[j * 256 + i] = __ldg(a.w.m[j].nested_map + i);
    }
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < C::STAGES - 1; i++) {
        if (i < stages) fetch_x(i, i);
        async::commit();   // the codes of all first stages are in the first group
    }
    float sum[RT][NT][4] = {};
    if (split == 0 && a.s) {
        // The adapter's part, 16 columns at a time, through the stage of the ring that nothing has been copied to yet.
        // Gate and up come one after the other: the other one's rows are zeros.
        constexpr int COLUMNS = 16, LORA_PITCH = COLUMNS + 4;
        static_assert((C::BM + C::BN) * LORA_PITCH * 4 <= C::STAGE_BYTES, "it fits");
        float* lora_s = reinterpret_cast<float*>(ring + (C::STAGES - 1) * C::STAGE_BYTES);
        float* lora_b = lora_s + C::BM * LORA_PITCH;
        const auto fragment = [&](const float* at, uint32_t& high, uint32_t& low) {
            const float2 v = *reinterpret_cast<const float2*>(at);
            split_pair<T>(v.x, v.y, high, low);
        };
        for (int h = 0; h < (a.swiglu ? 2 : 1); h++) {
            const int member = rows.member_of(8 * h);
            const QloraFewMember& m = a.w.m[member];
            for (int c0 = 0; c0 < m.rank; c0 += COLUMNS) {
                __syncthreads();
#pragma unroll 4
                for (int i = threadIdx.x; i < C::BM * COLUMNS; i += C::THREADS) {
                    const int token = token0 + i / COLUMNS, c = c0 + i % COLUMNS;
                    lora_s[i / COLUMNS * LORA_PITCH + i % COLUMNS] =
                        token < a.tokens && c < m.rank ? m.scale * a.s[token * a.lds + m.r0 + c] : 0.0f;
                }
#pragma unroll 4
                for (int i = threadIdx.x; i < C::BN * COLUMNS; i += C::THREADS) {
                    const int slot = i / COLUMNS, c = c0 + i % COLUMNS;
                    const int64_t row = rows.row_of(slot);
                    const bool mine = rows.member_of(slot) == member && row < m.rows && c < m.rank;
                    lora_b[slot * LORA_PITCH + i % COLUMNS] = mine ? __ldg(m.lora_b + row * m.rank + c) : 0.0f;
                }
                __syncthreads();
                if (k_warp != 0) continue;
                uint32_t high[RT][4], low[RT][4];
#pragma unroll
                for (int rt = 0; rt < RT; rt++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        fragment(lora_b + ((row_warp * RT + rt) * 16 + g + i % 2 * 8) * LORA_PITCH + t * 2 + i / 2 * 8,
                                 high[rt][i], low[rt][i]);
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    uint32_t s_high[2], s_low[2];
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        fragment(lora_s + (n * 8 + g) * LORA_PITCH + t * 2 + i * 8, s_high[i], s_low[i]);
#pragma unroll
                    for (int rt = 0; rt < RT; rt++) {
                        multiply_add<T>(sum[rt][n], low[rt], s_high[0], s_high[1]);
                        multiply_add<T>(sum[rt][n], high[rt], s_low[0], s_low[1]);
                        multiply_add<T>(sum[rt][n], high[rt], s_high[0], s_high[1]);
                    }
                }
            }
        }
    }
    __syncthreads();   // maps and table
    put_scales(0);

    const uint32_t lane4 = lane * 4;
    for (int stage = 0; stage < stages; stage++) {
        async::wait<C::STAGES - 2>();
        if constexpr (C::WGMMA) wgmma::publish();
        __syncthreads();
        const int ahead = stage + C::STAGES - 1;
        if (ahead < stages) {
            fetch_codes(ahead, ahead % C::STAGES);
            fetch_x(ahead, ahead % C::STAGES);
        }
        async::commit();
        fetch_scales(stage + 1);
        const char* x_tile = ring + stage % C::STAGES * C::STAGE_BYTES;
        const char* codes = x_tile + C::X_BYTES;
        const float* stage_scales = scales + (stage & 1) * C::SCALE_FLOATS;
        if constexpr (C::WGMMA) {
            multiply_stage<T, C>(x_tile, codes, stage_scales, table, row_warp, k_warp, sum);
        } else {
#pragma unroll C::UNROLL
            for (int kc = 0; kc < STAGE_CHUNKS / C::WK; kc++) {
                const int c = kc * C::WK + k_warp;
                uint32_t w[RT][4][4];
                float scale[RT][2];
#pragma unroll
                for (int rt = 0; rt < RT; rt++) {
                    const int slot = (row_warp * RT + rt) * 16 + g;
                    const int place = STAGE_CHUNKS >= 4 ? c ^ (slot & 3) : (c ^ (slot & 3)) & (STAGE_CHUNKS - 1);
                    const char* p = codes + slot * (STAGE_CHUNKS * 32) + (place << 5) + t * 8;
                    const uint2 low = *reinterpret_cast<const uint2*>(p);
                    const uint2 high = *reinterpret_cast<const uint2*>(p + 8 * STAGE_CHUNKS * 32);
                    scale[rt][0] = stage_scales[c * C::BN + slot], scale[rt][1] = stage_scales[c * C::BN + slot + 8];
#pragma unroll
                    for (int i = 0; i < 4; i++) decode_step(table, low, high, i, lane4, w[rt][i]);
                }
                const char* xp = x_tile + g * (STAGE_CHUNKS * 128);
                const int q = c * 8 + t * 2, flip = g & 1;
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const char* row = xp + n * (8 * STAGE_CHUNKS * 128);
                    const uint4 b0 = *reinterpret_cast<const uint4*>(row + ((q ^ flip) << 4));
                    const uint4 b1 = *reinterpret_cast<const uint4*>(row + (((q + 1) ^ flip) << 4));
                    float part[RT][4];
#pragma unroll
                    for (int rt = 0; rt < RT; rt++) mma::multiply<T>(part[rt], w[rt][0], b0.x, b0.y, {0, 0, 0, 0});
#pragma unroll
                    for (int rt = 0; rt < RT; rt++) multiply_add<T>(part[rt], w[rt][1], b0.z, b0.w);
#pragma unroll
                    for (int rt = 0; rt < RT; rt++) multiply_add<T>(part[rt], w[rt][2], b1.x, b1.y);
#pragma unroll
                    for (int rt = 0; rt < RT; rt++) multiply_add<T>(part[rt], w[rt][3], b1.z, b1.w);
#pragma unroll
                    for (int rt = 0; rt < RT; rt++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            sum[rt][n][i] = fmaf(scale[rt][i / 2], part[rt][i], sum[rt][n][i]);
                }
            }
        }
        put_scales(stage + 1);
    }
    async::wait<0>();

    // All parts of the tile meet in shared memory: [token][slot].
    float* out = reinterpret_cast<float*>(ring);
    for (int k = 0; k < C::WK; k++) {
        __syncthreads();
        if (k_warp != k) continue;
#pragma unroll
        for (int rt = 0; rt < RT; rt++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float* to = out + (n * 8 + t * 2 + i % 2) * C::PITCH + (row_warp * RT + rt) * 16 + g + i / 2 * 8;
                    *to = k == 0 ? sum[rt][n][i] : *to + sum[rt][n][i];
                }
    }
    __syncthreads();
    if (a.splits > 1) {
        const int64_t tiles = gridDim.x, size = C::BM * C::BN;
        float* mine = a.parts + (split * tiles + blockIdx.x) * size;
        for (int i = threadIdx.x; i < size / 4; i += C::THREADS) {
            const int token = i / (C::BN / 4), slot = i % (C::BN / 4) * 4;
            __stcg(reinterpret_cast<float4*>(mine) + i, *reinterpret_cast<float4*>(out + token * C::PITCH + slot));
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(a.arrived + blockIdx.x, 1) == static_cast<uint32_t>(a.splits - 1);
            if (last) a.arrived[blockIdx.x] = 0;
            __threadfence();
        }
        __syncthreads();
        if (!last) return;
        const float* parts = a.parts + blockIdx.x * size;
        for (int i = threadIdx.x; i < size / 4; i += C::THREADS) {
            float4 total = __ldcg(reinterpret_cast<const float4*>(parts) + i);
            for (int k = 1; k < a.splits; k++) {
                const float4 part = __ldcg(reinterpret_cast<const float4*>(parts + k * tiles * size) + i);
                total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
            }
            const int token = i / (C::BN / 4), slot = i % (C::BN / 4) * 4;
            *reinterpret_cast<float4*>(out + token * C::PITCH + slot) = total;
        }
        __syncthreads();
    }
    // Packs of 8 outputs. Behind a member's last row nothing is stored.
    const int cols = a.swiglu ? C::BN / 2 : C::BN;
    int64_t column0 = rows.first;
    for (int j = 0; j < rows.member; j++) column0 += a.w.m[j].rows;
    const QloraFewMember& m = a.w.m[rows.member];
    for (int i = threadIdx.x; i < C::BM * (cols / 8); i += C::THREADS) {
        const int token = i / (cols / 8), col = i % (cols / 8) * 8, at = token0 + token;
        if (at >= a.tokens || rows.first + col >= m.rows) continue;
        const int count = static_cast<int>(min(m.rows - rows.first - col, static_cast<int64_t>(8)));
        float values[8];
        const float* from = out + token * C::PITCH + (a.swiglu ? col * 2 : col);
        const T* residual = static_cast<const T*>(a.residual);
        const T* bias = static_cast<const T*>(m.bias);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            values[e] = from[e];
            if (e >= count) continue;
            if (bias) values[e] += to_float(bias[rows.first + col + e]);
            if (a.swiglu) {
                float up = from[e + 8];
                const T* up_bias = static_cast<const T*>(a.w.m[1].bias);
                if (up_bias) up += to_float(up_bias[rows.first + col + e]);
                values[e] = values[e] / (1.0f + __expf(-values[e])) * up;
            }
            if (residual) values[e] += to_float(residual[at * a.ldr + column0 + col + e]);
        }
        T* to = static_cast<T*>(a.y) + at * a.ldy + column0 + col;
        if (count == 8 && a.y_vectors && (column0 & 7) == 0) {
            store_floats(to, values);
        } else {
            for (int e = 0; e < count; e++) to[e] = from_float<T>(values[e]);
        }
    }
}

// Blocks share k where that fills the device better; a part costs what `PART_STAGES` stages cost.
int splits_of(int64_t tiles, int64_t stages, int per_sm, const QloraLimits& limits) {
    constexpr int PART_STAGES = 2;
    const int64_t sms = static_cast<int64_t>(limits.multiprocessors) * per_sm;
    if (tiles > COUNTER_BYTES / 4) return 1;
    int64_t best = 1, best_cost = INT64_MAX;
    for (int64_t splits = 1; splits <= 16 && splits <= stages; splits++) {
        const int64_t each = divide_up(stages, splits);
        const int64_t cost = divide_up(tiles * splits, sms) * (each + 2 + (splits > 1 ? PART_STAGES : 0));
        if (divide_up(stages, each) == splits && cost < best_cost) best = splits, best_cost = cost;
    }
    return static_cast<int>(best);
}

template <typename C> int64_t row_tiles(const QloraFewWeights& w, bool swiglu) {
    if (swiglu) return divide_up(w.m[0].rows, C::BN / 2);
    int64_t tiles = 0;
    for (int j = 0; j < w.count; j++) tiles += divide_up(w.m[j].rows, C::BN);
    return tiles;
}

template <typename T, typename C>
int launch_gemm(GemmArgs a, void* workspace, const QloraLimits& limits, bool early, cudaStream_t stream) {
    int64_t tiles = 0;
    for (int j = 0; j < 3; j++) {
        a.first_tile[j] = j < a.w.count ? static_cast<int32_t>(tiles) : INT32_MAX;
        if (j < a.w.count) tiles += divide_up(a.w.m[j].rows, C::BN);
    }
    tiles = row_tiles<C>(a.w, a.swiglu);
    a.token_tiles = static_cast<int32_t>(divide_up(a.tokens, C::BM));
    const int64_t stages = divide_up(a.chunks, C::STAGE_CHUNKS), blocks = tiles * a.token_tiles;
    if (blocks > LARGEST_GRID) return static_cast<int>(cudaErrorInvalidValue);
    a.splits = workspace ? splits_of(blocks, stages, C::PER_SM, limits) : 1;
    a.split_stages = static_cast<int32_t>(divide_up(stages, a.splits));
    a.arrived = static_cast<uint32_t*>(workspace);
    a.parts = reinterpret_cast<float*>(static_cast<char*>(workspace) + COUNTER_BYTES);
    constexpr auto KERNEL = gemm_kernel<T, C>;
    const cudaError_t error = allow_shared<KERNEL>(limits, C::SHARED);
    if (error != cudaSuccess) return static_cast<int>(error);
    return launch(KERNEL, dim3(static_cast<unsigned>(blocks), a.splits), dim3(C::THREADS), C::SHARED, early, stream, a);
}

template <typename C>
int64_t workspace_of(const QloraFewWeights& w, int64_t tokens, bool swiglu, const QloraLimits& limits) {
    const int64_t blocks = row_tiles<C>(w, swiglu) * divide_up(tokens, C::BM);
    const int64_t splits = splits_of(blocks, divide_up(w.k / 64, C::STAGE_CHUNKS), C::PER_SM, limits);
    return splits == 1 ? 0 : COUNTER_BYTES + splits * blocks * (C::BM * C::BN * 4);
}

// Calls `f` with the tiles that measured best on an H100.
template <typename F>
auto with_config(const QloraFewWeights& w, int64_t tokens, const QloraLimits& limits, F f) {
    // Less shared memory: Turing, Ada and consumer Ampere, A100.
    const int shared = limits.shared_per_block;
    if (shared < 96 * 1024) return f(Config<64, 32, 2, 2, 1, false, 2>{});
    if (shared < 140 * 1024) return f(Config<64, 32, 4, 2>{});
    if (shared < 200 * 1024) return tokens <= 32 ? f(Config<128, 32, 4, 3>{}) : f(Config<128, 64, 2, 2, 1>{});
#ifdef QLORA_HOPPER
    if (limits.wgmma && tokens <= 32) return f(HopperConfig<128, 32, 2, 4>{});
#endif
    if (tokens <= 32) return f(Config<128, 32, 4, 4>{});
    int64_t rows = 0;
    for (int j = 0; j < w.count; j++) rows += w.m[j].rows;
    if (rows <= 8192 && tokens <= 64) return f(Config<64, 64, 4, 3>{});
#ifdef QLORA_HOPPER
    if (limits.wgmma) return f(HopperConfig<128, 64, 1, 3>{});
#endif
    if (rows <= 8192) return f(Config<64, 64, 4, 3>{});
    if (rows <= 20480 && tokens <= 64) return f(Config<128, 64, 2, 3, 1>{});
    return f(Config<256, 64, 1, 2, 1>{});
}

}  // namespace

// The most tokens for which these kernels are the fastest way on the current device; behind that, it is a dequantized
// copy and cuBLAS.
extern "C" int64_t qlora_few_tokens_most(const QloraLimits* limits) { return limits->wgmma ? 128 : 64; }

// Bytes of the workspace; its first 16 KiB are zero before the first call, and every call leaves them so: calls of all
// sizes can share one.
extern "C" int64_t qlora_nf4_small_gemm_workspace(QloraFewWeights weights, int64_t tokens, int swiglu,
                                                  const QloraLimits* limits) {
    if (tokens <= 0 || !takes(weights)) return 0;
    return with_config(weights, tokens, *limits,
                       [&](auto c) { return workspace_of<decltype(c)>(weights, tokens, swiglu != 0, *limits); });
}

extern "C" int qlora_nf4_small_gemm(int dtype, QloraFewWeights weights, const void* x, int64_t ldx, const float* s,
                                    int64_t lds, const void* residual, int64_t ldr, void* y, int64_t ldy,
                                    int64_t tokens, int swiglu, int early, void* workspace, const QloraLimits* limits,
                                    cudaStream_t stream) {
    if (tokens <= 0) return static_cast<int>(cudaSuccess);
    if (!is_activation(dtype, *limits) || !takes(weights) || !attention::aligned16(x, ldx) || tokens > (1 << 20))
        return static_cast<int>(cudaErrorInvalidValue);
    if (swiglu && (weights.count != 2 || weights.m[0].rows != weights.m[1].rows || residual))
        return static_cast<int>(cudaErrorInvalidValue);
    GemmArgs a{};
    a.w = weights;
    a.x = x, a.ldx = ldx, a.lds = lds, a.residual = residual, a.ldr = ldr, a.y = y, a.ldy = ldy;
    a.tokens = static_cast<int32_t>(tokens);
    a.chunks = static_cast<int32_t>(weights.k / 64);
    a.block_shift = nf4::log2_of(weights.blocksize);
    a.nested_shift = nf4::log2_of(weights.nested_blocksize);
    a.swiglu = swiglu != 0;
    a.y_vectors = attention::aligned16(y, ldy);
    for (int j = 0; j < weights.count; j++) {
        if (!s || !weights.m[j].lora_b) a.w.m[j].rank = 0;
        if (a.w.m[j].rank > 0) a.s = s;
    }
    return with_config(weights, tokens, *limits, [&](auto c) {
        using C = decltype(c);
        return dtype == BF16 ? launch_gemm<__nv_bfloat16, C>(a, workspace, *limits, early, stream)
                             : launch_gemm<__half, C>(a, workspace, *limits, early, stream);
    });
}
