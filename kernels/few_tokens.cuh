// Code shared by the kernels of a decode step: the argument structs of a group of weights, the table that decodes a
// byte of two codes at once, and launches that may begin early.
//
// A 4-bit weight [rows, k] is the A operand of mma.sync m16n8k16 (16 weight rows, 8 tokens are the columns): the order
// of k within a product is free as long as both operands agree. A lane (g, t) = (lane / 4, lane % 4) takes the 8 bytes
// of codes k = 16 t .. 16 t + 15 of a chunk of 64, of the rows g and g + 8; byte 2 s holds the codes that step s (of 4)
// wants in the fragment's first half, byte 2 s + 1 those of the second half. The other operand is then x[token g][16 t
// + 4 s ..+ 3]: consecutive too, 16 elements a chunk. No weight is moved between lanes.
#pragma once

#include "attention.cuh"
#include "dependent.cuh"
#include "device.cuh"
#include "nf4.cuh"

extern "C" {
// One weight of a group that shares its input. Either absmax is set, or the four nested fields are.
typedef struct {
    const uint8_t* codes;
    const float* absmax;
    const uint8_t* absmax_codes;
    const float* nested_map;
    const float* nested_absmax;
    const void* bias;    // [rows] of the activations' type, or NULL
    const float* lora_b; // [rows, rank] f32, or NULL
    int64_t rows;
    float nested_offset;
    float scale;         // of the adapter
    int32_t rank, r0;    // the adapter's columns of S
} QloraFewMember;

typedef struct {
    QloraFewMember m[3];
    int64_t k, blocksize, nested_blocksize;
    int32_t count, quant_type;
} QloraFewWeights;
}

namespace few {

using mma::multiply_add;
using mma::pack_pair;
using mma::shared_address;

// Launches a kernel that calls `let_next_begin` and `wait_for_previous`; with `early` it may begin before its
// predecessor ends (dependent.cuh), and then loads weights, which nothing writes. The code must have these instructions.
template <typename... P, typename... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, bool early, cudaStream_t stream, A... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, P(args)...), left = cudaGetLastError();
    return static_cast<int>(error == cudaSuccess ? left : error);
}

// The table byte -> two levels (the upper nibble in the low half), once a lane: 32 lookups never meet in a bank.
constexpr int TABLE_WORDS = 256 * 32;

template <typename T> __device__ __forceinline__ void fill_table(uint32_t* table, int quant_type, int threads) {
    const float level = nf4::TABLES[quant_type][threadIdx.x % 16];
    // Eight neighbouring threads write an entry; whole warps take part in the shuffles.
    for (int i = threadIdx.x; i < 256 * 8; i += threads) {
        const int byte = i / 8;
        const float even = __shfl_sync(~0u, level, byte >> 4, 16), odd = __shfl_sync(~0u, level, byte & 15, 16);
        const uint32_t pair = pack_pair<T>(even, odd);
        reinterpret_cast<uint4*>(table)[i] = make_uint4(pair, pair, pair, pair);
    }
}

// Byte `b` (known at compile time) of a word, decoded. `lane4` is 4 * lane. One dot product of bytes makes the address:
// 128 times the byte, plus 4 times the lane.
__device__ __forceinline__ uint32_t decode(const uint32_t* table, uint32_t word, int b, uint32_t lane4) {
    const uint32_t at = __dp4a(word, 0x80u << (8 * b), lane4);
    return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(table) + at);
}

// The A fragments of step `s` (0..3) of a chunk, from the codes of rows g and g + 8.
__device__ __forceinline__ void decode_step(const uint32_t* table, uint2 low, uint2 high, int s, uint32_t lane4,
                                            uint32_t (&a)[4]) {
    const uint32_t l = s < 2 ? low.x : low.y, h = s < 2 ? high.x : high.y;
    const int b = s % 2 * 2;
    a[0] = decode(table, l, b, lane4);
    a[1] = decode(table, h, b, lane4);
    a[2] = decode(table, l, b + 1, lane4);
    a[3] = decode(table, h, b + 1, lane4);
}

// 16 consecutive elements of x as the B fragments of a chunk.
template <typename T> __device__ __forceinline__ void load_x(const T* p, bool vectors, bool valid, uint32_t (&b)[8]) {
    if (!valid) {
#pragma unroll
        for (int i = 0; i < 8; i++) b[i] = 0;
    } else if (vectors) {
        const uint4 low = reinterpret_cast<const uint4*>(p)[0], high = reinterpret_cast<const uint4*>(p)[1];
        b[0] = low.x, b[1] = low.y, b[2] = low.z, b[3] = low.w;
        b[4] = high.x, b[5] = high.y, b[6] = high.z, b[7] = high.w;
    } else {
        const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
#pragma unroll
        for (int i = 0; i < 8; i++) b[i] = h[2 * i] | static_cast<uint32_t>(h[2 * i + 1]) << 16;
    }
}

inline bool is_16_bits(int dtype) { return dtype == BF16 || dtype == F16; }

// Whether the tensor cores take it.
inline bool is_activation(int dtype, const QloraLimits& limits) {
    return dtype == F16 || (dtype == BF16 && limits.bf16);
}

inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Whether the 4-bit kernels can take the weights: whole chunks of 64 of k in a row, a block never smaller than a chunk.
inline bool takes(const QloraFewWeights& w) {
    if (w.count < 1 || w.count > 3 || w.k <= 0 || w.k % 64 != 0 || !nf4::is_blocksize(w.blocksize) ||
        w.blocksize < 64 || w.quant_type < 0 || w.quant_type > 1) {
        return false;
    }
    const bool plain = w.m[0].absmax != nullptr;
    if (!plain && (!nf4::is_power_of_two(w.nested_blocksize) || w.nested_blocksize < 4)) return false;
    for (int j = 0; j < w.count; j++) {
        const QloraFewMember& m = w.m[j];
        if ((m.absmax != nullptr) != plain || m.rows <= 0 || m.rank < 0 || m.r0 < 0) return false;
        if (reinterpret_cast<uintptr_t>(m.codes) % 16 != 0) return false;
    }
    return true;
}

}  // namespace few
