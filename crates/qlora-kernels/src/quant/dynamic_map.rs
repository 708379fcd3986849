//! The dynamic 8-bit maps: the signed one, which double quantization uses for the absmax values, and the unsigned one.
//!
//! For i in 0..7, 2^i values lie linearly between 0.1 and 1, times 10^(i-6); with their negatives, 0 and 1 that makes
//! 256. The unsigned map has 2^(i+1) values instead of the negatives (8-bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561, as bitsandbytes builds it with
//! PyTorch). The smallest is -0.99296875, zero is code 127, 1 is code 255.

use std::sync::LazyLock;

static SIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic(true));
static UNSIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic(false));

/// The map, ascending, bit for bit as bitsandbytes has it.
pub fn signed_dynamic_map() -> &'static [f32; 256] {
    &SIGNED
}

/// The unsigned map, ascending, bit for bit as bitsandbytes has it.
pub fn unsigned_dynamic_map() -> &'static [f32; 256] {
    &UNSIGNED
}

fn dynamic(signed: bool) -> [f32; 256] {
    const POWERS: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut map = Vec::with_capacity(256);
    for (i, power) in POWERS.into_iter().enumerate() {
        let points = linspace(0.1, 1.0, (if signed { 1 << i } else { 2 << i }) + 1);
        for pair in points.windows(2) {
            let value = (pair[0] + pair[1]) / 2.0 * power;
            map.push(value);
            if signed {
                map.push(-value);
            }
        }
    }
    map.extend([0.0, 1.0]);
    map.sort_by(f32::total_cmp);
    map.try_into().expect("2 * (1 + 2 + ... + 64) + 2 = 256 values")
}

/// `torch.linspace` in f32: from both ends to the middle, each value with one rounding.
fn linspace(start: f32, end: f32, n: usize) -> Vec<f32> {
    let step = (end - start) / (n - 1) as f32;
    (0..n)
        .map(|i| if i < n / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((n - 1 - i) as f32, end) })
        .collect()
}

/// The code whose value is nearest to `x`; halfway, the even one (the two searches of bitsandbytes' `dQuantize` end
/// there). NaN (0 times the reciprocal of 0) becomes code 0, as on the GPU.
pub(super) fn nearest(map: &[f32; 256], x: f32) -> u8 {
    // The steps of 64, 32, ... 1 from 127 visit odd codes and end on an even one, between two that were visited.
    let (mut pivot, mut lower, mut upper) = (127usize, 0usize, 255usize);
    let mut step = 64;
    while step > 0 {
        if x > map[pivot] {
            lower = pivot;
            pivot += step;
        } else {
            upper = pivot;
            pivot -= step;
        }
        step /= 2;
    }
    let value = map[pivot];
    let code = if x > value {
        if x > (map[upper] + value) * 0.5 { upper } else { pivot }
    } else if x < (map[lower] + value) * 0.5 {
        lower
    } else {
        pivot
    };
    code as u8
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn the_map_is_that_of_bitsandbytes() {
        let map = signed_dynamic_map();
        for (map, expected) in [
            (map, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
            (unsigned_dynamic_map(), "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
        ] {
            let bytes: Vec<u8> = map.iter().flat_map(|value| value.to_le_bytes()).collect();
            let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(digest, expected);
        }
        assert_eq!((map[0], map[127], map[255]), (-0.99296875, 0.0, 1.0));
    }

    #[test]
    fn nearest_is_nearest() {
        let map = signed_dynamic_map();
        for code in 0..256 {
            assert_eq!(nearest(map, map[code]), code as u8);
        }
        for code in 0..255 {
            let middle = (map[code] + map[code + 1]) * 0.5;
            let even = if code % 2 == 0 { code } else { code + 1 };
            assert_eq!(nearest(map, middle), even as u8, "halfway between {code} and {}", code + 1);
            assert_eq!(nearest(map, middle.next_up()), code as u8 + 1);
            assert_eq!(nearest(map, middle.next_down()), code as u8);
        }
        assert_eq!(nearest(map, -2.0), 0);
        assert_eq!(nearest(map, 2.0), 255);
        assert_eq!(nearest(map, f32::NAN), 0);
    }
}
