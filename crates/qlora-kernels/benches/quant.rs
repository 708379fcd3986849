//! Nanoseconds an element of 4-bit quantization and dequantization.
//!
//!     cargo bench -p qlora-kernels --bench quant

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use qlora_kernels::quant::{QuantConfig, QuantType, Quantized4bit, SourceDtype};
use qlora_kernels::weight::{FrozenWeight, PlainData};

const ROWS: usize = 1536;
const COLS: usize = 2048;

/// The best of some runs, in ns an element.
fn time(label: &str, elements: usize, mut run: impl FnMut()) {
    let mut best = f64::INFINITY;
    for _ in 0..15 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    let nanoseconds = best * 1e9 / elements as f64;
    println!("{label:<58} {nanoseconds:7.3} ns/element {:8.2} GB/s of f32", 4.0 / nanoseconds);
}

fn main() {
    let values: Vec<f32> = (0..ROWS * COLS).map(|i| (i as f32 * 0.7).sin() * 0.03).collect();
    let narrow = PlainData::Bf16(values.iter().map(|&x| bf16::from_f32(x)).collect());
    let wide = PlainData::F32(values);
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for (blocksize, double_quant) in [(64, false), (64, true), (4096, false)] {
            let config = QuantConfig { quant_type, blocksize, double_quant };
            let name = format!("{quant_type} {blocksize}{}", if double_quant { " double" } else { "" });
            for (dtype, data) in [("f32", &wide), ("bf16", &narrow)] {
                let label = format!("quantize {dtype} to {name}, {} threads", rayon::current_num_threads());
                time(&label, ROWS * COLS, || {
                    black_box(Quantized4bit::quantize(data, ROWS, COLS, &config).unwrap());
                });
            }
            let weight = Quantized4bit::quantize(&wide, ROWS, COLS, &config).unwrap();
            // 16 rows (128 KiB) into the same buffer: what a tile of a matrix product reads.
            let mut tile = vec![0f32; 16 * COLS];
            time(&format!("dequantize_rows {name}, 16 rows at a time, 1 thread"), ROWS * COLS, || {
                for row in (0..ROWS).step_by(16) {
                    weight.dequantize_rows(row..row + 16, &mut tile);
                    black_box(&tile);
                }
            });
            let mut out = vec![0f32; ROWS * COLS];
            time(&format!("dequantize_rows {name}, whole, 1 thread"), ROWS * COLS, || {
                weight.dequantize_rows(0..ROWS, &mut out);
                black_box(&out);
            });
            time(&format!("dequantize to bf16 {name}, all threads"), ROWS * COLS, || {
                black_box(weight.dequantize(SourceDtype::Bf16));
            });
        }
    }
    let mut copy = vec![0f32; ROWS * COLS];
    let PlainData::F32(values) = &wide else { unreachable!() };
    time("copy f32 (for comparison), 1 thread", ROWS * COLS, || {
        copy.copy_from_slice(black_box(values));
        black_box(&copy);
    });
}
