//! Errors of loading, building and running a model.

use std::path::{Path, PathBuf};

pub use qlora_kernels::ErrorKind;

/// The result of anything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this crate. Messages name the file, tensor or layer, and say what to do where that is known.
///
/// A message is whole: it holds what the operating system or another crate said, which therefore is no
/// [`source`](std::error::Error::source) too. A printed chain of errors (as by anyhow) repeats nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        r#source: std::io::Error,
    },

    /// A file violates its format.
    #[error("{path}: {message}")]
    Format {
        /// The file.
        path: PathBuf,
        /// A description of the problem, and its place in the file.
        message: String,
    },

    /// A tensor is missing, superfluous or has the wrong shape, dtype or values.
    #[error("tensor {name}: {message}")]
    Tensor {
        /// The tensor's name in its file.
        name: String,
        /// A description of the problem.
        message: String,
    },

    /// The model or the option is known but not supported.
    #[error("not supported: {0}")]
    Unsupported(String),

    /// The Hugging Face hub refused or failed, or cannot be reached.
    #[error("{subject}: {message}")]
    Hub {
        /// The repository, or the file of it.
        subject: String,
        /// A description of the problem, with advice.
        message: String,
    },

    /// An argument or a configuration makes no sense.
    #[error("{0}")]
    Invalid(String),

    /// An operation failed.
    #[error(transparent)]
    Kernel(#[from] qlora_kernels::Error),

    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. } => ErrorKind::Io,
            Self::Format { .. } | Self::Tensor { .. } => ErrorKind::Format,
            Self::Unsupported(_) => ErrorKind::Unsupported,
            Self::Hub { .. } => ErrorKind::Hub,
            Self::Invalid(_) => ErrorKind::Invalid,
            Self::Kernel(error) => error.kind(),
            Self::Candle(error) => ErrorKind::of_candle(error),
        }
    }

    /// An [`Error::Hub`] about a repository or a file of one.
    #[cfg(feature = "hub")]
    pub(crate) fn hub(subject: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Hub { subject: subject.into(), message: message.into() }
    }

    /// An [`Error::Io`] for `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source }
    }

    /// An [`Error::Format`] for `path`.
    pub fn format(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::Format { path: path.as_ref().to_owned(), message: message.into() }
    }

    /// An [`Error::Tensor`] for `name`.
    pub fn tensor(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), message: message.into() }
    }
}

/// So that core functions can be used inside candle custom ops and modules.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            Error::Kernel(inner) => inner.into(),
            other => candle_core::Error::wrap(other),
        }
    }
}
