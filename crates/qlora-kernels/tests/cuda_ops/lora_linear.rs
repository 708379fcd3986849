//! The adapter's part of one layer on its own, as the composable candle operation runs it.

use qlora_kernels::ops::dropout::Dropout;
use qlora_kernels::ops::lora_linear;

use crate::harness::{GAPS, Report, dtypes, gpu, output};

#[test]
fn adapters_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("lora_linear");
    for dtype in dtypes(&device) {
        // The last needs several tiles of dropped inputs.
        for (tokens, inputs, outputs, r) in [(9, 8, 5, 1), (37, 96, 33, 8), (150, 65, 64, 3), (200, 4096, 40, 16)] {
            for gap in GAPS {
                for dropout in [None, Some(Dropout { p: 0.2, seed: 7, stream: 3, first_row: 0 })] {
                    let label = format!("{tokens} x {inputs} to {outputs}, rank {r}, gap {gap}, {dropout:?}");
                    report.compare(&device, dtype, &label, |side| {
                        let workspace = &side.workspace;
                        let x = side.input(tokens, inputs, gap);
                        let a = side.scaled_input(r, inputs, gap, 1.0 / (inputs as f32).sqrt());
                        let b = side.input(outputs, r, gap);
                        let (mut s, mut y) = (side.output(tokens, r, gap), side.input(tokens, outputs, gap));
                        let (target, result) = (s.view_mut(), y.view_mut());
                        lora_linear::forward(x.view(), a.view(), b.view(), 1.5, dropout, target, result, workspace)?;
                        let dy = side.input(tokens, outputs, gap);
                        let mut dx = side.input(tokens, inputs, gap);
                        let (mut da, mut db) = (side.vector(r * inputs, 0.0, 1.0), side.vector(outputs * r, 0.0, 1.0));
                        lora_linear::backward(
                            x.view(),
                            a.view(),
                            b.view(),
                            1.5,
                            dropout,
                            s.view(),
                            dy.view(),
                            Some(dx.view_mut()),
                            da.view_mut().reshape(r, inputs),
                            db.view_mut().reshape(outputs, r),
                            workspace,
                        )?;
                        Ok(vec![
                            output("s", s.to_vec()),
                            output("y", y.to_vec()),
                            output("dx", dx.to_vec()),
                            output("da", da.to_vec()?),
                            output("db", db.to_vec()?),
                        ])
                    });
                }
            }
        }
    }
    report.finish();
}
