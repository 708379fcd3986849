//! What each block keeps for its backward, chosen for the memory there is, and the peak that follows.
//!
//! The memory of a training step on a GPU is a sum that can be written down: every matrix of
//! [`block`](super::block) has a size that follows from the model and the batch. [`Planner`] walks through the stages of a
//! step (each block's forward, the head, each block's backward) with the sizes of what is alive in each, and takes the
//! largest. From the choices that fit the budget it takes the fastest:
//!
//! 1. keep everything in as many of the upper blocks as possible, recompute the others from their inputs (a block kept
//!    saves most of a forward: about 5 ms a GB on an H100),
//! 2. with what is left, keep dequantized weights (about 1 ms a GB),
//! 3. if not even the inputs fit: move them to pinned host memory, then dequantize one weight at a time.
//!
//! All choices give the same gradients, up to the order of sums where weights are dequantized one at a time.

mod from_config;

use std::fmt;

use qlora_kernels::matrix::padded_cols;
use qlora_kernels::ops::linear_cross_entropy::rows_of_chunk_on_gpu;
use qlora_kernels::ops::linear_group::margin;

use super::block::{Block, Keep};
use super::causal_lm::CausalLm;
use super::projection::Projection;
use crate::error::{Error, Result};

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

/// What a run is going to do, and the memory that takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// What each block keeps.
    pub keep: Vec<Keep>,
    /// How many blocks, from the lowest on, keep their dequantized weights.
    pub cached_blocks: usize,
    /// Whether weights are dequantized one at a time.
    pub split_weights: bool,
    /// Bytes that are there before a step: weights, adapter, gradient, optimizer.
    pub resident: u64,
    /// The predicted peak in bytes.
    pub peak: u64,
    /// What it had to fit into.
    pub budget: u64,
    /// Bytes of pinned host memory.
    pub pinned: u64,
}

/// Sizes of a model and a batch from which peaks are computed.
#[derive(Clone, Debug)]
pub struct Planner {
    layers: usize,
    lowest: usize,
    tokens: u64,
    trained: u64,
    /// Bytes of an activation's element.
    size: u64,
    hidden: u64,
    vocab: u64,
    sizes: BlockSizes,
    attention: AttentionWorkspace,
    resident: u64,
}

/// Widths in elements of one block (all blocks of a model are alike but for their adapters; the widest margins count).
#[derive(Clone, Copy, Debug, Default)]
struct BlockSizes {
    q: u64,
    qkv: u64,
    mlp: u64,
    heads: u64,
    qk_norm: bool,
    /// Extra columns of the groups qkv, o, gate|up, down.
    rp: [u64; 4],
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
            (Keep::Input, "recompute from their inputs"),
            (Keep::Offload, "recompute from inputs in host memory"),
        ] {
            if count(keep) > 0 {
                write!(f, "; {} blocks {what}", count(keep))?;
            }
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

/// [`padded_cols`] in the planner's numbers.
fn padded(cols: u64, rp: u64) -> u64 {
    padded_cols(cols as usize, rp as usize) as u64
}

/// One way to run a step.
#[derive(Clone, Copy, Debug)]
struct Choice {
    /// Upper blocks that keep everything; the others keep `below`.
    kept: usize,
    below: Keep,
    cached: usize,
    split: bool,
}

impl Planner {
    /// For a model with its adapter. `resident` counts what is on the device before a step and stays: weights, adapter,
    /// gradient and optimizer state.
    ///
    /// # Errors
    /// If the model has no block.
    pub fn new(model: &CausalLm, batch: BatchShape, attention: AttentionWorkspace, resident: u64) -> Result<Self> {
        let stack = model.stack();
        let first = stack.blocks().first().ok_or_else(|| Error::Invalid("the model has no block".into()))?;
        let mut sizes = BlockSizes {
            q: first.q.outputs() as u64,
            qkv: (first.q.outputs() + first.k.outputs() + first.v.outputs()) as u64,
            mlp: first.gate.outputs() as u64,
            heads: first.attention.heads as u64,
            qk_norm: first.qk_norm.is_some(),
            rp: [0; 4],
        };
        for block in stack.blocks() {
            for (rp, group) in sizes.rp.iter_mut().zip(groups(block)) {
                *rp = (*rp).max(margin(group.iter().map(|projection| projection.slot())) as u64);
            }
        }
        let lowest = stack.blocks().iter().position(Block::is_trained).unwrap_or(stack.blocks().len());
        Ok(Self {
            layers: stack.blocks().len(),
            lowest,
            tokens: batch.tokens as u64,
            trained: batch.trained_tokens as u64,
            size: model.workspace().dtype().size() as u64,
            hidden: model.config().hidden_size as u64,
            vocab: model.config().vocab_size as u64,
            sizes,
            attention,
            resident,
        })
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
        let (BatchShape { tokens, sequences, uniform_len, .. }, dtype) = (batch, model.workspace().dtype());
        let workspace = qlora_kernels::cuda::attention::workspace(gpu, &config, dtype, tokens, sequences, uniform_len)?;
        let attention = AttentionWorkspace { forward: workspace[0], backward: workspace[1] };
        Self::new(model, batch, attention, gpu.pool().used()? + more)
    }

    /// The fastest plan that fits `budget` bytes.
    ///
    /// # Errors
    /// If none does; the message says how much the leanest one needs.
    pub fn plan(&self, budget: u64) -> Result<MemoryPlan> {
        let keeping = (0..=self.layers).rev().map(|kept| Choice { kept, below: Keep::Input, cached: 0, split: false });
        let leaner = [false, true].map(|split| Choice { kept: 0, below: Keep::Offload, cached: 0, split });
        let mut choices = keeping.chain(leaner);
        let Some(mut choice) = choices.find(|choice| self.peak(choice) <= budget) else {
            let needed = self.peak(&leaner[1]);
            return Err(Error::Invalid(format!(
                "a step over {} tokens needs at least {:.2} GB of GPU memory ({:.2} GB of it for the model, its adapter \
                 and the optimizer), {:.2} GB are there: use shorter sequences, fewer at a time (with more \
                 gradient_accumulation_steps), or a smaller rank",
                self.tokens,
                needed as f64 / 1e9,
                self.resident as f64 / 1e9,
                budget as f64 / 1e9
            )));
        };
        if !choice.split {
            choice = self.with_cache(choice, budget);
        }
        Ok(self.describe(&choice, budget))
    }

    /// With as many blocks' dequantized weights as fit.
    fn with_cache(&self, mut choice: Choice, budget: u64) -> Choice {
        while choice.cached < self.layers && self.peak(&Choice { cached: choice.cached + 1, ..choice }) <= budget {
            choice.cached += 1;
        }
        choice
    }

    /// [`Self::plan`] without keeping activations: every block recomputes.
    ///
    /// # Errors
    /// As there.
    pub fn plan_recomputing(&self, budget: u64) -> Result<MemoryPlan> {
        let lean = Choice { kept: 0, below: Keep::Input, cached: 0, split: false };
        match self.peak(&lean) <= budget {
            true => Ok(self.describe(&self.with_cache(lean, budget), budget)),
            false => self.plan(budget),
        }
    }

    /// The plan that needs the least memory, whatever the budget.
    pub fn leanest(&self) -> MemoryPlan {
        self.describe(&Choice { kept: 0, below: Keep::Offload, cached: 0, split: true }, u64::MAX)
    }

    /// The plan that keeps everything, whatever the budget.
    pub fn richest(&self) -> MemoryPlan {
        let choice = Choice { kept: self.layers, below: Keep::Input, cached: self.layers, split: false };
        self.describe(&choice, u64::MAX)
    }

    fn describe(&self, choice: &Choice, budget: u64) -> MemoryPlan {
        let below = self.layers - choice.kept;
        let keep = (0..self.layers).map(|i| if i < below { choice.below } else { Keep::Everything }).collect();
        let offloaded = if choice.below == Keep::Offload { below.saturating_sub(self.lowest) as u64 } else { 0 };
        MemoryPlan {
            keep,
            cached_blocks: choice.cached,
            split_weights: choice.split,
            resident: self.resident,
            peak: self.peak(choice),
            budget,
            pinned: offloaded * self.activation(self.hidden),
        }
    }

    /// Bytes of `[tokens, cols]` activations.
    fn activation(&self, cols: u64) -> u64 {
        self.tokens * cols * self.size
    }

    /// Bytes of `[tokens, cols]` in f32.
    fn statistic(&self, cols: u64) -> u64 {
        self.tokens * cols * 4
    }

    /// The augmented weight of a group.
    fn weight(&self, outputs: u64, inputs: u64, rp: u64) -> u64 {
        (outputs + rp) * padded(inputs, rp) * self.size
    }

    /// The dequantized weights of a whole block.
    fn block_weights(&self) -> u64 {
        let BlockSizes { q, qkv, mlp, rp, .. } = self.sizes;
        self.weight(qkv, self.hidden, rp[0])
            + self.weight(self.hidden, q, rp[1])
            + self.weight(2 * mlp, self.hidden, rp[2])
            + self.weight(self.hidden, mlp, rp[3])
    }

    /// Scratch for the largest of a group's weights; with `cached`, it is there already.
    fn scratch(&self, group: usize, choice: &Choice, cached: bool) -> u64 {
        let BlockSizes { q, qkv, mlp, rp, .. } = self.sizes;
        // Split, the members' ranks are a third or half of the group's; the difference is lost in the rounding.
        let (outputs, inputs) = match (group, choice.split) {
            (0, false) => (qkv, self.hidden),
            (0, true) => (q, self.hidden),
            (1, _) => (self.hidden, q),
            (2, false) => (2 * mlp, self.hidden),
            (2, true) => (mlp, self.hidden),
            _ => (self.hidden, mlp),
        };
        if cached { 0 } else { self.weight(outputs, inputs, rp[group]) }
    }

    /// f32 gradients of a group's factors before they are added to the flat gradient.
    fn factor_gradients(&self, outputs: u64, inputs: u64, rp: u64) -> u64 {
        4 * rp * (outputs + inputs)
    }

    /// What a block keeps.
    fn saved(&self, keep: Keep) -> u64 {
        let BlockSizes { q, qkv, mlp, heads, qk_norm, rp } = self.sizes;
        match keep {
            Keep::Nothing | Keep::Offload => 0,
            Keep::Input => self.activation(self.hidden),
            Keep::Everything => {
                let raw = if qk_norm { self.activation(qkv) + self.statistic(2 * heads) } else { 0 };
                self.activation(2 * self.hidden + qkv + padded(q, rp[1]) + padded(2 * mlp, rp[2]))
                    + self.activation(rp.iter().sum())
                    + self.statistic(2 + heads)
                    + raw
            }
        }
    }

    /// The peak of a block's forward beside what other blocks hold.
    fn forward(&self, keep: Keep, choice: &Choice, cached: bool) -> u64 {
        let BlockSizes { q, qkv, mlp, heads, qk_norm, rp } = self.sizes;
        let hidden = self.hidden;
        let (act, stat) = (|cols| self.activation(cols), |cols| self.statistic(cols));
        let raw = if qk_norm { act(qkv) + stat(2 * heads) } else { 0 };
        let mut live = act(hidden) + stat(1);
        let project = live + act(padded(hidden, rp[0]) + qkv + rp[0]) + self.scratch(0, choice, cached);
        live += act(qkv + rp[0]) + raw;
        let attend = live + act(padded(q, rp[1])) + stat(heads) + self.attention.forward;
        live += act(padded(q, rp[1])) + stat(heads);
        let out = live + act(hidden + rp[1]) + self.scratch(1, choice, cached);
        live += act(hidden + rp[1]) + stat(1);
        let gate_up =
            live + act(padded(hidden, rp[2]) + padded(2 * mlp, rp[2]) + rp[2]) + self.scratch(2, choice, cached);
        live += act(rp[2]);
        let hidden_mlp = live + act(padded(2 * mlp, rp[2]) + padded(mlp, rp[3]));
        let gate_up_kept = if keep == Keep::Everything { act(padded(2 * mlp, rp[2])) } else { 0 };
        let down = live + gate_up_kept + act(padded(mlp, rp[3]) + hidden + rp[3]) + self.scratch(3, choice, cached);
        [project, attend, out, gate_up, hidden_mlp, down].into_iter().max().unwrap_or(0)
    }

    /// The peak of a block's backward beside what the blocks below hold: `dy` and the block's activations included.
    fn backward(&self, keep: Keep, choice: &Choice, cached: bool) -> u64 {
        let BlockSizes { q, qkv, mlp, heads, rp, .. } = self.sizes;
        let hidden = self.hidden;
        let act = |cols| self.activation(cols);
        let gradient = act(padded(hidden, rp[1].max(rp[3])));
        let recompute = match keep {
            Keep::Everything => 0,
            // The last projection is not run again.
            _ => gradient + self.forward(Keep::Nothing, choice, cached),
        };
        // What the forward left, without gate and up.
        let kept = self.saved(Keep::Everything) - act(padded(2 * mlp, rp[2]));
        let gate_up = act(padded(2 * mlp, rp[2]));
        let factors = |outputs, inputs, group: usize| self.factor_gradients(outputs, inputs, rp[group]);
        let (weight, ds) = (|group| self.scratch(group, choice, cached), |group: usize| act(rp[group]));
        let part = if choice.split { act(hidden) } else { 0 };
        let down = gradient + kept + gate_up + act(mlp) + ds(3) + weight(3).max(factors(hidden, mlp, 3) + ds(3));
        let mlp_input = gradient
            + kept
            + gate_up
            + act(hidden)
            + ds(2)
            + (weight(2) + part).max(act(hidden) + factors(2 * mlp, hidden, 2));
        // Now gate, up and their factors are gone.
        let out = gradient + kept + act(q) + ds(1) + weight(1).max(factors(hidden, q, 1));
        let attend = gradient + kept + act(q) + act(padded(qkv, rp[0])) + self.attention.backward;
        let after = kept - act(qkv + padded(q, rp[1])) - self.statistic(heads);
        let input = gradient
            + after
            + act(padded(qkv, rp[0]) + hidden)
            + ds(0)
            + (weight(0) + part).max(act(hidden) + factors(qkv, hidden, 0));
        [recompute, down, mlp_input, out, attend, input].into_iter().max().unwrap_or(0)
    }

    /// The peak of loss and head, beside what the blocks hold.
    fn head(&self) -> u64 {
        let chunk = rows_of_chunk_on_gpu(self.vocab as usize) as u64;
        let logits = chunk.min(self.trained) * self.vocab * self.size;
        let gathered = if self.trained < self.tokens { 2 * self.trained * self.hidden * self.size } else { 0 };
        // The last block's output, its norm, and the gradient of the norm.
        self.activation(3 * self.hidden) + self.statistic(1) + 4 * self.trained + gathered + logits
    }

    fn peak(&self, choice: &Choice) -> u64 {
        let below = self.layers - choice.kept;
        let keep_of = |index: usize| match index {
            _ if index < self.lowest => Keep::Nothing,
            _ if index < below => choice.below,
            _ => Keep::Everything,
        };
        let x = self.activation(self.hidden);
        // One checkpoint is leaving while the next block runs, one arrives while the block above runs backward.
        let in_flight = |index: usize| if keep_of(index) == Keep::Offload { x } else { 0 };
        let (mut held, mut peak) = (0, 0);
        for index in 0..self.layers {
            let leaving = if index > 0 { in_flight(index - 1) } else { 0 };
            let cached = index < choice.cached;
            peak = peak.max(held + leaving + self.forward(keep_of(index), choice, cached));
            held += self.saved(keep_of(index));
        }
        peak = peak.max(held + self.head());
        for index in (self.lowest..self.layers).rev() {
            held -= self.saved(keep_of(index));
            let arriving = if index > self.lowest { in_flight(index - 1) } else { 0 };
            peak = peak.max(held + arriving + self.backward(keep_of(index), choice, index < choice.cached));
        }
        self.resident + choice.cached as u64 * self.block_weights() + peak
    }
}

fn groups(block: &Block) -> [Vec<&Projection>; 4] {
    [vec![&block.q, &block.k, &block.v], vec![&block.o], vec![&block.gate, &block.up], vec![&block.down]]
}

impl CausalLm {
    /// Runs later steps as a plan says.
    ///
    /// # Errors
    /// If the plan is for another number of blocks, or a loss of this model is still alive.
    pub fn apply_plan(&mut self, plan: &MemoryPlan) -> Result<()> {
        self.set_keep(plan.keep.clone())?;
        for (index, block) in self.stack().blocks().iter().enumerate() {
            block.caches.set_enabled(index < plan.cached_blocks);
            block.caches.set_split(plan.split_weights);
        }
        Ok(())
    }
}
