//! Rotary position embedding.

/// How the rotation angles of a model are made.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the angles' geometric series (`rope_theta`).
    pub theta: f64,
    /// The change that stretches them to longer sequences, if any.
    pub scaling: Option<RopeScaling>,
}

/// The scalings of Hugging Face's `rope_scaling`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// All angles divided by `factor`.
    Linear {
        /// By how much the sequence grows.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth step between.
    Llama3 {
        /// By how much the sequence grows.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are scaled whole.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The length the model was first trained for.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// By how much the sequence grows.
        factor: f64,
        /// The length the model was first trained for.
        original_max_position_embeddings: usize,
        /// Rotations above which a frequency is kept (32).
        beta_fast: f64,
        /// Rotations below which a frequency is scaled whole (1).
        beta_slow: f64,
        /// What cos and sin are multiplied by; none: `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
        /// Whether the correction range is rounded to whole dimensions.
        truncate: bool,
    },
}
