//! Checks how many values a page says it has before it is decoded: the crate's decoders make room for that many, which a damaged
//! page of a few bytes can make gigabytes.
//!
//! Where values are stored as differences (`DELTA_LENGTH_BYTE_ARRAY`, `DELTA_BYTE_ARRAY`), their numbers stand once more among
//! them, in front of the lengths (parquet-format, `Encodings.md`): a length of 0 bits takes no bytes at all.

use parquet::basic::{Encoding, Type};
use parquet::bloom_filter::Sbbf;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::RowGroupReader;
use parquet::record::reader::RowIter;
use parquet::schema::types::{ColumnDescPtr, ColumnDescriptor, Type as Schema};

/// The most values of a page. Writers make pages of some 20,000 rows, a few older ones one page of a row group.
const MAX_VALUES: usize = 4 << 20;

/// A row group whose pages are checked as they are read.
pub(super) struct CheckedGroup<'a>(pub(super) Box<dyn RowGroupReader + 'a>);

impl RowGroupReader for CheckedGroup<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        self.0.metadata()
    }

    fn num_columns(&self) -> usize {
        self.0.num_columns()
    }

    fn get_column_page_reader(&self, column: usize) -> Result<Box<dyn PageReader>> {
        let description = self.metadata().column(column).column_descr_ptr();
        Ok(Box::new(CheckedPages { pages: self.0.get_column_page_reader(column)?, column: description }))
    }

    fn get_column_bloom_filter(&self, column: usize) -> Option<&Sbbf> {
        self.0.get_column_bloom_filter(column)
    }

    fn get_row_iter(&self, _: Option<Schema>) -> Result<RowIter<'_>> {
        Err(ParquetError::NYI("rows that pass the checks by".to_owned()))
    }
}

struct CheckedPages {
    pages: Box<dyn PageReader>,
    column: ColumnDescPtr,
}

impl Iterator for CheckedPages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for CheckedPages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        if let Some(page) = &page {
            check(page, &self.column)
                .map_err(|what| ParquetError::General(format!("column `{}`: {what}", self.column.path().string())))?;
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        self.pages.at_record_boundary()
    }
}

/// Checks a page.
fn check(page: &Page, column: &ColumnDescriptor) -> std::result::Result<(), String> {
    let count = page.num_values() as usize;
    if count > MAX_VALUES {
        return Err(format!(
            "a page has {count} values; at most {MAX_VALUES} are read: write the file with smaller pages or row groups"
        ));
    }
    let damaged = || "a page is damaged".to_owned();
    let (encoding, values) = match page {
        Page::DictionaryPage { buf, .. } => {
            return match count <= buf.len() / least_bytes(column) {
                true => Ok(()),
                false => Err(format!("a dictionary of {} bytes is said to have {count} values", buf.len())),
            };
        }
        Page::DataPage { buf, encoding, def_level_encoding, rep_level_encoding, .. } => {
            let levels = [(column.max_rep_level(), rep_level_encoding), (column.max_def_level(), def_level_encoding)];
            let behind = |bytes, (max, encoding): (i16, &Encoding)| match max {
                0 => Some(bytes),
                _ => behind_levels(bytes, count, max, *encoding),
            };
            (encoding, levels.into_iter().try_fold(&buf[..], behind).ok_or_else(damaged)?)
        }
        Page::DataPageV2 { buf, encoding, def_levels_byte_len, rep_levels_byte_len, .. } => {
            let levels = *def_levels_byte_len as usize + *rep_levels_byte_len as usize;
            (encoding, buf.get(levels..).ok_or_else(damaged)?)
        }
    };
    let lists = match encoding {
        Encoding::DELTA_LENGTH_BYTE_ARRAY => 1,
        Encoding::DELTA_BYTE_ARRAY => 2,
        _ => 0,
    };
    let mut rest = values;
    for _ in 0..lists {
        rest = behind_integers(rest, count).ok_or_else(damaged)?;
    }
    Ok(())
}

/// The fewest bytes that a value of a dictionary takes.
fn least_bytes(column: &ColumnDescriptor) -> usize {
    match column.physical_type() {
        Type::BOOLEAN => 1,
        // Its length.
        Type::BYTE_ARRAY => 4,
        Type::INT32 | Type::FLOAT => 4,
        Type::INT64 | Type::DOUBLE => 8,
        Type::INT96 => 12,
        Type::FIXED_LEN_BYTE_ARRAY => usize::try_from(column.type_length()).unwrap_or(0).max(1),
    }
}

/// The bytes after the levels of `count` values, of a page of the first version.
fn behind_levels(bytes: &[u8], count: usize, max: i16, encoding: Encoding) -> Option<&[u8]> {
    #[expect(deprecated, reason = "old files have it")]
    let packed = encoding == Encoding::BIT_PACKED;
    if packed {
        let width = (i16::BITS - max.leading_zeros()) as usize;
        return bytes.get((count * width).div_ceil(8)..);
    }
    let (length, rest) = bytes.split_first_chunk()?;
    rest.get(usize::try_from(i32::from_le_bytes(*length)).ok()?..)
}

/// The bytes after a list of at most `most` integers that are stored as differences (`DELTA_BINARY_PACKED`).
fn behind_integers(bytes: &[u8], most: usize) -> Option<&[u8]> {
    let mut rest = bytes;
    let [block, minis, total] = [varint(&mut rest)?, varint(&mut rest)?, varint(&mut rest)?];
    varint(&mut rest)?;
    let mini = block.checked_div(minis)?;
    if total > most || mini == 0 {
        return None;
    }
    // The first value stands in the header.
    let mut left = total.saturating_sub(1);
    while left > 0 {
        varint(&mut rest)?;
        let (widths, packed) = rest.split_at_checked(minis)?;
        rest = packed;
        for &width in widths {
            // Behind the last value widths mean nothing.
            if left > 0 {
                rest = rest.get(usize::from(width).checked_mul(mini)? / 8..)?;
            }
            left = left.saturating_sub(mini);
        }
    }
    Some(rest)
}

fn varint(bytes: &mut &[u8]) -> Option<usize> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte < 0x80 {
            return usize::try_from(value).ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use parquet::schema::types::ColumnPath;

    use super::*;

    fn column(max_def: i16, max_rep: i16) -> ColumnDescriptor {
        let schema = Schema::primitive_type_builder("x", Type::BYTE_ARRAY).build().unwrap();
        ColumnDescriptor::new(Arc::new(schema), max_def, max_rep, ColumnPath::from("x"))
    }

    #[expect(deprecated, reason = "old files have it")]
    fn data(bytes: &[u8], num_values: u32, encoding: Encoding, packed: bool) -> Page {
        let levels = if packed { Encoding::BIT_PACKED } else { Encoding::RLE };
        Page::DataPage {
            buf: Bytes::copy_from_slice(bytes),
            num_values,
            encoding,
            def_level_encoding: levels,
            rep_level_encoding: levels,
            statistics: None,
        }
    }

    /// Blocks of 128 in 4, `total` values of which the first is 1, and one block of differences without bits.
    fn integers(total: &[u8]) -> Vec<u8> {
        [&[0x80, 1, 4], total, &[2, 0, 0, 0, 0, 0]].concat()
    }

    #[test]
    fn counts_among_the_values_are_those_of_the_page() {
        assert_eq!(behind_integers(&[integers(&[9]), vec![7, 8]].concat(), 9), Some(&[7, 8][..]));
        assert_eq!(behind_integers(&integers(&[9]), 8), None);
        // One value has no block; widths behind the last value mean nothing.
        assert_eq!(behind_integers(&[0x80, 1, 4, 1, 2, 7], 9), Some(&[7][..]));
        assert_eq!(behind_integers(&[0x80, 1, 4, 9, 2, 0, 1, 9, 9, 9, 1, 2, 3, 4, 5], 9), Some(&[5][..]));
        for cut in 0..integers(&[9]).len() {
            assert_eq!(behind_integers(&integers(&[9])[..cut], 9), None, "{cut}");
        }
        assert_eq!(behind_integers(&[0, 4, 9, 2, 0, 0, 0, 0, 0], 9), None);
        assert_eq!(behind_integers(&[0x80, 1, 0, 9, 2, 0, 0, 0, 0, 0], 9), None);
    }

    #[test]
    fn pages_that_claim_many_values_are_refused() {
        let required = column(0, 0);
        let lengths = integers(&[9]);
        let many = integers(&[0xff, 0xff, 0xff, 0x7f]);
        let delta = Encoding::DELTA_LENGTH_BYTE_ARRAY;
        assert_eq!(check(&data(&lengths, 9, delta, false), &required), Ok(()));
        assert!(check(&data(&many, 9, delta, false), &required).unwrap_err().contains("damaged"));
        let both = [&lengths[..], &many].concat();
        assert!(check(&data(&both, 9, Encoding::DELTA_BYTE_ARRAY, false), &required).is_err());
        assert_eq!(
            check(&data(&[&lengths[..], &lengths].concat(), 9, Encoding::DELTA_BYTE_ARRAY, false), &required),
            Ok(())
        );
        // Levels come first.
        let optional = [&[2, 0, 0, 0, 18, 1], &lengths[..]].concat();
        assert_eq!(check(&data(&optional, 9, delta, false), &column(1, 0)), Ok(()));
        let packed = [&[0xff, 1, 0xff, 0xff, 3], &lengths[..]].concat();
        assert_eq!(check(&data(&packed, 9, delta, true), &column(2, 1)), Ok(()));
        assert!(check(&data(&[255, 255, 255, 255], 9, delta, false), &column(1, 0)).is_err());
        assert!(check(&data(&[], u32::MAX, Encoding::PLAIN, false), &required).unwrap_err().contains("smaller pages"));
        let dictionary = |num_values| Page::DictionaryPage {
            buf: Bytes::from_static(&[0; 8]),
            num_values,
            encoding: Encoding::PLAIN,
            is_sorted: false,
        };
        assert_eq!(check(&dictionary(2), &required), Ok(()));
        assert!(check(&dictionary(3), &required).unwrap_err().contains("said to have 3 values"));
    }
}
