//! One micro-batch over several ranks (context parallelism), which are threads here, against one rank that has all of it.

use std::sync::Arc;

use qlora::batch::Batch;
use qlora::kernels::Workspace;
use qlora::lora::{LoraConfig, TargetModules, TokenIndices};
use qlora::model::context::PlannedExchange;
use qlora::model::{CausalLm, Keep, TrainPass};
use qlora::sampling::GenerationConfig;

use super::common::exchange::on_ranks;
use super::common::{add_random_adapter, relative_error, tiny_config, tiny_model};
use super::{batch, document, lora};

/// A model's work on a batch: the losses of a training pass and of an evaluation, and the gradient.
fn work(model: &CausalLm, batch: &Batch) -> (f64, f64, Vec<f32>) {
    let mut gradient = vec![0.0; model.adapter().unwrap().layout().len()];
    let pass = TrainPass::seeded(5);
    let loss = model.accumulate_gradients(batch, batch.trained_tokens(), pass, (&mut gradient).into()).unwrap();
    let evaluated = model.evaluate(batch).unwrap();
    assert_eq!(loss.trained_tokens, evaluated.trained_tokens);
    (loss.sum, evaluated.sum, gradient)
}

/// The sums over ranks, in their order.
fn shared(ranks: usize, batch: &Batch, model: impl Fn() -> CausalLm + Sync) -> (f64, f64, Vec<f32>) {
    let results = on_ranks(ranks, |exchange| {
        let mut model = model();
        model.set_sequence_exchange(Some(exchange)).unwrap();
        work(&model, batch)
    });
    let mut sum = results[0].clone();
    for (loss, evaluated, gradient) in &results[1..] {
        (sum.0, sum.1) = (sum.0 + loss, sum.1 + evaluated);
        sum.2.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value);
    }
    sum
}

/// Packed sequences of unequal lengths, one sequence, and fewer tokens than ranks; one in which only the end is trained.
fn batches() -> Vec<Batch> {
    let (ids, mut labels) = document(13, 6);
    labels[..11].fill(-100);
    vec![
        batch(&[document(11, 1), document(1, 2), document(6, 3)]),
        batch(&[document(40, 4)]),
        batch(&[document(3, 5)]),
        batch(&[(ids, labels)]),
    ]
}

fn all_linear() -> LoraConfig {
    LoraConfig { lora_dropout: 0.2, ..lora() }
}

fn build(lora: &LoraConfig, quantized: bool, keep: &[Keep]) -> CausalLm {
    let mut model = tiny_model(&tiny_config(), quantized, 7, Workspace::poisoned());
    add_random_adapter(&mut model, lora.clone(), 3);
    model.set_keep(keep.to_vec()).unwrap();
    model
}

#[test]
fn ranks_that_share_a_batch_have_the_losses_and_gradients_of_one() {
    let head = LoraConfig {
        target_modules: TargetModules::list(["q_proj", "v_proj", "embed_tokens", "lm_head"]),
        ..all_linear()
    };
    let tokens = LoraConfig { trainable_token_indices: TokenIndices::of_embedding([5, 9, 14]), ..all_linear() };
    let dora = LoraConfig { use_dora: true, ..all_linear() };
    let keep = [Keep::Everything, Keep::Attention, Keep::Input];
    for (name, lora) in [("all-linear", all_linear()), ("head", head), ("tokens", tokens), ("dora", dora)] {
        for batch in batches() {
            let alone = work(&build(&lora, true, &keep), &batch);
            // Of two key and value heads each of four ranks has one.
            for ranks in [2, 4] {
                let together = shared(ranks, &batch, || build(&lora, true, &keep));
                let what = format!("{name}, {} tokens on {ranks} ranks", batch.tokens.len());
                for (alone, together) in [(alone.0, together.0), (alone.1, together.1)] {
                    assert!((alone - together).abs() < 1e-5 * alone.abs(), "{what}: {alone} {together}");
                }
                let error = relative_error(&together.2, &alone.2);
                assert!(error < 1e-5, "{what}: {error}");
            }
        }
    }
}

#[test]
fn recomputed_blocks_of_ranks_that_share_have_the_same_bits() {
    let lora = all_linear();
    for batch in batches() {
        let kept = shared(2, &batch, || build(&lora, false, &[Keep::Everything; 3]));
        for keep in [[Keep::Input; 3], [Keep::Attention; 3], [Keep::Offload; 3]] {
            let other = shared(2, &batch, || build(&lora, false, &keep));
            assert!(kept == other, "{keep:?}");
        }
    }
}

#[test]
fn ranks_over_which_heads_do_not_divide_are_refused() {
    let mut model = build(&lora(), false, &[Keep::Everything; 3]);
    let error = model.set_sequence_exchange(Some(Arc::new(PlannedExchange { ranks: 3 }))).unwrap_err().to_string();
    assert!(error.contains("4 query heads and 2 key/value heads do not divide over 3 ranks"), "{error}");
    assert!(error.contains("context_parallel_size can be 1, 2, 4"), "{error}");
}

#[test]
fn a_rank_of_a_group_answers_by_itself_and_weighs_no_whole_sequences() {
    let mut model = build(&lora(), false, &[Keep::Everything; 3]);
    let config = GenerationConfig { max_new_tokens: 5, ..GenerationConfig::default() };
    let answer = |model: &CausalLm| {
        let answer = qlora::generate::generate(model, &[3, 1, 4], &config, |_| std::ops::ControlFlow::Continue(()));
        answer.unwrap().tokens
    };
    let expected = answer(&model);
    model.set_sequence_exchange(Some(Arc::new(PlannedExchange { ranks: 2 }))).unwrap();
    assert_eq!(answer(&model), expected);
    let batch = batch(&[document(11, 1)]);
    let mut gradient = vec![0.0; model.adapter().unwrap().layout().len()];
    let mut weigh = |losses: &[f64]| Ok(vec![0.0; losses.len()]);
    let error = model
        .accumulate_weighted_gradients(&batch, TrainPass::default(), &mut weigh, (&mut gradient).into())
        .unwrap_err()
        .to_string();
    assert!(error.contains("context_parallel_size"), "{error}");
    let error = model.evaluate(&batch).unwrap_err().to_string();
    assert!(error.contains("opened to plan"), "{error}");
}
