//! A few tokens with 4-bit weights: read as they are stored on the GPU, like any others on the CPU. And what else a step of
//! generation runs.

use qlora_kernels::cuda::Gpu;
use qlora_kernels::cuda::decode::DecodeTables;
use qlora_kernels::ops::attention::{self, AttentionConfig};
use qlora_kernels::ops::linear_group::{AdapterPass, Group, InputNorm, LoraSlot, Member, margin};
use qlora_kernels::ops::rope::{self, RopeConfig, RopeTable};
use qlora_kernels::ops::{argmax, frozen_linear, rms_norm, swiglu};
use qlora_kernels::quant::{QuantConfig, QuantType};
use qlora_kernels::weight::WeightCache;
use qlora_kernels::{Dtype, Matrix, Result, Workspace};

use crate::harness::{Kind, Output, Report, Side, dtypes, gpu, halves, output, relative_error, tolerance};

/// A group of layers, each with outputs, rank and whether there is a bias; what `infer` writes.
pub(crate) fn products(
    side: &Side,
    quantization: QuantConfig,
    [tokens, inputs]: [usize; 2],
    members: &[(usize, usize, bool)],
) -> Result<Vec<Output>> {
    let workspace = &side.workspace;
    let weights: Vec<_> =
        members.iter().map(|&(rows, ..)| side.weight(Kind::Bits4(quantization), rows, inputs)).collect();
    let biases: Vec<_> = members.iter().map(|&(rows, ..)| side.vector(rows, 0.0, 1.0)).collect();
    let (mut slots, mut end) = (Vec::new(), 0);
    for &(rows, rank, _) in members {
        let (a, b) = (end..end + rank * inputs, end + rank * inputs..end + rank * (inputs + rows));
        end = b.end;
        slots.push((rank > 0).then_some(LoraSlot { a, b, rank, scale: 1.5, stream: 0, kind: Default::default() }));
    }
    let flat = side.vector(end.max(1), 0.0, 0.2);
    let members: Vec<Member> = (members.iter().zip(&weights).zip(&biases).zip(&slots))
        .map(|(((&(.., has_bias), weight), bias), slot)| Member {
            name: "",
            weight: &**weight,
            bias: has_bias.then(|| bias.view()),
            lora: slot.as_ref(),
        })
        .collect();
    let cache = WeightCache::default();
    let group = Group { members: &members, cache: &cache, split: false };
    let pass = AdapterPass::new(flat.view());
    let mut x = side.with_margin(tokens, inputs, margin(slots.iter().map(Option::as_ref)));
    let residual = side.input(tokens, group.outputs(), 0);
    let mut results = Vec::new();
    for (name, adapter, residual) in
        [("base", None, None), ("y", Some(&pass), None), ("y with a residual", Some(&pass), Some(residual.view()))]
    {
        let mut y = workspace.matrix(tokens, group.outputs())?;
        group.infer(x.view_mut(), adapter, residual, y.view_mut(), workspace)?;
        results.push(output(name, y.to_vec()?));
    }
    let weight = side.vector(inputs, 1.0, 0.2);
    let norm = InputNorm { weight: weight.view(), eps: 1e-5 };
    let mut normed = workspace.with_margin(tokens, inputs, margin(slots.iter().map(Option::as_ref)))?;
    let mut rstd = workspace.matrix_f32(tokens, 1)?;
    rms_norm::forward(x.view(), weight.view(), 1e-5, normed.view_mut(), rstd.view_mut())?;
    let mut y = workspace.matrix(tokens, group.outputs())?;
    let in_one = group.infer_normed(x.view(), &norm, Some(&pass), y.view_mut(), false, workspace)?;
    let adapted = slots.iter().any(Option::is_some);
    if tokens <= 16 {
        assert_eq!(in_one, workspace.gpu().is_some() && adapted && inputs <= 4096, "{tokens} x {inputs}");
    }
    if !in_one {
        group.infer(normed.view_mut(), Some(&pass), None, y.view_mut(), workspace)?;
    }
    results.push(output("y of a norm", y.to_vec()?));
    let twins = members.len() == 2 && members[0].weight.rows() == members[1].weight.rows();
    if twins && members.iter().all(|member| member.bias.is_none()) {
        let width = members[0].weight.rows();
        let mut h = workspace.matrix(tokens, width)?;
        if !group.infer_swiglu(x.view(), Some(&pass), h.view_mut(), workspace)? {
            let mut y = workspace.matrix(tokens, 2 * width)?;
            group.forward(x.view_mut(), Some(&pass), None, y.view_mut(), workspace)?;
            let (gate, up) = (y.view().slice_cols(0..width), y.view().slice_cols(width..2 * width));
            swiglu::forward(gate, up, h.view_mut())?;
        }
        results.push(output("silu(gate) up", h.to_vec()?));
        let mut h = workspace.matrix(tokens, width)?;
        if !group.infer_normed(x.view(), &norm, Some(&pass), h.view_mut(), true, workspace)? {
            let mut y = workspace.matrix(tokens, 2 * width)?;
            group.forward(normed.view_mut(), Some(&pass), None, y.view_mut(), workspace)?;
            let (gate, up) = (y.view().slice_cols(0..width), y.view().slice_cols(width..2 * width));
            swiglu::forward(gate, up, h.view_mut())?;
        }
        results.push(output("silu(gate) up of a norm", h.to_vec()?));
    }
    Ok(results)
}

#[test]
fn few_tokens_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("few tokens");
    let quantizations = [(QuantType::Nf4, 64, true), (QuantType::Nf4, 128, false), (QuantType::Fp4, 64, true)]
        .map(|(quant_type, blocksize, double_quant)| QuantConfig { quant_type, blocksize, double_quant });
    let groups: [&[(usize, usize, bool)]; 6] = [
        &[(64, 0, false)],
        &[(77, 5, true)],
        &[(200, 16, false), (40, 16, false), (24, 16, false)],
        &[(33, 8, true), (48, 0, false), (17, 3, false)],
        &[(160, 16, false), (160, 16, false)],
        &[(72, 0, false), (72, 4, false)],
    ];
    for dtype in halves(&device) {
        for quantization in quantizations {
            for members in groups {
                let all: &[usize] = &[64, 576, 1536, 8192];
                let inputs = if quantization == quantizations[0] { all } else { &all[1..2] };
                for &inputs in inputs {
                    for tokens in [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 200, 256] {
                        let label = format!("{quantization:?} {members:?} {tokens} tokens {inputs} inputs");
                        report.compare(&device, dtype, &label, |side| {
                            products(side, quantization, [tokens, inputs], members)
                        });
                    }
                }
            }
        }
    }
    report.finish();
}

/// `x W^T + scale (x A^T) B^T + bias` of a group in f64, from the values that both sides hold.
fn in_f64(side: &Side, tokens: usize, inputs: usize, members: &[(usize, usize)]) -> Vec<f64> {
    let weights: Vec<_> =
        (members.iter()).map(|&(rows, _)| side.weight(Kind::Bits4(QuantConfig::default()), rows, inputs)).collect();
    let flat = side.values_f32(members.iter().map(|&(rows, rank)| rank * (inputs + rows)).sum(), 0.05);
    let x: Vec<f64> = side.values(tokens * inputs, 1.0).into_iter().map(f64::from).collect();
    let dot = |x: &[f64], w: &[f32]| x.iter().zip(w).map(|(x, &w)| x * f64::from(w)).sum::<f64>();
    let outputs = members.iter().map(|member| member.0).sum::<usize>();
    let mut y = vec![0.0; tokens * outputs];
    let (mut column, mut at) = (0, 0);
    for (&(rows, rank), weight) in members.iter().zip(&weights) {
        let mut w = vec![0.0; rows * inputs];
        weight.dequantize_rows(0..rows, &mut w);
        let (a, b) = flat[at..at + rank * (inputs + rows)].split_at(rank * inputs);
        for (x, y) in x.chunks_exact(inputs).zip(y.chunks_exact_mut(outputs)) {
            let s: Vec<f64> = a.chunks_exact(inputs).map(|a| dot(x, a)).collect();
            for row in 0..rows {
                y[column + row] = dot(x, &w[row * inputs..][..inputs]) + 1.5 * dot(&s, &b[row * rank..][..rank]);
            }
        }
        column += rows;
        at += rank * (inputs + rows);
    }
    y
}

/// The same by the kernels, twice.
fn by_kernels(side: &Side, tokens: usize, inputs: usize, members: &[(usize, usize)]) -> Result<[Vec<f32>; 2]> {
    let weights: Vec<_> =
        (members.iter()).map(|&(rows, _)| side.weight(Kind::Bits4(QuantConfig::default()), rows, inputs)).collect();
    let flat = side.vector(members.iter().map(|&(rows, rank)| rank * (inputs + rows)).sum(), 0.0, 0.05);
    let (mut slots, mut end) = (Vec::new(), 0);
    for &(rows, rank) in members {
        let (a, b) = (end..end + rank * inputs, end + rank * inputs..end + rank * (inputs + rows));
        end = b.end;
        slots.push(LoraSlot { a, b, rank, scale: 1.5, stream: 0, kind: Default::default() });
    }
    let members: Vec<Member> = (weights.iter().zip(&slots))
        .map(|(weight, slot)| Member { name: "", weight: &**weight, bias: None, lora: Some(slot) })
        .collect();
    let cache = WeightCache::default();
    let group = Group { members: &members, cache: &cache, split: false };
    let pass = AdapterPass::new(flat.view());
    let mut x = side.with_margin(tokens, inputs, margin(slots.iter().map(Some)));
    let mut once = || -> Result<Vec<f32>> {
        let mut y = side.workspace.matrix(tokens, group.outputs())?;
        group.infer(x.view_mut(), Some(&pass), None, y.view_mut(), &side.workspace)?;
        y.to_vec()
    };
    Ok([once()?, once()?])
}

#[test]
fn few_tokens_agree_with_f64_and_with_themselves() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("few tokens in f64");
    let groups: [(&[(usize, usize)], usize); 3] =
        [(&[(200, 16), (40, 8), (24, 5)], 576), (&[(300, 16)], 4096), (&[(40, 64)], 14_336)];
    for dtype in halves(&device) {
        // The kernels of few tokens round the levels and the result; beyond them S and the adapters are rounded too.
        let of_kernels = if dtype == Dtype::Bf16 { 4e-3 } else { 6e-4 };
        for (members, inputs) in groups {
            for tokens in [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 200, 256] {
                let label = format!("{members:?} {tokens} tokens {inputs} inputs");
                let limit = if tokens <= 64 { of_kernels } else { tolerance(dtype) };
                let seed = (tokens + inputs) as u64;
                let want = in_f64(&Side::cpu(dtype, seed), tokens, inputs, members);
                let [first, second] = by_kernels(&Side::gpu(&device, dtype, seed), tokens, inputs, members).unwrap();
                let got: Vec<f64> = first.iter().copied().map(f64::from).collect();
                let error = relative_error(&got, &want);
                // A NaN is no agreement.
                report.check(dtype, &label, error <= limit, &format!("is off by {error:.2e} > {limit:.0e}"));
                report.check(dtype, &label, first == second, "a second run has other bits");
            }
        }
    }
    report.finish();
}

#[test]
fn a_plain_head_agrees_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("few tokens, plain weight");
    for dtype in halves(&device) {
        for (rows, cols) in [(61, 32), (1000, 576), (513, 4096), (96, 8192), (40, 100)] {
            for tokens in [1, 3, 8, 9, 16, 17] {
                report.compare(&device, dtype, &format!("{tokens} tokens {rows}x{cols}"), |side| {
                    let weight = side.weight(Kind::Plain(dtype), rows, cols);
                    let x = side.input(tokens, cols, 0);
                    let mut y = side.workspace.matrix(tokens, rows)?;
                    frozen_linear::forward(x.view(), &*weight, y.view_mut(), 0.0, &side.workspace)?;
                    Ok(vec![output("y", y.to_vec()?)])
                });
            }
        }
    }
    report.finish();
}

/// One new token for sequences with `seen` tokens before it, by the launches over all caches on a GPU and one after the
/// other on the CPU.
pub(crate) fn step(side: &Side, cfg: &AttentionConfig, seen: &[usize], gpu: Option<&Gpu>) -> Result<Vec<Output>> {
    let workspace: &Workspace = &side.workspace;
    let (q, kv) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    let table = RopeTable::new(&RopeConfig { theta: 1e4, scaling: None }, cfg.head_dim, 4096)?;
    let mut caches: Vec<[Matrix; 2]> = Vec::new();
    for &len in seen {
        let filled = || -> Result<Matrix> {
            let mut cache = workspace.matrix(len + 3, kv)?;
            cache.view_mut().fill(0.0)?;
            cache.view_mut().slice_rows(0..len).copy_from(side.input(len, kv, 0).view())?;
            Ok(cache)
        };
        caches.push([filled()?, filled()?]);
    }
    let mut qkv = side.input(seen.len(), q + 2 * kv, 0);
    let mut out = workspace.matrix(seen.len(), q)?;
    let positions: Vec<u32> = seen.iter().map(|&len| len as u32).collect();
    if let Some(gpu) = gpu {
        let layer = caches.iter_mut().map(|[keys, values]| [keys, values]).collect();
        let gpu = Gpu::of(&gpu.device())?;
        let mut tables = DecodeTables::new(&gpu, vec![layer], &positions, positions.len(), None)?;
        tables.append(0, cfg, qkv.view_mut(), &table)?;
        tables.attention(0, cfg, qkv.view().slice_cols(0..q), out.view_mut())?;
    } else {
        let rotated = qkv.view_mut().slice_cols(0..q + kv);
        rope::forward(rotated, cfg.head_dim, &table, &positions.into())?;
        for (row, ([keys, values], &len)) in caches.iter_mut().zip(seen).enumerate() {
            let new = qkv.view().slice_rows(row..row + 1);
            keys.view_mut().slice_rows(len..len + 1).copy_from(new.slice_cols(q..q + kv))?;
            values.view_mut().slice_rows(len..len + 1).copy_from(new.slice_cols(q + kv..q + 2 * kv))?;
            let (keys, values) = (keys.view().slice_rows(0..len + 1), values.view().slice_rows(0..len + 1));
            let out = out.view_mut().slice_rows(row..row + 1);
            attention::cached(cfg, new.slice_cols(0..q), keys, values, out, workspace)?;
        }
    }
    let mut results = vec![output("out", out.to_vec()?)];
    for [keys, values] in &caches {
        results.extend([output("keys", keys.to_vec()?), output("values", values.to_vec()?)]);
    }
    Ok(results)
}

#[test]
fn a_step_of_generation_agrees_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let on_gpu = Gpu::of(&device).unwrap();
    // The rotated keys are rounded before they are read.
    let mut report = Report::with_tolerance("decode", |dtype| if dtype == Dtype::Bf16 { 2e-2 } else { 3e-3 });
    for dtype in halves(&device) {
        for (heads, kv_heads, head_dim) in [(4, 2, 64), (9, 3, 64), (2, 2, 96), (32, 8, 128), (24, 1, 128)] {
            for window in [None, Some(40)] {
                let scale = (head_dim as f32).powf(-0.5);
                let cfg = AttentionConfig { heads, kv_heads, head_dim, scale, window };
                for seen in [&[0][..], &[1, 63, 64, 65], &[700], &[2000, 3, 0, 130, 41, 39, 40, 300]] {
                    let label = format!("{heads}/{kv_heads} heads of {head_dim}, window {window:?}, after {seen:?}");
                    report.compare(&device, dtype, &label, |side| {
                        step(side, &cfg, seen, side.is_gpu().then_some(&*on_gpu))
                    });
                }
            }
        }
    }
    report.finish();
}

#[test]
fn the_first_of_the_largest_is_found() {
    let Some(device) = gpu() else { return };
    const INF: f32 = f32::INFINITY;
    for dtype in dtypes(&device) {
        let side = Side::gpu(&device, dtype, 3);
        for cols in [1, 31, 1024, 128_256] {
            let mut values = side.values(6 * cols, 1.0);
            values[cols - 1] = 9.0;
            values[2 * cols - 1] = 9.0;
            values[cols] = 9.0;
            values[2 * cols + cols / 2] = f32::NAN;
            values[3 * cols + cols / 2] = INF;
            values[4 * cols..5 * cols].fill(-INF);
            let mut x = side.workspace.matrix(6, cols).unwrap();
            x.view_mut().copy_from(side.workspace.upload(&values, 6, cols).unwrap().view()).unwrap();
            let got = argmax::rows(x.view()).unwrap();
            let host = x.to_vec().unwrap();
            let want = argmax::rows(qlora_kernels::View::new(&host, 6, cols)).unwrap();
            assert_eq!(got, want, "{} {cols}", dtype.name());
            assert_eq!([got[0], got[1], got[2], got[3], got[4]], [Some(cols as u32 - 1), Some(0), None, None, None]);
        }
    }
}
