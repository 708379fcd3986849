//! Checks the sizes of a row group's pages before they are read: a page says how large it is when it is decompressed, and the
//! crate's reader takes that much memory.
//!
//! A page header is a struct in Thrift's compact protocol, of which fields 1, 2 and 3 are the page's type, its size when
//! decompressed, and its size as stored (parquet-format, `PageHeader`). The others are skipped.

use std::io::{BufReader, Read};

use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::ChunkReader;

/// The most bytes of a page. Writers make pages of 1 MiB, or of one value if that is larger.
const MAX_PAGE_BYTES: i64 = super::super::MAX_ROW_BYTES as i64;
/// Structs in structs of a header; there are two in the format.
const MAX_DEPTH: usize = 8;

/// # Errors
/// If a page is larger than [`MAX_PAGE_BYTES`], or not in the file.
pub(super) fn check(file: &impl ChunkReader, group: &RowGroupMetaData) -> Result<()> {
    for column in group.columns() {
        let name = column.column_path().string();
        let wrong = |what: String| ParquetError::General(format!("column `{name}`: {what}"));
        let start = column.dictionary_page_offset().unwrap_or(i64::MAX).min(column.data_page_offset());
        let start = if start > 0 { start } else { column.data_page_offset() };
        let (start, stored) = match (u64::try_from(start), u64::try_from(column.compressed_size())) {
            (Ok(start), Ok(stored)) if start.checked_add(stored).is_some_and(|end| end <= file.len()) => {
                (start, stored)
            }
            _ => return Err(wrong("its pages are not in the file".to_owned())),
        };
        let mut at = 0;
        while at < stored {
            let mut header = Header { bytes: BufReader::with_capacity(512, file.get_read(start + at)?), read: 0 };
            let Some([_, large, small]) = header.sizes() else {
                return Err(wrong(format!("the header of the page at byte {} is damaged", start + at)));
            };
            if !(0..=MAX_PAGE_BYTES).contains(&large) || small < 0 {
                return Err(wrong(format!(
                    "a page has {large} bytes when decompressed; at most {MAX_PAGE_BYTES} are read"
                )));
            }
            at = at.saturating_add(header.read).saturating_add(small as u64);
        }
    }
    Ok(())
}

struct Header<R> {
    bytes: R,
    /// Bytes of the header so far.
    read: u64,
}

impl<R: Read> Header<R> {
    /// Fields 1 to 3. The header is read to its end.
    fn sizes(&mut self) -> Option<[i64; 3]> {
        let mut sizes = [None; 3];
        let mut field = 0;
        while let Some(kind) = self.field(&mut field)? {
            match usize::try_from(field - 1).ok().and_then(|i| sizes.get_mut(i)) {
                Some(size) if (4..=6).contains(&kind) => *size = Some(self.integer()?),
                _ => self.skip(kind, 0)?,
            }
        }
        Some([sizes[0]?, sizes[1]?, sizes[2]?])
    }

    /// The type of the next field, whose number replaces that of the last one; `Some(None)` at the struct's end.
    fn field(&mut self, number: &mut i64) -> Option<Option<u8>> {
        let byte = self.byte()?;
        if byte == 0 {
            return Some(None);
        }
        *number = match byte >> 4 {
            0 => self.integer()?,
            delta => number.checked_add(i64::from(delta))?,
        };
        Some(Some(byte & 15))
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        match kind {
            1 | 2 => Some(()),
            3 => self.byte().map(drop),
            4..=6 => self.integer().map(drop),
            7 => self.pass(8),
            8 => self.varint().and_then(|length| self.pass(length)),
            9 | 10 => {
                let head = self.byte()?;
                let length = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
                // An element of a list of booleans takes a byte, a field of that type none.
                let element = if matches!(head & 15, 1 | 2) { 3 } else { head & 15 };
                (0..length).try_for_each(|_| self.skip(element, depth + 1))
            }
            12 => {
                let mut field = 0;
                while let Some(kind) = self.field(&mut field)? {
                    self.skip(kind, depth + 1)?;
                }
                Some(())
            }
            _ => None,
        }
    }

    fn byte(&mut self) -> Option<u8> {
        let mut byte = [0];
        self.bytes.read_exact(&mut byte).ok()?;
        self.read += 1;
        Some(byte[0])
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    /// Zigzag: 0, -1, 1, -2, ...
    fn integer(&mut self) -> Option<i64> {
        self.varint().map(|value| (value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn pass(&mut self, bytes: u64) -> Option<()> {
        let passed = std::io::copy(&mut self.bytes.by_ref().take(bytes), &mut std::io::sink()).ok()?;
        self.read += passed;
        (passed == bytes).then_some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(bytes: &[u8]) -> Option<([i64; 3], u64)> {
        let mut header = Header { bytes, read: 0 };
        header.sizes().map(|sizes| (sizes, header.read))
    }

    #[test]
    fn headers_are_read_to_their_end() {
        // type 0, sizes 300 and 7, a struct with a string and a list of booleans, a stop.
        let header = [0x15, 0, 0x15, 0xd8, 4, 0x15, 14, 0x2c, 0x18, 2, b'a', b'b', 0x19, 0x21, 1, 2, 0, 0, 99];
        assert_eq!(sizes(&header), Some(([0, 300, 7], 18)));
        for length in 0..18 {
            assert_eq!(sizes(&header[..length]), None, "{length}");
        }
        // A size is missing; structs without end; a list that is longer than the file.
        assert_eq!(sizes(&[0x15, 0, 0x25, 2, 0]), None);
        assert_eq!(sizes(&[0x1c; 4000]), None);
        assert_eq!(sizes(&[0x19, 0xf5, 0xff, 0xff, 0xff, 0xff, 0x0f]), None);
    }
}
