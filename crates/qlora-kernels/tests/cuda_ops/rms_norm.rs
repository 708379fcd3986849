//! Root mean square norms: plain, after a residual addition, backward, per head.

use qlora_kernels::ops::rms_norm;

use crate::harness::{GAPS, Report, dtypes, gpu, output, within};

/// Rows, groups, and the width of a group.
const SHAPES: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (3, 1, 7),
    (17, 1, 33),
    (5, 1, 576),
    (3, 1, 2048),
    (2, 1, 4096),
    (3, 1, 5000),
    (2, 1, 16384),
    (6, 9, 64),
    (5, 4, 128),
    (4, 3, 33),
    (7, 2, 80),
];

#[test]
fn norms_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("rms_norm");
    for dtype in dtypes(&device) {
        for (rows, groups, width) in SHAPES {
            // With one element a group, the gradient is a difference of nearly equal numbers unless eps is large.
            let eps = if width == 1 { 1.0 } else { 1e-5 };
            for gap in GAPS {
                let label = format!("{rows} x {groups} x {width}, gap {gap}");
                report.compare(&device, dtype, &label, |side| {
                    let cols = groups * width;
                    let (mut x, delta, dy) =
                        (side.input(rows, cols, gap), side.input(rows, cols, gap), side.input(rows, cols, gap));
                    let weight = side.vector(width, 1.0, 0.3);
                    let mut rstd = side.vector_output(rows * groups);
                    let mut y = side.output(rows, cols, gap);
                    rms_norm::forward(x.view(), weight.view(), eps, y.view_mut(), rstd.view_mut())?;
                    let mut results = vec![output("y", y.to_vec()), within("rstd", 1e-5, rstd.to_vec()?)];

                    let mut dx = side.output(rows, cols, gap);
                    rms_norm::backward(x.view(), weight.view(), rstd.view(), dy.view(), dx.view_mut(), false)?;
                    results.push(output("dx", dx.to_vec()));
                    let mut dx = side.input(rows, cols, gap);
                    rms_norm::backward(x.view(), weight.view(), rstd.view(), dy.view(), dx.view_mut(), true)?;
                    results.push(output("dx +=", dx.to_vec()));

                    let mut rstd = side.vector_output(rows * groups);
                    let mut y = side.output(rows, cols, gap);
                    rms_norm::forward_residual(
                        x.view_mut(),
                        delta.view(),
                        weight.view(),
                        eps,
                        y.view_mut(),
                        rstd.view_mut(),
                    )?;
                    results.extend([
                        output("x + delta", x.to_vec()),
                        output("residual y", y.to_vec()),
                        output("residual rstd", rstd.to_vec()?),
                    ]);
                    Ok(results)
                });
            }
        }
    }
    report.finish();
}

#[test]
fn no_rows_are_fine() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("rms_norm without rows");
    for dtype in dtypes(&device) {
        report.compare(&device, dtype, "0 x 64", |side| {
            let (x, dy, weight) = (side.input(0, 64, 0), side.input(0, 64, 0), side.vector(64, 1.0, 0.3));
            let (mut y, mut rstd) = (side.output(0, 64, 0), side.vector_output(0));
            rms_norm::forward(x.view(), weight.view(), 1e-5, y.view_mut(), rstd.view_mut())?;
            rms_norm::backward(x.view(), weight.view(), rstd.view(), dy.view(), y.view_mut(), false)?;
            Ok(vec![output("y", y.to_vec())])
        });
    }
    report.finish();
}
