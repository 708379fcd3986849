// Different adapters for different rows of one batch (ops/adapter_rows.rs). A span is some neighbouring rows with one
// adapter; a group is up to three layers that share their input, with outputs side by side in y. `shrink`, for a few
// rows a span, and `finish`, for any number:
//
//     S[m, r0 + c] = sum_k x[m, k] A[c, k]
//     y[m, j]      = residual[m, j] + gain[j] * (y[m, j] + scale * sum_c S[m, r0 + c] B[j, c]) + bias[j]
//
// y holds the base's product before. x: [rows, k]; S: f32 [rows, columns]; A: f32 [rank, k]; B: f32 [cols, rank]; gain,
// bias: f32 [cols]; residual: like y. Each but x, y and S is optional. Columns of S that a span does not have are not
// written and not read. Arithmetic is f32, sums have a fixed order.
//
// Trick: all spans run in one launch, since a step of generation with ten adapters would otherwise be some thousand
// launches; launched early (dependent.cuh), blocks have their part of A or B, which nothing writes, when their input is
// there. Floor: memory for many rows (y once, read and written), latency for a few.

#include "few_tokens.cuh"

extern "C" {
// The change that an adapter makes to one layer.
typedef struct {
    const float *a, *b;        // NULL: no low-rank part
    const float *gain, *bias;  // NULL: none
    float scale;
    int32_t rank, r0;          // its columns of S
    int32_t pad;
} QloraRowsChange;

typedef struct {
    QloraRowsChange m[3];
    int64_t row0, rows;
    int32_t columns, pad;      // ranks of all layers together
} QloraRowsSpan;

typedef struct {
    QloraRowsSpan s[16];
    int32_t count;
    int32_t layers;
    int64_t cols[3];           // outputs of the layers
} QloraRowsSpans;
}

namespace {

constexpr int MOST_SPANS = 16;

__device__ __forceinline__ int64_t tiles_of(int64_t cols, int columns) { return (cols + columns - 1) / columns; }

// A block: one column of S, TOKENS rows of one span. PACKS of N elements of A are loaded ahead.
constexpr int TOKENS = 4, THREADS = 256, PACKS = 2;

template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    shrink_kernel(const __grid_constant__ QloraRowsSpans spans, const T* __restrict__ x, int64_t ldx, float* s,
                  int64_t lds, int64_t k) {
    __shared__ float parts[TOKENS][THREADS / 32];
    const QloraRowsSpan& span = spans.s[blockIdx.z];
    const int column = blockIdx.x;
    const int64_t token0 = static_cast<int64_t>(blockIdx.y) * TOKENS;
    const float* a = nullptr;
    if (token0 < span.rows) {
#pragma unroll
        for (int j = 0; j < 3; j++) {
            const int c = column - span.m[j].r0;
            if (j < spans.layers && span.m[j].a && c >= 0 && c < span.m[j].rank) a = span.m[j].a + c * k;
        }
    }
    let_next_begin();
    float ahead[PACKS][N];
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int64_t at = (static_cast<int64_t>(p) * THREADS + threadIdx.x) * N;
        if (a && at < k) load_floats(a + at, ahead[p]);
    }
    wait_for_previous();
    if (!a) return;
    const int tokens = static_cast<int>(span.rows - token0 < TOKENS ? span.rows - token0 : TOKENS);
    const T* row = x + (span.row0 + token0) * ldx;
    float sum[TOKENS] = {};
    const auto add = [&](int64_t at, const float(&av)[N]) {
#pragma unroll
        for (int m = 0; m < TOKENS; m++) {
            if (m >= tokens) break;
            float xv[N];
            load_floats(row + m * ldx + at, xv);
#pragma unroll
            for (int i = 0; i < N; i++) sum[m] = fmaf(xv[i], av[i], sum[m]);
        }
    };
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int64_t at = (static_cast<int64_t>(p) * THREADS + threadIdx.x) * N;
        if (at < k) add(at, ahead[p]);
    }
    for (int64_t at = (static_cast<int64_t>(PACKS) * THREADS + threadIdx.x) * N; at < k; at += THREADS * N) {
        float av[N];
        load_floats(a + at, av);
        add(at, av);
    }
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum[m] += __shfl_xor_sync(~0u, sum[m], step);
        if (threadIdx.x % 32 == 0) parts[m][threadIdx.x / 32] = sum[m];
    }
    __syncthreads();
    if (threadIdx.x < tokens) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) total += parts[threadIdx.x][w];
        s[(span.row0 + token0 + threadIdx.x) * lds + column] = total;
    }
}

// A block: COLUMNS outputs of one layer, ROWS rows of one span; a thread has one column and every LANES-th row. B and S
// come through shared memory, RANKS of them at a time.
constexpr int COLUMNS = 64, LANES = 4, ROWS = 16, RANKS = 32;

template <typename T>
__global__ void __launch_bounds__(COLUMNS * LANES, 3)
    finish_kernel(const __grid_constant__ QloraRowsSpans spans, const float* __restrict__ s, int64_t lds,
                  const T* residual, int64_t ldr, T* y, int64_t ldy) {
    __shared__ float b_tile[COLUMNS][RANKS + 1], s_tile[ROWS][RANKS];
    const QloraRowsSpan& span = spans.s[blockIdx.z];
    const int64_t token0 = static_cast<int64_t>(blockIdx.y) * ROWS;
    int layer = 0;
    int64_t tile = blockIdx.x, col0 = 0;
    while (layer < spans.layers - 1 && tile >= tiles_of(spans.cols[layer], COLUMNS)) {
        tile -= tiles_of(spans.cols[layer], COLUMNS);
        col0 += spans.cols[layer];
        layer++;
    }
    const QloraRowsChange& change = span.m[layer];
    const int rank = change.b ? change.rank : 0;
    const bool nothing = token0 >= span.rows || (rank == 0 && !change.gain && !change.bias && !residual);
    const int64_t cols = spans.cols[layer], first = tile * COLUMNS;
    const int column = threadIdx.x % COLUMNS, lane = threadIdx.x / COLUMNS;
    const auto load_b = [&](int r) {
        for (int i = threadIdx.x; i < COLUMNS * RANKS; i += COLUMNS * LANES) {
            const int j = i / RANKS, c = i % RANKS;
            const bool there = r + c < rank && first + j < cols;
            b_tile[j][c] = there ? change.b[(first + j) * rank + r + c] : 0.0f;
        }
    };
    let_next_begin();
    if (!nothing && rank > 0) load_b(0);
    wait_for_previous();
    if (nothing) return;
    const bool inside = first + column < cols;
    const int64_t at = col0 + first + column;
    float before[ROWS / LANES], added[ROWS / LANES];
#pragma unroll
    for (int i = 0; i < ROWS / LANES; i++) {
        const int64_t token = token0 + lane + i * LANES, row = span.row0 + token;
        const bool there = inside && token < span.rows;
        before[i] = there ? to_float(y[row * ldy + at]) : 0.0f;
        added[i] = there && residual ? to_float(residual[row * ldr + at]) : 0.0f;
    }
    float sum[ROWS / LANES] = {};
    for (int r = 0; r < rank; r += RANKS) {
        const int n = rank - r < RANKS ? rank - r : RANKS;
        if (r > 0) load_b(r);
        for (int i = threadIdx.x; i < ROWS * RANKS; i += COLUMNS * LANES) {
            const int m = i / RANKS, c = i % RANKS;
            const bool there = c < n && token0 + m < span.rows;
            s_tile[m][c] = there ? s[(span.row0 + token0 + m) * lds + change.r0 + r + c] : 0.0f;
        }
        __syncthreads();
        for (int c = 0; c < n; c++) {
            const float b = b_tile[column][c];
#pragma unroll
            for (int i = 0; i < ROWS / LANES; i++) sum[i] = fmaf(s_tile[lane + i * LANES][c], b, sum[i]);
        }
        __syncthreads();
    }
    if (!inside) return;
    const float gain = change.gain ? change.gain[first + column] : 1.0f;
    const float bias = change.bias ? change.bias[first + column] : 0.0f;
#pragma unroll
    for (int i = 0; i < ROWS / LANES; i++) {
        const int64_t token = token0 + lane + i * LANES;
        if (token >= span.rows) break;
        const float value = gain * (before[i] + change.scale * sum[i]) + bias + added[i];
        y[(span.row0 + token) * ldy + at] = from_float<T>(value);
    }
}

// Whether the launches can take a table; `most`: the rows of its largest span.
bool fits(const QloraRowsSpans& spans, int64_t* most) {
    if (spans.count < 0 || spans.count > MOST_SPANS || spans.layers < 1 || spans.layers > 3) return false;
    *most = 0;
    for (int i = 0; i < spans.count; i++) {
        const QloraRowsSpan& span = spans.s[i];
        if (span.row0 < 0 || span.rows < 0 || span.columns < 0) return false;
        if (span.rows > *most) *most = span.rows;
        for (int j = 0; j < spans.layers; j++) {
            const QloraRowsChange& m = span.m[j];
            if (m.rank < 0 || m.r0 < 0 || m.r0 + m.rank > span.columns || !m.a != !m.b) return false;
        }
    }
    for (int j = 0; j < spans.layers; j++) {
        if (spans.cols[j] < 0) return false;
    }
    return true;
}

}  // namespace

// `early`: nothing that is still to end writes A or B; the launch may then begin before its predecessor has ended.
extern "C" int qlora_rows_shrink(int dtype, const QloraRowsSpans* spans, const void* x, int64_t ldx, float* s,
                                 int64_t lds, int64_t k, int early, cudaStream_t stream) {
    int64_t most = 0;
    if (!fits(*spans, &most) || k <= 0) return static_cast<int>(cudaErrorInvalidValue);
    int columns = 0;
    bool aligned = true;
    for (int i = 0; i < spans->count; i++) {
        if (spans->s[i].columns > columns) columns = spans->s[i].columns;
        if (spans->s[i].columns > lds) return static_cast<int>(cudaErrorInvalidValue);
        for (int j = 0; j < spans->layers; j++) aligned = aligned && allows_vectors(spans->s[i].m[j].a, k, k, 8);
    }
    if (most == 0 || columns == 0) return static_cast<int>(cudaSuccess);
    if (divide_up(most, TOKENS) > 65535) return static_cast<int>(cudaErrorInvalidValue);
    const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(divide_up(most, TOKENS)), spans->count);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* xt = static_cast<const T*>(x);
        const auto kernel = aligned && allows_vectors(xt, ldx, k, 8) ? shrink_kernel<T, 8> : shrink_kernel<T, 1>;
        return few::launch(kernel, grid, dim3(THREADS), 0, early, stream, *spans, xt, ldx, s, lds, k);
    });
}

extern "C" int qlora_rows_finish(int dtype, const QloraRowsSpans* spans, const float* s, int64_t lds,
                                 const void* residual, int64_t ldr, void* y, int64_t ldy, int early,
                                 cudaStream_t stream) {
    int64_t most = 0, tiles = 0;
    if (!fits(*spans, &most)) return static_cast<int>(cudaErrorInvalidValue);
    for (int i = 0; i < spans->count; i++) {
        if (spans->s[i].columns > 0 && (!s || spans->s[i].columns > lds)) return static_cast<int>(cudaErrorInvalidValue);
    }
    for (int j = 0; j < spans->layers; j++) tiles += divide_up(spans->cols[j], COLUMNS);
    if (most == 0 || tiles == 0) return static_cast<int>(cudaSuccess);
    if (divide_up(most, ROWS) > 65535 || tiles > LARGEST_GRID) return static_cast<int>(cudaErrorInvalidValue);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(divide_up(most, ROWS)), spans->count);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        return few::launch(finish_kernel<T>, grid, dim3(COLUMNS * LANES), 0, early, stream, *spans, s, lds,
                           static_cast<const T*>(residual), ldr, static_cast<T*>(y), ldy);
    });
}
