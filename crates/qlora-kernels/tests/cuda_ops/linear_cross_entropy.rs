//! The output head and the loss.

use qlora_kernels::ops::linear_cross_entropy::{self, GradScale, IGNORE_INDEX};
use qlora_kernels::quant::{QuantConfig, QuantType};
use qlora_kernels::{Dtype, View};

use crate::harness::{GAPS, Kind, Report, Side, dtypes, gpu, half, number, output};

/// Every third token is ignored, unless `all`.
fn targets(tokens: usize, vocab: usize, all: bool) -> Vec<i64> {
    let target = |i: usize| if !all && i % 3 == 1 { IGNORE_INDEX } else { (i * i * 31 % vocab) as i64 };
    (0..tokens).map(target).collect()
}

#[test]
fn losses_and_gradients_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("linear_cross_entropy");
    let nf4 = Kind::Bits4(QuantConfig { quant_type: QuantType::Nf4, blocksize: 64, double_quant: true });
    for dtype in dtypes(&device) {
        for kind in [Kind::Plain(dtype), Kind::Plain(Dtype::Bf16), nf4] {
            for (tokens, vocab, width) in [(1, 40, 8), (37, 61, 32), (5, 1000, 33), (140, 5003, 64)] {
                for all in [false, true] {
                    for gap in GAPS {
                        let label = format!("{kind:?}, {tokens} x {vocab} x {width}, all {all}, gap {gap}");
                        report.compare(&device, dtype, &label, |side| {
                            let head = side.weight(kind, vocab, width);
                            let hidden = side.scaled_input(tokens, width, gap, 3.0);
                            let targets = targets(tokens, vocab, all);
                            let mut dhidden = side.output(tokens, width, gap);
                            let both = linear_cross_entropy::forward_backward(
                                hidden.view(),
                                &*head,
                                &targets,
                                tokens,
                                dhidden.view_mut(),
                                &side.workspace,
                            )?;
                            let alone =
                                linear_cross_entropy::forward(hidden.view(), &*head, &targets, &side.workspace)?;
                            assert_eq!(both.trained_tokens, alone.trained_tokens);
                            Ok(vec![
                                number("loss", both.sum),
                                number("loss alone", alone.sum),
                                output("dhidden", dhidden.to_vec()),
                            ])
                        });
                    }
                }
            }
        }
    }
    report.finish();
}

#[test]
fn several_chunks_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("linear_cross_entropy in chunks");
    // 2^27 logits a chunk: 1,024 rows of this vocabulary.
    let (tokens, vocab, width) = (1700, 128_256, 16);
    for dtype in [Dtype::F32, half(&device)] {
        // A probability of 1 / vocab divided by all tokens is below float16's smallest number: there, losses are scaled.
        let divisor = if dtype == Dtype::F16 { 1 } else { tokens };
        for all in [false, true] {
            report.compare(&device, dtype, &format!("all {all}"), |side| {
                let head = side.weight(Kind::Plain(dtype), vocab, width);
                let hidden = side.input(tokens, width, 0);
                let mut dhidden = side.output(tokens, width, 0);
                let (hidden, targets) = (hidden.view(), targets(tokens, vocab, all));
                let workspace = &side.workspace;
                let loss = linear_cross_entropy::forward_backward(
                    hidden,
                    &*head,
                    &targets,
                    divisor,
                    dhidden.view_mut(),
                    workspace,
                )?;
                Ok(vec![number("loss", loss.sum), output("dhidden", dhidden.to_vec())])
            });
        }
    }
    report.finish();
}

#[test]
fn without_targets_the_loss_and_its_gradient_are_zero() {
    let Some(device) = gpu() else { return };
    for dtype in dtypes(&device) {
        let side = Side::gpu(&device, dtype, 1);
        let head = side.weight(Kind::Plain(dtype), 61, 32);
        for tokens in [0, 9] {
            let (hidden, mut dhidden) = (side.input(tokens, 32, 0), side.output(tokens, 32, 0));
            let targets = vec![IGNORE_INDEX; tokens];
            let (hidden, workspace) = (hidden.view(), &side.workspace);
            let loss =
                linear_cross_entropy::forward_backward(hidden, &*head, &targets, 7, dhidden.view_mut(), workspace);
            let loss = loss.unwrap();
            assert_eq!((loss.sum, loss.trained_tokens), (0.0, 0));
            assert_eq!(dhidden.to_vec(), vec![0.0; tokens * 32]);
        }
    }
}

#[test]
fn one_token_of_vocabulary_costs_nothing() {
    let Some(device) = gpu() else { return };
    for dtype in dtypes(&device) {
        let side = Side::gpu(&device, dtype, 1);
        let head = side.weight(Kind::Plain(dtype), 1, 8);
        let (hidden, mut dhidden) = (side.input(5, 8, 0), side.output(5, 8, 0));
        let (hidden, workspace) = (hidden.view(), &side.workspace);
        let loss = linear_cross_entropy::forward_backward(hidden, &*head, &[0; 5], 5, dhidden.view_mut(), workspace);
        let loss = loss.unwrap().sum;
        assert!(loss.abs() < 1e-5, "{loss}");
        assert!(dhidden.to_vec().iter().all(|x| x.abs() < 1e-5), "{:?}", dhidden.to_vec());
    }
}

#[test]
fn what_is_not_a_number_shows_in_the_loss() {
    let Some(device) = gpu() else { return };
    for dtype in dtypes(&device) {
        let side = Side::gpu(&device, dtype, 1);
        let head = side.weight(Kind::Plain(dtype), 61, 32);
        let mut values = side.values(5 * 32, 1.0);
        values[2 * 32 + 7] = f32::NAN;
        let hidden = side.window_of(&values, 5, 32, 0);
        let loss = |targets: &[i64]| {
            let mut dhidden = side.output(5, 32, 0);
            let (hidden, workspace) = (hidden.view(), &side.workspace);
            linear_cross_entropy::forward_backward(hidden, &*head, targets, 5, dhidden.view_mut(), workspace)
                .unwrap()
                .sum
        };
        assert!(loss(&[1, 2, 3, 4, 5]).is_nan());
        assert!(loss(&[1, 2, IGNORE_INDEX, 4, 5]).is_finite(), "an ignored token's NaN is not read");
    }
}

#[test]
fn a_target_outside_the_vocabulary_is_refused() {
    let Some(device) = gpu() else { return };
    let side = Side::gpu(&device, half(&device), 1);
    let head = side.weight(Kind::Plain(Dtype::Bf16), 61, 32);
    let hidden = side.input(2, 32, 0);
    let hidden: View = hidden.view();
    let error = linear_cross_entropy::forward(hidden, &*head, &[3, 61], &side.workspace).unwrap_err().to_string();
    assert!(error.contains("row 1 has target 61"), "{error}");
}

#[test]
fn losses_of_rows_and_gradients_with_a_scale_a_row_agree_with_the_cpu() {
    let Some(device) = gpu() else { return };
    let mut report = Report::new("linear_cross_entropy by rows");
    for dtype in dtypes(&device) {
        for (tokens, vocab, width) in [(1, 40, 8), (37, 61, 32), (140, 20_003, 64)] {
            for all in [false, true] {
                report.compare(&device, dtype, &format!("{tokens} x {vocab} x {width}, all {all}"), |side| {
                    let head = side.weight(Kind::Plain(dtype), vocab, width);
                    let hidden = side.scaled_input(tokens, width, 0, 3.0);
                    let (targets, workspace) = (targets(tokens, vocab, all), &side.workspace);
                    let scales: Vec<f32> = (0..tokens).map(|row| 0.02 * (row % 7) as f32 - 0.05).collect();
                    let losses = linear_cross_entropy::token_losses(hidden.view(), &*head, &targets, workspace)?;
                    let mut dhidden = side.output(tokens, width, 0);
                    let scale = GradScale::PerRow(&scales);
                    let pending = linear_cross_entropy::enqueue_scaled(
                        hidden.view(),
                        &*head,
                        &targets,
                        scale,
                        dhidden.view_mut(),
                        workspace,
                    )?;
                    let losses = losses.iter().map(|&loss| loss as f32).collect();
                    let sum = pending.wait()?.sum;
                    Ok(vec![number("loss", sum), output("losses", losses), output("dhidden", dhidden.to_vec())])
                });
            }
        }
    }
    report.finish();
}
