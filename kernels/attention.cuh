// Device helpers of the attention kernels: swizzled shared-memory tiles, their copies and their products.
//
// A tile is [rows][COLS] of a 2-byte type, rows contiguous without padding. The 16-byte chunks of a row are permuted by
// XOR with a few bits of the row number, so that ldmatrix (8 rows of one chunk) and the fragment stores touch 8
// different bank groups. A row of 64 or 128 columns is a multiple of 128 bytes: XOR with row & 7. A row of 96 (or 32)
// columns is an odd multiple of 64 bytes, odd rows start half a bank line later: XOR with (row >> 1) & 3 is enough.
#pragma once

#include "async.cuh"
#include "mma.cuh"

namespace attention {

using namespace mma;

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

// Addresses inside a [rows][COLS] tile of 2-byte elements.
template <int COLS> struct Tile {
    static constexpr int CHUNKS = COLS / 8;
    static constexpr int PITCH = COLS * 2;
    static constexpr int MASK = CHUNKS % 8 == 0 ? 7 : 3;
    static_assert(CHUNKS % 4 == 0, "a row is a multiple of 64 bytes");

    static __device__ __forceinline__ int swizzle(int row) { return MASK == 7 ? row & 7 : (row >> 1) & 3; }

    static __device__ __forceinline__ uint32_t address(uint32_t base, int row, int chunk) {
        return base + row * PITCH + ((chunk ^ swizzle(row)) << 4);
    }

    // Lane address for ldmatrix of a 16x16 block whose matrices run down the rows first (A operand, or, transposed, the
    // B operand of a [k][n] tile).
    static __device__ __forceinline__ uint32_t lane_down(uint32_t base, int row, int lane) {
        return address(base, row + (lane & 15), lane >> 4);
    }

    // The same with the matrices running along the columns first (B operand of an [n][k] tile, or, transposed, the A
    // operand of a [k][m] tile).
    static __device__ __forceinline__ uint32_t lane_along(uint32_t base, int row, int lane) {
        return address(base, row + (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
    }

    // Moves a lane address `chunk` chunks (an even number) to the right. `at(at(x, a), b)` is right only if a and b
    // share no bits.
    static __device__ __forceinline__ uint32_t at(uint32_t lane_address, int chunk) {
        return (lane_address ^ ((chunk & MASK) << 4)) + ((chunk & ~MASK) << 4);
    }
};

// d (+)= A B of M x N tiles (16 rows, 8 columns) over KS steps of 16. load_a(ks, x) gives the A fragments of a step,
// load_b(ks, n, b) the B fragments of the tiles n and n + 1. The next fragments are fetched before the products of the
// current ones (A only where AHEAD_A): otherwise a warp would wait for shared memory every 2 M products.
template <typename T, bool FROM_ZERO, bool AHEAD_A, bool AHEAD_B, int M, int N, int KS, typename LoadA, typename LoadB>
__device__ __forceinline__ void product(float (&d)[M][N][4], LoadA load_a, LoadB load_b) {
    static_assert(N % 2 == 0, "B fragments come in pairs");
    constexpr int PAIRS = N / 2;
    uint32_t x[2][M][4], b[2][4];
    if (AHEAD_A) load_a(0, x[0]);
    if (AHEAD_B) load_b(0, 0, b[0]);
#pragma unroll
    for (int ks = 0; ks < KS; ks++) {
        if (!AHEAD_A) load_a(ks, x[ks & 1]);
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
            const int i = ks * PAIRS + pair;
            if (!AHEAD_B) load_b(ks, pair * 2, b[i & 1]);
            else if (i + 1 < KS * PAIRS) load_b((i + 1) / PAIRS, (i + 1) % PAIRS * 2, b[(i + 1) & 1]);
            if (AHEAD_A && pair == PAIRS / 2 && ks + 1 < KS) load_a(ks + 1, x[(ks + 1) & 1]);
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int m = 0; m < M; m++) {
                    float (&to)[4] = d[m][pair * 2 + half];
                    if (FROM_ZERO && ks == 0)
                        multiply<T>(to, x[0][m], b[i & 1][half * 2], b[i & 1][half * 2 + 1], {0, 0, 0, 0});
                    else multiply_add<T>(to, x[ks & 1][m], b[i & 1][half * 2], b[i & 1][half * 2 + 1]);
                }
        }
    }
}

// Starts the copy of ROWS rows of COLS elements into a tile. Rows outside [first, last) become zeros.
//
// Neighbouring threads take the chunks of a row (four of them where the row is an odd number of 64-byte pieces), and a
// thread keeps its chunk and the swizzle of its row in all passes: the shared addresses differ by constants.
template <int COLS, int ROWS, int THREADS, typename T>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* src, int64_t ld, int first, int last) {
    constexpr int LINE = Tile<COLS>::MASK == 7 ? Tile<COLS>::CHUNKS : 4;
    constexpr int STEP = THREADS / LINE;
    static_assert(THREADS % LINE == 0 && ROWS % STEP == 0 && STEP % 8 == 0, "whole passes");
    const int row = threadIdx.x / LINE, chunk = threadIdx.x % LINE;
    const uint32_t to = Tile<COLS>::address(tile, row, chunk);
    const T* from = src + row * ld + chunk * 8;
    const bool whole = first <= 0 && last >= ROWS;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) {
        const bool valid = whole || (row + i * STEP >= first && row + i * STEP < last);
#pragma unroll
        for (int c = 0; c < Tile<COLS>::CHUNKS; c += LINE)
            async::copy16(to + i * STEP * Tile<COLS>::PITCH + c * 16, from + c * 8, valid);
        from += STEP * ld;
    }
}

inline bool aligned16(const void* p, int64_t ld) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ld % 8 == 0; }

} // namespace attention
