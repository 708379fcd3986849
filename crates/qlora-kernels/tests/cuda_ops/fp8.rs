//! Groups of layers whose frozen weights are multiplied in fp8, against f64 over the same roundings made on the host.

use qlora_kernels::cuda::Gpu;
use qlora_kernels::ops::linear_group::{AdapterPass, Group, LoraSlot, Member, margin};
use qlora_kernels::quant::{QuantConfig, QuantType};
use qlora_kernels::weight::{FrozenCompute, FrozenWeight, WeightCache};
use qlora_kernels::{Dtype, Result, Workspace};

use crate::harness::{Kind, Side, gpu, halves, same_bits};

/// Outputs, rank (0: no adapter) and bias of each member.
type Members = [(usize, usize, bool)];

#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    tokens: usize,
    inputs: usize,
    members: &'a Members,
    residual: bool,
    dropout: Option<(f32, u64)>,
    cached: bool,
    split: bool,
    fp8: bool,
}

/// What a group gives, and what went in.
#[derive(Clone, Debug, Default)]
struct Results {
    y: Vec<f32>,
    dx: Vec<f32>,
    gradient: Vec<f32>,
    x: Vec<f32>,
    dy: Vec<f32>,
    residual: Vec<f32>,
    flat: Vec<f32>,
    weights: Vec<Vec<f32>>,
    biases: Vec<Vec<f32>>,
}

const NF4: Kind = Kind::Bits4(QuantConfig { quant_type: QuantType::Nf4, blocksize: 64, double_quant: true });

/// Values are rounded one by one.
const FP4_BY_32: Kind = Kind::Bits4(QuantConfig { quant_type: QuantType::Fp4, blocksize: 32, double_quant: false });
const NF4_BY_128: Kind = Kind::Bits4(QuantConfig { quant_type: QuantType::Nf4, blocksize: 128, double_quant: true });

fn run(side: &Side, kind: Kind, case: &Case) -> Result<Results> {
    let Case { tokens, inputs, members, residual, dropout, cached, split, fp8 } = *case;
    let workspace = &side.workspace;
    let weights: Vec<_> = members.iter().map(|&(rows, ..)| side.weight(kind, rows, inputs)).collect();
    let biases: Vec<_> = members.iter().map(|&(rows, ..)| side.vector(rows, 0.0, 1.0)).collect();
    let (mut slots, mut end) = (Vec::new(), 0);
    for (index, &(rows, rank, _)) in members.iter().enumerate() {
        let (a, b) = (end..end + rank * inputs, end + rank * inputs..end + rank * (inputs + rows));
        end = b.end;
        let scale = 0.5 + index as f32;
        slots.push((rank > 0).then_some(LoraSlot {
            a,
            b,
            rank,
            scale,
            stream: index as u64,
            kind: Default::default(),
        }));
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
    cache.set_enabled(cached);
    cache.set_compute(if fp8 { FrozenCompute::Fp8 } else { FrozenCompute::Activations });
    let group = Group { members: &members, cache: &cache, split };
    let outputs = group.outputs();
    let room = margin(slots.iter().map(Option::as_ref));
    let pass = AdapterPass { dropout, ..AdapterPass::new(flat.view()) };
    let added = side.input(tokens, outputs, 0);
    let added_view = residual.then(|| added.view());
    let (mut x, mut dy) = (side.with_margin(tokens, inputs, room), side.with_margin(tokens, outputs, room));
    let mut results = Results::default();
    // From kept copies the second time.
    for round in 0..2 {
        let (mut y, mut dx) = (workspace.matrix(tokens, outputs)?, workspace.matrix(tokens, inputs)?);
        let mut gradient = workspace.zeros_f32(1, end.max(1))?;
        let s = group.forward(x.view_mut(), Some(&pass), added_view, y.view_mut(), workspace)?;
        let ds = group.backward_input(dy.view_mut(), &pass, Some(dx.view_mut()), workspace)?;
        group.backward_adapter(x.view(), &s, dy.view(), &ds, &pass, gradient.view_mut(), workspace)?;
        let made = Results { y: y.to_vec()?, dx: dx.to_vec()?, gradient: gradient.to_vec()?, ..Results::default() };
        if round == 1 {
            let same = same_bits(&made.y, &results.y) && same_bits(&made.dx, &results.dx);
            assert!(same, "{case:?}: the second use of the weights gives other bits");
        }
        results = made;
    }
    let dense = |weight: &dyn FrozenWeight| {
        let mut out = vec![0.0; weight.rows() * weight.cols()];
        weight.dequantize_rows(0..weight.rows(), &mut out);
        out
    };
    Ok(Results {
        x: x.to_vec()?,
        dy: dy.to_vec()?,
        residual: if residual { added.to_vec() } else { Vec::new() },
        flat: flat.to_vec()?,
        weights: weights.iter().map(|weight| dense(&**weight)).collect(),
        biases: biases.iter().map(|bias| bias.to_vec()).collect::<Result<_>>()?,
        ..results
    })
}

/// The nearest number of e4m3, ties to even; 448 is the largest.
fn e4m3(x: f32) -> f32 {
    if x == 0.0 {
        return x;
    }
    let exponent = (x.abs().log2().floor() as i32).max(-6);
    let step = 2f32.powi(exponent - 3);
    ((x / step).round_ties_even() * step).clamp(-448.0, 448.0)
}

/// Rows rounded to 8 bits with a scale each, as values.
fn rounded_rows(x: &[f32], cols: usize) -> Vec<f64> {
    let row = |row: &[f32]| {
        let absmax = row.iter().fold(0f32, |most, x| most.max(x.abs()));
        let (factor, scale) = if absmax > 0.0 { (448.0 / absmax, absmax / 448.0) } else { (0.0, 0.0) };
        row.iter().map(|&x| f64::from(e4m3(x * factor)) * f64::from(scale)).collect::<Vec<_>>()
    };
    x.chunks_exact(cols).flat_map(row).collect()
}

fn transposed<T: Copy>(x: &[T], cols: usize) -> Vec<T> {
    (0..cols).flat_map(|c| x.iter().skip(c).step_by(cols).copied()).collect()
}

/// `a [m, k] b [n, k]^T`.
fn product(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    a.chunks_exact(k)
        .flat_map(|a| b.chunks_exact(k).map(|b| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>()))
        .collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// As [`rounded_rows`] of a transposed 4-bit weight: the columns of a block, `blocksize` of them, have one scale.
fn rounded_blocks(x: &[f32], cols: usize, blocksize: usize) -> Vec<f64> {
    x.chunks_exact(cols * blocksize).flat_map(|rows| rounded_rows(rows, rows.len())).collect()
}

/// y and dx in f64 over the roundings that the GPU makes. `dtype`: of the dequantized weights, none where they are not.
fn reference(case: &Case, dtype: Option<Dtype>, blocksize: usize, given: &Results) -> (Vec<f64>, Vec<f64>) {
    let Case { tokens, inputs, members, split, .. } = *case;
    let outputs: usize = members.iter().map(|member| member.0).sum();
    let round = |values: &[f32]| {
        values.iter().map(|&x| crate::harness::round(x, dtype.unwrap_or(Dtype::F32))).collect::<Vec<_>>()
    };
    let whole: Vec<f32> = given.weights.iter().flat_map(|weight| round(weight)).collect();
    let mut y = product(&rounded_rows(&given.x, inputs), &rounded_rows(&whole, inputs), inputs);
    // Backward: a scale for each column of the weights that are multiplied together.
    let mut dx = vec![0f64; tokens * inputs];
    let dy_t = transposed(&given.dy, outputs);
    let mut pieces = Vec::new();
    let mut start = 0;
    for &(rows, ..) in members {
        pieces.push(start..start + rows);
        start += rows;
    }
    if !split {
        pieces = std::iter::once(0..outputs).collect();
    }
    for piece in pieces {
        let width = piece.len();
        let dy = transposed(&dy_t[piece.start * tokens..piece.end * tokens], tokens);
        let w = transposed(&whole[piece.start * inputs..piece.end * inputs], inputs);
        let w = if dtype.is_some() { rounded_rows(&w, width) } else { rounded_blocks(&w, width, blocksize) };
        let part = product(&rounded_rows(&dy, width), &w, width);
        dx.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    let (mut column, mut at) = (0, 0);
    for (index, &(rows, rank, has_bias)) in members.iter().enumerate() {
        let a = wide(&given.flat[at..at + rank * inputs]);
        let b = wide(&given.flat[at + rank * inputs..at + rank * (inputs + rows)]);
        at += rank * (inputs + rows);
        let scale = 0.5 + index as f64;
        for token in 0..tokens {
            let x = wide(&given.x[token * inputs..(token + 1) * inputs]);
            let dy = wide(&given.dy[token * outputs + column..token * outputs + column + rows]);
            let s: Vec<f64> = a.chunks_exact(inputs).map(|a| a.iter().zip(&x).map(|(a, x)| a * x).sum()).collect();
            for (row, y) in y[token * outputs + column..][..rows].iter_mut().enumerate() {
                *y += scale * s.iter().zip(&b[row * rank..]).map(|(s, b)| s * b).sum::<f64>();
                *y += if has_bias { f64::from(given.biases[index][row]) } else { 0.0 };
                *y += given.residual.get(token * outputs + column + row).map_or(0.0, |&x| f64::from(x));
            }
            for r in 0..rank {
                let ds: f64 = scale * dy.iter().enumerate().map(|(row, dy)| dy * b[row * rank + r]).sum::<f64>();
                let a = &a[r * inputs..(r + 1) * inputs];
                dx[token * inputs..(token + 1) * inputs].iter_mut().zip(a).for_each(|(dx, a)| *dx += ds * a);
            }
        }
        column += rows;
    }
    (y, dx)
}

fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - b)).sum();
    (difference / b.iter().map(|&b| square(b)).sum::<f64>().max(1e-30)).sqrt()
}

/// The device, if it multiplies in fp8.
fn hopper() -> Option<candle_core::Device> {
    let device = gpu()?;
    match Gpu::of(&device).unwrap().check_fp8() {
        Ok(()) => Some(device),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// Tokens, inputs and members of cases in which rows take several rounds of a warp, columns several tiles, and inputs every number
/// of packs a thread.
const LARGE: [(usize, usize, &Members); 7] = [
    (5, 2304, &[(272, 4, false), (144, 0, true)]),
    (3, 16_400, &[(16, 4, false)]),
    (3, 20_480, &[(16, 0, false)]),
    (3, 24_576, &[(16, 0, false)]),
    (3, 28_672, &[(16, 4, false)]),
    (3, 32_768, &[(16, 0, false)]),
    (3, 32_784, &[(16, 0, false)]),
];

const GROUPS: [&Members; 5] = [
    &[(64, 8, false)],
    &[(96, 16, false), (32, 16, false), (32, 16, false)],
    &[(48, 5, true), (16, 0, true), (32, 7, false)],
    &[(80, 0, false)],
    &[(128, 64, false), (128, 64, true)],
];

#[test]
fn groups_in_fp8_are_f64_over_the_same_roundings() {
    let Some(device) = hopper() else { return };
    let mut worst = 0f64;
    for dtype in halves(&device) {
        let bound = if dtype == Dtype::Bf16 { 6e-3 } else { 2e-3 };
        for kind in [NF4, FP4_BY_32, NF4_BY_128, Kind::Plain(dtype)] {
            for members in GROUPS {
                for (tokens, inputs) in [(1, 64), (37, 96), (130, 1024), (67, 1040)] {
                    for (residual, cached, split) in [(false, true, false), (true, false, false), (true, false, true)] {
                        let case = Case { tokens, inputs, members, residual, dropout: None, cached, split, fp8: true };
                        let given = run(&Side::gpu(&device, dtype, 11), kind, &case).unwrap();
                        // Blocks that cross rows are dequantized first.
                        let blocks = match kind {
                            Kind::Bits4(config) => Some(config.blocksize).filter(|&size| inputs.is_multiple_of(size)),
                            Kind::Plain(_) => None,
                        };
                        let rounded = if blocks.is_some() { None } else { Some(dtype) };
                        let (y, dx) = reference(&case, rounded, blocks.unwrap_or(1), &given);
                        let errors = [distance(&given.y, &y), distance(&given.dx, &dx)];
                        worst = errors.into_iter().fold(worst, f64::max);
                        assert!(errors.iter().all(|&error| error < bound), "{case:?}, {dtype:?}, {kind:?}: {errors:?}");
                        // Against the products in 16 bits: near, but another arithmetic. The adapters' gradients are theirs.
                        let plain = run(&Side::gpu(&device, dtype, 11), kind, &Case { fp8: false, ..case }).unwrap();
                        let away = distance(&given.y, &wide(&plain.y));
                        assert!(away < 0.06 && !same_bits(&given.y, &plain.y), "{case:?}: {away}");
                        if members.iter().any(|member| member.1 > 0) {
                            let gradient = distance(&given.gradient, &wide(&plain.gradient));
                            assert!(gradient < 2.0 * bound, "{case:?}: the adapters' gradients differ by {gradient}");
                        }
                    }
                }
            }
        }
    }
    println!("the largest error is {worst:.2e}");
}

#[test]
fn large_sizes_in_fp8_are_f64_over_the_same_roundings() {
    let Some(device) = hopper() else { return };
    for (dtype, bound) in [(Dtype::Bf16, 6e-3), (Dtype::F32, 1e-3)] {
        for (tokens, inputs, members) in LARGE {
            for split in [false, true] {
                let case =
                    Case { tokens, inputs, members, residual: true, dropout: None, cached: !split, split, fp8: true };
                let given = run(&Side::gpu(&device, dtype, 13), NF4, &case).unwrap();
                let rounded = if inputs.is_multiple_of(64) { None } else { Some(dtype) };
                let (y, dx) = reference(&case, rounded, 64, &given);
                let errors = [distance(&given.y, &y), distance(&given.dx, &dx)];
                assert!(errors.iter().all(|&error| error < bound), "{case:?}, {dtype:?}: {errors:?}");
            }
        }
    }
}

#[test]
fn dropout_in_fp8_is_that_of_16_bits() {
    let Some(device) = hopper() else { return };
    for split in [false, true] {
        let members = GROUPS[1];
        let case = Case {
            tokens: 130,
            inputs: 256,
            members,
            residual: true,
            dropout: Some((0.3, 17)),
            cached: !split,
            split,
            fp8: true,
        };
        let run = |fp8| run(&Side::gpu(&device, Dtype::Bf16, 3), NF4, &Case { fp8, ..case }).unwrap();
        let (fp8, plain) = (run(true), run(false));
        let errors = [
            distance(&fp8.y, &wide(&plain.y)),
            distance(&fp8.dx, &wide(&plain.dx)),
            distance(&fp8.gradient, &wide(&plain.gradient)),
        ];
        assert!(errors[0] < 0.06 && errors[1] < 0.06 && errors[2] < 0.012, "{errors:?}");
    }
}

/// Sizes that fp8 products cannot have, and few of them: the group is computed as without fp8.
#[test]
fn sizes_that_fp8_cannot_have_stay_in_16_bits() {
    let Some(device) = hopper() else { return };
    for (inputs, members) in [(72, GROUPS[0]), (64, &[(40, 8, false)][..]), (64, &[(64, 8, false), (24, 0, true)][..])]
    {
        let case =
            Case { tokens: 50, inputs, members, residual: true, dropout: None, cached: true, split: false, fp8: true };
        let run = |fp8| run(&Side::gpu(&device, Dtype::Bf16, 5), NF4, &Case { fp8, ..case }).unwrap();
        let (fp8, plain) = (run(true), run(false));
        assert!(same_bits(&fp8.y, &plain.y) && same_bits(&fp8.dx, &plain.dx), "{case:?}");
    }
}

/// A NaN or an infinity in a row of the input makes this row NaN and no other.
#[test]
fn what_is_not_finite_shows() {
    let Some(device) = hopper() else { return };
    let side = Side::gpu(&device, Dtype::Bf16, 7);
    let weight = side.weight(NF4, 64, 64);
    let cache = WeightCache::default();
    cache.set_compute(FrozenCompute::Fp8);
    let members = [Member { name: "", weight: &*weight, bias: None, lora: None }];
    let group = Group { members: &members, cache: &cache, split: false };
    let workspace: &Workspace = &side.workspace;
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = side.values(3 * 64, 1.0);
        values[64 + 9] = bad;
        // A row of zeros is zeros, and so is one whose values are too small to be scaled.
        values[128..].fill(0.0);
        values[130] = if bad.is_nan() { 1e-37 } else { 0.0 };
        let mut x = side.window_of(&values, 3, 64, 0);
        let mut y = workspace.matrix(3, 64).unwrap();
        group.forward(x.view_mut(), None, None, y.view_mut(), workspace).unwrap();
        let y = y.to_vec().unwrap();
        assert!(y[..64].iter().all(|y| y.is_finite()), "{bad}: a row without it");
        assert!(y[64..128].iter().all(|y| y.is_nan()), "{bad}: its row");
        assert!(y[128..].iter().all(|y| *y == 0.0), "{bad}: a row of zeros");
    }
}
