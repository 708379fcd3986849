//! Products with frozen weights: `cargo bench -p qlora-kernels --bench frozen_linear`.
//!
//! `plain` is the product with a weight that is f32 in memory already; `whole` dequantizes into an f32 buffer first.

mod common;

use candle_core::Device;
use common::{chosen, fastest, matmul_ceiling, random};
use half::bf16;
use qlora_kernels::ops::{frozen_linear, matmul};
use qlora_kernels::weight::{FrozenWeight, PlainData, PlainWeight};
use qlora_kernels::{View, ViewMut, Workspace};

fn main() {
    let ceiling = matmul_ceiling();
    println!("plain matmul of 1024 x 1024: {ceiling:.0} GFLOP/s; GFLOP/s and share of it\n");
    println!("rows x cols   tokens | y = x W^T: plain     whole      ours | dx = dy W: plain     whole      ours");
    for (rows, cols) in [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096)] {
        for tokens in [1, 2, 4, 8, 16, 512, 2048] {
            if chosen(&format!("{rows} x {cols} {tokens}")) {
                bench(rows, cols, tokens, ceiling);
            }
        }
    }
}

fn bench(rows: usize, cols: usize, tokens: usize, ceiling: f64) {
    let workspace = Workspace::new(&Device::Cpu).unwrap();
    let data = random(rows * cols, 1);
    let weight = PlainWeight::new(PlainData::Bf16(data.iter().map(|&x| bf16::from_f32(x)).collect()), rows, cols);
    let (x, dy) = (random(tokens * cols, 2), random(tokens * rows, 3));
    let (x, dy) = (View::new(&x, tokens, cols), View::new(&dy, tokens, rows));
    let mut outputs: Vec<Vec<f32>> = [rows, rows, rows, cols, cols, cols].map(|n| vec![0.0; n * tokens]).into();
    let [y0, y1, y2, dx0, dx1, dx2] = &mut outputs[..] else { unreachable!() };
    let plain = View::new(&data, rows, cols);
    let (mut buffer0, mut buffer1) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
    let flop = 2.0 * (rows * cols * tokens) as f64;
    let rounds = (30e9 / flop).clamp(5.0, 300.0) as usize;
    let times = fastest(
        rounds,
        &mut [
            &mut || matmul::nt(x, plain, ViewMut::new(y0, tokens, rows), 1.0, 0.0).unwrap(),
            &mut || {
                weight.dequantize_rows(0..rows, &mut buffer0);
                matmul::nt(x, View::new(&buffer0, rows, cols), ViewMut::new(y1, tokens, rows), 1.0, 0.0).unwrap();
            },
            &mut || frozen_linear::forward(x, &weight, ViewMut::new(y2, tokens, rows), 0.0, &workspace).unwrap(),
            &mut || matmul::nn(dy, plain, ViewMut::new(dx0, tokens, cols), 1.0, 0.0).unwrap(),
            &mut || {
                weight.dequantize_rows(0..rows, &mut buffer1);
                matmul::nn(dy, View::new(&buffer1, rows, cols), ViewMut::new(dx1, tokens, cols), 1.0, 0.0).unwrap();
            },
            &mut || frozen_linear::backward(dy, &weight, ViewMut::new(dx2, tokens, cols), 0.0, &workspace).unwrap(),
        ],
    );
    let cell = |seconds: f64| format!("{:>5.0} {:>3.0}%", flop / seconds / 1e9, 100.0 * flop / seconds / 1e9 / ceiling);
    let cells: Vec<String> = times.into_iter().map(cell).collect();
    println!("{rows:>4} x {cols:<4} {tokens:>8} | {} | {}", cells[..3].join(" "), cells[3..].join(" "));
}
