// The 4-bit formats of bitsandbytes, NF4 and FP4, as quant/codebook.rs, quant/decode.rs and quant/nested.rs define
// them: the one place where kernels take their values, thresholds and scales from.
//
//     value = table[code] * absmax                      absmax = map[code8] * nested_absmax + nested_offset if nested
//
// Each product is rounded once and flushed (subnormal numbers on either side become zeros), the sum is rounded once and
// not flushed: a fused multiply-add would give other bits. The even element is in the upper nibble of a byte.
#pragma once

#include "common.cuh"

namespace nf4 {

enum QuantType : int { NF4 = 0, FP4 = 1 };

// Row 0: NF4, row 1: FP4.
static __device__ const float TABLES[2][16] = {
    {-1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f, 0.0795803f,
     0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f},
    {0.0f, 0.0052083335f, 0.6666667f, 1.0f, 0.33333333f, 0.5f, 0.16666667f, 0.25f, -0.0f, -0.0052083335f, -0.6666667f,
     -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f},
};

__device__ __forceinline__ float multiply_flushed(float a, float b) {
    float product;
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
}

// The absmax of every block: plain f32 (`plain` is not NULL) or doubly quantized.
struct Scales {
    const float* plain;
    const uint8_t* codes;
    const float* map;
    const float* nested_absmax;
    float offset;
    int nested_shift;   // log2 of the codes that share a nested absmax

    __device__ __forceinline__ float operator()(int64_t block) const {
        if (plain) return __ldg(plain + block);
        const float value = __ldg(map + __ldg(codes + block));
        return __fadd_rn(multiply_flushed(value, __ldg(nested_absmax + (block >> nested_shift))), offset);
    }
};

// The code of a scaled value: the number of thresholds below it, counted by a binary search; NaN has code 0.
__device__ __forceinline__ uint32_t encode_nf4(float s) {
    // As bits: three of them lie almost halfway between two floats.
    const auto f = [](uint32_t bits) { return __uint_as_float(bits); };
    const float t0 = f(0xbf591cd9), t1 = f(0xbf1c5270), t2 = f(0xbeeb8480), t3 = f(0xbeadea76), t4 = f(0xbe703cec),
                t5 = f(0xbe0d38bc), t6 = f(0xbd3a7871), t7 = f(0x3d22faff), t8 = f(0x3df64863), t9 = f(0x3e5067e0),
                t10 = f(0x3e9582d4), t11 = f(0x3ec753f9), t12 = f(0x3f006d03), t13 = f(0x3f248daf),
                t14 = f(0x3f5c89d9);
    const bool bit3 = s > t7;
    const bool bit2 = s > (bit3 ? t11 : t3);
    const bool bit1 = s > (bit3 ? (bit2 ? t13 : t9) : (bit2 ? t5 : t1));
    const float low = bit2 ? (bit1 ? t6 : t4) : (bit1 ? t2 : t0);
    const float high = bit2 ? (bit1 ? t14 : t12) : (bit1 ? t10 : t8);
    const bool bit0 = s > (bit3 ? high : low);
    return bit3 << 3 | bit2 << 2 | bit1 << 1 | bit0;
}

// Magnitudes in ascending order are the codes 0, 1, 6, 7, 4, 5, 2, 3; a NaN has code 0. `s` is flushed.
__device__ __forceinline__ uint32_t encode_fp4(float s) {
    const float magnitude = fabsf(s);
    const bool bit2 = magnitude > 0.29166667f;
    const bool bit1 = magnitude > (bit2 ? 0.583333f : 0.0859375f);
    const float pivot = bit2 ? (bit1 ? 0.8333333f : 0.4166667f) : (bit1 ? 0.20833333f : 0.00260417f);
    const bool bit0 = magnitude > pivot;
    return (s < 0.0f) << 3 | (bit2 != bit1) << 2 | bit1 << 1 | bit0;
}

inline int log2_of(int64_t power_of_two) {
    int shift = 0;
    while ((int64_t{1} << shift) < power_of_two) shift++;
    return shift;
}

inline bool is_power_of_two(int64_t x) { return x > 0 && (x & (x - 1)) == 0; }

inline bool is_blocksize(int64_t x) { return is_power_of_two(x) && x >= 32 && x <= 4096; }

}  // namespace nf4
