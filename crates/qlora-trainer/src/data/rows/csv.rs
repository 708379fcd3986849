//! CSV and TSV with a line of column names (RFC 4180). Every field is a text; an empty one is an empty text.

use std::path::PathBuf;
use std::sync::Arc;

use super::input::{Bytes, Input};
use super::{CHUNK_BYTES, Content, Format, MAX_ROW_BYTES, Mark, RawRow, RowPlace, RowReader, too_long};
use crate::error::{Error, Result};

pub(super) const CSV: Format =
    Format { name: "csv", extensions: &["csv"], open: |input, from| open(input, from, b',') };
pub(super) const TSV: Format =
    Format { name: "tsv", extensions: &["tsv", "tab"], open: |input, from| open(input, from, b'\t') };

struct Reader {
    path: PathBuf,
    records: csv::Reader<Bounded>,
    names: Arc<[String]>,
    rows: u64,
}

fn open(input: Input<'_>, from: Mark, delimiter: u8) -> Result<Box<dyn RowReader>> {
    let path = input.path.to_owned();
    // A record is known by the quotes before it: one can only go on from the beginning.
    let bytes = Bounded { bytes: input.bytes_from(0)?, left: MAX_ROW_BYTES };
    let mut records = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(bytes);
    let header = records.byte_headers().map_err(|error| explain(&path, error))?.clone();
    if records.get_ref().left == 0 {
        return Err(too_long(&path, RowPlace::Line(1)));
    }
    let name = |(i, bytes): (usize, &[u8])| {
        let bytes = if i == 0 { bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes) } else { bytes };
        std::str::from_utf8(bytes)
            .map(|name| name.trim().to_owned())
            .map_err(|_| Error::data(&path, 1, format!("the name of column {} is not UTF-8 text", i + 1)))
    };
    let names: Vec<String> = header.iter().enumerate().map(name).collect::<Result<_>>()?;
    if let Some(twice) = (1..names.len()).find(|&i| names[..i].contains(&names[i])) {
        return Err(Error::data(&path, 1, format!("two columns have the name {:?}", names[twice])));
    }
    let mut reader = Reader { path, records, names: names.into(), rows: 0 };
    while reader.rows < from.rows {
        let count = usize::try_from(from.rows - reader.rows).unwrap_or(usize::MAX).min(1024);
        if reader.next(count)?.is_empty() {
            break;
        }
    }
    Ok(Box::new(reader))
}

impl RowReader for Reader {
    fn next(&mut self, count: usize) -> Result<Vec<RawRow>> {
        let (mut rows, start) = (Vec::new(), self.records.position().byte());
        let mut record = csv::ByteRecord::new();
        while rows.len() < count && self.records.position().byte() - start < CHUNK_BYTES as u64 {
            self.records.get_mut().left = MAX_ROW_BYTES;
            let read = self.records.read_byte_record(&mut record);
            if self.records.get_ref().left == 0 {
                return Err(too_long(&self.path, RowPlace::Line(self.records.position().line() as usize)));
            }
            if !read.map_err(|error| explain(&self.path, error))? {
                break;
            }
            let place = RowPlace::Line(record.position().map_or(0, |position| position.line() as usize));
            let field = |(i, bytes): (usize, &[u8])| match std::str::from_utf8(bytes) {
                Ok(text) => Ok(text.to_owned()),
                Err(_) => Err(place.refuse(&self.path, format!("column `{}` is not UTF-8 text", self.names[i]))),
            };
            let fields = record.iter().enumerate().map(field).collect::<Result<_>>()?;
            self.rows += 1;
            rows.push(RawRow { place, content: Content::Fields(self.names.clone(), fields) });
        }
        Ok(rows)
    }

    fn mark(&self) -> Mark {
        Mark { rows: self.rows, lines: self.records.position().line(), bytes: 0 }
    }
}

/// Ends after a number of bytes: an open quote would otherwise take the whole file into one field.
struct Bounded {
    bytes: Bytes,
    left: usize,
}

impl std::io::Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = buffer.len().min(self.left);
        let read = self.bytes.read(&mut buffer[..most])?;
        self.left -= read;
        Ok(read)
    }
}

fn explain(path: &std::path::Path, error: csv::Error) -> Error {
    let line = error.position().map(|position| position.line() as usize);
    match error.into_kind() {
        csv::ErrorKind::Io(error) => Error::io(path, error),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => Error::data(
            path,
            line,
            format!(
                "{len} fields, but the first line names {expected_len} columns; a field with a comma or a line feed needs quotes"
            ),
        ),
        other => Error::data(path, line, format!("not valid CSV: {}", csv_kind(&other))),
    }
}

fn csv_kind(kind: &csv::ErrorKind) -> String {
    match kind {
        csv::ErrorKind::Utf8 { .. } => "not UTF-8 text".to_owned(),
        other => format!("{other:?}"),
    }
}
