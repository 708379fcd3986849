// 4-bit codes to a matrix, with the scales decoded on the way: rows [first_row, first_row + rows) of a weight whose
// codes are packed over the flattened weight (formats: nf4.cuh). Bit-exact with quant/decode.rs: the f32 product is
// rounded once more, to the output's type. Up to three weights in one launch: q|k|v, gate|up.
//
// Floor: memory. A bf16 weight costs 2 + 0.5 + 1/64 bytes per element, four fifths of it stores, so the stores are the
// side that is coalesced: a thread decodes 4 bytes to 8 elements (16 bytes of bf16) beside its neighbour's. The table
// lives in the lanes of the warp: one shuffle looks up a code for every lane, and takes its index modulo 16, so a
// nibble needs a shift and no mask. So do the scales of the warp's stretch: each is decoded once. PACKS independent
// loads a thread hide the latency of the codes. Stores are ordinary ones: streaming stores are 2% faster by themselves,
// but whoever reads a weight of 4096 x 4096 next no longer finds it in the L2 cache.
//
// The remaining time is a launch's start and end, 4 us: a launch begins before its predecessor has ended
// (dependent.cuh), and reads codes and scales at once, which nobody writes. Only the stores wait.

#include "dependent.cuh"
#include "nf4.cuh"

// One weight and where it goes. Codes and scales have to be settled: between the kernel that wrote them and this launch
// lies a synchronization or an ordinary operation of the stream.
struct QloraDequantize4bit {
    const uint8_t* codes;
    const float* absmax;            // plain f32, or NULL: doubly quantized, which the next four and the offset say
    const uint8_t* absmax_codes;
    const float* nested_map;
    const float* nested_absmax;
    void* out;
    int64_t blocksize, nested_blocksize, ldo, first_row, rows, cols;
    float nested_offset;
    int quant_type;
};

namespace {

using nf4::Scales;

constexpr int MEMBERS = 3;

struct Weight {
    const uint8_t* codes;
    Scales scales;
    int quant_type;
    int block_shift;    // log2 of the blocksize
    int64_t first;      // the flat index of the first element
    int64_t cols;
};

template <typename T> struct Member {
    Weight w;
    T* out;
    int64_t ldo;
    uint32_t packs;
    uint32_t start;     // the first block of threads
    Divisor row_packs;
};

template <typename T> struct Members {
    Member<T> m[MEMBERS];
};

// Packs of 8 elements. A warp decodes PACKS * 32 of them, which lie side by side.
template <typename T, int BLOCK, int PACKS, bool ONE>
__global__ void __launch_bounds__(BLOCK) vector_kernel(const __grid_constant__ Members<T> members) {
    static_assert(PACKS <= 2, "with blocks of 32, 17 scales: one a lane");
    let_next_begin();
    const int which = ONE || blockIdx.x < members.m[1].start ? 0 : (blockIdx.x < members.m[2].start ? 1 : 2);
    const Member<T>& m = members.m[which];
    const Weight& w = m.w;
    const float table = nf4::TABLES[w.quant_type][threadIdx.x % 16];
    const uint32_t* words = reinterpret_cast<const uint32_t*>(w.codes) + w.first / 8;
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t start = ((blockIdx.x - m.start) * BLOCK + threadIdx.x - lane) * PACKS;
    const auto block_of = [&](uint32_t pack) { return (w.first + static_cast<int64_t>(pack) * 8) >> w.block_shift; };
    uint32_t word[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        // Threads behind the end repeat the last pack: shuffles need whole warps.
        word[k] = __ldcs(words + min(start + k * 32 + lane, m.packs - 1));
    }
    const int64_t first_block = block_of(min(start, m.packs - 1));
    const float scale = w.scales(min(first_block + lane, block_of(min(start + PACKS * 32, m.packs) - 1)));
    wait_for_previous();
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const uint32_t pack = start + k * 32 + lane;
        const float s = __shfl_sync(~0u, scale, static_cast<int>(block_of(pack) - first_block));
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            // Byte i / 2, upper nibble first.
            const int code = static_cast<int>(word[k] >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0)));
            values[i] = nf4::multiply_flushed(__shfl_sync(~0u, table, code, 16), s);
        }
        const uint32_t row = m.row_packs.quotient(pack);
        const int64_t at = row * m.ldo + static_cast<int64_t>(pack - row * m.row_packs.d) * 8;
        if (pack < m.packs) store_floats(m.out + at, values);
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

bool is_valid(const QloraDequantize4bit& q) {
    if (q.rows <= 0 || q.cols <= 0) return true;
    return nf4::is_blocksize(q.blocksize) && q.quant_type >= 0 && q.quant_type <= 1 && q.first_row >= 0 &&
           (q.absmax || nf4::is_power_of_two(q.nested_blocksize));
}

}  // namespace

extern "C" int qlora_dequantize_4bit_group(int out_dtype, const QloraDequantize4bit* weights, int64_t count, int early,
                                           cudaStream_t stream) {
    if (count < 0 || count > MEMBERS) return static_cast<int>(cudaErrorInvalidValue);
    for (int64_t j = 0; j < count; j++) {
        if (!is_valid(weights[j])) return static_cast<int>(cudaErrorInvalidValue);
    }
    return with_dtype(out_dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int BLOCK = 512, PACKS = 2;
        Members<T> members{};
        int64_t blocks = 0;
        int used = 0;
        for (int64_t j = 0; j < count; j++) {
            const QloraDequantize4bit& q = weights[j];
            if (q.rows <= 0 || q.cols <= 0) continue;
            const Scales scales{q.absmax,        q.absmax_codes,  q.nested_map,
                                q.nested_absmax, q.nested_offset, nf4::log2_of(q.nested_blocksize)};
            const Weight w{q.codes, scales, q.quant_type, nf4::log2_of(q.blocksize), q.first_row * q.cols, q.cols};
            T* out = static_cast<T*>(q.out);
            // With whole packs in a row, packs also lie in one block and in one 4-byte word.
            const bool vectors = allows_vectors(out, q.ldo, q.cols, 8) && reinterpret_cast<uintptr_t>(q.codes) % 4 == 0;
            if (!vectors || q.rows * (q.cols / 8) > LARGEST_GRID - 2 * BLOCK * PACKS) {
                const int error = for_each_pack<1>(q.rows, q.cols, Single<T>{w, out, q.ldo}, stream);
                if (error != cudaSuccess) return error;
                continue;
            }
            const uint32_t packs = static_cast<uint32_t>(q.rows * (q.cols / 8));
            members.m[used++] = {w, out, q.ldo, packs, static_cast<uint32_t>(blocks),
                                 Divisor(static_cast<uint32_t>(q.cols / 8))};
            blocks += divide_up(packs, BLOCK * PACKS);
        }
        if (used == 0) return static_cast<int>(cudaSuccess);
        for (int j = used; j < MEMBERS; j++) members.m[j].start = static_cast<uint32_t>(blocks);
        const auto kernel = used == 1 ? vector_kernel<T, BLOCK, PACKS, true> : vector_kernel<T, BLOCK, PACKS, false>;
        return launch_early(kernel, static_cast<unsigned>(blocks), BLOCK, early != 0, stream, members);
    });
}

extern "C" int qlora_dequantize_4bit(int out_dtype, const uint8_t* codes, const float* absmax,
                                     const uint8_t* absmax_codes, const float* nested_map, const float* nested_absmax,
                                     float nested_offset, int quant_type, int64_t blocksize, int64_t nested_blocksize,
                                     void* out, int64_t ldo, int64_t first_row, int64_t rows, int64_t cols, int early,
                                     cudaStream_t stream) {
    const QloraDequantize4bit weight{codes,     absmax,           absmax_codes, nested_map, nested_absmax, out,
                                     blocksize, nested_blocksize, ldo,          first_row,  rows,          cols,
                                     nested_offset, quant_type};
    return qlora_dequantize_4bit_group(out_dtype, &weight, 1, early, stream);
}
