//! Writes an adapter folder.
//!
//! All files are complete and on the disk under temporary names before the first one gets its own; a folder that does
//! not exist yet appears as a whole.

use super::{CARD_FILE, CONFIG_FILE, HEAD_TENSOR, TRAINED_OVER_FILE, TrainedOver, WEIGHTS_FILE, card, config_file};
use crate::atomic::{PendingFile, cannot_write, replace_directory};
use crate::companions::Companions;
use crate::formats::safetensors::write_safetensors;
use crate::lora::{AdapterLayout, Bias, Entry, LoraConfig, Which};
use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::View;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// The dtype of an adapter's tensors on disk. Training holds them in f32; PEFT's default is F32 too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterDtype {
    /// 32-bit: keeps what was trained.
    #[default]
    F32,
    /// 16-bit with a small range; a number that does not fit is an error.
    F16,
    /// 16-bit with f32's range.
    BF16,
}

impl AdapterDtype {
    fn safetensors(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
        }
    }

    fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Whether the number is finite on disk.
    pub(super) fn holds(self, value: f32) -> bool {
        match self {
            Self::F32 => value.is_finite(),
            Self::F16 => f16::from_f32(value).is_finite(),
            Self::BF16 => bf16::from_f32(value).is_finite(),
        }
    }
}

/// Options of saving an adapter.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// The tensors' dtype.
    pub dtype: AdapterDtype,
    /// The hub id or the path of the base model; PEFT's `AutoPeftModel` finds the base by it.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision.
    pub revision: Option<String>,
    /// The quantization of the base during training, which is written beside the adapter; merging reads it.
    pub trained_over: Option<TrainedOver>,
    /// The files that belong to the trained model, saved beside the adapter: tokenizer, chat template, end tokens. TRL
    /// saves them there, too.
    pub companions: Companions,
    /// Whether to write a model card. A `README.md` that is not one of ours is never replaced.
    pub model_card: bool,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self {
            dtype: AdapterDtype::F32,
            base_model_name_or_path: None,
            revision: None,
            trained_over: None,
            companions: Companions::default(),
            model_card: true,
        }
    }
}

/// Writes the adapter whose numbers are `flat`, in the layout `layout`, to the folder `dir`, which is made if it does
/// not exist. Files of the same names are replaced, others stay.
///
/// # Errors
/// If options, layout and buffer do not belong together, if a number is not finite (or does not fit the dtype), or if
/// the folder cannot be written. Nothing half-written is left.
pub fn save(
    dir: impl AsRef<Path>,
    config: &LoraConfig,
    layout: &AdapterLayout,
    flat: &[f32],
    options: &SaveOptions,
) -> Result<()> {
    let dir = dir.as_ref();
    check(config, layout, flat, options.dtype)?;
    if dir.is_dir() {
        return write_files(dir, config, layout, flat, options);
    }
    if dir.exists() {
        let error = std::io::Error::new(std::io::ErrorKind::NotADirectory, "is a file, not a folder");
        return Err(cannot_write(dir, error));
    }
    replace_directory(dir, |temporary| write_files(temporary, config, layout, flat, options))
}

fn check(config: &LoraConfig, layout: &AdapterLayout, flat: &[f32], dtype: AdapterDtype) -> Result<()> {
    config.validate()?;
    if flat.len() != layout.len() {
        return Err(Error::Invalid(format!("{} adapter values for a layout of {}", flat.len(), layout.len())));
    }
    for module in layout.modules() {
        let rank = layout.get(module).map_or(0, |pair| pair.rank());
        let kind = layout.get(module).is_some_and(|pair| pair.magnitude.is_some() == config.use_dora);
        if !config.targets(module) || rank != config.rank_of(module) || !kind {
            return Err(Error::Invalid(format!(
                "the adapter of {module} with rank {rank} does not belong to these options (r = {}, use_dora = {})",
                config.rank_of(module),
                config.use_dora
            )));
        }
    }
    for entry in layout.tables() {
        let asked = match entry.which {
            Which::TokenRows => {
                config.trainable_token_indices.of(&entry.module).is_some_and(|ids| ids.len() == entry.rows)
            }
            _ => config.modules_to_save.iter().any(|end| entry.module.ends_with(end.as_str())),
        };
        if !asked {
            let message = format!("{} rows do not belong to these options", entry.rows);
            return Err(Error::tensor(entry.tensor_name(), message));
        }
    }
    if let Some(entry) = layout.biases().find(|_| config.bias == Bias::None) {
        let message = "bias = \"none\": the layout has one";
        return Err(Error::tensor(entry.tensor_name(), message));
    }
    let tables = layout.tables().count();
    if (config.trainable_token_indices.is_empty() && config.modules_to_save.is_empty()) != (tables == 0) {
        let message = "trainable_token_indices and modules_to_save do not belong to the layout";
        return Err(Error::Invalid(message.to_owned()));
    }
    let Some(index) = flat.iter().position(|&value| !dtype.holds(value)) else { return Ok(()) };
    let name = layout.entry_at(index).map_or_else(|| format!("value {index}"), Entry::tensor_name);
    let value = flat[index];
    Err(Error::tensor(
        name,
        if value.is_finite() {
            format!("{value} does not fit {dtype:?}; save as BF16 or F32")
        } else {
            format!("holds {value}; the adapter is broken and is not saved")
        },
    ))
}

fn write_files(
    dir: &Path,
    config: &LoraConfig,
    layout: &AdapterLayout,
    flat: &[f32],
    options: &SaveOptions,
) -> Result<()> {
    let mut files = vec![PendingFile::create(dir.join(WEIGHTS_FILE))?, PendingFile::create(dir.join(CONFIG_FILE))?];
    let stored = |entry: &Entry| Matrix { shape: entry.shape(), data: &flat[entry.range()], dtype: options.dtype };
    let mut tensors: Vec<_> = layout.entries().iter().map(|entry| (entry.tensor_name(), stored(entry))).collect();
    // PEFT wants it for the head once more.
    tensors.extend(layout.followed_by_head(config).map(|entry| (HEAD_TENSOR.to_owned(), stored(entry))));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    files[0].write_with(|writer| write_safetensors(writer, tensors, Some(metadata)))?;
    let json = config_file::to_json(config, layout, options)?;
    files[1].write_with(|writer| writer.write_all(json.as_bytes()))?;
    if let Some(over) = &options.trained_over {
        let mut file = PendingFile::create(dir.join(TRAINED_OVER_FILE))?;
        file.write_with(|writer| writer.write_all(over.to_json().as_bytes()))?;
        files.push(file);
    }
    let card = dir.join(CARD_FILE);
    if options.model_card && fs::read_to_string(&card).map_or(!card.exists(), |text| card::is_ours(&text)) {
        let mut file = PendingFile::create(&card)?;
        file.write_with(|writer| writer.write_all(card::text(config, layout, options).as_bytes()))?;
        files.push(file);
    }
    files.extend(options.companions.pending(dir)?);
    for file in &mut files {
        file.sync()?;
    }
    files.into_iter().try_for_each(PendingFile::commit)
}

/// A tensor of the flat buffer in the form it has on disk.
struct Matrix<'a> {
    shape: Vec<usize>,
    data: &'a [f32],
    dtype: AdapterDtype,
}

impl View for Matrix<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype.safetensors()
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        match self.dtype {
            AdapterDtype::F32 => self.data.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes())),
            AdapterDtype::F16 => {
                self.data.iter().for_each(|&value| bytes.extend_from_slice(&f16::from_f32(value).to_le_bytes()));
            }
            AdapterDtype::BF16 => {
                self.data.iter().for_each(|&value| bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes()));
            }
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.data.len() * self.dtype.bytes()
    }
}
