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
fn next_tokens(running: &mut [Running], logits: &Matrix) -> Result<Vec<u32>> {
    // The largest logits are found where they are; what has none is left to the sampler, which says why.
    if running.iter().all(|one| one.sequence.sampler.takes_the_largest()) {
        let largest: Option<Vec<u32>> = argmax::rows(logits.view())?.into_iter().collect();
        if let Some(tokens) = largest {
            return Ok(tokens);
        }
    }
    let values = logits.to_vec()?;
    let rows = running.iter_mut().zip(values.chunks_exact(logits.cols()));
    rows.map(|(Running { sequence, .. }, row)| {
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

/// An answer in progress, and the index of its prompt.
struct Running {
    index: usize,
    sequence: Sequence,
}

/// The hooks of a run.
trait Listener {
    /// Sees every new token as it is made, with the index of its prompt, and may end the answer.
    fn token(&mut self, index: usize, token: u32) -> ControlFlow<()>;

    /// Gets each answer as it ends, with the index of its prompt.
    fn end(&mut self, index: usize, answer: Generation) -> Result<()>;
}

/// New answers begin when this share of the places is free: their prompts then run together, instead of a step for each.
const REFILL_SHARE: usize = 4;

/// Continues prompts, at most `together` at a time: where answers have ended, the next prompts begin. `adapters` has a choice a
/// prompt.
fn run(
    model: &CausalLm,
    prompts: &[&[u32]],
    config: &GenerationConfig,
    adapters: &[AdapterChoice],
    together: usize,
    listener: &mut dyn Listener,
) -> Result<()> {
    config.validate()?;
    // What is wrong with the last prompt is said before the first is answered.
    for prompt in prompts {
        if prompt.is_empty() {
            return Err(Error::Invalid("generation needs at least one token to start from".into()));
        }
        capacity(model, prompt.len(), config)?;
    }
    let together = together.min(prompts.len()).max(1);
    let chunk = config.prefill_chunk_size.unwrap_or(GenerationConfig::PREFILL_CHUNK);
    let mut running: Vec<Running> = Vec::new();
    let mut next = 0;
    while next < prompts.len() || !running.is_empty() {
        if running.is_empty() || together - running.len() >= together.div_ceil(REFILL_SHARE) {
            let begun = running.len();
            while running.len() < together && next < prompts.len() {
                let sequence = Sequence::new(model, prompts[next], config, next as u64)?;
                running.push(Running { index: next, sequence });
                next += 1;
            }
            begin(model, &mut running[begun..], config, adapters, chunk, listener)?;
            finish(&mut running, listener)?;
        }
        if !running.is_empty() {
            advance(model, &mut running, config, adapters, listener)?;
            finish(&mut running, listener)?;
        }
    }
    Ok(())
}

/// Runs the prompts of new answers up to their first tokens: some together, as long as they have no more than `chunk` tokens.
fn begin(
    model: &CausalLm,
    mut new: &mut [Running],
    config: &GenerationConfig,
    adapters: &[AdapterChoice],
    chunk: usize,
    listener: &mut dyn Listener,
) -> Result<()> {
    if config.max_new_tokens == 0 {
        return Ok(());
    }
    for Running { index, sequence } in new.iter_mut() {
        prefill(model, sequence, chunk, adapters[*index])?;
    }
    while !new.is_empty() {
        let mut tokens = 0;
        let fits = |one: &&Running| {
            tokens += one.sequence.pending().len();
            tokens <= chunk
        };
        let count = new.iter().take_while(fits).count().max(1);
        let (part, rest) = new.split_at_mut(count);
        advance(model, part, config, adapters, listener)?;
        new = rest;
    }
    Ok(())
}

/// Runs what the model has not seen of each answer, and adds the next tokens.
fn advance(
    model: &CausalLm,
    running: &mut [Running],
    config: &GenerationConfig,
    adapters: &[AdapterChoice],
    listener: &mut dyn Listener,
) -> Result<()> {
    let limit = model.config().max_position_embeddings;
    let pending: Vec<Vec<u32>> = running.iter().map(|one| one.sequence.pending().to_vec()).collect();
    let inputs: Vec<&[u32]> = pending.iter().map(Vec::as_slice).collect();
    let choices: Vec<AdapterChoice> = running.iter().map(|one| adapters[one.index]).collect();
    let mut caches: Vec<_> = running.iter_mut().map(|one| &mut one.sequence.cache).collect();
    let logits = model.next_logits(&inputs, &mut caches, &choices)?;
    let tokens = next_tokens(running, &logits)?;
    for (Running { index, sequence }, token) in running.iter_mut().zip(tokens) {
        if config.is_stop_token(token) || model.config().eos_token_ids.contains(&token) {
            sequence.stop = Some(StopReason::EndToken(token));
            continue;
        }
        sequence.text.push(token);
        let made = sequence.text.len() - sequence.prompt;
        if listener.token(*index, token).is_break() {
            sequence.stop = Some(StopReason::Caller);
        } else if made >= config.max_new_tokens || sequence.text.len() >= limit {
            sequence.stop = Some(StopReason::Length);
        }
    }
    Ok(())
}

/// Takes out the answers that have ended.
fn finish(running: &mut Vec<Running>, listener: &mut dyn Listener) -> Result<()> {
    for Running { index, mut sequence } in running.extract_if(.., |one| one.sequence.stop.is_some()) {
        let tokens = sequence.text.split_off(sequence.prompt);
        listener.end(index, Generation { tokens, stop: sequence.stop.unwrap_or(StopReason::Length) })?;
    }
    Ok(())
}
