//! Attention, forward, backward and from a cache: `cargo bench -p qlora-kernels --bench attention`.
//!
//! Arithmetic is counted as that of the visible pairs: `4 * head_dim` a pair and head forward, `10 * head_dim` backward.

mod common;

use candle_core::Device;
use common::{chosen, fastest, matmul_ceiling, random};
use qlora_kernels::ops::attention::{self, AttentionConfig};
use qlora_kernels::{SequenceLayout, View, Workspace};

fn main() {
    let ceiling = matmul_ceiling();
    println!("plain matmul: {ceiling:.0} GFLOP/s\n");
    println!("heads/kv/dim   sequences   forward ms  GFLOP/s  share | backward ms  GFLOP/s  share");
    for (heads, kv_heads, head_dim, window, lengths) in [
        (9, 3, 64, None, vec![256; 2]),
        (9, 3, 64, None, vec![512]),
        (9, 3, 64, None, vec![2048]),
        (9, 3, 64, None, vec![8192]),
        (9, 3, 64, Some(512), vec![8192]),
        (9, 3, 64, None, vec![37; 14]),
        (32, 8, 128, None, vec![2048]),
    ] {
        let cfg = AttentionConfig { heads, kv_heads, head_dim, scale: 0.125, window };
        bench(&cfg, &lengths, ceiling);
    }
    println!("\ncached, 9/3/64: microseconds for one new token");
    let cfg = AttentionConfig { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, window: None };
    for n in [64, 512, 2048, 8192] {
        let workspace = Workspace::new(&Device::Cpu).unwrap();
        let (q, k, v) = (random(576, 1), random(n * 192, 2), random(n * 192, 3));
        let mut out = workspace.matrix(1, 576).unwrap();
        let mut run = || {
            let (q, k, v) = (View::new(&q, 1, 576), View::new(&k, n, 192), View::new(&v, n, 192));
            attention::cached(&cfg, q, k, v, out.view_mut(), &workspace).unwrap();
        };
        let seconds = fastest(200, &mut [&mut run])[0];
        let bytes = (2 * n * 192 * 4) as f64;
        println!("{n:>6} positions: {:>8.1}  ({:.1} GB/s)", seconds * 1e6, bytes / seconds / 1e9);
    }
}

fn bench(cfg: &AttentionConfig, lengths: &[usize], ceiling: f64) {
    let sequences =
        format!("{} x {}{}", lengths.len(), lengths[0], cfg.window.map_or(String::new(), |w| format!(" w{w}")));
    if !chosen(&sequences) {
        return;
    }
    let workspace = Workspace::new(&Device::Cpu).unwrap();
    let layout = SequenceLayout::from_lengths(lengths);
    let (tokens, wide, narrow) = (layout.tokens(), cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    let (q, k, v, dout) =
        (random(tokens * wide, 1), random(tokens * narrow, 2), random(tokens * narrow, 3), random(tokens * wide, 4));
    let q = View::new(&q, tokens, wide);
    let (k, v) = (View::new(&k, tokens, narrow), View::new(&v, tokens, narrow));
    let dout = View::new(&dout, tokens, wide);
    let (mut out, mut lse) = (workspace.matrix(tokens, wide).unwrap(), workspace.matrix(tokens, cfg.heads).unwrap());
    let (mut dq, mut dk, mut dv) = (
        workspace.matrix(tokens, wide).unwrap(),
        workspace.matrix(tokens, narrow).unwrap(),
        workspace.matrix(tokens, narrow).unwrap(),
    );
    let order = attention::forward(cfg, q, k, v, &layout, out.view_mut(), lse.view_mut(), &workspace).unwrap();
    let (saved_out, saved_lse) = (out.as_slice().to_vec(), lse.as_slice().to_vec());
    let mut forward = || {
        let (out, lse) = (out.view_mut(), lse.view_mut());
        assert_eq!(attention::forward(cfg, q, k, v, &layout, out, lse, &workspace).unwrap(), order);
    };
    let (saved_out, saved_lse) = (View::new(&saved_out, tokens, wide), View::new(&saved_lse, tokens, cfg.heads));
    let mut backward = || {
        let (dq, dk, dv) = (dq.view_mut(), dk.view_mut(), dv.view_mut());
        attention::backward(cfg, q, k, v, saved_out, saved_lse, order, dout, &layout, dq, dk, dv, &workspace).unwrap();
    };
    let window = cfg.window.unwrap_or(usize::MAX);
    let pairs: usize = lengths.iter().map(|&n| (1..=n).map(|i| i.min(window)).sum::<usize>()).sum();
    let rounds = (2_000_000_000 / (pairs * wide)).clamp(3, 60);
    let times = fastest(rounds, &mut [&mut forward, &mut backward]);
    let flop = (pairs * wide) as f64 / 1e9;
    let rates = [4.0 * flop / times[0], 10.0 * flop / times[1]];
    let shape = format!("{}/{}/{}", cfg.heads, cfg.kv_heads, cfg.head_dim);
    let sequences =
        format!("{} x {}{}", lengths.len(), lengths[0], cfg.window.map_or(String::new(), |w| format!(" w{w}")));
    println!(
        "{shape:<12} {sequences:<13} {:>9.2} {:>8.0} {:>5.0}% | {:>10.2} {:>8.0} {:>5.0}%",
        times[0] * 1e3,
        rates[0],
        100.0 * rates[0] / ceiling,
        times[1] * 1e3,
        rates[1],
        100.0 * rates[1] / ceiling,
    );
}
