//! A run on a card that need not be in this machine: planned from the configuration, the model's description and the data, without
//! the weights.

use qlora_core::adapter::TrainedOver;
use qlora_core::card::Card;
use qlora_core::inspect::{OnCard, on_card, weights_in_training};
use qlora_core::model::Planner;
use qlora_core::model::plan::AttentionWorkspace;
use qlora_kernels::Dtype;

use super::placement::streamed_weights;
use super::plan::{chosen, largest_batch_of};
use super::prepare::Prepared;
use super::quantization;
use crate::config::{BasePlacement, FrozenCompute, TrainConfig};
use crate::data::TrainingData;
use crate::error::{Error, Result};
use crate::optimizer::Optimizer;

/// A configured run on a card.
#[derive(Debug)]
#[non_exhaustive]
pub struct CardPlan {
    /// Plan, longest sequence and expected speed.
    pub on: OnCard,
    /// The training data that the plan is for.
    pub training: TrainingData,
}

/// Plans the run of `config` on `card`: what [`Session::plan_memory`](super::Session::plan_memory) would choose there, without that card
/// and without reading weights. `memory_budget` counts; the device that is configured does not. Attention's workspace is that of our own
/// kernels, so the plan is one that fits with and without cuDNN.
///
/// # Errors
/// As [`Session::open_dry_run`](super::Session::open_dry_run), but for the device and the weights. That no plan fits is a result.
pub fn plan_on_card(config: &TrainConfig, card: &Card) -> Result<CardPlan> {
    let mut config = config.clone();
    config.model.device = "cpu".to_owned();
    // The CPU, on which the model is prepared, has no fp8.
    let frozen_compute = config.model.frozen_compute.take();
    let Prepared { config, files, beginning, data: (training, _), .. } = Prepared::planned(&config)?;
    let dtype = config.model.bnb_4bit_compute_dtype.map_or_else(|| card.compute_dtype(), Dtype::from);
    if dtype == Dtype::Bf16 && !card.has_bf16() {
        let message = format!(
            "{} has no bfloat16: leave `bnb_4bit_compute_dtype` out, which takes float16 there, or write \"float16\"",
            card.name
        );
        return Err(Error::Invalid(message));
    }
    if frozen_compute == Some(FrozenCompute::Fp8) && card.compute_capability != (9, 0) {
        let message = format!(
            "frozen_compute = \"fp8\" needs a Hopper GPU (H100, H200, GH200), and {} is none: leave it out",
            card.name
        );
        return Err(Error::Invalid(message));
    }
    let (model, layout) = (files.source.config(), beginning.layout());
    let held = TrainedOver::of(&*files.source, quantization(&config.model))?;
    let mut weights = weights_in_training(model, &held, config.model.offload_embedding);
    match config.model.base_placement {
        BasePlacement::Auto | BasePlacement::Resident => {}
        BasePlacement::Streamed => weights = streamed_weights(&*files.source, quantization(&config.model), weights)?,
        BasePlacement::Sharded => {
            let message =
                "--card plans for a single rank, and base_placement is \"sharded\": leave it out, or take \"streamed\"";
            return Err(Error::Invalid(message.to_owned()));
        }
    }
    // The adapter's values, and what the optimizer holds.
    let state = 4 * layout.len() + Optimizer::bytes_for(&config.training, layout.len());
    let planner_of = |batch: qlora_core::model::BatchShape| {
        let attention = AttentionWorkspace::of_own_kernels(model, batch.tokens);
        let planner = Planner::from_config(model, layout, dtype, batch, attention, weights + state as u64);
        let compute = frozen_compute.map_or_else(Default::default, Into::into);
        let planner = planner.with_four_bits(matches!(held, TrainedOver::Bits4 { .. })).with_frozen_compute(compute);
        Ok(planner.with_context_parallel(config.training.context_parallel_size))
    };
    let batch = largest_batch_of(&config, &training)?;
    let budget = config.training.memory_budget.map(|budget| (budget * 1e9) as u64);
    let choose = |planner: &Planner, budget| chosen(config.training.gradient_checkpointing, planner, budget);
    let on = on_card(card, dtype, batch, budget, model.max_position_embeddings, planner_of, choose)?;
    Ok(CardPlan { on, training })
}
