//! 4-bit weights: quantized on the GPU with the CPU's bytes, dequantized with the CPU's bits.

use qlora_kernels::cuda::CudaWeight;
use qlora_kernels::quant::{BLOCKSIZES, IntBits, IntConfig, QuantConfig, QuantType, Quantized4bit, QuantizedInt};
use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::{Dtype, Workspace};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::harness::{dtypes, gpu, half, normal, plain, round, same_bits};

fn configs() -> impl Iterator<Item = QuantConfig> {
    [QuantType::Nf4, QuantType::Fp4].into_iter().flat_map(|quant_type| {
        BLOCKSIZES.into_iter().flat_map(move |blocksize| {
            [false, true].map(|double_quant| QuantConfig { quant_type, blocksize, double_quant })
        })
    })
}

const SHAPES: [(usize, usize); 7] = [(1, 1), (3, 7), (97, 53), (64, 64), (100, 641), (512, 576), (4, 20_001)];

/// Weights as they are, and what the format's corners are: zeros, blocks of zeros, ties, subnormals, huge values.
fn values(len: usize, corners: bool, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let value = |i: usize, rng: &mut ChaCha8Rng| match (corners, (i / 200) % 6) {
        (true, 0) => 0.0,
        (true, 1) => rng.random_range(-2.0f32..2.0) * 2f32.powi(rng.random_range(-90..90)),
        (true, 2) => f32::from_bits(rng.random_range(0..0x0100_0000)),
        (true, 3) => [0.0, -0.0, 1.0, -1.0, 0.5, 0.25, -0.125][i % 7],
        _ => 0.02 * normal(rng),
    };
    (0..len).map(|i| value(i, &mut rng)).collect()
}

#[test]
fn the_gpu_quantizes_to_the_bytes_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let workspace = Workspace::poisoned_on(&device, half(&device)).unwrap();
    let mut cases = 0;
    for dtype in dtypes(&device) {
        for (rows, cols) in SHAPES {
            for corners in [false, true] {
                // f16 does not hold the largest ones.
                let values: Vec<f32> =
                    values(rows * cols, corners, 5).iter().map(|x| x.clamp(-60_000.0, 60_000.0)).collect();
                let data = plain(&values, dtype);
                for config in configs() {
                    let label = format!("{} {rows} x {cols}, corners {corners}, {config:?}", dtype.name());
                    let want = Quantized4bit::quantize(&data, rows, cols, &config).unwrap();
                    let weight = CudaWeight::quantize(&data, rows, cols, &config, &workspace).unwrap();
                    // The CPU counts the offset of the absmax values too.
                    assert!(want.bytes() - weight.bytes() <= 4, "{label}: {} bytes", weight.bytes());
                    let got = weight.to_quantized(dtype).unwrap().unwrap();
                    if got != want {
                        let differ = got.codes().iter().zip(want.codes()).filter(|(a, b)| a != b).count();
                        panic!(
                            "{label}: {differ} bytes of codes differ, absmax equal: {}",
                            got.absmax() == want.absmax()
                        );
                    }
                    cases += 1;
                }
            }
        }
    }
    println!("quantize: {cases} weights, all bytes equal");
}

#[test]
fn the_gpu_dequantizes_to_the_bits_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut cases = 0;
    for (rows, cols) in SHAPES {
        let data = plain(&values(rows * cols, true, 6), Dtype::F32);
        for config in configs() {
            let weight = Quantized4bit::quantize(&data, rows, cols, &config).unwrap();
            for dtype in dtypes(&device) {
                let label = format!("{} {rows} x {cols}, {config:?}", dtype.name());
                let workspace = Workspace::poisoned_on(&device, dtype).unwrap();
                let on_gpu = CudaWeight::quantized(&weight, &workspace).unwrap();
                assert_eq!([on_gpu.rows(), on_gpu.cols()], [rows, cols]);
                let mut want = vec![0.0; rows * cols];
                weight.dequantize(dtype).to_f32(0..rows * cols, &mut want);
                // Whole, without and with gaps between the rows, and rows from the middle.
                for (gap, first) in [(0, 0), (3, 0), (0, rows / 2), (8, rows / 3)] {
                    let count = rows - first;
                    let mut target = workspace.matrix(count, gap + cols + gap).unwrap();
                    let window = target.view_mut().slice_cols(gap..gap + cols);
                    on_gpu.dequantize_into(first, window.cuda("test").unwrap()).unwrap();
                    let got = target.view().slice_cols(gap..gap + cols).to_vec().unwrap();
                    assert!(same_bits(&got, &want[first * cols..]), "{label}, gap {gap}, from row {first}");
                    let all = target.to_vec().unwrap();
                    let around =
                        all.chunks_exact(cols + 2 * gap).flat_map(|row| row[..gap].iter().chain(&row[gap + cols..]));
                    assert!(around.into_iter().all(|x| x.is_nan()), "{label}: written beside the window");
                }
                let (mut got, mut want) = (vec![f32::NAN; cols], vec![f32::NAN; cols]);
                on_gpu.dequantize_rows(rows / 2..rows / 2 + 1, &mut got);
                weight.dequantize_rows(rows / 2..rows / 2 + 1, &mut want);
                assert!(same_bits(&got, &want), "{label}, dequantize_rows");
                cases += 1;
            }
        }
    }
    println!("dequantize: {cases} weights, all bits equal");
}

#[test]
fn a_weight_comes_back_from_the_gpu_as_it_went() {
    let Some(device) = gpu() else { return };
    let workspace = Workspace::poisoned_on(&device, half(&device)).unwrap();
    for config in configs() {
        let weight = Quantized4bit::quantize(&plain(&values(97 * 53, false, 7), Dtype::F16), 97, 53, &config).unwrap();
        let on_gpu = CudaWeight::quantized(&weight, &workspace).unwrap();
        assert!(on_gpu.to_quantized(Dtype::F16).unwrap().unwrap() == weight);
    }
}

#[test]
fn values_that_cannot_be_quantized_are_named_as_on_the_cpu() {
    let Some(device) = gpu() else { return };
    let workspace = Workspace::poisoned_on(&device, half(&device)).unwrap();
    for double_quant in [false, true] {
        let config = QuantConfig { double_quant, ..QuantConfig::default() };
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38] {
            for at in [0, 70, 20_001, 39_999] {
                let mut values = values(40_000, false, 8);
                (values[at], values[39_999]) = (bad, bad);
                let data = plain(&values, Dtype::F32);
                let want = Quantized4bit::quantize(&data, 400, 100, &config).unwrap_err().to_string();
                let got = CudaWeight::quantize(&data, 400, 100, &config, &workspace).unwrap_err().to_string();
                assert_eq!(got, want);
            }
        }
    }
    let data = plain(&[1.0; 6], Dtype::F32);
    let config = QuantConfig { blocksize: 48, ..QuantConfig::default() };
    let error = CudaWeight::quantize(&data, 2, 3, &config, &workspace).unwrap_err().to_string();
    assert!(error.contains("blocksize 48 is not one of"), "{error}");
    let error = CudaWeight::quantize(&data, 2, 4, &QuantConfig::default(), &workspace).unwrap_err().to_string();
    assert_eq!(error, "quantize_4bit: got 6 elements for 2 x 4");
}

#[test]
fn integer_weights_have_the_values_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let dtype = half(&device);
    let workspace = Workspace::poisoned_on(&device, dtype).unwrap();
    let mut cases = 0;
    for (rows, cols) in [(33, 128), (40, 96), (7, 35), (64, 1024)] {
        let data = plain(&values(rows * cols, false, 9), Dtype::Bf16);
        let mut weights = vec![
            QuantizedInt::llm_int8(&data, rows, cols, 6.0, &[]).unwrap(),
            QuantizedInt::llm_int8(&data, rows, cols, 6.0, &[0, 5, cols as u32 - 1]).unwrap(),
        ];
        for bits in [IntBits::Four, IntBits::Eight] {
            for group_size in [16, 32, cols] {
                for zero_point in [false, true] {
                    let config = IntConfig { bits, group_size: Some(group_size), zero_point };
                    let Ok(weight) = QuantizedInt::quantize(&data, rows, cols, &config) else { continue };
                    let groups = weight.groups();
                    let mut parts = weight.parts().clone();
                    parts.group_of = Some((0..cols).map(|col| (col * 7 % groups) as u16).collect());
                    weights.extend([weight, QuantizedInt::from_parts(parts).unwrap()]);
                }
            }
        }
        for weight in weights {
            let on_gpu = CudaWeight::integers(&weight, &workspace).unwrap();
            assert!(on_gpu.bytes() >= weight.parts().codes.len());
            let (mut want, mut got) = (vec![f32::NAN; rows * cols], vec![f32::NAN; rows * cols]);
            weight.dequantize_rows(0..rows, &mut want);
            on_gpu.dequantize_rows(0..rows, &mut got);
            let differ = want.iter().zip(&got).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            assert_eq!(differ, 0, "{rows}x{cols} {weight:?}");
            let mut half = workspace.matrix(rows, cols).unwrap();
            on_gpu.dequantize(half.view_mut()).unwrap();
            let rounded: Vec<f32> = want.iter().map(|&x| round(x, dtype)).collect();
            assert!(half.to_vec().unwrap() == rounded, "{rows}x{cols} {weight:?} in {}", dtype.name());
            cases += 1;
        }
    }
    println!("integer weights: {cases} cases, no bit differs");
    assert!(cases > 40);
}
