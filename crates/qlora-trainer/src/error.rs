//! Errors of configuration, data, checkpoints and training.

use std::fmt;
use std::path::{Path, PathBuf};

pub use qlora_core::ErrorKind;

/// The result of anything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate. Messages name the file and line, the key, the step or the tensor.
///
/// A message is whole, as [`qlora_core::Error`]'s: what it holds of another error is no source too.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file or folder failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        r#source: std::io::Error,
    },

    /// The configuration is not valid; all problems that were found.
    #[error("{}", ProblemList(.0))]
    Config(Vec<Problem>),

    /// A data file has a row or a structure that is not valid.
    #[error("{}", Location(path, *line, message))]
    Data {
        /// The file.
        path: PathBuf,
        /// The line, from 1, if the problem is that of one line.
        line: Option<usize>,
        /// A description of the problem.
        message: String,
    },

    /// A checkpoint is damaged, missing or in the way.
    #[error("{path}: {message}")]
    Checkpoint {
        /// The checkpoint's folder, or the file in it.
        path: PathBuf,
        /// A description of the problem, with advice.
        message: String,
    },

    /// A checkpoint belongs to another run.
    #[error("{path} belongs to a different run:\n  {}\n{}", differences.join("\n  "), instead_of_resuming(path, *overridable))]
    Mismatch {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The entries that differ: name, value in the checkpoint, value now.
        differences: Vec<String>,
        /// Whether the run could go on all the same, if its configuration said so.
        overridable: bool,
    },

    /// A loss or gradient is NaN or infinite. Nothing was saved; the last checkpoint is from before this step.
    #[error(
        "step {step}, micro-batch {micro_batch}: {what}; the micro-batch holds {documents}. The last checkpoint is \
         untouched. Usual causes: a learning rate that is too high, or NaN in the base weights. To go on with a lower one, \
         resume with a new learning_rate and override_opt_param_scheduler = true in [training]"
    )]
    NonFinite {
        /// The optimizer step, from 1.
        step: u64,
        /// The micro-batch within the step, from 1.
        micro_batch: usize,
        /// The value that is not finite: the loss, or a tensor's gradient.
        what: String,
        /// The origin of the micro-batch's documents.
        documents: String,
    },

    /// Trainable tensors that get no gradient: the model would train without them.
    #[error("step {step}: no gradient reaches {} of {total} trainable tensors: {}", names.len(), list(names))]
    NoGradient {
        /// The optimizer step, from 1.
        step: u64,
        /// The number of trainable tensors.
        total: usize,
        /// The tensors without gradient.
        names: Vec<String>,
    },

    /// A rank of the run failed or is gone, which ends the run on every rank.
    #[error("rank {rank} {message}")]
    Rank {
        /// Its number.
        rank: usize,
        /// A description of its failure.
        message: String,
    },

    /// An argument makes no sense.
    #[error("{0}")]
    Invalid(String),

    /// Loading, building or running the model failed.
    #[error(transparent)]
    Core(#[from] qlora_core::Error),

    /// An operation failed.
    #[error(transparent)]
    Kernel(#[from] qlora_kernels::Error),

    /// The model failed in the middle of a step.
    #[error("step {step}, micro-batch {micro_batch}: {source}")]
    Step {
        /// The optimizer step, from 1.
        step: u64,
        /// The micro-batch within the step, from 1.
        micro_batch: usize,
        /// The model's error.
        r#source: qlora_core::Error,
    },
}

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// The file, if the configuration came from one.
    pub path: Option<PathBuf>,
    /// The line, from 1, if the key stands in the file.
    pub line: Option<usize>,
    /// A description of the problem; names the key.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => Location(path, self.line, &self.message).fmt(f),
            None => f.write_str(&self.message),
        }
    }
}

/// `path:line: message`, as compilers write it.
struct Location<'a>(&'a Path, Option<usize>, &'a str);

impl fmt::Display for Location<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(path, line, message) = self;
        match line {
            Some(line) => write!(f, "{}:{line}: {message}", path.display()),
            None => write!(f, "{}: {message}", path.display()),
        }
    }
}

struct ProblemList<'a>(&'a [Problem]);

impl fmt::Display for ProblemList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "\n" };
            write!(f, "{separator}{problem}")?;
        }
        Ok(())
    }
}

/// Advice on a checkpoint that cannot be resumed as it is.
fn instead_of_resuming(path: &Path, overridable: bool) -> String {
    let go_on = "To go on from it with the values given now, set override_opt_param_scheduler = true in [training]. ";
    format!(
        "{}To train its adapter further, with other data or for more steps, begin a new run from it: set \
         adapter_name_or_path = {path:?} in [lora] and another output_dir, and leave resume_from_checkpoint out. That has a fresh \
         optimizer and learning rate schedule",
        if overridable { go_on } else { "" }
    )
}

/// The first names of a list that may be long.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

impl Error {
    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. } => ErrorKind::Io,
            Self::Config(_) | Self::Invalid(_) => ErrorKind::Invalid,
            Self::Data { .. } => ErrorKind::Data,
            Self::Checkpoint { .. } | Self::Mismatch { .. } => ErrorKind::Checkpoint,
            Self::NonFinite { .. } | Self::NoGradient { .. } => ErrorKind::NonFinite,
            Self::Rank { .. } => ErrorKind::Rank,
            Self::Core(error) | Self::Step { source: error, .. } => error.kind(),
            Self::Kernel(error) => error.kind(),
        }
    }

    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source }
    }

    /// An [`Error::Data`] for a line of a file.
    pub fn data(path: impl AsRef<Path>, line: impl Into<Option<usize>>, message: impl Into<String>) -> Self {
        Self::Data { path: path.as_ref().to_owned(), line: line.into(), message: message.into() }
    }

    /// An [`Error::Rank`].
    pub fn rank(rank: usize, message: impl Into<String>) -> Self {
        Self::Rank { rank, message: message.into() }
    }

    /// An [`Error::Checkpoint`] for a folder or file.
    pub fn checkpoint(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.as_ref().to_owned(), message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_where() {
        let error = Error::data("train.jsonl", 7, "not JSON");
        assert_eq!(error.to_string(), "train.jsonl:7: not JSON");
        assert_eq!(Error::data("train.jsonl", None, "empty").to_string(), "train.jsonl: empty");
        let problem = |line| Problem { path: Some("a.toml".into()), line, message: "bad".into() };
        assert_eq!(Error::Config(vec![problem(Some(3)), problem(None)]).to_string(), "a.toml:3: bad\na.toml: bad");
    }

    #[test]
    fn an_error_of_a_step_is_of_the_kind_of_its_cause() {
        let cause = || qlora_core::Error::from(qlora_kernels::Error::invalid("attention", "no head"));
        assert_eq!(Error::Step { step: 3, micro_batch: 1, source: cause() }.kind(), ErrorKind::Invalid);
        assert_eq!(Error::from(qlora_core::Error::tensor("lm_head.weight", "is missing")).kind(), ErrorKind::Format);
        assert_eq!(Error::rank(2, "is gone").kind(), ErrorKind::Rank);
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<_> = (0..20).map(|i| format!("t{i}")).collect();
        let text = Error::NoGradient { step: 1, total: 20, names }.to_string();
        assert!(text.ends_with("t7 and 12 more"), "{text}");
    }
}
