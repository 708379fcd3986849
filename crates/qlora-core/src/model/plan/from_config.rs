//! A [`Planner`] without a model: from a configuration alone, before anything is downloaded.

use qlora_kernels::Dtype;

use super::sizes::Sizes;
use super::{AttentionWorkspace, BatchShape, Planner};
use crate::card::Rates;
use crate::config::ModelConfig;
use crate::lora::{AdapterLayout, Projection};

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
        let rank = |layer: usize, projection: Projection| {
            layout.get(&projection.module_name(layer)).map_or(0, |pair| pair.rank())
        };
        use Projection::{Down, Gate, K, O, Q, Up, V};
        let groups: [&[Projection]; 4] = [&[Q, K, V], &[O], &[Gate, Up], &[Down]];
        let mut rp = [0u64; 4];
        for layer in 0..config.num_hidden_layers {
            for (rp, group) in rp.iter_mut().zip(groups) {
                let ranks: usize = group.iter().map(|&projection| rank(layer, projection)).sum();
                // As `linear_group::margin`.
                *rp = (*rp).max(ranks.next_multiple_of(8) as u64);
            }
        }
        let trained = |&layer: &usize| Projection::ALL.iter().any(|&projection| rank(layer, projection) > 0);
        let lowest = (0..config.num_hidden_layers).find(trained).unwrap_or(config.num_hidden_layers);
        let outputs = |projection: Projection| projection.shape(config).0 as u64;
        let sizes = Sizes {
            tokens: batch.tokens as u64,
            trained: batch.trained_tokens as u64,
            size: dtype.size() as u64,
            hidden: config.hidden_size as u64,
            vocab: config.vocab_size as u64,
            q: outputs(Q),
            qkv: outputs(Q) + outputs(K) + outputs(V),
            mlp: outputs(Gate),
            heads: config.num_attention_heads as u64,
            qk_norm: config.qk_norm,
            rp,
            attention,
        };
        let len = (batch.tokens / batch.sequences.max(1)) as u64;
        Self { layers: config.num_hidden_layers, lowest, len, sizes, resident, host: u64::MAX, rates: Rates::default() }
    }
}

impl AttentionWorkspace {
    /// What our own attention kernels take on a GPU; cuDNN's takes less in most shapes.
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
