//! Attention over packed sequences, forward, backward and with a cache.

use qlora_kernels::ops::attention::{self, AttentionConfig};
use qlora_kernels::{Dtype, Result, SequenceLayout};

use crate::harness::{Output, Report, Side, dtypes, gpu, halves, new_gpu, output, same_bits, within};

/// Query heads, key/value heads, elements of a head: those with tensor-core kernels first.
const HEADS: [(usize, usize, usize); 7] =
    [(4, 2, 64), (3, 3, 96), (8, 2, 128), (9, 3, 64), (2, 1, 80), (4, 4, 32), (2, 1, 5)];

pub(crate) fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-4,
        Dtype::F16 => 2e-3,
        Dtype::Bf16 => 1e-2,
    }
}

pub(crate) fn config((heads, kv_heads, head_dim): (usize, usize, usize), window: Option<usize>) -> AttentionConfig {
    AttentionConfig { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), window }
}

/// q, k and v are the columns of one matrix, as in the model; `gap` breaks or keeps alignment.
pub(crate) fn run(side: &Side, cfg: &AttentionConfig, lengths: &[usize], gap: usize) -> Result<Vec<Output>> {
    run_with(side, cfg, lengths, gap, &|| {})
}

/// [`run`] with something between the forward and the backward.
pub(crate) fn run_with(
    side: &Side,
    cfg: &AttentionConfig,
    lengths: &[usize],
    gap: usize,
    between: &dyn Fn(),
) -> Result<Vec<Output>> {
    let layout = SequenceLayout::from_lengths(lengths);
    let (tokens, q_width, kv_width) = (layout.tokens(), cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    let (q_end, k_end, v_end) = (q_width, q_width + kv_width, q_width + 2 * kv_width);
    let qkv = side.input(tokens, v_end, gap);
    let [q, k, v] = [0..q_end, q_end..k_end, k_end..v_end].map(|columns| qkv.view().slice_cols(columns));
    let mut out = side.output(tokens, q_width, gap);
    let mut lse = side.workspace.matrix_f32(tokens, cfg.heads)?;
    let order = attention::forward(cfg, q, k, v, &layout, out.view_mut(), lse.view_mut(), &side.workspace)?;
    between();
    let dout = side.input(tokens, q_width, gap);
    let mut dqkv = side.output(tokens, v_end, gap);
    let (dq, rest) = dqkv.view_mut().split_cols(q_end);
    let (dk, dv) = rest.split_cols(kv_width);
    let (out_view, lse_view) = (out.view(), lse.view());
    attention::backward(cfg, q, k, v, out_view, lse_view, order, dout.view(), &layout, dq, dk, dv, &side.workspace)?;
    let gradient = dqkv.to_vec();
    // Where every token sees itself alone, dq and dk are 0 up to rounding: they are measured beside dout.
    let alone = cfg.window == Some(1) || layout.max_len() == 1;
    let scale = if alone { dout.to_vec() } else { Vec::new() };
    let columns = |range: std::ops::Range<usize>| -> Vec<f32> {
        let rows = gradient.chunks_exact(v_end).flat_map(|row| row[range.clone()].to_vec());
        rows.chain(scale.iter().copied()).collect()
    };
    Ok(vec![
        output("out", out.to_vec()),
        within("lse", 1e-4, lse.to_vec()?),
        output("dq", columns(0..q_end)),
        output("dk", columns(q_end..k_end)),
        output("dv", columns(k_end..v_end)),
    ])
}

const LENGTHS: [&[usize]; 6] = [&[1], &[7], &[64], &[130, 1, 63], &[257, 3], &[5, 5, 300, 2]];

fn compare_all(report: &mut Report, device: &candle_core::Device) {
    for dtype in dtypes(device) {
        for heads in HEADS {
            for lengths in LENGTHS {
                for window in [None, Some(1), Some(17), Some(64)] {
                    for gap in [0, 3] {
                        let cfg = config(heads, window);
                        let label = format!("{heads:?}, lengths {lengths:?}, window {window:?}, gap {gap}");
                        report.compare(device, dtype, &label, |side| run(side, &cfg, lengths, gap));
                    }
                }
            }
        }
    }
}

#[test]
fn attention_agrees_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::with_tolerance("attention", tolerance);
    compare_all(&mut report, &device);
    report.finish();
}

#[test]
fn deterministic_attention_agrees_with_the_cpu_and_with_itself() {
    // The mode belongs to the device.
    let Some(device) = new_gpu() else { return };
    let gpu = qlora_kernels::cuda::Gpu::of(&device).unwrap();
    gpu.set_deterministic(true);
    let mut report = Report::with_tolerance("deterministic attention", tolerance);
    compare_all(&mut report, &device);
    for dtype in dtypes(&device) {
        for heads in HEADS {
            for lengths in [&[1000, 24, 500][..], &[777], &[1024, 1024]] {
                let go = || run(&Side::gpu(&device, dtype, 4), &config(heads, None), lengths, 0).unwrap();
                let first = go();
                for second in [go(), go()] {
                    let same = first.iter().zip(&second).all(|(a, b)| same_bits(&a.to_f32(), &b.to_f32()));
                    report.check(dtype, &format!("{heads:?}, {lengths:?}"), same, "two runs differ");
                }
            }
        }
    }
    report.finish();
}

#[test]
fn large_scores_do_not_overflow() {
    let Some(device) = gpu() else { return };
    let mut report = Report::with_tolerance("attention with large scores", tolerance);
    for dtype in dtypes(&device) {
        for heads in HEADS {
            let cfg = AttentionConfig { scale: 40.0, ..config(heads, None) };
            report.compare(&device, dtype, &format!("{heads:?}"), |side| {
                let results = run(side, &cfg, &[70, 20], 0)?;
                // The softmax is nearly one-hot: gradients are differences, the outputs are not.
                Ok(results.into_iter().filter(|result| matches!(result.name(), "out" | "lse" | "dv")).collect())
            });
        }
    }
    report.finish();
}

#[test]
fn cached_attention_agrees_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::with_tolerance("cached attention", tolerance);
    for dtype in dtypes(&device) {
        for heads in HEADS {
            for (queries, positions) in [(1, 1), (1, 77), (5, 130), (64, 64), (1, 1000), (70, 200)] {
                for window in [None, Some(1), Some(50)] {
                    let cfg = config(heads, window);
                    let label = format!("{heads:?}, {queries} of {positions}, window {window:?}");
                    report.compare(&device, dtype, &label, |side| {
                        let (q_width, kv_width) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
                        let q = side.input(queries, q_width, 0);
                        let (k, v) = (side.input(positions, kv_width, 0), side.input(positions, kv_width, 0));
                        let mut out = side.output(queries, q_width, 0);
                        attention::cached(&cfg, q.view(), k.view(), v.view(), out.view_mut(), &side.workspace)?;
                        Ok(vec![output("out", out.to_vec())])
                    });
                }
            }
        }
    }
    report.finish();
}

#[test]
fn long_sequences_agree_with_the_cpu_with_and_without_cudnn() {
    // Whether cuDNN may be used belongs to the device.
    let Some(device) = new_gpu() else { return };
    let gpu = qlora_kernels::cuda::Gpu::of(&device).unwrap();
    for enabled in [true, false] {
        gpu.attention().set_enabled(enabled);
        let name = if enabled { "long sequences" } else { "long sequences without cuDNN" };
        let mut report = Report::with_tolerance(name, tolerance);
        for dtype in halves(&device) {
            for heads in &HEADS[..4] {
                for (lengths, window) in
                    [(&[1024][..], None), (&[1500, 1500], None), (&[1030, 1030], Some(1030)), (&[1200], Some(300))]
                {
                    let label = format!("{heads:?}, lengths {lengths:?}, window {window:?}");
                    report.compare(&device, dtype, &label, |side| {
                        let results = run(side, &config(*heads, window), lengths, 0)?;
                        // cuDNN lays its statistics out in another order.
                        Ok(results.into_iter().filter(|result| result.name() != "lse").collect())
                    });
                }
            }
        }
        println!("attention by {}", gpu.attention().describe());
        report.finish();
    }
}
