//! The documents of a run, as tokens: one flat array of ids, one of flags, and where each document begins.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use qlora_core::batch::{Batch, IGNORE_INDEX};

use super::encode::{EncodeError, Encoded, Notes, TextEncoder};
use super::rows::RowPlace;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;

/// Tokenized documents with the tokens to train on, and where each came from.
#[derive(Clone, Debug)]
pub struct Dataset {
    ids: Vec<u32>,
    trained: Vec<bool>,
    bounds: Vec<usize>,
    /// Documents of a row: 2 for pairs.
    group_size: usize,
    origins: Vec<Origin>,
    files: Vec<File>,
    unused: Vec<Unused>,
    dropped: Vec<Dropped>,
    /// The documents that count, in their order; without it all of them.
    view: Option<Vec<u32>>,
    stats: DataStats,
    /// A remark on how the tokens were made.
    note: Option<String>,
}

/// A file that rows came from.
#[derive(Clone, Debug)]
struct File {
    path: PathBuf,
    /// Its rows are known by their number, not by a line.
    by_row: bool,
}

impl File {
    fn place(&self, number: u32) -> String {
        let place = if self.by_row { RowPlace::Row } else { RowPlace::Line };
        place(number as usize).in_file(&self.path)
    }
}

/// The reason why a row was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DropReason {
    /// It is longer than `max_length`.
    Overlong,
    /// It had nothing to train on to begin with.
    Untrained,
    /// Truncation left nothing to train on.
    UntrainedAfterTruncation,
    /// It is shorter than `min_sample_len`.
    Short,
    /// An earlier row has the same tokens, and the same of them are trained.
    Duplicate,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Overlong => "too long",
            Self::Untrained => "with nothing to train on",
            Self::UntrainedAfterTruncation => "with nothing to train on after truncation",
            Self::Short => "too short",
            Self::Duplicate => "the same as earlier ones",
        })
    }
}

/// A row that was left out.
#[derive(Clone, Copy, Debug)]
struct Dropped {
    origin: Origin,
    reason: DropReason,
}

/// The unused parts of a file's rows: names, in the order in which they occurred.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unused {
    /// Columns that mean nothing in the rows' format.
    pub(super) columns: Vec<String>,
    /// Columns that the chat template does not read.
    pub(super) by_template: Vec<String>,
}

/// A row's file (an index) and line or number.
#[derive(Clone, Copy, Debug)]
struct Origin {
    file: u32,
    line: u32,
}

impl Origin {
    fn new(file: u32, line: usize) -> Self {
        Self { file, line: u32::try_from(line).unwrap_or(u32::MAX) }
    }
}

/// One document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// For each, whether it is trained.
    pub trained: &'a [bool],
}

/// Statistics of the data that was read: rows, documents, and how many were cut or left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DataStats {
    /// Rows in the files.
    pub rows: usize,
    /// Documents made of them.
    pub documents: usize,
    /// Tokens in the documents.
    pub tokens: usize,
    /// Tokens with a loss.
    pub trained_tokens: usize,
    /// The longest document.
    pub longest: usize,
    /// Documents whose end was cut off.
    pub truncated: usize,
    /// Rows left out because they are too long.
    pub dropped_overlong: usize,
    /// Rows left out because they had nothing to train on to begin with.
    pub dropped_untrained: usize,
    /// Rows left out because truncation left nothing to train on.
    pub dropped_after_truncation: usize,
    /// Rows left out because they are too short.
    pub dropped_short: usize,
    /// Rows left out because an earlier one is the same.
    pub dropped_duplicates: usize,
    /// Documents that began with two BOS tokens, of which one was removed.
    pub double_bos: usize,
    /// Documents in which one token spans the end of the prompt and the start of the completion.
    pub boundary_merged: usize,
    /// Answers of the assistant that were not found in the text of their chat template, and are not trained.
    pub answers_not_found: usize,
    /// The line of the first of them in its file.
    pub first_not_found: Option<usize>,
}

impl Default for Dataset {
    fn default() -> Self {
        Self::new()
    }
}

impl Dataset {
    /// No documents yet.
    pub fn new() -> Self {
        Self {
            ids: Vec::new(),
            trained: Vec::new(),
            bounds: vec![0],
            group_size: 1,
            origins: Vec::new(),
            files: Vec::new(),
            unused: Vec::new(),
            dropped: Vec::new(),
            view: None,
            stats: DataStats::default(),
            note: None,
        }
    }

    /// Documents that were tokenized elsewhere.
    ///
    /// # Errors
    /// If one has no trained token, or not one flag a token; it is named by its place.
    pub fn from_encoded(documents: impl IntoIterator<Item = Encoded>) -> Result<Self> {
        let mut dataset = Self::new();
        for (i, document) in documents.into_iter().enumerate() {
            if document.ids.len() != document.trained.len() {
                let (ids, flags) = (document.ids.len(), document.trained.len());
                return Err(Error::Invalid(format!("document {i} has {ids} tokens and {flags} flags")));
            }
            if document.trained_tokens() == 0 {
                return Err(Error::Invalid(format!("document {i} has no token to train on")));
            }
            dataset.stats.rows += 1;
            dataset.push(&document, Notes::default(), None);
        }
        Ok(dataset)
    }

    /// Groups of documents that were tokenized elsewhere, all of `group_size`: pairs are a chosen and a rejected one.
    ///
    /// # Errors
    /// As [`Self::from_encoded`]; also if the documents do not make whole groups.
    pub fn from_groups(group_size: usize, documents: impl IntoIterator<Item = Encoded>) -> Result<Self> {
        let dataset = Self::from_encoded(documents)?;
        if group_size == 0 || !dataset.len().is_multiple_of(group_size) {
            let documents = dataset.len();
            return Err(Error::Invalid(format!("{documents} documents do not make groups of {group_size}")));
        }
        Ok(Self { group_size, ..dataset })
    }

    /// Documents of a row; they follow each other and are computed together. 1 for plain fine-tuning, 2 for pairs of a chosen
    /// and a rejected answer.
    pub fn group_size(&self) -> usize {
        self.group_size
    }

    /// The number of documents.
    pub fn len(&self) -> usize {
        self.view.as_ref().map_or(self.bounds.len() - 1, Vec::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A document.
    ///
    /// # Panics
    /// If there is no document `i`.
    pub fn document(&self, i: usize) -> Document<'_> {
        let range = self.range(i);
        Document { ids: &self.ids[range.clone()], trained: &self.trained[range] }
    }

    /// The number of tokens of a document.
    ///
    /// # Panics
    /// If there is no document `i`.
    pub fn document_len(&self, i: usize) -> usize {
        self.range(i).len()
    }

    /// The number of tokens of a document that have a loss.
    ///
    /// # Panics
    /// If there is no document `i`.
    pub fn trained_tokens(&self, i: usize) -> usize {
        // Nothing predicts a document's first token.
        self.document(i).trained.iter().skip(1).filter(|&&trained| trained).count()
    }

    /// The origin of a document: `train.jsonl:7`, `train.parquet, row 7`, or its place where it came from no file.
    pub fn origin(&self, i: usize) -> String {
        let place = self.stored(i).and_then(|i| self.origins.get(i)).and_then(|origin| self.place(*origin));
        place.unwrap_or_else(|| format!("document {i}"))
    }

    fn place(&self, origin: Origin) -> Option<String> {
        self.files.get(origin.file as usize).map(|file| file.place(origin.line))
    }

    /// The rows that were left out: where each stands, and why; file by file, in order.
    pub fn dropped(&self) -> impl Iterator<Item = (String, DropReason)> + '_ {
        self.dropped.iter().filter_map(|dropped| Some((self.place(dropped.origin)?, dropped.reason)))
    }

    /// The statistics of the data that was read.
    pub fn stats(&self) -> &DataStats {
        &self.stats
    }

    /// The largest token id.
    pub fn largest_token(&self) -> Option<u32> {
        (0..self.len()).filter_map(|i| self.document(i).ids.iter().copied().max()).max()
    }

    /// The first document that holds `token`.
    pub fn first_with_token(&self, token: u32) -> Option<usize> {
        (0..self.len()).find(|&i| self.document(i).ids.contains(&token))
    }

    /// Stands for all tokens, flags and document boundaries.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut fingerprint = Fingerprint::new();
        for i in 0..self.len() {
            let document = self.document(i);
            for (&id, &trained) in document.ids.iter().zip(document.trained) {
                fingerprint.word(u64::from(id) << 1 | u64::from(trained));
            }
            fingerprint.word(u64::MAX);
        }
        if self.group_size != 1 {
            fingerprint.word(self.group_size as u64);
        }
        fingerprint
    }

    /// Remarks, a line each: on the cache of tokens, where it was used; for each file and reason on columns that mean nothing in
    /// the rows' format, on those that the chat template does not read, and on rows that were left out.
    pub fn remarks(&self) -> Vec<String> {
        let list = |names: &[String]| {
            let shown: Vec<_> = names.iter().take(20).map(|name| format!("`{name}`")).collect();
            let more = names.len().saturating_sub(shown.len());
            shown.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
        };
        let mut remarks: Vec<String> = self.note.iter().cloned().collect();
        for (file, unused) in self.files.iter().zip(&self.unused) {
            let path = file.path.display();
            if !unused.columns.is_empty() {
                remarks.push(format!("{path}: columns that are not used: {}", list(&unused.columns)));
            }
            if !unused.by_template.is_empty() {
                remarks.push(format!("{path}: the chat template does not use: {}", list(&unused.by_template)));
            }
        }
        remarks.extend(self.remarks_on_dropped());
        remarks
    }

    /// Remarks on the rows that were left out: for each file and reason their number, and the first of them by number.
    fn remarks_on_dropped(&self) -> Vec<String> {
        const SHOWN: usize = 10;
        let mut groups: BTreeMap<(u32, DropReason), (usize, Vec<String>)> = BTreeMap::new();
        for Dropped { origin, reason } in &self.dropped {
            let (count, shown) = groups.entry((origin.file, *reason)).or_default();
            *count += 1;
            if shown.len() < SHOWN {
                shown.push(origin.line.to_string());
            }
        }
        let remark = |((file, reason), (count, shown)): ((u32, DropReason), (usize, Vec<String>))| {
            let file = &self.files[file as usize];
            let more = if count > SHOWN { format!(" and {} more", count - SHOWN) } else { String::new() };
            let rows = if count == 1 { "row" } else { "rows" };
            let places = match (file.by_row, count) {
                (true, _) => "number",
                (false, 1) => "line",
                (false, _) => "lines",
            };
            format!("{}: {count} {rows} left out, {reason}: {places} {}{more}", file.path.display(), shown.join(", "))
        };
        groups.into_iter().map(remark).collect()
    }

    /// Documents as a micro-batch, in the given order.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn batch(&self, documents: &[usize]) -> Batch {
        let labelled: Vec<_> = documents.iter().map(|&i| (self.document(i).ids, self.document(i).labels())).collect();
        Batch::from_documents(labelled.iter().map(|(ids, labels)| (*ids, labels.as_slice())))
    }

    /// Makes room for rows and tokens that are about to come.
    pub(super) fn reserve(&mut self, rows: usize, tokens: usize) {
        self.ids.reserve(tokens);
        self.trained.reserve(tokens);
        self.bounds.reserve(rows);
        self.origins.reserve(rows);
    }

    /// A remark on how the tokens were made.
    pub(super) fn note(&mut self, note: String) {
        self.note = Some(note);
    }

    /// `by_row` if its rows are known by their number, not by a line.
    pub(super) fn add_file(&mut self, path: &Path, by_row: bool) -> u32 {
        self.files.push(File { path: path.to_owned(), by_row });
        self.unused.push(Unused::default());
        (self.files.len() - 1) as u32
    }

    /// The file of this path, if it is there.
    pub(super) fn file_index(&self, path: &Path) -> Option<u32> {
        self.files.iter().rposition(|file| file.path == path).map(|i| i as u32)
    }

    /// Adds a document of another data set.
    pub(super) fn push_from(&mut self, other: &Self, i: usize) {
        if self.is_empty() {
            self.group_size = other.group_size;
        }
        let Document { ids, trained } = other.document(i);
        let document = Encoded { ids: ids.to_vec(), trained: trained.to_vec() };
        let origin = other.stored(i).and_then(|i| other.origins.get(i)).map(|origin| {
            let file = &other.files[origin.file as usize];
            let index = self.file_index(&file.path).unwrap_or_else(|| self.add_file(&file.path, file.by_row));
            (index, origin.line as usize)
        });
        self.stats.rows += 1;
        self.push(&document, Notes::default(), origin);
    }

    /// Remembers columns of a file that were not used.
    pub(super) fn note_unused(&mut self, file: u32, row: Unused) {
        let known = &mut self.unused[file as usize];
        for (known, names) in [(&mut known.columns, row.columns), (&mut known.by_template, row.by_template)] {
            for name in names {
                if !known.contains(&name) {
                    known.push(name);
                }
            }
        }
    }

    /// Counts a row that was read.
    pub(super) fn count_row(&mut self) {
        self.stats.rows += 1;
    }

    /// Leaves a row out.
    pub(super) fn drop_row(&mut self, (file, number): (u32, usize), reason: DropReason) {
        let stats = &mut self.stats;
        *match reason {
            DropReason::Overlong => &mut stats.dropped_overlong,
            DropReason::Untrained => &mut stats.dropped_untrained,
            DropReason::UntrainedAfterTruncation => &mut stats.dropped_after_truncation,
            DropReason::Short => &mut stats.dropped_short,
            DropReason::Duplicate => &mut stats.dropped_duplicates,
        } += 1;
        self.dropped.push(Dropped { origin: Origin::new(file, number), reason });
    }

    /// Makes these documents the data set, in this order; one may be there several times. The documents that were read
    /// stay in memory.
    ///
    /// # Panics
    /// If there is no such document.
    pub(super) fn select(&mut self, documents: &[usize]) {
        let stored = documents.iter().map(|&i| self.stored(i).expect("the document exists") as u32).collect();
        self.view = Some(stored);
        let stats = DataStats { documents: 0, tokens: 0, trained_tokens: 0, longest: 0, ..self.stats };
        self.stats = (0..self.len()).fold(stats, |mut stats, i| {
            stats.documents += 1;
            stats.tokens += self.document_len(i);
            stats.trained_tokens += self.trained_tokens(i);
            stats.longest = stats.longest.max(self.document_len(i));
            stats
        });
    }

    /// These documents as a data set of their own.
    ///
    /// # Panics
    /// If there is no such document.
    pub(super) fn copy_of(&self, documents: &[usize]) -> Self {
        let mut copy = Self::new();
        documents.iter().for_each(|&i| copy.push_from(self, i));
        copy
    }

    /// The index at which a document is stored.
    fn stored(&self, i: usize) -> Option<usize> {
        match &self.view {
            Some(view) => view.get(i).map(|&i| i as usize),
            None => Some(i),
        }
    }

    /// Adds the documents of a row.
    ///
    /// # Errors
    /// If earlier rows have another number of them.
    pub(super) fn push_row(
        &mut self,
        documents: &[Encoded],
        notes: Notes,
        origin: Option<(u32, usize)>,
    ) -> std::result::Result<(), String> {
        if self.is_empty() {
            self.group_size = documents.len();
        }
        if documents.len() != self.group_size {
            return Err("pairs of answers (`chosen`, `rejected`) and other rows do not go together".to_owned());
        }
        for (document, first) in documents.iter().zip([true].into_iter().chain(std::iter::repeat(false))) {
            // The notes of a row count once.
            self.push(document, if first { notes } else { Notes::default() }, origin);
        }
        Ok(())
    }

    fn push(&mut self, document: &Encoded, notes: Notes, origin: Option<(u32, usize)>) {
        self.ids.extend_from_slice(&document.ids);
        self.trained.extend_from_slice(&document.trained);
        self.bounds.push(self.ids.len());
        if let (Some((file, line)), 1..) = (origin, notes.answers_not_found)
            && self.stats.first_not_found.is_none()
        {
            let (count, file) = (notes.answers_not_found, self.files.get(file as usize));
            let place = file.map(|file| file.place(Origin::new(0, line).line)).unwrap_or_default();
            tracing::warn!(
                "{place}: {count} of the assistant's messages are not found in the text that the chat template writes, \
                 and are not trained"
            );
            self.stats.first_not_found = Some(line);
        }
        if let Some((file, line)) = origin {
            self.origins.push(Origin::new(file, line));
        }
        let stats = &mut self.stats;
        stats.documents += 1;
        stats.tokens += document.ids.len();
        stats.trained_tokens += document.trained_tokens();
        stats.longest = stats.longest.max(document.ids.len());
        stats.truncated += usize::from(notes.truncated);
        stats.double_bos += usize::from(notes.double_bos);
        stats.boundary_merged += usize::from(notes.boundary_merged);
        stats.answers_not_found += notes.answers_not_found;
    }

    fn range(&self, i: usize) -> Range<usize> {
        let i = self.stored(i).expect("the document exists");
        self.bounds[i]..self.bounds[i + 1]
    }
}

impl Document<'_> {
    /// The labels in Hugging Face's convention: each token's own id where it is trained, else -100.
    pub fn labels(&self) -> Vec<i64> {
        let label = |(&id, &trained): (&u32, &bool)| if trained { i64::from(id) } else { IGNORE_INDEX };
        self.ids.iter().zip(self.trained).map(label).collect()
    }

    /// The document's text with the trained stretches between `open` and `close`, for debugging a model that learns the
    /// wrong thing.
    ///
    /// # Errors
    /// If the encoder cannot decode the tokens.
    pub fn marked_text(
        &self,
        encoder: &dyn TextEncoder,
        open: &str,
        close: &str,
    ) -> std::result::Result<String, EncodeError> {
        let (mut text, mut start) = (String::new(), 0);
        while start < self.ids.len() {
            let trained = self.trained[start];
            let len = self.trained[start..].iter().take_while(|&&flag| flag == trained).count();
            let piece = encoder.decode(&self.ids[start..start + len])?;
            text += &if trained { format!("{open}{piece}{close}") } else { piece };
            start += len;
        }
        Ok(text)
    }
}

/// One line: `800 documents, 40000 tokens (12000 trained), longest 120; 3 truncated`.
impl fmt::Display for DataStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { documents, tokens, trained_tokens, longest, .. } = self;
        write!(f, "{documents} documents, {tokens} tokens ({trained_tokens} trained), longest {longest}")?;
        let remarks = [
            (self.truncated, "truncated"),
            (self.dropped_overlong, "left out as too long"),
            (self.dropped_untrained, "left out with nothing to train on"),
            (self.dropped_after_truncation, "left out with nothing to train on after truncation"),
            (self.dropped_short, "left out as too short"),
            (self.dropped_duplicates, "left out as the same as earlier ones"),
            (self.double_bos, "with a second BOS removed"),
            (self.boundary_merged, "with a token across prompt and completion"),
        ];
        for (count, what) in remarks.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, "; {count} {what}")?;
        }
        if self.answers_not_found > 0 {
            write!(f, "; {} answers not found in the chat template's text and not trained", self.answers_not_found)?;
            self.first_not_found.map_or(Ok(()), |line| write!(f, " (the first in line {line})"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
