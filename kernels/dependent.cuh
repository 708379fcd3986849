// Launches that begin while the kernel before them still ends (programmatic dependent launch, sm_90 and later;
// elsewhere they are ordinary launches). The few microseconds between two kernels then hide in the first one's tail.
//
// Such a kernel calls `let_next_begin` first and `wait_for_previous` before its first access, other than reads of
// memory that nothing writes any more, since until then the kernels before it may still run. Every one of its blocks
// has to wait: only so has everything before it ended when it ends. Kernels that are launched as usual need no change
// on either side.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether the code that runs on the current device has the two instructions: what it was compiled for decides, not the
// device, which may have compiled code for an older one.
template <typename Kernel> bool waits_for_previous(Kernel kernel) {
    constexpr int DEVICES = 64;
    static std::atomic<signed char> known[DEVICES];     // 0: not asked yet, 1: no, 2: yes
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= DEVICES) return false;
    if (known[device] == 0) {
        cudaFuncAttributes attributes;
        if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return false;
        known[device] = attributes.ptxVersion >= 90 ? 2 : 1;
    }
    return known[device] == 2;
}

template <typename... Parameters>
int launch_early(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, cudaStream_t stream,
                 Parameters... parameters) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = waits_for_previous(kernel) ? 1 : 0;
    return static_cast<int>(cudaLaunchKernelEx(&config, kernel, parameters...));
}
