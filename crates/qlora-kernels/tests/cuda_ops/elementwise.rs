//! Rotary embedding, SwiGLU, scaling and the token embedding.

use std::sync::Arc;

use qlora_kernels::ops::rope::{self, RopeConfig, RopeScaling, RopeTable};
use qlora_kernels::ops::{embedding, scale, swiglu};
use qlora_kernels::quant::{QuantConfig, QuantType};
use qlora_kernels::sequence::Positions;
use qlora_kernels::weight::{FrozenWeight, PlainWeight};
use qlora_kernels::{Dtype, SequenceLayout};

use crate::harness::{DTYPES, GAPS, Kind, Report, dtypes, gpu, half, output, plain, within};

/// The largest relative error of one rounding to the activations' type: half a unit in the last place of every element.
fn one_rounding(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-6,
        Dtype::Bf16 => 1.0 / 256.0,
        Dtype::F16 => 1.0 / 2048.0,
    }
}

#[test]
fn scale_agrees_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::with_tolerance("scale", one_rounding);
    for dtype in dtypes(&device) {
        for (rows, cols) in [(1, 1), (5, 48), (3, 7), (130, 2048)] {
            for gap in GAPS {
                report.compare(&device, dtype, &format!("{rows} x {cols}, gap {gap}"), |side| {
                    let mut y = side.input(rows, cols, gap);
                    scale::in_place(y.view_mut(), 0.22)?;
                    Ok(vec![output("y", y.to_vec())])
                });
            }
        }
    }
    report.finish();
}

#[test]
fn rope_agrees_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::with_tolerance("rope", one_rounding);
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };
    for dtype in dtypes(&device) {
        for (heads, head_dim, scaling) in
            [(1, 2, None), (3, 6, None), (9, 64, None), (4, 128, Some(llama3.clone())), (2, 80, None), (5, 32, None)]
        {
            let config = RopeConfig { theta: 10_000.0, scaling };
            for gap in GAPS {
                let packed = SequenceLayout::from_lengths(&[5, 1, 70]);
                let far: Positions = vec![0, 4999, 17, 4998].into();
                for (name, positions) in [("packed", packed.positions()), ("far", &far)] {
                    // A table and positions belong to one device.
                    let positions: Vec<u32> = positions.to_vec();
                    let label = format!("{heads} heads of {head_dim}, gap {gap}, {name}");
                    report.compare(&device, dtype, &label, |side| {
                        let table = RopeTable::new(&config, head_dim, 5000)?;
                        let positions: Positions = positions.clone().into();
                        let (tokens, cols) = (positions.len(), heads * head_dim);
                        let (mut x, mut dx) = (side.input(tokens, cols, gap), side.input(tokens, cols, gap));
                        rope::forward(x.view_mut(), head_dim, &table, &positions)?;
                        rope::backward(dx.view_mut(), head_dim, &table, &positions)?;
                        Ok(vec![output("forward", x.to_vec()), output("backward", dx.to_vec())])
                    });
                }
            }
        }
    }
    report.finish();
}

#[test]
fn swiglu_agrees_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::with_tolerance("swiglu", one_rounding);
    for dtype in dtypes(&device) {
        for (rows, cols) in [(0, 64), (1, 1), (3, 7), (17, 33), (5, 1536), (2, 28_672), (1000, 24)] {
            for gap in GAPS {
                // Saturated gates too, as far as the results are normal numbers.
                for scale in [1.0, if dtype == Dtype::F16 { 2.0 } else { 30.0 }] {
                    report.compare(&device, dtype, &format!("{rows} x {cols}, gap {gap}, scale {scale}"), |side| {
                        let gate = side.values(rows * cols, scale);
                        let (up, dh) = (side.values(rows * cols, 1.0), side.values(rows * cols, 1.0));
                        let window = |values: &[f32]| side.window_of(values, rows, cols, gap);
                        let mut h = side.output(rows, cols, gap);
                        swiglu::forward(window(&gate).view(), window(&up).view(), h.view_mut())?;
                        let mut results = vec![output("h", h.to_vec())];

                        let (mut dgate, mut dup, mut again) =
                            (window(&gate), window(&up), side.output(rows, cols, gap));
                        let given = window(&dh);
                        let view = Some(again.view_mut());
                        swiglu::backward(dgate.view_mut(), dup.view_mut(), given.view(), view)?;
                        results.extend([
                            output("d gate", dgate.to_vec()),
                            output("d up", dup.to_vec()),
                            output("h again", again.to_vec()),
                            within("dh unchanged", 0.0, given.to_vec()),
                        ]);

                        let (mut dgate, mut dup) = (window(&gate), window(&up));
                        swiglu::backward(dgate.view_mut(), dup.view_mut(), given.view(), None)?;
                        results.extend([output("d gate alone", dgate.to_vec()), output("d up alone", dup.to_vec())]);

                        let (mut dgate, mut dup, mut dh) = (window(&gate), window(&up), window(&dh));
                        swiglu::backward_in_place(dgate.view_mut(), dup.view_mut(), dh.view_mut())?;
                        results.extend([
                            output("d gate in place", dgate.to_vec()),
                            output("d up in place", dup.to_vec()),
                            output("h in place", dh.to_vec()),
                        ]);
                        Ok(results)
                    });
                }
            }
        }
    }
    report.finish();
}

#[test]
fn embedding_rows_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::with_tolerance("embedding", one_rounding);
    let nf4 = QuantConfig { quant_type: QuantType::Nf4, blocksize: 64, double_quant: true };
    let kinds = DTYPES.map(Kind::Plain).into_iter().chain([Kind::Bits4(nf4)]);
    for kind in kinds {
        for dtype in dtypes(&device) {
            for (vocab, width) in [(1, 1), (61, 33), (500, 576)] {
                for gap in GAPS {
                    let label = format!("{kind:?} {vocab} x {width}, gap {gap}");
                    report.compare(&device, dtype, &label, |side| {
                        let table = side.weight(kind, vocab, width);
                        let tokens: Vec<u32> = (0..77).map(|i| (i * i * 7 + 3) % vocab as u32).collect();
                        let mut out = side.output(tokens.len(), width, gap);
                        embedding::forward(&tokens, &*table, out.view_mut())?;
                        // Also from a table that stays on the host.
                        let values = side.values(vocab * width, 1.0);
                        let table: Arc<dyn FrozenWeight> =
                            Arc::new(PlainWeight::new(plain(&values, Dtype::F32), vocab, width));
                        let mut host = side.output(tokens.len(), width, gap);
                        embedding::forward(&tokens, &*table, host.view_mut())?;
                        Ok(vec![output("rows", out.to_vec()), within("rows from the host", 0.0, host.to_vec())])
                    });
                }
            }
        }
    }
    let workspace = qlora_kernels::Workspace::poisoned_on(&device, half(&device)).unwrap();
    let table = PlainWeight::new(plain(&[0.0; 12], Dtype::F32), 3, 4);
    let mut out = workspace.matrix(1, 4).unwrap();
    let error = embedding::forward(&[3], &table, out.view_mut()).unwrap_err().to_string();
    assert!(error.contains("token id 3 at position 0 is outside the vocabulary of 3"), "{error}");
    report.finish();
}
