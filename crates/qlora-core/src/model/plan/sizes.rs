//! The memory of a training step as a sum: the live matrices in each stage of each block, with sizes that follow from
//! the model and the batch. It mirrors [`block`](super::super::block) and [`mlp`](super::super::mlp) line by line, and
//! changes with them.

use qlora_kernels::matrix::padded_cols;
use qlora_kernels::ops::linear_cross_entropy::rows_of_chunk_on_gpu;

use super::{AttentionWorkspace, Choice};
use crate::model::policy::Keep;

/// Sizes of a model and a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sizes {
    /// Tokens of the batch, and how many of them have a target; of this rank's share, if others share it.
    pub(super) tokens: u64,
    pub(super) trained: u64,
    /// Bytes of an activation's element.
    pub(super) size: u64,
    pub(super) hidden: u64,
    pub(super) vocab: u64,
    pub(super) q: u64,
    pub(super) qkv: u64,
    pub(super) mlp: u64,
    pub(super) heads: u64,
    pub(super) qk_norm: bool,
    /// Extra columns of the groups qkv, o, gate|up, down.
    pub(super) rp: [u64; 4],
    /// Whether the layers of a group run one after the other, as with DoRA.
    pub(super) by_member: bool,
    /// Tokens whose rows of the embedding and the head are trained.
    pub(super) token_rows: u64,
    /// Whether frozen weights are multiplied in fp8: their copies and the products' inputs are then in 8 bits.
    pub(super) fp8: bool,
    /// Whether all frozen weights have 4 bits: no dequantized weight stands beside its copy in 8 bits.
    pub(super) four_bits: bool,
    pub(super) attention: AttentionWorkspace,
    /// How ranks share a batch, if they do.
    pub(super) exchange: Option<Exchange>,
}

/// The sizes of context parallelism.
#[derive(Clone, Copy, Debug)]
pub(super) struct Exchange {
    pub(super) ranks: u64,
    /// q, k and v by heads: bytes of all tokens and a rank's heads, as columns of this rank's tokens and all heads. More than
    /// `qkv` where several ranks have the same key and value heads.
    pub(super) qkv: u64,
}

/// [`padded_cols`] in the planner's numbers.
fn padded(cols: u64, rp: u64) -> u64 {
    padded_cols(cols as usize, rp as usize) as u64
}

/// f32 gradients of a group's factors before they are added to the flat gradient.
fn factor_gradients(outputs: u64, inputs: u64, rp: u64) -> u64 {
    4 * rp * (outputs + inputs)
}

impl Sizes {
    /// How much faster a product with a frozen weight is than in the activations' type: in fp8 1.7 times, with full
    /// accumulation, at the shapes of an 8B model on an H200 (`benches/results/fp8_products.txt`).
    pub(super) fn product_gain(&self) -> f64 {
        if self.fp8 { 1.7 } else { 1.0 }
    }

    /// Bytes of `[tokens, cols]` activations.
    pub(super) fn activation(&self, cols: u64) -> u64 {
        self.tokens * cols * self.size
    }

    /// Bytes of `[tokens, cols]` in f32.
    fn statistic(&self, cols: u64) -> u64 {
        self.tokens * cols * 4
    }

    /// The rows that the MLP sees at a time.
    pub(super) fn piece(&self, choice: &Choice) -> u64 {
        choice.mlp_rows.map_or(self.tokens, |rows| rows.min(self.tokens))
    }

    /// The weight of a group that is kept: the augmented one, or the two copies in 8 bits with their scales.
    fn weight(&self, outputs: u64, inputs: u64, rp: u64) -> u64 {
        if self.fp8 {
            return 2 * outputs * inputs + 4 * (outputs + inputs);
        }
        (outputs + rp) * padded(inputs, rp) * self.size
    }

    /// The dequantized weights of a whole block.
    pub(super) fn block_weights(&self) -> u64 {
        let Self { q, qkv, mlp, hidden, rp, .. } = *self;
        self.weight(qkv, hidden, rp[0])
            + self.weight(hidden, q, rp[1])
            + self.weight(2 * mlp, hidden, rp[2])
            + self.weight(hidden, mlp, rp[3])
    }

    /// Scratch for the largest of a group's weights; with `cached`, it is there already.
    fn scratch(&self, group: usize, choice: &Choice, cached: bool) -> u64 {
        let Self { q, qkv, mlp, hidden, rp, .. } = *self;
        // Split, the members' ranks are a third or half of the group's; the difference is lost in the rounding.
        let (outputs, inputs) = match (group, choice.split) {
            (0, false) => (qkv, hidden),
            (0, true) => (q, hidden),
            (1, _) => (hidden, q),
            (2, false) => (2 * mlp, hidden),
            (2, true) => (mlp, hidden),
            _ => (hidden, mlp),
        };
        match (self.fp8, cached) {
            (false, false) => self.weight(outputs, inputs, rp[group]),
            (false, true) => 0,
            (true, _) => {
                let copy = if cached { 0 } else { outputs * inputs + 4 * (outputs + inputs) };
                // A kept weight is dequantized once, too, at its first use.
                let dequantized = if self.four_bits { 0 } else { outputs * inputs * self.size };
                dequantized + copy + self.factors(outputs, inputs, rp[group])
            }
        }
    }

    /// A and B of a group in matrices of their own, for fp8.
    fn factors(&self, outputs: u64, inputs: u64, rp: u64) -> u64 {
        (rp * padded(inputs, rp) + outputs * rp) * self.size
    }

    /// A product's input in 8 bits: `[rows, cols]` and a scale a row.
    fn rounded(&self, rows: u64, cols: u64) -> u64 {
        if self.fp8 { rows * (cols + 4) } else { 0 }
    }

    /// The additional bytes of DoRA in a group of projections: a copy of an output or its gradient, and rows in f32
    /// that candle's kernels work on (`on_gpu` in `dora_linear`: two factors and their product, 32 MiB each).
    fn by_member(&self, rows: u64) -> u64 {
        const CANDLE: u64 = 3 * (4 << 23);
        if self.by_member { rows * self.hidden.max(self.q).max(self.mlp) * self.size + CANDLE } else { 0 }
    }

    /// What a rank sends, or receives, in an exchange of so many columns: all but its own part.
    fn sent(&self, cols: u64) -> u64 {
        self.exchange.map_or(0, |Exchange { ranks, .. }| self.activation(cols) * (ranks - 1) / ranks)
    }

    /// q, k and v as attention reads them, in columns.
    fn qkv_of_attention(&self) -> u64 {
        self.exchange.map_or(self.qkv, |exchange| exchange.qkv)
    }

    /// q and k before their norms.
    fn raw(&self) -> u64 {
        if self.qk_norm { self.activation(self.qkv) + self.statistic(2 * self.heads) } else { 0 }
    }

    /// Bytes that move to the host where a block is offloaded.
    pub(super) fn offloaded(&self, keep: Keep) -> u64 {
        self.offloaded_matrices(keep).iter().sum()
    }

    /// The same, matrix by matrix, in bytes: `Saved::large` of the block.
    pub(super) fn offloaded_matrices(&self, keep: Keep) -> Vec<u64> {
        let Self { q, qkv, hidden, rp, qk_norm, .. } = *self;
        let by_heads = self.qkv_of_attention();
        let widths = match keep {
            Keep::Offload => vec![hidden],
            // x, q|k|v, attention's output, mid; q and k before their norms.
            Keep::OffloadAttention if qk_norm => vec![hidden, by_heads, padded(q, rp[1]), hidden, qkv],
            Keep::OffloadAttention => vec![hidden, by_heads, padded(q, rp[1]), hidden],
            _ => Vec::new(),
        };
        widths.into_iter().map(|cols| self.activation(cols)).collect()
    }

    /// Bytes of [`Attended`](super::super::block).
    fn attended(&self) -> u64 {
        let Self { q, hidden, heads, rp, .. } = *self;
        let qkv = self.qkv_of_attention();
        self.activation(2 * hidden + qkv + padded(q, rp[1]) + rp[0] + rp[1]) + self.statistic(1 + heads) + self.raw()
    }

    /// Bytes of the activations that a block keeps on the device.
    pub(super) fn saved(&self, keep: Keep) -> u64 {
        let Self { mlp, rp, .. } = *self;
        match keep {
            Keep::Nothing | Keep::Offload => 0,
            Keep::Input => self.activation(self.hidden),
            Keep::Attention => self.attended(),
            Keep::OffloadAttention => self.attended() - self.offloaded(keep),
            Keep::Everything => {
                self.attended() + self.activation(padded(2 * mlp, rp[2]) + rp[2] + rp[3]) + self.statistic(1)
            }
        }
    }

    /// The peak of a block's first half; `shared`: its weights stay.
    fn attend(&self, choice: &Choice, cached: bool, shared: bool) -> u64 {
        let Self { q, qkv, hidden, heads, rp, .. } = *self;
        let (act, stat) = (|cols| self.activation(cols), |cols| self.statistic(cols));
        let kept = if shared { self.scratch(0, choice, cached) } else { 0 };
        let mut live = act(hidden) + stat(1);
        let rounded = |cols| self.rounded(self.tokens, cols);
        let project =
            live + act(padded(hidden, rp[0]) + qkv + rp[0]) + self.scratch(0, choice, cached) + rounded(hidden);
        live += act(rp[0]) + self.raw() + kept;
        let by_heads = self.qkv_of_attention();
        let attend = match self.exchange {
            None => live + act(qkv + padded(q, rp[1])) + stat(heads) + self.attention.forward,
            Some(_) => {
                let there = live + act(qkv + by_heads) + self.sent(by_heads);
                let live = live + act(by_heads + padded(q, rp[1]) + q) + stat(heads);
                there.max(live + self.attention.forward).max(live + self.sent(q))
            }
        };
        live += act(by_heads + padded(q, rp[1])) + stat(heads);
        let out = live + act(hidden + rp[1]) + self.scratch(1, choice, cached) + rounded(q);
        [project, attend, out].into_iter().max().unwrap_or(0)
    }

    /// The peak of a block's forward beside what other blocks hold.
    pub(super) fn forward(&self, keep: Keep, choice: &Choice, cached: bool) -> u64 {
        let Self { mlp, hidden, rp, .. } = *self;
        let act = |cols| self.activation(cols);
        let whole = keep == Keep::Everything;
        let rows = if whole { self.tokens } else { self.piece(choice) };
        let piece = |cols: u64| rows * cols * self.size;
        let shared = choice.shared && !choice.split && rows < self.tokens;
        let live = act(hidden)
            + match keep {
                Keep::Nothing => act(hidden),
                Keep::Input | Keep::Offload => act(2 * hidden),
                _ => self.attended(),
            };
        let (gate_up, h) = (piece(padded(2 * mlp, rp[2])), piece(padded(mlp, rp[3])));
        let (weight2, weight3) = (self.scratch(2, choice, cached), self.scratch(3, choice, cached));
        let stay = |weight: u64| if shared { weight } else { 0 };
        // From the second piece on, the weights of the first are there.
        let up = live
            + gate_up
            + piece(padded(hidden, rp[2]) + rp[2])
            + 4 * rows
            + weight2
            + stay(weight3)
            + self.rounded(rows, hidden);
        let hidden_mlp = live + gate_up + h + stay(weight2 + weight3);
        let kept = if whole { gate_up + piece(rp[2]) + 4 * rows } else { 0 };
        let down = live + kept + h + piece(rp[3]) + weight3 + stay(weight2) + self.rounded(rows, mlp);
        [self.attend(choice, cached, false), up, hidden_mlp, down].into_iter().max().unwrap_or(0)
            + self.by_member(self.tokens)
    }

    /// The peak of a block's backward beside what the blocks below hold: `dy` and the block's activations included.
    pub(super) fn backward(&self, keep: Keep, choice: &Choice, cached: bool) -> u64 {
        let Self { q, qkv, mlp, hidden, heads, rp, .. } = *self;
        let act = |cols| self.activation(cols);
        let whole = keep == Keep::Everything;
        let rows = if whole { self.tokens } else { self.piece(choice) };
        let piece = |cols: u64| rows * cols * self.size;
        let weight = |group| self.scratch(group, choice, cached);
        let factors = |outputs, inputs, group: usize| factor_gradients(outputs, inputs, rp[group]);
        let shares = choice.shared && !choice.split;

        let mut held = act(padded(hidden, rp[1].max(rp[3])));
        let recompute = match keep {
            Keep::Input | Keep::Offload => {
                let peak = held + self.attend(choice, cached, shares);
                held += if shares { weight(0) + weight(1) } else { 0 };
                peak
            }
            _ => 0,
        };
        let attended = self.attended();
        // The MLP, a piece at a time. Its shared weights stay while it runs.
        let shared2 = if shares && !whole { weight(2) } else { 0 };
        let shared3 = if shares && rows < self.tokens { weight(3) } else { 0 };
        let live = held + attended + 4 * rows;
        let gate_up = piece(padded(2 * mlp, rp[2]) + rp[2]);
        let up = match whole {
            true => 0,
            false => live + gate_up + piece(padded(hidden, rp[2])) + weight(2) + shared3 + self.rounded(rows, hidden),
        };
        let rp3 = if whole { 2 * rp[3] } else { rp[3] };
        let down = live
            + gate_up
            + piece(mlp + rp3)
            + shared2
            + (weight(3) + self.rounded(rows, hidden))
                .max(shared3 + factors(hidden, mlp, 3) + if whole { 0 } else { piece(rp[3]) });
        let factors_b = |outputs: u64, group: usize| if choice.split { outputs * rp[group] * self.size } else { 0 };
        let mlp_input = live
            + gate_up
            + piece(hidden + rp[2])
            + shared3
            + (weight(2) + factors_b(2 * mlp, 2) + self.rounded(rows, 2 * mlp))
                .max(shared2 + piece(hidden) + factors(2 * mlp, hidden, 2));

        // The first half: `mid` is gone.
        let live = held + attended - act(hidden);
        let shared1 = if shares && matches!(keep, Keep::Input | Keep::Offload) { weight(1) } else { 0 };
        let out_weight = weight(1) - shared1.min(weight(1)) + self.rounded(self.tokens, hidden);
        let out = live + act(q + rp[1]) + out_weight.max(factors(hidden, q, 1));
        let by_heads = self.qkv_of_attention();
        let after = live - act(rp[1]) - act(by_heads + padded(q, rp[1])) - self.statistic(heads);
        let attend = match self.exchange {
            None => live - act(rp[1]) + act(q) + act(padded(qkv, rp[0])) + self.attention.backward,
            Some(_) => {
                // Attention's output by heads beside that by rows, then its gradient, then what the backward makes of them.
                let there = live - act(rp[1]) + act(2 * q) + self.sent(q);
                let live = after + act(by_heads + 2 * q) + self.statistic(heads);
                let back = after + act(by_heads + padded(qkv, rp[0])) + self.sent(by_heads);
                there.max(live + act(q) + self.sent(q)).max(live + act(by_heads) + self.attention.backward).max(back)
            }
        };
        let shared0 = if shared1 > 0 { weight(0) } else { 0 };
        let input = after
            + act(padded(qkv, rp[0]) + hidden + rp[0])
            + (weight(0) + factors_b(qkv, 0) + self.rounded(self.tokens, qkv) - shared0)
                .max(act(hidden) + factors(qkv, hidden, 0));
        [recompute, up, down, mlp_input, out, attend, input].into_iter().max().unwrap_or(0)
            + self.by_member(self.tokens)
    }

    /// The peak of loss and head, beside what the blocks hold.
    pub(super) fn head(&self) -> u64 {
        let chunk = rows_of_chunk_on_gpu(self.vocab as usize) as u64;
        let logits = chunk.min(self.trained) * self.vocab * self.size;
        let gathered = if self.trained < self.tokens { 2 * self.trained * self.hidden * self.size } else { 0 };
        // Of tokens whose rows are trained: their columns of the logits' gradient, and their rows as activations.
        let tokens = (chunk.min(self.trained) + self.hidden) * self.token_rows * self.size;
        // The last block's output, its norm, and the gradient of the norm.
        self.activation(3 * self.hidden) + self.statistic(1) + 4 * self.trained + gathered + logits + tokens
    }

    /// The matrix that adds the embedding's gradient up by token, in f32 and as activations, beside that gradient.
    pub(super) fn embedding(&self) -> u64 {
        if self.token_rows == 0 {
            0
        } else {
            self.activation(self.hidden + self.token_rows) + self.statistic(self.token_rows)
        }
    }
}
