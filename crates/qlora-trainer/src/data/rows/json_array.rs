//! A JSON list of objects, read element by element: the file is never whole in memory.

use std::io::BufRead;
use std::path::PathBuf;

use serde_json::Value;

use super::input::{Bytes, Input};
use super::{CHUNK_BYTES, Content, Format, MAX_ROW_BYTES, Mark, RawRow, RowPlace, RowReader, too_long};
use crate::data::lines::without_python_numbers;
use crate::error::{Error, Result};

pub(super) const FORMAT: Format = Format { name: "json", extensions: &["json"], open };

/// An element of the list, as text.
#[derive(Clone, Debug)]
pub(super) struct Element {
    /// The line in which it begins.
    line: usize,
    bytes: Vec<u8>,
}

struct Reader {
    path: PathBuf,
    bytes: Bytes,
    /// `bytes` and `rows` are those behind the last element; `lines` the line feeds before.
    at: Mark,
    /// The end of the last element that was given out.
    mark: Mark,
    /// The list's end was seen.
    ended: bool,
}

fn open(input: Input<'_>, from: Mark) -> Result<Box<dyn RowReader>> {
    let path = input.path.to_owned();
    let mut reader = Reader { path, bytes: input.bytes_from(from.bytes)?, at: from, mark: from, ended: false };
    if from.bytes == 0 {
        reader.begin()?;
    }
    Ok(Box::new(reader))
}

impl Reader {
    fn peek(&mut self) -> Result<Option<u8>> {
        Ok(self.bytes.fill_buf().map_err(|error| Error::io(&self.path, error))?.first().copied())
    }

    fn take(&mut self) -> Result<Option<u8>> {
        let byte = self.peek()?;
        if let Some(byte) = byte {
            self.bytes.consume(1);
            self.at.bytes += 1;
            self.at.lines += u64::from(byte == b'\n');
        }
        Ok(byte)
    }

    /// The next byte that is no white space, not taken.
    fn peek_text(&mut self) -> Result<Option<u8>> {
        loop {
            match self.peek()? {
                Some(byte) if byte.is_ascii_whitespace() => drop(self.take()?),
                other => return Ok(other),
            }
        }
    }

    fn refuse<T>(&self, message: &str) -> Result<T> {
        let (line, row) = (self.at.lines + 1, self.at.rows + 1);
        Err(RowPlace::Row(row as usize).refuse(&self.path, format!("not valid JSON: {message} at line {line}")))
    }

    fn begin(&mut self) -> Result<()> {
        for expected in *b"\xef\xbb\xbf" {
            if self.peek()? == Some(expected) {
                self.take()?;
            }
        }
        match self.peek_text()? {
            Some(b'[') => self.take().map(drop),
            None => {
                self.ended = true;
                Ok(())
            }
            Some(_) => self.refuse("a list of objects was expected, `[`"),
        }
    }

    /// The next element; none behind the last.
    fn element(&mut self) -> Result<Option<RawRow>> {
        if self.ended {
            return Ok(None);
        }
        let first = self.at.rows == 0;
        match self.peek_text()? {
            Some(b']') => return self.end(),
            Some(b',') if !first => drop(self.take()?),
            None => return self.refuse("the list does not end: `]` is missing"),
            Some(_) if first => {}
            Some(_) => return self.refuse("`,` or `]` was expected"),
        }
        match self.peek_text()? {
            None | Some(b',' | b']') => return self.refuse("an object was expected"),
            Some(_) => {}
        }
        let (line, place) = (self.at.lines as usize + 1, RowPlace::Row(self.at.rows as usize + 1));
        let bytes = self.value(place)?;
        self.at.rows += 1;
        self.mark = self.at;
        Ok(Some(RawRow { place, content: Content::Element(Element { line, bytes }) }))
    }

    /// Behind the list nothing may follow.
    fn end(&mut self) -> Result<Option<RawRow>> {
        self.take()?;
        self.ended = true;
        match self.peek_text()? {
            None => Ok(None),
            Some(_) => self.refuse("something follows the list"),
        }
    }

    /// The bytes of a value, up to where its brackets are closed. Whether they are JSON is found out when it is parsed.
    fn value(&mut self, place: RowPlace) -> Result<Vec<u8>> {
        let mut scan = Scan::default();
        let mut value = Vec::new();
        loop {
            let buffer = self.bytes.fill_buf().map_err(|error| Error::io(&self.path, error))?;
            if buffer.is_empty() {
                return self.refuse("the file ends within a row");
            }
            let (end, length) = match scan.end_in(buffer) {
                Some(length) => (true, length),
                None => (false, buffer.len()),
            };
            value.extend_from_slice(&buffer[..length]);
            self.at.lines += buffer[..length].iter().filter(|&&byte| byte == b'\n').count() as u64;
            self.at.bytes += length as u64;
            self.bytes.consume(length);
            if value.len() > MAX_ROW_BYTES {
                return Err(too_long(&self.path, place));
            }
            if end {
                return Ok(value);
            }
        }
    }
}

/// A scanner that finds the end of a JSON value.
#[derive(Default)]
struct Scan {
    depth: usize,
    quoted: bool,
    escaped: bool,
}

impl Scan {
    /// The number of bytes that belong to the value, if it ends in them.
    fn end_in(&mut self, bytes: &[u8]) -> Option<usize> {
        for (i, byte) in bytes.iter().enumerate() {
            if self.quoted {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.quoted = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.quoted = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth > 1 => self.depth -= 1,
                b'}' | b']' if self.depth == 1 => return Some(i + 1),
                // The end of a value that is no object: the list's own comma or bracket.
                b',' | b']' if self.depth == 0 => return Some(i),
                _ => {}
            }
        }
        None
    }
}

impl RowReader for Reader {
    fn next(&mut self, count: usize) -> Result<Vec<RawRow>> {
        let (mut rows, start) = (Vec::new(), self.at.bytes);
        while rows.len() < count && self.at.bytes - start < CHUNK_BYTES as u64 {
            match self.element()? {
                Some(row) => rows.push(row),
                None => break,
            }
        }
        Ok(rows)
    }

    fn mark(&self) -> Mark {
        self.mark
    }
}

impl Element {
    pub(super) fn parse(&self) -> std::result::Result<Value, String> {
        let text = std::str::from_utf8(&self.bytes)
            .map_err(|error| format!("not UTF-8 text (byte {} of the row)", error.valid_up_to() + 1))?;
        serde_json::from_str(text).or_else(|error: serde_json::Error| {
            let repaired = without_python_numbers(text).and_then(|text| serde_json::from_str(&text).ok());
            repaired.ok_or_else(|| {
                let message = error.to_string();
                let message = message.split(" at line ").next().unwrap_or_default();
                format!("not valid JSON: {message} at line {}", self.line + error.line().saturating_sub(1))
            })
        })
    }
}
