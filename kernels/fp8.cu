// A matrix in 8 bits (e4m3) for products on fp8 tensor cores, with one scale a row of the product's reduction:
//
//     fp8_rows     scale[r] = max_c |x[r, c]| / 448        out[r, c] = e4m3(x[r, c] * (448 / max_c |x[r, c]|))
//     fp8_columns  scale[c] = max_r |x[r, c]| / 448        out[c, r] = e4m3(x[r, c] * (448 / max_r |x[r, c]|))
//
// x: [rows, cols], f32, bf16 or f16; out: bytes, gapless ([rows, cols], and transposed [cols, rows]); scale: f32 (fp8.cuh). Values
// round to the nearest, ties to even. A row (column) of zeros has scale 0; one with a NaN or an infinity
// becomes NaN as a whole, so that the product shows it.
//
// Floor: memory, 2 bytes read and 1 written an element of bf16. Rows are held in registers between the maximum and the rounding;
// the transposed copy reads twice (it is made once for weights that are kept) and goes through tiles in shared memory.

#include "dependent.cuh"
#include "fp8.cuh"

namespace {

using fp8::larger;

constexpr int MOST_THREADS = 512;

template <int N> __device__ __forceinline__ float largest_of(const float (&x)[N]) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) most = larger(most, fabsf(x[i]));
    return most;
}

template <int N> __device__ __forceinline__ void store_e4m3(uint8_t* out, const float (&x)[N], float factor) {
    Pack<uint16_t, N / 2> packed;
#pragma unroll
    for (int i = 0; i < N; i += 2) packed.v[i / 2] = fp8::two(x[i] * factor, x[i + 1] * factor);
    *reinterpret_cast<Pack<uint16_t, N / 2>*>(out) = packed;
}

// A block a row. PACKS accesses a thread hold it; PACKS = 0: any width, read twice.
template <typename T, int N, int PACKS>
__global__ void __launch_bounds__(MOST_THREADS)
    rows_kernel(const T* x, int64_t ldx, uint8_t* out, float* scale, int64_t cols) {
    let_next_begin();
    wait_for_previous();
    const int64_t row = blockIdx.x;
    x += row * ldx;
    out += row * cols;
    const int64_t first = static_cast<int64_t>(threadIdx.x) * N, step = static_cast<int64_t>(blockDim.x) * N;
    Pack<T, N> kept[PACKS > 0 ? PACKS : 1];
    float absmax = 0.0f, values[N];
    if constexpr (PACKS > 0) {
#pragma unroll
        for (int k = 0; k < PACKS; k++)
            if (first + k * step < cols) kept[k] = load_pack<T, N>(x + first + k * step);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            if (first + k * step >= cols) continue;
            unpack(kept[k], values);
            absmax = larger(absmax, largest_of(values));
        }
    } else {
        for (int64_t c = first; c < cols; c += step) {
            unpack(load_pack<T, N>(x + c), values);
            absmax = larger(absmax, largest_of(values));
        }
    }
    absmax = fp8::largest_of_block<MOST_THREADS>(absmax);
    const float factor = fp8::factor_of(absmax);
    if (threadIdx.x == 0) scale[row] = fp8::scale_of(absmax);
    if constexpr (PACKS > 0) {
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            if (first + k * step >= cols) continue;
            unpack(kept[k], values);
            store_e4m3(out + first + k * step, values, factor);
        }
    } else {
        for (int64_t c = first; c < cols; c += step) {
            unpack(load_pack<T, N>(x + c), values);
            store_e4m3(out + c, values, factor);
        }
    }
}

// Columns' largest magnitudes, as bits; `absmax` holds zeros. A block takes 256 columns of BAND rows.
constexpr int BAND = 64;

template <typename T>
__global__ void __launch_bounds__(256) largest_kernel(const T* x, int64_t ldx, uint32_t* absmax, int64_t rows,
                                                      int64_t cols) {
    const int64_t c = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, r0 = static_cast<int64_t>(blockIdx.y) * BAND;
    if (c >= cols) return;
    float most = 0.0f;
    for (int64_t r = r0; r < rows && r < r0 + BAND; r++) most = larger(most, fabsf(to_float(x[r * ldx + c])));
    // The order of maxima does not matter.
    atomicMax(absmax + c, __float_as_uint(most));
}

// Tiles of 64 x 64, transposed in shared memory. `absmax` are the columns' largest magnitudes.
constexpr int TILE = 64;

template <typename T>
__global__ void __launch_bounds__(256)
    columns_kernel(const T* x, int64_t ldx, const float* absmax, uint8_t* out, float* scale, int64_t rows, int64_t cols) {
    // A row of 68 bytes: neighbouring rows of the transposed tile start in different banks.
    __shared__ uint8_t tile[TILE][TILE + 4];
    const int64_t c0 = static_cast<int64_t>(blockIdx.x) * TILE, r0 = static_cast<int64_t>(blockIdx.y) * TILE;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int half = 0; half < 2; half++) {
        const int c = half * 32 + lane;
        if (c0 + c >= cols) continue;
        const float most = absmax[c0 + c], factor = fp8::factor_of(most);
        if (r0 == 0 && warp == 0) scale[c0 + c] = fp8::scale_of(most);
        for (int r = warp; r < TILE && r0 + r < rows; r += 8) {
            const float value = to_float(x[(r0 + r) * ldx + c0 + c]) * factor;
            tile[c][r] = static_cast<uint8_t>(__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3));
        }
    }
    __syncthreads();
    // Four bytes a thread; rows is a multiple of 16.
    for (int i = threadIdx.x; i < TILE * TILE / 4; i += 256) {
        const int c = i / (TILE / 4), r = i % (TILE / 4) * 4;
        if (c0 + c < cols && r0 + r < rows)
            *reinterpret_cast<uint32_t*>(out + (c0 + c) * rows + r0 + r) = *reinterpret_cast<uint32_t*>(&tile[c][r]);
    }
}

}  // namespace

// cols is a multiple of 16, x and its rows are aligned to 16 bytes.
extern "C" int qlora_fp8_rows(int dtype, const void* x, int64_t ldx, uint8_t* out, float* scale, int64_t rows, int64_t cols,
                              int early, cudaStream_t stream) {
    if (rows <= 0 || cols <= 0) return static_cast<int>(cudaSuccess);
    if (rows > LARGEST_GRID || cols % 16 != 0) return static_cast<int>(cudaErrorInvalidValue);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = VECTOR<T>;
        const T* xt = static_cast<const T*>(x);
        if (!allows_vectors(xt, ldx, cols, N)) return static_cast<int>(cudaErrorInvalidValue);
        const int64_t packs = cols / N;
        const auto launch = [&](auto kernel, int64_t threads) {
            const unsigned block = static_cast<unsigned>(divide_up(threads, 32) * 32);
            return launch_early(kernel, dim3(static_cast<unsigned>(rows)), dim3(block), early != 0, stream, xt, ldx, out,
                                scale, cols);
        };
        // Four loads in flight a thread, more only where there are no more threads: measured on an H200 at 4,096 to 28,672
        // columns of bf16, 88 to 100% of a copy's rate.
        if (packs <= 4 * MOST_THREADS) return launch(rows_kernel<T, N, 4>, divide_up(packs, 4));
        if (packs <= 6 * MOST_THREADS) return launch(rows_kernel<T, N, 6>, divide_up(packs, 6));
        if (packs <= 7 * MOST_THREADS) return launch(rows_kernel<T, N, 7>, divide_up(packs, 7));
        if (packs <= 8 * MOST_THREADS) return launch(rows_kernel<T, N, 8>, divide_up(packs, 8));
        return launch(rows_kernel<T, N, 0>, MOST_THREADS);
    });
}

// `absmax`: scratch memory for cols floats. rows is a multiple of 16.
extern "C" int qlora_fp8_columns(int dtype, const void* x, int64_t ldx, float* absmax, uint8_t* out, float* scale,
                                 int64_t rows, int64_t cols, cudaStream_t stream) {
    if (rows <= 0 || cols <= 0) return static_cast<int>(cudaSuccess);
    if (rows % 16 != 0 || divide_up(rows, BAND) > 65535) return static_cast<int>(cudaErrorInvalidValue);
    const cudaError_t cleared = cudaMemsetAsync(absmax, 0, cols * sizeof(float), stream);
    if (cleared != cudaSuccess) return static_cast<int>(cleared);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* xt = static_cast<const T*>(x);
        const dim3 bands(static_cast<unsigned>(divide_up(cols, 256)), static_cast<unsigned>(divide_up(rows, BAND)));
        largest_kernel<T><<<bands, 256, 0, stream>>>(xt, ldx, reinterpret_cast<uint32_t*>(absmax), rows, cols);
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) return static_cast<int>(error);
        const dim3 tiles(static_cast<unsigned>(divide_up(cols, TILE)), static_cast<unsigned>(divide_up(rows, TILE)));
        columns_kernel<T><<<tiles, 256, 0, stream>>>(xt, ldx, absmax, out, scale, rows, cols);
        return static_cast<int>(cudaGetLastError());
    });
}
