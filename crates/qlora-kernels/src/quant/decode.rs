//! Codes to f32: `out[i] = values[code[i]] * absmax[i / blocksize]`, for any range of elements.
//!
//! Layout: two codes a byte, the even element in the high nibble. One rounding; results and scales that are subnormal
//! become zeros, as in bitsandbytes' CUDA kernels (compiled with `--use_fast_math`). The 16 values are multiplied by a
//! block's absmax first, so that the rest is a table lookup: one permutation of a 16-lane register with AVX-512.

use std::ops::Range;
use std::sync::LazyLock;

use super::codebook::QuantType;

/// The lookup of packed codes in a 16-entry table.
trait Expand: Copy {
    /// Writes two elements a byte; `out` is twice as long as `bytes`.
    fn expand(self, table: &[f32; 16], bytes: &[u8], out: &mut [f32]);
}

/// Zero for subnormal numbers (either sign of zero is kept).
#[inline(always)]
pub(super) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { f32::from_bits(x.to_bits() & 1 << 31) } else { x }
}

/// Writes the elements in `range` (flat indices) of a tensor whose block `b` has the scale `absmax(b)`.
pub(super) fn decode(
    quant_type: QuantType,
    codes: &[u8],
    blocksize: usize,
    absmax: impl Fn(usize) -> f32,
    range: Range<usize>,
    out: &mut [f32],
) {
    debug_assert_eq!(range.len(), out.len());
    LEVEL.run(Job { values: quant_type.values(), codes, blocksize, absmax, range, out });
}

/// The instruction sets that have a lookup of their own.
#[derive(Clone, Copy)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    V4(pulp::x86::V4),
    #[cfg(target_arch = "x86_64")]
    V3(pulp::x86::V3),
    Portable,
}

static LEVEL: LazyLock<Level> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(simd) = pulp::x86::V4::try_new() {
            return Level::V4(simd);
        }
        if let Some(simd) = pulp::x86::V3::try_new() {
            return Level::V3(simd);
        }
    }
    Level::Portable
});

impl Level {
    fn run<A: Fn(usize) -> f32>(self, job: Job<A>) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::V4(simd) => pulp::Simd::vectorize(simd, Run { expand: simd, job }),
            #[cfg(target_arch = "x86_64")]
            Self::V3(simd) => pulp::Simd::vectorize(simd, Run { expand: simd, job }),
            Self::Portable => job.run(Portable),
        }
    }
}

struct Job<'a, A> {
    values: &'a [f32; 16],
    codes: &'a [u8],
    blocksize: usize,
    absmax: A,
    range: Range<usize>,
    out: &'a mut [f32],
}

impl<A: Fn(usize) -> f32> Job<'_, A> {
    #[inline(always)]
    fn run(self, expand: impl Expand) {
        let Self { values, codes, blocksize, absmax, range, mut out } = self;
        let mut at = range.start;
        while at < range.end {
            let block = at / blocksize;
            let end = range.end.min((block + 1) * blocksize);
            let scale = flush(absmax(block));
            let table = values.map(|value| flush(value * scale));
            let segment;
            (segment, out) = out.split_at_mut(end - at);
            decode_block(expand, &table, codes, at, segment);
            at = end;
        }
    }
}

/// Elements `at..at + out.len()`, which lie in one block.
#[inline(always)]
fn decode_block(expand: impl Expand, table: &[f32; 16], codes: &[u8], at: usize, out: &mut [f32]) {
    let (first, out) = out.split_at_mut(at % 2);
    if let [first] = first {
        *first = table[usize::from(codes[at / 2] & 15)];
    }
    let at = at.next_multiple_of(2);
    let bytes = out.len() / 2;
    let (pairs, last) = out.split_at_mut(2 * bytes);
    expand.expand(table, &codes[at / 2..at / 2 + bytes], pairs);
    if let [last] = last {
        *last = table[usize::from(codes[at / 2 + bytes] >> 4)];
    }
}

#[derive(Clone, Copy)]
struct Portable;

impl Expand for Portable {
    #[inline(always)]
    fn expand(self, table: &[f32; 16], bytes: &[u8], out: &mut [f32]) {
        for (byte, pair) in bytes.iter().zip(out.chunks_exact_mut(2)) {
            pair[0] = table[usize::from(byte >> 4)];
            pair[1] = table[usize::from(byte & 15)];
        }
    }
}

/// Carries a [`Job`] into code compiled for the instruction set.
#[cfg(target_arch = "x86_64")]
struct Run<'a, E, A> {
    expand: E,
    job: Job<'a, A>,
}

#[cfg(target_arch = "x86_64")]
impl<E: Expand, A: Fn(usize) -> f32> pulp::WithSimd for Run<'_, E, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        self.job.run(self.expand);
    }
}

/// Eight bytes in the low half of a vector.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn low_half(bytes: [u8; 8]) -> std::arch::x86_64::__m128i {
    pulp::cast([u64::from_le_bytes(bytes), 0])
}

#[cfg(target_arch = "x86_64")]
impl Expand for pulp::x86::V4 {
    #[inline(always)]
    fn expand(self, table: &[f32; 16], bytes: &[u8], out: &mut [f32]) {
        let simd = self.avx512f;
        let table512 = pulp::cast(*table);
        // The permutation looks at the lowest four bits of each lane: the byte for odd elements, byte >> 4 for even
        // ones.
        let shifts = pulp::cast(nibble_shifts::<16>());
        let (chunks, tail) = bytes.as_chunks::<8>();
        let (vectors, rest) = out.as_chunks_mut::<16>();
        for (chunk, vector) in chunks.iter().zip(vectors) {
            let lanes = simd._mm512_cvtepu8_epi64(low_half(*chunk));
            let lanes = simd._mm512_shuffle_epi32::<0b10_10_00_00>(lanes);
            let lanes = simd._mm512_srlv_epi32(lanes, shifts);
            *vector = pulp::cast(simd._mm512_permutexvar_ps(lanes, table512));
        }
        Portable.expand(table, tail, rest);
    }
}

#[cfg(target_arch = "x86_64")]
impl Expand for pulp::x86::V3 {
    #[inline(always)]
    fn expand(self, table: &[f32; 16], bytes: &[u8], out: &mut [f32]) {
        let (avx, avx2) = (self.avx, self.avx2);
        let [low, high]: [[f32; 8]; 2] = pulp::cast(*table);
        let (low, high) = (pulp::cast(low), pulp::cast(high));
        let shifts = pulp::cast(nibble_shifts::<8>());
        let (chunks, tail) = bytes.as_chunks::<4>();
        let (vectors, rest) = out.as_chunks_mut::<8>();
        for (&[a, b, c, d], vector) in chunks.iter().zip(vectors) {
            let lanes = avx2._mm256_cvtepu8_epi64(low_half([a, b, c, d, 0, 0, 0, 0]));
            let lanes = avx2._mm256_shuffle_epi32::<0b10_10_00_00>(lanes);
            let lanes = avx2._mm256_srlv_epi32(lanes, shifts);
            // The permutation looks at three bits; the fourth, moved to the sign, chooses the half of the table.
            let half = pulp::cast(avx2._mm256_slli_epi32::<28>(lanes));
            let value = avx._mm256_blendv_ps(
                avx2._mm256_permutevar8x32_ps(low, lanes),
                avx2._mm256_permutevar8x32_ps(high, lanes),
                half,
            );
            *vector = pulp::cast(value);
        }
        Portable.expand(table, tail, rest);
    }
}

/// For each even lane 4, for each odd lane 0.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn nibble_shifts<const N: usize>() -> [u32; N] {
    std::array::from_fn(|lane| if lane % 2 == 0 { 4 } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All instruction sets of this machine write the same bits, at every alignment and length.
    #[test]
    fn instruction_sets_agree() {
        let codes: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
        let scales = [0.0371f32, 5.0, 3.3e-38, 1e-40, 0.0, 1.7e38, 2f32.powi(-118), 1.0];
        for quant_type in [QuantType::Nf4, QuantType::Fp4] {
            for blocksize in [32, 128] {
                for start in 0..70 {
                    for len in [0, 1, 2, 15, 16, 17, 31, 33, 64, 65, 129, 300, 949] {
                        let absmax = |block: usize| scales[block % scales.len()];
                        let range = start..start + len;
                        let expected: Vec<u32> = (start..start + len)
                            .map(|i| {
                                let code = if i % 2 == 0 { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
                                let scale = flush(absmax(i / blocksize));
                                flush(quant_type.values()[usize::from(code)] * scale).to_bits()
                            })
                            .collect();
                        for (name, level) in levels() {
                            let mut out = vec![f32::NAN; len];
                            let values = quant_type.values();
                            let (range, out_slice) = (range.clone(), out.as_mut_slice());
                            level.run(Job { values, codes: &codes, blocksize, absmax, range, out: out_slice });
                            let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                            assert_eq!(bits, expected, "{name} {quant_type} blocksize {blocksize} from {start}");
                        }
                    }
                }
            }
        }
    }

    fn levels() -> Vec<(&'static str, Level)> {
        let mut levels = vec![("portable", Level::Portable), ("dispatched", *LEVEL)];
        #[cfg(target_arch = "x86_64")]
        {
            levels.extend(pulp::x86::V3::try_new().map(|simd| ("AVX2", Level::V3(simd))));
            levels.extend(pulp::x86::V4::try_new().map(|simd| ("AVX-512", Level::V4(simd))));
        }
        levels
    }
}
