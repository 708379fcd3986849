//! Sets of rows to a [`Dataset`] in memory: read, mapped, encoded in parallel, filtered.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::cache::TokenCache;
use super::dataset::{Dataset, DropReason, Unused};
use super::encode::{EncodeOptions, Encoded, Notes, RowOutcome, TextEncoder, encode};
use super::mapping::Mapping;
use super::pipeline::{Origins, Pipeline};
use super::record::{Record, Row};
use super::rows::{DataFile, RawRow, RowPlace, RowSource};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;

/// Rows that are encoded together, in parallel; bounds the memory that undecoded rows take.
pub(super) const CHUNK: usize = 2048;

/// Files whose rows belong together, and the roles of their columns.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct RowSet {
    /// The files, in order.
    pub files: Vec<DataFile>,
    /// The mapping of the columns.
    pub mapping: Mapping,
    /// As many rows, drawn at random.
    pub num_samples: Option<usize>,
    /// The share of the mixture.
    pub fraction: Option<f64>,
}

impl RowSet {
    /// A set without a mapping: the format is found out from its rows.
    pub fn new(files: Vec<DataFile>) -> Self {
        Self { files, ..Self::default() }
    }

    /// Its rows, read as they are asked for. Those that cannot be used are among them.
    pub fn rows(&self) -> Rows<'_> {
        Rows {
            set: self,
            source: RowSource::new(self.files.clone()),
            file: 0,
            read: Vec::new().into_iter(),
            failed: false,
        }
    }

    fn names(&self) -> impl Iterator<Item = String> + '_ {
        self.files.iter().map(|file| file.path.display().to_string())
    }
}

/// A row of a set.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PlacedRow<'a> {
    /// Its file.
    pub path: &'a Path,
    /// The place of the row in its file.
    pub place: RowPlace,
    /// The row as its columns are mapped; or a description of its problem.
    pub row: std::result::Result<Row, String>,
}

/// The rows of a set. After an error of a file there are none.
pub struct Rows<'a> {
    set: &'a RowSet,
    source: RowSource,
    file: usize,
    read: std::vec::IntoIter<RawRow>,
    failed: bool,
}

impl<'a> Iterator for Rows<'a> {
    type Item = Result<PlacedRow<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.read.next() {
                let place = row.place();
                let path = self.set.files[self.file].path.as_path();
                return Some(Ok(PlacedRow { path, place, row: read(row, &self.set.mapping) }));
            }
            if self.failed {
                return None;
            }
            match self.source.next(CHUNK) {
                Ok(next) => {
                    let (file, rows) = next?;
                    (self.file, self.read) = (file, rows.into_iter());
                }
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
    }
}

/// The filters that leave rows out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Filters {
    /// Only the first so many rows of each set are read.
    pub max_samples: Option<usize>,
    /// Documents of fewer tokens are left out.
    pub min_sample_len: usize,
    /// Of documents with the same tokens, of which the same are trained, the first one stays.
    pub exact_deduplication: bool,
}

/// Reads and encodes sets of rows, one behind the other; returns which documents are of which set.
///
/// # Errors
/// The first problem, with its file and line or row: a file that cannot be read or is in no known format, a row in no known
/// format or without a column that is named, one without a token to train on or that is too long (if the options say so). Also
/// files without any row, and files of which nothing is left.
pub fn load(
    sets: &[RowSet],
    encoder: &dyn TextEncoder,
    options: &EncodeOptions,
    filters: &Filters,
) -> Result<(Dataset, Vec<Range<usize>>)> {
    load_cached(sets, encoder, options, filters, None, &mut |_| ())
}

/// As [`load`], with rows that were tokenized before out of a cache; `watch` is called with the number of rows that are ready.
/// The data are the same, but for [`Dataset::remarks`], which say what the cache did.
///
/// # Errors
/// As [`load`]; that the cache cannot be read or written is none.
pub fn load_cached(
    sets: &[RowSet],
    encoder: &dyn TextEncoder,
    options: &EncodeOptions,
    filters: &Filters,
    cache: Option<&TokenCache>,
    watch: &mut (dyn FnMut(usize) + Send),
) -> Result<(Dataset, Vec<Range<usize>>)> {
    let start = Instant::now();
    let mut dataset = Dataset::new();
    let mut known = filters.exact_deduplication.then(Known::default);
    let (mut ranges, mut prepared) = (Vec::new(), Prepared::new());
    for set in sets {
        let (cached, folders) = (cache.and_then(|cache| cache.of_set(set, encoder, options)), prepared.folders.len());
        if let Some(cached) = &cached {
            prepared.folders.push(cached.folder().to_owned());
            let (rows, tokens) = cached.promised();
            dataset.reserve(rows as usize, tokens as usize);
        }
        let first = dataset.len();
        let most = filters.max_samples.unwrap_or(usize::MAX);
        // Of the set's files, the last one and its place among those of the data set.
        let mut file: Option<(usize, u32)> = None;
        let mut sink = |i: usize, rows: Vec<EncodedRow>| {
            take_rows(set, i, rows, filters, &mut file, &mut known, &mut dataset)?;
            watch(dataset.stats().rows);
            Ok(())
        };
        let origins = Pipeline::new(set, encoder, options, most).run(cached, &mut sink)?;
        // The others are too small to be worth a word.
        if prepared.folders.len() > folders {
            prepared.add(origins);
        }
        ranges.push(first..dataset.len());
    }
    if dataset.is_empty() {
        let names: Vec<_> = sets.iter().flat_map(RowSet::names).collect();
        let stats = dataset.stats();
        return Err(Error::Invalid(format!("{}: none of {} rows is left: {stats}", names.join(", "), stats.rows)));
    }
    if !prepared.folders.is_empty() {
        dataset.note(prepared.describe(start.elapsed()));
    }
    tracing::debug!(files = sets.iter().map(|set| set.files.len()).sum::<usize>(), "{}", dataset.stats());
    Ok((dataset, ranges))
}

/// The part that the cache had in a data set.
struct Prepared {
    folders: Vec<PathBuf>,
    origins: Origins,
}

impl Prepared {
    fn new() -> Self {
        Self { folders: Vec::new(), origins: Origins { kept: true, ..Origins::default() } }
    }

    fn add(&mut self, Origins { cached, tokenized, kept }: Origins) {
        self.origins.cached += cached;
        self.origins.tokenized += tokenized;
        self.origins.kept &= kept;
    }

    /// One line.
    fn describe(&self, took: Duration) -> String {
        let Origins { cached, tokenized, kept } = self.origins;
        let seconds = took.as_secs_f64();
        let folders: Vec<String> = self.folders.iter().map(|folder| folder.display().to_string()).collect();
        let folders = folders.join(", ");
        if tokenized == 0 {
            return format!("{cached} rows are ready out of the cache, in {seconds:.1} s ({folders})");
        }
        let speed = tokenized as f64 / seconds.max(1e-3);
        let others = if cached > 0 { format!("{cached} rows out of the cache, ") } else { String::new() };
        let kept = if kept { format!("; kept for the next start ({folders})") } else { String::new() };
        format!("{others}{tokenized} rows tokenized, in {seconds:.1} s ({speed:.0} rows/s){kept}")
    }
}

/// Adds the documents of rows of one file, as far as the filters leave them.
fn take_rows(
    set: &RowSet,
    i: usize,
    rows: Vec<EncodedRow>,
    filters: &Filters,
    file: &mut Option<(usize, u32)>,
    known: &mut Option<Known>,
    dataset: &mut Dataset,
) -> Result<()> {
    let path = &set.files[i].path;
    for EncodedRow { place, outcome, unused } in rows {
        let index = match *file {
            Some((of, index)) if of == i => index,
            _ => dataset.add_file(path, matches!(place, RowPlace::Row(_))),
        };
        *file = Some((i, index));
        let origin = (index, place.number());
        dataset.note_unused(index, unused);
        dataset.count_row();
        match filtered(outcome, filters.min_sample_len) {
            Ok((documents, notes)) => {
                if known.as_mut().is_none_or(|known| known.is_new(&documents, dataset)) {
                    let pushed = dataset.push_row(&documents, notes, Some(origin));
                    pushed.map_err(|message| place.refuse(path, message))?;
                } else {
                    dataset.drop_row(origin, DropReason::Duplicate);
                }
            }
            Err(reason) => dataset.drop_row(origin, reason),
        }
    }
    Ok(())
}

/// Checks that every row can be read and is in a known format. Keeps nothing.
///
/// # Errors
/// As [`load`].
pub fn check(set: &RowSet) -> Result<()> {
    let mut source = RowSource::new(set.files.clone());
    while let Some((i, rows)) = source.next(CHUNK)? {
        let path = &set.files[i].path;
        let check = |row: RawRow| {
            let place = row.place();
            read(row, &set.mapping).map(drop).map_err(|message| place.refuse(path, message))
        };
        // The first problem in the order of the file.
        rows.into_par_iter().map(check).collect::<Vec<_>>().into_iter().collect::<Result<()>>()?;
    }
    Ok(())
}

/// A row that was encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EncodedRow {
    pub(super) place: RowPlace,
    pub(super) outcome: RowOutcome,
    pub(super) unused: Unused,
}

impl EncodedRow {
    /// Whether [`filtered`] leaves something.
    pub(super) fn is_left(&self, min_sample_len: usize) -> bool {
        let is_long = |document: &Encoded| document.ids.len() >= min_sample_len;
        match &self.outcome {
            RowOutcome::Document(document, _) => is_long(document),
            RowOutcome::Group(documents, _) => documents.iter().all(is_long),
            _ => false,
        }
    }
}

/// Rows of one file as documents, in parallel, in their order.
pub(super) fn encode_rows(
    path: &Path,
    rows: Vec<RawRow>,
    mapping: &Mapping,
    encoder: &dyn TextEncoder,
    options: &EncodeOptions,
) -> Vec<Result<EncodedRow>> {
    let encode_one = |row: RawRow| {
        let place = row.place();
        let Row { record, unused: columns } = read(row, mapping).map_err(|message| place.refuse(path, message))?;
        let outcome = encode(&record, encoder, options).map_err(|message| place.refuse(path, message))?;
        let by_template = match &record {
            Record::Chat(conversation) => encoder.unused(conversation),
            _ => Vec::new(),
        };
        Ok(EncodedRow { place, outcome, unused: Unused { columns, by_template } })
    };
    rows.into_par_iter().map(encode_one).collect()
}

/// A row as a record. Also the columns that its mapping leaves out are unused.
fn read(row: RawRow, mapping: &Mapping) -> std::result::Result<Row, String> {
    let row = row.parse()?;
    let (row, left_out) = if mapping.is_empty() { (row, Vec::new()) } else { mapping.apply(row)? };
    let mut row = Row::from_json(&row)?;
    row.unused.extend(left_out);
    Ok(row)
}

/// A row's documents (several where they form a group), or why it is left out.
pub(super) fn filtered(
    outcome: RowOutcome,
    min_sample_len: usize,
) -> std::result::Result<(Vec<Encoded>, Notes), DropReason> {
    let is_short = |document: &Encoded| document.ids.len() < min_sample_len;
    match outcome {
        RowOutcome::Document(document, _) if is_short(&document) => Err(DropReason::Short),
        RowOutcome::Document(document, notes) => Ok((vec![document], notes)),
        RowOutcome::Group(documents, _) if documents.iter().any(is_short) => Err(DropReason::Short),
        RowOutcome::Group(documents, notes) => Ok((documents, notes)),
        RowOutcome::Overlong => Err(DropReason::Overlong),
        RowOutcome::Untrained => Err(DropReason::Untrained),
        RowOutcome::UntrainedAfterTruncation => Err(DropReason::UntrainedAfterTruncation),
    }
}

/// The documents that were seen: the place of each in the data set, by its fingerprint.
#[derive(Default)]
struct Known(HashMap<u64, u32>);

impl Known {
    /// Whether no row of the data set has the same documents; then the next one to be added is it.
    fn is_new(&mut self, documents: &[Encoded], dataset: &Dataset) -> bool {
        let mut fingerprint = Fingerprint::new();
        for document in documents {
            for (&id, &trained) in document.ids.iter().zip(&document.trained) {
                fingerprint.word(u64::from(id) << 1 | u64::from(trained));
            }
        }
        // Others of the same fingerprint stand behind it.
        let mut key = fingerprint.value();
        while let Some(&i) = self.0.get(&key) {
            let same = |(n, document): (usize, &Encoded)| {
                let at = i as usize + n;
                at < dataset.len()
                    && dataset.document(at).ids == document.ids
                    && dataset.document(at).trained == document.trained
            };
            if documents.iter().enumerate().all(same) {
                return false;
            }
            key = key.wrapping_add(1);
        }
        self.0.insert(key, dataset.len() as u32);
        true
    }
}

#[cfg(test)]
mod tests;
