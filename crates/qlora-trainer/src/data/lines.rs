//! The lines of a JSONL file, and JSON as Python, JavaScript and Windows write it.
//!
//! Lines end with LF, CR LF or, as some old programs write, CR alone; a byte order mark before a line is skipped. JSON may have
//! Python's `NaN` and `Infinity`, which are read as null, and a key twice, of which the last one counts.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::rows::MAX_ROW_BYTES;
use crate::error::{Error, Result};

/// A line of a file with its number, from 1.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) number: usize,
    pub(super) bytes: Vec<u8>,
}

const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";

/// Lines that are read together have about this many bytes at most.
const CHUNK_BYTES: usize = 16 << 20;

/// Reads lines that are not blank.
pub(super) struct Lines<R> {
    path: PathBuf,
    reader: R,
    /// Lines begun so far.
    number: usize,
    /// Bytes behind that stretch.
    bytes: u64,
    /// Those of the last stretch up to a line feed, the last one first, each with the bytes up to its end.
    ready: Vec<(Line, u64)>,
    begun: bool,
    /// The number of the last line that was given out, and the bytes up to its end.
    mark: (usize, u64),
}

impl<R: BufRead> Lines<R> {
    /// The lines behind a [`Lines::mark`], from which on `reader` reads.
    pub(super) fn from_mark(path: &Path, reader: R, mark: (usize, u64)) -> Self {
        let (number, bytes) = mark;
        Self { path: path.to_owned(), reader, number, bytes, ready: Vec::new(), begun: bytes > 0, mark }
    }

    /// Lines and bytes up to the end of the last line that was given out.
    pub(super) fn mark(&self) -> (usize, u64) {
        self.mark
    }

    /// The next lines, at most `count`, and fewer where they are long; none at the end.
    ///
    /// # Errors
    /// If reading fails, or the file is no text in UTF-8.
    pub(super) fn next(&mut self, count: usize) -> Result<Vec<Line>> {
        if !self.begun {
            self.begun = true;
            let beginning = self.reader.fill_buf().map_err(|error| Error::io(&self.path, error))?;
            if let Some(format) = other_format(beginning) {
                return Err(Error::data(&self.path, None, format));
            }
        }
        let (mut lines, mut size) = (Vec::new(), 0);
        while lines.len() < count && size < CHUNK_BYTES {
            if let Some((line, end)) = self.ready.pop() {
                size += line.bytes.len();
                self.mark = (line.number, end);
                lines.push(line);
                continue;
            }
            let mut bytes = Vec::new();
            let limited = &mut self.reader.by_ref().take(MAX_ROW_BYTES as u64 + 1);
            let read = limited.read_until(b'\n', &mut bytes).map_err(|error| Error::io(&self.path, error))?;
            if read == 0 {
                break;
            }
            if read > MAX_ROW_BYTES {
                return Err(super::rows::too_long(&self.path, super::rows::RowPlace::Line(self.number + 1)));
            }
            self.split(&bytes);
        }
        Ok(lines)
    }

    /// Splits a stretch up to a line feed where a carriage return stands between two objects.
    fn split(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.number += 1;
            let end = end_of_line(bytes);
            self.bytes += end as u64;
            let line = bytes[..end].strip_prefix(UTF8_MARK).unwrap_or(&bytes[..end]);
            if !line.trim_ascii().is_empty() {
                self.ready.push((Line { number: self.number, bytes: line.to_vec() }, self.bytes));
            }
            bytes = &bytes[end..];
        }
        self.ready.reverse();
    }
}

/// Finds the end of the first line: behind its line feed, or behind a carriage return that follows `}` (or nothing) and
/// does not belong to a line feed. Inside of JSON a carriage return is white space, and `}` is not followed by `{`
/// there.
fn end_of_line(bytes: &[u8]) -> usize {
    for (at, _) in bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\r') {
        let (before, after) = (bytes[..at].trim_ascii_end(), bytes[at + 1..].trim_ascii_start());
        if matches!(before.last(), None | Some(b'}')) && matches!(after.first(), Some(b'{')) {
            return at + 1;
        }
    }
    bytes.len()
}

/// The format of a file that is not UTF-8 text, with advice on how to convert it.
fn other_format(beginning: &[u8]) -> Option<&'static str> {
    const UTF32: &str =
        "the file is UTF-32 text, not UTF-8; `iconv -f UTF-32 -t UTF-8 old.jsonl > new.jsonl` converts it";
    const UTF16: &str = "the file is UTF-16 text, not UTF-8 (PowerShell's `>` writes it so); `iconv -f UTF-16LE -t UTF-8 old.jsonl > new.jsonl` \
         (or UTF-16BE) converts it";
    match beginning {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => Some(UTF32),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Some(UTF16),
        // Without a byte order mark: the zeros beside ASCII characters.
        [first, 0, 0, 0, ..] | [0, 0, 0, first, ..] if *first != 0 => Some(UTF32),
        [first, 0, second, 0, ..] | [0, first, 0, second, ..] if *first != 0 && *second != 0 => Some(UTF16),
        [b'P', b'A', b'R', b'1', ..] => Some("the file is Parquet, not JSONL"),
        [0x1f, 0x8b, ..] => Some("the file is compressed with gzip; `gunzip` unpacks it"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("the file is compressed with zstd; `unzstd` unpacks it"),
        [b'P', b'K', 3, 4, ..] => Some("the file is a zip archive; `unzip` unpacks it"),
        _ => None,
    }
}

/// The JSON of a line.
///
/// # Errors
/// A description of the problem, with the column.
pub(super) fn parse(line: &Line) -> std::result::Result<Value, String> {
    if let Some(at) = line.bytes.iter().position(|&byte| byte == 0) {
        return Err(format!(
            "a NUL byte (byte {} of the line): the file is damaged, or a copy that was cut off",
            at + 1
        ));
    }
    let text = std::str::from_utf8(&line.bytes)
        .map_err(|error| format!("not UTF-8 text (byte {} of the line)", error.valid_up_to() + 1))?;
    let error = match serde_json::from_str(text) {
        Ok(value) => return Ok(value),
        Err(error) => error,
    };
    match without_python_numbers(text).map(|text| serde_json::from_str(&text)) {
        Some(Ok(value)) => Ok(value),
        _ => Err(message(text, line.number, &error)),
    }
}

/// The text with `null` for the numbers that JSON does not have; none if it has no such number outside of strings.
pub(super) fn without_python_numbers(text: &str) -> Option<String> {
    const NUMBERS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !NUMBERS[1..].iter().any(|number| text.contains(number)) {
        return None;
    }
    let mut replaced = String::with_capacity(text.len());
    let (mut rest, mut quoted) = (text, false);
    while let Some(c) = rest.chars().next() {
        let number = NUMBERS.iter().find(|number| !quoted && rest.starts_with(**number));
        let length = match (number, c) {
            (Some(number), _) => {
                replaced.push_str("null");
                rest = &rest[number.len()..];
                continue;
            }
            (None, '\\') if quoted => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, '"') => {
                quoted = !quoted;
                1
            }
            (None, c) => c.len_utf8(),
        };
        replaced.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    (replaced != text).then_some(replaced)
}

fn message(text: &str, number: usize, error: &serde_json::Error) -> String {
    // serde_json counts lines within the row; only the column means something.
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or_default();
    let half = if message.contains("hex escape") { " (half of a character: a lone surrogate)" } else { "" };
    let mut message = format!("not valid JSON: {message} at column {}{half}", error.column());
    if number == 1 && matches!(text.trim(), "[" | "{") || text.trim_start().starts_with("[{") {
        message += "; a JSONL file has one object a line (`jq -c '.[]'` makes one of a JSON list)";
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &[u8]) -> Vec<(usize, String)> {
        let mut lines = Lines::from_mark(Path::new("x"), bytes, (0, 0));
        let all = lines.next(usize::MAX).unwrap();
        all.into_iter().map(|line| (line.number, String::from_utf8(line.bytes).unwrap().trim().to_owned())).collect()
    }

    fn parsed(text: &str) -> std::result::Result<Value, String> {
        parse(&Line { number: 5, bytes: text.as_bytes().to_vec() })
    }

    #[test]
    fn lines_end_as_any_program_ends_them() {
        let expected = |numbers: [usize; 2]| vec![(numbers[0], "{\"a\":1}".to_owned()), (numbers[1], "{}".to_owned())];
        for (text, numbers) in [
            ("{\"a\":1}\n{}\n", [1, 2]),
            ("{\"a\":1}\r\n\r\n{}", [1, 3]),
            ("{\"a\":1}\r{}\r", [1, 2]),
            ("\r{\"a\":1}\r{}", [2, 3]),
            ("\u{feff}{\"a\":1}\n\u{feff}{}", [1, 2]),
        ] {
            assert_eq!(lines(text.as_bytes()), expected(numbers), "{text:?}");
        }
        // White space inside of an object.
        assert_eq!(lines(b"{\"a\":\r[{},\r{}]}\n"), [(1, "{\"a\":\r[{},\r{}]}".to_owned())]);
    }

    #[test]
    fn numbers_of_python_are_null() {
        assert_eq!(
            parsed(r#"{"a": NaN, "b": [-Infinity, Infinity], "c": "NaN \" NaN"}"#).unwrap().to_string(),
            r#"{"a":null,"b":[null,null],"c":"NaN \" NaN"}"#
        );
        assert_eq!(parsed(r#"{"a": 1, "a": 2}"#).unwrap().to_string(), r#"{"a":2}"#);
        for (text, part) in [
            (r#"{"a": NaN"#, "not valid JSON"),
            (r#"{"a": nan}"#, "not valid JSON"),
            ("{\"a\": \"\u{0}\"}", "NUL byte (byte 8"),
            (r#"{"a": "\ud83d"}"#, "hex escape at column"),
            (r#"{"a": "\\NaN", x}"#, "at column 16"),
        ] {
            let message = parsed(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn other_files_are_named() {
        let text = "{\"text\": \"a\"}\n";
        let utf16 = |bytes: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(bytes).collect::<Vec<_>>();
        let utf32 = |bytes: fn(u32) -> [u8; 4]| text.chars().flat_map(|c| bytes(c as u32)).collect::<Vec<_>>();
        for (bytes, name) in [
            (utf16(u16::to_le_bytes), "UTF-16"),
            (utf16(u16::to_be_bytes), "UTF-16"),
            ([b"\xff\xfe".to_vec(), utf16(u16::to_le_bytes)].concat(), "UTF-16"),
            ([b"\xfe\xff".to_vec(), utf16(u16::to_be_bytes)].concat(), "UTF-16"),
            (utf32(u32::to_le_bytes), "UTF-32"),
            (utf32(u32::to_be_bytes), "UTF-32"),
            ([b"\xff\xfe\0\0".to_vec(), utf32(u32::to_le_bytes)].concat(), "UTF-32"),
            (b"PAR1\x15\0".to_vec(), "Parquet"),
            (b"\x1f\x8b\x08\0".to_vec(), "gzip"),
        ] {
            let error = Lines::from_mark(Path::new("x"), bytes.as_slice(), (0, 0)).next(1).expect_err(name).to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
