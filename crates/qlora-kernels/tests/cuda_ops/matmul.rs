//! Matrix products: the three transpositions, odd sizes and strides, accumulation.

use qlora_kernels::ops::matmul;
use qlora_kernels::{View, Workspace};

use crate::harness::{GAPS, Report, dtypes, gpu, half, output, within};

/// m, n, k.
const SHAPES: [[usize; 3]; 12] = [
    [1, 1, 1],
    [1, 37, 50],
    [2, 5, 16],
    [5, 3, 7],
    [7, 65, 129],
    [130, 192, 80],
    [300, 70, 31],
    [257, 100, 17],
    [64, 128, 256],
    [9, 1, 300],
    [40, 17, 1],
    [33, 129, 1000],
];

#[test]
fn products_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("matmul");
    for dtype in dtypes(&device) {
        for [m, n, k] in SHAPES {
            for gap in GAPS {
                for (alpha, beta) in [(1.0, 0.0), (1.0, 1.0), (0.25, -0.5)] {
                    let label = format!("{m} x {n} x {k}, gap {gap}, alpha {alpha}, beta {beta}");
                    report.compare(&device, dtype, &label, |side| {
                        let target = || match beta == 0.0 {
                            true => side.output(m, n, gap),
                            false => side.input(m, n, gap),
                        };
                        let (mut nt, mut nn, mut tn) = (target(), target(), target());
                        let (a, at) = (side.input(m, k, gap), side.input(k, m, gap));
                        let (b, bt) = (side.input(k, n, gap), side.input(n, k, gap));
                        matmul::nt(a.view(), bt.view(), nt.view_mut(), alpha, beta)?;
                        matmul::nn(a.view(), b.view(), nn.view_mut(), alpha, beta)?;
                        matmul::tn(at.view(), b.view(), tn.view_mut(), alpha, beta)?;
                        // Gradients of adapters are f32, whatever the activations are.
                        let mut wide = side.vector_output(m * n);
                        matmul::tn(at.view(), b.view(), wide.view_mut().reshape(m, n), 1.0, 0.0)?;
                        Ok(vec![
                            output("nt", nt.to_vec()),
                            output("nn", nn.to_vec()),
                            output("tn", tn.to_vec()),
                            within("tn to f32", 1e-5, wide.to_vec()?),
                        ])
                    });
                }
            }
        }
    }
    report.finish();
}

#[test]
fn nothing_to_multiply_is_fine() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("empty products");
    for dtype in dtypes(&device) {
        for [m, n, k] in [[0, 5, 3], [5, 0, 3], [4, 3, 0]] {
            report.compare(&device, dtype, &format!("{m} x {n} x {k}"), |side| {
                let (a, bt, mut c) = (side.input(m, k, 0), side.input(n, k, 0), side.output(m, n, 0));
                matmul::nt(a.view(), bt.view(), c.view_mut(), 1.0, 0.0)?;
                Ok(vec![output("c", c.to_vec())])
            });
        }
    }
    report.finish();
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let Some(device) = gpu() else { return };
    let workspace = Workspace::poisoned_on(&device, half(&device)).unwrap();
    let (a, b, mut c) =
        (workspace.zeros(2, 3).unwrap(), workspace.zeros(4, 5).unwrap(), workspace.zeros(2, 4).unwrap());
    let error = matmul::nt(a.view(), b.view(), c.view_mut(), 1.0, 0.0).unwrap_err().to_string();
    assert_eq!(error, "matmul_nt: the second factor has shape [5], expected [3]");
    let error = matmul::nt(View::new(&[0.0; 6], 2, 3), b.view(), c.view_mut(), 1.0, 0.0).unwrap_err().to_string();
    assert_eq!(error, "matmul_nt: an argument is on the CPU, the others are on the GPU");
    let wide = workspace.zeros_f32(4, 3).unwrap();
    let error = matmul::nt(a.view(), wide.view(), c.view_mut(), 1.0, 0.0).unwrap_err().to_string();
    assert!(error.contains("element types differ"), "{error}");
}
