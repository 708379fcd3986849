//! A shard: encoded rows of one file, as one file.
//!
//! ```text
//! magic        8 bytes    "qloratok"
//! version      u32        VERSION
//! length       u32        of the head
//! fingerprint  u64        of the head
//! head         JSON       positions, numbers of rows and tokens, what rows did not use, length and fingerprint of the rows
//! rows         u32 words  see `put_row`
//! ```
//!
//! All words are little-endian. Reading checks everything: lengths, the fingerprints, every number of a row. The head has a
//! fingerprint of its own because it is also read alone, and a wrong position in it would leave rows out or double them.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::data::dataset::Unused;
use crate::data::encode::{Encoded, Notes, RowOutcome};
use crate::data::load::EncodedRow;
use crate::data::rows::{RowPlace, RowPosition};
use crate::fingerprint::Fingerprint;

/// The version of the format.
pub(super) const VERSION: u32 = 2;
const MAGIC: &[u8; 8] = b"qloratok";
/// The position at which a set ends.
pub(super) const END_FILE: &str = "end.json";
/// Bytes before the head.
const FIXED: usize = 24;
/// Longer heads are damage.
const MAX_HEAD: u32 = 16 << 20;

/// What is known of a shard without its rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    /// The file among those of the set.
    pub(super) file: usize,
    /// The position at which the shard begins.
    pub(super) start: RowPosition,
    /// The position behind it.
    pub(super) end: RowPosition,
    pub(super) rows: u64,
    pub(super) tokens: u64,
    /// Every combination of unused columns that occurs: those of the format, and those of the template.
    unused: Vec<(Vec<String>, Vec<String>)>,
    /// Bytes of the rows.
    bytes: u64,
    /// Of the rows.
    fingerprint: u64,
}

pub(super) fn shard_name(number: usize) -> String {
    format!("{number:06}.tokens")
}

/// Rows that become a shard.
pub(super) struct ShardBuilder {
    head: Head,
    rows: Vec<u8>,
}

impl ShardBuilder {
    pub(super) fn new(file: usize, start: RowPosition) -> Self {
        let head = Head { file, start, end: start, rows: 0, tokens: 0, unused: Vec::new(), bytes: 0, fingerprint: 0 };
        Self { head, rows: Vec::new() }
    }

    pub(super) fn file(&self) -> usize {
        self.head.file
    }

    pub(super) fn rows(&self) -> usize {
        self.head.rows as usize
    }

    /// The bytes of the rows.
    pub(super) fn bytes(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn push(&mut self, row: &EncodedRow) {
        let Unused { columns, by_template } = &row.unused;
        let known = self.head.unused.iter().position(|known| known.0 == *columns && known.1 == *by_template);
        let unused = known.unwrap_or_else(|| {
            self.head.unused.push((columns.clone(), by_template.clone()));
            self.head.unused.len() - 1
        });
        self.head.rows += 1;
        self.head.tokens += put_row(&mut self.rows, row, unused as u32);
    }

    /// The bytes of the file, with rows up to the position `end`: those before the rows, and the rows, which are too many to copy.
    pub(super) fn finish(mut self, end: RowPosition) -> [Vec<u8>; 2] {
        self.head.end = end;
        self.head.bytes = self.rows.len() as u64;
        self.head.fingerprint = sum(&self.rows);
        let head = serde_json::to_vec(&self.head).expect("plain values have a JSON form");
        let mut bytes = Vec::with_capacity(FIXED + head.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(head.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&sum(&head).to_le_bytes());
        bytes.extend_from_slice(&head);
        [bytes, self.rows]
    }
}

fn sum(bytes: &[u8]) -> u64 {
    Fingerprint::new().bytes(bytes).value()
}

pub(super) fn end_file(end: RowPosition) -> Vec<u8> {
    serde_json::to_vec(&end).expect("plain values have a JSON form")
}

pub(super) fn read_end(path: &Path) -> io::Result<RowPosition> {
    serde_json::from_slice(&std::fs::read(path)?).map_err(|error| damaged(&error.to_string()))
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the file is damaged: {what}"))
}

/// Reads the head of a shard, without its rows.
///
/// # Errors
/// If there is none, or its head is damaged in any way.
pub(super) fn read_head(path: &Path) -> io::Result<Head> {
    head_of(&mut File::open(path)?)
}

fn head_of(file: &mut File) -> io::Result<Head> {
    let mut fixed = [0; FIXED];
    file.read_exact(&mut fixed)?;
    let word = |at: usize| u32::from_le_bytes(fixed[at..at + 4].try_into().expect("four bytes"));
    if &fixed[..8] != MAGIC || word(8) != VERSION {
        return Err(damaged("it is no shard of this version"));
    }
    if word(12) > MAX_HEAD {
        return Err(damaged("its head is too long"));
    }
    let mut head = vec![0; word(12) as usize];
    file.read_exact(&mut head)?;
    if fixed[16..] != sum(&head).to_le_bytes() {
        return Err(damaged("its fingerprint is not that of its head"));
    }
    serde_json::from_slice(&head).map_err(|error| damaged(&error.to_string()))
}

/// Reads a shard.
///
/// # Errors
/// If there is none, or it is damaged in any way.
pub(super) fn read(path: &Path) -> io::Result<(Head, Vec<EncodedRow>)> {
    let mut file = File::open(path)?;
    let head = head_of(&mut file)?;
    let mut bytes = Vec::new();
    // One more than it should have, to notice that. The file may be cut off, so nothing is reserved by its head.
    file.take(head.bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != head.bytes {
        return Err(damaged("it is cut off or too long"));
    }
    if sum(&bytes) != head.fingerprint {
        return Err(damaged("its fingerprint is not that of its rows"));
    }
    let mut words = Words(&bytes);
    let mut rows = Vec::with_capacity((head.rows as usize).min(bytes.len() / 8));
    while !words.0.is_empty() {
        rows.push(words.row(&head.unused).ok_or_else(|| damaged("a row has impossible numbers"))?);
    }
    if rows.len() as u64 != head.rows {
        return Err(damaged("it has another number of rows"));
    }
    Ok((head, rows))
}

const DOCUMENT: u32 = 0;
const GROUP: u32 = 1;
const OVERLONG: u32 = 2;
const UNTRAINED: u32 = 3;
const UNTRAINED_AFTER_TRUNCATION: u32 = 4;

/// `number` (two words), whether it is a row's (else a line's), `unused`, kind; of documents also their notes (flags, answers not
/// found) and, of a group, their number. Returns the number of tokens.
fn put_row(bytes: &mut Vec<u8>, row: &EncodedRow, unused: u32) -> u64 {
    let number = row.place.number() as u64;
    let by_row = u32::from(matches!(row.place, RowPlace::Row(_)));
    let (kind, documents, notes) = match &row.outcome {
        RowOutcome::Document(document, notes) => (DOCUMENT, std::slice::from_ref(document), *notes),
        RowOutcome::Group(documents, notes) => (GROUP, documents.as_slice(), *notes),
        RowOutcome::Overlong => (OVERLONG, &[] as &[Encoded], Notes::default()),
        RowOutcome::Untrained => (UNTRAINED, &[] as &[Encoded], Notes::default()),
        RowOutcome::UntrainedAfterTruncation => (UNTRAINED_AFTER_TRUNCATION, &[] as &[Encoded], Notes::default()),
    };
    put(bytes, &[number as u32, (number >> 32) as u32, by_row, unused, kind]);
    if kind <= GROUP {
        let Notes { truncated, double_bos, boundary_merged, answers_not_found } = notes;
        let flags = u32::from(truncated) | u32::from(double_bos) << 1 | u32::from(boundary_merged) << 2;
        put(bytes, &[flags, answers_not_found as u32, documents.len() as u32]);
    }
    documents.iter().for_each(|document| put_document(bytes, document));
    documents.iter().map(|document| document.ids.len() as u64).sum()
}

/// The number of ids, the ids, the number of edges between what is trained and what is not, the edges.
fn put_document(bytes: &mut Vec<u8>, Encoded { ids, trained }: &Encoded) {
    put(bytes, &[ids.len() as u32]);
    put(bytes, ids);
    let before = |i: usize| i > 0 && trained[i - 1];
    let edges: Vec<u32> = (0..trained.len()).filter(|&i| trained[i] != before(i)).map(|i| i as u32).collect();
    put(bytes, &[edges.len() as u32]);
    put(bytes, &edges);
}

fn put(bytes: &mut Vec<u8>, words: &[u32]) {
    bytes.reserve(4 * words.len());
    words.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
}

/// What is left of the rows.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn word(&mut self) -> Option<u32> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*word))
    }

    fn list(&mut self, length: u32) -> Option<Vec<u32>> {
        let (words, rest) = self.0.split_at_checked((length as usize).checked_mul(4)?)?;
        self.0 = rest;
        Some(words.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    fn row(&mut self, unused: &[(Vec<String>, Vec<String>)]) -> Option<EncodedRow> {
        let number = u64::from(self.word()?) | u64::from(self.word()?) << 32;
        let number = usize::try_from(number).ok()?;
        let place = if self.word()? == 1 { RowPlace::Row(number) } else { RowPlace::Line(number) };
        let (columns, by_template) = unused.get(self.word()? as usize)?.clone();
        let outcome = match self.word()? {
            kind @ (DOCUMENT | GROUP) => {
                let (flags, answers_not_found, count) = (self.word()?, self.word()? as usize, self.word()?);
                let has = |bit: u32| flags >> bit & 1 == 1;
                let notes = Notes { truncated: has(0), double_bos: has(1), boundary_merged: has(2), answers_not_found };
                let mut documents: Vec<Encoded> = (0..count).map(|_| self.document()).collect::<Option<_>>()?;
                match kind {
                    GROUP => RowOutcome::Group(documents, notes),
                    _ => RowOutcome::Document(documents.pop().filter(|_| documents.is_empty())?, notes),
                }
            }
            OVERLONG => RowOutcome::Overlong,
            UNTRAINED => RowOutcome::Untrained,
            UNTRAINED_AFTER_TRUNCATION => RowOutcome::UntrainedAfterTruncation,
            _ => return None,
        };
        Some(EncodedRow { place, outcome, unused: Unused { columns, by_template } })
    }

    fn document(&mut self) -> Option<Encoded> {
        let length = self.word()?;
        let ids = self.list(length)?;
        let edges = self.word()?;
        let edges = self.list(edges)?;
        let mut trained = Vec::with_capacity(ids.len());
        for (i, edge) in edges.iter().map(|&edge| edge as usize).chain([ids.len()]).enumerate() {
            if edge < trained.len() || edge > ids.len() {
                return None;
            }
            trained.resize(edge, i % 2 == 1);
        }
        Some(Encoded { ids, trained })
    }
}
