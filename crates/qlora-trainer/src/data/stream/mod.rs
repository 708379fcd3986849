//! Training data that is read while it is trained on: the memory it takes does not depend on its size.
//!
//! Rows are read, encoded and mixed in their order up to a **block** of `buffer_size` documents (or [`BLOCK_TOKENS`], if they are
//! long), which is shuffled as a whole; another thread reads the next block meanwhile. A document moves within its block only:
//! data that is sorted has to be shuffled before. Files are read again for each epoch.
//!
//! Where a run is in the data is where its block begins, and how much of the block is used up ([`StreamPosition`]): going on means
//! reading that block again, which is then shuffled in the same way.
//!
//! | module | what it is |
//! |---|---|
//! | `reader` | the documents of all sets in the order of the mixture, block by block |
//! | `loader` | whole optimizer steps |

mod loader;
mod reader;

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::dataset::Dataset;
use super::encode::{EncodeOptions, TextEncoder};
use super::load::RowSet;
use super::rows::STDIN;
use crate::config::{MixStrategy, TrainConfig};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;

pub use loader::StreamLoader;
pub(crate) use loader::largest_batch;
pub use reader::ReaderPosition;
use reader::{BlockReader, Documents};

/// The most tokens of a block: about 40 MB. There are two blocks at a time, one that is used up and one that is read.
pub const BLOCK_TOKENS: usize = 8 << 20;

/// An encoder that another thread may use.
pub type SharedEncoder = Arc<dyn TextEncoder + Send + Sync>;

/// Options of reading a stream.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct StreamOptions {
    /// Options of encoding: the treatment of long documents, and the mask of trained tokens.
    pub encode: EncodeOptions,
    /// Documents of fewer tokens are left out.
    pub min_sample_len: usize,
    /// Only the first so many rows of each set are read.
    pub max_samples: Option<usize>,
    /// The way several data sets are combined.
    pub mix_strategy: MixStrategy,
    /// The probability of each set where they are interleaved; none if they take turns.
    pub interleave_probs: Vec<f64>,
    /// The documents of a block.
    pub buffer_size: usize,
    /// So many documents at the beginning are not trained on.
    pub val_size: usize,
    /// Seed of the mixture.
    pub seed: u64,
}

impl From<&TrainConfig> for StreamOptions {
    fn from(config: &TrainConfig) -> Self {
        let data = &config.data;
        Self {
            encode: EncodeOptions::from(data),
            min_sample_len: data.min_sample_len,
            max_samples: data.max_samples,
            mix_strategy: data.mix_strategy,
            interleave_probs: data.interleave_probs.clone(),
            buffer_size: data.buffer_size,
            val_size: data.val_size as usize,
            seed: config.training.resolved_data_seed(),
        }
    }
}

/// The position of a run in a stream. It goes on from there with the same documents in the same order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamPosition {
    /// The position at which the block begins.
    pub block: ReaderPosition,
    /// Items (documents or bins) of the block that are used up.
    pub items: usize,
}

/// The constant inputs of a stream's reader.
#[derive(Clone)]
pub(super) struct Shared {
    sets: Arc<[RowSet]>,
    encoder: SharedEncoder,
    options: StreamOptions,
}

/// Training data that is read while it is trained on. Its first block is read already.
pub struct Stream {
    shared: Shared,
    /// The position at which an epoch begins: behind the documents that are evaluated on.
    start: ReaderPosition,
    first: Documents,
    /// Goes on behind the first block. Kept, because what comes through a pipe cannot be opened again.
    reader: BlockReader,
    identity: String,
}

impl Stream {
    /// Opens the sets and reads the first documents: `val_size` to evaluate on, if that is not 0, and a block to train on.
    ///
    /// # Errors
    /// As [`load`](super::load::load) for these rows; those behind them are looked at when their turn comes.
    pub fn open(sets: Vec<RowSet>, encoder: SharedEncoder, options: StreamOptions) -> Result<(Self, Option<Dataset>)> {
        let shared = Shared { sets: sets.into(), encoder, options };
        let mut reader = BlockReader::new(shared.clone());
        let mut validation = None;
        if shared.options.val_size > 0 {
            let documents = reader.documents(shared.options.val_size)?;
            if documents.dataset.len() < shared.options.val_size || documents.last {
                let (size, found) = (shared.options.val_size, documents.dataset.len());
                return Err(Error::Invalid(format!(
                    "val_size = {size} in [data] takes all {found} documents: none is left to train on"
                )));
            }
            validation = Some(documents.dataset);
        }
        reader.begin_here();
        let start = reader.position().clone();
        let first = reader.block()?;
        let identity = identity(&shared.sets, &first.dataset);
        Ok((Self { shared, start, first, reader, identity }, validation))
    }

    /// The fingerprint of these data, as far as it can be computed without reading all of them.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The documents that were read so far: the first block.
    pub fn first_block(&self) -> &Dataset {
        &self.first.dataset
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream")
            .field("sets", &self.shared.sets)
            .field("options", &self.shared.options)
            .finish_non_exhaustive()
    }
}

/// Whether a path can be read once only: standard input, or a pipe with a name.
pub(super) fn is_pipe(path: &Path) -> bool {
    path == Path::new(STDIN) || std::fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir())
}

/// Stands for the data, as far as that can be said without reading it: the number and sizes of the files, and the tokens of the
/// first documents.
fn identity(sets: &[RowSet], first: &Dataset) -> String {
    const COMPARED: usize = 256;
    let files: Vec<&Path> = sets.iter().flat_map(|set| &set.files).map(|file| file.path.as_path()).collect();
    let mut fingerprint = Fingerprint::new();
    for path in &files {
        let size = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file).map_or(0, |found| found.len());
        fingerprint.word(size);
    }
    for i in 0..first.len().min(COMPARED) {
        let document = first.document(i);
        for (&id, &trained) in document.ids.iter().zip(document.trained) {
            fingerprint.word(u64::from(id) << 1 | u64::from(trained));
        }
        fingerprint.word(u64::MAX);
    }
    let count = files.len();
    format!("a stream of {count} {}, fingerprint {fingerprint}", if count == 1 { "file" } else { "files" })
}

#[cfg(test)]
mod tests;
