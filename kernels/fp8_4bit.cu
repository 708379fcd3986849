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

constexpr int ROW_THREADS = 128;

// A block of threads a row; 16 values a thread at a time.
__global__ void __launch_bounds__(ROW_THREADS) rows_kernel(Weight w, uint8_t* out, float* scale) {
    __shared__ float table[16];
    let_next_begin();
    if (threadIdx.x < 16) table[threadIdx.x] = nf4::TABLES[w.quant_type][threadIdx.x];
    wait_for_previous();
    const int64_t row = blockIdx.x, first = row * w.row_blocks;
    float most = 0.0f;
    for (int64_t b = threadIdx.x; b < w.row_blocks; b += ROW_THREADS) most = fp8::larger(most, fabsf(w.scales(first + b)));
    most = fp8::largest_of_block<ROW_THREADS>(most);
    const float factor = fp8::factor_of(most);
    if (threadIdx.x == 0) scale[row] = fp8::scale_of(most);
    const uint2* codes = reinterpret_cast<const uint2*>(w.codes + row * w.cols / 2);
    for (int64_t pack = threadIdx.x; pack < w.cols / 16; pack += ROW_THREADS) {
        const float s = w.scales(first + (pack * 16 >> w.block_shift)) * factor;
        const uint2 both = __ldcs(codes + pack);
        Pack<uint16_t, 8> packed;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            // Byte i, upper nibble first.
            const uint32_t byte = (i < 4 ? both.x : both.y) >> (8 * (i % 4));
            packed.v[i] = fp8::two(table[byte >> 4 & 15] * s, table[byte & 15] * s);
        }
        *reinterpret_cast<Pack<uint16_t, 8>*>(out + row * w.cols + pack * 16) = packed;
    }
}

constexpr int BAND = 128;

// `most`, as bits: zeros, or what other weights with the same columns left there.
__global__ void __launch_bounds__(256) most_kernel(Weight w, uint32_t* most) {
    const int64_t b = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, r0 = static_cast<int64_t>(blockIdx.y) * BAND;
    if (b >= w.row_blocks) return;
    float found = 0.0f;
    for (int64_t r = r0; r < w.rows && r < r0 + BAND; r++) found = fp8::larger(found, fabsf(w.scales(r * w.row_blocks + b)));
    // The order of maxima does not matter.
    atomicMax(most + b, __float_as_uint(found));
}

constexpr int COLS = 64, ROWS = 128;

__global__ void __launch_bounds__(256)
    columns_kernel(Weight w, const float* most, uint8_t* out, int64_t ldo, float* scale) {
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
        const float largest = most[block], factor = fp8::factor_of(largest);
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
    const dim3 blocks(static_cast<unsigned>(w.rows)), threads(ROW_THREADS);
    return launch_early(rows_kernel, blocks, threads, early != 0, stream, w, out, scale);
}

// The largest magnitudes of the columns' blocks, cols / blocksize floats, joined to what is there.
extern "C" int qlora_fp8_4bit_most(const QloraBits4* weight, float* most, cudaStream_t stream) {
    Weight w;
    if (!made(*weight, w)) return static_cast<int>(cudaErrorInvalidValue);
    if (w.rows == 0 || w.cols == 0) return static_cast<int>(cudaSuccess);
    const dim3 bands(static_cast<unsigned>(divide_up(w.row_blocks, 256)), static_cast<unsigned>(divide_up(w.rows, BAND)));
    most_kernel<<<bands, 256, 0, stream>>>(w, reinterpret_cast<uint32_t*>(most));
    return static_cast<int>(cudaGetLastError());
}

// The weight transposed into `cols` rows of `out`, `ldo` bytes apart (a multiple of 4), and the scales of its columns.
extern "C" int qlora_fp8_4bit_columns(const QloraBits4* weight, const float* most, uint8_t* out, int64_t ldo, float* scale,
                                      cudaStream_t stream) {
    Weight w;
    if (!made(*weight, w) || ldo % 4 != 0) return static_cast<int>(cudaErrorInvalidValue);
    if (w.rows == 0 || w.cols == 0) return static_cast<int>(cudaSuccess);
    const dim3 tiles(static_cast<unsigned>(divide_up(w.cols, COLS)), static_cast<unsigned>(divide_up(w.rows, ROWS)));
    columns_kernel<<<tiles, 256, 0, stream>>>(w, most, out, ldo, scale);
    return static_cast<int>(cudaGetLastError());
}
