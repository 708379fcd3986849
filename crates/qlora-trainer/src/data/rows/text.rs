//! Plain text: every line that is not blank is a row with the column `text`, as in Hugging Face's `text` format.

use std::io::{BufRead, Read};
use std::path::PathBuf;

use serde_json::{Value, json};

use super::input::{Bytes, Input};
use super::{CHUNK_BYTES, Content, Format, MAX_ROW_BYTES, Mark, RawRow, RowPlace, RowReader, too_long};
use crate::error::{Error, Result};

pub(super) const FORMAT: Format = Format { name: "text", extensions: &["txt", "text"], open };

struct Reader {
    path: PathBuf,
    bytes: Bytes,
    mark: Mark,
}

fn open(input: Input<'_>, from: Mark) -> Result<Box<dyn RowReader>> {
    let path = input.path.to_owned();
    Ok(Box::new(Reader { path, bytes: input.bytes_from(from.bytes)?, mark: from }))
}

impl RowReader for Reader {
    fn next(&mut self, count: usize) -> Result<Vec<RawRow>> {
        let (mut rows, mut size) = (Vec::new(), 0);
        while rows.len() < count && size < CHUNK_BYTES {
            let mut line = Vec::new();
            let limited = &mut self.bytes.by_ref().take(MAX_ROW_BYTES as u64 + 1);
            let read = limited.read_until(b'\n', &mut line).map_err(|error| Error::io(&self.path, error))?;
            if read == 0 {
                break;
            }
            self.mark.lines += 1;
            self.mark.bytes += read as u64;
            let place = RowPlace::Line(self.mark.lines as usize);
            if read > MAX_ROW_BYTES {
                return Err(too_long(&self.path, place));
            }
            size += read;
            if !line.trim_ascii().is_empty() {
                self.mark.rows += 1;
                rows.push(RawRow { place, content: Content::Text(line) });
            }
        }
        Ok(rows)
    }

    fn mark(&self) -> Mark {
        self.mark
    }
}

/// The row of a line.
pub(super) fn parse(bytes: Vec<u8>) -> std::result::Result<Value, String> {
    let text = String::from_utf8(bytes)
        .map_err(|error| format!("not UTF-8 text (byte {} of the line)", error.utf8_error().valid_up_to() + 1))?;
    let line = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let line = line.strip_suffix('\n').unwrap_or(line);
    Ok(json!({"text": line.strip_suffix('\r').unwrap_or(line)}))
}
