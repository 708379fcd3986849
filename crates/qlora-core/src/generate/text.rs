//! Generation in text: tokens decoded as they come, stop strings, files of prompts, and the memory it takes.

use std::collections::VecDeque;
use std::fmt;
use std::ops::ControlFlow;

use super::{Generation, Listener, StopReason, capacity};
use crate::error::{Error, Result};
use crate::model::{CausalLm, KvCache};
use crate::sampling::{GenerationConfig, StopStrings};
use crate::tokenizer::{DecodeStream, Tokenizer};

/// The text of an answer, token by token.
#[derive(Debug)]
pub struct AnswerText<'a> {
    decoder: DecodeStream<'a>,
    stops: StopStrings,
    // Special tokens in the stop strings. The decoder leaves special tokens out.
    special: Vec<(u32, String)>,
}

impl<'a> AnswerText<'a> {
    /// The text up to the first of `config`'s stop strings. They may hold special tokens, which the text is shown without.
    pub fn new(tokenizer: &'a Tokenizer, config: &GenerationConfig) -> Self {
        let inside = |text: &str| config.stop_strings.iter().any(|stop| stop.contains(text));
        Self {
            decoder: tokenizer.decode_stream(true),
            stops: StopStrings::new(config.stop_strings.clone()),
            special: tokenizer.special_tokens().filter(|(_, text)| inside(text)).collect(),
        }
    }

    /// Takes the next token and returns the text that can be shown: whole characters that belong to no stop string.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn push(&mut self, token: u32) -> Result<String> {
        let shown = self.stops.push(&self.decoder.push(token)?);
        match self.special.iter().find(|(id, _)| *id == token) {
            Some((_, text)) => Ok(shown + &self.stops.push_hidden(text)),
            None => Ok(shown),
        }
    }

    /// Whether a stop string occurred: the answer is then complete.
    pub fn is_complete(&self) -> bool {
        self.stops.found().is_some()
    }

    /// Ends the text and returns the part of it that was still held back.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn finish(mut self) -> Result<String> {
        Ok(self.stops.push(&self.decoder.finish()?) + &self.stops.finish())
    }
}

/// A finished answer as text.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Answer {
    /// The text, without the stop string that ended it.
    pub text: String,
    /// Tokens that were generated.
    pub tokens: usize,
    /// The reason why the generation ended; [`StopReason::Caller`] stands for a stop string.
    pub stop: StopReason,
}

/// Gets answers in the order of their prompts, with the index of the first.
type OnAnswers<'a> = &'a mut dyn FnMut(usize, Vec<Answer>) -> Result<()>;

/// The answers of a run as text.
pub(super) struct AnswerTexts<'a> {
    tokenizer: &'a Tokenizer,
    config: &'a GenerationConfig,
    /// Of the prompts from number `handed_on` on.
    states: VecDeque<State<'a>>,
    handed_on: usize,
    on_answers: OnAnswers<'a>,
    failure: Option<Error>,
}

enum State<'a> {
    Waiting,
    Running(Box<AnswerText<'a>>, String),
    Ended(Answer),
}

impl<'a> AnswerTexts<'a> {
    pub(super) fn new(
        tokenizer: &'a Tokenizer,
        config: &'a GenerationConfig,
        prompts: usize,
        on_answers: OnAnswers<'a>,
    ) -> Self {
        let states = (0..prompts).map(|_| State::Waiting).collect();
        Self { tokenizer, config, states, handed_on: 0, on_answers, failure: None }
    }

    /// The error of the decoder that ended an answer, if one did.
    pub(super) fn check(self) -> Result<()> {
        self.failure.map_or(Ok(()), Err)
    }

    fn new_text(&self) -> (Box<AnswerText<'a>>, String) {
        (Box::new(AnswerText::new(self.tokenizer, self.config)), String::new())
    }
}

impl Listener for AnswerTexts<'_> {
    fn token(&mut self, index: usize, token: u32) -> ControlFlow<()> {
        let at = index - self.handed_on;
        if matches!(self.states[at], State::Waiting) {
            let (text, whole) = self.new_text();
            self.states[at] = State::Running(text, whole);
        }
        let State::Running(text, whole) = &mut self.states[at] else { return ControlFlow::Break(()) };
        match text.push(token) {
            Ok(piece) => whole.push_str(&piece),
            Err(error) => self.failure = Some(error),
        }
        if self.failure.is_some() || text.is_complete() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn end(&mut self, index: usize, answer: Generation) -> Result<()> {
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        let at = index - self.handed_on;
        let (text, whole) = match std::mem::replace(&mut self.states[at], State::Waiting) {
            State::Running(text, whole) => (text, whole),
            _ => self.new_text(),
        };
        let text = whole + &text.finish()?;
        self.states[at] = State::Ended(Answer { text, tokens: answer.tokens.len(), stop: answer.stop });
        let ended = self.states.iter().take_while(|state| matches!(state, State::Ended(_))).count();
        let ready: Vec<Answer> = self
            .states
            .drain(..ended)
            .filter_map(|state| if let State::Ended(answer) = state { Some(answer) } else { None })
            .collect();
        if !ready.is_empty() {
            let first = self.handed_on;
            self.handed_on += ready.len();
            (self.on_answers)(first, ready)?;
        }
        Ok(())
    }
}

/// The upper bound of the memory of a generation's KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CachePlan {
    /// Sequences that run together.
    pub sequences: usize,
    /// Tokens of all of them: prompts and answers.
    pub tokens: usize,
    /// Bytes of one token.
    pub token_bytes: usize,
}

impl CachePlan {
    /// For prompts of these lengths that run together.
    ///
    /// # Errors
    /// If a prompt is longer than the model allows.
    pub fn new(model: &CausalLm, prompts: impl IntoIterator<Item = usize>, config: &GenerationConfig) -> Result<Self> {
        let shape = model.config();
        let width = shape.num_key_value_heads * shape.head_dim;
        let token_bytes = KvCache::bytes(shape.num_hidden_layers, width, 1, model.workspace().dtype());
        let mut plan = Self { sequences: 0, tokens: 0, token_bytes };
        for prompt in prompts {
            plan.sequences += 1;
            // A cache begins with room for 64 tokens.
            plan.tokens += capacity(model, prompt, config)?.max(KvCache::FIRST_ROWS);
        }
        Ok(plan)
    }

    /// Bytes of all tokens.
    pub fn bytes(&self) -> usize {
        self.tokens.saturating_mul(self.token_bytes)
    }
}

impl fmt::Display for CachePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sequences = match self.sequences {
            1 => String::new(),
            n => format!(" of {n} sequences"),
        };
        let (tokens, megabytes) = (self.tokens, self.bytes() as f64 / 1e6);
        write!(f, "{megabytes:.1} MB for {tokens} tokens{sequences} ({} bytes each)", self.token_bytes)
    }
}
