//! Properties that hold for 4-bit weights of any shape, and the bounds of their errors.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use proptest::collection::vec;
use proptest::prelude::*;
use qlora_kernels::quant::{
    Absmax, BLOCKSIZES, IntBits, IntConfig, NestedAbsmax, Parts, QuantConfig, QuantType, Quantized4bit, QuantizedInt,
    Quantizer, SourceDtype,
};
use qlora_kernels::weight::{FrozenWeight, PlainData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn configs() -> impl Strategy<Value = QuantConfig> {
    (prop::sample::select(vec![QuantType::Nf4, QuantType::Fp4]), prop::sample::select(&BLOCKSIZES[..]), any::<bool>())
        .prop_map(|(quant_type, blocksize, double_quant)| QuantConfig { quant_type, blocksize, double_quant })
}

/// Finite values over the whole range that can be quantized and returned, with many zeros.
fn values() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -1.0f32..1.0,
        2 => Just(0.0f32),
        1 => Just(-0.0f32),
        1 => (-90i32..90, -2.0f32..2.0).prop_map(|(exponent, x)| x * 2f32.powi(exponent)),
    ]
}

fn weights() -> impl Strategy<Value = (Vec<f32>, usize, usize)> {
    (0usize..40, 0usize..300).prop_flat_map(|(rows, cols)| (vec(values(), rows * cols), Just(rows), Just(cols)))
}

fn narrow(values: &[f32], dtype: SourceDtype) -> PlainData {
    match dtype {
        SourceDtype::F32 => PlainData::F32(values.to_vec()),
        SourceDtype::Bf16 => {
            let mut out = vec![bf16::ZERO; values.len()];
            out.convert_from_f32_slice(values);
            PlainData::Bf16(out)
        }
        SourceDtype::F16 => {
            let mut out = vec![f16::ZERO; values.len()];
            out.convert_from_f32_slice(values);
            PlainData::F16(out)
        }
    }
}

fn widen(data: &PlainData) -> Vec<f32> {
    let mut out = vec![f32::NAN; data.len()];
    data.to_f32(0..data.len(), &mut out);
    out
}

/// FP4 has two zeros, and a quantized -0 is 0.
fn without_negative_zero(quant_type: QuantType, codes: &[u8]) -> Vec<u8> {
    let nibble = |code: u8| if quant_type == QuantType::Fp4 && code == 8 { 0 } else { code };
    codes.iter().map(|byte| nibble(byte >> 4) << 4 | nibble(byte & 15)).collect()
}

proptest! {
    #[test]
    fn quantizing_a_dequantized_weight_changes_nothing(
        (data, rows, cols) in weights(),
        config in configs(),
        dtype in prop::sample::select(vec![SourceDtype::F32, SourceDtype::Bf16]),
    ) {
        let config = QuantConfig { double_quant: false, ..config };
        let once = Quantized4bit::quantize(&narrow(&data, dtype), rows, cols, &config).unwrap();
        let twice = Quantized4bit::quantize(&once.dequantize(dtype), rows, cols, &config).unwrap();
        prop_assert_eq!(once.absmax(), twice.absmax());
        let clean = |weight: &Quantized4bit| without_negative_zero(config.quant_type, weight.codes());
        prop_assert_eq!(clean(&once), clean(&twice));
    }

    #[test]
    fn rows_are_slices_of_the_whole(
        (data, rows, cols) in weights(),
        config in configs(),
        from in 0usize..40,
        to in 0usize..40,
    ) {
        let weight = Quantized4bit::quantize(&PlainData::F32(data), rows, cols, &config).unwrap();
        let PlainData::F32(whole) = weight.dequantize(SourceDtype::F32) else { unreachable!() };
        let (from, to) = (from.min(to).min(rows), from.max(to).min(rows));
        let mut part = vec![f32::NAN; (to - from) * cols];
        weight.dequantize_rows(from..to, &mut part);
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&part), bits(&whole[from * cols..to * cols]));
    }

    #[test]
    fn errors_are_within_half_a_step((data, rows, cols) in weights(), config in configs()) {
        let config = QuantConfig { double_quant: false, ..config };
        let weight = Quantized4bit::quantize(&PlainData::F32(data.clone()), rows, cols, &config).unwrap();
        let back = widen(&weight.dequantize(SourceDtype::F32));
        // Half the widest gap: NF4 -1..-0.696, FP4 0.667..1; and rounding.
        let half = if config.quant_type == QuantType::Nf4 { 0.15191 } else { 0.16668 };
        for (original, back) in data.chunks(config.blocksize).zip(back.chunks(config.blocksize)) {
            let absmax = original.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            for (x, y) in original.iter().zip(back) {
                prop_assert!((x - y).abs() <= half * absmax, "{x} came back as {y}, absmax {absmax}");
            }
        }
    }

    #[test]
    fn pieces_of_any_length_give_the_same_weight(
        (data, rows, cols) in weights(),
        config in configs(),
        cuts in vec(0usize..3000, 0..8),
    ) {
        let whole = Quantized4bit::quantize_slice(&data, rows, cols, &config).unwrap();
        let mut quantizer = Quantizer::new(rows, cols, &config).unwrap();
        let mut rest = data.as_slice();
        for cut in cuts {
            let piece;
            (piece, rest) = rest.split_at(cut.min(rest.len()));
            quantizer.push(piece).unwrap();
        }
        quantizer.push(rest).unwrap();
        prop_assert!(quantizer.finish().unwrap() == whole);
    }

    #[test]
    fn anything_may_be_in_a_checkpoint(
        lengths in (0usize..200, 0usize..20, 0usize..5, 250usize..260),
        shape in prop_oneof![(0usize..40, 0usize..40), (any::<usize>(), any::<usize>())],
        blocksize in prop_oneof![0usize..70, any::<usize>()],
        nested_blocksize in prop_oneof![0usize..300, any::<usize>()],
        floats in vec(any::<f32>(), 300),
        nested in any::<bool>(),
        quant_type in prop::sample::select(vec![QuantType::Nf4, QuantType::Fp4]),
    ) {
        let (codes, absmax, nested_absmax, map) = lengths;
        let absmax = if nested {
            Absmax::Nested(NestedAbsmax {
                codes: vec![200; absmax],
                absmax: floats[..nested_absmax].to_vec(),
                quant_map: floats[..map].to_vec(),
                offset: floats[0],
                blocksize: nested_blocksize,
            })
        } else {
            Absmax::Plain(floats[..absmax].to_vec())
        };
        let (rows, cols) = shape;
        let source_dtype = SourceDtype::Bf16;
        let parts = Parts { codes: vec![0x5a; codes], absmax, rows, cols, quant_type, blocksize, source_dtype };
        if let Ok(weight) = Quantized4bit::from_parts(parts) {
            prop_assert_eq!(weight.dequantize(SourceDtype::F32).len(), rows * cols);
        }
    }

    /// The same with lengths that fit, so that the values are what decides.
    #[test]
    fn fitting_lengths_are_accepted_or_a_value_is_named(
        (rows, cols) in (0usize..40, 0usize..40),
        scales in vec(prop_oneof![20 => -1e30f32..1e30, 1 => any::<f32>()], 1600usize.div_ceil(32)),
        codes in vec(any::<u8>(), 800),
        nested in any::<bool>(),
    ) {
        let blocks = (rows * cols).div_ceil(32);
        let absmax = if nested {
            let map: Vec<f32> = (0..256).map(|i| scales[i % scales.len()]).collect();
            let groups = blocks.div_ceil(64);
            let (codes, absmax) = (codes[..blocks].to_vec(), scales[..groups].to_vec());
            Absmax::Nested(NestedAbsmax { codes, absmax, quant_map: map, offset: 1.0, blocksize: 64 })
        } else {
            Absmax::Plain(scales[..blocks].to_vec())
        };
        let values = match &absmax {
            Absmax::Plain(values) => values.clone(),
            Absmax::Nested(nested) => [nested.absmax.as_slice(), &nested.quant_map].concat(),
        };
        let codes = codes[..(rows * cols).div_ceil(2)].to_vec();
        let (quant_type, source_dtype) = (QuantType::Nf4, SourceDtype::F16);
        let parts = Parts { codes, absmax, rows, cols, quant_type, blocksize: 32, source_dtype };
        match Quantized4bit::from_parts(parts) {
            Ok(weight) => {
                prop_assert!(values.iter().all(|value| value.is_finite()));
                weight.dequantize_rows(0..rows, &mut vec![f32::NAN; rows * cols]);
            }
            Err(error) => {
                prop_assert!(values.iter().any(|value| !value.is_finite()));
                prop_assert!(error.to_string().contains("] is "), "{}", error);
            }
        }
    }
}

/// N(0, 1) values, by Box and Muller.
fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut out = Vec::with_capacity(n);
    while out.len() < n {
        let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
        let (sin, cos) = (2.0 * std::f64::consts::PI * v).sin_cos();
        let radius = (-2.0 * u.ln()).sqrt();
        out.extend([(radius * cos) as f32, (radius * sin) as f32]);
    }
    out
}

fn mean_errors(original: &[f32], back: &[f32]) -> (f64, f64) {
    let (mut absolute, mut relative) = (0.0, 0.0);
    for (x, y) in original.iter().zip(back) {
        let error = f64::from((x - y).abs());
        absolute += error;
        relative += error / (f64::from(x.abs()) + 1e-8);
    }
    (absolute / original.len() as f64, relative / original.len() as f64)
}

/// The mean errors of N(0, 1) that bitsandbytes measures in its own tests (200 samples of 1024 x 1024 on a GPU):
/// (blocksize, absolute, its standard deviation, relative, its standard deviation).
const NF4_ERRORS: [(usize, f64, f64, f64, f64); 8] = [
    (32, 0.067746, 0.000069, 0.189726, 0.000304),
    (64, 0.072798, 0.000074, 0.203339, 0.000340),
    (128, 0.076831, 0.000091, 0.215237, 0.000391),
    (256, 0.080337, 0.000102, 0.226105, 0.000398),
    (512, 0.083547, 0.000143, 0.236079, 0.000544),
    (1024, 0.086610, 0.000187, 0.245370, 0.000600),
    (2048, 0.089592, 0.000251, 0.254163, 0.000747),
    (4096, 0.092547, 0.000360, 0.262473, 0.000999),
];
const FP4_ERRORS: [(usize, f64, f64, f64, f64); 8] = [
    (32, 0.088925, 0.000091, 0.242443, 0.000330),
    (64, 0.096543, 0.000111, 0.260125, 0.000379),
    (128, 0.102969, 0.000134, 0.275817, 0.000433),
    (256, 0.108684, 0.000182, 0.289831, 0.000497),
    (512, 0.114115, 0.000234, 0.302881, 0.000583),
    (1024, 0.119333, 0.000320, 0.315000, 0.000757),
    (2048, 0.124556, 0.000455, 0.326607, 0.000955),
    (4096, 0.129536, 0.000612, 0.337169, 0.001239),
];

#[test]
fn errors_of_normal_weights_are_those_of_bitsandbytes() {
    let n = 1024;
    let values = normal(n * n, 1);
    for dtype in [SourceDtype::F32, SourceDtype::Bf16, SourceDtype::F16] {
        let data = narrow(&values, dtype);
        let original = widen(&data);
        for (quant_type, table) in [(QuantType::Nf4, NF4_ERRORS), (QuantType::Fp4, FP4_ERRORS)] {
            for (blocksize, absolute, absolute_sd, relative, relative_sd) in table {
                let config = QuantConfig { quant_type, blocksize, double_quant: false };
                let weight = Quantized4bit::quantize(&data, n, n, &config).unwrap();
                let (a, r) = mean_errors(&original, &widen(&weight.dequantize(dtype)));
                let what = format!("{dtype:?} {quant_type} blocksize {blocksize}: {a} and {r}");
                assert!((a - absolute).abs() < 7.0 * absolute_sd, "{what}, expected {absolute}");
                assert!((r - relative).abs() < 7.0 * relative_sd, "{what}, expected {relative}");
            }
        }
    }
}

#[test]
fn double_quantization_costs_little() {
    let n = 1024;
    let values = normal(n * n, 2);
    let errors = |double_quant| {
        let config = QuantConfig { double_quant, ..Default::default() };
        let weight = Quantized4bit::quantize_slice(&values, n, n, &config).unwrap();
        mean_errors(&values, &widen(&weight.dequantize(SourceDtype::F32)))
    };
    let ((plain, plain_relative), (double, double_relative)) = (errors(false), errors(true));
    assert!(double < plain * 1.002 && double_relative < plain_relative * 1.01, "{plain} and {double}");
}

/// Rows of any shape, with groups of any size.
fn integers() -> impl Strategy<Value = (Vec<f32>, usize, usize, IntConfig)> {
    let config =
        (any::<bool>(), prop::option::of(1..70usize), any::<bool>()).prop_map(|(four, group_size, zero_point)| {
            IntConfig { bits: if four { IntBits::Four } else { IntBits::Eight }, group_size, zero_point }
        });
    (1..9usize, 1..70usize, config).prop_flat_map(|(rows, cols, config)| {
        let element = prop_oneof![
            8 => -1e3f32..1e3,
            1 => Just(0.0f32),
            1 => (prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL).prop_map(|x| x.clamp(-8e37, 8e37)),
        ];
        let values = prop_oneof![
            4 => prop::collection::vec(element.clone(), rows * cols),
            1 => element.prop_map(move |value| vec![value; rows * cols]),
        ];
        (values, Just(rows), Just(cols), Just(config))
    })
}

proptest! {
    #[test]
    fn integers_come_back_within_half_a_step((values, rows, cols, config) in integers()) {
        let weight = QuantizedInt::quantize(&PlainData::F32(values.clone()), rows, cols, &config).unwrap();
        let mut back = vec![f32::NAN; rows * cols];
        weight.dequantize_rows(0..rows, &mut back);
        let group_size = config.group_size.unwrap_or(cols).min(cols);
        let parts = weight.parts();
        for (i, (x, back)) in values.iter().zip(&back).enumerate() {
            let group = i / cols * weight.groups() + i % cols / group_size;
            let step = parts.scales[group];
            let bound = 0.5 * step * (1.0 + 1e-4) + 4.0 * f32::EPSILON * x.abs() + f32::MIN_POSITIVE;
            prop_assert!((x - back).abs() <= bound, "{x} came back as {back}, step {step}");
            prop_assert!(*x != 0.0 || *back == 0.0, "zero came back as {back}");
            let code = weight.code(i / cols, i % cols);
            let zero = parts.zeros.as_ref().map_or(0.0, |zeros| zeros[group]);
            prop_assert_eq!((f32::from(code) - zero) * step, *back);
        }
        let groups = rows * cols.div_ceil(group_size);
        let per_group = if config.zero_point { 8 } else { 4 };
        prop_assert_eq!(weight.bytes(), config.bits.bytes(rows * cols) + groups * per_group);
        prop_assert_eq!(&QuantizedInt::from_parts(parts.clone()).unwrap(), &weight);
    }
}
