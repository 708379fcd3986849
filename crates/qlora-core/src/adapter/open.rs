//! From what a user writes for an adapter (a folder or a hub id) to the adapter.

use std::path::{Path, PathBuf};

use super::peft::{PeftAdapter, open_folder};
use crate::config::ModelConfig;
use crate::open::OpenOptions;
use crate::{Error, Result};

/// Opens an adapter of any kind of PEFT's LoRA for `model`: by the path of a folder, or by a hub id `org/name`. `subfolder` names
/// a folder in either. Revision, token, cache and offline mode are those of [`OpenOptions`]. A path that exists is taken as such.
///
/// # Errors
/// Those of [`open_folder`]; also if there is neither such a folder nor such a repository, or it cannot be downloaded.
pub fn open(spec: &str, subfolder: Option<&str>, options: &OpenOptions, model: &ModelConfig) -> Result<PeftAdapter> {
    open_folder(locate(spec, subfolder, options)?, model)
}

/// The folder of an adapter that is given as to [`open`], downloaded if need be. Beside the adapter it may hold the tokenizer and the
/// chat template that it was trained with: [`OpenOptions::adapter`].
///
/// # Errors
/// If there is neither such a folder nor such a repository, or it cannot be downloaded.
pub fn locate(spec: &str, subfolder: Option<&str>, options: &OpenOptions) -> Result<PathBuf> {
    let path = Path::new(spec);
    if path.is_dir() {
        return Ok(subfolder.map_or_else(|| path.to_owned(), |folder| path.join(folder)));
    }
    if path.exists() {
        return Err(Error::format(path, "an adapter is a folder with adapter_config.json, or a hub id"));
    }
    let part = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(plain)
    };
    let is_id = spec.split_once('/').is_some_and(|(organisation, name)| part(organisation) && part(name));
    if !is_id {
        return Err(Error::Invalid(format!(
            "{spec:?}: no such folder. An adapter is the path of a folder or a hub id such as org/name"
        )));
    }
    from_hub(spec, subfolder, options)
}

#[cfg(feature = "hub")]
fn from_hub(id: &str, subfolder: Option<&str>, options: &OpenOptions) -> Result<PathBuf> {
    Ok(crate::hub::adapter_snapshot(id, subfolder, options)?.folder)
}

#[cfg(not(feature = "hub"))]
fn from_hub(id: &str, _: Option<&str>, _: &OpenOptions) -> Result<PathBuf> {
    Err(Error::Unsupported(format!(
        "{id} as a hub id: this build has no access to the hub (feature `hub`), and there is no such folder"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_adapter_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("adapter_model.safetensors");
        std::fs::write(&file, "").unwrap();
        let model = crate::lora::tiny_model(1);
        let error = |spec: &str| open(spec, None, &OpenOptions::default(), &model).unwrap_err().to_string();
        assert!(error(file.to_str().unwrap()).contains("an adapter is a folder"));
        assert!(error(folder.path().to_str().unwrap()).contains("adapter_config.json"));
        for spec in ["nowhere", "./a/b", "a/b/c", "../x", "a/.."] {
            assert!(error(spec).contains("no such folder"), "{spec}");
        }
    }
}
