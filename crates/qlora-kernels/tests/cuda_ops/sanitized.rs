//! A little of every operation: what compute-sanitizer (memcheck, racecheck, initcheck) gets through in a minute.

use qlora_kernels::Dtype;
use qlora_kernels::cuda::CudaWeight;
use qlora_kernels::ops::adamw::{self, AdamW};
use qlora_kernels::ops::dropout::{self, Dropout};
use qlora_kernels::ops::rope::{self, RopeConfig, RopeTable};
use qlora_kernels::ops::{embedding, grad_norm, linear_cross_entropy, rms_norm, swiglu};
use qlora_kernels::quant::QuantConfig;
use qlora_kernels::sequence::Positions;

use crate::harness::{Kind, Report, Side, dtypes, half, new_gpu, number, output, plain, within};
use crate::{adapter_rows, attention, few_tokens, int8, linear_group};

#[test]
fn a_little_of_everything() {
    let Some(device) = new_gpu() else { return };
    let mut report = Report::with_tolerance("a little attention", attention::tolerance);
    for deterministic in [false, true] {
        qlora_kernels::cuda::Gpu::of(&device).unwrap().set_deterministic(deterministic);
        for heads in [(2, 1, 64), (1, 1, 96), (2, 2, 128), (2, 1, 20)] {
            for dtype in [Dtype::F32, half(&device)] {
                report.compare(&device, dtype, &format!("{heads:?}"), |side| {
                    attention::run(side, &attention::config(heads, Some(70)), &[130, 1, 37], 0)
                });
            }
        }
    }
    report.finish();
    let mut report = Report::new("everything");
    let nf4 = Kind::Bits4(QuantConfig::default());
    for dtype in dtypes(&device) {
        for (members, inputs) in [(&[(48, 4, true), (16, 0, false), (33, 3, false)][..], 65), (&[(40, 16, false)], 64)]
        {
            let case = linear_group::Case {
                kind: nf4,
                tokens: 19,
                inputs,
                members,
                margins: true,
                residual: false,
                dropout: Some((0.2, 1)),
                cached: false,
                split: false,
            };
            report.compare(&device, dtype, "linear_group", |side| linear_group::run(side, &case));
        }
        for (rows, cols, gap) in [(5, 64, 0), (3, 33, 3), (2, 2056, 8)] {
            report.compare(&device, dtype, &format!("{rows} x {cols}, gap {gap}"), |side| small(side, rows, cols, gap));
        }
    }
    let members: &[(usize, usize, bool)] = &[(40, 4, false), (40, 3, false)];
    for (tokens, inputs) in [(1, 64), (9, 320), (20, 320)] {
        report.compare(&device, half(&device), &format!("{tokens} tokens"), |side| {
            few_tokens::products(side, QuantConfig::default(), [tokens, inputs], members)
        });
    }
    let all = adapter_rows::Does { rank: 5, gain: true, bias: true, weight: true };
    let parts = [(0..1, all), (2..5, adapter_rows::Does { rank: 40, ..Default::default() }), (5..80, all)];
    for (dtype, kind, inputs) in [(half(&device), nf4, 64), (Dtype::F32, Kind::Plain(Dtype::F32), 65)] {
        let layers: &[_] = &[(48, true), (33, false)];
        for (tokens, parts) in [(6, &parts[..2]), (81, &parts)] {
            let case = adapter_rows::Case { kind, tokens, inputs, layers, parts, residual: true, gap: 3 };
            report.compare(&device, dtype, "adapter_rows", |side| adapter_rows::run(side, &case));
        }
        report.compare(&device, dtype, "adapter_tokens", |side| adapter_rows::tokens(side, 5, [61, 33, 3]));
        report.compare(&device, dtype, "int8", |side| int8::layer(side, [7, 33, 65, 3], 6.0, &[2, 9]));
        report.compare(&device, dtype, "int8 group", |side| int8::group(side, 9, true));
    }
    let on_gpu = qlora_kernels::cuda::Gpu::of(&device).unwrap();
    report.compare(&device, Dtype::F16, "decode", |side| {
        let cfg = attention::config((4, 2, 64), Some(50));
        few_tokens::step(side, &cfg, &[130, 0, 7], side.is_gpu().then_some(&*on_gpu))
    });
    for (rows, cols) in [(3, 7), (20, 320)] {
        for double_quant in [false, true] {
            let side = Side::gpu(&device, half(&device), 1);
            let data = plain(&side.values(rows * cols, 1.0), Dtype::Bf16);
            let config = QuantConfig { double_quant, ..QuantConfig::default() };
            CudaWeight::quantize(&data, rows, cols, &config, &side.workspace).unwrap();
        }
    }
    report.finish();
}

fn small(side: &Side, rows: usize, cols: usize, gap: usize) -> qlora_kernels::Result<Vec<crate::harness::Output>> {
    let (mut x, delta, dy) = (side.input(rows, cols, gap), side.input(rows, cols, gap), side.input(rows, cols, gap));
    let (weight, mut rstd, mut y) =
        (side.vector(cols, 1.0, 0.3), side.vector_output(rows), side.output(rows, cols, gap));
    rms_norm::forward_residual(x.view_mut(), delta.view(), weight.view(), 1e-5, y.view_mut(), rstd.view_mut())?;
    let mut dx = side.output(rows, cols, gap);
    rms_norm::backward(x.view(), weight.view(), rstd.view(), dy.view(), dx.view_mut(), false)?;
    let mut results = vec![output("norm", y.to_vec()), output("norm dx", dx.to_vec())];

    let (mut gate, mut up, mut h) =
        (side.input(rows, cols, gap), side.input(rows, cols, gap), side.output(rows, cols, gap));
    swiglu::forward(gate.view(), up.view(), h.view_mut())?;
    swiglu::backward_in_place(gate.view_mut(), up.view_mut(), h.view_mut())?;
    results.extend([output("d gate", gate.to_vec()), output("d up", up.to_vec())]);

    let mut dropped = side.output(rows, cols, gap);
    dropout::forward(&Dropout { p: 0.3, seed: 1, stream: 2, first_row: 7 }, dy.view(), dropped.view_mut())?;
    results.push(output("dropout", dropped.to_vec()));

    let head_dim = if cols.is_multiple_of(32) { 32 } else { cols / 2 * 2 };
    if cols.is_multiple_of(head_dim) {
        let table = RopeTable::new(&RopeConfig { theta: 1e4, scaling: None }, head_dim, 16)?;
        let positions: Positions = (0..rows as u32).map(|row| row * 3).collect::<Vec<_>>().into();
        rope::forward(dropped.view_mut(), head_dim, &table, &positions)?;
        results.push(output("rope", dropped.to_vec()));
    }

    let head = side.weight(Kind::Bits4(QuantConfig::default()), 61, cols);
    let hidden = side.input(rows, cols, gap);
    let targets: Vec<i64> = (0..rows as i64).map(|row| if row == 1 { -100 } else { row * 7 }).collect();
    let mut dhidden = side.output(rows, cols, gap);
    let (input, out) = (hidden.view(), dhidden.view_mut());
    let loss = linear_cross_entropy::forward_backward(input, &*head, &targets, rows, out, &side.workspace)?;
    results.extend([number("loss", loss.sum), output("dhidden", dhidden.to_vec())]);
    let mut rows_of_head = side.output(2, cols, gap);
    embedding::forward(&[60, 3], &*head, rows_of_head.view_mut())?;
    results.push(output("embedding", rows_of_head.to_vec()));

    let len = rows * cols;
    let (mut param, grad) = (side.vector(len, 0.0, 1.0), side.vector(len, 0.0, 0.1));
    let (mut m, mut v) = (side.workspace.zeros_f32(1, len)?, side.workspace.zeros_f32(1, len)?);
    let config = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    adamw::step(&config, 1, 0.5, param.view_mut(), grad.view(), m.view_mut(), v.view_mut())?;
    assert_eq!(grad_norm::first_non_finite(grad.view())?, None);
    results.extend([within("param", 1e-6, param.to_vec()?), number("grad norm", grad_norm::global_norm(grad.view())?)]);
    Ok(results)
}
