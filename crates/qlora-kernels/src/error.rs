//! What an operation can refuse.

/// The result of an operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation did not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor or view has a shape that the operation cannot use.
    #[error("{op}: {what} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Which argument.
        what: &'static str,
        /// The shape it has.
        got: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },

    /// An argument has a value outside what the operation is defined for.
    #[error("{op}: {message}")]
    Invalid {
        /// The operation.
        op: &'static str,
        /// What is wrong, with the value.
        message: String,
    },

    /// The operation has no implementation for the device its arguments are on.
    #[error("{op} has no implementation for {device}; move the tensors to the CPU")]
    Device {
        /// The operation.
        op: &'static str,
        /// Where the arguments are.
        device: String,
    },

    /// candle refused something.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// An [`Error::Invalid`] for `op`.
    pub fn invalid(op: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { op, message: message.into() }
    }

    /// Checks a shape; the error names `op`, `what` and both shapes.
    pub fn check_shape(op: &'static str, what: &'static str, got: &[usize], expected: &[usize]) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        Err(Self::Shape { op, what, got: got.to_vec(), expected: expected.to_vec() })
    }
}

/// So that operations can be used inside candle custom ops.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}
