//! Sampling options that `chat`, `generate` and `eval` share.

use qlora::open::GenerationDefaults;
use qlora::sampling::GenerationConfig;

/// Sampling options.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// 0 takes the most probable token each time.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Only the so many most probable tokens.
    #[arg(long)]
    top_k: Option<usize>,
    /// Only the most probable tokens that together have this probability.
    #[arg(long)]
    top_p: Option<f64>,
    /// Makes tokens that occurred less probable.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Ends an answer as soon as it occurs, special tokens included; may be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Prompts run in pieces of so many tokens: smaller ones take less memory.
    #[arg(long)]
    prefill_chunk_size: Option<usize>,
}

impl SamplingArgs {
    /// As asked for, ending where the model's answers end.
    pub(crate) fn config(&self, defaults: &GenerationDefaults) -> GenerationConfig {
        GenerationConfig {
            max_new_tokens: self.max_new_tokens,
            temperature: (self.temperature > 0.0).then_some(self.temperature),
            top_k: self.top_k,
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            stop_tokens: defaults.eos_token_ids.clone(),
            stop_strings: [self.stop.clone(), defaults.stop_strings.clone()].concat(),
            prefill_chunk_size: self.prefill_chunk_size,
            ..GenerationConfig::default()
        }
    }
}
