//! From what a user writes for a model (a folder, a GGUF file, a hub id) to everything needed to run it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::adapter::{self, PeftAdapter};
use crate::chat::ChatTemplate;
use crate::config::ModelConfig;
use crate::end_tokens::end_tokens;
use crate::error::{Error, Result};
use crate::file::{self, SMALL};
use crate::formats::gguf::split;
use crate::formats::{Gguf, HfDirectory};
use crate::source::WeightSource;
use crate::tokenizer::Tokenizer;

/// Options of finding and opening a model. The defaults are those of Hugging Face's libraries, their environment
/// variables included.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Branch, tag or commit on the hub (`main`).
    pub revision: Option<String>,
    /// Access token for the hub; else `HF_TOKEN`, else the one that `hf auth login` stored.
    pub token: Option<String>,
    /// The folder of downloads; else `HF_HUB_CACHE`, `HF_HOME/hub` or `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// Use only what was downloaded before; also on with `HF_HUB_OFFLINE=1`.
    pub offline: bool,
    /// Address of the hub; else `HF_ENDPOINT`, else <https://huggingface.co>.
    pub endpoint: Option<String>,
    /// Show hf-hub's progress bars (on standard error) while downloading.
    pub progress: bool,
    /// A folder or a hub id whose `tokenizer.json`, `tokenizer_config.json` and chat template are taken instead of the model's own. The
    /// model's chat template stays if there is none. With it, models open whose own tokenizer is not read or not there.
    pub tokenizer: Option<PathBuf>,
    /// An adapter's folder. Its tokenizer (with the tokens that were added for it), its chat template and its generation
    /// configuration are those that it was trained with: where it has them, they are taken instead of the model's.
    pub adapter: Option<PathBuf>,
    /// A file with the chat template to take, whatever others there are.
    pub chat_template_path: Option<PathBuf>,
    /// The name of the chat template to take where a model has several ("default").
    pub chat_template: Option<String>,
}

impl fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenOptions")
            .field("revision", &self.revision)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .field("endpoint", &self.endpoint)
            .field("progress", &self.progress)
            .field("tokenizer", &self.tokenizer)
            .field("adapter", &self.adapter)
            .field("chat_template_path", &self.chat_template_path)
            .field("chat_template", &self.chat_template)
            .finish()
    }
}

/// An opened model. Weights are still in their files.
#[derive(Debug)]
#[non_exhaustive]
pub struct ModelFiles {
    /// The weights and the configuration, with all known end tokens ([`crate::end_tokens`]).
    pub source: Box<dyn WeightSource>,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template, if the model has one.
    pub chat_template: Option<ChatTemplate>,
    /// The generation settings that the model's authors recommend.
    pub generation: GenerationDefaults,
    /// The model's hub id, or its path as it was given: what an adapter names as its base model.
    pub name: String,
    /// The commit on the hub, if the model came from there.
    pub commit: Option<String>,
    pub(crate) origins: Origins,
}

/// The places where the files that belong to a model beside its weights were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Origins {
    /// The tokenizer's folder; none if it is inside a GGUF file.
    pub(crate) tokenizer: Option<PathBuf>,
    /// The `generation_config.json`, if there is one.
    pub(crate) generation: Option<PathBuf>,
}

/// The options of `generation_config.json`; options that are not there are none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a generation. [`ModelFiles`] has all that are known ([`crate::end_tokens`]), not those of this file alone.
    pub eos_token_ids: Vec<u32>,
    /// Texts that end a generation.
    pub stop_strings: Vec<String>,
    /// Whether to sample.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f64>,
    /// Only the so many most likely tokens.
    pub top_k: Option<usize>,
    /// Only the most likely tokens that together have this probability.
    pub top_p: Option<f64>,
    /// Makes tokens that occurred less likely.
    pub repetition_penalty: Option<f64>,
}

/// Opens a model by the path of a folder in Hugging Face's layout, the path of a `.gguf` file, or a hub id: `org/name`,
/// or `org/name:file.gguf` for a GGUF file in a repository. A path that exists is taken as such.
///
/// # Errors
/// If there is no such model, it cannot be downloaded, or it is damaged or not supported. The message says what to do.
pub fn open_model(spec: &str, options: &OpenOptions) -> Result<ModelFiles> {
    let options = &with_tokenizer_folder(options)?;
    match Spec::parse(spec)? {
        Spec::Folder(folder) => open_folder(&folder, spec, options),
        Spec::Gguf(path) => open_gguf(&path, spec, options),
        Spec::Hub { id, file } => open_hub(&id, file.as_deref(), options),
    }
}

/// Reads a model's configuration alone: of a `config.json`, or of what [`open_model`] takes. Of a hub id only
/// `config.json` is downloaded (of `org/name:file.gguf`, the whole file). Weights may be quantized, damaged or missing; where a
/// folder has them whole, they decide whether the head is the embedding, as in [`open_model`].
///
/// # Errors
/// If there is no configuration, it cannot be downloaded, or it is damaged or not supported.
pub fn open_config(spec: &str, options: &OpenOptions) -> Result<ModelConfig> {
    let json = |path: &Path| -> Result<ModelConfig> {
        let mut map = file::read_object(path, SMALL)?;
        map.shift_remove("quantization_config");
        ModelConfig::from_json(&Value::Object(map).to_string(), path)
    };
    let path = Path::new(spec);
    if path.is_file() && spec.to_ascii_lowercase().ends_with(".json") {
        return json(path);
    }
    match Spec::parse(spec)? {
        Spec::Folder(folder) if folder.join("config.json").exists() => match HfDirectory::open(&folder) {
            Ok(source) => Ok(source.config().clone()),
            Err(_) => json(&folder.join("config.json")),
        },
        Spec::Folder(folder) => match gguf_files(&folder).first() {
            Some(file) => Ok(Gguf::open(file)?.config().clone()),
            None => Err(Error::format(folder, "no model: there is neither config.json nor a .gguf file")),
        },
        Spec::Gguf(path) => Ok(Gguf::open(path)?.config().clone()),
        #[cfg(feature = "hub")]
        Spec::Hub { id, file } => {
            let snapshot = crate::hub::snapshot(&id, Some(file.as_deref().unwrap_or("config.json")), options)?;
            match file {
                Some(file) => Ok(Gguf::open(snapshot.folder.join(file))?.config().clone()),
                None => json(&snapshot.folder.join("config.json")),
            }
        }
        #[cfg(not(feature = "hub"))]
        Spec::Hub { id, file } => Ok(open_hub(&id, file.as_deref(), options)?.source.config().clone()),
    }
}

/// The kind of a model argument: a folder, a GGUF file or a hub id.
#[derive(Debug, PartialEq, Eq)]
enum Spec {
    Folder(PathBuf),
    Gguf(PathBuf),
    Hub { id: String, file: Option<String> },
}

impl Spec {
    fn parse(spec: &str) -> Result<Self> {
        let path = Path::new(spec);
        let is_gguf = |name: &str| name.to_ascii_lowercase().ends_with(".gguf");
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.is_file() {
            if is_gguf(spec) {
                return Ok(Self::Gguf(path.to_owned()));
            }
            let hint = if spec.ends_with(".safetensors") { "; give the folder that holds it" } else { "" };
            return Err(Error::format(path, format!("a model is a folder, a .gguf file or a hub id{hint}")));
        }
        let (id, file) = match spec.split_once(':') {
            Some((id, file)) => (id, Some(file)),
            None => (spec, None),
        };
        let is_part = |part: &str| {
            !part.is_empty()
                && !part.starts_with(['.', '-'])
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && !part.contains("..")
        };
        let is_file =
            |file: &str| is_gguf(file) && file.split('/').all(|part| !part.is_empty() && !part.starts_with('.'));
        match id.split_once('/') {
            Some((organisation, name)) if is_part(organisation) && is_part(name) && !is_gguf(name) => match file {
                None => Ok(Self::Hub { id: id.to_owned(), file: None }),
                Some(file) if is_file(file) && !file.contains('\\') => {
                    Ok(Self::Hub { id: id.to_owned(), file: Some(file.to_owned()) })
                }
                Some(file) => Err(Error::Invalid(format!("{spec:?}: {file:?} is not the name of a .gguf file"))),
            },
            _ if spec.is_empty() => Err(Error::Invalid("no model was named".to_owned())),
            _ => {
                let hint = if spec.starts_with('~') { "; ~ is only known to the shell" } else { "" };
                Err(Error::Invalid(format!(
                    "{spec:?}: no such file or folder{hint}. A model is the path of a folder or of a .gguf file, or a hub id such \
                     as org/name or org/name:file.gguf"
                )))
            }
        }
    }
}

fn open_folder(folder: &Path, name: &str, options: &OpenOptions) -> Result<ModelFiles> {
    if !folder.join("config.json").exists() {
        return match gguf_files(folder).as_slice() {
            [single] => open_gguf(single, name, options),
            [] => Err(Error::format(folder, "no model: there is neither config.json nor a .gguf file")),
            [first, ..] => {
                let message = format!(
                    "several .gguf files and no config.json; give the path of one, such as {}",
                    first.display()
                );
                Err(Error::format(folder, message))
            }
        };
    }
    let mut source = HfDirectory::open(folder)?;
    let of_tokenizer = other_tokenizer(options).unwrap_or_else(|| folder.to_owned());
    let tokenizer = Tokenizer::from_folder(&of_tokenizer)?;
    let chat_template = match other_template(options, &tokenizer, Some(&of_tokenizer))? {
        None if of_tokenizer == folder => ChatTemplate::from_folder(folder, options.chat_template.as_deref())?,
        None => ChatTemplate::from_folder(folder, options.chat_template.as_deref())?
            .map(|template| template.with_special_tokens(&tokenizer, Some(&of_tokenizer)))
            .transpose()?,
        found => found,
    };
    let (generation, file) = generation(options, Some(folder), source.config(), &tokenizer, chat_template.as_ref())?;
    source.set_eos_token_ids(generation.eos_token_ids.clone());
    let origins = Origins { tokenizer: Some(of_tokenizer), generation: file };
    Ok(ModelFiles::new(Box::new(source), tokenizer, chat_template, generation, name, origins))
}

fn open_gguf(path: &Path, name: &str, options: &OpenOptions) -> Result<ModelFiles> {
    let mut source = Gguf::open(path)?;
    let of_tokenizer = other_tokenizer(options);
    let tokenizer = match &of_tokenizer {
        Some(folder) => Tokenizer::from_folder(folder)?,
        None => Tokenizer::from_gguf(&source)?,
    };
    let chat_template = match other_template(options, &tokenizer, of_tokenizer.as_deref())? {
        Some(template) => Some(template),
        None => ChatTemplate::from_gguf(&source, &tokenizer)?,
    };
    let (generation, file) = generation(options, None, source.config(), &tokenizer, chat_template.as_ref())?;
    source.set_eos_token_ids(generation.eos_token_ids.clone());
    let origins = Origins { tokenizer: of_tokenizer, generation: file };
    Ok(ModelFiles::new(Box::new(source), tokenizer, chat_template, generation, name, origins))
}

/// The folder whose tokenizer is taken instead of the model's: one that was asked for, else the adapter's.
fn other_tokenizer(options: &OpenOptions) -> Option<PathBuf> {
    let of_adapter = || options.adapter.clone().filter(|folder| folder.join("tokenizer.json").is_file());
    options.tokenizer.clone().or_else(of_adapter)
}

/// The chat template that is taken instead of the model's: one that was given, that of a tokenizer that was asked for, or the
/// adapter's. `folder` is the tokenizer's.
fn other_template(options: &OpenOptions, tokenizer: &Tokenizer, folder: Option<&Path>) -> Result<Option<ChatTemplate>> {
    if let Some(path) = &options.chat_template_path {
        return ChatTemplate::from_file(path, tokenizer, folder).map(Some);
    }
    let name = options.chat_template.as_deref();
    if let Some(asked) = &options.tokenizer
        && let Some(template) = ChatTemplate::from_folder(asked, name)?
    {
        return Ok(Some(template));
    }
    let Some(adapter) = &options.adapter else { return Ok(None) };
    // A name is asked of an adapter only if it has templates.
    let named = name.is_some() && ChatTemplate::from_folder(adapter, None)?.is_some();
    let template = ChatTemplate::from_folder(adapter, name.filter(|_| named))?;
    template.map(|template| template.with_special_tokens(tokenizer, folder)).transpose()
}

/// The recommended generation settings, with every end token, and the file they are from: the adapter's, else the
/// model's.
fn generation(
    options: &OpenOptions,
    model: Option<&Path>,
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<(GenerationDefaults, Option<PathBuf>)> {
    let of = |folder: &Path| Some(folder.join("generation_config.json")).filter(|path| path.is_file());
    let mut files = [options.adapter.as_deref(), model].into_iter().flatten().filter_map(of);
    let file = files.next();
    let mut found = file.as_deref().map_or_else(|| Ok(GenerationDefaults::default()), GenerationDefaults::read)?;
    let mut stated = found.eos_token_ids.clone();
    for other in files {
        stated.extend(GenerationDefaults::read(&other)?.eos_token_ids);
    }
    stated.extend(&config.eos_token_ids);
    found.eos_token_ids = end_tokens(tokenizer, template, stated);
    Ok((found, file))
}

/// The options with a folder for a tokenizer that was asked for by its hub id.
fn with_tokenizer_folder(options: &OpenOptions) -> Result<OpenOptions> {
    let mut options = options.clone();
    if let Some(spec) = &options.tokenizer
        && let Some(text) = spec.to_str().filter(|_| !spec.exists())
        && matches!(Spec::parse(text), Ok(Spec::Hub { file: None, .. }))
    {
        options.tokenizer = Some(hub_tokenizer(text, &options)?);
    }
    Ok(options)
}

#[cfg(feature = "hub")]
fn hub_tokenizer(id: &str, options: &OpenOptions) -> Result<PathBuf> {
    // The revision is the model's.
    Ok(crate::hub::tokenizer_snapshot(id, &OpenOptions { revision: None, ..options.clone() })?.folder)
}

#[cfg(not(feature = "hub"))]
fn hub_tokenizer(id: &str, _options: &OpenOptions) -> Result<PathBuf> {
    Err(Error::Unsupported(format!("{id} as a hub id: this build has no access to the hub (feature `hub`)")))
}

#[cfg(feature = "hub")]
fn open_hub(id: &str, file: Option<&str>, options: &OpenOptions) -> Result<ModelFiles> {
    let snapshot = crate::hub::snapshot(id, file, options)?;
    let mut files = match file {
        Some(file) => open_gguf(&snapshot.folder.join(file), id, options)?,
        None => open_folder(&snapshot.folder, id, options)?,
    };
    files.commit = Some(snapshot.commit);
    Ok(files)
}

#[cfg(not(feature = "hub"))]
fn open_hub(id: &str, _file: Option<&str>, _options: &OpenOptions) -> Result<ModelFiles> {
    Err(Error::Unsupported(format!(
        "{id} as a hub id: this build has no access to the hub (feature `hub`), and there is no such folder"
    )))
}

fn gguf_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"))).collect();
    // Of a split model the first part.
    files.retain(|path| !path.file_name().and_then(|name| name.to_str()).is_some_and(split::is_later_part));
    files.sort();
    files
}

impl ModelFiles {
    /// Checks that a model with `rows` rows of its embedding has one for every token, where the tokenizer is not the model's own
    /// but an adapter's or one that was asked for. (Models whose own tokenizer is larger than they are exist.)
    ///
    /// # Errors
    /// If there are tokens without a row.
    pub fn check_vocabulary(&self, rows: usize) -> Result<()> {
        let (tokens, model) = (self.tokenizer.vocab_size(), self.source.path());
        match self.origins.tokenizer.as_deref().filter(|folder| *folder != model) {
            Some(folder) if tokens > rows => Err(Error::format(
                folder.join("tokenizer.json"),
                format!(
                    "the tokenizer has {tokens} tokens, the embedding {rows} rows: the model was trained with a resized \
                     vocabulary, whose rows are not in the adapter"
                ),
            )),
            _ => Ok(()),
        }
    }

    fn new(
        source: Box<dyn WeightSource>,
        tokenizer: Tokenizer,
        chat_template: Option<ChatTemplate>,
        generation: GenerationDefaults,
        name: &str,
        origins: Origins,
    ) -> Self {
        let config = source.config();
        if tokenizer.vocab_size() > config.vocab_size {
            tracing::warn!(
                "{}: the tokenizer has {} tokens, the embedding {}; texts with the tokens beyond cannot be used",
                source.path().display(),
                tokenizer.vocab_size(),
                config.vocab_size
            );
        }
        if generation.eos_token_ids.is_empty() {
            tracing::warn!(
                "{}: no file names a token that ends an answer, and none is known by its text: answers end at their longest \
                 length or at a stop string",
                source.path().display()
            );
        }
        Self { source, tokenizer, chat_template, generation, name: name.to_owned(), commit: None, origins }
    }

    /// The same model with as many tokens as the one that `adapter` was trained on, where tokens were added to that one (or taken
    /// away) and the adapter brings its tables along: what PEFT's `AutoPeftModel` does before it loads such an adapter. The base
    /// keeps its rows and gets the adapter's for the tokens that it lacks.
    ///
    /// # Errors
    /// If the adapter does not bring the rows that are missing.
    pub fn with_vocabulary_of(self, adapter: &PeftAdapter) -> Result<Self> {
        Ok(Self { source: adapter::resize(self.source, adapter)?, ..self })
    }
}

impl GenerationDefaults {
    /// Reads a `generation_config.json`; without a file everything is none.
    ///
    /// # Errors
    /// If the file is damaged. Values of an unexpected type are taken as missing: they are recommendations.
    pub fn read(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Ok(Self::default());
        }
        let map = file::read_object(path, SMALL)?;
        let ids = match map.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.as_slice(),
            Some(id) => std::slice::from_ref(id),
            None => &[],
        };
        let stop_strings = match map.get("stop_strings") {
            Some(Value::Array(texts)) => texts.as_slice(),
            Some(text) => std::slice::from_ref(text),
            None => &[],
        };
        let number = |key: &str| map.get(key).and_then(Value::as_f64).filter(|x| x.is_finite());
        Ok(Self {
            eos_token_ids: ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect(),
            stop_strings: stop_strings
                .iter()
                .filter_map(|text| text.as_str().filter(|text| !text.is_empty()).map(str::to_owned))
                .collect(),
            do_sample: map.get("do_sample").and_then(Value::as_bool),
            temperature: number("temperature"),
            top_k: map.get("top_k").and_then(Value::as_u64).and_then(|k| usize::try_from(k).ok()),
            top_p: number("top_p"),
            repetition_penalty: number("repetition_penalty"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_user_writes_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("model.GGUF"), "").unwrap();
        std::fs::write(path("model.safetensors"), "").unwrap();
        assert_eq!(Spec::parse(folder.path().to_str().unwrap()).unwrap(), Spec::Folder(folder.path().to_owned()));
        assert_eq!(Spec::parse(&path("model.GGUF")).unwrap(), Spec::Gguf(path("model.GGUF").into()));
        assert!(Spec::parse(&path("model.safetensors")).unwrap_err().to_string().contains("give the folder"));

        let hub = |id: &str, file: Option<&str>| Spec::Hub { id: id.to_owned(), file: file.map(str::to_owned) };
        assert_eq!(Spec::parse("Qwen/Qwen2.5-0.5B").unwrap(), hub("Qwen/Qwen2.5-0.5B", None));
        assert_eq!(Spec::parse("a/b-GGUF:q4/x.gguf").unwrap(), hub("a/b-GGUF", Some("q4/x.gguf")));
        for wrong in [
            "",
            "gpt2",
            "/nowhere/model",
            "./nowhere",
            "~/model",
            "a/b/c",
            "a/b.gguf",
            "../a/b",
            "a/..",
            "a\\b",
            "C:\\a",
        ] {
            let error = Spec::parse(wrong).unwrap_err().to_string();
            assert!(wrong.is_empty() || error.contains("no such file or folder"), "{wrong}: {error}");
        }
        for wrong in ["a/b:x.bin", "a/b:../x.gguf", "a/b:/x.gguf", "a/b:"] {
            assert!(Spec::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_token_is_not_shown() {
        let options = OpenOptions { token: Some("secret".to_owned()), ..OpenOptions::default() };
        assert!(!format!("{options:?}").contains("secret"));
    }

    #[test]
    fn recommendations_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("generation_config.json");
        assert_eq!(GenerationDefaults::read(&path).unwrap(), GenerationDefaults::default());
        std::fs::write(&path, r#"{"eos_token_id": [5, -1, 7], "do_sample": true, "temperature": 0.6, "top_k": null}"#)
            .unwrap();
        let read = GenerationDefaults::read(&path).unwrap();
        assert_eq!((read.eos_token_ids.as_slice(), read.temperature, read.top_k), (&[5, 7][..], Some(0.6), None));
        std::fs::write(&path, "{").unwrap();
        assert!(GenerationDefaults::read(&path).unwrap_err().to_string().contains("generation_config.json"));
    }
}
