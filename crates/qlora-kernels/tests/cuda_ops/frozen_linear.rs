//! One frozen layer: plain weights and 4-bit ones.

use qlora_kernels::Dtype;
use qlora_kernels::ops::frozen_linear;
use qlora_kernels::quant::{QuantConfig, QuantType};

use crate::harness::{DTYPES, GAPS, Kind, Report, dtypes, gpu, half, output};

/// All ways to hold a weight.
pub(crate) fn kinds() -> Vec<Kind> {
    let mut kinds = DTYPES.map(Kind::Plain).to_vec();
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for (blocksize, double_quant) in [(64, true), (64, false), (128, true), (4096, false)] {
            kinds.push(Kind::Bits4(QuantConfig { quant_type, blocksize, double_quant }));
        }
    }
    kinds
}

#[test]
fn layers_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("frozen_linear");
    for dtype in dtypes(&device) {
        for kind in kinds() {
            for (tokens, rows, cols) in [(0, 8, 8), (1, 96, 64), (5, 33, 65), (130, 192, 129), (67, 576, 192)] {
                for gap in GAPS {
                    for beta in [0.0, 1.0, -0.5] {
                        let label = format!("{kind:?}, {tokens} tokens, {rows} x {cols}, gap {gap}, beta {beta}");
                        report.compare(&device, dtype, &label, |side| {
                            let weight = side.weight(kind, rows, cols);
                            let target = |cols| match beta == 0.0 {
                                true => side.output(tokens, cols, gap),
                                false => side.input(tokens, cols, gap),
                            };
                            let (x, mut y) = (side.input(tokens, cols, gap), target(rows));
                            let (dy, mut dx) = (side.input(tokens, rows, gap), target(cols));
                            frozen_linear::forward(x.view(), &*weight, y.view_mut(), beta, &side.workspace)?;
                            frozen_linear::backward(dy.view(), &*weight, dx.view_mut(), beta, &side.workspace)?;
                            Ok(vec![output("y", y.to_vec()), output("dx", dx.to_vec())])
                        });
                    }
                }
            }
        }
    }
    report.finish();
}

#[test]
fn a_weight_that_stayed_on_the_cpu_is_refused() {
    let Some(device) = gpu() else { return };
    let side = crate::harness::Side::gpu(&device, half(&device), 1);
    let weight = crate::harness::Side::cpu(Dtype::Bf16, 1).weight(Kind::Plain(Dtype::Bf16), 3, 4);
    let (x, mut y) = (side.input(2, 4, 0), side.output(2, 3, 0));
    let error = frozen_linear::forward(x.view(), &*weight, y.view_mut(), 0.0, &side.workspace).unwrap_err();
    assert!(error.to_string().contains("the weight is on the CPU"), "{error}");
}
