//! One error for programs that use the library.

use qlora_core::ErrorKind;

/// The result of a program that uses the library.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of any part of the library, which `?` makes of each part's own.
///
/// ```
/// fn open(model: &str) -> qlora::Result<qlora::open::ModelFiles> {
///     Ok(qlora::open::open_model(model, &Default::default())?)
/// }
///
/// let error = open("./no-such-folder").unwrap_err();
/// match error.kind() {
///     qlora::ErrorKind::Hub => println!("try again later: {error}"),
///     qlora::ErrorKind::OutOfMemory => println!("take shorter sequences: {error}"),
///     _ => println!("{error}"),
/// }
/// ```
///
/// The parts' own errors say more ([`qlora_kernels::Error`], [`qlora_core::Error`], [`qlora_trainer::Error`]): a program that wants the
/// tensor's name or the rank matches the variant.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Of configuration, data, checkpoints and training.
    #[error(transparent)]
    Trainer(#[from] qlora_trainer::Error),
    /// Of loading, building and running a model.
    #[error(transparent)]
    Core(#[from] qlora_core::Error),
    /// Of an operation.
    #[error(transparent)]
    Kernel(#[from] qlora_kernels::Error),
    /// Of candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Trainer(error) => error.kind(),
            Self::Core(error) => error.kind(),
            Self::Kernel(error) => error.kind(),
            Self::Candle(error) => ErrorKind::of_candle(error),
        }
    }
}
