//! Tokenized rows, kept on the disk: a run that is started again reads tokens instead of making them.
//!
//! A set of rows has a folder, named after everything that its tokens depend on: the contents of its files, the tokenizer, the chat
//! template, the options of encoding, the mapping of its columns, and the versions of this format, of the encoding and of its
//! libraries. In it lie
//! **shards**, each the rows of a stretch of a file, with the position in the files at which it begins and ends. They are
//! written one after the other while rows are tokenized, so what a killed run has made is there for the next one, which goes on
//! behind it. A shard that is damaged is made again. Filters, mixtures and splits come later and are no part of it.
//!
//! The cache is a convenience: where it cannot be read or written, a run goes on without, with a warning.

mod shard;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use qlora_core::hf_home::hf_home;
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::encode::{ENCODING, EncodeOptions, LIBRARIES, TextEncoder};
use super::load::{EncodedRow, RowSet};
use super::rows::RowPosition;
use super::stream::is_pipe;
use crate::config::TrainConfig;
use crate::fingerprint::Fingerprint;
use shard::{END_FILE, read_end, shard_name};

pub(super) use writer::Writer;

/// Sets whose files are smaller are tokenized in less time than it takes to notice.
const MIN_BYTES: u64 = 1 << 20;

/// A shard with as many rows gets no more.
const SHARD_ROWS: usize = 16_384;

/// A shard with as many bytes gets no more: several are in memory at once, and a row has up to a model's context of tokens.
const SHARD_BYTES: usize = 32 << 20;

/// The folder of tokenized rows, and what may be done with it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TokenCache {
    /// The folder; it need not exist.
    pub folder: PathBuf,
    /// Whether rows that are tokenized are kept.
    pub write: bool,
    /// Whether what is there is made again.
    pub overwrite: bool,
    /// Sets of files that are smaller together, in bytes, are not kept. Default: 1 MiB.
    pub min_bytes: u64,
}

impl TokenCache {
    /// A cache in `folder`, read and written.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), write: true, overwrite: false, min_bytes: MIN_BYTES }
    }

    /// The configured one; none if it is switched off, or there is no home folder. `writes` is false where a run is only planned.
    pub fn of(config: &TrainConfig, writes: bool) -> Option<Self> {
        let data = &config.data;
        if !data.dataset_cache {
            return None;
        }
        let folder = data.dataset_prepared_path.clone().or_else(default_folder)?;
        Some(Self { write: writes, overwrite: data.overwrite_cache, ..Self::new(folder) })
    }

    /// The folder of a set; none if its rows cannot be told apart from others, or are too few.
    pub(super) fn of_set(
        &self,
        set: &RowSet,
        encoder: &dyn TextEncoder,
        options: &EncodeOptions,
    ) -> Option<CachedSet<'_>> {
        let files = set.files.iter().map(|file| file.path.as_path());
        let sizes: Option<Vec<u64>> = files.clone().map(size).collect();
        if sizes?.iter().sum::<u64>() < self.min_bytes {
            return None;
        }
        let mut key = Fingerprint::new();
        key.word(u64::from(shard::VERSION)).word(u64::from(ENCODING)).word(encoder.fingerprint()?.value());
        for text in [env!("CARGO_PKG_VERSION"), &format!("{options:?}"), &format!("{:?}", set.mapping)] {
            key.bytes(text.as_bytes());
        }
        for (library, version) in LIBRARIES {
            key.bytes(library.as_bytes()).bytes(version.as_bytes());
        }
        for file in &set.files {
            let content = match of_content(&file.path) {
                Ok(content) => content,
                Err(error) => {
                    tracing::debug!("{}: no tokens are kept: {error}", file.path.display());
                    return None;
                }
            };
            key.bytes(file.format.as_deref().unwrap_or_default().as_bytes()).word(content.value());
            // The content alone does not say the format of every file.
            let name = file.path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
            key.bytes(name.split_once('.').map_or("", |(_, extensions)| extensions).as_bytes());
        }
        let folder = self.folder.join(key.to_string());
        Some(CachedSet { cache: self, folder, files: set.files.len(), next: 0, tokenizes: self.overwrite })
    }
}

/// Beside what Python's `datasets` keeps.
fn default_folder() -> Option<PathBuf> {
    let env = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let datasets = env("HF_DATASETS_CACHE").map(PathBuf::from).or_else(|| Some(hf_home(env)?.join("datasets")));
    datasets.map(|folder| folder.join("qlora-tokens"))
}

/// The size of a file; none for a pipe or what is not there.
fn size(path: &Path) -> Option<u64> {
    if is_pipe(path) { None } else { std::fs::metadata(path).ok().map(|found| found.len()) }
}

/// Stands for the content of a file.
fn of_content(path: &Path) -> io::Result<Fingerprint> {
    const PIECE: u64 = 4 << 20;
    let length = std::fs::metadata(path)?.len();
    let piece = |i: u64| -> io::Result<u64> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(i * PIECE))?;
        let mut bytes = Vec::with_capacity(PIECE as usize);
        file.take(PIECE).read_to_end(&mut bytes)?;
        Ok(Fingerprint::new().bytes(&bytes).value())
    };
    let pieces: Vec<u64> = (0..length.div_ceil(PIECE)).into_par_iter().map(piece).collect::<io::Result<_>>()?;
    let mut fingerprint = Fingerprint::new();
    fingerprint.word(length);
    for piece in pieces {
        fingerprint.word(piece);
    }
    Ok(fingerprint)
}

/// The shards of a set, one after the other.
pub(super) struct CachedSet<'a> {
    cache: &'a TokenCache,
    folder: PathBuf,
    /// The files of the set.
    files: usize,
    /// The number of the next shard.
    next: usize,
    /// Nothing is read any more: what comes now is made.
    tokenizes: bool,
}

impl CachedSet<'_> {
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The rows and tokens of the shards that are there, as they say themselves.
    pub(super) fn promised(&self) -> (u64, u64) {
        if self.tokenizes {
            return (0, 0);
        }
        let promise = |i: usize| {
            let path = self.folder.join(shard_name(i));
            let (head, bytes) = (shard::read_head(&path).ok()?, size(&path)?);
            // A file that is cut off has fewer than its head says, and none has more words than fit into it.
            Some((head.rows.min(bytes / 4), head.tokens.min(bytes / 4)))
        };
        (0..).map_while(promise).fold((0, 0), |sum, shard| (sum.0 + shard.0, sum.1 + shard.1))
    }

    /// The next shard, if it begins at this position: its file among those of the set, its rows, and the position behind it.
    pub(super) fn read(&mut self, at: RowPosition) -> Option<(usize, Vec<EncodedRow>, RowPosition)> {
        if self.tokenizes {
            return None;
        }
        let path = self.folder.join(shard_name(self.next));
        match shard::read(&path) {
            Ok((head, rows)) if head.start == at && head.file < self.files => {
                self.next += 1;
                Some((head.file, rows, head.end))
            }
            // Of another stretch, because the one before it was made again; or of a file that the set does not have.
            Ok(_) => None,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!("{}: {error}; its rows are tokenized again", path.display());
                None
            }
        }
    }

    /// Whether the set is known to end at this position.
    pub(super) fn ends_at(&self, at: RowPosition) -> bool {
        !self.tokenizes && read_end(&self.folder.join(END_FILE)).is_ok_and(|end| end == at)
    }

    /// What keeps rows from here on, as the next shards; none if the cache is not written.
    pub(super) fn writer(&self, at: RowPosition) -> Option<Writer> {
        self.cache.write.then(|| Writer::new(self.folder.clone(), self.next, at))
    }

    /// Whether the shard of this number is there and begins at this position.
    pub(super) fn goes_on_with(&self, number: usize, at: RowPosition) -> bool {
        !self.tokenizes && shard::read_head(&self.folder.join(shard_name(number))).is_ok_and(|head| head.start == at)
    }

    /// Goes on with the shard of this number.
    pub(super) fn skip_to(&mut self, number: usize) {
        self.next = number;
    }
}
