//! A request for text: prompts, how they are continued, and by which adapters.

use std::ops::{ControlFlow, Range};

use super::text::{Answer, CachePlan, answer_from};
use super::{Generation, run};
use crate::error::Result;
use crate::model::{AdapterChoices, CausalLm};
use crate::sampling::GenerationConfig;
use crate::tokenizer::Tokenizer;

/// Prompts that are continued together, so that every weight is read once for all of them.
///
/// The answer to each is what it is alone, up to rounding: with sampling, each draws from a seed of its own
/// ([`GenerationConfig::seed_of_row`]), whatever the batch size is.
///
/// ```no_run
/// # use qlora_core::{generate::GenerationRequest, model::{AdapterChoice, CausalLm}, sampling::GenerationConfig};
/// # fn answer(model: &CausalLm) -> qlora_core::Result<()> {
/// let config = GenerationConfig { max_new_tokens: 64, ..GenerationConfig::default() };
/// let answers = GenerationRequest::new(&[&[1, 2, 3], &[4, 5]], &config)
///     .with_adapters(&[AdapterChoice::Base, AdapterChoice::Named("poet")])
///     .run(model)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct GenerationRequest<'a> {
    prompts: &'a [&'a [u32]],
    config: &'a GenerationConfig,
    adapters: AdapterChoices<'a>,
    batch_size: usize,
}

impl<'a> GenerationRequest<'a> {
    /// All prompts in one batch, by the adapter that is switched on.
    pub fn new(prompts: &'a [&'a [u32]], config: &'a GenerationConfig) -> Self {
        Self { prompts, config, adapters: AdapterChoices::default(), batch_size: usize::MAX }
    }

    /// One adapter for all prompts, or one for each.
    pub fn with_adapters(self, adapters: impl Into<AdapterChoices<'a>>) -> Self {
        Self { adapters: adapters.into(), ..self }
    }

    /// At most so many prompts at a time; the answers do not depend on it, up to rounding.
    pub fn with_batch_size(self, batch_size: usize) -> Self {
        Self { batch_size: batch_size.max(1), ..self }
    }

    /// The tokens of every answer.
    ///
    /// # Errors
    /// If the configuration is not valid, a prompt is empty, prompt and answer are longer than the model allows, there is not one
    /// choice of an adapter a prompt, or a chosen adapter is not loaded.
    pub fn run(&self, model: &CausalLm) -> Result<Vec<Generation>> {
        self.stream(model, |_, _| ControlFlow::Continue(()))
    }

    /// [`Self::run`], in which `on_token` sees every new token as it is made, with the index of its prompt, and may end the answer.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn stream(
        &self,
        model: &CausalLm,
        mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>> {
        let choices = self.adapters.each(self.prompts.len())?;
        let mut generations = Vec::with_capacity(self.prompts.len());
        for rows in self.batches() {
            let first = rows.start;
            let on_token = |index: usize, token| on_token(first + index, token);
            let (prompts, choices) = (&self.prompts[rows.clone()], &choices[rows]);
            generations.extend(run(model, prompts, self.config, choices, first as u64, on_token)?);
        }
        Ok(generations)
    }

    /// Every answer as text. A stop string ends its answer alone.
    ///
    /// # Errors
    /// As [`Self::run`], and if a token cannot be decoded.
    pub fn answer(&self, model: &CausalLm, tokenizer: &Tokenizer) -> Result<Vec<Answer>> {
        let mut all = Vec::with_capacity(self.prompts.len());
        self.answer_batches(model, tokenizer, |_, answers| {
            all.extend(answers);
            Ok(())
        })?;
        Ok(all)
    }

    /// [`Self::answer`], in which `on_answers` gets each batch's answers and the index of the first one as soon as they are there.
    ///
    /// # Errors
    /// As [`Self::answer`], and what `on_answers` returns.
    pub fn answer_batches(
        &self,
        model: &CausalLm,
        tokenizer: &Tokenizer,
        mut on_answers: impl FnMut(usize, Vec<Answer>) -> Result<()>,
    ) -> Result<()> {
        let choices = self.adapters.each(self.prompts.len())?;
        for rows in self.batches() {
            let first = rows.start;
            let (prompts, choices) = (&self.prompts[rows.clone()], &choices[rows]);
            on_answers(first, answer_from(model, tokenizer, prompts, self.config, choices, first as u64)?)?;
        }
        Ok(())
    }

    /// The most memory that keys and values take: that of the largest batch.
    ///
    /// # Errors
    /// If a prompt is longer than the model allows.
    pub fn cache_plan(&self, model: &CausalLm) -> Result<CachePlan> {
        let mut largest = CachePlan::new(model, [], self.config)?;
        for rows in self.batches() {
            let plan = CachePlan::new(model, self.prompts[rows].iter().map(|prompt| prompt.len()), self.config)?;
            if plan.tokens > largest.tokens {
                largest = plan;
            }
        }
        Ok(largest)
    }

    fn batches(&self) -> impl Iterator<Item = Range<usize>> {
        let (size, count) = (self.batch_size, self.prompts.len());
        (0..count.div_ceil(size)).map(move |batch| batch * size..((batch + 1).saturating_mul(size)).min(count))
    }
}
