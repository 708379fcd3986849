//! GGUF metadata as an architecture reads and writes it, apart from how a file stores it.

/// The reason why metadata is refused; the reader of the file adds its path.
#[derive(Debug)]
pub(crate) enum Problem {
    /// The file is wrong.
    Format(String),
    /// The file asks for something that is not supported.
    Unsupported(String),
}

impl From<String> for Problem {
    fn from(message: String) -> Self {
        Self::Format(message)
    }
}

/// The metadata of an architecture. Keys are given without the architecture's prefix.
pub(crate) trait Metadata {
    /// The key as the file has it, for messages: `llama.block_count`.
    fn key(&self, key: &str) -> String;

    /// # Errors
    /// If the value is no number.
    fn f64(&self, key: &str) -> Result<Option<f64>, String>;
}

/// A number to be written; its key is without the architecture's prefix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value {
    U32(&'static str, u32),
    F32(&'static str, f32),
}
