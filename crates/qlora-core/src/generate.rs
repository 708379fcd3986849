//! Text generation with a key-value cache, for one prompt or a batch of them.

mod request;
mod text;

use std::ops::ControlFlow;

use candle_core::{Device, Tensor};
use qlora_kernels::Matrix;
use qlora_kernels::ops::argmax;

pub use self::request::GenerationRequest;
pub use self::text::{Answer, AnswerText, CachePlan};
use crate::error::{Error, Result};
use crate::model::{AdapterChoice, CausalLm, KvCache};
use crate::sampling::{GenerationConfig, Sampler};

/// The reason why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The model produced this end token; it is not part of the answer.
    EndToken(u32),
    /// The answer has `max_new_tokens` tokens.
    Length,
    /// The caller asked to stop.
    Caller,
}

/// One finished answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Generation {
    /// The new tokens, without the end token.
    pub tokens: Vec<u32>,
    /// The reason why the generation ended.
    pub stop: StopReason,
}

/// Continues `prompt`: a [`GenerationRequest`] of one. `on_token` sees every new token as it is made and may end the generation.
///
/// # Errors
/// If the configuration is not valid, the prompt is empty, or prompt and answer are longer than the model allows.
pub fn generate(
    model: &CausalLm,
    prompt: &[u32],
    config: &GenerationConfig,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    let mut answers = GenerationRequest::new(&[prompt], config).stream(model, |_, token| on_token(token))?;
    Ok(answers.swap_remove(0))
}

/// The next token of each sequence.
fn next_tokens(active: &mut [(usize, &mut Sequence)], logits: &Matrix) -> Result<Vec<u32>> {
    // The largest logits are found where they are; what has none is left to the sampler, which says why.
    if active.iter().all(|(_, sequence)| sequence.sampler.takes_the_largest()) {
        let largest: Option<Vec<u32>> = argmax::rows(logits.view())?.into_iter().collect();
        if let Some(tokens) = largest {
            return Ok(tokens);
        }
    }
    let values = logits.to_vec()?;
    let rows = active.iter_mut().zip(values.chunks_exact(logits.cols()));
    rows.map(|((_, sequence), row)| {
        let row = Tensor::from_slice(row, row.len(), &Device::Cpu)?;
        sequence.sampler.sample(&row, &sequence.text)
    })
    .collect()
}

/// Runs the beginnings of long prompts, a piece at a time: the activations of a whole prompt would take the most memory.
fn prefill(model: &CausalLm, sequence: &mut Sequence, chunk: usize, adapter: AdapterChoice) -> Result<()> {
    while sequence.pending().len() > chunk {
        let piece = sequence.pending()[..chunk].to_vec();
        model.next_logits(&[&piece], &mut [&mut sequence.cache], adapter)?;
    }
    Ok(())
}

/// The most tokens that prompt and answer have together.
fn capacity(model: &CausalLm, prompt: usize, config: &GenerationConfig) -> Result<usize> {
    let limit = model.config().max_position_embeddings;
    if prompt >= limit {
        return Err(Error::Invalid(format!(
            "the prompt has {prompt} tokens, the model takes {limit} (max_position_embeddings)"
        )));
    }
    Ok(prompt.saturating_add(config.max_new_tokens).min(limit))
}

/// One prompt's state.
struct Sequence {
    cache: KvCache,
    sampler: Sampler,
    /// The prompt and the answer so far.
    text: Vec<u32>,
    prompt: usize,
    stop: Option<StopReason>,
}

impl Sequence {
    fn new(model: &CausalLm, prompt: &[u32], config: &GenerationConfig, row: u64) -> Result<Self> {
        let capacity = capacity(model, prompt.len(), config)?;
        let config = GenerationConfig { seed: config.seed_of_row(row), ..config.clone() };
        Ok(Self {
            cache: model.new_cache(capacity),
            sampler: Sampler::new(&config)?,
            text: prompt.to_vec(),
            prompt: prompt.len(),
            stop: (config.max_new_tokens == 0).then_some(StopReason::Length),
        })
    }

    /// The tokens that the model has not processed yet: the prompt at first, then the last token.
    fn pending(&self) -> &[u32] {
        &self.text[self.cache.len()..]
    }
}

/// `adapters` has a choice a prompt; `first_row` is the place of the first prompt among all those of the request.
fn run(
    model: &CausalLm,
    prompts: &[&[u32]],
    config: &GenerationConfig,
    adapters: &[AdapterChoice],
    first_row: u64,
    mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
) -> Result<Vec<Generation>> {
    config.validate()?;
    let limit = model.config().max_position_embeddings;
    let new = |(index, prompt): (usize, &&[u32])| Sequence::new(model, prompt, config, first_row + index as u64);
    let mut sequences = prompts.iter().enumerate().map(new).collect::<Result<Vec<_>>>()?;
    let chunk = config.prefill_chunk_size.unwrap_or(GenerationConfig::PREFILL_CHUNK);
    for (sequence, &adapter) in sequences.iter_mut().zip(adapters).filter(|(sequence, _)| sequence.stop.is_none()) {
        prefill(model, sequence, chunk, adapter)?;
    }
    loop {
        let mut active: Vec<_> = sequences.iter_mut().enumerate().filter(|(_, seq)| seq.stop.is_none()).collect();
        if active.is_empty() {
            break;
        }
        let pending: Vec<Vec<u32>> = active.iter().map(|(_, seq)| seq.pending().to_vec()).collect();
        let inputs: Vec<&[u32]> = pending.iter().map(Vec::as_slice).collect();
        let choices: Vec<AdapterChoice> = active.iter().map(|(index, _)| adapters[*index]).collect();
        let mut caches: Vec<_> = active.iter_mut().map(|(_, seq)| &mut seq.cache).collect();
        let logits = model.next_logits(&inputs, &mut caches, &choices)?;
        let tokens = next_tokens(&mut active, &logits)?;
        for ((index, sequence), token) in active.iter_mut().zip(tokens) {
            if config.is_stop_token(token) || model.config().eos_token_ids.contains(&token) {
                sequence.stop = Some(StopReason::EndToken(token));
                continue;
            }
            sequence.text.push(token);
            let made = sequence.text.len() - sequence.prompt;
            if on_token(*index, token).is_break() {
                sequence.stop = Some(StopReason::Caller);
            } else if made >= config.max_new_tokens || sequence.text.len() >= limit {
                sequence.stop = Some(StopReason::Length);
            }
        }
    }
    let finish = |mut sequence: Sequence| Generation {
        tokens: sequence.text.split_off(sequence.prompt),
        stop: sequence.stop.unwrap_or(StopReason::Length),
    };
    Ok(sequences.into_iter().map(finish).collect())
}
