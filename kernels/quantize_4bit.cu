// A flat weight to 4-bit codes and one absmax a block (formats: nf4.cuh), bit-exact with quant/encode.rs, which is
// bitsandbytes' CUDA backend:
//
//     absmax = max |w| over the block          code = encode(w * rcp(absmax))
//
// rcp is the GPU's approximate reciprocal (one MUFU.RCP), subnormal numbers count as zeros, the codes of a block of
// zeros are 0 (0 times infinity is NaN, and NaN has code 0), an odd number of elements is padded with the code of zero.
//
// Elements that are not finite or whose magnitude is above 2^126 (the reciprocal would be subnormal) cannot be encoded:
// `first_bad`, preset to the largest u64, gets the smallest index of one; the codes of its block mean nothing.
//
// Floor: memory, s + 0.5 bytes per element. A thread holds 8 elements, blocksize / 8 neighbours are a block.

#include "nf4.cuh"

namespace {

constexpr uint32_t LARGEST = (126 + 127) << 23;

template <typename T, int QUANT_TYPE>
__global__ void __launch_bounds__(512)
    quantize_kernel(const T* in, int64_t n, int lanes, int block_shift, bool vectors, uint8_t* codes, bool words,
                    float* absmax, unsigned long long* first_bad) {
    __shared__ uint32_t parts[16];
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t first = thread * 8;
    float values[8];
    if (vectors && first + 8 <= n) {
        load_floats(in + first, values);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = first + i < n ? to_float(in[first + i]) : 0.0f;
    }
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t magnitude = __float_as_uint(values[i]) & 0x7fffffff;
        largest = max(largest, magnitude);
    }
    if (largest > LARGEST) {
        for (int i = 0; i < 8; i++) {
            if ((__float_as_uint(values[i]) & 0x7fffffff) > LARGEST) {
                atomicMin(first_bad, static_cast<unsigned long long>(first + i));
                break;
            }
        }
    }
    for (int step = min(lanes, 32) / 2; step > 0; step /= 2) {
        largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    }
    if (lanes > 32) {
        // The block is one quantization block.
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = largest;
        __syncthreads();
        for (int i = 0; i < lanes / 32; i++) largest = max(largest, parts[i]);
    }
    if (first >= n) return;
    // A subnormal maximum is a zero.
    const float scale = largest < 0x00800000 ? 0.0f : __uint_as_float(largest);
    if ((threadIdx.x & (lanes - 1)) == 0) absmax[first >> block_shift] = scale;
    float factor;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(factor) : "f"(scale));

    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float s = nf4::multiply_flushed(values[i], factor);
        const uint32_t code = QUANT_TYPE == nf4::NF4 ? nf4::encode_nf4(s) : nf4::encode_fp4(s);
        word |= code << (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
    }
    if (words && first + 8 <= n) {
        reinterpret_cast<uint32_t*>(codes)[thread] = word;
    } else {
        for (int i = 0; i < 4 && first + 2 * i < n; i++) codes[first / 2 + i] = static_cast<uint8_t>(word >> (8 * i));
    }
}

}  // namespace

extern "C" int qlora_quantize_4bit(int in_dtype, const void* in, int64_t n, int quant_type, int64_t blocksize,
                                   uint8_t* codes, float* absmax, uint64_t* first_bad, cudaStream_t stream) {
    if (n <= 0) return static_cast<int>(cudaSuccess);
    if (!nf4::is_blocksize(blocksize) || quant_type < 0 || quant_type > 1) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    return with_dtype(in_dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* data = static_cast<const T*>(in);
        const int lanes = static_cast<int>(blocksize / 8), block = lanes > 32 ? lanes : 256;
        const int64_t blocks = divide_up(divide_up(n, 8), block);
        if (blocks > LARGEST_GRID) return static_cast<int>(cudaErrorInvalidValue);
        const bool vectors = allows_vectors(data, 0, 0, 8), words = reinterpret_cast<uintptr_t>(codes) % 4 == 0;
        const auto kernel = quant_type == nf4::NF4 ? quantize_kernel<T, nf4::NF4> : quantize_kernel<T, nf4::FP4>;
        kernel<<<static_cast<unsigned>(blocks), block, 0, stream>>>(
            data, n, lanes, nf4::log2_of(blocksize), vectors, codes, words, absmax,
            reinterpret_cast<unsigned long long*>(first_bad));
        return static_cast<int>(cudaGetLastError());
    });
}
