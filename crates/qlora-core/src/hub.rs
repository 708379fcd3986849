//! Models and data sets from the Hugging Face hub: only the files that are needed, into the cache that Hugging Face's libraries share.
//! And models to it: [`push`].
//!
//! A snapshot is pinned to a commit: the file list of a revision gives the commit, and every file is taken from there, so
//! that a push in between cannot mix two states.

mod blobs;
mod dataset;
mod errors;
mod push;
mod settings;
mod status;

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::adapter;
use crate::companions::is_companion;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::formats::gguf::split::part_names;
use crate::formats::hf::{INDEX, INDEX_OF_PICKLES, SINGLE, SINGLE_PICKLE, read_index};
use crate::open::OpenOptions;
use crate::tokenizer::{MODEL_FILE, TOKENIZER_FILE as TOKENIZER};

pub use dataset::{Choose, DatasetSnapshot, PARQUET_REVISION, dataset_snapshot};
pub use push::{
    Existing, PushFile, PushFiles, PushOptions, PushStep, Pushed, files_of, is_generated_card, marked_card, push,
};
use settings::{Kind, Settings};
pub use status::HubStatus;

/// The files of a model in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// The folder that holds them.
    pub folder: PathBuf,
    /// The commit they are from.
    pub commit: String,
}

const CONFIG: &str = "config.json";
/// The ways to store a model's weights: one file, or shards with an index. The first that a repository has is taken.
const WEIGHTS: [(&str, &str); 2] = [(SINGLE, INDEX), (SINGLE_PICKLE, INDEX_OF_PICKLES)];

/// Makes sure that the needed files of `id` (`org/name`) are in the cache: configuration, tokenizer, chat template and
/// safetensors (PyTorch's pickles where there are none), or the one `file` that is named (a GGUF file, or `config.json` alone). Files that are there are not downloaded
/// again, whatever commit they came with.
///
/// If the hub cannot be reached, has a problem (429, 5xx) or no longer takes the token, and the cache has all files of the
/// revision, those are used, with a warning.
///
/// # Errors
/// If the hub refuses (which token to set, where to ask for access), does not have the repository, revision or file,
/// cannot be reached, or the model is not supported; offline, if files are missing in the cache.
pub fn snapshot(id: &str, file: Option<&str>, options: &OpenOptions) -> Result<Snapshot> {
    let settings = Settings::new(options, environment)?;
    let wanted = file.map_or(Wanted::Model { tokenizer: options.tokenizer.is_none() }, Wanted::File);
    request(&Request { id, wanted, settings: &settings })
}

/// Makes sure that the two files of the adapter `id` (`org/name`), in a folder of the repository if one is named, are in the
/// cache, with the tokenizer and chat template beside them where there are some. The snapshot's folder is the adapter's.
///
/// # Errors
/// As [`snapshot`]; also if the folder's name is not one.
pub fn adapter_snapshot(id: &str, subfolder: Option<&str>, options: &OpenOptions) -> Result<Snapshot> {
    let settings = Settings::new(options, environment)?;
    adapter_snapshot_with(id, subfolder, &settings)
}

/// Makes sure that the tokenizer of `id` (`org/name`) is in the cache.
///
/// # Errors
/// As [`snapshot`].
pub fn tokenizer_snapshot(id: &str, options: &OpenOptions) -> Result<Snapshot> {
    let settings = Settings::new(options, environment)?;
    request(&Request { id, wanted: Wanted::Tokenizer, settings: &settings })
}

/// The value of an environment variable; empty ones count as not set.
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn adapter_snapshot_with(id: &str, subfolder: Option<&str>, settings: &Settings) -> Result<Snapshot> {
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', ':']);
    if let Some(wrong) = subfolder.filter(|folder| !folder.split('/').all(part)) {
        return Err(Error::Invalid(format!("{wrong:?} is not the name of a folder in a repository")));
    }
    let mut snapshot = request(&Request { id, wanted: Wanted::Adapter(subfolder), settings })?;
    if let Some(subfolder) = subfolder {
        snapshot.folder.push(subfolder);
    }
    Ok(snapshot)
}

#[cfg(test)]
fn snapshot_with(id: &str, file: Option<&str>, settings: &Settings) -> Result<Snapshot> {
    request(&Request { id, wanted: file.map_or(Wanted::Model { tokenizer: true }, Wanted::File), settings })
}

fn request(request: &Request<'_>) -> Result<Snapshot> {
    let Request { id, settings, .. } = *request;
    if settings.offline {
        return request.cached().map_err(|missing| {
            let message = format!(
                "offline, and the cache in {} has not all files of revision {}: {missing}. Download it once while online, or give the \
                 path of a folder",
                settings.cache.display(),
                settings.revision
            );
            Error::hub(errors::named(id), message)
        });
    }
    if let Err(reason) = settings.check_reachable() {
        return match request.cached() {
            Ok(snapshot) => {
                tracing::warn!("cannot reach {} ({reason}); using {id} from the cache", settings.endpoint);
                Ok(snapshot)
            }
            Err(_) => Err(errors::unreachable(id, settings, &reason)),
        };
    }
    let outage = Cell::new(false);
    let error = match request.download(&outage) {
        Err(error) if outage.get() => error,
        result => return result,
    };
    let Ok(snapshot) = request.cached() else { return Err(error) };
    tracing::warn!("{error}; using {id} from the cache, as of commit {}", snapshot.commit);
    Ok(snapshot)
}

struct Request<'a> {
    id: &'a str,
    wanted: Wanted<'a>,
    settings: &'a Settings,
}

/// The files of a repository to download.
#[derive(Clone, Copy)]
enum Wanted<'a> {
    /// A model in Hugging Face's layout, with its tokenizer or with another one.
    Model { tokenizer: bool },
    /// One file: a GGUF file, or the configuration alone.
    File(&'a str),
    /// An adapter, possibly in a folder.
    Adapter(Option<&'a str>),
    /// A tokenizer alone.
    Tokenizer,
    /// Files of a data set.
    Data(&'a Choose<'a>),
}

/// The files of an adapter; its weights are in a pickle if only that is there.
fn adapter_files(subfolder: Option<&str>, is_there: impl Fn(&str) -> bool) -> [String; 2] {
    let prefix = subfolder.map_or_else(String::new, |folder| format!("{folder}/"));
    let [config, weights, pickle] =
        [adapter::CONFIG_FILE, adapter::WEIGHTS_FILE, adapter::PICKLE_FILE].map(|name| format!("{prefix}{name}"));
    [config, if !is_there(&weights) && is_there(&pickle) { pickle } else { weights }]
}

/// A file, and the other parts of the GGUF model that it is a part of.
fn parts_of(file: &str) -> Vec<String> {
    part_names(file).unwrap_or_else(|| vec![file.to_owned()])
}

impl Request<'_> {
    fn repo(&self, revision: &str) -> Repo {
        let kind = match self.settings.kind {
            Kind::Model => RepoType::Model,
            Kind::Dataset => RepoType::Dataset,
        };
        Repo::with_revision(self.id.to_owned(), kind, revision.to_owned())
    }

    fn folder(&self, commit: &str) -> PathBuf {
        Cache::new(self.settings.cache.clone()).repo(self.repo(commit)).pointer_path(commit)
    }

    /// The snapshot, if the cache has all of it; else the names of the missing files.
    fn cached(&self) -> std::result::Result<Snapshot, String> {
        let revision = &self.settings.revision;
        let commit = if is_commit(revision) {
            revision.clone()
        } else {
            let reference = self.settings.cache.join(self.repo(revision).folder_name()).join("refs").join(revision);
            let text =
                fs::read_to_string(&reference).map_err(|_| format!("the revision {revision} was never downloaded"))?;
            let commit = text.trim().to_owned();
            if !is_commit(&commit) {
                return Err(format!("{} holds no commit", reference.display()));
            }
            commit
        };
        let folder = self.folder(&commit);
        let need = |name: &str| if folder.join(name).is_file() { Ok(()) } else { Err(format!("{name} is missing")) };
        match self.wanted {
            Wanted::File(file) => parts_of(file).iter().try_for_each(|file| need(file))?,
            Wanted::Adapter(subfolder) => {
                adapter_files(subfolder, |file| need(file).is_ok()).iter().try_for_each(|file| need(file))?;
            }
            Wanted::Tokenizer => need(TOKENIZER).or_else(|missing| need(MODEL_FILE).map_err(|_| missing))?,
            Wanted::Data(choose) => {
                let files = dataset::cached_files(&folder);
                let chosen = choose(&files, &|name| Ok(folder.join(name))).map_err(|error| error.to_string())?;
                dataset::missing_part(&chosen).map_or(Ok(()), |missing| Err(format!("{missing} is missing")))?;
                chosen.iter().try_for_each(|file| need(file))?;
            }
            Wanted::Model { tokenizer } => {
                need(CONFIG)?;
                if tokenizer {
                    need(TOKENIZER).or_else(|missing| need(MODEL_FILE).map_err(|_| missing))?;
                }
                let here = |&&(single, index): &&(&str, &str)| need(single).is_ok() || need(index).is_ok();
                let (single, index) = WEIGHTS.iter().find(here).ok_or(format!("{SINGLE} and {INDEX} are missing"))?;
                if need(single).is_err() {
                    let index = read_index(&folder.join(index)).map_err(|error| error.to_string())?;
                    index.values().try_for_each(|shard| need(shard))?;
                }
            }
        }
        Ok(Snapshot { folder, commit })
    }

    /// `outage` is set if it fails for a reason that says nothing about the model: it may work again later.
    fn download(&self, outage: &Cell<bool>) -> Result<Snapshot> {
        let settings = self.settings;
        let explain = |error: ApiError, what: &str| {
            outage.set(errors::is_outage(&error, settings));
            errors::explain(&error, self.id, what, settings)
        };
        let api = ApiBuilder::from_cache(Cache::new(settings.cache.clone()))
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_progress(settings.progress)
            .build()
            .map_err(|error| explain(error, ""))?;
        let info = api.repo(self.repo(&settings.revision)).info().map_err(|error| explain(error, ""))?;
        if !is_commit(&info.sha) {
            return Err(Error::hub(self.id, format!("the hub names {:?} as its commit", info.sha)));
        }
        let files: Vec<&str> = info.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
        let snapshot = Snapshot { folder: self.folder(&info.sha), commit: info.sha.clone() };
        let repo = api.repo(self.repo(&info.sha));
        let get = Downloads { api: &api, repo, folder: &snapshot.folder, explain: &explain };
        match self.wanted {
            Wanted::File(file) => {
                let parts = parts_of(file);
                if let Some(missing) = parts.iter().find(|part| !files.contains(&part.as_str())) {
                    return Err(self.lacks(&files, missing));
                }
                parts.iter().try_for_each(|part| get.file(part))?;
            }
            Wanted::Adapter(subfolder) => {
                let wanted = adapter_files(subfolder, |file| files.contains(&file));
                if let Some(missing) = wanted.iter().find(|file| !files.contains(&file.as_str())) {
                    return Err(self.lacks(&files, missing));
                }
                wanted.iter().try_for_each(|file| get.file(file))?;
                // The tokenizer and template files that belong to the adapter.
                let folder = subfolder.map_or_else(String::new, |folder| format!("{folder}/"));
                let beside = files.iter().filter(|name| name.strip_prefix(folder.as_str()).is_some_and(is_companion));
                beside.copied().try_for_each(|name| get.file(name))?;
            }
            Wanted::Tokenizer => self.download_tokenizer(&files, &get)?,
            Wanted::Data(choose) => {
                let names: Vec<String> =
                    files.iter().filter(|name| dataset::is_plain(name)).map(|name| (*name).to_owned()).collect();
                let fetch = |name: &str| get.file(name).map(|()| get.folder.join(name));
                choose(&names, &fetch)?.iter().try_for_each(|name| get.file(name))?;
            }
            Wanted::Model { tokenizer } => self.download_folder(&files, &get, tokenizer)?,
        }
        if settings.revision != info.sha {
            let cache = Cache::new(settings.cache.clone()).repo(self.repo(&settings.revision));
            cache.create_ref(&info.sha).map_err(|error| Error::io(&settings.cache, error))?;
        }
        Ok(snapshot)
    }

    /// Small files first: a model that is not supported is refused before its weights are downloaded.
    fn download_folder(&self, files: &[&str], get: &Downloads<'_>, tokenizer: bool) -> Result<()> {
        let has = |name: &str| files.contains(&name);
        let vocabulary = if has(TOKENIZER) || !has(MODEL_FILE) { TOKENIZER } else { MODEL_FILE };
        let needed = [Some(CONFIG), tokenizer.then_some(vocabulary)];
        if let Some(missing) = needed.into_iter().flatten().find(|name| !has(name)) {
            return Err(self.lacks(files, missing));
        }
        let Some((single, index)) = WEIGHTS.into_iter().find(|(single, index)| has(single) || has(index)) else {
            return Err(self.lacks(files, "safetensors"));
        };
        get.file(CONFIG)?;
        ModelConfig::from_json_file(get.folder.join(CONFIG))?;
        if tokenizer {
            get.file(vocabulary)?;
        }
        // Tokenizer, template and licence files, which accompany the model wherever it goes.
        files.iter().filter(|name| is_companion(name)).try_for_each(|name| get.file(name))?;
        if has(single) {
            return get.file(single);
        }
        get.file(index)?;
        let index = read_index(&get.folder.join(index))?;
        let mut shards: Vec<&str> = index.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            if !has(shard) {
                return Err(self.lacks(files, shard));
            }
            get.file(shard)?;
        }
        Ok(())
    }

    fn download_tokenizer(&self, files: &[&str], get: &Downloads<'_>) -> Result<()> {
        let Some(vocabulary) = [TOKENIZER, MODEL_FILE].into_iter().find(|name| files.contains(name)) else {
            return Err(self.lacks(files, TOKENIZER));
        };
        get.file(vocabulary)?;
        // By the kind of model that the configuration names, a tokenizer.model is read.
        if vocabulary == MODEL_FILE && files.contains(&CONFIG) {
            get.file(CONFIG)?;
        }
        files.iter().filter(|name| is_companion(name)).try_for_each(|name| get.file(name))
    }

    /// The error for a repository without a file, and what it has instead.
    fn lacks(&self, files: &[&str], name: &str) -> Error {
        let has = |end: &str| files.iter().any(|file| file.ends_with(end));
        let ggufs: Vec<&str> = files.iter().copied().filter(|file| file.ends_with(".gguf")).collect();
        let adapters: Vec<&str> = files.iter().filter_map(|file| file.strip_suffix("/adapter_config.json")).collect();
        let hint = if let Wanted::Adapter(_) = self.wanted {
            if !adapters.is_empty() {
                format!("; adapters are in its folders {}: name one as subfolder", adapters.join(", "))
            } else {
                "; it is not an adapter of PEFT".to_owned()
            }
        } else if !ggufs.is_empty() {
            format!("; name one of its GGUF files as {}:FILE: {}", self.id, ggufs.join(", "))
        } else if has("adapter_config.json") {
            "; it is an adapter: open the model it was trained on, and load the adapter separately".to_owned()
        } else if name == "safetensors" && (has(".bin") || has(".pth")) {
            "; of PyTorch's pickles only pytorch_model.bin and shards with pytorch_model.bin.index.json are read"
                .to_owned()
        } else {
            String::new()
        };
        Error::Invalid(format!("{} at {} has no {name}{hint}", self.id, self.settings.revision))
    }
}

/// The files of one commit.
struct Downloads<'a> {
    api: &'a Api,
    repo: ApiRepo,
    folder: &'a Path,
    explain: &'a dyn Fn(ApiError, &str) -> Error,
}

impl Downloads<'_> {
    fn file(&self, name: &str) -> Result<()> {
        if self.folder.join(name).is_file() {
            return Ok(());
        }
        let url = self.repo.url(name);
        let explain = |error| (self.explain)(error, name);
        if blobs::link(self.api, &url, self.folder, name).map_err(explain)? {
            return Ok(());
        }
        tracing::info!("downloading {url}");
        self.repo.download(name).map(drop).map_err(|error| (self.explain)(error, name))
    }
}

/// Whether a revision is a full commit hash.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
}

#[cfg(test)]
#[path = "hub/tests.rs"]
mod tests;
