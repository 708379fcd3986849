// LoRA adapters beside a dequantized weight, so that the frozen and the low-rank part are one matrix product.
//
// A fused weight [n, k] (q|k|v, gate|up, or a single one) has up to three members, each with A [rank, k] and B [rows,
// rank] in the flat f32 buffer of all adapters. The augmented weight has rp more columns and rp more rows:
//
//     forward:   [x | S] [W | scale B]^T                 S = x A^T sits in the rp columns behind x
//     backward:  [dY | dS] [W ; A]                       dS = dY (scale B) sits in the rp columns behind dY
//
// `prepare` writes the extra columns and rows: w[i, k + c] = scale * B of the member that owns row i, at its column
// c - r0; w[n + c, j] = A[c - r0, j] of the member that owns c; zeros elsewhere. `columns` writes the extra columns alone,
// where the members' weights are never there together. `accumulate` adds the gradients of
// both to the flat gradient: dA [rp, k] as it is, dB [n, rp] = dY^T S times scale, the member's block of it.
//
// Floor: memory; some 100 KB to 2 MB a call.

#include "common.cuh"

extern "C" {
typedef struct {
    int64_t a, b;        // offsets of A [rank, k] and B [rows, rank] in the flat buffer
    int64_t row0, rows;  // the member's output rows in the fused weight
    int32_t rank, r0;    // its columns in the extra ones
    float scale;
    int32_t pad;
} QloraMember;

typedef struct {
    QloraMember m[3];
    int32_t count;
    int32_t pad;
} QloraMembers;
}

namespace {

template <typename T> struct Augmented {
    const float* flat;
    QloraMembers members;
    T* w;
    int64_t ldw, n, k;

    // Elements col.. of the extra columns of a row; the rows of A have zeros there.
    template <int N> __device__ void write_columns(int64_t row, int64_t col) const {
        float values[N];
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < 3; j++) {
            const QloraMember& m = members.m[j];
            if (j >= members.count || row < m.row0 || row >= m.row0 + m.rows) continue;
            const float* b = flat + m.b + (row - m.row0) * m.rank;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const int64_t c = col + i - m.r0;
                if (c >= 0 && c < m.rank) values[i] = m.scale * b[c];
            }
        }
        store_floats(w + row * ldw + k + col, values);
    }

    // Elements col.. of an extra row.
    template <int N, bool ALIGNED> __device__ void write_row(int64_t row, int64_t col) const {
        float values[N];
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < 3; j++) {
            const QloraMember& m = members.m[j];
            if (j >= members.count || row < m.r0 || row >= m.r0 + m.rank) continue;
            const float* a = flat + m.a + (row - m.r0) * k + col;
            if constexpr (ALIGNED) {
                load_floats(a, values);
            } else {
#pragma unroll
                for (int i = 0; i < N; i++) values[i] = a[i];
            }
        }
        store_floats(w + (n + row) * ldw + col, values);
    }
};

// One thread a pack of N: first those of the extra columns, then those of the extra rows.
template <typename T, int N, bool ALIGNED>
__global__ void __launch_bounds__(256)
    prepare_kernel(Augmented<T> f, uint32_t in_columns, Divisor column_packs, uint32_t in_all, Divisor row_packs) {
    const uint32_t i = blockIdx.x * 256 + threadIdx.x;
    if (i < in_columns) {
        const uint32_t row = column_packs.quotient(i);
        f.template write_columns<N>(row, static_cast<int64_t>(i - row * column_packs.d) * N);
    } else if (i < in_all) {
        const uint32_t row = row_packs.quotient(i - in_columns);
        f.template write_row<N, ALIGNED>(row, static_cast<int64_t>(i - in_columns - row * row_packs.d) * N);
    }
}

// Block column y: member y / 2, its A (even) or its B (odd).
__global__ void __launch_bounds__(256)
    accumulate_kernel(const float* da, const float* db, QloraMembers members, float* gradient, int64_t k, int64_t rp) {
    const QloraMember& m = members.m[blockIdx.y / 2];
    const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (blockIdx.y % 2 == 0) {
        if (i < m.rank * k) gradient[m.a + i] += da[m.r0 * k + i];
    } else if (i < m.rows * m.rank) {
        const int64_t row = i / m.rank;
        gradient[m.b + i] += m.scale * db[(m.row0 + row) * rp + m.r0 + (i - row * m.rank)];
    }
}

bool fits(const QloraMembers& members, int64_t n, int64_t k, int64_t rp) {
    if (members.count < 0 || members.count > 3 || n < 0 || k <= 0 || rp < 0) return false;
    for (int j = 0; j < members.count; j++) {
        const QloraMember& m = members.m[j];
        if (m.row0 < 0 || m.rows < 0 || m.row0 + m.rows > n) return false;
        if (m.r0 < 0 || m.rank < 0 || m.r0 + m.rank > rp) return false;
    }
    return true;
}

}  // namespace

extern "C" int qlora_lora_prepare(int dtype, const float* flat, QloraMembers members, void* w, int64_t ldw, int64_t n,
                                  int64_t k, int64_t rp, cudaStream_t stream) {
    if (!fits(members, n, k, rp)) return static_cast<int>(cudaErrorInvalidValue);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        T* out = static_cast<T*>(w);
        constexpr int N = VECTOR<T>;
        bool aligned = true;
        for (int j = 0; j < members.count; j++) aligned = aligned && allows_vectors(flat + members.m[j].a, k, k, 4);
        const auto launch = [&](auto size, auto is_aligned) {
            constexpr int M = size();
            const int64_t in_columns = (n + rp) * (rp / M), in_all = in_columns + rp * (k / M);
            if (in_all == 0) return static_cast<int>(cudaSuccess);
            if (in_all > LARGEST_GRID - 256) return static_cast<int>(cudaErrorInvalidValue);
            const Divisor column_packs(static_cast<uint32_t>(rp / M)), row_packs(static_cast<uint32_t>(k / M));
            prepare_kernel<T, M, is_aligned()><<<static_cast<unsigned>(divide_up(in_all, 256)), 256, 0, stream>>>(
                Augmented<T>{flat, members, out, ldw, n, k}, static_cast<uint32_t>(in_columns), column_packs,
                static_cast<uint32_t>(in_all), row_packs);
            return static_cast<int>(cudaGetLastError());
        };
        constexpr std::integral_constant<int, N> many{};
        if (!allows_vectors(out, ldw, k, N) || rp % N != 0) {
            return launch(std::integral_constant<int, 1>{}, std::false_type{});
        }
        return aligned ? launch(many, std::true_type{}) : launch(many, std::false_type{});
    });
}

// The extra columns alone, as a matrix [n, rp].
extern "C" int qlora_lora_columns(int dtype, const float* flat, QloraMembers members, void* b, int64_t ldb, int64_t n,
                                  int64_t rp, cudaStream_t stream) {
    if (!fits(members, n, 1, rp)) return static_cast<int>(cudaErrorInvalidValue);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        T* out = static_cast<T*>(b);
        constexpr int N = VECTOR<T>;
        const auto launch = [&](auto size) {
            constexpr int M = size();
            const int64_t packs = n * (rp / M);
            if (packs == 0) return static_cast<int>(cudaSuccess);
            if (packs > LARGEST_GRID - 256) return static_cast<int>(cudaErrorInvalidValue);
            const Divisor column_packs(static_cast<uint32_t>(rp / M));
            prepare_kernel<T, M, false><<<static_cast<unsigned>(divide_up(packs, 256)), 256, 0, stream>>>(
                Augmented<T>{flat, members, out, ldb, n, 0}, static_cast<uint32_t>(packs), column_packs,
                static_cast<uint32_t>(packs), Divisor(1));
            return static_cast<int>(cudaGetLastError());
        };
        const bool vectors = allows_vectors(out, ldb, 0, N) && rp % N == 0;
        return vectors ? launch(std::integral_constant<int, N>{}) : launch(std::integral_constant<int, 1>{});
    });
}

extern "C" int qlora_lora_accumulate(const float* da, const float* db, QloraMembers members, float* gradient, int64_t n,
                                     int64_t k, int64_t rp, cudaStream_t stream) {
    if (!fits(members, n, k, rp)) return static_cast<int>(cudaErrorInvalidValue);
    int64_t most = 0;
    for (int j = 0; j < members.count; j++) {
        const QloraMember& m = members.m[j];
        const int64_t larger = (m.rows > k ? m.rows : k) * m.rank;
        most = larger > most ? larger : most;
    }
    if (most == 0) return static_cast<int>(cudaSuccess);
    if (divide_up(most, 256) > LARGEST_GRID) return static_cast<int>(cudaErrorInvalidValue);
    const dim3 grid(static_cast<unsigned>(divide_up(most, 256)), 2 * members.count);
    accumulate_kernel<<<grid, 256, 0, stream>>>(da, db, members, gradient, k, rp);
    return static_cast<int>(cudaGetLastError());
}
