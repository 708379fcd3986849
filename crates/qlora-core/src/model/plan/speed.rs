//! The expected time of a step: the costs that all choices share, by counting, and on top those of the plan's choices
//! (`cost.rs`).
//!
//! ```text
//! products   2 operations a weight and token forward, 2 for dX; the head's for trained tokens only
//! attention  3.5 forwards (a backward is two and a half) of 2 len q operations a token: the masked half is not counted
//! memory     bytes of the passes between products, at a copy's rate: norms and residuals 18 hidden, RoPE 4 (q + k), SwiGLU 9 mlp,
//!            reads of activations by the adapters 6 hidden + 2 q + qkv + 4 mlp a token and block, each 2 bytes
//! launches   250 us a block
//! ```
//!
//! Against what was measured see `tests/fixtures/plans/measured.csv` and the test that compares it.

use super::{MemoryPlan, Planner};

/// The launch overhead of a block, forward and backward, in seconds: some 60 launches of 4 us.
const BLOCK: f64 = 250e-6;

/// The speed that a cost model expects. Nothing was run for it.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ExpectedSpeed {
    /// Seconds of a micro-batch.
    pub seconds: f64,
    /// Tokens a second, of all ranks that share a micro-batch.
    pub tokens_per_second: f64,
}

impl ExpectedSpeed {
    /// From the slowest to the fastest that is to be expected, in tokens a second. On an H100 and an H200 the expected speed was 0.95 to
    /// 1.13 of the measured one (20 rows of `benches/results`, `tests/fixtures/plans/measured.csv`); on other cards the rates are
    /// assumptions, and kernels may fit a card less well.
    pub fn range(&self, measured: bool) -> (f64, f64) {
        let (low, high) = if measured { (0.85, 1.06) } else { (0.5, 1.1) };
        (low * self.tokens_per_second, high * self.tokens_per_second)
    }
}

impl Planner {
    /// The speed of steps by a plan of this planner.
    pub fn expected_speed(&self, plan: &MemoryPlan) -> ExpectedSpeed {
        let sizes = &self.sizes;
        let [tokens, trained, hidden, vocab, q, qkv, mlp, len] =
            [sizes.tokens, sizes.trained, sizes.hidden, sizes.vocab, sizes.q, sizes.qkv, sizes.mlp, self.len]
                .map(|x| x as f64);
        let layers = self.layers as f64;
        let weights = hidden * (q + qkv) + 3.0 * hidden * mlp;
        let frozen = tokens * weights * layers / sizes.product_gain();
        let products = 4.0 * (frozen + trained * vocab * hidden) / self.rates.products;
        let attention = 3.5 * 2.0 * tokens * len * q * layers / self.rates.attention;
        // q|k|v is q and two of k.
        let rope = 4.0 * (q + (qkv - q) / 2.0);
        let passes = 18.0 * hidden + rope + 9.0 * mlp;
        let mut adapters = 6.0 * hidden + 2.0 * q + qkv + 4.0 * mlp;
        if sizes.fp8 {
            // Inputs and gradients are read and written once more (3 bytes), the adapters' part of a result twice (4 bytes).
            let (inputs, outputs) = (2.0 * hidden + q + mlp, qkv + 2.0 * hidden + 2.0 * mlp);
            adapters += (1.5 + 2.0) * (inputs + outputs);
        }
        let memory = tokens * layers * (passes + adapters) * sizes.size as f64 / self.rates.memory;
        let seconds = products + attention + memory + layers * BLOCK + plan.overhead_us as f64 * 1e-6;
        // The ranks that share a micro-batch compute at the same time.
        let ranks = sizes.exchange.map_or(1, |exchange| exchange.ranks);
        ExpectedSpeed { seconds, tokens_per_second: ranks as f64 * tokens / seconds }
    }
}
