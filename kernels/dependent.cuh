// Launches that begin while the kernel before them still ends (programmatic dependent launch, sm_90 and later;
// elsewhere they are ordinary launches). The few microseconds between two kernels then hide in the first one's tail.
//
// Such a kernel calls `let_next_begin` first and `wait_for_previous` before its first access, other than reads of
// memory that nothing writes any more, since until then the kernels before it may still run. Every one of its blocks
// has to wait: only so has everything before it ended when it ends. Kernels that are launched as usual need no change
// on either side.
#pragma once

#include <cuda_runtime.h>

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

// `early`: whether the code that runs has the two instructions (DeviceLimits::early_launches: what it was compiled for
// decides, not the device, which may have translated code for an older one).
template <typename... Parameters>
int launch_early(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, bool early, cudaStream_t stream,
                 Parameters... parameters) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    // A refused launch must not leave its error for the next one.
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters...), left = cudaGetLastError();
    return static_cast<int>(error == cudaSuccess ? left : error);
}
