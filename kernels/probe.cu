// The architecture for which the running code was compiled: the driver may have translated code for an older
// architecture, which has none of the newer instructions whatever the device has. Asked once, when a device is opened.

#include "wgmma.cuh"

namespace {

__global__ void probe_kernel(uint32_t* out) {
#ifdef __CUDA_ARCH__
    out[0] = __CUDA_ARCH__ / 10;
#endif
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    out[1] = 1;
#else
    out[1] = 0;
#endif
}

}  // namespace

// out[0]: the architecture of the code, such as 86; out[1]: whether it has Hopper's own instructions.
extern "C" int qlora_probe(uint32_t* out, cudaStream_t stream) {
    probe_kernel<<<1, 1, 0, stream>>>(out);
    return static_cast<int>(cudaGetLastError());
}
