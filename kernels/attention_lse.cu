// The log-sum-exp of sequences of one length, from [sequence, head, position], as cuDNN writes it, to [token, head], as our
// kernels read it. Only for a backward that cuDNN refused after its forward: not made to be fast.

#include "common.cuh"

namespace attention_lse {

constexpr int THREADS = 256;

__global__ void by_token_kernel(const float* from, float* to, int64_t len, int64_t heads, int64_t count) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= count) return;
    const int64_t token = i / heads, head = i % heads;
    to[i] = from[(token / len * heads + head) * len + token % len];
}

} // namespace attention_lse

extern "C" int qlora_attention_lse_by_token(const float* from, float* to, int64_t tokens, int64_t len, int64_t heads,
                                            cudaStream_t stream) {
    using namespace attention_lse;
    const int64_t count = tokens * heads, blocks = (count + THREADS - 1) / THREADS;
    if (len <= 0 || tokens % len != 0 || blocks > INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
    if (count == 0) return static_cast<int>(cudaSuccess);
    by_token_kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(from, to, len, heads, count);
    return static_cast<int>(cudaGetLastError());
}
