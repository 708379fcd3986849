// wgmma of Hopper (sm_90a and nothing else): d[64, N] += a[64, 16] b[16, N] of a warpgroup, f32 sums, with a in
// registers and b in shared memory.
//
// Warp w of the group holds rows 16 w .. 16 w + 15 of a and d, in the fragments of mma.sync: a as m16n8k16 has it, d as
// N / 8 tiles of m16n8. b lies as [N][64 k] with rows of 128 bytes whose 16-byte pieces are permuted by XOR with row &
// 7, at an address that is a multiple of 1024; `descriptor` names 16 of the 64 k.
#pragma once

#include "common.cuh"

namespace wgmma {

// They may be used where QloraLimits::wgmma says so (probe.cu asks the code itself), and kernels with them exist only where
// build.rs defines QLORA_HOPPER.

// Code for Hopper itself, not for all of sm_90: other compilations have empty functions that nobody may call.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define QLORA_WGMMA(text, ...) asm volatile(text __VA_ARGS__)
#else
#define QLORA_WGMMA(text, ...)
#endif

__device__ __forceinline__ void fence() { QLORA_WGMMA("wgmma.fence.sync.aligned;", ::: "memory"); }

__device__ __forceinline__ void commit() { QLORA_WGMMA("wgmma.commit_group.sync.aligned;", ::: "memory"); }

// Writes of this thread to shared memory become visible to wgmma (of all threads, behind a barrier).
__device__ __forceinline__ void publish() { QLORA_WGMMA("fence.proxy.async.shared::cta;", ::: "memory"); }

__device__ __forceinline__ uint64_t descriptor(uint32_t tile, int k16) {
    // Rows of 128 bytes, groups of eight 1024 bytes apart, pieces permuted over 128 bytes.
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | ((tile + k16 * 32) & 0x3ffff) >> 4;
}

#define QLORA_F8(d, i)                                                                                             \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),     \
        "+f"(d[i + 7])

// Waits for all products of this thread; `d` may be read behind it.
template <int N> __device__ __forceinline__ void wait(float (&d)[N]) {
    QLORA_WGMMA("wgmma.wait_group.sync.aligned 0;", ::: "memory");
    // So that no read of d moves ahead.
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a b, or d += a b with `add`.
template <typename T, int N> struct Product;

template <> struct Product<__nv_bfloat16, 16> {
    static __device__ __forceinline__ void run(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int add) {
        QLORA_WGMMA("{ .reg .pred p; setp.ne.b32 p, %13, 0; "
                    "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
                    "%0, %1, %2, %3, %4, %5, %6, %7"
                    "}, {%8, %9, %10, %11}, %12, p, 1, 1, 0; }",
                    : QLORA_F8(d, 0)
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

template <> struct Product<__half, 16> {
    static __device__ __forceinline__ void run(float (&d)[8], const uint32_t (&a)[4], uint64_t b, int add) {
        QLORA_WGMMA("{ .reg .pred p; setp.ne.b32 p, %13, 0; "
                    "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {"
                    "%0, %1, %2, %3, %4, %5, %6, %7"
                    "}, {%8, %9, %10, %11}, %12, p, 1, 1, 0; }",
                    : QLORA_F8(d, 0)
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

template <> struct Product<__nv_bfloat16, 32> {
    static __device__ __forceinline__ void run(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int add) {
        QLORA_WGMMA("{ .reg .pred p; setp.ne.b32 p, %21, 0; "
                    "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
                    "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0; }",
                    : QLORA_F8(d, 0), QLORA_F8(d, 8)
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

template <> struct Product<__half, 32> {
    static __device__ __forceinline__ void run(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int add) {
        QLORA_WGMMA("{ .reg .pred p; setp.ne.b32 p, %21, 0; "
                    "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
                    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
                    "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0; }",
                    : QLORA_F8(d, 0), QLORA_F8(d, 8)
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

template <> struct Product<__nv_bfloat16, 64> {
    static __device__ __forceinline__ void run(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int add) {
        QLORA_WGMMA("{ .reg .pred p; setp.ne.b32 p, %37, 0; "
                    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                    "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }",
                    : QLORA_F8(d, 0), QLORA_F8(d, 8), QLORA_F8(d, 16), QLORA_F8(d, 24)
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

template <> struct Product<__half, 64> {
    static __device__ __forceinline__ void run(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int add) {
        QLORA_WGMMA("{ .reg .pred p; setp.ne.b32 p, %37, 0; "
                    "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
                    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
                    "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }",
                    : QLORA_F8(d, 0), QLORA_F8(d, 8), QLORA_F8(d, 16), QLORA_F8(d, 24)
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

template <> struct Product<__nv_bfloat16, 128> {
    static __device__ __forceinline__ void run(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int add) {
        QLORA_WGMMA("{ .reg .pred p; setp.ne.b32 p, %69, 0; "
                    "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                    "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0; }",
                    : QLORA_F8(d, 0), QLORA_F8(d, 8), QLORA_F8(d, 16), QLORA_F8(d, 24),
                      QLORA_F8(d, 32), QLORA_F8(d, 40), QLORA_F8(d, 48), QLORA_F8(d, 56)
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

template <> struct Product<__half, 128> {
    static __device__ __forceinline__ void run(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int add) {
        QLORA_WGMMA("{ .reg .pred p; setp.ne.b32 p, %69, 0; "
                    "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
                    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
                    "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0; }",
                    : QLORA_F8(d, 0), QLORA_F8(d, 8), QLORA_F8(d, 16), QLORA_F8(d, 24),
                      QLORA_F8(d, 32), QLORA_F8(d, 40), QLORA_F8(d, 48), QLORA_F8(d, 56)
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
    }
};

#undef QLORA_F8
#undef QLORA_WGMMA

}  // namespace wgmma
