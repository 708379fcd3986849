//! The documents of a run, as tokens: one flat array of ids, one of flags, and where each document begins.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use qlora_core::batch::{Batch, IGNORE_INDEX};

use super::encode::{EncodeError, Encoded, Notes, TextEncoder};
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
    files: Vec<PathBuf>,
    unused: Vec<Unused>,
    stats: DataStats,
}

/// What of a file's rows was not used: names, in the order in which they occurred.
#[derive(Clone, Debug, Default)]
pub(super) struct Unused {
    /// Columns that mean nothing in the rows' format.
    pub(super) columns: Vec<String>,
    /// Columns that the chat template does not read.
    pub(super) by_template: Vec<String>,
}

/// A document's file (an index) and line.
#[derive(Clone, Copy, Debug)]
struct Origin {
    file: u32,
    line: u32,
}

/// One document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// For each, whether it is trained.
    pub trained: &'a [bool],
}

/// What was read, and what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
            stats: DataStats::default(),
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
        self.bounds.len() - 1
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

    /// Where a document came from: `train.jsonl:7`, or its place where it came from no file.
    pub fn origin(&self, i: usize) -> String {
        match self.origins.get(i).and_then(|origin| Some((self.files.get(origin.file as usize)?, origin.line))) {
            Some((path, line)) => format!("{}:{line}", path.display()),
            None => format!("document {i}"),
        }
    }

    /// What was read, and what became of it.
    pub fn stats(&self) -> &DataStats {
        &self.stats
    }

    /// The largest token id.
    pub fn largest_token(&self) -> Option<u32> {
        self.ids.iter().copied().max()
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

    /// What was not used of the files, a line for each file and reason: columns that mean nothing in the rows' format, and
    /// those that the chat template does not read.
    pub fn remarks(&self) -> Vec<String> {
        let list = |names: &[String]| {
            let shown: Vec<_> = names.iter().take(20).map(|name| format!("`{name}`")).collect();
            let more = names.len().saturating_sub(shown.len());
            shown.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
        };
        let mut remarks = Vec::new();
        for (path, unused) in self.files.iter().zip(&self.unused) {
            let path = path.display();
            if !unused.columns.is_empty() {
                remarks.push(format!("{path}: columns that are not used: {}", list(&unused.columns)));
            }
            if !unused.by_template.is_empty() {
                remarks.push(format!("{path}: the chat template does not use: {}", list(&unused.by_template)));
            }
        }
        remarks
    }

    /// Documents as a micro-batch, in the given order.
    ///
    /// # Panics
    /// If there is no such document.
    pub fn batch(&self, documents: &[usize]) -> Batch {
        let labelled: Vec<_> = documents.iter().map(|&i| (self.document(i).ids, self.document(i).labels())).collect();
        Batch::from_documents(labelled.iter().map(|(ids, labels)| (*ids, labels.as_slice())))
    }

    pub(super) fn add_file(&mut self, path: &Path) -> u32 {
        self.files.push(path.to_owned());
        self.unused.push(Unused::default());
        (self.files.len() - 1) as u32
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

    pub(super) fn stats_mut(&mut self) -> &mut DataStats {
        &mut self.stats
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
            // What happened to the row counts once.
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
            let (count, path) = (notes.answers_not_found, self.files.get(file as usize));
            let path = path.map(|path| path.display().to_string()).unwrap_or_default();
            tracing::warn!(
                "{path}:{line}: {count} of the assistant's messages are not found in the text that the chat template writes, \
                 and are not trained"
            );
            self.stats.first_not_found = Some(line);
        }
        if let Some((file, line)) = origin {
            self.origins.push(Origin { file, line: u32::try_from(line).unwrap_or(u32::MAX) });
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
        self.bounds[i]..self.bounds[i + 1]
    }
}

impl Document<'_> {
    /// The labels in Hugging Face's convention: each token's own id where it is trained, else -100.
    pub fn labels(&self) -> Vec<i64> {
        let label = |(&id, &trained): (&u32, &bool)| if trained { i64::from(id) } else { IGNORE_INDEX };
        self.ids.iter().zip(self.trained).map(label).collect()
    }

    /// The document's text with the trained stretches between `open` and `close`: what to look at when a model learns
    /// the wrong thing.
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
mod tests {
    use super::super::testing::ToyEncoder;
    use super::*;

    fn encoded(text: &str, trained_from: usize) -> Encoded {
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        Encoded { trained: (0..ids.len()).map(|i| i >= trained_from).collect(), ids }
    }

    #[test]
    fn documents_come_back_as_they_were() {
        let dataset = Dataset::from_encoded([encoded("abc", 1), encoded("de", 0)]).unwrap();
        assert_eq!(dataset.len(), 2);
        assert_eq!(dataset.document(0).ids, [97, 98, 99]);
        assert_eq!(dataset.document(1).trained, [true, true]);
        assert_eq!(dataset.document(0).labels(), [-100, 98, 99]);
        assert_eq!(dataset.largest_token(), Some(101));
        assert_eq!(dataset.first_with_token(101), Some(1));
        assert_eq!(dataset.origin(1), "document 1");
        let batch = dataset.batch(&[1, 0]);
        assert_eq!(batch.tokens, [100, 101, 97, 98, 99]);
        assert_eq!(batch.targets, [101, -100, 98, 99, -100]);
        assert_eq!(batch.trained_tokens(), dataset.stats().trained_tokens);
        let text = dataset.document(0).marked_text(&ToyEncoder::default(), "<<", ">>").unwrap();
        assert_eq!(text, "a<<bc>>");
    }

    #[test]
    fn the_fingerprint_sees_tokens_flags_and_boundaries() {
        let of = |documents: Vec<Encoded>| Dataset::from_encoded(documents).unwrap().fingerprint();
        let original = of(vec![encoded("abc", 1), encoded("de", 0)]);
        assert_eq!(original, of(vec![encoded("abc", 1), encoded("de", 0)]));
        for other in [
            vec![encoded("abd", 1), encoded("de", 0)],
            vec![encoded("abc", 2), encoded("de", 0)],
            vec![encoded("ab", 1), encoded("cde", 0)],
            vec![encoded("de", 0), encoded("abc", 1)],
            vec![encoded("abc", 1)],
        ] {
            assert_ne!(of(other), original);
        }
    }

    #[test]
    fn unusable_documents_are_named() {
        let refusal = |document| Dataset::from_encoded([encoded("ab", 0), document]).unwrap_err().to_string();
        assert_eq!(refusal(encoded("ab", 2)), "document 1 has no token to train on");
        assert_eq!(refusal(encoded("a", 0)), "document 1 has no token to train on");
        assert_eq!(refusal(Encoded { ids: vec![1, 2], trained: vec![] }), "document 1 has 2 tokens and 0 flags");
    }

    #[test]
    fn the_summary_mentions_only_what_happened() {
        let stats =
            DataStats { rows: 5, documents: 3, tokens: 30, trained_tokens: 9, longest: 12, ..Default::default() };
        assert_eq!(stats.to_string(), "3 documents, 30 tokens (9 trained), longest 12");
        let stats = DataStats { truncated: 2, dropped_untrained: 1, ..stats };
        assert!(stats.to_string().ends_with("; 2 truncated; 1 left out with nothing to train on"));
    }
}
