//! Layers with DoRA adapters: norms, forward, and all gradients.

use qlora_kernels::ops::dora_linear::inverse_norms;
use qlora_kernels::ops::linear_group::{AdapterPass, DoraPlaces, Group, LoraSlot, Member, SlotKind};
use qlora_kernels::quant::{QuantConfig, QuantType};
use qlora_kernels::weight::WeightCache;
use qlora_kernels::{Matrix, Result};

use crate::harness::{Kind, Output, Report, Side, dtypes, gpu, output};

#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    kind: Kind,
    tokens: usize,
    inputs: usize,
    /// Outputs, the rank of the adapter, whether there is a bias.
    members: &'a [(usize, usize, bool)],
    residual: bool,
    dropout: Option<(f32, u64)>,
}

fn run(side: &Side, case: &Case) -> Result<Vec<Output>> {
    let Case { kind, tokens, inputs, members, residual, dropout } = *case;
    let workspace = &side.workspace;
    let weights: Vec<_> = members.iter().map(|&(rows, ..)| side.weight(kind, rows, inputs)).collect();
    let biases: Vec<_> = members.iter().map(|&(rows, ..)| side.vector(rows, 0.0, 1.0)).collect();
    let (mut slots, mut end, mut norms) = (Vec::new(), 0, 0);
    for (index, &(rows, rank, _)) in members.iter().enumerate() {
        let (a, b) = (end..end + rank * inputs, end + rank * inputs..end + rank * (inputs + rows));
        let magnitude = b.end..b.end + rows;
        let kind = SlotKind::Dora(DoraPlaces { magnitude: magnitude.clone(), norms: norms..norms + rows });
        (end, norms) = (magnitude.end, norms + rows);
        slots.push(LoraSlot { a, b, rank, scale: 0.5 + index as f32, stream: index as u64, kind });
    }
    let flat = side.vector(end, 0.0, 0.2);
    let mut inverse = workspace.matrix_f32(1, norms)?;
    for ((slot, weight), &(rows, ..)) in slots.iter().zip(&weights).zip(members) {
        let part = |range: &std::ops::Range<usize>, rows: usize| {
            flat.view().slice_cols(range.clone()).reshape(rows, range.len() / rows)
        };
        let SlotKind::Dora(places) = &slot.kind else { unreachable!("made above") };
        let out = inverse.view_mut().slice_cols(places.norms.clone());
        inverse_norms(&**weight, part(&slot.a, slot.rank), part(&slot.b, rows), slot.scale, out)?;
    }
    let members: Vec<Member> = (members.iter().zip(&weights).zip(&biases).zip(&slots))
        .map(|(((&(.., has_bias), weight), bias), slot)| Member {
            name: "",
            weight: &**weight,
            bias: has_bias.then(|| bias.view()),
            lora: Some(slot),
        })
        .collect();
    let cache = WeightCache::default();
    let group = Group { members: &members, cache: &cache, split: false };
    let outputs = group.outputs();
    let pass = AdapterPass { dropout, inverse_norms: Some(inverse.view()), ..AdapterPass::new(flat.view()) };
    let residual = residual.then(|| side.input(tokens, outputs, 0));
    let residual = residual.as_ref().map(|residual| residual.view());

    let mut x = side.with_margin(tokens, inputs, 0);
    let mut dy = side.with_margin(tokens, outputs, 0);
    let mut y = workspace.matrix(tokens, outputs)?;
    let s = group.forward(x.view_mut(), Some(&pass), residual, y.view_mut(), workspace)?;
    let mut dx = workspace.matrix(tokens, inputs)?;
    let ds = group.backward_input(dy.view_mut(), &pass, Some(dx.view_mut()), workspace)?;
    let mut gradient: Matrix = side.vector(end, 0.0, 1.0);
    group.backward_adapter(x.view(), &s, dy.view(), &ds, &pass, gradient.view_mut(), workspace)?;
    Ok(vec![
        output("inverse norms", inverse.to_vec()?),
        output("y", y.to_vec()?),
        output("dx", dx.to_vec()?),
        output("gradient", gradient.to_vec()?),
    ])
}

#[test]
fn layers_with_dora_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("dora_linear");
    let nf4 = Kind::Bits4(QuantConfig { quant_type: QuantType::Nf4, blocksize: 64, double_quant: true });
    let groups: [&[_]; 3] = [&[(64, 8, false)], &[(33, 3, true)], &[(96, 5, true), (33, 7, false)]];
    for dtype in dtypes(&device) {
        for kind in [nf4, Kind::Plain(dtype)] {
            for members in groups {
                for (tokens, inputs) in [(1, 64), (37, 96), (130, 65)] {
                    for (residual, dropout) in [(false, None), (true, None), (true, Some((0.3, 17)))] {
                        let case = Case { kind, tokens, inputs, members, residual, dropout };
                        report.compare(&device, dtype, &format!("{case:?}"), |side| run(side, &case));
                    }
                }
            }
        }
    }
    report.finish();
}
