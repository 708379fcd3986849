// Elementwise operations on matrices [rows, cols] with strides: conversion, sum, bias, fill, scale.
//
// Floor: memory; 16-byte accesses where pointers, strides and columns allow them.

#include "common.cuh"

namespace {

template <typename From, typename To, int N> struct Cast {
    const From* in;
    int64_t ldi;
    To* out;
    int64_t ldo;

    __device__ void operator()(int64_t row, int64_t col) const {
        float values[N];
        load_floats(in + row * ldi + col, values);
        store_floats(out + row * ldo + col, values);
    }
};

template <typename T, int N> struct Add {
    const T* x;
    int64_t ldx;
    T* y;
    int64_t ldy;

    __device__ void operator()(int64_t row, int64_t col) const {
        float a[N], b[N];
        load_floats(x + row * ldx + col, a);
        load_floats(y + row * ldy + col, b);
#pragma unroll
        for (int i = 0; i < N; i++) b[i] += a[i];
        store_floats(y + row * ldy + col, b);
    }
};

template <typename T, int N> struct AddBias {
    T* y;
    int64_t ldy;
    const float* bias;

    __device__ void operator()(int64_t row, int64_t col) const {
        float values[N], b[N];
        load_floats(y + row * ldy + col, values);
        load_floats(bias + col, b);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] += b[i];
        store_floats(y + row * ldy + col, values);
    }
};

template <typename T, int N> struct Fill {
    T* y;
    int64_t ldy;
    float value;

    __device__ void operator()(int64_t row, int64_t col) const {
        float values[N];
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = value;
        store_floats(y + row * ldy + col, values);
    }
};

template <typename T, int N> struct Scale {
    T* y;
    int64_t ldy;
    float factor;

    __device__ void operator()(int64_t row, int64_t col) const {
        float values[N];
        load_floats(y + row * ldy + col, values);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] *= factor;
        store_floats(y + row * ldy + col, values);
    }
};

}  // namespace

// out = in, converted.
extern "C" int qlora_cast(int in_dtype, const void* in, int64_t ldi, int out_dtype, void* out, int64_t ldo,
                          int64_t rows, int64_t cols, cudaStream_t stream) {
    return with_dtype(in_dtype, [&](auto from) {
        return with_dtype(out_dtype, [&](auto to) {
            using From = decltype(from);
            using To = decltype(to);
            const From* i = static_cast<const From*>(in);
            To* o = static_cast<To*>(out);
            constexpr int N = 8;
            if (allows_vectors(i, ldi, cols, N) && allows_vectors(o, ldo, cols, N)) {
                return for_each_pack<N>(rows, cols, Cast<From, To, N>{i, ldi, o, ldo}, stream);
            }
            return for_each_pack<1>(rows, cols, Cast<From, To, 1>{i, ldi, o, ldo}, stream);
        });
    });
}

// y += x.
extern "C" int qlora_add(int dtype, const void* x, int64_t ldx, void* y, int64_t ldy, int64_t rows, int64_t cols,
                         cudaStream_t stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* xt = static_cast<const T*>(x);
        T* yt = static_cast<T*>(y);
        constexpr int N = VECTOR<T>;
        if (allows_vectors(xt, ldx, cols, N) && allows_vectors(yt, ldy, cols, N)) {
            return for_each_pack<N>(rows, cols, Add<T, N>{xt, ldx, yt, ldy}, stream);
        }
        return for_each_pack<1>(rows, cols, Add<T, 1>{xt, ldx, yt, ldy}, stream);
    });
}

// Adds bias [cols] to every row of y.
extern "C" int qlora_add_bias(int dtype, void* y, int64_t ldy, const float* bias, int64_t rows, int64_t cols,
                              cudaStream_t stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        T* yt = static_cast<T*>(y);
        constexpr int N = VECTOR<T>;
        if (allows_vectors(yt, ldy, cols, N) && allows_vectors(bias, 0, 0, 4)) {
            return for_each_pack<N>(rows, cols, AddBias<T, N>{yt, ldy, bias}, stream);
        }
        return for_each_pack<1>(rows, cols, AddBias<T, 1>{yt, ldy, bias}, stream);
    });
}

// y = value.
extern "C" int qlora_fill(int dtype, void* y, int64_t ldy, int64_t rows, int64_t cols, float value,
                          cudaStream_t stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        T* yt = static_cast<T*>(y);
        constexpr int N = VECTOR<T>;
        if (allows_vectors(yt, ldy, cols, N)) {
            return for_each_pack<N>(rows, cols, Fill<T, N>{yt, ldy, value}, stream);
        }
        return for_each_pack<1>(rows, cols, Fill<T, 1>{yt, ldy, value}, stream);
    });
}

// y *= factor.
extern "C" int qlora_scale(int dtype, void* y, int64_t ldy, int64_t rows, int64_t cols, float factor,
                           cudaStream_t stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        T* yt = static_cast<T*>(y);
        constexpr int N = VECTOR<T>;
        if (allows_vectors(yt, ldy, cols, N)) {
            return for_each_pack<N>(rows, cols, Scale<T, N>{yt, ldy, factor}, stream);
        }
        return for_each_pack<1>(rows, cols, Scale<T, 1>{yt, ldy, factor}, stream);
    });
}
