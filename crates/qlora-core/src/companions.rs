//! The files that belong to a model beside its configuration and weights: tokenizer, chat template, recommendations for
//! generating, licence. They go wherever the model goes: merged, quantized, or, but for the licence, beside its adapter.
//!
//! Files are taken as they are, with three exceptions. The chat template in use is the one that is written, as
//! `chat_template.jinja`. `generation_config.json` lists every token that ends an answer ([`crate::end_tokens`]), since
//! transformers stops at no others. Facts that only a GGUF file's metadata has are written as the files that say it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::atomic::PendingFile;
use crate::chat::ChatTemplate;
use crate::error::{Error, Result};
use crate::file::{self, LARGE, SMALL};
use crate::licence::is_licence;
use crate::open::ModelFiles;

const TOKENIZER: [&str; 10] = [
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const TEMPLATE: &str = "chat_template.jinja";
const TEMPLATES: &str = "additional_chat_templates";
const GENERATION: &str = "generation_config.json";
/// Files by their path inside a model folder.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Companions {
    files: BTreeMap<String, Vec<u8>>,
}

/// Whether the file of this name, by its path inside a model folder, is one that goes along.
pub fn is_companion(name: &str) -> bool {
    match name.split_once('/') {
        Some((folder, name)) => folder == TEMPLATES && name.ends_with(".jinja") && !name.contains('/'),
        None => TOKENIZER.contains(&name) || name == TEMPLATE || name == GENERATION || is_licence(name),
    }
}

impl Companions {
    /// Those of an opened model.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn of(model: &ModelFiles) -> Result<Self> {
        let mut companions = Self::of_adapter(model)?;
        let folder = model.source.path();
        if folder.is_dir() {
            let entries = fs::read_dir(folder).map_err(|error| Error::io(folder, error))?;
            for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
                if is_licence(&name) {
                    companions.take_file(folder, &name)?;
                }
            }
        }
        Ok(companions)
    }

    /// Those that an adapter is saved with, so that the model is asked as it was trained: all but the licence.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn of_adapter(model: &ModelFiles) -> Result<Self> {
        let mut companions = Self::default();
        match &model.origins.tokenizer {
            Some(folder) => {
                for name in TOKENIZER {
                    companions.take_file(folder, name)?;
                }
                companions.take_template(folder, model)?;
            }
            None => companions.describe_tokenizer(model)?,
        }
        companions.take_generation(model)?;
        Ok(companions)
    }

    /// The files' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// The bytes of a file.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(Vec::as_slice)
    }

    /// Writes all of them into a folder.
    ///
    /// # Errors
    /// If one cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        for (name, bytes) in &self.files {
            let path = folder.join(name);
            make_parent(&path)?;
            fs::write(&path, bytes).map_err(|error| crate::formats::safetensors::disk(&path, error))?;
        }
        Ok(())
    }

    /// Writes all of them under temporary names in a folder, for a caller that lets several files appear together.
    pub(crate) fn pending(&self, folder: &Path) -> Result<Vec<PendingFile>> {
        let write = |(name, bytes): (&String, &Vec<u8>)| -> Result<PendingFile> {
            let path = folder.join(name);
            make_parent(&path)?;
            let mut file = PendingFile::create(&path)?;
            file.write_with(|writer| writer.write_all(bytes))?;
            Ok(file)
        };
        self.files.iter().map(write).collect()
    }

    fn take_file(&mut self, folder: &Path, name: &str) -> Result<()> {
        let path = folder.join(name);
        let Ok(metadata) = fs::metadata(&path) else { return Ok(()) };
        if !metadata.is_file() {
            return Ok(());
        }
        if metadata.len() > LARGE {
            return Err(Error::format(&path, format!("larger than the {LARGE} bytes that such a file may have")));
        }
        let bytes = fs::read(&path).map_err(|error| Error::io(&path, error))?;
        self.files.insert(name.to_owned(), bytes);
        Ok(())
    }

    /// The template in use; where that is the one of the tokenizer's folder, that folder's files as they are.
    fn take_template(&mut self, folder: &Path, model: &ModelFiles) -> Result<()> {
        let used = model.chat_template.as_ref().map(ChatTemplate::source);
        // A damaged template that is not used is not taken.
        let own = ChatTemplate::from_folder(folder, None).ok().flatten();
        if own.as_ref().map(ChatTemplate::source) == used {
            self.take_file(folder, TEMPLATE)?;
            for entry in fs::read_dir(folder.join(TEMPLATES)).into_iter().flatten().flatten() {
                if let Some(name) = entry.file_name().to_str().filter(|name| name.ends_with(".jinja")) {
                    self.take_file(folder, &format!("{TEMPLATES}/{name}"))?;
                }
            }
            return Ok(());
        }
        // Two templates would leave it to the reader which one is meant.
        if let Some(bytes) = self.files.get(TOKENIZER_CONFIG) {
            let text = String::from_utf8_lossy(bytes).into_owned();
            let mut config = file::parse_object(&text, &folder.join(TOKENIZER_CONFIG))?;
            if config.shift_remove("chat_template").is_some() {
                self.json(TOKENIZER_CONFIG, config);
            }
        }
        self.describe_template(model);
        Ok(())
    }

    fn describe_template(&mut self, model: &ModelFiles) {
        if let Some(template) = &model.chat_template {
            self.files.insert(TEMPLATE.to_owned(), template.source().as_bytes().to_vec());
        }
    }

    /// For a tokenizer that is in no folder.
    fn describe_tokenizer(&mut self, model: &ModelFiles) -> Result<()> {
        let tokenizer = &model.tokenizer;
        let text = tokenizer.inner().to_string(true).map_err(|error| Error::Invalid(error.to_string()))?;
        self.files.insert("tokenizer.json".to_owned(), text.into_bytes());
        let mut config = Map::new();
        config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
        let roles = [
            ("bos_token", tokenizer.bos_token_id()),
            ("eos_token", tokenizer.eos_token_id()),
            ("unk_token", tokenizer.unk_token_id()),
            ("pad_token", tokenizer.pad_token_id()),
        ];
        for (role, id) in roles {
            if let Some(token) = id.and_then(|id| tokenizer.id_to_token(id)) {
                config.insert(role.to_owned(), json!(token));
            }
        }
        // Absent, transformers removes spaces before punctuation.
        config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
        config.insert("model_max_length".to_owned(), json!(model.source.config().max_position_embeddings));
        self.json(TOKENIZER_CONFIG, config);
        self.describe_template(model);
        Ok(())
    }

    /// `generation_config.json`, as it is if it lists every end token.
    fn take_generation(&mut self, model: &ModelFiles) -> Result<()> {
        let mut config = match &model.origins.generation {
            Some(path) => file::read_object(path, SMALL)?,
            None => Map::new(),
        };
        if let Some(bos) = model.source.config().bos_token_id.filter(|_| model.origins.generation.is_none()) {
            config.insert("bos_token_id".to_owned(), json!(bos));
        }
        let ends = &model.generation.eos_token_ids;
        let listed = |id: &u32| match config.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.contains(&json!(id)),
            Some(one) => *one == json!(id),
            None => false,
        };
        if let (Some(path), true) = (&model.origins.generation, ends.iter().all(listed)) {
            let bytes = fs::read(path).map_err(|error| Error::io(path, error))?;
            self.files.insert(GENERATION.to_owned(), bytes);
            return Ok(());
        }
        match **ends {
            [] => {}
            [one] => drop(config.insert("eos_token_id".to_owned(), json!(one))),
            ref several => drop(config.insert("eos_token_id".to_owned(), json!(several))),
        }
        self.json(GENERATION, config);
        Ok(())
    }

    fn json(&mut self, name: &str, map: Map<String, Value>) {
        self.files.insert(name.to_owned(), format!("{:#}\n", Value::Object(map)).into_bytes());
    }
}

impl fmt::Debug for Companions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

fn make_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |parent| fs::create_dir_all(parent).map_err(|error| Error::io(parent, error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn companions_are_known_by_their_names() {
        for name in [
            "LICENSE",
            "LICENSE.md",
            "license.txt",
            "LICENCE",
            "NOTICE",
            "Notice.txt",
            "COPYING",
            "USE_POLICY.md",
            "LICENSE.pdf",
        ] {
            assert!(is_companion(name), "{name}");
        }
        for name in ["README.md", "notice.py", "model.safetensors", "license.safetensors"] {
            assert!(!is_companion(name), "{name}");
        }
        assert!(is_companion("additional_chat_templates/tool_use.jinja") && is_companion("tokenizer.model"));
        assert!(!is_companion("additional_chat_templates/../x.jinja") && !is_companion("onnx/tokenizer.json"));
    }
}
