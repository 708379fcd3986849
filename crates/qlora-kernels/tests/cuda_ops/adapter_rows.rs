//! Different adapters for different rows, and what adapters do to tokens' rows of the embedding and the head.

use std::collections::HashMap;
use std::ops::Range;

use qlora_kernels::ops::adapter_rows::{AdapterChanges, AdapterRows, LinearChange, RowAdapter};
use qlora_kernels::ops::adapter_tokens::{self, EmbeddingDelta};
use qlora_kernels::ops::linear_group::{AdapterPass, Group, LoraSlot, Member};
use qlora_kernels::ops::swiglu;
use qlora_kernels::quant::QuantConfig;
use qlora_kernels::weight::WeightCache;
use qlora_kernels::{Dtype, Matrix, Result, View};

use crate::harness::{GAPS, Kind, Output, Report, Side, dtypes, gpu, half, output};

/// The changes that an adapter makes to every layer of a group.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Does {
    /// Of the first layer; the next one's is smaller by one, down to 0.
    pub(crate) rank: usize,
    pub(crate) gain: bool,
    pub(crate) bias: bool,
    pub(crate) weight: bool,
}

/// Some rows and what their adapter does.
type Parts = Vec<(Range<usize>, Does)>;

/// Of a group with these layers (outputs, and whether there is a bias): which rows have which adapter.
#[derive(Clone, Debug)]
pub(crate) struct Case<'a> {
    pub(crate) kind: Kind,
    pub(crate) tokens: usize,
    pub(crate) inputs: usize,
    pub(crate) layers: &'a [(usize, bool)],
    pub(crate) parts: &'a [(Range<usize>, Does)],
    pub(crate) residual: bool,
    /// Elements around every row of y.
    pub(crate) gap: usize,
}

struct Adapter {
    values: Matrix,
    changes: AdapterChanges,
}

fn adapter(side: &Side, case: &Case, does: Does, first: usize) -> Adapter {
    // Addresses that no vector access allows, in every other adapter.
    let (mut changes, mut end) = (AdapterChanges::default(), first % 2);
    let mut take = |len: usize| {
        end += len;
        end - len..end
    };
    for (index, &(outputs, _)) in case.layers.iter().enumerate() {
        let rank = does.rank.saturating_sub(index);
        let (a, b) = (take(rank * case.inputs), take(rank * outputs));
        let change = LinearChange {
            lora: (rank > 0).then_some(LoraSlot {
                a,
                b,
                rank,
                scale: 0.5 + index as f32,
                stream: 0,
                kind: Default::default(),
            }),
            gain: does.gain.then(|| take(outputs)),
            bias: does.bias.then(|| take(outputs)),
            weight: does.weight.then(|| side.weight(Kind::Plain(Dtype::Bf16), outputs, case.inputs)),
        };
        changes.linears.insert(index.to_string(), change);
    }
    Adapter { values: side.vector(end.max(1), 0.05, 0.2), changes }
}

/// `forward` and `infer`, and SwiGLU where two layers allow it.
pub(crate) fn run(side: &Side, case: &Case) -> Result<Vec<Output>> {
    let workspace = &side.workspace;
    let weights: Vec<_> = case.layers.iter().map(|&(rows, _)| side.weight(case.kind, rows, case.inputs)).collect();
    let biases: Vec<_> = case.layers.iter().map(|&(rows, _)| side.vector(rows, 0.0, 1.0)).collect();
    let names: Vec<String> = (0..case.layers.len()).map(|index| index.to_string()).collect();
    // The members have an adapter of their own, which these rows do not use.
    let other = LoraSlot { a: 0..1 << 40, b: 0..1 << 40, rank: 7, scale: 1.0, stream: 0, kind: Default::default() };
    let members: Vec<Member> = (case.layers.iter().zip(&weights).zip(&biases).zip(&names))
        .map(|(((&(_, has_bias), weight), bias), name)| Member {
            name,
            weight: &**weight,
            bias: has_bias.then(|| bias.view()),
            lora: Some(&other),
        })
        .collect();
    let adapters: Vec<Adapter> =
        case.parts.iter().enumerate().map(|(first, (_, does))| adapter(side, case, *does, first)).collect();
    let parts = case.parts.iter().zip(&adapters).map(|((rows, _), adapter)| RowAdapter {
        rows: rows.clone(),
        values: adapter.values.view(),
        changes: &adapter.changes,
    });
    let rows = AdapterRows::new(parts.collect())?;
    let cache = WeightCache::default();
    let group = Group { members: &members, cache: &cache, split: false };
    let outputs = group.outputs();
    let mut x = side.with_margin(case.tokens, case.inputs, rows.margin(&members));
    let residual = case.residual.then(|| side.input(case.tokens, outputs, 0));
    let residual = residual.as_ref().map(|residual| residual.view());
    let pass = AdapterPass::by_rows(&rows);
    let mut y = side.output(case.tokens, outputs, case.gap);
    group.forward(x.view_mut(), Some(&pass), residual, y.view_mut(), workspace)?;
    let mut results = vec![output("forward", y.to_vec())];
    let mut y = workspace.matrix(case.tokens, outputs)?;
    group.infer(x.view_mut(), Some(&pass), residual, y.view_mut(), workspace)?;
    results.push(output("infer", y.to_vec()?));
    if let [(width, _), (other, _)] = case.layers
        && width == other
    {
        let mut h = workspace.matrix(case.tokens, *width)?;
        if !group.infer_swiglu(x.view(), Some(&pass), h.view_mut(), workspace)? {
            let mut y = workspace.matrix(case.tokens, 2 * width)?;
            group.infer(x.view_mut(), Some(&pass), None, y.view_mut(), workspace)?;
            let (gate, up) = (y.view().slice_cols(0..*width), y.view().slice_cols(*width..2 * width));
            swiglu::forward(gate, up, h.view_mut())?;
        }
        results.push(output("silu(gate) up", h.to_vec()?));
    }
    Ok(results)
}

const LORA: Does = Does { rank: 8, gain: false, bias: false, weight: false };
const WIDE: Does = Does { rank: 45, ..LORA };
const DORA: Does = Does { rank: 4, gain: true, ..LORA };
const BIASED: Does = Does { rank: 3, bias: true, ..LORA };
const WEIGHT: Does = Does { rank: 0, weight: true, ..LORA };
const ALL: Does = Does { rank: 2, gain: true, bias: true, weight: true };

#[test]
fn rows_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("adapter_rows");
    let nf4 = Kind::Bits4(QuantConfig::default());
    let layers: [&[(usize, bool)]; 5] =
        [&[(64, false)], &[(77, true)], &[(96, false), (32, true), (33, false)], &[(72, false); 2], &[(200, true)]];
    let each = [LORA, WIDE, DORA, BIASED, WEIGHT, ALL];
    let many: Parts = (0..37).map(|i| (i..i + 1, each[i % each.len()])).collect();
    let plain: Parts = (0..21).map(|i| (2 * i..2 * i + 1, if i % 2 == 0 { LORA } else { WIDE })).collect();
    for dtype in dtypes(&device) {
        for kind in [nf4, Kind::Plain(dtype)] {
            for layers in layers {
                for inputs in [64, 65, 320] {
                    let mut cases: Vec<(usize, Parts)> = Vec::new();
                    for does in each {
                        // One adapter for all rows, for one row, for rows in the middle.
                        cases.extend([(1, vec![(0..1, does)]), (9, vec![(0..9, does)]), (150, vec![(3..140, does)])]);
                    }
                    cases.push((6, vec![]));
                    cases.push((5, vec![(0..0, LORA), (1..2, LORA), (2..4, DORA)]));
                    cases.push((40, vec![(0..4, ALL), (4..5, WEIGHT), (7..8, LORA), (8..30, BIASED), (30..40, LORA)]));
                    cases.push((210, vec![(0..70, LORA), (70..71, DORA), (72..205, WIDE)]));
                    if inputs == 64 {
                        cases.extend([(38, many.clone()), (41, plain.clone())]);
                    }
                    for (index, (tokens, parts)) in cases.into_iter().enumerate() {
                        let (residual, gap) = (index % 2 == 0, GAPS[index % GAPS.len()]);
                        let case = Case { kind, tokens, inputs, layers, parts: &parts, residual, gap };
                        report.compare(&device, dtype, &format!("{case:?}"), |side| run(side, &case));
                    }
                }
            }
        }
    }
    report.finish();
}

/// An adapter of the embedding and of the head over these tokens.
pub(crate) fn tokens(side: &Side, rank: usize, [vocabulary, width, gap]: [usize; 3]) -> Result<Vec<Output>> {
    let ids: Vec<u32> = (0..23).map(|i| (i * i * 5 + 1) % vocabulary as u32).collect();
    let (a, b) = (1..1 + rank * vocabulary, 1 + rank * vocabulary..1 + rank * (vocabulary + width));
    let end = b.end + width;
    let gain = b.end..end;
    let trained: HashMap<u32, Range<usize>> = [(1, 0), (ids[4], 1), (0, 2)]
        .map(|(id, n)| (id % vocabulary as u32, end + n * width..end + (n + 1) * width))
        .into();
    let none = HashMap::new();
    let values = side.vector(end + 3 * width, 0.2, 0.5);
    let slot = LoraSlot { a, b, rank, scale: -1.5, stream: 0, kind: Default::default() };
    let mut results = Vec::new();
    for (name, tokens, lora, gain) in [
        ("own rows", &trained, None, None),
        ("low rank", &none, Some(&slot), None),
        ("gain", &none, None, Some(&gain)),
        ("all", &trained, Some(&slot), Some(&gain)),
    ] {
        let mut x = side.input(ids.len(), width, gap);
        EmbeddingDelta { values: values.view(), tokens, lora, gain }.apply(&ids, x.view_mut())?;
        results.push(output(name, x.to_vec()));
    }
    let (hidden, mut logits) = (side.input(5, width, gap), side.input(5, vocabulary, gap));
    adapter_tokens::head(values.view(), &trained, hidden.view(), logits.view_mut())?;
    results.push(output("logits", logits.to_vec()));
    Ok(results)
}

#[test]
fn tokens_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("adapter_tokens");
    for dtype in dtypes(&device) {
        for rank in [1, 8, 33] {
            for (vocabulary, width) in [(1, 1), (61, 33), (300, 576)] {
                for gap in GAPS {
                    let label = format!("rank {rank}, {vocabulary} x {width}, gap {gap}");
                    report.compare(&device, dtype, &label, |side| tokens(side, rank, [vocabulary, width, gap]));
                }
            }
        }
    }
    report.finish();
}

#[test]
fn an_adapter_that_does_not_fit_is_refused() {
    let Some(device) = gpu() else { return };
    let side = Side::gpu(&device, half(&device), 1);
    let workspace = &side.workspace;
    let weight = side.weight(Kind::Bits4(QuantConfig::default()), 8, 64);
    let members = [Member { name: "layer", weight: &*weight, bias: None, lora: None }];
    let cache = WeightCache::default();
    let group = Group { members: &members, cache: &cache, split: false };
    let values = workspace.zeros_f32(1, 2 * 64 + 2 * 8 - 1).unwrap();
    let slot = |outputs: usize| LoraSlot {
        a: 0..128,
        b: 128..128 + 2 * outputs,
        rank: 2,
        scale: 1.0,
        stream: 0,
        kind: Default::default(),
    };
    for (outputs, rows, values, message) in [
        (8, 0..2, values.view(), "elements 128..144 of an adapter of 143"),
        (7, 0..2, values.view(), "B has shape [14], expected [16]"),
        (7, 0..4, values.view(), "3 rows, an adapter for 0..4"),
        (7, 0..2, View::vector(&[0.0; 143]), "on the CPU"),
    ] {
        let change = LinearChange { lora: Some(slot(outputs)), ..LinearChange::default() };
        let changes = AdapterChanges { linears: HashMap::from([("layer".to_owned(), change)]), ..Default::default() };
        let rows = AdapterRows::new(vec![RowAdapter { rows, values, changes: &changes }]).unwrap();
        let (mut x, mut y) = (side.with_margin(3, 64, 8), workspace.matrix(3, 8).unwrap());
        let pass = AdapterPass::by_rows(&rows);
        let error = group.forward(x.view_mut(), Some(&pass), None, y.view_mut(), workspace).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    // Two devices, even of one GPU, do not wait for each other.
    let other = Side::gpu(&qlora_kernels::cuda::device(0, None).unwrap(), half(&device), 1);
    let (mut x, mut y) = (other.with_margin(3, 64, 8), workspace.matrix(3, 8).unwrap());
    let error = group.forward(x.view_mut(), None, None, y.view_mut(), workspace).unwrap_err().to_string();
    assert!(error.contains("two devices of it"), "{error}");
    let error = group.infer(x.view_mut(), None, None, y.view_mut(), workspace).unwrap_err().to_string();
    assert!(error.contains("two devices of it"), "{error}");
}
