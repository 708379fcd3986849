// Dropout whose mask is computed: element i (counted row by row over the whole matrix, of which these are the rows from
// first_row on) is kept if the upper half of SplitMix64's finalizer of `key + i * GAMMA` is at least `threshold`.
//
//     y = x * mask * scale          or          y += x * mask * scale          x, y: [rows, cols]
//
// The host derives key and threshold from seed, stream and p (ops/dropout.rs), so CPU and GPU drop the same elements.
//
// Floor: memory, 2s bytes per element (3s when adding). The hash takes some 20 integer instructions per element, about
// as long as its bytes do on an H100.

#include "common.cuh"

namespace {

constexpr uint64_t GAMMA = 0x9e3779b97f4a7c15;

struct Mask {
    uint64_t key;
    uint32_t threshold;
    float scale;

    __device__ __forceinline__ bool keeps(uint64_t counter) const {
        uint64_t x = key + counter;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        // The upper half of x ^ (x >> 31).
        const uint32_t high = static_cast<uint32_t>(x >> 32);
        return (high ^ (high >> 31)) >= threshold;
    }
};

template <typename T, int N, bool ADD> struct Drop {
    Mask mask;
    const T* x;
    int64_t ldx;
    T* y;
    int64_t ldy;
    int64_t cols, first_row;

    __device__ void operator()(int64_t row, int64_t col) const {
        float values[N], sums[N];
        load_floats(x + row * ldx + col, values);
        if (ADD) load_floats(y + row * ldy + col, sums);
        uint64_t counter = static_cast<uint64_t>((first_row + row) * cols + col) * GAMMA;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float kept = mask.keeps(counter) ? values[i] * mask.scale : 0.0f;
            values[i] = ADD ? sums[i] + kept : kept;
            counter += GAMMA;
        }
        store_floats(y + row * ldy + col, values);
    }
};

}  // namespace

extern "C" int qlora_dropout(int dtype, int add, const void* x, int64_t ldx, void* y, int64_t ldy, int64_t rows,
                             int64_t cols, int64_t first_row, uint64_t key, uint32_t threshold, float scale,
                             cudaStream_t stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* xt = static_cast<const T*>(x);
        T* yt = static_cast<T*>(y);
        const auto launch = [&](auto n, auto adds) {
            const Drop<T, n(), adds()> f{{key, threshold, scale}, xt, ldx, yt, ldy, cols, first_row};
            return for_each_pack<n()>(rows, cols, f, stream);
        };
        const auto go = [&](auto n) { return add ? launch(n, std::true_type{}) : launch(n, std::false_type{}); };
        const bool vectors = allows_vectors(xt, ldx, cols, VECTOR<T>) && allows_vectors(yt, ldy, cols, VECTOR<T>);
        return vectors ? go(std::integral_constant<int, VECTOR<T>>{}) : go(std::integral_constant<int, 1>{});
    });
}
