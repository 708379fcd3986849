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

    /// A GPU has not enough memory left.
    #[error("{}", out_of_memory(op, *requested, *used, *available, *limit))]
    OutOfMemory {
        /// The operation.
        op: &'static str,
        /// Bytes it asked for.
        requested: u64,
        /// Bytes in use.
        used: u64,
        /// Bytes that could still be had.
        available: u64,
        /// The limit that was set, if one was.
        limit: Option<u64>,
    },

    /// The CUDA driver or a kernel failed.
    #[error("{op}: {what} (CUDA error {code})")]
    Cuda {
        /// The operation.
        op: &'static str,
        /// The `cudaError_t`.
        code: i32,
        /// What it means.
        what: &'static str,
    },

    /// A file could not be read.
    #[error("{op}: {error}")]
    Io {
        /// The operation.
        op: &'static str,
        /// What the operating system says.
        error: std::io::Error,
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

fn out_of_memory(op: &str, requested: u64, used: u64, available: u64, limit: Option<u64>) -> String {
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let limit = limit.map(|limit| format!(" of the {:.2} GB that were allowed", gb(limit))).unwrap_or_default();
    format!(
        "{op}: the GPU has no memory left for {:.3} GB more: {:.2} GB are in use{limit}, {:.2} GB are free, other programs' \
         memory aside. Use shorter sequences, a smaller batch (with more gradient accumulation), gradient checkpointing, \
         or a smaller memory budget for the plan",
        gb(requested),
        gb(used),
        gb(available)
    )
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
