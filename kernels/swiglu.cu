// The gated activation of Llama's MLP, elementwise over [rows, cols], forward and backward in place.
//
//     h = silu(gate) * up                      silu(x) = x * s,  s = 1 / (1 + e^-x)
//     up   <- dh * silu(gate)
//     gate <- dh * up * s * (1 + gate * (1 - s))
//
// gate, up, dh, h: rows of `cols` elements, each with its own stride. In the backward h may be dh (it then takes its
// place) or NULL. f32 arithmetic; for 16-bit types the fast exponential and reciprocal (2 units in the last place of
// f32), which is far below their rounding.
//
// Floor: memory. Bytes per element of s bytes: forward 3s; backward 5s, with h 6s.

#include "common.cuh"

namespace {

template <typename T> __device__ __forceinline__ float sigmoid(float x) {
    if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
    // e^-x = inf gives 0, as it should.
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

template <typename T, int N> struct Forward {
    const T* gate;
    int64_t ldg;
    const T* up;
    int64_t ldu;
    T* h;
    int64_t ldh;

    __device__ void operator()(int64_t row, int64_t col) const {
        float g[N], u[N];
        load_floats(gate + row * ldg + col, g);
        load_floats(up + row * ldu + col, u);
#pragma unroll
        for (int i = 0; i < N; i++) g[i] = g[i] * sigmoid<T>(g[i]) * u[i];
        store_floats(h + row * ldh + col, g);
    }
};

template <typename T, int N, bool WITH_H> struct Backward {
    T* gate;
    int64_t ldg;
    T* up;
    int64_t ldu;
    const T* dh;
    int64_t lddh;
    T* h;
    int64_t ldh;

    __device__ void operator()(int64_t row, int64_t col) const {
        float g[N], u[N], d[N];
        load_floats(gate + row * ldg + col, g);
        load_floats(up + row * ldu + col, u);
        load_floats(dh + row * lddh + col, d);
        float h_values[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float s = sigmoid<T>(g[i]), silu = g[i] * s;
            h_values[i] = silu * u[i];
            g[i] = d[i] * u[i] * (s * (1.0f + g[i] * (1.0f - s)));
            u[i] = d[i] * silu;
        }
        store_floats(gate + row * ldg + col, g);
        store_floats(up + row * ldu + col, u);
        if (WITH_H) store_floats(h + row * ldh + col, h_values);
    }
};

}  // namespace

extern "C" int qlora_swiglu_forward(int dtype, const void* gate, int64_t ldg, const void* up, int64_t ldu, void* h,
                                    int64_t ldh, int64_t rows, int64_t cols, cudaStream_t stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T *g = static_cast<const T*>(gate), *u = static_cast<const T*>(up);
        T* out = static_cast<T*>(h);
        constexpr int N = VECTOR<T>;
        if (allows_vectors(g, ldg, cols, N) && allows_vectors(u, ldu, cols, N) && allows_vectors(out, ldh, cols, N)) {
            return for_each_pack<N>(rows, cols, Forward<T, N>{g, ldg, u, ldu, out, ldh}, stream);
        }
        return for_each_pack<1>(rows, cols, Forward<T, 1>{g, ldg, u, ldu, out, ldh}, stream);
    });
}

extern "C" int qlora_swiglu_backward(int dtype, void* gate, int64_t ldg, void* up, int64_t ldu, const void* dh,
                                     int64_t lddh, void* h, int64_t ldh, int64_t rows, int64_t cols,
                                     cudaStream_t stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        T *g = static_cast<T*>(gate), *u = static_cast<T*>(up), *out = static_cast<T*>(h);
        const T* d = static_cast<const T*>(dh);
        constexpr int N = VECTOR<T>;
        const auto launch = [&](auto n, auto with_h) {
            const Backward<T, n(), with_h()> f{g, ldg, u, ldu, d, lddh, out, ldh};
            return for_each_pack<n()>(rows, cols, f, stream);
        };
        const auto go = [&](auto n) { return out ? launch(n, std::true_type{}) : launch(n, std::false_type{}); };
        const bool vectors = allows_vectors(g, ldg, cols, N) && allows_vectors(u, ldu, cols, N) &&
                             allows_vectors(d, lddh, cols, N) && (!out || allows_vectors(out, ldh, cols, N));
        return vectors ? go(std::integral_constant<int, N>{}) : go(std::integral_constant<int, 1>{});
    });
}
