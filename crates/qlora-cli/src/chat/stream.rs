//! Asking a model, and printing its answer as it comes.

use std::collections::BTreeSet;
use std::fmt;
use std::io::Write;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use qlora::generate::{AnswerText, CachePlan, generate};
use qlora::sampling::GenerationConfig;
use qlora::trainer::data::{Conversation, TextEncoder};
use qlora::trainer::encoder::ModelEncoder;

use crate::model::Loaded;
use crate::output;

/// Asks a model.
pub(crate) struct Asker<'a> {
    pub(crate) loaded: &'a Loaded,
    pub(crate) encoder: ModelEncoder<'a>,
    pub(crate) config: GenerationConfig,
    /// The prompt is the beginning of a text, not a message of a chat.
    pub(crate) raw: bool,
}

impl Asker<'_> {
    /// A conversation as tokens, as training writes it; where texts are asked for, its last text alone.
    ///
    /// # Errors
    /// If there is no chat template, or it refuses the conversation.
    pub(crate) fn encode(&self, conversation: &Conversation, raw: Option<&str>) -> anyhow::Result<Vec<u32>> {
        if let (true, Some(text)) = (self.raw, raw) {
            return Ok(self.loaded.files.tokenizer.encode_prompt(text)?);
        }
        self.loaded
            .files
            .chat_template
            .as_ref()
            .context("the model has no chat template: give one with --chat-template, or use --raw")?;
        self.encoder.prompt(conversation).map_err(|error| anyhow!("{error}"))
    }

    /// Prints a remark on the parts of these conversations that the chat template does not read.
    pub(crate) fn remark_unused<'c>(&self, conversations: impl IntoIterator<Item = &'c Conversation>) {
        let unused: BTreeSet<String> =
            conversations.into_iter().flat_map(|conversation| self.encoder.unused(conversation)).collect();
        if !self.raw && !unused.is_empty() {
            let names = unused.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            output::remark(format!("the chat template does not use: {names}"));
        }
    }

    /// Prints an answer as it comes, until it ends or `stop` says so, and returns it. No two turns repeat each other's draws.
    ///
    /// # Errors
    /// If the model fails, such as on a prompt that is too long.
    pub(crate) fn stream(
        &self,
        prompt: &[u32],
        turn: u64,
        stop: impl Fn() -> bool,
    ) -> anyhow::Result<(String, Figures)> {
        let Loaded { model, files, .. } = self.loaded;
        let config = GenerationConfig { seed: self.config.seed_of_row(turn), ..self.config.clone() };
        let cache = CachePlan::new(model, [prompt.len()], &config)?;
        let start = Instant::now();
        let mut text = AnswerText::new(&files.tokenizer, &config);
        let mut stdout = std::io::stdout();
        let (mut whole, mut failure, mut first) = (String::new(), None, None);
        let answer = generate(model, prompt, &config, |token| {
            let piece = match text.push(token) {
                Ok(piece) => piece,
                Err(error) => {
                    failure = Some(error);
                    return ControlFlow::Break(());
                }
            };
            first.get_or_insert_with(|| start.elapsed());
            whole.push_str(&piece);
            // A closed pipe ends the generation, too.
            let read = stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush()).is_ok();
            match read && !text.is_complete() && !stop() {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        })?;
        if let Some(error) = failure {
            return Err(error.into());
        }
        let rest = text.finish()?;
        writeln!(stdout, "{rest}")?;
        let whole_time = start.elapsed();
        let first = first.unwrap_or(whole_time);
        let figures =
            Figures { prompt: prompt.len(), first, answer: answer.tokens.len(), rest: whole_time - first, cache };
        Ok((whole + &rest, figures))
    }
}

/// The duration of an answer, its speed, and its memory.
pub(crate) struct Figures {
    /// Tokens of the prompt.
    pub(crate) prompt: usize,
    /// Until the first token, which belongs to the prompt.
    first: Duration,
    /// Tokens of the answer.
    pub(crate) answer: usize,
    rest: Duration,
    cache: CachePlan,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let speed = self.answer.saturating_sub(1) as f64 / self.rest.as_secs_f64().max(1e-9);
        writeln!(f, "keys and values: {} at most", self.cache)?;
        write!(f, "{} tokens of prompt in {:.2} s, ", self.prompt, self.first.as_secs_f64())?;
        write!(f, "{} new tokens at {speed:.1} tokens/s", self.answer)
    }
}
