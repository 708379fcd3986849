// Device helpers of the attention kernels: mma.sync m16n8k16, ldmatrix, cp.async, swizzled shared-memory tiles.
//
// A tile is [rows][COLS] of a 2-byte type, rows contiguous without padding. The 16-byte chunks of a row are permuted by
// XOR with a few bits of the row number, so that ldmatrix (8 rows of one chunk) and the fragment stores touch 8
// different bank groups. A row of 64 or 128 columns is a multiple of 128 bytes: XOR with row & 7. A row of 96 (or 32)
// columns is an odd multiple of 64 bytes, odd rows start half a bank line later: XOR with (row >> 1) & 3 is enough.
#pragma once

#include "common.cuh"

#include <mutex>
#include <type_traits>

namespace attention {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory; zeros when `valid` is false (nothing is read then).
__device__ __forceinline__ void copy_async16(uint32_t dst, const void* src, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_async4(uint32_t dst, const void* src, bool valid) {
    const int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int N> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four 8x8 matrices; lanes 8i..8i+7 give the row addresses of matrix i.
__device__ __forceinline__ void load_matrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrix_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

__device__ __forceinline__ float load_shared(uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(x) : "r"(address) : "memory");
    return x;
}

// d = a b + c with a 16x16 (row), b 16x8 (column), f32 sums. Lane l holds d rows l/4 and l/4 + 8, columns 2(l%4) and
// + 1.
template <typename T> __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                               uint32_t b1, const float (&c)[4]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};\n"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};\n"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply<T>(d, a, b0, b1, d);
}

// Two floats as a pair of T, `low` in the low half (the lower column).
template <typename T> __device__ __forceinline__ uint32_t pack_pair(float low, float high);

template <> __device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

template <> __device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

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
            copy_async16(to + i * STEP * Tile<COLS>::PITCH + c * 16, from + c * 8, valid);
        from += STEP * ld;
    }
}

// A device's limits.
struct DeviceLimits {
    int shared_bytes;
    int multiprocessors;
};

inline DeviceLimits ask_device_limits(int device) {
    DeviceLimits l{48 * 1024, 1};
    cudaDeviceGetAttribute(&l.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&l.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    return l;
}

// The current device's limits; each device is asked once, the 65th and later ones always.
inline DeviceLimits device_limits() {
    constexpr int DEVICES = 64;
    static DeviceLimits known[DEVICES];
    static std::once_flag asked[DEVICES];
    int device = 0;
    cudaGetDevice(&device);
    if (device < 0 || device >= DEVICES) return ask_device_limits(device);
    std::call_once(asked[device], [device] { known[device] = ask_device_limits(device); });
    return known[device];
}

inline bool aligned16(const void* p, int64_t ld) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ld % 8 == 0; }

} // namespace attention
