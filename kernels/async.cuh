// Copies from global to shared memory that run in the background (cp.async, sm_80 and later). On sm_75 the same calls copy
// at once: whoever waits for them finds them done. The sources are read through the read-only cache there, so nothing in
// the same kernel may write them.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace async {

// Whether a copy is under way while the thread goes on.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr bool IN_BACKGROUND = true;
#else
constexpr bool IN_BACKGROUND = false;
#endif

// 16 bytes to shared memory; zeros when `valid` is false (nothing is read then). LINE: the L2 cache fetches 128 bytes.
template <bool LINE = true> __device__ __forceinline__ void copy16(uint32_t dst, const void* src, bool valid) {
    if constexpr (IN_BACKGROUND) {
        const int bytes = valid ? 16 : 0;
        if constexpr (LINE)
            asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(bytes)
                         : "memory");
        else
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
    } else {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (valid) x = __ldg(static_cast<const uint4*>(src));
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(dst), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                     : "memory");
    }
}

// The same of 4 bytes.
__device__ __forceinline__ void copy4(uint32_t dst, const void* src, bool valid) {
    if constexpr (IN_BACKGROUND) {
        const int bytes = valid ? 4 : 0;
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
    } else {
        const uint32_t x = valid ? __ldg(static_cast<const uint32_t*>(src)) : 0;
        asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(dst), "r"(x) : "memory");
    }
}

// The copies since the last call are a group.
__device__ __forceinline__ void commit() {
    if constexpr (IN_BACKGROUND) asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most the N youngest groups of this thread are under way. What other threads copied is there behind a
// barrier.
template <int N> __device__ __forceinline__ void wait() {
    if constexpr (IN_BACKGROUND) asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

}  // namespace async
