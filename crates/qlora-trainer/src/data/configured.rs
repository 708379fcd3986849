//! The data of a configuration.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use qlora_core::hub_id;
use qlora_core::open::OpenOptions;

use super::cache::TokenCache;
#[cfg(feature = "hub")]
use super::card::Refusal;
use super::card::{Wanted, select};
use super::dataset::Dataset;
use super::encode::{EncodeOptions, TextEncoder};
use super::feed::TrainingData;
use super::load::{self, Filters, RowSet};
use super::mapping::Mapping;
use super::mix::{mixed, split};
use super::rows::{DataFile, data_extension, data_extensions, expand};
use super::stream::{Stream, StreamOptions, is_pipe};
use crate::config::{DataOptions, DatasetOptions, Paths, TrainConfig};
use crate::encoder::{ModelEncoder, OwnedEncoder};
use crate::error::{Error, Result};

/// The sets that a configuration trains on. Their files are found, those on the hub downloaded; none is read.
///
/// # Errors
/// If a folder or pattern has no data files, or the hub does not have a data set or does not give it.
pub fn training_sets(config: &TrainConfig) -> Result<Vec<RowSet>> {
    sets(&config.data.train_file, &config.data.datasets, &hub(config))
}

impl RowSet {
    /// The files that paths mean, as `train_file` in a configuration: files, folders, patterns, `-` for standard input, or data
    /// sets on the hub, which are downloaded as `options` say.
    ///
    /// # Errors
    /// As [`training_sets`]; also without any path.
    pub fn find(paths: &[PathBuf], options: &OpenOptions) -> Result<Self> {
        let found = sets(&Paths::Many(paths.to_vec()), &[], options)?.pop();
        found.ok_or_else(|| Error::Invalid("no data is named".to_owned()))
    }
}

fn hub(config: &TrainConfig) -> OpenOptions {
    OpenOptions {
        cache_dir: config.model.cache_dir.clone(),
        offline: config.model.local_files_only,
        progress: true,
        ..OpenOptions::default()
    }
}

/// The sets to train on, and those to evaluate on. Their files are found, those on the hub downloaded; none is read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sets {
    pub(crate) training: Vec<RowSet>,
    pub(crate) validation: Vec<RowSet>,
}

impl Sets {
    /// # Errors
    /// If a folder or pattern has no data files, or the hub does not have a data set or does not give it.
    pub(crate) fn find(config: &TrainConfig) -> Result<Self> {
        Self::find_with(&config.data, &hub(config))
    }

    fn find_with(data: &DataOptions, hub: &OpenOptions) -> Result<Self> {
        Ok(Self {
            training: sets(&data.train_file, &data.datasets, hub)?,
            validation: sets(&data.validation_file, &data.test_datasets, hub)?,
        })
    }

    /// Checks that all rows can be read and are in a known format; of pipes, which can be read once only, nothing is read.
    ///
    /// # Errors
    /// The first problem, with its file and line or row.
    pub(crate) fn check(&self) -> Result<()> {
        let is_file = |set: &&RowSet| set.files.iter().all(|file| !is_pipe(&file.path));
        self.training.iter().chain(&self.validation).filter(is_file).try_for_each(load::check)
    }

    /// A pipe or standard input among the files, which can be read once only.
    pub(crate) fn pipe(&self) -> Option<&Path> {
        let files = self.training.iter().chain(&self.validation).flat_map(|set| &set.files);
        files.map(|file| file.path.as_path()).find(|path| is_pipe(path))
    }

    /// Reads the data, or opens it if it is read while it is trained on. `writes` lets tokens be kept for the next start.
    ///
    /// # Errors
    /// As [`Sets::load`]; of a stream for the documents that are read first.
    pub(crate) fn open(
        self,
        config: &TrainConfig,
        encoder: ModelEncoder<'_>,
        writes: bool,
    ) -> Result<(TrainingData, Option<Dataset>)> {
        let cache = TokenCache::of(config, writes);
        if !config.data.streaming {
            let (training, validation) = self.load(config, &encoder, cache.as_ref())?;
            return Ok((training.into(), validation));
        }
        let (options, filters) = (EncodeOptions::from(&config.data), Filters::from(&config.data));
        let mut validation = match self.validation.as_slice() {
            [] => None,
            sets => {
                let filters = Filters { max_samples: None, ..filters };
                Some(read(sets, &encoder, &options, &filters, cache.as_ref())?.0)
            }
        };
        let encoder = Arc::new(OwnedEncoder::from(encoder));
        let (stream, first) = Stream::open(self.training, encoder, StreamOptions::from(config))?;
        validation = validation.or(first);
        Ok((stream.into(), validation))
    }

    /// Reads all of it into memory: the training data, and the validation data if there is some.
    ///
    /// # Errors
    /// The first problem, with its file and line or row; if nothing is left, or `val_size` leaves nothing to train on.
    pub(crate) fn load(
        &self,
        config: &TrainConfig,
        encoder: &dyn TextEncoder,
        cache: Option<&TokenCache>,
    ) -> Result<(Dataset, Option<Dataset>)> {
        let (data, seed) = (&config.data, config.training.resolved_data_seed());
        let options = EncodeOptions::from(data);
        let (mut training, ranges) = read(&self.training, encoder, &options, &Filters::from(data), cache)?;
        let mut validation = match self.validation.as_slice() {
            [] => None,
            sets => {
                let filters = Filters { max_samples: None, ..Filters::from(data) };
                Some(read(sets, encoder, &options, &filters, cache)?.0)
            }
        };
        // The documents of a group are of one row: they are drawn and split off together.
        let size = training.group_size();
        let documents_of =
            |groups: &[usize]| groups.iter().flat_map(|group| size * group..size * (group + 1)).collect::<Vec<usize>>();
        let mut groups: Vec<usize> = (0..training.len() / size).collect();
        if data.val_size > 0.0 {
            let count = validation_count(data.val_size, groups.len())?;
            let (left, taken) = split(groups.len(), count, seed);
            validation = Some(training.copy_of(&documents_of(&taken)));
            groups = left;
        }
        let plain = self.training.iter().all(|set| set.num_samples.is_none() && set.fraction.is_none());
        if !plain || data.val_size > 0.0 || self.training.len() > 1 {
            let of_set = |range: &std::ops::Range<usize>| {
                groups.iter().copied().filter(|group| range.contains(&(size * group))).collect()
            };
            let of_sets: Vec<Vec<usize>> = ranges.iter().map(of_set).collect();
            let mixture = mixed(&self.training, of_sets, data.mix_strategy, &data.interleave_probs, seed);
            if mixture.is_empty() {
                return Err(Error::Invalid(
                    "the mixture of the data sets is empty: one of them has no rows left".to_owned(),
                ));
            }
            training.select(&documents_of(&mixture));
        }
        Ok((training, validation))
    }
}

/// Loads sets under a progress bar, which is shown on terminals and not with `-q`.
fn read(
    sets: &[RowSet],
    encoder: &dyn TextEncoder,
    options: &EncodeOptions,
    filters: &Filters,
    cache: Option<&TokenCache>,
) -> Result<(Dataset, Vec<std::ops::Range<usize>>)> {
    let bar = match tracing::enabled!(tracing::Level::WARN) {
        true => ProgressBar::new_spinner(),
        false => ProgressBar::hidden(),
    };
    let style = ProgressStyle::with_template("{spinner} data: {human_pos} rows, {per_sec}");
    bar.set_style(style.expect("the template is valid"));
    let loaded = load::load_cached(sets, encoder, options, filters, cache, &mut |rows| bar.set_position(rows as u64));
    bar.finish_and_clear();
    loaded
}

impl From<&DataOptions> for Filters {
    fn from(data: &DataOptions) -> Self {
        Self {
            max_samples: data.max_samples,
            min_sample_len: data.min_sample_len,
            exact_deduplication: data.dataset_exact_deduplication,
        }
    }
}

/// The documents that are split off: a number, or a share, which is rounded up as in transformers and datasets.
fn validation_count(val_size: f64, documents: usize) -> Result<usize> {
    let count = if val_size < 1.0 { (val_size * documents as f64).ceil() } else { val_size } as usize;
    if count >= documents {
        return Err(Error::Invalid(format!(
            "val_size = {val_size} in [data] takes all {documents} documents: none is left to train on"
        )));
    }
    Ok(count)
}

/// The files form one set, and every entry another one.
fn sets(files: &Paths, entries: &[DatasetOptions], hub: &OpenOptions) -> Result<Vec<RowSet>> {
    let mut sets = Vec::new();
    if !files.is_empty() {
        let mut found = Vec::new();
        for path in files.as_slice() {
            found.extend(files_of(&DatasetOptions::from(path.as_path()), hub)?.into_iter().map(DataFile::new));
        }
        sets.push(RowSet::new(found));
    }
    for entry in entries {
        let files = files_of(entry, hub)?;
        let file = |path| DataFile { path, format: entry.ds_type.clone() };
        sets.push(RowSet {
            mapping: Mapping::new(entry).map_err(|message| refuse(entry, message))?,
            num_samples: entry.num_samples,
            fraction: entry.fraction,
            ..RowSet::new(files.into_iter().map(file).collect())
        });
    }
    Ok(sets)
}

fn refuse(entry: &DatasetOptions, message: String) -> Error {
    Error::Invalid(format!("the data set {}: {message}", entry.path.display()))
}

/// The files of an entry: here if its path exists or can be no id, otherwise those of a data set on the hub.
fn files_of(entry: &DatasetOptions, hub: &OpenOptions) -> Result<Vec<PathBuf>> {
    let names: Vec<String> =
        entry.data_files.as_slice().iter().map(|name| name.to_string_lossy().into_owned()).collect();
    let wanted = Wanted {
        name: entry.name.as_deref(),
        split: entry.split.as_deref(),
        data_files: &names,
        data_dir: entry.data_dir.as_deref(),
    };
    if !entry.path.exists() && is_hub_id(&entry.path) {
        return hub_files(entry, wanted, hub);
    }
    let is_laid_out = wanted.name.is_some() || wanted.split.is_some() || wanted.data_dir.is_some();
    if !is_laid_out && names.is_empty() {
        return expand(&entry.path);
    }
    if !entry.path.is_dir() {
        // A file is all of one split, as `datasets` has it.
        let alone = names.is_empty() && wanted.name.is_none() && wanted.data_dir.is_none();
        if alone && wanted.split.is_none_or(|split| split == "train") {
            return expand(&entry.path);
        }
        return Err(refuse(
            entry,
            "it is no folder, so it has no `name`, `split`, `data_dir` or `data_files`".to_owned(),
        ));
    }
    let root = |path: &Path| path.strip_prefix(&entry.path).map(|name| name.to_string_lossy().replace('\\', "/"));
    let files: Vec<String> = expand(&entry.path)?.iter().filter_map(|path| root(path).ok()).collect();
    let card = std::fs::read_to_string(entry.path.join(CARD)).ok();
    let chosen = select(&files, card.as_deref(), wanted).map_err(|refusal| refuse(entry, refusal.into_message()))?;
    Ok(chosen.into_iter().map(|name| entry.path.join(name)).collect())
}

/// The file name of a data set's card, which describes its contents.
const CARD: &str = "README.md";

/// Whether a path that does not exist may be the id of a data set: `org/name`, or `name` alone.
fn is_hub_id(path: &Path) -> bool {
    let Some(text) = path.to_str() else { return false };
    let has_data_name = data_extension(path).is_some_and(|end| data_extensions().any(|known| known == end));
    hub_id::is_hub_id(text) && !has_data_name
}

#[cfg(feature = "hub")]
fn hub_files(entry: &DatasetOptions, wanted: Wanted<'_>, hub: &OpenOptions) -> Result<Vec<PathBuf>> {
    use std::cell::Cell;

    use qlora_core::hub::{PARQUET_REVISION, dataset_snapshot};

    let id = entry.path.to_string_lossy();
    // Whether what was listed has no data in a format that is read; none if nothing was listed.
    let no_data = Cell::new(None);
    let choose = |names: &[String], get: &dyn Fn(&str) -> qlora_core::Result<PathBuf>| {
        let needs_card = wanted.data_files.is_empty() && names.iter().any(|name| name == CARD);
        let card = if needs_card { std::fs::read_to_string(get(CARD)?).ok() } else { None };
        select(names, card.as_deref(), wanted).map_err(|refusal| {
            no_data.set(Some(matches!(refusal, Refusal::NoData(_))));
            qlora_core::Error::Invalid(format!("{id}: {}", refusal.into_message()))
        })
    };
    let options = OpenOptions { revision: entry.revision.clone(), ..hub.clone() };
    let error = match dataset_snapshot(&id, &options, &choose) {
        Ok(snapshot) => return Ok(snapshot.files),
        Err(error) => error,
    };
    if no_data.get() == Some(false) || entry.revision.is_some() || !wanted.data_files.is_empty() {
        return Err(error.into());
    }
    // Where the hub cannot be asked, the cache may have the export.
    let offline = options.offline || no_data.get().is_none();
    let exported = OpenOptions { revision: Some(PARQUET_REVISION.to_owned()), offline, ..options };
    match dataset_snapshot(&id, &exported, &choose) {
        Ok(snapshot) => {
            tracing::info!("{id}: the rows of the hub's export as Parquet ({error})");
            Ok(snapshot.files)
        }
        Err(_) if offline => Err(error.into()),
        Err(of_export) => {
            Err(Error::Invalid(format!("{error}; nor does the hub's export as Parquet help: {of_export}")))
        }
    }
}

#[cfg(not(feature = "hub"))]
fn hub_files(entry: &DatasetOptions, _: Wanted<'_>, _: &OpenOptions) -> Result<Vec<PathBuf>> {
    Err(refuse(
        entry,
        "there is no such file or folder, and this program was built without the hub (feature `hub`)".to_owned(),
    ))
}

#[cfg(test)]
mod tests;
