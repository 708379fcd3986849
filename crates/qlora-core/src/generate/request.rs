//! A request for text: prompts, how they are continued, and by which adapters.

use std::ops::ControlFlow;

use super::text::{Answer, AnswerTexts, CachePlan};
use super::{Generation, Listener, run};
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
    /// All prompts together, by the adapter that is switched on.
    pub fn new(prompts: &'a [&'a [u32]], config: &'a GenerationConfig) -> Self {
        Self { prompts, config, adapters: AdapterChoices::default(), batch_size: usize::MAX }
    }

    /// One adapter for all prompts, or one for each.
    pub fn with_adapters(self, adapters: impl Into<AdapterChoices<'a>>) -> Self {
        Self { adapters: adapters.into(), ..self }
    }

    /// At most so many prompts at a time: where answers have ended, the next prompts begin. The answers do not depend on it, up to
    /// rounding.
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
        let mut answers = Collect { on_token: &mut on_token, answers: self.prompts.iter().map(|_| None).collect() };
        run(model, self.prompts, self.config, &choices, self.batch_size, &mut answers)?;
        Ok(answers.answers.into_iter().flatten().collect())
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

    /// [`Self::answer`], in which `on_answers` gets answers as soon as they and all before them are there, in the order of the
    /// prompts, with the index of the first.
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
        let mut texts = AnswerTexts::new(tokenizer, self.config, self.prompts.len(), &mut on_answers);
        run(model, self.prompts, self.config, &choices, self.batch_size, &mut texts)?;
        texts.check()
    }

    /// A good number of prompts at a time: on a GPU as many as leave half of its free memory to everything else, 64 at most; 8 on the
    /// CPU, where more are no faster.
    ///
    /// # Errors
    /// If a prompt is longer than the model allows, or the GPU fails.
    pub fn default_batch_size(&self, model: &CausalLm) -> Result<usize> {
        const ON_CPU: usize = 8;
        let count = self.prompts.len().max(1);
        #[cfg(feature = "cuda")]
        if let Some(gpu) = model.workspace().gpu() {
            const ON_GPU: usize = 64;
            let room = gpu.pool().available()? / 2;
            let mut size = ON_GPU.min(count);
            while size > 1 && self.with_batch_size(size).cache_plan(model)?.bytes() as u64 > room {
                size = size.div_ceil(2);
            }
            return Ok(size);
        }
        // Of the prompts' lengths, as on a GPU.
        self.cache_plan(model)?;
        Ok(ON_CPU.min(count))
    }

    /// The most memory that keys and values take: that of the longest prompts that may run together.
    ///
    /// # Errors
    /// If a prompt is longer than the model allows.
    pub fn cache_plan(&self, model: &CausalLm) -> Result<CachePlan> {
        let mut lengths: Vec<usize> = self.prompts.iter().map(|prompt| prompt.len()).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.truncate(self.batch_size);
        CachePlan::new(model, lengths, self.config)
    }
}

/// The answers' tokens by prompt.
struct Collect<'a> {
    on_token: &'a mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    answers: Vec<Option<Generation>>,
}

impl Listener for Collect<'_> {
    fn token(&mut self, index: usize, token: u32) -> ControlFlow<()> {
        (self.on_token)(index, token)
    }

    fn end(&mut self, index: usize, answer: Generation) -> Result<()> {
        self.answers[index] = Some(answer);
        Ok(())
    }
}
