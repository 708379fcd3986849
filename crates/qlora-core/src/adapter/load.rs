//! Reads an adapter folder, strictly.

use super::config_file::{self, AdapterConfig};
use super::keys::{AdapterFile, foreign_prefix, wrong_shape};
use super::kinds::AdapterKinds;
use super::weights::Weights;
use super::{CONFIG_FILE, HEAD_TENSOR};
use crate::config::ModelConfig;
use crate::lora::{AdapterLayout, Entry, LoraConfig, ModuleFilter, TargetModules};
use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::Dtype;
use std::fs;
use std::io;
use std::path::Path;

/// An adapter from disk.
#[derive(Clone, Debug)]
pub struct SavedAdapter {
    /// Its options, and the base model that it names.
    pub config: AdapterConfig,
    /// The places of the factors in `weights`.
    pub layout: AdapterLayout,
    /// All A and B, in f32.
    pub weights: Vec<f32>,
}

/// Reads the adapter in the folder `dir` for `model`.
///
/// # Errors
/// If a file is missing or broken, if an option is not supported, or if the tensors are not exactly those that the
/// options give for this model, in F32, F16 or BF16, with the right shapes and finite numbers.
pub fn load(dir: impl AsRef<Path>, model: &ModelConfig) -> Result<SavedAdapter> {
    let dir = dir.as_ref();
    let config = read_config(dir)?;
    let (path, weights) = Weights::open(dir)?;
    assemble(&path, config, &weights, model)
}

/// The adapter of these options and this tensor file; `path`, of a file in the adapter's folder, is for messages.
pub(super) fn assemble(
    path: &Path,
    mut config: AdapterConfig,
    file: &[u8],
    model: &ModelConfig,
) -> Result<SavedAdapter> {
    let dir = path.parent().unwrap_or(path);
    drop_unmatched(&mut config.lora, model, dir);
    // On a model whose tables are two it has no effect.
    config.lora.ensure_weight_tying &= model.tie_word_embeddings;
    let layout = AdapterLayout::for_model(&config.lora, model).map_err(|error| prefixed(dir, error))?;
    let mut weights = vec![0.0; layout.len()];
    fill(path, file, &config.lora, &layout, &mut weights)?;
    Ok(SavedAdapter { config, layout, weights })
}

/// Reads the adapter in the folder `dir` into the buffer of a model that is being trained, to go on from it. The target
/// modules may be written differently as long as they select the same layers.
///
/// # Errors
/// Those of [`load`], and if rank or scaling are not those of `config`. The buffer is then unchanged.
///
/// # Panics
/// If the buffer's length is not the layout's.
pub fn load_into(dir: impl AsRef<Path>, config: &LoraConfig, layout: &AdapterLayout, flat: &mut [f32]) -> Result<()> {
    assert_eq!(flat.len(), layout.len(), "the buffer does not have the layout's length");
    let dir = dir.as_ref();
    let saved = read_config(dir)?.lora;
    let patterns = |of: &LoraConfig| (of.rank_pattern.clone(), of.alpha_pattern.clone());
    let same = (saved.r, saved.scaling(), saved.use_dora) == (config.r, config.scaling(), config.use_dora);
    if saved.trainable_token_indices != config.trainable_token_indices {
        let message = "the adapter's trainable_token_indices are not this run's";
        return Err(Error::format(dir.join(CONFIG_FILE), message));
    }
    if !same || patterns(&saved) != patterns(config) {
        let text = |of: &LoraConfig| {
            format!(
                "r = {}, lora_alpha = {}, use_rslora = {}, use_dora = {}",
                of.r, of.lora_alpha, of.use_rslora, of.use_dora
            )
        };
        return Err(Error::format(
            dir.join(CONFIG_FILE),
            format!("the adapter has {}, but this run has {}", text(&saved), text(config)),
        ));
    }
    let (path, weights) = Weights::open(dir)?;
    fill(&path, &weights, config, layout, flat)
}

/// Reads the options of the adapter in the folder `dir`, and which base model it names, for training; [`read_any_config`] reads
/// those of every kind.
///
/// # Errors
/// If the file is missing or broken, or if an option is not supported.
pub fn read_config(dir: impl AsRef<Path>) -> Result<AdapterConfig> {
    let path = dir.as_ref().join(CONFIG_FILE);
    config_file::parse(&path, &read_file(&path)?)
}

/// [`read_config`] of an adapter of any kind, with its parts besides layers with adapters.
///
/// # Errors
/// As there.
pub fn read_any_config(dir: impl AsRef<Path>) -> Result<(AdapterConfig, AdapterKinds)> {
    let path = dir.as_ref().join(CONFIG_FILE);
    config_file::parse_any(&path, &read_file(&path)?)
}

/// PEFT takes lists of which some entries match nothing, and publishes adapters with them. The check of the tensors'
/// names says whether anything is missing, so such entries are only dropped.
fn drop_unmatched(config: &mut LoraConfig, model: &ModelConfig, dir: &Path) {
    let unmatched: Vec<String> = config.unmatched(model).into_iter().map(str::to_owned).collect();
    if unmatched.is_empty() {
        return;
    }
    if let TargetModules::Selected(ModuleFilter::List(entries)) = &mut config.target_modules
        && unmatched.len() < entries.len()
    {
        tracing::warn!("{}: target_modules {unmatched:?} match no module of this model", dir.display());
        entries.retain(|entry| !unmatched.contains(entry));
    }
}

fn prefixed(dir: &Path, error: Error) -> Error {
    let path = dir.join(CONFIG_FILE);
    match error {
        Error::Unsupported(message) => Error::Unsupported(format!("{}: {message}", path.display())),
        other => Error::format(path, other.to_string()),
    }
}

pub(super) fn read_file(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| missing(path, error))
}

/// The error for a file that could not be opened.
pub(super) fn missing(path: &Path, error: io::Error) -> Error {
    if error.kind() != io::ErrorKind::NotFound {
        return Error::io(path, error);
    }
    let hint =
        "not found; an adapter folder holds adapter_config.json and adapter_model.safetensors (or adapter_model.bin)";
    Error::io(path, io::Error::new(io::ErrorKind::NotFound, hint))
}

/// Fills `flat` from the bytes of the tensor file at `path`; unchanged if anything is wrong.
fn fill(path: &Path, bytes: &[u8], config: &LoraConfig, layout: &AdapterLayout, flat: &mut [f32]) -> Result<()> {
    let file = AdapterFile::parse(path, bytes)?;
    check_names(path, &file, layout, layout.followed_by_head(config))?;
    for entry in layout.entries() {
        let values = Values::of(path, &file, entry)?;
        if let Some(index) = (0..entry.numel()).find(|&i| !values.get(i).is_finite()) {
            let (row, column) = (index / entry.cols, index % entry.cols);
            return Err(in_file(path, entry, format!("holds {} at row {row}, column {column}", values.get(index))));
        }
    }
    for entry in layout.entries() {
        let values = Values::of(path, &file, entry)?;
        flat[entry.range()].iter_mut().enumerate().for_each(|(i, value)| *value = values.get(i));
    }
    Ok(())
}

/// With `follows`, the file may hold the embedding's table once more, as the head's.
fn check_names(path: &Path, file: &AdapterFile, layout: &AdapterLayout, follows: Option<&Entry>) -> Result<()> {
    let expected: std::collections::BTreeSet<String> = layout.entries().iter().map(Entry::tensor_name).collect();
    let allowed = |name: &str| follows.is_some() && name == HEAD_TENSOR;
    let unexpected: Vec<&str> = file
        .names()
        .filter(|name| !expected.contains(*name) && !allowed(name))
        .map(|name| file.stored_name(name))
        .collect();
    let missing: Vec<&str> = expected.iter().map(String::as_str).filter(|name| file.tensor(name).is_none()).collect();
    if missing.is_empty() && unexpected.is_empty() {
        return Ok(());
    }
    Err(difference(path, &missing, &unexpected, expected.len()))
}

/// The error for a file whose tensors are not the expected ones.
pub(super) fn difference(path: &Path, missing: &[&str], unexpected: &[&str], expected: usize) -> Error {
    let mut parts = Vec::new();
    for (what, names) in [("missing", missing), ("unexpected", unexpected)] {
        if !names.is_empty() {
            let more = if names.len() > 8 { format!(" and {} more", names.len() - 8) } else { String::new() };
            parts.push(format!("{} {what} tensors: {}{more}", names.len(), names[..names.len().min(8)].join(", ")));
        }
    }
    let table = |name: &&str| name.ends_with("embed_tokens.weight") || name.ends_with("lm_head.weight");
    let hint = if let Some(prefix) = foreign_prefix(unexpected) {
        format!(
            "; the unexpected ones begin with {prefix:?} where PEFT's for this model begin with \"base_model.model.\": the adapter was \
             saved of another class or through a wrapper. Save it again with PEFT's save_pretrained of the model alone, or rename \
             its tensors"
        )
    } else if missing.is_empty() && unexpected.iter().all(table) {
        "; the adapter was saved with the base's tables, as PEFT does after the vocabulary was resized: merge it into its base, and \
         train on from the merged model"
            .to_owned()
    } else if missing.len() == expected {
        " (was it made for another model?)".to_owned()
    } else {
        String::new()
    };
    Error::format(
        path,
        format!("the tensors are not those of adapter_config.json and the model: {}{hint}", parts.join("; ")),
    )
}

fn in_file(path: &Path, entry: &Entry, message: String) -> Error {
    Error::tensor(entry.tensor_name(), format!("{message} (in {})", path.display()))
}

/// A tensor's numbers as they lie in the file.
struct Values<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
}

impl<'a> Values<'a> {
    fn of(path: &Path, file: &AdapterFile<'a>, entry: &Entry) -> Result<Self> {
        let tensor = file.tensor(&entry.tensor_name());
        let tensor = tensor.ok_or_else(|| in_file(path, entry, "is missing".to_owned()))?;
        let (shape, expected) = (tensor.shape(), entry.shape());
        if shape != expected {
            return Err(in_file(path, entry, wrong_shape(shape, &expected)));
        }
        let dtype = tensor.dtype();
        if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(in_file(path, entry, format!("has dtype {dtype:?}; adapters are F32, F16 or BF16")));
        }
        Ok(Self { dtype, bytes: tensor.data() })
    }

    fn get(&self, i: usize) -> f32 {
        let two = || [self.bytes[2 * i], self.bytes[2 * i + 1]];
        match self.dtype {
            Dtype::F16 => f16::from_le_bytes(two()).to_f32(),
            Dtype::BF16 => bf16::from_le_bytes(two()).to_f32(),
            _ => f32::from_le_bytes([0, 1, 2, 3].map(|k| self.bytes[4 * i + k])),
        }
    }
}
