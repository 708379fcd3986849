// Integer codes to a matrix: rows [first_row, first_row + rows) of a weight [.., cols] in one of the formats with a
// scale a group (GPTQ, AWQ, uniform INT4 and INT8, LLM.int8 with a group a row):
//
//     value = (code - zero[row, group]) * scale[row, group]           zero: optional
//
// The group of a column is col / group_size, or group_of[col] if there is such a list (GPTQ with act-order). `scale`
// and `zero` are f32 [.., groups]. Codes are row-major: bytes, or nibbles over the flattened weight, the even element
// in the upper one; unsigned, or signed (two's complement). Columns of `outlier_cols` (ascending, each once) are not
// taken from the codes but from `outliers` (bf16 [.., outlier_count]).
//
// The difference is rounded to f32 (exact if zero is an integer), then the product, then the value to the output's
// type.
//
// Floor: memory. A bf16 weight costs 2 + bits / 8 + 4 / group_size bytes per element (8 / group_size with zeros). As in
// dequantize_4bit.cu the stores are coalesced: a thread makes 8 elements beside its neighbour's. With lists of columns
// it takes those of ROWS rows, to read and search the lists once. A code becomes a float without a conversion
// instruction: its bits are or-ed into 2^23, which is subtracted together with the bias of signed codes. A launch
// begins before its predecessor has ended (dependent.cuh).

#include "common.cuh"
#include "dependent.cuh"

namespace {

struct Weight {
    const uint8_t* codes;
    const float *scale, *zero;
    int64_t groups;
    Divisor group_size;
    const uint16_t* group_of;
    const uint32_t* outlier_cols;
    const __nv_bfloat16* outliers;
    uint32_t outlier_count;
    uint32_t flip;      // makes signed codes unsigned: the sign bit of every code of a word
    float base;         // 2^23 + what `flip` has added
    int64_t first_row, cols;

    __device__ __forceinline__ uint32_t group(uint32_t col) const {
        return group_of ? __ldg(group_of + col) : group_size.quotient(col);
    }

    // The first outlier at or behind a column.
    __device__ __forceinline__ uint32_t outlier_from(uint32_t col) const {
        uint32_t low = 0, high = outlier_count;
        while (low < high) {
            const uint32_t middle = (low + high) / 2;
            if (__ldg(outlier_cols + middle) < col) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }

    // `code` is flipped.
    __device__ __forceinline__ float value(uint32_t code, float zero_of, float scale_of) const {
        const float integer = __fsub_rn(__uint_as_float(0x4b000000 | code), base);
        return __fmul_rn(__fsub_rn(integer, zero_of), scale_of);
    }
};

// 8 codes.
template <int BITS> using Words = Pack<uint32_t, BITS / 4>;

template <int BITS> __device__ __forceinline__ Words<BITS> load_codes(const uint8_t* p) {
    Words<BITS> words;
    if constexpr (BITS == 4) {
        words.v[0] = __ldcs(reinterpret_cast<const uint32_t*>(p));
    } else {
        const uint2 w = __ldcs(reinterpret_cast<const uint2*>(p));
        words.v[0] = w.x;
        words.v[1] = w.y;
    }
    return words;
}

template <int BITS> __device__ __forceinline__ uint32_t code_of(const Words<BITS>& words, int i) {
    if constexpr (BITS == 4) {
        // Byte i / 2, upper nibble first.
        return words.v[0] >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0)) & 15;
    } else {
        return words.v[i / 4] >> (8 * (i % 4)) & 255;
    }
}

// LISTED: a group a column, from the list; otherwise 8 columns share one.
template <typename T, int BITS, bool LISTED, bool OUTLIERS, int ROWS>
__global__ void __launch_bounds__(256) vector_kernel(Weight w, T* out, int64_t ldo, int64_t rows, Divisor chunks) {
    // Most loads may precede the wait; where a thread has many, holding them all would cost registers.
    constexpr bool LATE = !LISTED && !OUTLIERS;
    let_next_begin();
    if (!LATE) wait_for_previous();
    const uint32_t band = chunks.quotient(blockIdx.x);
    const uint32_t col = ((blockIdx.x - band * chunks.d) * blockDim.x + threadIdx.x) * 8;
    const int64_t first = static_cast<int64_t>(band) * (ROWS * blockDim.y) + threadIdx.y;
    if (col >= w.cols || first >= rows) return;

    constexpr int GROUPS = LISTED ? 8 : 1;
    Words<BITS> words[ROWS];
    float scale[ROWS][GROUPS], zero[ROWS][GROUPS];
    uint32_t group[GROUPS];
    if constexpr (LISTED) {
        const Pack<uint16_t, 8> list = load_pack<uint16_t, 8>(w.group_of + col);
#pragma unroll
        for (int i = 0; i < 8; i++) group[i] = list.v[i];
    } else {
        group[0] = w.group_size.quotient(col);
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        // Rows behind the end repeat the last one.
        const int64_t row = w.first_row + min(first + k * blockDim.y, rows - 1);
        words[k] = load_codes<BITS>(w.codes + (row * w.cols + col) / (8 / BITS));
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            scale[k][i] = __ldg(w.scale + row * w.groups + group[i]);
            zero[k][i] = w.zero ? __ldg(w.zero + row * w.groups + group[i]) : 0.0f;
        }
    }
    uint32_t outlier = 0, mask = 0;
    if constexpr (OUTLIERS) {
        outlier = w.outlier_from(col);
        for (uint32_t j = outlier; j < w.outlier_count; j++) {
            const uint32_t at = __ldg(w.outlier_cols + j) - col;
            if (at >= 8) break;
            mask |= 1u << at;
        }
    }
    if (LATE) wait_for_previous();
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        const int64_t row = first + k * blockDim.y;
        if (row >= rows) break;
#pragma unroll
        for (int j = 0; j < BITS / 4; j++) words[k].v[j] ^= w.flip;
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            values[i] = w.value(code_of<BITS>(words[k], i), zero[k][LISTED ? i : 0], scale[k][LISTED ? i : 0]);
        }
        if (OUTLIERS && mask != 0) {
            const __nv_bfloat16* from = w.outliers + (w.first_row + row) * w.outlier_count + outlier;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (mask >> i & 1) values[i] = to_float(from[__popc(mask & ((1u << i) - 1))]);
            }
        }
        store_floats(out + row * ldo + col, values);
    }
}

// Any shape, stride and alignment.
template <typename T, int BITS> struct Single {
    Weight w;
    T* out;
    int64_t ldo;

    __device__ void operator()(int64_t at, int64_t column) const {
        const int64_t row = w.first_row + at, i = row * w.cols + column;
        const uint32_t col = static_cast<uint32_t>(column);
        const uint32_t outlier = w.outlier_from(col);
        if (outlier < w.outlier_count && w.outlier_cols[outlier] == col) {
            out[at * ldo + column] = from_float<T>(to_float(w.outliers[row * w.outlier_count + outlier]));
            return;
        }
        const uint32_t byte = w.codes[BITS == 4 ? i / 2 : i];
        const uint32_t code = BITS == 8 ? byte : i % 2 == 0 ? byte >> 4 : byte & 15;
        const int64_t group = row * w.groups + w.group(col);
        const float zero = w.zero ? w.zero[group] : 0.0f;
        const float value = w.value((code ^ w.flip) & ((1u << BITS) - 1), zero, w.scale[group]);
        out[at * ldo + column] = from_float<T>(value);
    }
};

template <typename T, int BITS, bool LISTED, bool OUTLIERS>
int launch(const Weight& w, T* out, int64_t ldo, int64_t rows, bool early, cudaStream_t stream) {
    constexpr int ROWS = LISTED || OUTLIERS ? 2 : 1;
    const int64_t packs = w.cols / 8;
    // The widest block that leaves few threads without a column.
    unsigned x = 256;
    while (x > 32 && divide_up(packs, x) * x - packs > packs / 16) x /= 2;
    const dim3 block(x, 256 / x);
    const int64_t chunks = divide_up(packs, x), bands = divide_up(rows, ROWS * block.y);
    if (bands > LARGEST_GRID / chunks) return static_cast<int>(cudaErrorInvalidValue);
    const unsigned blocks = static_cast<unsigned>(chunks * bands);
    return launch_early(vector_kernel<T, BITS, LISTED, OUTLIERS, ROWS>, blocks, block, early, stream, w, out, ldo,
                        rows, Divisor(static_cast<uint32_t>(chunks)));
}

template <typename T, int BITS>
int dequantize(const Weight& w, int64_t group_size, T* out, int64_t ldo, int64_t rows, bool early,
               cudaStream_t stream) {
    const auto aligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
    const bool vectors = allows_vectors(out, ldo, w.cols, 8) && aligned(w.codes, BITS) &&
                         (w.group_of ? aligned(w.group_of, 16) : group_size % 8 == 0);
    if (!vectors) return for_each_pack<1>(rows, w.cols, Single<T, BITS>{w, out, ldo}, stream);
    if (w.outlier_count > 0) {
        return w.group_of ? launch<T, BITS, true, true>(w, out, ldo, rows, early, stream)
                          : launch<T, BITS, false, true>(w, out, ldo, rows, early, stream);
    }
    return w.group_of ? launch<T, BITS, true, false>(w, out, ldo, rows, early, stream)
                      : launch<T, BITS, false, false>(w, out, ldo, rows, early, stream);
}

}  // namespace

// Everything but the output has to be settled: between the kernel that wrote it and this launch lies a synchronization
// or an ordinary operation of the stream.
//
// bits: 4 or 8; zero, group_of: NULL if there is none; group_size: ignored with group_of; groups: of a row, the stride
// of scale and zero; outlier_count may be 0.
extern "C" int qlora_dequantize_int(int out_dtype, int bits, int is_signed, const uint8_t* codes, const float* scale,
                                    const float* zero, int64_t groups, int64_t group_size, const uint16_t* group_of,
                                    const uint32_t* outlier_cols, const void* outliers, int64_t outlier_count,
                                    void* out, int64_t ldo, int64_t first_row, int64_t rows, int64_t cols, int early,
                                    cudaStream_t stream) {
    if (rows <= 0 || cols <= 0) return static_cast<int>(cudaSuccess);
    const bool grouped = group_of || (group_size > 0 && groups >= divide_up(cols, group_size));
    if ((bits != 4 && bits != 8) || !grouped || groups <= 0 || cols > LARGEST_GRID || first_row < 0 ||
        outlier_count < 0 || outlier_count > cols) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    // Below 2^31 for the division; a group as wide as a row is one group.
    const int64_t size = group_of ? 1 : (group_size < cols ? group_size : cols);
    Weight w{};
    w.codes = codes;
    w.scale = scale;
    w.zero = zero;
    w.groups = groups;
    w.group_size = Divisor(static_cast<uint32_t>(size));
    w.group_of = group_of;
    w.outlier_cols = outlier_cols;
    w.outliers = static_cast<const __nv_bfloat16*>(outliers);
    w.outlier_count = static_cast<uint32_t>(outlier_count);
    w.flip = !is_signed ? 0 : bits == 4 ? 0x88888888u : 0x80808080u;
    w.base = 8388608.0f + (!is_signed ? 0.0f : bits == 4 ? 8.0f : 128.0f);
    w.first_row = first_row;
    w.cols = cols;
    return with_dtype(out_dtype, [&](auto type) {
        using T = decltype(type);
        T* o = static_cast<T*>(out);
        return bits == 4 ? dequantize<T, 4>(w, size, o, ldo, rows, early != 0, stream)
                         : dequantize<T, 8>(w, size, o, ldo, rows, early != 0, stream);
    });
}
