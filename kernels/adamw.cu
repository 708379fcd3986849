// AdamW over flat f32 buffers, one step in one pass, with f32 or 8-bit moments.
//
//     g = grad_scale * grad
//     m += (1 - beta1) (g - m)                v = beta2 v + (1 - beta2) g^2
//     param = param (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Scalars are computed in f64 and rounded once. Every f32 operation is rounded by itself, in the order of ops/adamw.rs:
// f32 moments give the CPU's bits.
//
// 8-bit moments (bitsandbytes' layout): blocks of 256 elements share an absmax, and a moment is map[code] * absmax, its
// code the nearest value of a sorted map of 256, signed for m and unsigned for v. The step uses the moments before they
// are rounded. The CPU's bits again (ops/adamw_8bit.rs). A v above 0 never gets code 0: it would read as 0 later, and m / eps would be a leap.
//
// Floor: memory. 28 bytes per element with f32 moments, 16 with 8-bit ones.

#include <math.h>

#include "common.cuh"

namespace {

struct Step {
    float grad_scale, decay, step_size, v_correction, new_m, old_v, new_v, eps;

    __device__ __forceinline__ void apply(float& param, float grad, float& m, float& v) const {
        const float g = __fmul_rn(grad, grad_scale);
        m = __fadd_rn(m, __fmul_rn(__fsub_rn(g, m), new_m));
        v = __fadd_rn(__fmul_rn(v, old_v), __fmul_rn(__fmul_rn(new_v, g), g));
        const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), v_correction), eps);
        param = __fsub_rn(__fmul_rn(param, decay), __fdiv_rn(__fmul_rn(step_size, m), denominator));
    }
};

Step make_step(double lr, double beta1, double beta2, double eps, double weight_decay, uint64_t step,
               float grad_scale) {
    const double t = static_cast<double>(step);
    return {grad_scale,
            static_cast<float>(1.0 - lr * weight_decay),
            static_cast<float>(lr / (1.0 - pow(beta1, t))),
            static_cast<float>(sqrt(1.0 - pow(beta2, t))),
            static_cast<float>(1.0 - beta1),
            static_cast<float>(beta2),
            static_cast<float>(1.0 - beta2),
            static_cast<float>(eps)};
}

template <int N> struct Update {
    Step step;
    float* param;
    const float* grad;
    float *m, *v;

    __device__ void operator()(int64_t, int64_t i) const {
        float ps[N], gs[N], ms[N], vs[N];
        load_floats(param + i, ps);
        load_floats(grad + i, gs);
        load_floats(m + i, ms);
        load_floats(v + i, vs);
#pragma unroll
        for (int k = 0; k < N; k++) step.apply(ps[k], gs[k], ms[k], vs[k]);
        store_floats(param + i, ps);
        store_floats(m + i, ms);
        store_floats(v + i, vs);
    }
};

constexpr int STATE_BLOCK = 256, STATE_THREADS = 256, PER_LANE = STATE_BLOCK / 32;

// The index of the value of a sorted map that is nearest to x.
__device__ __forceinline__ uint32_t nearest(const float* map, float x) {
    uint32_t low = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2) low += map[low + step] <= x ? step : 0;
    const uint32_t high = low < 255 ? low + 1 : 255;
    return __fsub_rn(x, map[low]) > __fsub_rn(map[high], x) ? high : low;
}

__device__ __forceinline__ float largest_in_warp(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// A warp takes a block of 256, a lane 8 elements side by side.
__global__ void __launch_bounds__(STATE_THREADS)
    update_8bit_kernel(Step step, float* param, const float* grad, uint8_t* m, uint8_t* v, float* m_absmax,
                       float* v_absmax, const float* __restrict__ map_signed, const float* __restrict__ map_unsigned,
                       int64_t n, bool vectors) {
    __shared__ float maps[2][256];
    for (int i = threadIdx.x; i < 256; i += STATE_THREADS) {
        maps[0][i] = map_signed[i];
        maps[1][i] = map_unsigned[i];
    }
    __syncthreads();
    const int64_t block = static_cast<int64_t>(blockIdx.x) * (STATE_THREADS / 32) + threadIdx.x / 32;
    const int64_t first = block * STATE_BLOCK + (threadIdx.x % 32) * PER_LANE;
    if (block * STATE_BLOCK >= n) return;
    const bool whole = vectors && first + PER_LANE <= n;
    const int count = first >= n ? 0 : (n - first < PER_LANE ? static_cast<int>(n - first) : PER_LANE);

    float ps[PER_LANE], gs[PER_LANE], ms[PER_LANE], vs[PER_LANE];
    Pack<uint8_t, PER_LANE> m_codes, v_codes;
    if (whole) {
        load_floats(param + first, ps);
        load_floats(grad + first, gs);
        m_codes = load_pack<uint8_t, PER_LANE>(m + first);
        v_codes = load_pack<uint8_t, PER_LANE>(v + first);
    } else {
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            const bool inside = k < count;
            ps[k] = inside ? param[first + k] : 0.0f;
            gs[k] = inside ? grad[first + k] : 0.0f;
            m_codes.v[k] = inside ? m[first + k] : 0;
            v_codes.v[k] = inside ? v[first + k] : 0;
        }
    }
    const float m_scale = m_absmax[block], v_scale = v_absmax[block];
    float m_largest = 0, v_largest = 0;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        ms[k] = __fmul_rn(maps[0][m_codes.v[k]], m_scale);
        vs[k] = __fmul_rn(maps[1][v_codes.v[k]], v_scale);
        step.apply(ps[k], gs[k], ms[k], vs[k]);
        if (k >= count) ms[k] = vs[k] = 0.0f;
        m_largest = fmaxf(m_largest, fabsf(ms[k]));
        v_largest = fmaxf(v_largest, vs[k]);
    }
    m_largest = largest_in_warp(m_largest);
    v_largest = largest_in_warp(v_largest);
    if (threadIdx.x % 32 == 0) {
        m_absmax[block] = m_largest;
        v_absmax[block] = v_largest;
    }
    const float m_factor = m_largest > 0.0f ? 1.0f / m_largest : 0.0f;
    const float v_factor = v_largest > 0.0f ? 1.0f / v_largest : 0.0f;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        m_codes.v[k] = static_cast<uint8_t>(nearest(maps[0], __fmul_rn(ms[k], m_factor)));
        const uint32_t v_code = nearest(maps[1], __fmul_rn(vs[k], v_factor));
        v_codes.v[k] = static_cast<uint8_t>(v_code == 0 && vs[k] > 0.0f ? 1 : v_code);
    }
    if (whole) {
        store_floats(param + first, ps);
        *reinterpret_cast<Pack<uint8_t, PER_LANE>*>(m + first) = m_codes;
        *reinterpret_cast<Pack<uint8_t, PER_LANE>*>(v + first) = v_codes;
    } else {
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            if (k >= count) break;
            param[first + k] = ps[k];
            m[first + k] = m_codes.v[k];
            v[first + k] = v_codes.v[k];
        }
    }
}

}  // namespace

extern "C" int qlora_adamw(float* param, const float* grad, float* m, float* v, int64_t n, double lr, double beta1,
                           double beta2, double eps, double weight_decay, uint64_t step, float grad_scale,
                           cudaStream_t stream) {
    const Step s = make_step(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
    const bool vectors = allows_vectors(param, 0, 0, 4) && allows_vectors(grad, 0, 0, 4) &&
                         allows_vectors(m, 0, 0, 4) && allows_vectors(v, 0, 0, 4);
    const int64_t body = vectors ? n / 4 * 4 : 0;
    const int error = for_each_pack<4>(1, body, Update<4>{s, param, grad, m, v}, stream);
    if (error != cudaSuccess) return error;
    return for_each_pack<1>(1, n - body, Update<1>{s, param + body, grad + body, m + body, v + body}, stream);
}

// m, v: u8 [n]; m_absmax, v_absmax: f32 [ceil(n / 256)], zeros before the first step; the maps: f32 [256],
// ascending.
extern "C" int qlora_adamw_8bit(float* param, const float* grad, uint8_t* m, uint8_t* v, float* m_absmax,
                                float* v_absmax, const float* map_signed, const float* map_unsigned, int64_t n,
                                double lr, double beta1, double beta2, double eps, double weight_decay, uint64_t step,
                                float grad_scale, cudaStream_t stream) {
    if (n <= 0) return static_cast<int>(cudaSuccess);
    const int64_t blocks = divide_up(n, STATE_BLOCK * (STATE_THREADS / 32));
    if (blocks > LARGEST_GRID) return static_cast<int>(cudaErrorInvalidValue);
    const Step s = make_step(lr, beta1, beta2, eps, weight_decay, step, grad_scale);
    const bool vectors = allows_vectors(param, 0, 0, 4) && allows_vectors(grad, 0, 0, 4) &&
                         allows_vectors(m, 0, 0, PER_LANE) && allows_vectors(v, 0, 0, PER_LANE);
    update_8bit_kernel<<<static_cast<unsigned>(blocks), STATE_THREADS, 0, stream>>>(
        s, param, grad, m, v, m_absmax, v_absmax, map_signed, map_unsigned, n, vectors);
    return static_cast<int>(cudaGetLastError());
}
