//! A model folder as `save_pretrained` writes it: `config.json`, `model.safetensors` or shards with their index, and the
//! model's companions.
//!
//! One tensor is in memory at a time. The folder is filled under a temporary name and appears whole.

use std::fs;
use std::path::Path;

use serde_json::{Map, json};

use super::source::dtype_of;
use crate::atomic::replace_directory;
use crate::companions::Companions;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::formats::hf::{INDEX, SINGLE};
use crate::formats::safetensors::{SafetensorsStream, disk};
use crate::source::WeightSource;
use crate::spec::Module;

/// Options of writing a model folder.
#[derive(Clone, Debug)]
pub struct FolderOptions {
    /// The text of the base's `config.json`, of which everything is kept that merging does not change. None: it is
    /// written from the model's configuration.
    pub config_json: Option<String>,
    /// A weight file is closed before it would become larger than this many bytes; a single tensor may be larger.
    pub max_shard_bytes: u64,
}

impl Default for FolderOptions {
    fn default() -> Self {
        Self { config_json: None, max_shard_bytes: 5_000_000_000 }
    }
}

/// The size of a written model folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WrittenFolder {
    /// Bytes of all weight files.
    pub bytes: u64,
    /// The number of weight files.
    pub shards: usize,
}

/// Writes the weights of `source` and what belongs to them into the folder `out`, which must not exist yet. `progress` is
/// called with the number of tensors done and their total.
///
/// # Errors
/// If a tensor cannot be read, the folder exists, or the disk is full or fails; nothing is left in that case.
pub fn write_folder(
    source: &dyn WeightSource,
    companions: &Companions,
    out: &Path,
    options: &FolderOptions,
    mut progress: impl FnMut(usize, usize),
) -> Result<WrittenFolder> {
    if out.exists() {
        return Err(Error::format(out, "exists already; choose another folder or delete it"));
    }
    // Problems of the configuration are reported before the weights are written.
    config_json(options.config_json.as_deref(), source.config(), "float32")?;
    replace_directory(out, |folder| {
        // The order of the model, as transformers writes it.
        let spec = source.config().spec();
        let names: Vec<String> = spec.tensors().map(|tensor| tensor.name).collect();
        // Its precision is that of the model.
        let first_linear = spec.linear().next().map(Module::weight_name);
        check_space(source, folder, out)?;
        let mut writer = Shards::new(folder, options.max_shard_bytes);
        let mut dtype = "float32";
        for (index, name) in names.iter().enumerate() {
            let tensor = source.read(name)?;
            if Some(name) == first_linear.as_ref() {
                dtype = dtype_of(&tensor.data).name();
            }
            writer.tensor(&names[index..], &tensor)?;
            progress(index + 1, names.len());
        }
        let written = writer.finish()?;
        companions.write(folder)?;
        let path = folder.join("config.json");
        let config = config_json(options.config_json.as_deref(), source.config(), dtype)?;
        fs::write(&path, config).map_err(|error| disk(&path, error))?;
        Ok(written)
    })
}

/// The merged model's `config.json`: the base's without its quantization, with what merging can change.
fn config_json(original: Option<&str>, config: &ModelConfig, dtype: &str) -> Result<String> {
    let mut map = config.rewrite(original)?;
    let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    map.insert(key.to_owned(), json!(dtype));
    serde_json::to_string_pretty(&map).map_err(|error| Error::Invalid(format!("config.json: {error}")))
}

/// Says that a disk is too small before the first tensor is read. The elements are counted with 16 bits.
fn check_space(source: &dyn WeightSource, folder: &Path, out: &Path) -> Result<()> {
    let elements: usize =
        source.names().iter().filter_map(|name| source.shape(name)).map(|s| s.iter().product::<usize>()).sum();
    require_space(folder, out, 2 * elements as u64)
}

/// An error if the disk of `folder` has fewer free bytes than needed; `out` is for the message.
pub(crate) fn require_space(folder: &Path, out: &Path, needed: u64) -> Result<()> {
    let Some(free) = crate::platform::free_space(folder) else { return Ok(()) };
    if free >= needed {
        return Ok(());
    }
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let message = format!(
        "the disk has {:.2} GB free, at least {:.2} GB are needed: free some space or choose another disk",
        gb(free),
        gb(needed)
    );
    Err(Error::io(out, std::io::Error::new(std::io::ErrorKind::StorageFull, message)))
}

/// Weight files of a limited size. How many there are is known at the end; until then they have numbers only.
struct Shards<'a> {
    folder: &'a Path,
    limit: u64,
    current: Option<SafetensorsStream>,
    /// The tensors of each file that is complete.
    done: Vec<Vec<String>>,
    bytes: u64,
    data_bytes: u64,
}

impl<'a> Shards<'a> {
    fn new(folder: &'a Path, limit: u64) -> Self {
        Self { folder, limit, current: None, done: Vec::new(), bytes: 0, data_bytes: 0 }
    }

    fn unnamed(&self, index: usize) -> std::path::PathBuf {
        self.folder.join(format!("{index}.safetensors"))
    }

    /// Writes the first of `names`, those that are still to come.
    fn tensor(&mut self, names: &[String], tensor: &crate::source::PlainTensor) -> Result<()> {
        let Some(name) = names.first() else { return Ok(()) };
        let bytes = (tensor.data.len() * dtype_of(&tensor.data).size()) as u64;
        if self.current.as_ref().is_some_and(|file| !file.is_empty() && file.len() + bytes > self.limit) {
            self.close()?;
        }
        if self.current.is_none() {
            let path = self.unnamed(self.done.len());
            self.current = Some(SafetensorsStream::create(&path, names.iter().map(String::as_str))?);
        }
        self.data_bytes += bytes;
        self.current.as_mut().map_or(Ok(()), |file| file.tensor(name, tensor))
    }

    fn close(&mut self) -> Result<()> {
        if let Some(file) = self.current.take() {
            self.done.push(file.names().map(str::to_owned).collect());
            self.bytes += file.finish()?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<WrittenFolder> {
        self.close()?;
        let count = self.done.len();
        let written = WrittenFolder { bytes: self.bytes, shards: count };
        let rename = |index: usize, name: &str| {
            let path = self.folder.join(name);
            fs::rename(self.unnamed(index), &path).map_err(|error| Error::io(&path, error))
        };
        if count == 1 {
            rename(0, SINGLE)?;
            return Ok(written);
        }
        let mut map = Map::new();
        for (index, names) in self.done.iter().enumerate() {
            let file = format!("model-{:05}-of-{count:05}.safetensors", index + 1);
            rename(index, &file)?;
            map.extend(names.iter().map(|name| (name.clone(), json!(file))));
        }
        map.sort_keys();
        let index = json!({"metadata": {"total_size": self.data_bytes}, "weight_map": map});
        let path = self.folder.join(INDEX);
        fs::write(&path, format!("{index:#}\n")).map_err(|error| disk(&path, error))?;
        Ok(written)
    }
}
