//! The errors of the cuDNN path.

/// An error of the cuDNN path. None of them is fatal: the caller falls back to its own attention kernels.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CudnnError {
    /// No usable library was found; the text lists every place that was tried and why it was passed over.
    #[error("cuDNN is not available: {0}")]
    NotAvailable(String),

    /// A library was found but its version must not be used.
    #[error("cuDNN {version} ({path}) is not used: {reason}")]
    Version {
        /// Version as `major.minor.patch`.
        version: String,
        /// Path or name that the library was opened by.
        path: String,
        /// The reason why this version is refused.
        reason: String,
    },

    /// A cuDNN function returned a status other than success.
    #[error("{call} failed with {status} ({name}): {detail}")]
    Call {
        /// The function, and what it was to do, e.g. `cudnnBackendFinalize of the operation graph`.
        call: String,
        /// cuDNN's status number.
        status: i32,
        /// cuDNN's name of the status.
        name: String,
        /// cuDNN's last error string of this thread.
        detail: String,
    },

    /// The shape, the layout or the data type cannot be taken (checked here, before cuDNN is asked).
    #[error("attention through cuDNN: {0}")]
    Unsupported(String),

    /// The self test found results that do not agree with the reference.
    #[error("self test of attention through cuDNN failed: {0}")]
    SelfTest(String),
}

/// Shorthand for results of this module.
pub type Result<T> = std::result::Result<T, CudnnError>;
