//! GGUF files (llama.cpp): Llama-style models in them, and the pieces that [`export`](crate::export::gguf) writes them of.
//!
//! Read are the architectures of [`Architecture`](crate::config::Architecture) (Mistral models are written as `llama`), with weights
//! of the types that candle dequantizes, and IQ4_NL and IQ4_XS. Tensors are named and ordered as Hugging Face's; the configuration, tokenizer
//! and chat template come from the metadata.

pub mod blocks;
mod config;
mod divisors;
mod header;
mod iq4;
pub(crate) mod metadata;
pub(crate) mod rows;
pub(crate) mod split;
mod types;
mod vocabulary;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use qlora_kernels::MappedFile;

use self::header::Header;
use self::split::Part;
use self::types::GgmlType;
pub(crate) use self::vocabulary::{Vocabulary, VocabularyKind, token_type};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::source::{PlainTensor, WeightSource, check_tensors, ignorable, unknown_tensor};

/// The vocabulary of a GGUF file that need not hold a model.
pub(crate) fn read_vocabulary<T>(
    path: &Path,
    read: impl FnOnce(&Vocabulary<'_>) -> std::result::Result<T, String>,
) -> Result<T> {
    let file = MappedFile::open(path).map_err(|e| Error::io(path, e))?;
    let vocabulary = |header: Header| Vocabulary::read(&header, &file).and_then(|vocabulary| read(&vocabulary));
    Header::parse(&file).and_then(vocabulary).map_err(|message| Error::format(path, message))
}

/// The f32 tensors of a GGUF file in memory that need not hold a model, by name.
pub(crate) fn named_floats(file: &[u8]) -> std::result::Result<Vec<(String, Vec<f32>)>, String> {
    let header = Header::parse(file)?;
    let floats = header.tensors.iter().filter(|tensor| tensor.kind == GgmlType::F32);
    let values = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    Ok(floats.map(|tensor| (tensor.name.clone(), values(&file[tensor.bytes.clone()]))).collect())
}

/// A GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: MappedFile,
    // The other parts of a split model, whose tensors are in the header too.
    rest: Vec<Part>,
    header: Header,
    config: ModelConfig,
    // Hugging Face's name to the index in `header.tensors`.
    tensors: BTreeMap<String, usize>,
    // Hugging Face's names of the tensors whose rows are interleaved, and the number of their heads.
    interleaved: BTreeMap<String, usize>,
}

impl Gguf {
    /// Maps the file (and the other parts of a split model, of which the first is given), checks its header against its length and
    /// its tensors against its configuration.
    ///
    /// # Errors
    /// If the file is damaged, cut short, or of an architecture, type or option that is not supported; the message names
    /// the file and the metadata key or tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let file = MappedFile::open(&path).map_err(|e| Error::io(&path, e))?;
        let mut header = Header::parse(&file).map_err(|e| Error::format(&path, e))?;
        let rest = split::open_rest(&path, &mut header)?;
        let config = config::model_config(&header, &file, &rest, &path)?;
        let spec = config.spec();
        let names = spec.gguf_names();
        let interleaved = spec.tensors().filter_map(|tensor| Some((tensor.name, tensor.module.interleaved_heads?)));
        let interleaved = interleaved.collect();
        let mut tensors = BTreeMap::new();
        for (index, tensor) in header.tensors.iter().enumerate() {
            if config::is_rope_table(&tensor.name) {
                continue;
            }
            let Some(name) = names.hugging_face(&tensor.name) else {
                return Err(Error::tensor(
                    &tensor.name,
                    format!(
                        "not a tensor of a {} model, in {}; this model is not supported",
                        config.architecture.gguf_name(),
                        path.display()
                    ),
                ));
            };
            if ignorable(&name) {
                continue;
            }
            if !tensor.kind.is_supported() {
                return Err(Error::tensor(
                    &tensor.name,
                    format!("has type {} in {}; supported are {}", tensor.kind, path.display(), GgmlType::supported()),
                ));
            }
            tensors.insert(name, index);
        }
        let source = Self { path, file, rest, header, config, tensors, interleaved };
        check_tensors(&source)?;
        Ok(source)
    }

    /// Replaces the end tokens of the configuration by all that are known ([`crate::end_tokens`]), so that whatever runs the model
    /// stops at them.
    pub fn set_eos_token_ids(&mut self, ids: Vec<u32>) {
        self.config.eos_token_ids = ids;
    }

    /// The chat template in the file, if there is one.
    ///
    /// # Errors
    /// If it is not text.
    pub fn chat_template(&self) -> Result<Option<&str>> {
        self.header.str("tokenizer.chat_template", &self.file).map_err(|e| Error::format(&self.path, e))
    }

    /// The chat template of this name, such as `tool_use`, as the file states it.
    ///
    /// # Errors
    /// If it is not text.
    pub fn named_chat_template(&self, name: &str) -> Result<Option<&str>> {
        let key = format!("tokenizer.chat_template.{name}");
        self.header.str(&key, &self.file).map_err(|e| Error::format(&self.path, e))
    }

    /// The name in the file's metadata.
    pub fn name(&self) -> Option<&str> {
        self.header.str("general.name", &self.file).ok().flatten()
    }

    /// The tokenizer's vocabulary and options.
    pub(crate) fn vocabulary(&self) -> Result<Vocabulary<'_>> {
        Vocabulary::read(&self.header, &self.file).map_err(|e| Error::format(&self.path, e))
    }
}

impl WeightSource for Gguf {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn file_of(&self, name: &str) -> Option<&Path> {
        let part = self.tensors.get(name).map_or(0, |&index| self.header.tensors[index].part);
        Some(if part == 0 { &self.path } else { &self.rest[part - 1].path })
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|&index| self.header.tensors[index].shape.clone())
    }

    fn block_type(&self) -> Option<&'static str> {
        let spec = self.config.spec();
        let kinds = spec.linear().filter_map(|module| self.tensors.get(&module.weight_name()));
        let mut counts: BTreeMap<&'static str, usize> = BTreeMap::new();
        let (mut few, mut all) = (0, 0);
        for &index in kinds {
            let kind = self.header.tensors[index].kind;
            let (elements, bytes) = kind.block();
            all += 1;
            // Q8_0 has 8.5 bits a weight: what it rounds away does not matter beside 4 bits.
            if bytes < elements {
                few += 1;
                *counts.entry(kind.name()).or_default() += 1;
            }
        }
        let most = counts.into_iter().max_by_key(|(_, count)| *count).map(|(name, _)| name);
        most.filter(|_| 2 * few > all)
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        self.tensors.get(name).map_or(0, |&index| self.header.tensors[index].bytes.len() as u64)
    }

    fn read(&self, name: &str) -> Result<PlainTensor> {
        let index = *self.tensors.get(name).ok_or_else(|| unknown_tensor(self, name))?;
        let info = &self.header.tensors[index];
        let file = if info.part == 0 { &self.file } else { &self.rest[info.part - 1].file };
        let mut data = info.kind.decode(&file[info.bytes.clone()])?;
        file.forget(info.bytes.clone());
        if let Some(&heads) = self.interleaved.get(name) {
            rows::unpermute(&mut data, heads, self.config.head_dim);
        }
        Ok(PlainTensor { data, shape: info.shape.clone() })
    }
}

#[cfg(test)]
mod tests;
