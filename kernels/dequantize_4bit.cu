// 4-bit codes to a matrix, with the scales decoded on the way: rows [first_row, first_row + rows) of a weight whose
// codes are packed over the flattened weight (formats: nf4.cuh). Bit-exact with quant/decode.rs: the f32 product is
// rounded once more, to the output's type.
//
// Floor: memory. A bf16 weight costs 2 + 0.5 + 1/64 bytes per element, four fifths of it stores, so the stores are the
// side that is coalesced: a thread decodes 4 bytes to 8 elements (16 bytes of bf16) beside its neighbour's. The table
// lives in the lanes of the warp: one shuffle looks up a code for every lane, and takes its index modulo 16, so a
// nibble needs a shift and no mask. PACKS independent loads a thread hide the latency of the codes. One launch.

#include "nf4.cuh"

namespace {

using nf4::Scales;

struct Weight {
    const uint8_t* codes;
    Scales scales;
    int quant_type;
    int block_shift;    // log2 of the blocksize
    int64_t first;      // the flat index of the first element
    int64_t cols;
};

template <typename T, int BLOCK, int PACKS>
__global__ void __launch_bounds__(BLOCK)
    vector_kernel(Weight w, T* out, int64_t ldo, uint32_t packs, Divisor row_packs) {
    const float table = nf4::TABLES[w.quant_type][threadIdx.x % 16];
    const uint32_t* words = reinterpret_cast<const uint32_t*>(w.codes) + w.first / 8;
    const uint32_t start = blockIdx.x * (BLOCK * PACKS) + threadIdx.x;
    uint32_t word[PACKS];
    float scale[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        // Threads behind the end repeat the last pack: shuffles need whole warps.
        const uint32_t pack = min(start + k * BLOCK, packs - 1);
        word[k] = __ldcs(words + pack);
        scale[k] = w.scales((w.first + static_cast<int64_t>(pack) * 8) >> w.block_shift);
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const uint32_t pack = start + k * BLOCK;
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            // Byte i / 2, upper nibble first.
            const int code = static_cast<int>(word[k] >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0)));
            values[i] = nf4::multiply_flushed(__shfl_sync(~0u, table, code, 16), scale[k]);
        }
        const uint32_t row = row_packs.quotient(pack);
        const int64_t at = row * ldo + static_cast<int64_t>(pack - row * row_packs.d) * 8;
        if (pack < packs) store_floats(out + at, values);
    }
}

// Any shape, stride and alignment.
template <typename T> struct Single {
    Weight w;
    T* out;
    int64_t ldo;

    __device__ void operator()(int64_t row, int64_t col) const {
        const int64_t i = w.first + row * w.cols + col;
        const uint8_t byte = w.codes[i / 2];
        const int code = i % 2 == 0 ? byte >> 4 : byte & 15;
        const float value = nf4::TABLES[w.quant_type][code];
        out[row * ldo + col] = from_float<T>(nf4::multiply_flushed(value, w.scales(i >> w.block_shift)));
    }
};

}  // namespace

extern "C" int qlora_dequantize_4bit(int out_dtype, const uint8_t* codes, const float* absmax,
                                     const uint8_t* absmax_codes, const float* nested_map, const float* nested_absmax,
                                     float nested_offset, int quant_type, int64_t blocksize, int64_t nested_blocksize,
                                     void* out, int64_t ldo, int64_t first_row, int64_t rows, int64_t cols,
                                     cudaStream_t stream) {
    if (rows <= 0 || cols <= 0) return static_cast<int>(cudaSuccess);
    if (!nf4::is_blocksize(blocksize) || quant_type < 0 || quant_type > 1 || first_row < 0 ||
        (!absmax && !nf4::is_power_of_two(nested_blocksize))) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    const Scales scales{absmax, absmax_codes, nested_map, nested_absmax, nested_offset, nf4::log2_of(nested_blocksize)};
    const Weight w{codes, scales, quant_type, nf4::log2_of(blocksize), first_row * cols, cols};
    return with_dtype(out_dtype, [&](auto zero) {
        using T = decltype(zero);
        T* o = static_cast<T*>(out);
        constexpr int BLOCK = 256, PACKS = 2;
        // With whole packs in a row, packs also lie in one block and in one 4-byte word.
        const bool vectors = allows_vectors(o, ldo, cols, 8) && reinterpret_cast<uintptr_t>(codes) % 4 == 0;
        if (!vectors || rows * (cols / 8) > LARGEST_GRID - 8 * BLOCK) {
            return for_each_pack<1>(rows, cols, Single<T>{w, o, ldo}, stream);
        }
        const uint32_t packs = static_cast<uint32_t>(rows * (cols / 8));
        const unsigned blocks = static_cast<unsigned>(divide_up(packs, BLOCK * PACKS));
        const Divisor row_packs(static_cast<uint32_t>(cols / 8));
        vector_kernel<T, BLOCK, PACKS><<<blocks, BLOCK, 0, stream>>>(w, o, ldo, packs, row_packs);
        return static_cast<int>(cudaGetLastError());
    });
}
