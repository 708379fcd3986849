//! The sizes a [`ModelConfig`] may have, whatever file it came from.

use std::path::Path;

use super::{ModelConfig, Scalings};
use crate::error::{Error, Result};

/// More blocks than any dense model has.
pub(crate) const MAX_LAYERS: usize = 4096;
const MAX_VOCAB: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_INTERMEDIATE: usize = 1 << 22;
const MAX_HEAD_DIM: usize = 1 << 12;
const MAX_POSITIONS: usize = 1 << 24;
/// Ten times the largest published dense model.
const MAX_PARAMETERS: u128 = 4 << 40;

impl ModelConfig {
    /// Checks that the sizes fit together and stay within what a model can have. `path` is for the error message.
    ///
    /// # Errors
    /// Names the size, its value and what it should be.
    pub(crate) fn check_sizes(&self, path: &Path) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("intermediate_size", self.intermediate_size, MAX_INTERMEDIATE),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_WIDTH),
            ("num_key_value_heads", self.num_key_value_heads, MAX_WIDTH),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            ("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS),
        ];
        for (name, value, limit) in sizes {
            if value == 0 || value > limit {
                return Err(Error::format(path, format!("{name} is {value}; it must lie between 1 and {limit}")));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(Error::format(
                path,
                format!(
                    "num_attention_heads ({}) is not a multiple of num_key_value_heads ({})",
                    self.num_attention_heads, self.num_key_value_heads
                ),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::format(path, format!("head_dim is {}; rotary embeddings need it even", self.head_dim)));
        }
        if self.num_attention_heads * self.head_dim > MAX_WIDTH {
            return Err(Error::format(
                path,
                format!(
                    "num_attention_heads ({}) times head_dim ({}) is more than {MAX_WIDTH}",
                    self.num_attention_heads, self.head_dim
                ),
            ));
        }
        let eps = self.rms_norm_eps;
        if !(eps.is_finite() && (0.0..1.0).contains(&eps)) {
            return Err(Error::format(path, format!("rms_norm_eps is {eps}; it must lie between 0 and 1")));
        }
        if let Some(layer) = self.sliding_window.iter().position(|window| *window == Some(0)) {
            return Err(Error::format(path, format!("the sliding window of layer {layer} is 0")));
        }
        let Scalings { embedding, attention, residual, logits, llama_4_scaling_beta: beta } = self.scalings;
        for (name, value) in [
            ("embedding multiplier", embedding),
            ("attention multiplier", attention.unwrap_or(1.0)),
            ("residual multiplier", residual),
            ("logits scaling", logits),
        ] {
            if !(value.is_finite() && (1e-6..1e6).contains(&value)) {
                return Err(Error::format(path, format!("the {name} is {value}; it must lie between 1e-6 and 1e6")));
            }
        }
        if !(0.0..1e6).contains(&beta) {
            let what = "the scaling of queries (llama_4_scaling_beta)";
            return Err(Error::format(path, format!("{what} is {beta}; it must lie between 0 and 1e6")));
        }
        let parameters = self.parameter_count();
        if parameters > MAX_PARAMETERS {
            return Err(Error::format(
                path,
                format!("the sizes together give {parameters} parameters, more than the {MAX_PARAMETERS} supported"),
            ));
        }
        Ok(())
    }
}
