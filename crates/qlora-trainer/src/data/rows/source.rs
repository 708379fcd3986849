//! The rows of several files one after the other.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{DataFile, Mark, RawRow, RowReader};
use crate::error::{Error, Result};

/// The position up to which a [`RowSource`] was read. It can be stored, and a source of the same files goes on from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowPosition {
    /// Files behind.
    pub file: usize,
    /// The mark within the next file.
    pub mark: Mark,
}

/// The rows of files in order, read as they are asked for.
pub struct RowSource {
    files: Vec<DataFile>,
    position: RowPosition,
    reader: Option<Box<dyn RowReader>>,
}

impl RowSource {
    /// The rows from the beginning. No file is opened yet.
    pub fn new(files: Vec<DataFile>) -> Self {
        Self { files, position: RowPosition::default(), reader: None }
    }

    /// The files.
    pub fn files(&self) -> &[DataFile] {
        &self.files
    }

    /// The position of the next row's beginning.
    pub fn position(&self) -> RowPosition {
        self.position
    }

    /// Goes to a position. Files are looked at when the next rows are asked for.
    pub fn seek(&mut self, position: RowPosition) {
        (self.position, self.reader) = (position, None);
    }

    /// The next rows of one file, at most `count`, and fewer where they are large; with the file's place among the files. None
    /// at the end of all files.
    ///
    /// # Errors
    /// If a file cannot be opened or read, is in no known format or has no rows.
    pub fn next(&mut self, count: usize) -> Result<Option<(usize, Vec<RawRow>)>> {
        loop {
            let RowPosition { file, mark } = self.position;
            let Some(data) = self.files.get(file) else { return Ok(None) };
            let reader = match &mut self.reader {
                Some(reader) => reader,
                reader => reader.insert(data.open(mark)?),
            };
            let rows = reader.next(count)?;
            self.position.mark = reader.mark();
            if !rows.is_empty() {
                return Ok(Some((file, rows)));
            }
            if self.position.mark.rows == 0 {
                return Err(no_rows(&data.path));
            }
            (self.position, self.reader) = (RowPosition { file: file + 1, mark: Mark::default() }, None);
        }
    }
}

fn no_rows(path: &Path) -> Error {
    let message = if path == Path::new(super::STDIN) {
        "standard input has no rows (it can be read once only)"
    } else {
        "the file has no rows"
    };
    Error::data(path, None, message)
}
