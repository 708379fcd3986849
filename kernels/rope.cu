// Rotary position embedding in place, half-split layout: every head of d columns is cut into halves a and b, and pair i
// is turned by an angle of the token's position.
//
//     a' = a cos - b sin          b' = b cos + a sin          (transposed, the backward: sin negated)
//
// x: [tokens, heads * head_dim] with its stride; cos, sin: f32 [positions, head_dim / 2]; positions: u32 [tokens].
//
// Floor: memory, 2s bytes per element of s bytes. A thread takes the same columns of four heads of a token, so that cos
// and sin are loaded once for all; its eight accesses to x are under way before it looks up its position.

#include "common.cuh"

namespace {

constexpr int HEADS = 4;   // a thread

template <typename T, int N>
__global__ void __launch_bounds__(512)
    rope_kernel(T* x, int64_t ldx, const float* __restrict__ cos_table, const float* __restrict__ sin_table,
                const uint32_t* __restrict__ positions, int64_t tokens, int heads, int half, float sign) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
    if (token >= tokens) return;
    x += token * ldx;
    for (int col = threadIdx.x * N; col < half; col += blockDim.x * N) {
        for (int first = threadIdx.y * HEADS; first < heads; first += HEADS * blockDim.y) {
            T* at = x + static_cast<int64_t>(first) * (2 * half) + col;
            Pack<T, N> a[HEADS], b[HEADS];
#pragma unroll
            for (int k = 0; k < HEADS; k++) {
                if (first + k >= heads) break;
                a[k] = load_pack<T, N>(at + k * (2 * half));
                b[k] = load_pack<T, N>(at + k * (2 * half) + half);
            }
            float cos[N], sin[N], turned[N];
            const int64_t angles = static_cast<int64_t>(positions[token]) * half + col;
            load_floats(cos_table + angles, cos);
            load_floats(sin_table + angles, sin);
#pragma unroll
            for (int i = 0; i < N; i++) sin[i] *= sign;
#pragma unroll
            for (int k = 0; k < HEADS; k++) {
                if (first + k >= heads) break;
#pragma unroll
                for (int i = 0; i < N; i++) turned[i] = to_float(a[k].v[i]) * cos[i] - to_float(b[k].v[i]) * sin[i];
                store_floats(at + k * (2 * half), turned);
#pragma unroll
                for (int i = 0; i < N; i++) turned[i] = to_float(b[k].v[i]) * cos[i] + to_float(a[k].v[i]) * sin[i];
                store_floats(at + k * (2 * half) + half, turned);
            }
        }
    }
}

}  // namespace

extern "C" int qlora_rope(int dtype, void* x, int64_t ldx, const float* cos, const float* sin,
                          const uint32_t* positions, int64_t tokens, int64_t heads, int64_t head_dim, int transposed,
                          cudaStream_t stream) {
    if (tokens <= 0 || heads <= 0) return static_cast<int>(cudaSuccess);
    if (head_dim <= 0 || head_dim % 2 != 0 || tokens > LARGEST_GRID || heads > LARGEST_GRID / head_dim) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    const int64_t half = head_dim / 2;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        T* xt = static_cast<T*>(x);
        const auto launch = [&](auto n) {
            constexpr int N = n();
            unsigned lanes = 1;
            while (lanes < 256 && lanes < half / N) lanes *= 2;
            const int64_t needed = divide_up(heads, HEADS), most = 512 / lanes;
            const unsigned y = static_cast<unsigned>(needed < most ? needed : most);
            // Tokens a block; its third dimension is at most 64.
            const unsigned z = lanes * y >= 128 ? 1 : lanes * y >= 2 ? 128 / (lanes * y) : 64;
            const dim3 block(lanes, y, z);
            rope_kernel<T, N><<<static_cast<unsigned>(divide_up(tokens, z)), block, 0, stream>>>(
                xt, ldx, cos, sin, positions, tokens, static_cast<int>(heads), static_cast<int>(half),
                transposed ? -1.0f : 1.0f);
            return static_cast<int>(cudaGetLastError());
        };
        const bool vectors = allows_vectors(xt, ldx, half, VECTOR<T>) && allows_vectors(cos, half, half, 4) &&
                             allows_vectors(sin, half, half, 4);
        return vectors ? launch(std::integral_constant<int, VECTOR<T>>{}) : launch(std::integral_constant<int, 1>{});
    });
}
