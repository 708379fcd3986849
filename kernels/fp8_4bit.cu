// 4-bit weights (nf4.cuh) straight to 8 bits (e4m3), in the two orientations of fp8 products (fp8.cu says which scales):
//
//     rows     most[r] = the largest absmax of row r's blocks              out[r, c] = e4m3(w[r, c] * (448 / most[r]))
//     columns  most[b] = the largest absmax of the blocks in column b      out[c, r] = e4m3(w[r, c] * (448 / most[c / blocksize]))
//
// No value of a block exceeds its absmax, and its largest one is nearly always just that, so nothing has to be decoded to
// find a scale: the largest of 64 values for a row is exact, that of a column is one for the blocksize columns of a block.
// Blocks must not cross rows: cols is a multiple of the blocksize, and rows a multiple of 16.
//
// Floor: memory, 1.5 bytes a weight, against 2.5 for a weight in bf16, which a product then reads as 2 bytes instead of 1. The
// transposed copy goes through tiles of 64 columns by 128 rows in shared memory: a thread decodes 8 columns of 4 rows, whose
// bytes are one word of each column.

#include "dependent.cuh"
#include "fp8.cuh"
#include "nf4.cuh"

// A weight [rows, cols].
struct QloraBits4 {
    const uint8_t* codes;
    const float* absmax;   // plain f32, or NULL: doubly quantized, which the next three and the offset say
    const uint8_t* absmax_codes;
    const float* nested_map;
    const float* nested_absmax;
    int64_t blocksize, nested_blocksize, rows, cols;
    float nested_offset;
    int quant_type;
};

namespace {

struct Weight {
    const uint8_t* codes;
    nf4::Scales scales;
    int quant_type;
    int block_shift;      // log2 of the blocksize
    int64_t rows, cols;
    int64_t row_blocks;   // blocks of a row
};

constexpr int ROWS_A_BLOCK = 4;

// A warp a row; 16 values a lane at a time, FLIGHT of them in flight.
template <int FLIGHT>
__global__ void __launch_bounds__(32 * ROWS_A_BLOCK) rows_kernel(Weight w, uint8_t* out, float* scale) {
    __shared__ float table[16];
    let_next_begin();
    if (threadIdx.x < 16) table[threadIdx.x] = nf4::TABLES[w.quant_type][threadIdx.x];
    __syncthreads();
    const int lane = threadIdx.x % 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS_A_BLOCK + threadIdx.x / 32, first = row * w.row_blocks;
    // Codes and scales are settled; the output may be read by the launch before this one.
    float most = 0.0f;
    if (row < w.rows)
        for (int64_t b = lane; b < w.row_blocks; b += 32) most = fp8::larger(most, fabsf(w.scales(first + b)));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = fp8::larger(most, __shfl_xor_sync(~0u, most, step));
    wait_for_previous();
    if (row >= w.rows) return;
    const float factor = fp8::factor_of(most);
    if (lane == 0) scale[row] = fp8::scale_of(most);
    const uint2* codes = reinterpret_cast<const uint2*>(w.codes + row * w.cols / 2);
    const int64_t packs = w.cols / 16;
    for (int64_t start = lane; start < packs; start += 32 * FLIGHT) {
        uint2 word[FLIGHT];
        float s[FLIGHT];
#pragma unroll
        for (int k = 0; k < FLIGHT; k++) {
            // Lanes behind the end repeat the last pack.
            const int64_t pack = start + 32 * k < packs ? start + 32 * k : packs - 1;
            word[k] = __ldcs(codes + pack);
            s[k] = w.scales(first + (pack * 16 >> w.block_shift)) * factor;
        }
#pragma unroll
        for (int k = 0; k < FLIGHT; k++) {
            if (start + 32 * k >= packs) break;
            Pack<uint16_t, 8> packed;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                // Byte i, upper nibble first.
                const uint32_t byte = (i < 4 ? word[k].x : word[k].y) >> (8 * (i % 4));
                packed.v[i] = fp8::two(table[byte >> 4 & 15] * s[k], table[byte & 15] * s[k]);
            }
            *reinterpret_cast<Pack<uint16_t, 8>*>(out + row * w.cols + (start + 32 * k) * 16) = packed;
        }
    }
}

constexpr int BAND = 128;

// `most`, as bits; zeros before.
__global__ void __launch_bounds__(256) most_kernel(Weight w, uint32_t* most) {
    const int64_t b = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, r0 = static_cast<int64_t>(blockIdx.y) * BAND;
    if (b >= w.row_blocks) return;
    float found = 0.0f;
    for (int64_t r = r0; r < w.rows && r < r0 + BAND; r++) found = fp8::larger(found, fabsf(w.scales(r * w.row_blocks + b)));
    // The order of maxima does not matter.
    atomicMax(most + b, __float_as_uint(found));
}

constexpr int COLS = 64, ROWS = 128;

// The columns' largest magnitudes, of up to three weights that are multiplied together.
struct Most {
    const float* of[3];

    __device__ __forceinline__ float operator()(int64_t block) const {
        float most = __ldg(of[0] + block);
        if (of[1]) most = fp8::larger(most, __ldg(of[1] + block));
        if (of[2]) most = fp8::larger(most, __ldg(of[2] + block));
        return most;
    }
};

__global__ void __launch_bounds__(256) columns_kernel(Weight w, Most most, uint8_t* out, int64_t ldo, float* scale) {
    // A word of padding: neighbouring columns start in different banks.
    __shared__ uint32_t tile[COLS][ROWS / 4 + 1];
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = nf4::TABLES[w.quant_type][threadIdx.x];
    __syncthreads();
    const int64_t c0 = static_cast<int64_t>(blockIdx.x) * COLS, r0 = static_cast<int64_t>(blockIdx.y) * ROWS;
    const int eighth = threadIdx.x % 8, quad = threadIdx.x / 8;   // 8 columns, 4 rows
    const int64_t c = c0 + eighth * 8, r = r0 + quad * 4;
    if (c < w.cols && r < w.rows) {
        const int64_t block = c >> w.block_shift;
        const float largest = most(block), factor = fp8::factor_of(largest);
        if (r == 0)
            for (int i = 0; i < 8; i++) scale[c + i] = fp8::scale_of(largest);
        uint32_t codes[4];
        float s[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            codes[k] = __ldg(reinterpret_cast<const uint32_t*>(w.codes + ((r + k) * w.cols + c) / 2));
            s[k] = w.scales((r + k) * w.row_blocks + block) * factor;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int shift = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);
            const uint32_t low = fp8::two(table[codes[0] >> shift & 15] * s[0], table[codes[1] >> shift & 15] * s[1]);
            const uint32_t high = fp8::two(table[codes[2] >> shift & 15] * s[2], table[codes[3] >> shift & 15] * s[3]);
            tile[eighth * 8 + i][quad] = low | high << 16;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COLS * ROWS / 4; i += 256) {
        const int column = i / (ROWS / 4), word = i % (ROWS / 4);
        if (c0 + column < w.cols && r0 + word * 4 < w.rows)
            *reinterpret_cast<uint32_t*>(out + (c0 + column) * ldo + r0 + word * 4) = tile[column][word];
    }
}

bool made(const QloraBits4& q, Weight& w) {
    if (q.rows < 0 || q.rows % 16 != 0 || q.rows > LARGEST_GRID || q.quant_type < 0 || q.quant_type > 1) return false;
    if (!nf4::is_blocksize(q.blocksize) || q.cols < 0 || q.cols % q.blocksize != 0) return false;
    if (!q.absmax && !nf4::is_power_of_two(q.nested_blocksize)) return false;
    if (reinterpret_cast<uintptr_t>(q.codes) % 8 != 0 || divide_up(q.rows, ROWS) > 65535) return false;
    w = {q.codes,
         {q.absmax, q.absmax_codes, q.nested_map, q.nested_absmax, q.nested_offset, nf4::log2_of(q.nested_blocksize)},
         q.quant_type,
         nf4::log2_of(q.blocksize),
         q.rows,
         q.cols,
         q.cols / q.blocksize};
    return true;
}

}  // namespace

// `out`: rows * cols bytes, gapless.
extern "C" int qlora_fp8_4bit_rows(const QloraBits4* weight, uint8_t* out, float* scale, int early, cudaStream_t stream) {
    Weight w;
    if (!made(*weight, w)) return static_cast<int>(cudaErrorInvalidValue);
    if (w.rows == 0 || w.cols == 0) return static_cast<int>(cudaSuccess);
    const dim3 blocks(static_cast<unsigned>(divide_up(w.rows, ROWS_A_BLOCK))), threads(32 * ROWS_A_BLOCK);
    return launch_early(rows_kernel<4>, blocks, threads, early != 0, stream, w, out, scale);
}

// The largest magnitudes of the columns' blocks: cols / blocksize floats, which are zeros before.
extern "C" int qlora_fp8_4bit_most(const QloraBits4* weight, float* most, cudaStream_t stream) {
    Weight w;
    if (!made(*weight, w)) return static_cast<int>(cudaErrorInvalidValue);
    if (w.rows == 0 || w.cols == 0) return static_cast<int>(cudaSuccess);
    const dim3 bands(static_cast<unsigned>(divide_up(w.row_blocks, 256)), static_cast<unsigned>(divide_up(w.rows, BAND)));
    most_kernel<<<bands, 256, 0, stream>>>(w, reinterpret_cast<uint32_t*>(most));
    return static_cast<int>(cudaGetLastError());
}

// The weight transposed into `cols` rows of `out`, `ldo` bytes apart (a multiple of 4), and the scales of its columns. `most0` to
// `most2`: the largest magnitudes of all weights that share the scales; NULL where there are fewer.
extern "C" int qlora_fp8_4bit_columns(const QloraBits4* weight, const float* most0, const float* most1, const float* most2,
                                      uint8_t* out, int64_t ldo, float* scale, cudaStream_t stream) {
    Weight w;
    if (!made(*weight, w) || ldo % 4 != 0 || !most0) return static_cast<int>(cudaErrorInvalidValue);
    if (w.rows == 0 || w.cols == 0) return static_cast<int>(cudaSuccess);
    const dim3 tiles(static_cast<unsigned>(divide_up(w.cols, COLS)), static_cast<unsigned>(divide_up(w.rows, ROWS)));
    columns_kernel<<<tiles, 256, 0, stream>>>(w, Most{{most0, most1, most2}}, out, ldo, scale);
    return static_cast<int>(cudaGetLastError());
}
