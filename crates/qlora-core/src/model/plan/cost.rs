//! The cost model: the time that a choice takes at the [rates](Rates) of a card, to rank choices. Costs common to all
//! choices are left out here and counted in `speed.rs`.

use super::Choice;
use super::sizes::Sizes;
use crate::card::Rates;
use crate::model::policy::Keep;

/// Launches of one piece of a block.
const PIECE: f64 = 100e-6;

/// Seconds of work of one block.
pub(super) struct BlockCost {
    /// Bytes a second to the host.
    host: f64,
    /// Products of the first half, attention included, and of gate and up.
    attend: f64,
    gate_up: f64,
    /// One dequantization of the first half's weights, of gate and up, of down.
    dequantize: [f64; 3],
    /// A forward, to hide copies behind.
    forward: f64,
    /// The sums of three parts of `dx` where weights are dequantized one at a time: read and written once more each.
    split: f64,
}

impl BlockCost {
    /// `len`: tokens of a sequence.
    pub(super) fn new(sizes: &Sizes, len: u64, rates: Rates) -> Self {
        let [tokens, hidden, q, qkv, mlp, len] =
            [sizes.tokens, sizes.hidden, sizes.q, sizes.qkv, sizes.mlp, len].map(|x| x as f64);
        let product = |elements: f64| 2.0 * tokens * elements / (rates.products * sizes.product_gain());
        let bytes = match (sizes.fp8, sizes.four_bits) {
            // 4 bits read, 16 written an element.
            (false, _) => 2.5,
            (true, true) => 1.5,
            // These are read again, twice for the transposed copy, and 8 written.
            (true, false) => 2.5 + 4.0,
        };
        let dequantize = |elements: f64| bytes * elements / rates.memory;
        let pass = |cols: f64| tokens * cols * sizes.size as f64 / rates.memory;
        let attend = product(hidden * (q + qkv)) + 2.0 * tokens * len * q / rates.attention + pass(6.0 * hidden);
        let gate_up = product(2.0 * hidden * mlp) + pass(2.0 * mlp + 4.0 * hidden);
        Self {
            host: rates.host,
            attend,
            gate_up,
            dequantize: [hidden * (q + qkv), 2.0 * hidden * mlp, hidden * mlp].map(dequantize),
            forward: attend + gate_up + product(hidden * mlp) + pass(4.0 * mlp),
            split: 3.0 * 2.0 * pass(hidden),
        }
    }

    /// Seconds of one block's forward and backward that our own attention takes longer than cuDNN's: about a third (measured
    /// on an H100 at 4 x 2048 tokens, `benches/results/kernels.csv`). A backward is two and a half forwards.
    pub(super) fn own_attention(sizes: &Sizes, len: u64, rates: Rates) -> f64 {
        let [tokens, q, len] = [sizes.tokens, sizes.q, len].map(|x| x as f64);
        0.35 * 3.5 * 2.0 * tokens * len * q / rates.attention
    }

    /// Seconds that one block takes beyond the costs that all choices share.
    pub(super) fn block(&self, keep: Keep, choice: &Choice, cached: bool, sizes: &Sizes) -> f64 {
        if keep == Keep::Nothing {
            return 0.0;
        }
        let recompute = match keep {
            Keep::Everything => 0.0,
            Keep::Attention | Keep::OffloadAttention => self.gate_up,
            _ => self.attend + self.gate_up,
        };
        let pieces = match keep {
            Keep::Everything => 1.0,
            _ => (sizes.tokens as f64 / sizes.piece(choice) as f64).ceil(),
        };
        let shared = choice.shared && !choice.split;
        let [first, gate_up, down] = self.dequantize;
        let dequantize = if cached {
            0.0
        } else {
            let times = if shared { 1.0 } else { pieces };
            let again = match keep {
                Keep::Everything => 0.0,
                _ if shared => 0.0,
                Keep::Attention | Keep::OffloadAttention => times * gate_up,
                _ => first + times * gate_up,
            };
            // Forward, backward, and again where the block is recomputed.
            2.0 * (first + times * (gate_up + down)) + again
        };
        let copy = sizes.offloaded(keep) as f64 / self.host;
        // The part of the copies that the work does not hide, and a little for the part that it does.
        let offload = 2.0 * (copy - self.forward).max(0.0) + 0.05 * copy;
        let split = if choice.split { self.split } else { 0.0 };
        recompute + dequantize + offload + split + 2.0 * (pieces - 1.0) * PIECE
    }
}
