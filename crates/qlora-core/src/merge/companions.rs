//! The files that belong to a model beside its configuration and weights: tokenizer, chat template, recommendations for
//! generating, licence.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::file::LARGE;
use crate::licence::is_licence;
use crate::open::ModelFiles;
use crate::tokenizer::Tokenizer;

const TOKENIZER: [&str; 7] = [
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];
const TEMPLATE: &str = "chat_template.jinja";
const TEMPLATES: &str = "additional_chat_templates";
const OTHERS: [&str; 1] = ["generation_config.json"];

/// Files by their path inside a model folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Companions {
    files: BTreeMap<String, Vec<u8>>,
}

impl Companions {
    /// Those of an opened model: a folder's files as they are, or files with what a GGUF file's metadata says.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn of(model: &ModelFiles) -> Result<Self> {
        let path = model.source.path();
        let mut companions = Self::default();
        if path.is_dir() {
            companions.take(path, &TOKENIZER)?;
            companions.take(path, &OTHERS)?;
            companions.take_licences(path)?;
            companions.take_templates(path)?;
        } else {
            companions.describe(model)?;
        }
        Ok(companions)
    }

    /// Takes the tokenizer of another folder (an adapter's, with tokens that were added for it), and its chat template if
    /// it has one. `vocab_size` is the number of rows of the embedding.
    ///
    /// # Errors
    /// If the folder has no tokenizer, it is damaged, or it has tokens beyond the embedding.
    pub fn take_tokenizer(&mut self, folder: &Path, vocab_size: usize) -> Result<()> {
        let tokens = Tokenizer::from_folder(folder)?.vocab_size();
        if tokens > vocab_size {
            let message = format!(
                "the tokenizer has {tokens} tokens, the embedding {vocab_size} rows: the model was trained with a resized \
                 vocabulary, whose rows are not in the adapter"
            );
            return Err(Error::format(folder.join("tokenizer.json"), message));
        }
        let before = self.files.clone();
        self.files.retain(|name, _| !TOKENIZER.contains(&name.as_str()));
        self.take(folder, &TOKENIZER)?;
        let config = |files: &BTreeMap<String, Vec<u8>>| -> Option<Map<String, Value>> {
            serde_json::from_slice(files.get("tokenizer_config.json")?).ok()
        };
        let own = config(&self.files);
        if folder.join(TEMPLATE).is_file() || own.as_ref().is_some_and(|own| own.contains_key("chat_template")) {
            self.files.retain(|name, _| name != TEMPLATE && !name.starts_with(TEMPLATES));
            return self.take_templates(folder);
        }
        // The base's template stays, wherever the base had it.
        if let (Some(template), false) =
            (config(&before).and_then(|mut base| base.remove("chat_template")), self.files.contains_key(TEMPLATE))
            && let Some(text) = template.as_str()
        {
            self.files.insert(TEMPLATE.to_owned(), text.as_bytes().to_vec());
        }
        Ok(())
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
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(|error| Error::io(parent, error))?;
            }
            fs::write(&path, bytes).map_err(|error| crate::safetensors_stream::disk(&path, error))?;
        }
        Ok(())
    }

    fn take(&mut self, folder: &Path, names: &[&str]) -> Result<()> {
        for name in names {
            self.take_file(folder, name)?;
        }
        Ok(())
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

    fn take_licences(&mut self, folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_str().filter(|name| is_licence(name)) {
                self.take_file(folder, name)?;
            }
        }
        Ok(())
    }

    fn take_templates(&mut self, folder: &Path) -> Result<()> {
        self.take_file(folder, TEMPLATE)?;
        for entry in fs::read_dir(folder.join(TEMPLATES)).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_str().filter(|name| name.ends_with(".jinja")) {
                self.take_file(folder, &format!("{TEMPLATES}/{name}"))?;
            }
        }
        Ok(())
    }

    /// For a model without such files.
    fn describe(&mut self, model: &ModelFiles) -> Result<()> {
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
        config.insert("model_max_length".to_owned(), json!(model.source.config().max_position_embeddings));
        self.json("tokenizer_config.json", config);
        if let Some(template) = &model.chat_template {
            self.files.insert(TEMPLATE.to_owned(), template.source().as_bytes().to_vec());
        }
        let mut generation = Map::new();
        if let Some(bos) = model.source.config().bos_token_id {
            generation.insert("bos_token_id".to_owned(), json!(bos));
        }
        match *model.generation.eos_token_ids {
            [] => {}
            [one] => drop(generation.insert("eos_token_id".to_owned(), json!(one))),
            ref several => drop(generation.insert("eos_token_id".to_owned(), json!(several))),
        }
        self.json("generation_config.json", generation);
        Ok(())
    }

    fn json(&mut self, name: &str, map: Map<String, Value>) {
        self.files.insert(name.to_owned(), format!("{:#}", Value::Object(map)).into_bytes());
    }
}
