//! The memory plan: the activations that each block keeps for its backward, chosen for the available memory, and the
//! resulting peak.
//!
//! The memory of a training step on a GPU is a sum that can be written down (`plan/sizes.rs`), and what a choice costs in time can
//! be ranked (`plan/cost.rs`). [`Planner`] goes through the choices there are and takes the fastest that fits:
//!
//! - a block keeps everything, or what it made before the MLP, or its input alone, the last two on the device or in pinned
//!   host memory, and computes the rest again;
//! - dequantized weights stay as long as the run, or from a block's recomputation to its backward, or not at all, or only
//!   one is there at a time;
//! - the MLP runs over the whole batch or over pieces of it.
//!
//! All choices give the same gradients, up to the order of sums where weights are dequantized one at a time or the MLP runs
//! in pieces.

mod cost;
#[cfg(test)]
mod fixtures;
mod from_config;
mod search;
mod sizes;
mod speed;

use std::collections::HashMap;
use std::fmt;

use self::cost::BlockCost;
use self::from_config::Parts;
use self::sizes::Sizes;
pub use self::speed::ExpectedSpeed;
use super::block::Block;
use super::causal_lm::CausalLm;
#[cfg(feature = "cuda")]
use super::context::heads_of_a_rank;
use super::policy::Keep;
#[cfg(feature = "cuda")]
use crate::card::Card;
use crate::card::Rates;
use crate::error::{Error, Result};
use qlora_kernels::weight::FrozenCompute;
use serde::{Deserialize, Serialize};

/// The largest micro-batch of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchShape {
    /// Tokens in all.
    pub tokens: usize,
    /// The length that all sequences have, if they have the same; it decides which attention runs.
    pub uniform_len: Option<usize>,
    /// The number of sequences.
    pub sequences: usize,
    /// Tokens that have a target; all of them if not known.
    pub trained_tokens: usize,
}

impl BatchShape {
    /// `sequences` sequences of `len` tokens, all of them trained.
    pub fn uniform(sequences: usize, len: usize) -> Self {
        let tokens = sequences * len;
        Self { tokens, uniform_len: Some(len), sequences, trained_tokens: tokens }
    }
}

/// Bytes of workspace that attention takes for a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionWorkspace {
    /// In the forward.
    pub forward: u64,
    /// In the backward.
    pub backward: u64,
}

/// A plan of a run's recomputation and offloading, with the memory it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// The activations that each block keeps, by block.
    pub keep: Vec<Keep>,
    /// The number of blocks, from the lowest on, that keep their dequantized weights.
    pub cached_blocks: usize,
    /// Whether uses of a weight that follow each other share one dequantization.
    pub shared_weights: bool,
    /// Whether weights are dequantized one at a time.
    pub split_weights: bool,
    /// The rows that the MLP of a block that recomputes it sees at a time, if not all.
    pub mlp_rows: Option<usize>,
    /// Bytes that are there before a step: weights, adapter, gradient, optimizer.
    pub resident: u64,
    /// The predicted peak in bytes.
    pub peak: u64,
    /// The memory budget, in bytes.
    pub budget: u64,
    /// Bytes of pinned host memory.
    pub pinned: u64,
    /// The same, matrix by matrix: the page-locked buffers that the largest batch needs.
    pub host_buffers: Vec<u64>,
    /// Microseconds of a step that a plan without any saving would not take: an estimate that ranks plans, no prediction.
    pub overhead_us: u64,
}

/// Finds plans for one model and one batch.
#[derive(Clone, Debug)]
pub struct Planner {
    layers: usize,
    lowest: usize,
    /// Tokens of a sequence.
    len: u64,
    sizes: Sizes,
    resident: u64,
    /// Bytes of pinned host memory that a plan may take.
    host: u64,
    rates: Rates,
}

/// One way to run a step.
#[derive(Clone, Copy, Debug)]
struct Choice {
    /// Blocks at the top that keep everything, then those that keep what is before the MLP, then those that keep their
    /// input on the device; the others keep `below`.
    everything: usize,
    attention: usize,
    input: usize,
    below: Keep,
    /// Blocks that keep their dequantized weights, from the lowest on.
    cached: usize,
    shared: bool,
    split: bool,
    mlp_rows: Option<u64>,
}

impl Choice {
    /// Every block keeps `below`, and no weight stays.
    fn leanest_of(below: Keep) -> Self {
        Self { everything: 0, attention: 0, input: 0, below, cached: 0, shared: false, split: false, mlp_rows: None }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |keep: Keep| self.keep.iter().filter(|&&k| k == keep).count();
        let gb = |bytes: u64| bytes as f64 / 1e9;
        write!(f, "peak {:.2} GB", gb(self.peak))?;
        if self.budget < u64::MAX {
            write!(f, " of {:.2} GB", gb(self.budget))?;
        }
        write!(f, " ({:.2} GB before a step)", gb(self.resident))?;
        for (keep, what) in [
            (Keep::Everything, "keep their activations"),
            (Keep::Attention, "recompute their MLP"),
            (Keep::OffloadAttention, "recompute their MLP, the rest is in host memory"),
            (Keep::Input, "recompute from their inputs"),
            (Keep::Offload, "recompute from inputs in host memory"),
        ] {
            if count(keep) > 0 {
                write!(f, "; {} blocks {what}", count(keep))?;
            }
        }
        if let Some(rows) = self.mlp_rows {
            write!(f, "; recomputed MLPs run over {rows} tokens at a time")?;
        }
        if self.cached_blocks > 0 {
            write!(f, "; {} blocks keep their dequantized weights", self.cached_blocks)?;
        }
        if self.split_weights {
            f.write_str("; weights are dequantized one at a time")?;
        }
        if self.pinned > 0 {
            write!(f, "; {:.2} GB of pinned host memory", gb(self.pinned))?;
        }
        Ok(())
    }
}

impl Planner {
    /// For a model with its adapter; `attention` is the workspace of the heads that this rank computes, if
    /// [others share](CausalLm::set_sequence_exchange) a batch. `resident` counts what is on the device before a step and stays: weights, adapter,
    /// gradient and optimizer state.
    ///
    /// # Errors
    /// If the model has no block.
    pub fn new(model: &CausalLm, batch: BatchShape, attention: AttentionWorkspace, resident: u64) -> Result<Self> {
        if model.stack().blocks().is_empty() {
            return Err(Error::Invalid("the model has no block".into()));
        }
        let projections = || model.stack().blocks().iter().flat_map(Block::projections);
        let ranks: HashMap<&str, usize> =
            projections().map(|p| (p.name(), p.slot().map_or(0, |slot| slot.rank))).collect();
        let rank = |module: &str| ranks.get(module).copied().unwrap_or(0);
        let dtype = model.workspace().dtype();
        let parts = model.adapter().map(|adapter| Parts::of(adapter.layout())).unwrap_or_default();
        let planner = Self::of_spec(&model.config().spec(), rank, parts, dtype, batch, attention, resident);
        let four_bits = projections().all(|projection| projection.weight().row_blocks_of_4bit().is_some());
        let planner = planner.with_four_bits(four_bits).with_frozen_compute(model.frozen_compute());
        Ok(planner.shared_by(model.context_ranks()))
    }

    /// For a model on a GPU, asked for what its attention takes. `more` is what will stay on the device besides what is
    /// there now: gradient and optimizer state that are not allocated yet.
    ///
    /// # Errors
    /// If the model is not on a GPU, or the batch is larger than its kernels take.
    #[cfg(feature = "cuda")]
    pub fn on_gpu(model: &CausalLm, batch: BatchShape, more: u64) -> Result<Self> {
        let gpu = model.workspace().gpu().ok_or_else(|| Error::Invalid("the model is not on a GPU".into()))?;
        let config = model.stack().blocks().first().map(|block| block.attention);
        let config = config.ok_or_else(|| Error::Invalid("the model has no block".into()))?;
        let config = heads_of_a_rank(&config, model.context_ranks());
        let (BatchShape { tokens, sequences, uniform_len, .. }, dtype) = (batch, model.workspace().dtype());
        let workspace = qlora_kernels::cuda::attention::workspace(gpu, &config, dtype, tokens, sequences, uniform_len)?;
        let attention = AttentionWorkspace { forward: workspace[0], backward: workspace[1] };
        let planner = Self::new(model, batch, attention, gpu.pool().used()? + more)?;
        let planner = planner.with_rates(Card::of_gpu(gpu)?.rates());
        // Pinned memory cannot be swapped out, and the rest of the machine wants to live.
        Ok(match available_memory() {
            Some(bytes) => planner.with_host_memory(bytes / 2),
            None => planner,
        })
    }

    /// Microseconds of a step that our own attention takes longer than cuDNN's: an estimate that ranks plans.
    pub fn own_attention_us(&self) -> u64 {
        (BlockCost::own_attention(&self.sizes, self.len, self.rates) * self.layers as f64 * 1e6) as u64
    }

    /// The same planner for products with frozen weights in this arithmetic.
    pub fn with_frozen_compute(mut self, compute: FrozenCompute) -> Self {
        self.sizes.fp8 = compute == FrozenCompute::Fp8;
        self
    }

    /// Whether all frozen weights have 4 bits: their copies for fp8 are then made without dequantizing them first.
    pub fn with_four_bits(mut self, four_bits: bool) -> Self {
        self.sizes.four_bits = four_bits;
        self
    }

    /// The same planner for a machine that can give at most so many bytes of pinned host memory. `on_gpu` takes half of
    /// what Linux says is available.
    pub fn with_host_memory(self, bytes: u64) -> Self {
        Self { host: bytes, ..self }
    }

    /// The same planner for a card with these rates. Without, an H100's; `on_gpu` takes those of the device's model.
    pub fn with_rates(self, rates: Rates) -> Self {
        Self { rates, ..self }
    }

    /// The longest single sequence, up to `limit` tokens, whose leanest plan fits `budget` bytes; 0 if none does.
    /// `planner_of` makes the planner for a length. Exact to 64 tokens.
    ///
    /// # Errors
    /// The error of `planner_of`.
    pub fn longest_sequence(limit: usize, budget: u64, planner_of: impl Fn(usize) -> Result<Self>) -> Result<usize> {
        const STEP: usize = 64;
        let fits = |tokens: usize| Ok::<_, Error>(planner_of(tokens)?.leanest().peak <= budget);
        if fits(limit)? {
            return Ok(limit);
        }
        let (mut fitting, mut too_long) = (0, limit.div_ceil(STEP));
        while too_long - fitting > 1 {
            let middle = (fitting + too_long) / 2;
            if fits(middle * STEP)? { fitting = middle } else { too_long = middle }
        }
        Ok(fitting * STEP)
    }

    fn cost(&self) -> BlockCost {
        BlockCost::new(&self.sizes, self.len, self.rates)
    }

    fn describe(&self, choice: &Choice, budget: u64) -> MemoryPlan {
        let keep: Vec<Keep> = (0..self.layers).map(|index| self.wish(index, choice)).collect();
        let recomputes = keep.iter().any(|&keep| keep != Keep::Everything);
        MemoryPlan {
            cached_blocks: choice.cached,
            shared_weights: choice.shared,
            split_weights: choice.split,
            mlp_rows: choice.mlp_rows.filter(|_| recomputes).map(|rows| rows as usize),
            resident: self.resident,
            peak: self.peak(choice),
            budget,
            overhead_us: (self.seconds(&self.cost(), choice) * 1e6) as u64,
            pinned: self.pinned(choice),
            host_buffers: (0..self.layers)
                .flat_map(|index| self.sizes.offloaded_matrices(self.keep(index, choice)))
                .collect(),
            keep,
        }
    }

    /// The activations that a block keeps if it has a backward.
    fn wish(&self, index: usize, choice: &Choice) -> Keep {
        match self.layers - index {
            from_top if from_top <= choice.everything => Keep::Everything,
            from_top if from_top <= choice.everything + choice.attention => Keep::Attention,
            from_top if from_top <= choice.everything + choice.attention + choice.input => Keep::Input,
            _ => choice.below,
        }
    }

    fn keep(&self, index: usize, choice: &Choice) -> Keep {
        if index < self.lowest { Keep::Nothing } else { self.wish(index, choice) }
    }

    /// Bytes of pinned host memory.
    fn pinned(&self, choice: &Choice) -> u64 {
        (0..self.layers).map(|index| self.sizes.offloaded(self.keep(index, choice))).sum()
    }

    fn seconds(&self, cost: &BlockCost, choice: &Choice) -> f64 {
        let block = |index| cost.block(self.keep(index, choice), choice, index < choice.cached, &self.sizes);
        (0..self.layers).map(block).sum()
    }

    fn peak(&self, choice: &Choice) -> u64 {
        let sizes = &self.sizes;
        // One block's checkpoint is leaving while the next runs, one arrives while the block above runs its backward.
        let in_flight = |index: usize| sizes.offloaded(self.keep(index, choice));
        let (mut held, mut peak) = (0, 0);
        for index in 0..self.layers {
            let keep = self.keep(index, choice);
            let leaving = if index > 0 { in_flight(index - 1) } else { 0 };
            peak = peak.max(held + leaving + sizes.forward(keep, choice, index < choice.cached));
            held += sizes.saved(keep);
        }
        peak = peak.max(held + sizes.head());
        for index in (self.lowest..self.layers).rev() {
            let keep = self.keep(index, choice);
            held -= sizes.saved(keep);
            let arriving = if index > self.lowest { in_flight(index - 1) } else { 0 };
            peak = peak.max(held + arriving + sizes.backward(keep, choice, index < choice.cached));
        }
        self.resident + choice.cached as u64 * sizes.block_weights() + peak.max(sizes.embedding())
    }
}

/// Bytes of host memory that can be had without swapping, where Linux says so.
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

impl CausalLm {
    /// Runs later steps as a plan says.
    ///
    /// # Errors
    /// If the plan is for another number of blocks, or a loss of this model is still alive.
    pub fn apply_plan(&mut self, plan: &MemoryPlan) -> Result<()> {
        self.set_keep(plan.keep.clone())?;
        for (index, block) in self.stack().blocks().iter().enumerate() {
            block.policy.set_weights_kept(index < plan.cached_blocks);
            block.policy.set_weights_shared(plan.shared_weights);
            block.policy.set_split(plan.split_weights);
            block.policy.set_mlp_rows(plan.mlp_rows);
        }
        Ok(())
    }

    /// On a GPU, takes the memory of a plan's steps from the system, page-locked memory included, so that no step has to: for
    /// when a run begins.
    ///
    /// # Errors
    /// If the host gives no page-locked memory, or the device fails.
    pub fn reserve_for(&self, plan: &MemoryPlan) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.workspace().gpu() {
            gpu.reserve_pinned(&plan.host_buffers)?;
            gpu.reserve(plan.peak.saturating_sub(gpu.pool().used()?))?;
        }
        let _ = plan;
        Ok(())
    }
}
