//! LLM.int8: layers whose input is rounded to 8 bits in the forward.

use std::sync::Arc;

use qlora_kernels::cuda::CudaWeight;
use qlora_kernels::ops::frozen_linear;
use qlora_kernels::ops::linear_group::{AdapterPass, Group, LoraSlot, Member, margin};
use qlora_kernels::quant::QuantizedInt;
use qlora_kernels::weight::{FrozenWeight, WeightCache};
use qlora_kernels::{Dtype, Result};

use crate::harness::{GAPS, Kind, Output, Report, Side, Window, dtypes, gpu, output, plain, within};

/// A weight in 8 bits, but for some columns, whose products round their input.
fn weight(side: &Side, rows: usize, cols: usize, threshold: f32, exact: &[u32]) -> Arc<dyn FrozenWeight> {
    let data = plain(&side.values_f32(rows * cols, 1.0 / (cols as f32).sqrt()), Dtype::Bf16);
    let weight = QuantizedInt::llm_int8(&data, rows, cols, threshold, exact).unwrap();
    match side.is_gpu() {
        true => Arc::new(CudaWeight::integers(&weight, &side.workspace).unwrap()),
        false => Arc::new(weight),
    }
}

/// Activations with some outliers.
fn input(side: &Side, tokens: usize, cols: usize, gap: usize) -> Window {
    let mut values = side.values(tokens * cols, 1.0);
    for (i, value) in values.iter_mut().enumerate().filter(|(i, _)| i % 97 == 5) {
        *value = if i % 2 == 0 { 6.0 } else { -11.5 };
    }
    side.window_of(&values, tokens, cols, gap)
}

pub(crate) fn layer(
    side: &Side,
    [tokens, rows, cols, gap]: [usize; 4],
    threshold: f32,
    exact: &[u32],
) -> Result<Vec<Output>> {
    let exact: Vec<u32> = exact.iter().copied().filter(|&c| (c as usize) < cols).collect();
    let weight = weight(side, rows, cols, threshold, &exact);
    let x = input(side, tokens, cols, gap);
    let (mut y, dy, mut dx) =
        (side.output(tokens, rows, gap), side.input(tokens, rows, gap), side.output(tokens, cols, gap));
    frozen_linear::forward(x.view(), &*weight, y.view_mut(), 0.0, &side.workspace)?;
    frozen_linear::backward(dy.view(), &*weight, dx.view_mut(), 0.0, &side.workspace)?;
    Ok(vec![output("y", y.to_vec()), output("dx", dx.to_vec()), within("x unchanged", 0.0, x.to_vec())])
}

/// A group of which two layers round alike, one otherwise, and one not at all.
pub(crate) fn group(side: &Side, tokens: usize, with_margin: bool) -> Result<Vec<Output>> {
    let cols = 70;
    let weights = [
        [weight(side, 40, cols, 6.0, &[3, 5]), weight(side, 24, cols, 6.0, &[3, 5]), weight(side, 17, cols, 0.0, &[])],
        [
            side.weight(Kind::Plain(Dtype::Bf16), 16, cols),
            weight(side, 16, cols, 4.0, &[]),
            side.weight(Kind::Plain(Dtype::F32), 8, cols),
        ],
    ];
    let mut results = Vec::new();
    for weights in &weights {
        let (mut slots, mut end) = (Vec::new(), 0);
        for (weight, rank) in weights.iter().zip([4, 0, 3]) {
            let (a, b) = (end..end + rank * cols, end + rank * cols..end + rank * (cols + weight.rows()));
            end = b.end;
            slots.push((rank > 0).then_some(LoraSlot { a, b, rank, scale: 1.5, stream: 0, kind: Default::default() }));
        }
        let flat = side.vector(end, 0.0, 0.2);
        let bias = side.vector(weights[0].rows(), 0.0, 1.0);
        let members: Vec<Member> = (weights.iter().zip(&slots).enumerate())
            .map(|(index, (weight, slot))| Member {
                name: "",
                weight: &**weight,
                bias: (index == 0).then(|| bias.view()),
                lora: slot.as_ref(),
            })
            .collect();
        let cache = WeightCache::default();
        let pass = AdapterPass::new(flat.view());
        let room = if with_margin { margin(slots.iter().map(Option::as_ref)) } else { 0 };
        let mut x = side.with_margin(tokens, cols, room);
        x.view_mut().copy_from(input(side, tokens, cols, 0).view())?;
        for split in [false, true] {
            let group = Group { members: &members, cache: &cache, split };
            let residual = side.input(tokens, group.outputs(), 0);
            for adapter in [None, Some(&pass)] {
                let mut y = side.workspace.matrix(tokens, group.outputs())?;
                let s = group.forward(x.view_mut(), adapter, Some(residual.view()), y.view_mut(), &side.workspace)?;
                results.push(output(if adapter.is_some() { "y" } else { "base" }, y.to_vec()?));
                let Some(adapter) = adapter else { continue };
                let mut dy = side.with_margin(tokens, group.outputs(), room);
                let (mut dx, mut gradient) = (side.workspace.matrix(tokens, cols)?, side.workspace.zeros_f32(1, end)?);
                let ds = group.backward_input(dy.view_mut(), adapter, Some(dx.view_mut()), &side.workspace)?;
                let target = gradient.view_mut();
                group.backward_adapter(x.view(), &s, dy.view(), &ds, adapter, target, &side.workspace)?;
                results.extend([output("dx", dx.to_vec()?), output("gradient", gradient.to_vec()?)]);
            }
        }
        results.push(within("x unchanged", 0.0, x.to_vec()?));
    }
    Ok(results)
}

#[test]
fn inputs_are_rounded_to_8_bits_as_on_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("LLM.int8");
    for dtype in dtypes(&device) {
        for (tokens, rows, cols) in [(0, 8, 8), (1, 96, 64), (5, 33, 65), (130, 192, 129), (67, 57, 1000)] {
            for gap in GAPS {
                for threshold in [0.0, 6.0, 1.0] {
                    for exact in [&[][..], &[0, 9, 63]] {
                        let label =
                            format!("{tokens} tokens, {rows} x {cols}, gap {gap}, {threshold}, exact {exact:?}");
                        report.compare(&device, dtype, &label, |side| {
                            layer(side, [tokens, rows, cols, gap], threshold, exact)
                        });
                    }
                }
            }
        }
        for tokens in [1, 20, 90] {
            for margin in [false, true] {
                let label = format!("a group of {tokens} tokens, margin {margin}");
                report.compare(&device, dtype, &label, |side| group(side, tokens, margin));
            }
        }
    }
    report.finish();
}
