//! Ranks that share a micro-batch: as threads on one GPU, which exchange through the host, against one rank that has all of it.

use qlora::kernels::Dtype;
use qlora::model::{CausalLm, Keep, TrainPass};

use super::common::exchange::on_ranks;
use super::common::{computes, gpu, relative_error};
use super::{batch, lora, on_gpu, trained, wide_config};

/// Losses of a training pass and an evaluation, and the gradient.
fn work(model: &CausalLm, lengths: &[usize]) -> (f64, f64, Vec<f32>) {
    let batch = batch(lengths);
    let adapter = model.adapter().unwrap().layout().len();
    let mut gradient = model.workspace().zeros_f32(1, adapter).unwrap();
    let pass = TrainPass::seeded(5);
    let loss = model.accumulate_gradients(&batch, batch.trained_tokens(), pass, gradient.view_mut()).unwrap();
    (loss.sum, model.evaluate(&batch).unwrap().sum, gradient.to_vec().unwrap())
}

#[test]
fn ranks_that_share_a_batch_train_as_one() {
    let Some(device) = gpu() else { return };
    let config = wide_config();
    let batches = [&[301, 1, 77][..], &[509], &[3]];
    for (dtype, of_loss, of_gradient) in [(Dtype::F32, 1e-5, 1e-4), (Dtype::Bf16, 2e-3, 3e-2)] {
        if !computes(&device, dtype) {
            continue;
        }
        for keep in [Keep::Everything, Keep::Input, Keep::OffloadAttention] {
            let build = || {
                // A stream and a pool for each rank.
                let mut model = trained(&config, true, lora(0.1), on_gpu(&gpu().unwrap(), dtype));
                model.set_keep(vec![keep; config.num_hidden_layers]).unwrap();
                model
            };
            for lengths in batches {
                let alone = work(&build(), lengths);
                for ranks in [2, 4] {
                    let results = on_ranks(ranks, |exchange| {
                        let mut model = build();
                        model.set_sequence_exchange(Some(exchange)).unwrap();
                        work(&model, lengths)
                    });
                    let what = format!("{dtype:?}, {keep:?}, sequences of {lengths:?} on {ranks} ranks");
                    let losses = [results.iter().map(|r| r.0).sum::<f64>(), results.iter().map(|r| r.1).sum()];
                    for (together, alone) in losses.into_iter().zip([alone.0, alone.1]) {
                        assert!((together - alone).abs() < of_loss * alone.abs(), "{what}: {together} {alone}");
                    }
                    let mut gradient = vec![0.0; alone.2.len()];
                    for (_, _, part) in &results {
                        gradient.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
                    }
                    let error = relative_error(&gradient, &alone.2);
                    assert!(error < of_gradient, "{what}: {error}");
                }
            }
        }
    }
}
