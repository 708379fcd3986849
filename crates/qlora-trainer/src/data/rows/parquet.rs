//! Parquet: row groups in order, rows as JSON objects. Compressed with snappy, zstd, gzip or LZ4.
//!
//! Nested columns become lists and objects; maps with text keys become objects. Dates and times are the numbers that the file
//! stores, decimals texts; bytes that are no UTF-8 text become `{"bytes": <their number>}`.
//!
//! A page is read at a time and column. The crate's reader trusts the sizes and counts in a file and panics on some that are
//! damaged: they are checked before ([`pages`], [`counts`]), and a panic becomes an error.

mod counts;
mod pages;

use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value, json};

use super::input::{Input, STDIN};
use super::{CHUNK_BYTES, Content, Format, Mark, RawRow, RowPlace, RowReader};
use crate::error::{Error, Result};

/// Rows whose values are decoded together. Their pages are in memory as long.
const BATCH: usize = 64;

pub(super) const FORMAT: Format = Format { name: "parquet", extensions: &["parquet"], open };

struct Reader {
    path: PathBuf,
    file: SerializedFileReader<Chunks>,
    /// The row groups that were begun.
    groups: usize,
    group: Option<ReaderIter>,
    rows: u64,
}

fn open(input: Input<'_>, from: Mark) -> Result<Box<dyn RowReader>> {
    let path = input.path.to_owned();
    if path == Path::new(STDIN) {
        let message =
            "Parquet ends with its table of contents and cannot be read from standard input: write it to a file";
        return Err(Error::data(&path, None, message));
    }
    let file = File::open(&path).map_err(|error| Error::io(&path, error))?;
    let file = guarded(&path, None, || SerializedFileReader::new(Chunks(file)))?;
    let mut reader = Reader { path, file, groups: 0, group: None, rows: 0 };
    reader.skip(from.rows)?;
    Ok(Box::new(reader))
}

impl Reader {
    /// Skips whole row groups where it can.
    fn skip(&mut self, rows: u64) -> Result<()> {
        while self.groups < self.file.num_row_groups() {
            let in_group = self.file.metadata().row_group(self.groups).num_rows().max(0) as u64;
            if self.rows + in_group > rows {
                break;
            }
            self.rows += in_group;
            self.groups += 1;
        }
        while self.rows < rows && self.row()?.is_some() {}
        Ok(())
    }

    fn row(&mut self) -> Result<Option<Row>> {
        loop {
            if let Some(group) = &mut self.group {
                if let Some(row) = guarded(&self.path, Some(self.rows + 1), || group.next().transpose())? {
                    self.rows += 1;
                    return Ok(Some(row));
                }
                self.group = None;
            }
            if self.groups == self.file.num_row_groups() {
                return Ok(None);
            }
            self.group = Some(self.begin(self.groups)?);
            self.groups += 1;
        }
    }

    fn begin(&self, group: usize) -> Result<ReaderIter> {
        guarded(&self.path, Some(self.rows + 1), || {
            let reader = self.file.get_row_group(group)?;
            let chunks = Chunks(File::open(&self.path)?);
            pages::check(&chunks, reader.metadata())?;
            let schema = self.file.metadata().file_metadata().schema_descr_ptr();
            TreeBuilder::new().with_batch_size(BATCH).as_iter(schema, &counts::CheckedGroup(reader))
        })
    }
}

impl RowReader for Reader {
    fn next(&mut self, count: usize) -> Result<Vec<RawRow>> {
        let (mut rows, mut size) = (Vec::new(), 0);
        while rows.len() < count && size < CHUNK_BYTES {
            let Some(row) = self.row()? else { break };
            let object = object(row, &mut size);
            rows.push(RawRow { place: RowPlace::Row(self.rows as usize), content: Content::Object(object) });
        }
        Ok(rows)
    }

    fn mark(&self) -> Mark {
        Mark { rows: self.rows, ..Mark::default() }
    }
}

/// Runs the crate's reader. Its error, or a panic, becomes an error with the file and the row.
fn guarded<T>(path: &Path, row: Option<u64>, read: impl FnOnce() -> std::result::Result<T, ParquetError>) -> Result<T> {
    let refuse = |message: String| match row {
        Some(row) => RowPlace::Row(row as usize).refuse(path, message),
        None => Error::data(path, None, message),
    };
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(ParquetError::NYI(what))) => {
            Err(refuse(format!("the Parquet file has something that is not read: {what}")))
        }
        Ok(Err(error)) => Err(refuse(format!("the Parquet file cannot be read: {error}"))),
        Err(_) => Err(refuse("the Parquet file is damaged, or has a column type that is not read".to_owned())),
    }
}

/// A file with the ranges of its chunks checked to be within it.
struct Chunks(File);

impl Length for Chunks {
    fn len(&self) -> u64 {
        Length::len(&self.0)
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        let mut file = self.0.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(BufReader::new(file))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.len()) {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} are not in the file")));
        }
        self.0.get_bytes(start, length)
    }
}

/// A row as JSON; adds about its bytes to `size`.
fn object(row: Row, size: &mut usize) -> Map<String, Value> {
    row.into_columns()
        .into_iter()
        .map(|(name, field)| {
            *size += name.len() + 8;
            (name, value(field, size))
        })
        .collect()
}

fn value(field: Field, size: &mut usize) -> Value {
    *size += 8;
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) | Field::Date(value) | Field::TimeMillis(value) => value.into(),
        Field::Long(value)
        | Field::TimeMicros(value)
        | Field::TimestampMillis(value)
        | Field::TimestampMicros(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float16(value) => number(value.to_f64()),
        Field::Float(value) => number(value.into()),
        Field::Double(value) => number(value),
        field @ Field::Decimal(_) => field.to_string().into(),
        Field::Str(text) => {
            *size += text.len();
            text.into()
        }
        Field::Bytes(bytes) => {
            *size += bytes.len();
            std::str::from_utf8(bytes.data()).map_or_else(|_| json!({"bytes": bytes.len()}), Value::from)
        }
        Field::Group(row) => Value::Object(object(row, size)),
        Field::ListInternal(list) => list.elements().iter().map(|element| value(element.clone(), size)).collect(),
        Field::MapInternal(map) => pairs(&map, size),
    }
}

fn pairs(map: &parquet::record::Map, size: &mut usize) -> Value {
    let mut object = Map::new();
    for (key, entry) in map.entries() {
        let Field::Str(key) = key else {
            let pair = |(key, entry): &(Field, Field), size: &mut usize| {
                Value::from(vec![value(key.clone(), size), value(entry.clone(), size)])
            };
            return map.entries().iter().map(|entry| pair(entry, size)).collect();
        };
        *size += key.len();
        object.insert(key.clone(), value(entry.clone(), size));
    }
    Value::Object(object)
}

/// JSON has no NaN and no infinities.
fn number(value: f64) -> Value {
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
pub(super) mod tests;
