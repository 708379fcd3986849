//! Dropout: the mask is that of the CPU, element by element.

use qlora_kernels::ops::dropout::{self, Dropout};

use crate::harness::{GAPS, Report, dtypes, gpu, half, output, round, within};

#[test]
fn the_mask_is_that_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("dropout");
    for dtype in dtypes(&device) {
        for (rows, cols) in [(0, 5), (1, 1), (3, 7), (65, 33), (40, 2048), (3, 28_672)] {
            for gap in GAPS {
                for p in [0.0, 0.05, 0.5, 0.999] {
                    // Element indices beyond 2^32 too.
                    for first_row in [0, 5, 1 << 33] {
                        let mask = Dropout { p, seed: 11, stream: 5, first_row: 0 };
                        let label = format!("{rows} x {cols}, gap {gap}, p {p}, from row {first_row}");
                        report.compare(&device, dtype, &label, |side| {
                            let (x, mut y) = (side.input(rows, cols, gap), side.output(rows, cols, gap));
                            dropout::forward(&mask.at_row(first_row), x.view(), y.view_mut())?;
                            let y = y.to_vec();
                            let kept = y.iter().map(|&y| if y == 0.0 { 0.0 } else { 1.0 }).collect();
                            let mut dx = side.input(rows, cols, gap);
                            dropout::backward(&mask.at_row(first_row), x.view(), dx.view_mut())?;
                            // The CPU's f32 rounded to the type: one product, one rounding, the same bits.
                            let rounded = y.iter().map(|&y| round(y, dtype)).collect();
                            Ok(vec![within("mask", 0.0, kept), within("y", 0.0, rounded), output("dx +=", dx.to_vec())])
                        });
                    }
                }
            }
        }
    }
    report.finish();
}

#[test]
fn a_probability_out_of_range_is_refused() {
    let Some(device) = gpu() else { return };
    let workspace = qlora_kernels::Workspace::poisoned_on(&device, half(&device)).unwrap();
    let (x, mut y) = (workspace.zeros(2, 3).unwrap(), workspace.matrix(2, 3).unwrap());
    let error =
        dropout::forward(&Dropout { p: 1.0, seed: 0, stream: 0, first_row: 0 }, x.view(), y.view_mut()).unwrap_err();
    assert!(error.to_string().contains("the dropout probability is 1"), "{error}");
}
