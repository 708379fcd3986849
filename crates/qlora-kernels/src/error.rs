//! Errors of the operations.

/// The result of an operation.
pub type Result<T> = std::result::Result<T, Error>;

/// The kind of an error, for programs that act on it. Every error of this project has one (`kind()`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Reading or writing a file or folder failed: it is not there, not allowed, or the disk is full.
    Io,
    /// A file is damaged, or is not what its name says.
    Format,
    /// A configuration or an argument makes no sense.
    Invalid,
    /// A row of a data file is not usable.
    Data,
    /// A model, an option or a device is known but not supported.
    Unsupported,
    /// The Hugging Face hub refused, failed, or cannot be reached.
    Hub,
    /// The memory of a device is used up.
    OutOfMemory,
    /// A device, its driver or a library failed.
    Device,
    /// A checkpoint of a run is damaged, in the way, or of another run.
    Checkpoint,
    /// A loss, a gradient or a weight is NaN or infinite, or there is no gradient where there must be one.
    NonFinite,
    /// Another rank of the run failed or is gone.
    Rank,
    /// Something that fits no other kind, such as an error inside candle.
    Other,
}

impl ErrorKind {
    /// The kind of an error of candle's. One of ours that passed through candle has lost its kind, not its message.
    pub fn of_candle(error: &candle_core::Error) -> Self {
        match error {
            candle_core::Error::Io(_) => Self::Io,
            candle_core::Error::Cuda(_) => Self::Device,
            candle_core::Error::Context { inner, .. }
            | candle_core::Error::WithPath { inner, .. }
            | candle_core::Error::WithBacktrace { inner, .. } => Self::of_candle(inner),
            _ => Self::Other,
        }
    }
}

/// An error of an operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor or view has a shape that the operation cannot use.
    #[error("{op}: {what} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The name of the argument.
        what: &'static str,
        /// The shape it has.
        got: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },

    /// An argument has a value for which the operation is not defined.
    #[error("{op}: {message}")]
    Invalid {
        /// The operation.
        op: &'static str,
        /// A description of the problem, with the value.
        message: String,
    },

    /// The operation has no implementation for the device its arguments are on.
    #[error("{op} has no implementation for {device}; move the tensors to the CPU")]
    Device {
        /// The operation.
        op: &'static str,
        /// The device of the arguments.
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
    #[error("{op}: {what} (CUDA error {code}){}", where_to_look(*code, *last))]
    #[non_exhaustive]
    Cuda {
        /// The operation.
        op: &'static str,
        /// The `cudaError_t`.
        code: i32,
        /// The meaning of the error code.
        what: &'static str,
        /// The operation that this thread enqueued last: kernels run later than they are enqueued, so `op` is only where
        /// a fault showed.
        last: Option<&'static str>,
    },

    /// A file could not be read.
    #[error("{op}: {error}")]
    Io {
        /// The operation.
        op: &'static str,
        /// The operating system's error.
        error: std::io::Error,
    },

    /// candle refused something.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Shape { .. } | Self::Invalid { .. } => ErrorKind::Invalid,
            Self::OutOfMemory { .. } => ErrorKind::OutOfMemory,
            Self::Cuda { .. } => ErrorKind::Device,
            Self::Device { .. } => ErrorKind::Unsupported,
            Self::Io { .. } => ErrorKind::Io,
            Self::Candle(error) => ErrorKind::of_candle(error),
        }
    }

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

/// Advice on finding the kernel behind a fault that shows later than it happens.
fn where_to_look(code: i32, last: Option<&'static str>) -> String {
    // Illegal addresses and instructions, misaligned accesses, time-outs, asserts, launches that failed while running.
    if !matches!(code, 700 | 702 | 710 | 714..=719) {
        return String::new();
    }
    let last = last.map(|last| format!(" (last: {last})")).unwrap_or_default();
    format!(
        ". The fault may be of any operation enqueued before this one{last}: with CUDA_LAUNCH_BLOCKING=1 in the environment \
         the one that fails reports it, and under `compute-sanitizer` the kernel and the address are named"
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_kinds() {
        assert_eq!(Error::invalid("rope", "theta is 0").kind(), ErrorKind::Invalid);
        let io = std::io::Error::from(std::io::ErrorKind::NotFound);
        let candle = candle_core::Error::Io(io).context("reading").with_path("file");
        assert_eq!(Error::from(candle_core::Error::msg("bad")).kind(), ErrorKind::Other);
        assert_eq!(Error::from(candle).kind(), ErrorKind::Io);
    }

    #[test]
    fn faults_that_show_late_say_how_to_find_their_place() {
        let text = |code, last| Error::Cuda { op: "loss", code, what: "a kernel failed", last }.to_string();
        let late = text(719, Some("attention"));
        assert!(
            late.starts_with("loss: a kernel failed (CUDA error 719). The fault may be of any operation"),
            "{late}"
        );
        for part in ["(last: attention)", "CUDA_LAUNCH_BLOCKING=1", "compute-sanitizer"] {
            assert!(late.contains(part), "{late}");
        }
        assert!(!text(700, None).contains("last:"));
        // An error of a launch itself is reported at the operation that failed.
        assert_eq!(text(1, Some("attention")), "loss: a kernel failed (CUDA error 1)");
    }
}
