//! Answers to the same prompts again and again while training: how the model's text changes beside how its loss does.
//!
//! They are made greedily, one prompt at a time, by rank 0, before the first step, every so many steps and after the last. They draw
//! no random number and change no parameter: a run has the same bits with and without them. `samples.jsonl` in the output folder has
//! a line an answer; a resumed run goes on in it as an uninterrupted one would have.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use qlora_core::atomic::write_atomically;
use qlora_core::sampling::GenerationConfig;
use qlora_core::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::config::{SamplePrompts, TrainConfig};
use crate::data::{Conversation, ConversationMessage, Dataset, JsonLine, TextEncoder, read_json_lines};
use crate::encoder::ModelEncoder;
use crate::error::{Error, Result};
use crate::model::TrainableModel;

/// The file of the answers in the output folder.
pub const SAMPLES_FILE: &str = "samples.jsonl";

/// Rows of the validation data that are asked where no prompts are given.
const ROWS: usize = 3;

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Sample {
    /// Optimizer steps done.
    pub step: u64,
    /// Epochs done, with the fraction of the current one.
    pub epoch: f64,
    /// The prompt: as it was given, or of a row of the validation data as the model sees it.
    pub prompt: String,
    /// The answer.
    pub completion: String,
    /// The answer in the validation data, if the prompt is from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
}

/// The prompts of a run, as tokens, and when they are answered.
#[derive(Debug)]
pub struct SamplePlan {
    every: u64,
    config: GenerationConfig,
    tokenizer: Tokenizer,
    prompts: Vec<Prompt>,
}

#[derive(Debug)]
struct Prompt {
    /// Where it is from, for messages.
    place: String,
    text: String,
    tokens: Vec<u32>,
    expected: Option<String>,
}

impl SamplePlan {
    /// The configured prompts, or the first rows of `validation` up to their first answer; none without `sample_every`. Text prompts
    /// are user messages where the model has a chat template, otherwise plain text. `max_positions` is the most tokens that the model
    /// takes.
    ///
    /// # Errors
    /// If the file of prompts cannot be read, a prompt cannot be encoded or is longer than the model can take.
    pub fn of(
        config: &TrainConfig,
        encoder: &ModelEncoder<'_>,
        validation: Option<&Dataset>,
        max_positions: Option<usize>,
    ) -> Result<Option<Self>> {
        let options = &config.training;
        let Some(every) = options.sample_every else { return Ok(None) };
        let prompts = match &options.sample_prompts {
            SamplePrompts::File(path) => of_file(path, encoder)?,
            texts if texts.is_empty() => of_rows(validation, encoder)?,
            SamplePrompts::Texts(texts) => of_texts(texts, encoder)?,
        };
        if prompts.is_empty() {
            return Err(Error::Invalid(
                "sample_every in [training]: there is nothing to ask; write sample_prompts, or give validation data"
                    .to_owned(),
            ));
        }
        for Prompt { place, tokens, .. } in &prompts {
            let tokens = tokens.len();
            if tokens == 0 {
                return Err(Error::Invalid(format!("{place} has no tokens")));
            }
            if let Some(most) = max_positions.filter(|&most| tokens >= most) {
                return Err(Error::Invalid(format!(
                    "{place} has {tokens} tokens, the model takes {most} with the answer"
                )));
            }
        }
        let config = GenerationConfig {
            max_new_tokens: options.sample_max_new_tokens,
            stop_tokens: encoder.ends().to_vec(),
            ..GenerationConfig::default()
        };
        Ok(Some(Self { every, config, tokenizer: encoder.tokenizer().clone(), prompts }))
    }

    /// Whether the prompts are answered after this step, besides the last one.
    pub(crate) fn is_due(&self, step: u64) -> bool {
        step.is_multiple_of(self.every)
    }

    /// The prompts of a round.
    pub(crate) fn len(&self) -> usize {
        self.prompts.len()
    }

    /// The answers of a model as it is now; none if a stop was requested before all were there.
    pub(crate) fn answer(
        &self,
        model: &mut impl TrainableModel,
        step: u64,
        epoch: f64,
        asked_to_stop: &dyn Fn() -> bool,
    ) -> Result<Option<Vec<Sample>>> {
        let mut go_on = |_: u32| match asked_to_stop() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        let mut round = Vec::new();
        for Prompt { text, tokens, expected, .. } in &self.prompts {
            if asked_to_stop() {
                return Ok(None);
            }
            let answer = model.generate(tokens, &self.config, &mut go_on)?;
            if asked_to_stop() {
                return Ok(None);
            }
            let completion = self.tokenizer.decode(&answer, true)?;
            round.push(Sample { step, epoch, prompt: text.clone(), completion, expected: expected.clone() });
        }
        Ok(Some(round))
    }
}

fn of_texts(texts: &[String], encoder: &ModelEncoder<'_>) -> Result<Vec<Prompt>> {
    let prompt = |(i, text): (usize, &String)| {
        let tokens = match encoder.has_chat_template() {
            true => encoder.prompt(&Conversation::new(vec![ConversationMessage::new("user", text)])),
            false => encoder.encode(text, true),
        };
        let place = format!("prompt {} of sample_prompts", i + 1);
        let tokens = tokens.map_err(|error| Error::Invalid(format!("{place}: {error}")))?;
        Ok(Prompt { place, text: text.clone(), tokens, expected: None })
    };
    texts.iter().enumerate().map(prompt).collect()
}

fn of_file(path: &Path, encoder: &ModelEncoder<'_>) -> Result<Vec<Prompt>> {
    if !path.exists() {
        return Err(Error::Invalid(format!(
            "sample_prompts in [training]: there is no file {}; prompts themselves are a list: sample_prompts = [\"...\"]",
            path.display()
        )));
    }
    let prompt = |JsonLine { number, row }: &JsonLine| {
        let fail = |message: String| Error::data(path, *number, message);
        let asked = Conversation::prompt_from_json(row).map_err(fail)?;
        let text = asked.messages.last().map(|message| message.content.clone()).unwrap_or_default();
        let is_text = row.get("prompt").is_some_and(serde_json::Value::is_string);
        let tokens = match is_text && !encoder.has_chat_template() {
            true => encoder.encode(&text, true),
            false => encoder.prompt(&asked),
        };
        let tokens = tokens.map_err(|error| fail(error.to_string()))?;
        let place = format!("{}:{number}: the prompt", path.display());
        Ok(Prompt { place, text, tokens, expected: None })
    };
    read_json_lines(path)?.iter().map(prompt).collect()
}

/// The first rows of the validation data. Of rows that are trained from their beginning, such as plain text, the first half is the
/// prompt.
fn of_rows(validation: Option<&Dataset>, encoder: &ModelEncoder<'_>) -> Result<Vec<Prompt>> {
    let Some(data) = validation else { return Ok(Vec::new()) };
    let decode = |tokens: &[u32], plain: bool| encoder.tokenizer().decode(tokens, plain);
    // The first document of a pair is the better answer.
    let documents = (0..data.len()).step_by(data.group_size()).take(ROWS);
    let prompt = |i: usize| {
        let document = data.document(i);
        let answer = document.trained.iter().position(|&trained| trained).filter(|&first| first > 1);
        let begin = answer.unwrap_or(document.ids.len().div_ceil(2));
        let rest = &document.ids[begin..];
        let trained = document.trained[begin..].iter().take_while(|&&trained| trained).count();
        let (tokens, expected) = (document.ids[..begin].to_vec(), &rest[..trained]);
        let place =
            format!("{}: the prompt of this validation row, asked as there are no sample_prompts,", data.origin(i));
        Ok(Prompt { place, text: decode(&tokens, false)?, expected: Some(decode(expected, true)?), tokens })
    };
    documents.map(prompt).collect()
}

/// `samples.jsonl` while a run writes it.
#[derive(Debug)]
pub(crate) struct SamplesFile {
    path: PathBuf,
    file: Option<File>,
}

impl SamplesFile {
    /// The file of a run that has done `steps`, and the answers in it of these steps. Others are of steps that are done again, or of
    /// an earlier run: they are taken out. So is the round after the last of these steps if it has fewer answers than there are
    /// `prompts`: the run was killed while it wrote them, and makes them again.
    pub(crate) fn open(folder: &Path, steps: u64, prompts: usize) -> Result<(Self, Vec<Sample>)> {
        let path = folder.join(SAMPLES_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io(&path, error)),
        };
        // A line that was cut short was being written when the run was killed: its step is done again.
        let written = text.lines().filter_map(|line| serde_json::from_str::<Sample>(line).ok());
        let mut kept: Vec<Sample> = written.filter(|sample| steps > 0 && sample.step <= steps).collect();
        if kept.iter().filter(|sample| sample.step == steps).count() < prompts {
            kept.retain(|sample| sample.step != steps);
        }
        let lines: String = kept.iter().map(line).collect();
        if lines != text {
            write_atomically(&path, |file| file.write_all(lines.as_bytes()))?;
        }
        Ok((Self { path, file: None }, kept))
    }

    /// Adds answers. The file is made by the first ones.
    pub(crate) fn write(&mut self, samples: &[Sample]) -> Result<()> {
        let failed = |error| Error::io(&self.path, error);
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(File::options().create(true).append(true).open(&self.path).map_err(failed)?),
        };
        let lines: String = samples.iter().map(line).collect();
        file.write_all(lines.as_bytes()).map_err(failed)
    }
}

fn line(sample: &Sample) -> String {
    let mut line = serde_json::to_string(sample).expect("numbers and texts have a JSON form");
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(step: u64, completion: &str) -> Sample {
        let (prompt, expected) = ("How much?".to_owned(), (step > 1).then(|| "four".to_owned()));
        Sample { step, epoch: step as f64 / 3.0, prompt, completion: completion.to_owned(), expected }
    }

    #[test]
    fn a_resumed_run_goes_on_behind_its_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SAMPLES_FILE);
        let (mut file, before) = SamplesFile::open(folder.path(), 0, 1).unwrap();
        assert!(before.is_empty() && !path.exists(), "no file without an answer");
        [sample(0, "a\n\u{1b}[31m"), sample(2, "b"), sample(4, "c")].iter().for_each(|sample| {
            file.write(std::slice::from_ref(sample)).unwrap();
        });
        let whole = std::fs::read_to_string(&path).unwrap();
        // Killed in the middle of a line.
        std::fs::write(&path, whole.trim_end_matches("}\n")).unwrap();
        let (mut file, before) = SamplesFile::open(folder.path(), 3, 1).unwrap();
        assert_eq!(before, [sample(0, "a\n\u{1b}[31m"), sample(2, "b")]);
        file.write(&[sample(4, "c")]).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
        // The checkpoint of step 4 is written before its answers: of two, one was lost.
        let (_, before) = SamplesFile::open(folder.path(), 4, 2).unwrap();
        assert_eq!(before, [sample(0, "a\n\u{1b}[31m"), sample(2, "b")]);
        let (_, before) = SamplesFile::open(folder.path(), 0, 1).unwrap();
        assert!(before.is_empty() && std::fs::read_to_string(&path).unwrap().is_empty(), "a new run begins anew");
    }
}
