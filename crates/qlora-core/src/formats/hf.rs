//! A folder as `save_pretrained` writes it: `config.json` with `model.safetensors`, or with shards and their index; where it has
//! neither, with the pickles of older versions, `pytorch_model.bin`.

mod leftovers;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use super::packed::{self, Packed, Raw};
use super::safetensors::shard::{Shard, unsupported_dtype};
use crate::config::{ModelConfig, StoredQuantization};
use crate::error::{Error, Result};
use crate::file::{self, LARGE, SMALL};
use crate::source::{PlainTensor, SourceWeight, StoredTensor, WeightSource, check_tensors, ignorable, unknown_tensor};
use crate::spec::HEAD_WEIGHT as HEAD;

/// The one file of a model that is not sharded.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The same of pickles.
pub(crate) const SINGLE_PICKLE: &str = "pytorch_model.bin";
/// The same of pickles.
pub(crate) const INDEX_OF_PICKLES: &str = "pytorch_model.bin.index.json";

/// A model folder in Hugging Face's layout, in bf16, f16 or f32, or quantized by one of the methods of
/// [`StoredQuantization`].
#[derive(Debug)]
pub struct HfDirectory {
    folder: PathBuf,
    config: ModelConfig,
    shards: Vec<Shard>,
    // Plain tensors: name to the index in `shards`, without what no model needs.
    tensors: BTreeMap<String, usize>,
    quantization: Option<StoredQuantization>,
    // The linear layers that are stored quantized, by the names that their weights would have.
    packed: BTreeMap<String, Packed>,
    // The tensors that the quantized layers consist of.
    parts: BTreeMap<String, usize>,
    remarks: Vec<String>,
}

impl HfDirectory {
    /// Reads the configuration, maps the weight files and checks that they hold exactly the tensors the configuration
    /// asks for.
    ///
    /// # Errors
    /// If a file is missing, damaged or not supported, or a tensor is missing, superfluous, there twice, or of the wrong
    /// shape or dtype. The message names file and tensor.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref().to_owned();
        let path = folder.join("config.json");
        let text = file::read_text(&path, SMALL)?;
        let mut map = file::parse_object(&text, &path)?;
        let quantization = StoredQuantization::from_json(&text, &path);
        let options = map.shift_remove("quantization_config").unwrap_or_default();
        // How weights are stored is said by the tensors: see below.
        let config = match &quantization {
            Err(_) if options.is_object() => ModelConfig::from_json(&Value::Object(map).to_string(), &path)?,
            _ => ModelConfig::from_json(&text, &path)?,
        };
        let WeightFiles { index, files, listed_in } = weight_files(&folder)?;
        let shards: Vec<Shard> = files.iter().map(|name| Shard::open(folder.join(name))).collect::<Result<_>>()?;
        let mut tensors = BTreeMap::new();
        let mut unlisted = Vec::new();
        for (number, shard) in shards.iter().enumerate() {
            for name in shard.stored_names().filter(|name| !ignorable(name)) {
                if let Some(mapped) = &index {
                    match mapped.get(&name) {
                        Some(file) if *file == files[number] => {}
                        Some(file) => return Err(twice(&name, &folder.join(file), shard.path())),
                        None if config.tie_word_embeddings && name == HEAD => {}
                        None => unlisted.push((name.clone(), number)),
                    }
                }
                if let Some(first) = tensors.insert(name.clone(), number) {
                    return Err(twice(&name, shards[first].path(), shard.path()));
                }
            }
        }
        if let Some(mapped) = &index {
            check_index(mapped, listed_in, &files, &shards, &unlisted, config.tie_word_embeddings)?;
        }
        Self {
            folder,
            config,
            shards,
            tensors,
            packed: BTreeMap::new(),
            parts: BTreeMap::new(),
            quantization: None,
            remarks: Vec::new(),
        }
        .settle(quantization, &options)
    }

    /// Finds out which of the tensors are which part of the model.
    fn settle(mut self, quantization: Result<Option<StoredQuantization>>, options: &Value) -> Result<Self> {
        leftovers::name_as_with_a_head(&mut self.shards, &mut self.tensors);
        let head = leftovers::settle_head(&mut self.config, &mut self.tensors, &mut self.shards)?;
        self.remarks.extend(head);
        if let Ok(Some(stored)) = &quantization {
            let raw = Raw { folder: &self.folder, shards: &self.shards, tensors: &self.tensors };
            let (packed, names) = packed::find(&raw, &self.config, stored)?;
            self.packed = packed;
            self.parts.extend(names.into_iter().filter_map(|name| self.tensors.remove_entry(&name)));
        }
        let plain = || {
            let known = quantization.as_ref().ok().and_then(Option::as_ref);
            self.tensors.iter().try_for_each(|(name, &number)| refuse_quantized(&self.shards[number], name, known))?;
            check_tensors(&self)
        };
        match (plain(), quantization) {
            (Ok(()), Ok(None)) => {}
            (Ok(()), Ok(Some(stored))) => {
                let without =
                    leftovers::plain_without_reason(&self.config, options, |name| self.packed.contains_key(name));
                let bitsandbytes = matches!(stored, StoredQuantization::Bnb4bit | StoredQuantization::Bnb8bit { .. });
                if self.packed.is_empty() && !without.is_empty() {
                    self.remarks.push(leftovers::left_over(&stored.to_string()));
                } else {
                    self.quantization = Some(stored);
                    // Other methods' options say in too many ways which layers are quantized.
                    if bitsandbytes && !without.is_empty() {
                        self.remarks.push(leftovers::partly(&stored.to_string(), &without));
                    }
                }
            }
            // A method that is not read is no obstacle where nothing is stored so.
            (Ok(()), Err(_)) if options.is_object() => {
                let method = options["quant_method"].as_str().unwrap_or("of an unknown method");
                self.remarks.push(leftovers::left_over(&file::shown(&method.into())));
            }
            (_, Err(error)) | (Err(error), Ok(_)) => return Err(error),
        }
        self.remarks.iter().for_each(|remark| tracing::warn!("{}: {remark}", self.folder.display()));
        Ok(self)
    }

    /// Replaces the end tokens of the configuration by all that are known ([`crate::end_tokens`]), so that whatever runs the model
    /// stops at them.
    pub fn set_eos_token_ids(&mut self, ids: Vec<u32>) {
        self.config.eos_token_ids = ids;
    }

    fn shard(&self, name: &str) -> Option<&Shard> {
        let plain = self.tensors.get(name).copied();
        plain.or_else(|| self.packed.get(name).map(|packed| packed.shard)).map(|number| &self.shards[number])
    }
}

impl WeightSource for HfDirectory {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn path(&self) -> &Path {
        &self.folder
    }

    fn file_of(&self, name: &str) -> Option<&Path> {
        self.shard(name).map(Shard::path)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.keys().chain(self.packed.keys()).cloned().collect();
        names.sort_unstable();
        names
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self.packed.get(name) {
            Some(packed) => Some(packed.shape.to_vec()),
            None => self.shard(name)?.shape(name).map(<[usize]>::to_vec),
        }
    }

    fn quantization(&self) -> Option<&StoredQuantization> {
        self.quantization.as_ref()
    }

    fn remarks(&self) -> &[String] {
        &self.remarks
    }

    fn is_packed(&self, name: &str) -> bool {
        self.packed.contains_key(name)
    }

    fn stored(&self, name: &str) -> Option<StoredTensor<'_>> {
        if self.is_packed(name) { None } else { self.shard(name)?.stored(name) }
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        match self.packed.get(name) {
            Some(packed) => packed.bytes,
            None => self.stored(name).map_or(0, |stored| stored.bytes.len() as u64),
        }
    }

    fn read_weight(&self, name: &str) -> Result<SourceWeight> {
        let Some(packed) = self.packed.get(name) else { return self.read(name).map(SourceWeight::Plain) };
        packed::read(&Raw { folder: &self.folder, shards: &self.shards, tensors: &self.parts }, name, packed)
    }

    fn read(&self, name: &str) -> Result<PlainTensor> {
        if let (true, Some(quantization)) = (self.is_packed(name), &self.quantization) {
            let place = self.file_of(name).unwrap_or(&self.folder).display();
            let message =
                format!("is stored quantized ({quantization}) in {place}; the original weights are needed here");
            return Err(Error::tensor(name, message));
        }
        self.shard(name).ok_or_else(|| unknown_tensor(self, name))?.read(name)
    }
}

struct WeightFiles {
    /// Tensors to shards, if the model is sharded.
    index: Option<BTreeMap<String, String>>,
    /// The sorted names.
    files: Vec<String>,
    /// The index's name, for messages.
    listed_in: &'static str,
}

/// The first of the four ways to store weights that the folder has.
fn weight_files(folder: &Path) -> Result<WeightFiles> {
    for (single, index) in [(SINGLE, INDEX), (SINGLE_PICKLE, INDEX_OF_PICKLES)] {
        if folder.join(single).exists() {
            return Ok(WeightFiles { index: None, files: vec![single.to_owned()], listed_in: index });
        }
        let path = folder.join(index);
        if path.exists() {
            let map = read_index(&path)?;
            let mut files: Vec<String> = map.values().cloned().collect();
            files.sort_unstable();
            files.dedup();
            return Ok(WeightFiles { index: Some(map), files, listed_in: index });
        }
    }
    Err(no_weights(folder))
}

/// Reads the index that assigns tensors to shards. Shard names must be plain file names: an index cannot point outside
/// its folder, nor to a pickle unless it is one of pickles.
pub(crate) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let object = file::read_object(path, LARGE)?;
    let Some(Value::Object(map)) = object.get("weight_map") else {
        return Err(Error::format(path, "weight_map is missing"));
    };
    if map.is_empty() {
        return Err(Error::format(path, "weight_map is empty"));
    }
    let end = if path.ends_with(INDEX_OF_PICKLES) { ".bin" } else { ".safetensors" };
    let mut index = BTreeMap::new();
    for (name, value) in map {
        match value.as_str() {
            Some(file) if is_plain_file_name(file, end) => index.insert(name.clone(), file.to_owned()),
            _ => {
                let value = file::shown(value);
                let message = format!("the shard of {name} is {value}, which is not the name of a {end} file");
                return Err(Error::format(path, message));
            }
        };
    }
    Ok(index)
}

/// The longest name that file systems have, in bytes.
const MAX_FILE_NAME: usize = 255;

fn is_plain_file_name(name: &str, end: &str) -> bool {
    name.len() <= MAX_FILE_NAME
        && name.ends_with(end)
        && !name.starts_with('.')
        && !name.contains(['/', '\\', ':', '\0'])
}

/// Errors where the index and the shards are not of one model. A tensor that no model needs may be listed or not; programs that
/// save models anew often list a tied head that they do not store.
fn check_index(
    mapped: &BTreeMap<String, String>,
    index: &str,
    files: &[String],
    shards: &[Shard],
    unlisted: &[(String, usize)],
    tied: bool,
) -> Result<()> {
    if let Some((name, number)) = unlisted.first() {
        let place = shards[*number].path().display();
        return Err(Error::tensor(name, format!("in {place}, but not in {index}")));
    }
    for (name, file) in mapped {
        let number = files.binary_search(file).expect("every file of the index was opened");
        let unneeded = ignorable(name) || (tied && name == HEAD);
        if shards[number].shape(name).is_none() && !unneeded {
            let message = format!("missing in {}, where {index} says it is", shards[number].path().display());
            return Err(Error::tensor(name, message));
        }
    }
    Ok(())
}

fn twice(name: &str, first: &Path, second: &Path) -> Error {
    Error::tensor(name, format!("in two files: {} and {}", first.display(), second.display()))
}

/// Checks that the tensors beside the quantized layers are plain: companions that no quantized layer needs, or
/// integers, mean that files and configuration do not fit.
fn refuse_quantized(shard: &Shard, name: &str, quantization: Option<&StoredQuantization>) -> Result<()> {
    const COMPANIONS: [&str; 14] = [
        ".absmax",
        ".nested_absmax",
        ".quant_map",
        ".nested_quant_map",
        ".SCB",
        ".weight_format",
        ".qweight",
        ".qzeros",
        ".scales",
        ".g_idx",
        ".weight_scale",
        ".weight_scale_inv",
        ".weight_packed",
        ".input_scale",
    ];
    if name.contains(".quant_state.") || COMPANIONS.iter().any(|suffix| name.ends_with(suffix)) {
        let place = shard.path().display();
        return Err(match quantization {
            Some(quantization) => {
                Error::tensor(name, format!("in {place}, but no layer stored in {quantization} has it as its part"))
            }
            None => Error::Unsupported(format!(
                "{place} holds quantized weights (tensor {name}), but config.json has no quantization_config that says \
                 how; use a repository whose config.json has it, or the original bf16, f16 or f32 weights, which are \
                 quantized while loading"
            )),
        });
    }
    match shard.dtype(name) {
        Some(Dtype::F32 | Dtype::BF16 | Dtype::F16) => Ok(()),
        Some(other) => Err(unsupported_dtype(name, other, shard.path())),
        None => Ok(()),
    }
}

/// The error for a folder without weights, with the files it holds instead.
fn no_weights(folder: &Path) -> Error {
    let names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let has = |test: &dyn Fn(&str) -> bool| names.iter().any(|name| test(name));
    let hint = if has(&|name| name == "adapter_config.json") {
        "; this is an adapter: give the model it was trained on, and the adapter separately"
    } else if has(&|name| name.ends_with(".bin") || name.ends_with(".pth")) {
        "; of PyTorch's pickles only pytorch_model.bin and shards with pytorch_model.bin.index.json are read"
    } else if has(&|name| name.starts_with("consolidated")) {
        "; it has weights in Mistral's own layout, which is not read: use the ones converted to Hugging Face's"
    } else if has(&|name| name.ends_with(".gguf")) {
        "; it has GGUF files: give the path of one of them"
    } else {
        ""
    };
    Error::format(folder, format!("neither {SINGLE} nor {INDEX} is here{hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_names_cannot_leave_the_folder() {
        for name in ["model-00001-of-00002.safetensors", "a b.safetensors"] {
            assert!(is_plain_file_name(name, ".safetensors"), "{name}");
        }
        for name in [
            "",
            "..",
            "../x.safetensors",
            "/x.safetensors",
            "a\\x.safetensors",
            "C:x.safetensors",
            "x.bin",
            ".safetensors",
        ] {
            assert!(!is_plain_file_name(name, ".safetensors"), "{name}");
        }
    }
}
