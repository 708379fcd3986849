//! From logits to the next token, and when to stop.
//!
//! For logits z and temperature T > 0 a token is drawn from softmax(z / T), limited to the `top_k` most probable tokens
//! and then to the smallest set of them whose probability reaches `top_p`; with T = 0 it is the largest logit. Before
//! that the repetition penalty p divides positive logits of tokens that occurred by p and multiplies negative ones
//! (Keskar et al. 2019). Order and rules are those of transformers' `generate`; the drawing and the penalty are
//! candle-transformers'.
//!
//! - [`GenerationConfig`]: the options; [`GenerationConfig::for_model`] takes what a model's `generation_config.json`
//!   says.
//! - [`Sampler`]: draws tokens.
//! - [`StopStrings`]: finds stop strings in text that comes in pieces.

mod config;
mod sampler;
mod stop;

pub use config::GenerationConfig;
pub use sampler::Sampler;
pub use stop::StopStrings;
