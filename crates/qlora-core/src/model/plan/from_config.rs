//! A [`Planner`] without a model: from a configuration alone, before anything is downloaded.

use qlora_kernels::Dtype;

use super::sizes::{Exchange, Sizes};
use super::{AttentionWorkspace, BatchShape, Planner};
use crate::card::Rates;
use crate::config::ModelConfig;
use crate::lora::{AdapterLayout, Which};
use crate::spec::{EMBEDDING, ModelSpec, Module, Role};

/// The parts of an adapter besides A and B that a step's memory depends on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Parts {
    /// DoRA: the layers of a group run one after the other.
    magnitudes: bool,
    /// The embedding is trained, or biases of all blocks are: every block has a backward.
    every_block: bool,
    /// Tokens whose rows are trained, of both tables.
    token_rows: u64,
}

impl Parts {
    pub(super) fn of(layout: &AdapterLayout) -> Self {
        let rows =
            layout.entries().iter().filter(|entry| entry.which == Which::TokenRows).map(|entry| entry.rows as u64);
        Self {
            magnitudes: layout.entries().iter().any(|entry| entry.which == Which::Magnitude),
            every_block: layout.entries().iter().any(|entry| entry.module == EMBEDDING)
                || layout.biases().any(|entry| entry.which == Which::Bias { adapted: false }),
            token_rows: rows.sum(),
        }
    }
}

impl Planner {
    /// For a model of this configuration with an adapter of this layout, computing in `dtype`. `resident` counts what is on
    /// the device before a step and stays: weights, adapter, gradient and optimizer state. The result is that of
    /// [`Planner::new`] with the model.
    pub fn from_config(
        config: &ModelConfig,
        layout: &AdapterLayout,
        dtype: Dtype,
        batch: BatchShape,
        attention: AttentionWorkspace,
        resident: u64,
    ) -> Self {
        Self::of_spec(
            &config.spec(),
            |module| layout.get(module).map_or(0, |pair| pair.rank()),
            Parts::of(layout),
            dtype,
            batch,
            attention,
            resident,
        )
    }

    /// The same planner for one of `ranks` ranks that share every micro-batch: it has a share of the tokens, and of attention's heads for
    /// all tokens. The attention's workspace that the planner was given is one for all heads.
    pub fn with_context_parallel(mut self, ranks: usize) -> Self {
        let attention = self.sizes.attention;
        let part = |bytes: u64| bytes.div_ceil(ranks.max(1) as u64);
        self.sizes.attention =
            AttentionWorkspace { forward: part(attention.forward), backward: part(attention.backward) };
        self.shared_by(ranks)
    }

    /// [`Self::with_context_parallel`], of a planner that was given the workspace of a rank's heads.
    pub(super) fn shared_by(mut self, ranks: usize) -> Self {
        let (ranks, sizes) = (ranks.max(1) as u64, &mut self.sizes);
        if ranks > 1 {
            let (kv, head) = ((sizes.qkv - sizes.q) / 2, sizes.q / sizes.heads.max(1));
            // At least one whole head.
            sizes.exchange = Some(Exchange { ranks, qkv: sizes.q + 2 * kv.max(ranks * head) });
            // Where not all tokens of a batch are trained, some of a share may be missing.
            let all = sizes.trained == sizes.tokens;
            sizes.tokens = sizes.tokens.div_ceil(ranks);
            sizes.trained = sizes.trained.min(if all { sizes.tokens } else { sizes.tokens.saturating_sub(1) });
        }
        self
    }

    /// For a model of this specification; `rank` gives the rank of a module's adapter, 0 where it has none, `parts` what an adapter
    /// has besides.
    pub(super) fn of_spec(
        spec: &ModelSpec,
        rank: impl Fn(&str) -> usize,
        parts: Parts,
        dtype: Dtype,
        batch: BatchShape,
        attention: AttentionWorkspace,
        resident: u64,
    ) -> Self {
        let groups: [&[Role]; 4] =
            [&[Role::Query, Role::Key, Role::Value], &[Role::Output], &[Role::Gate, Role::Up], &[Role::Down]];
        let (mut rp, mut lowest) = ([0u64; 4], None);
        for (layer, block) in spec.blocks.iter().enumerate() {
            for (rp, group) in rp.iter_mut().zip(groups) {
                let ranks: usize =
                    group.iter().filter_map(|&role| block.get(role)).map(|module| rank(&module.name)).sum();
                // As `linear_group::margin`.
                *rp = (*rp).max(ranks.next_multiple_of(8) as u64);
            }
            if lowest.is_none() && block.linear().any(|module| rank(&module.name) > 0) {
                lowest = Some(layer);
            }
        }
        let layers = spec.blocks.len();
        // Blocks differ in their windows and rotation, which take no memory.
        let first = spec.blocks.first();
        let outputs = |role| first.and_then(|block| block.get(role)).map_or(0, Module::rows) as u64;
        let sizes = Sizes {
            tokens: batch.tokens as u64,
            trained: batch.trained_tokens as u64,
            size: dtype.size() as u64,
            hidden: spec.embedding.cols() as u64,
            vocab: spec.embedding.rows() as u64,
            q: outputs(Role::Query),
            qkv: outputs(Role::Query) + outputs(Role::Key) + outputs(Role::Value),
            mlp: outputs(Role::Gate),
            heads: first.map_or(0, |block| block.attention.heads) as u64,
            qk_norm: first.is_some_and(|block| block.get(Role::QueryNorm).is_some()),
            rp,
            by_member: parts.magnitudes,
            token_rows: parts.token_rows,
            fp8: false,
            four_bits: false,
            attention,
            exchange: None,
        };
        let len = (batch.tokens / batch.sequences.max(1)) as u64;
        let lowest = if parts.every_block { 0 } else { lowest.unwrap_or(layers) };
        Self { layers, lowest, len, sizes, resident, host: u64::MAX, rates: Rates::default() }
    }
}

impl AttentionWorkspace {
    /// The workspace of our own attention kernels on a GPU; cuDNN's takes less in most shapes.
    pub fn of_own_kernels(config: &ModelConfig, tokens: usize) -> Self {
        const TOKENS_OF_A_BLOCK: u64 = 64;
        /// Up to so many tokens, dK and dV are made in parts.
        const SPLIT_TOKENS: u64 = 2048;
        let (tokens, heads, head_dim) = (tokens as u64, config.num_attention_heads as u64, config.head_dim as u64);
        let padded = tokens.next_multiple_of(TOKENS_OF_A_BLOCK);
        let mut floats = 2 * padded * heads + padded * heads * head_dim;
        if tokens <= SPLIT_TOKENS {
            floats += 2 * tokens * heads * head_dim;
        }
        Self { forward: 0, backward: 4 * floats }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::shape_8b;
    use super::*;
    use crate::lora::{LoraConfig, TargetModules, TokenIndices};

    #[test]
    fn rows_of_tokens_cost_their_own_memory_and_a_backward_of_every_block() {
        let config = shape_8b();
        // Only the upper half of the blocks has adapters.
        let targets = TargetModules::parse(r"model\.layers\.(1[6-9]|2\d|3[01])\.mlp\.down_proj").unwrap();
        let plan = |lora: LoraConfig| {
            let layout = AdapterLayout::for_model(&lora, &config).unwrap();
            let batch = BatchShape::uniform(1, 1024);
            Planner::from_config(&config, &layout, Dtype::Bf16, batch, AttentionWorkspace::default(), 0)
        };
        let plain = LoraConfig { target_modules: targets, ..LoraConfig::default() };
        let tokens = LoraConfig { trainable_token_indices: TokenIndices::of_embedding([1, 2, 3]), ..plain.clone() };
        let (plain, tokens) = (plan(plain), plan(tokens));
        assert_eq!((plain.lowest, tokens.lowest), (16, 0));
        assert!(tokens.leanest().peak > plain.leanest().peak);
        assert_eq!(tokens.sizes.head() - plain.sizes.head(), (1024 + 4096) * 3 * 2);
        assert_eq!((plain.sizes.embedding(), tokens.sizes.embedding()), (0, 1024 * ((4096 + 3) * 2 + 3 * 4)));
    }

    /// Two ranks take a sequence nearly twice as long as one: what is not shared is the weights, what is sent is small.
    #[test]
    fn ranks_that_share_a_sequence_take_a_longer_one() {
        use super::super::fixtures::planner_8b;
        let longest = |ranks: usize, own: bool| {
            let planner = |tokens| Ok(planner_8b(BatchShape::uniform(1, tokens), own).with_context_parallel(ranks));
            Planner::longest_sequence(1 << 21, 24 << 30, planner).unwrap()
        };
        for own in [false, true] {
            let [one, two, four] = [1, 2, 4].map(|ranks| longest(ranks, own));
            assert!((1.95..2.02).contains(&(two as f64 / one as f64)), "{own}: {one} {two}");
            assert!((3.85..4.04).contains(&(four as f64 / one as f64)), "{own}: {one} {four}");
        }
        // Of 8 key and value heads, each of 16 ranks has one.
        let plan = |ranks| planner_8b(BatchShape::uniform(1, 1 << 18), true).with_context_parallel(ranks);
        let (eight, sixteen) = (plan(8).sizes, plan(16).sizes);
        assert_eq!(eight.exchange.unwrap().qkv, eight.qkv);
        assert_eq!(sixteen.exchange.unwrap().qkv, sixteen.q + 2 * 16 * 128);
    }
}
