//! Reading small text files with a limit, so that a wrong path cannot fill the memory.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The largest `config.json` and the like that is read.
pub(crate) const SMALL: u64 = 16 << 20;
/// The largest tokenizer or shard index that is read.
pub(crate) const LARGE: u64 = 512 << 20;

/// The whole of a UTF-8 file of at most `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String> {
    String::from_utf8(read_bytes(path, limit)?).map_err(|e| {
        Error::format(
            path,
            format!("not UTF-8 text (byte {} is not part of a character)", e.utf8_error().valid_up_to()),
        )
    })
}

/// The whole of a file of at most `limit` bytes.
pub(crate) fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !metadata.is_file() {
        return Err(Error::format(path, "not a regular file"));
    }
    let too_large = || Error::format(path, format!("larger than the {limit} bytes that such a file may have"));
    if metadata.len() > limit {
        return Err(too_large());
    }
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > limit {
        return Err(too_large());
    }
    Ok(bytes)
}

/// A JSON object from a file of at most `limit` bytes.
pub(crate) fn read_object(path: &Path, limit: u64) -> Result<Map<String, Value>> {
    parse_object(&read_text(path, limit)?, path)
}

/// A JSON object from text; `path` is for the error message.
pub(crate) fn parse_object(text: &str, path: &Path) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Error::format(path, "expected a JSON object")),
        Err(e) => Err(Error::format(path, format!("not valid JSON: {e}"))),
    }
}

/// A value from a file as messages show it: a hostile one may be megabytes long.
pub(crate) fn shown(value: &Value) -> String {
    const LONGEST: usize = 300;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}... ({} bytes)", &text[..end], text.len()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_encodings_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        fs::write(&path, "abcd").unwrap();
        assert_eq!(read_text(&path, 4).unwrap(), "abcd");
        assert!(read_text(&path, 3).unwrap_err().to_string().contains("larger than the 3 bytes"));
        fs::write(&path, b"ab\xff").unwrap();
        assert!(read_text(&path, 9).unwrap_err().to_string().contains("byte 2"));
        assert!(read_text(folder.path(), 9).unwrap_err().to_string().contains("not a regular file"));
        assert!(parse_object("[1]", &path).unwrap_err().to_string().contains("JSON object"));
        assert!(parse_object("{\n\"a\": }", &path).unwrap_err().to_string().contains("line 2"));
    }
}
