//! The file with an adapter's tensors: safetensors, or where there is none the pickle that PEFT wrote before 0.6.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use qlora_kernels::mapped::MappedFile;

use super::WEIGHTS_FILE;
use super::load::missing;
use crate::formats::pickle;
use crate::{Error, Result};

/// The name of the file with the tensors in old adapters.
pub(crate) const PICKLE_FILE: &str = "adapter_model.bin";

/// The bytes of a safetensors file.
pub(super) enum Weights {
    Mapped(MappedFile),
    Converted(Vec<u8>),
}

impl Weights {
    /// Opens the tensor file of the adapter in `dir`; a pickle is converted. Also returns its path.
    ///
    /// # Errors
    /// If there is none, or the pickle is damaged or holds more than tensors.
    pub(super) fn open(dir: &Path) -> Result<(PathBuf, Self)> {
        let path = path(dir);
        let file = MappedFile::open(&path).map_err(|error| missing(&path, error))?;
        if !path.ends_with(PICKLE_FILE) {
            return Ok((path, Self::Mapped(file)));
        }
        match pickle::to_safetensors(&file) {
            Ok(bytes) => Ok((path, Self::Converted(bytes))),
            Err(message) => Err(Error::format(path, message)),
        }
    }
}

impl Deref for Weights {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => file,
            Self::Converted(bytes) => bytes,
        }
    }
}

/// The tensor file of the adapter in `dir`: PEFT's current name, unless only the old one is there.
fn path(dir: &Path) -> PathBuf {
    let [current, old] = [WEIGHTS_FILE, PICKLE_FILE].map(|name| dir.join(name));
    if !current.exists() && old.exists() { old } else { current }
}
