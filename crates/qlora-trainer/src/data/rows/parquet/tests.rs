use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::super::{DataFile, RowSource};
use super::*;

/// A file of one text column, with so many rows in a group.
pub(in super::super) fn texts(texts: &[String], in_group: usize) -> Vec<u8> {
    let schema = Arc::new(parse_message_type("message rows { required binary text (UTF8); }").unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::default()).unwrap();
    for group in texts.chunks(in_group) {
        let mut columns = writer.next_row_group().unwrap();
        let mut column = columns.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = group.iter().map(|text| text.as_str().into()).collect();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        columns.close().unwrap();
    }
    writer.into_inner().unwrap()
}

/// Conversations as Arrow writes them, and numbers that may be missing.
fn conversations(compression: Compression) -> Vec<u8> {
    let schema = "message rows {
        optional group messages (LIST) { repeated group list { optional group element {
            optional binary role (UTF8); optional binary content (UTF8); } } }
        optional int64 id; }";
    let properties = WriterProperties::builder().set_compression(compression).build();
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
    let mut columns = writer.next_row_group().unwrap();
    for texts in [["user", "assistant", "user"], ["q", "a", "r"]] {
        let mut column = columns.next_column().unwrap().unwrap();
        let values = texts.map(ByteArray::from);
        column.typed::<ByteArrayType>().write_batch(&values, Some(&[4, 4, 4]), Some(&[0, 1, 0])).unwrap();
        column.close().unwrap();
    }
    let mut column = columns.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[7], Some(&[1, 0]), None).unwrap();
    column.close().unwrap();
    columns.close().unwrap();
    writer.into_inner().unwrap()
}

fn rows(content: &[u8]) -> Result<Vec<Value>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    std::fs::write(&path, content).unwrap();
    let mut source = RowSource::new(vec![DataFile::new(path)]);
    let mut rows = Vec::new();
    while let Some((_, chunk)) = source.next(100)? {
        rows.extend(chunk.into_iter().map(|row| row.parse().unwrap()));
    }
    Ok(rows)
}

#[test]
fn nested_columns_are_lists_and_objects() {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let expected = [
        json!({"messages": [message("user", "q"), message("assistant", "a")], "id": 7}),
        json!({"messages": [message("user", "r")], "id": null}),
    ];
    let zstd = Compression::ZSTD(Default::default());
    let gzip = Compression::GZIP(Default::default());
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, zstd, gzip, Compression::LZ4_RAW] {
        assert_eq!(rows(&conversations(compression)).unwrap(), expected, "{compression:?}");
    }
}

/// Whatever byte is damaged, there are rows or an error with the file's name, and pages that claim to be huge are not made.
#[test]
fn damaged_files_are_refused() {
    let content = conversations(Compression::SNAPPY);
    let mut refused = 0;
    for at in 0..content.len() {
        for bit in [0, 3, 7] {
            let mut damaged = content.clone();
            damaged[at] ^= 1 << bit;
            if let Err(error) = rows(&damaged) {
                refused += 1;
                assert!(error.to_string().contains("x.parquet"), "{at}: {error}");
            }
        }
    }
    assert!(refused > content.len(), "{refused} of {} refused", 3 * content.len());
    for length in 0..content.len() {
        let error = rows(&content[..length]).unwrap_err().to_string();
        assert!(error.contains("x.parquet"), "{length}: {error}");
    }
}
