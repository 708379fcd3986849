//! Rows of data files before their interpretation: JSON objects with their place.
//!
//! | module | what it is |
//! |---|---|
//! | `input` | the bytes of a file or of standard input, decompressed |
//! | `files` | folders and patterns to files |
//! | `source` | the rows of several files one after the other, with a [`RowPosition`] to go on from |
//! | `jsonl`, `json_array`, `csv`, `text`, `parquet` | one file format each |
//!
//! A new format is a file with a `Format` and its line in `FORMATS`. The contents of files are not trusted: a row has
//! at most [`MAX_ROW_BYTES`], and errors name the file and the line or row.

mod csv;
mod files;
mod input;
mod json_array;
mod jsonl;
#[cfg(feature = "parquet")]
mod parquet;
mod source;
mod text;

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::lines;
use crate::error::{Error, Result};

pub(crate) use files::{PATTERNS, is_data};
pub use files::{data_extensions, expand};
pub use input::STDIN;
pub(crate) use input::data_extension;
pub use source::{RowPosition, RowSource};

use input::Input;

/// The most bytes of one row. Whatever is longer is no row but a damaged file, or one that is made to fill the memory.
pub const MAX_ROW_BYTES: usize = 256 << 20;

/// Rows that are read together have about this many bytes at most.
const CHUNK_BYTES: usize = 16 << 20;

/// The place of a row in its file, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RowPlace {
    /// The line in which it begins, in formats of lines.
    Line(usize),
    /// Its number among the rows, in formats that have no lines to look it up by.
    Row(usize),
}

impl RowPlace {
    /// The line or the row.
    pub fn number(self) -> usize {
        let (Self::Line(number) | Self::Row(number)) = self;
        number
    }

    /// With the file, for people.
    pub fn in_file(self, path: &Path) -> String {
        match self {
            Self::Line(line) => format!("{}:{line}", path.display()),
            Self::Row(row) => format!("{}, row {row}", path.display()),
        }
    }

    /// An error that describes the row's problem, with its place.
    pub(super) fn refuse(self, path: &Path, message: String) -> Error {
        match self {
            Self::Line(line) => Error::data(path, line, message),
            Self::Row(row) => Error::data(path, None, format!("row {row}: {message}")),
        }
    }
}

/// A row that was read but not parsed: parsing is the larger part of the work, and is done in parallel.
#[derive(Clone, Debug)]
pub struct RawRow {
    place: RowPlace,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    /// A line of JSON.
    Line(lines::Line),
    /// An element of a JSON list.
    Element(json_array::Element),
    /// The fields of a record, with the names of its columns.
    Fields(Arc<[String]>, Vec<String>),
    /// A line of text.
    Text(Vec<u8>),
    /// An object that is there already.
    #[cfg_attr(not(feature = "parquet"), expect(dead_code, reason = "only Parquet's reader makes objects itself"))]
    Object(Map<String, Value>),
}

impl RawRow {
    /// The place of the row in its file.
    pub fn place(&self) -> RowPlace {
        self.place
    }

    /// The row as JSON, usually an object.
    ///
    /// # Errors
    /// A description of the row's problem, without file and place.
    pub fn parse(self) -> std::result::Result<Value, String> {
        match self.content {
            Content::Line(line) => lines::parse(&line),
            Content::Element(element) => element.parse(),
            Content::Fields(names, fields) => {
                Ok(Value::Object(names.iter().cloned().zip(fields.into_iter().map(Value::String)).collect()))
            }
            Content::Text(bytes) => text::parse(bytes),
            Content::Object(map) => Ok(Value::Object(map)),
        }
    }
}

/// The position up to which a file was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Rows behind.
    pub rows: u64,
    /// Lines begun, in formats of lines.
    #[serde(default)]
    pub lines: u64,
    /// Bytes behind, after decompression, in formats that can go on from there.
    #[serde(default)]
    pub bytes: u64,
}

/// Reads the rows of one file.
pub(super) trait RowReader: Send {
    /// The next rows, at most `count`, and fewer where they are large; none at the end.
    fn next(&mut self, count: usize) -> Result<Vec<RawRow>>;

    /// The mark of the next row's beginning.
    fn mark(&self) -> Mark;
}

/// A file format.
pub(super) struct Format {
    /// Its name, as `ds_type` in a configuration has it.
    pub(super) name: &'static str,
    /// The extensions of its files' names, without the dot.
    pub(super) extensions: &'static [&'static str],
    /// Opens a file whose rows are read from a mark on.
    open: fn(Input<'_>, Mark) -> Result<Box<dyn RowReader>>,
}

/// Every format. The first one is what a file without a known extension is taken for.
pub(super) static FORMATS: &[Format] = &[
    jsonl::FORMAT,
    json_array::FORMAT,
    csv::CSV,
    csv::TSV,
    text::FORMAT,
    #[cfg(feature = "parquet")]
    parquet::FORMAT,
];

/// A file of rows.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DataFile {
    /// The path of the file; [`STDIN`] is standard input.
    pub path: std::path::PathBuf,
    /// Its format by name, if its own name and content do not say it.
    pub format: Option<String>,
}

impl DataFile {
    /// A file whose format is found out.
    pub fn new(path: impl Into<std::path::PathBuf>) -> Self {
        Self { path: path.into(), format: None }
    }

    /// The rows from a mark on.
    pub(super) fn open(&self, from: Mark) -> Result<Box<dyn RowReader>> {
        let input = Input::open(&self.path)?;
        let format = self.format_of(&input)?;
        (format.open)(input, from)
    }

    /// By content where that is unmistakable, then by what is said of it, then by its name.
    fn format_of(&self, input: &Input<'_>) -> Result<&'static Format> {
        let named = |name: &str| FORMATS.iter().find(|format| format.name == name);
        let refuse = |message: String| Err(Error::data(&self.path, None, message));
        if input.is_parquet() {
            return named("parquet").map_or_else(
                || refuse("the file is Parquet, which this program was built without (feature `parquet`)".to_owned()),
                Ok,
            );
        }
        let extension = input.extension();
        let name = match (self.format.as_deref(), extension.as_deref()) {
            (Some(name), _) if name != "json" => name,
            (None, Some("arrow")) => {
                return refuse(
                    "Arrow files are not read; `Dataset.to_parquet` in Python makes Parquet of it".to_owned(),
                );
            }
            (None, Some("jsonl" | "ndjson")) => "jsonl",
            // Many files of this name hold one object a line.
            (Some(_), _) | (None, Some("json")) => {
                if input.begins_with(b'[') {
                    "json"
                } else {
                    "jsonl"
                }
            }
            (None, Some("txt" | "text")) => {
                if input.begins_with(b'{') {
                    "jsonl"
                } else {
                    "text"
                }
            }
            (None, Some(extension)) => {
                let known = FORMATS.iter().find(|format| format.extensions.contains(&extension));
                return Ok(known.unwrap_or(&FORMATS[0]));
            }
            (None, None) => {
                if input.begins_with(b'[') {
                    "json"
                } else {
                    "jsonl"
                }
            }
        };
        if let Some(format) = named(name) {
            return Ok(format);
        }
        let names: Vec<_> = FORMATS.iter().map(|format| format.name).collect();
        refuse(format!("there is no format {name:?}; there are {}", names.join(", ")))
    }
}

/// The error of a row that is too long.
pub(super) fn too_long(path: &Path, place: RowPlace) -> Error {
    let limit = MAX_ROW_BYTES >> 20;
    place.refuse(path, format!("a row of more than {limit} MiB: the file is damaged, or in another format"))
}

#[cfg(test)]
mod tests;
