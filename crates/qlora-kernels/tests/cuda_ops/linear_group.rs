//! Groups of layers with adapters: one product over augmented K on the GPU, one member after the other on the CPU.

use qlora_kernels::ops::linear_group::{AdapterPass, Group, LoraSlot, Member, margin};
use qlora_kernels::quant::{QuantConfig, QuantType};
use qlora_kernels::weight::WeightCache;
use qlora_kernels::{Dtype, Result, Workspace};

use crate::harness::{Kind, Output, Report, Side, dtypes, gpu, half, output, same_bits, within};

/// A group by its members: outputs, the rank of the adapter (0: none), whether there is a bias.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case<'a> {
    pub(crate) kind: Kind,
    pub(crate) tokens: usize,
    pub(crate) inputs: usize,
    pub(crate) members: &'a [(usize, usize, bool)],
    /// Whether x and dy have room for the adapters' factors.
    pub(crate) margins: bool,
    pub(crate) residual: bool,
    pub(crate) dropout: Option<(f32, u64)>,
    pub(crate) cached: bool,
    /// One member at a time.
    pub(crate) split: bool,
}

const GROUPS: [&[(usize, usize, bool)]; 9] = [
    &[(64, 0, false)],
    &[(64, 8, false)],
    &[(33, 3, true)],
    &[(96, 16, false), (32, 16, false), (32, 16, false)],
    &[(96, 5, true), (32, 0, true), (33, 7, false)],
    &[(24, 0, true), (40, 4, false)],
    &[(130, 64, false), (130, 64, true)],
    &[(17, 0, false), (19, 0, true)],
    &[(7, 1, false), (1, 2, true), (3, 0, false)],
];

/// Forward, backward and the adapters' gradients; x and dy afterwards.
pub(crate) fn run(side: &Side, case: &Case) -> Result<Vec<Output>> {
    let Case { kind, tokens, inputs, members, margins, residual, dropout, cached, split } = *case;
    let workspace = &side.workspace;
    let weights: Vec<_> = members.iter().map(|&(rows, ..)| side.weight(kind, rows, inputs)).collect();
    let biases: Vec<_> = members.iter().map(|&(rows, ..)| side.vector(rows, 0.0, 1.0)).collect();
    // Back to back; in the second member B comes before A.
    let (mut slots, mut end) = (Vec::new(), 0);
    for (index, &(rows, rank, _)) in members.iter().enumerate() {
        let sizes = if index == 1 { [rank * rows, rank * inputs] } else { [rank * inputs, rank * rows] };
        let (first, second) = (end..end + sizes[0], end + sizes[0]..end + sizes[0] + sizes[1]);
        end = second.end;
        let (a, b) = if index == 1 { (second, first) } else { (first, second) };
        slots.push((rank > 0).then_some(LoraSlot {
            a,
            b,
            rank,
            scale: 0.5 + index as f32,
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
    let group = Group { members: &members, cache: &cache, split };
    let outputs = group.outputs();
    let room = if margins { margin(slots.iter().map(Option::as_ref)) } else { 0 };
    let pass = AdapterPass { dropout, ..AdapterPass::new(flat.view()) };
    let residual = residual.then(|| side.input(tokens, outputs, 0));
    let residual = residual.as_ref().map(|residual| residual.view());

    let mut x = side.with_margin(tokens, inputs, room);
    let mut dy = side.with_margin(tokens, outputs, room);
    let mut results = Vec::new();
    let mut again = || -> Result<()> {
        // Without the adapter first: a cache filled then has no room for it.
        let mut base = workspace.matrix(tokens, outputs)?;
        group.forward(x.view_mut(), None, residual, base.view_mut(), workspace)?;
        let mut y = workspace.matrix(tokens, outputs)?;
        let s = group.forward(x.view_mut(), Some(&pass), residual, y.view_mut(), workspace)?;
        let mut dx = workspace.matrix(tokens, inputs)?;
        let ds = group.backward_input(dy.view_mut(), &pass, Some(dx.view_mut()), workspace)?;
        let mut gradient = side.vector(end.max(1), 0.0, 1.0);
        group.backward_adapter(x.view(), &s, dy.view(), &ds, &pass, gradient.view_mut(), workspace)?;
        // S made alone and dS without dx give the same gradient.
        let s = group.shrink(x.view(), Some(&pass), workspace)?;
        let ds = group.backward_input(dy.view_mut(), &pass, None, workspace)?;
        let mut alone = workspace.zeros_f32(1, end.max(1))?;
        group.backward_adapter(x.view(), &s, dy.view(), &ds, &pass, alone.view_mut(), workspace)?;
        results.extend([
            output("base y", base.to_vec()?),
            output("y", y.to_vec()?),
            output("dx", dx.to_vec()?),
            output("gradient +=", gradient.to_vec()?),
            output("gradient", alone.to_vec()?),
        ]);
        Ok(())
    };
    again()?;
    if cached {
        again()?;
    }
    results.extend([within("x unchanged", 0.0, x.to_vec()?), within("dy unchanged", 0.0, dy.to_vec()?)]);
    Ok(results)
}

#[test]
fn groups_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("linear_group");
    let nf4 = Kind::Bits4(QuantConfig { quant_type: QuantType::Nf4, blocksize: 64, double_quant: true });
    for dtype in dtypes(&device) {
        for kind in [nf4, Kind::Plain(dtype)] {
            for members in GROUPS {
                for (tokens, inputs) in [(1, 64), (37, 96), (130, 65)] {
                    for margins in [false, true] {
                        for (residual, dropout) in [(false, None), (true, None), (true, Some((0.3, 17)))] {
                            let cached = tokens == 37;
                            for split in [false, true] {
                                let case =
                                    Case { kind, tokens, inputs, members, margins, residual, dropout, cached, split };
                                report.compare(&device, dtype, &format!("{case:?}"), |side| run(side, &case));
                            }
                        }
                    }
                }
            }
        }
    }
    report.finish();
}

#[test]
fn keeping_the_weights_changes_no_bit() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("linear_group with its weight cache");
    let nf4 = Kind::Bits4(QuantConfig { quant_type: QuantType::Nf4, blocksize: 64, double_quant: true });
    for dtype in dtypes(&device) {
        let members: &[_] = &[(96, 5, true), (32, 0, true), (33, 7, false)];
        let case = Case {
            kind: nf4,
            tokens: 50,
            inputs: 128,
            members,
            margins: true,
            residual: true,
            dropout: Some((0.1, 3)),
            cached: false,
            split: false,
        };
        let go = |cached: bool| run(&Side::gpu(&device, dtype, 9), &Case { cached, ..case }).unwrap();
        let (plain, cached) = (go(false), go(true));
        // The cached case runs everything twice, from the kept weight the second time; its gradient buffers differ.
        for index in [0, 1, 2, 4] {
            let same = |other: usize| same_bits(&plain[index].to_f32(), &cached[other].to_f32());
            report.check(dtype, plain[index].name(), same(index) && same(index + 5), "the cache changes bits");
        }
    }
    report.finish();
}

#[test]
fn a_shape_that_does_not_fit_is_named() {
    let Some(device) = gpu() else { return };
    let side = Side::gpu(&device, half(&device), 1);
    let workspace: &Workspace = &side.workspace;
    let weight = side.weight(Kind::Plain(Dtype::Bf16), 8, 16);
    let slot = LoraSlot { a: 0..32, b: 32..48, rank: 2, scale: 1.0, stream: 0, kind: Default::default() };
    let members = [Member { name: "", weight: &*weight, bias: None, lora: Some(&slot) }];
    let cache = WeightCache::default();
    let group = Group { members: &members, cache: &cache, split: false };
    let (mut x, mut y) = (side.with_margin(3, 16, 8), workspace.matrix(3, 8).unwrap());
    let short = workspace.zeros_f32(1, 47).unwrap();
    let pass = AdapterPass::new(short.view());
    let error = group.forward(x.view_mut(), Some(&pass), None, y.view_mut(), workspace).unwrap_err().to_string();
    assert!(error.contains("an adapter lies beyond the buffer of 47 elements"), "{error}");
    let narrow = workspace.zeros(1, 48).unwrap();
    let pass = AdapterPass::new(narrow.view());
    let error = group.forward(x.view_mut(), Some(&pass), None, y.view_mut(), workspace).unwrap_err().to_string();
    assert!(error.contains("the adapter must be float32"), "{error}");
}
