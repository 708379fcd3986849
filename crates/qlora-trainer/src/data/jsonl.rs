//! JSONL files: one JSON object a line, UTF-8, blank lines ignored.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::dataset::Dataset;
use super::encode::{EncodeOptions, TextEncoder};
use super::load::{self, Filters, RowSet};
use super::record::Record;
use super::rows::{DataFile, RowSource};
use crate::error::{Error, Result};

/// A row of a JSONL file as it stands there.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct JsonLine {
    /// Its line, from 1.
    pub number: usize,
    /// The object.
    pub row: Value,
}

/// Reads and encodes JSONL files.
///
/// # Errors
/// The first problem, with its file and line: a file that cannot be read, a line that is not UTF-8 or not JSON, a row in
/// no known format, one without a token to train on (unless the options say to skip those), an overlong one (if the
/// options say so). Also files without any row, and files of which nothing is left.
pub fn load_jsonl(paths: &[PathBuf], encoder: &dyn TextEncoder, options: &EncodeOptions) -> Result<Dataset> {
    let set = RowSet::new(paths.iter().map(jsonl_file).collect());
    load::load(std::slice::from_ref(&set), encoder, options, &Filters::default()).map(|(dataset, _)| dataset)
}

/// Reads the rows of a JSONL file as records, without encoding them.
///
/// # Errors
/// The first problem, with its file and line. Also a file without any row.
pub fn read_records(path: &Path) -> Result<Vec<Record>> {
    let read = |JsonLine { number, row }: &JsonLine| {
        Record::from_json(row).map_err(|message| Error::data(path, *number, message))
    };
    read_json_lines(path)?.iter().map(read).collect()
}

/// Reads the rows of a JSONL file as they stand there.
///
/// # Errors
/// The first problem, with its file and line. Also a file without any row.
pub fn read_json_lines(path: &Path) -> Result<Vec<JsonLine>> {
    let mut source = RowSource::new(vec![jsonl_file(path)]);
    let mut lines = Vec::new();
    while let Some((_, rows)) = source.next(usize::MAX)? {
        for row in rows {
            let number = row.place().number();
            let row = row.parse().map_err(|message| Error::data(path, number, message))?;
            lines.push(JsonLine { number, row });
        }
    }
    Ok(lines)
}

/// Checks that a JSONL file can be read and every row is in a known format. Keeps nothing.
///
/// # Errors
/// As [`read_records`].
pub fn check_jsonl(path: &Path) -> Result<()> {
    load::check(&RowSet::new(vec![jsonl_file(path)]))
}

/// A file that is taken for JSONL whatever its name is; it may be compressed.
fn jsonl_file(path: impl Into<PathBuf>) -> DataFile {
    DataFile { path: path.into(), format: Some("jsonl".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::super::load::CHUNK;
    use super::super::testing::ToyEncoder;
    use super::*;
    use crate::config::DataOptions;
    use proptest::prelude::*;

    fn load_with(content: &[u8], change: impl Fn(&mut DataOptions)) -> Result<Dataset> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, content).unwrap();
        let mut options = DataOptions::default();
        change(&mut options);
        load_jsonl(&[path], &ToyEncoder::default(), &EncodeOptions::from(&options))
    }

    fn refusal(content: &[u8]) -> String {
        let message = load_with(content, |_| ()).unwrap_err().to_string();
        message.split_once("data.jsonl").expect("the file is named").1.to_owned()
    }

    #[test]
    fn every_format_is_read_and_lines_are_remembered() {
        let content = "\u{feff}{\"text\": \"a\"}\r\n\n   \n{\"prompt\": \"p\", \"completion\": \"c\"}\n\
            {\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n\
            {\"instruction\": \"i\", \"input\": \"\", \"output\": \"o\"}\n\
            {\"conversations\": [{\"from\": \"human\", \"value\": \"q\"}, {\"from\": \"gpt\", \"value\": \"a\"}]}";
        let dataset = load_with(content.as_bytes(), |_| ()).unwrap();
        assert_eq!(dataset.len(), 5);
        let encoder = ToyEncoder::default();
        let texts: Vec<_> = (0..5).map(|i| dataset.document(i).marked_text(&encoder, "[", "]").unwrap()).collect();
        assert_eq!(texts, ["[^a$]", "^p[c$]", "^<u>q|<a>[a|]", "^<u>i|<a>[o|]", "^<u>q|<a>[a|]"]);
        assert!(dataset.origin(1).ends_with("data.jsonl:4"), "{}", dataset.origin(1));
        assert_eq!(dataset.stats().rows, 5);
    }

    #[test]
    fn chunks_keep_order_and_line_numbers() {
        let content: String = (0..3 * CHUNK).map(|i| format!("{{\"text\": \"{i}\"}}\n")).collect();
        let dataset = load_with(content.as_bytes(), |_| ()).unwrap();
        assert_eq!(dataset.len(), 3 * CHUNK);
        let encoder = ToyEncoder::default();
        for i in [0, CHUNK - 1, CHUNK, 3 * CHUNK - 1] {
            assert_eq!(dataset.document(i).marked_text(&encoder, "", "").unwrap(), format!("^{i}$"));
            assert!(dataset.origin(i).ends_with(&format!(":{}", i + 1)));
        }
        let broken = content + "{";
        assert!(refusal(broken.as_bytes()).starts_with(&format!(":{}: not valid JSON", 3 * CHUNK + 1)));
    }

    #[test]
    fn bad_files_are_refused_with_their_line() {
        let good = b"{\"text\": \"a\"}\n".as_slice();
        assert_eq!(refusal(b""), ": the file has no rows");
        assert_eq!(refusal(b"\n \n"), ": the file has no rows");
        let after_good = |line: &[u8]| refusal(&[good, b"\n", line].concat());
        assert_eq!(after_good(b"{\"text\": \"a\xff\"}"), ":3: not UTF-8 text (byte 12 of the line)");
        assert_eq!(after_good(b"{\"text\": }"), ":3: not valid JSON: expected value at column 10");
        assert_eq!(after_good(b"{\"text\": \"a"), ":3: not valid JSON: EOF while parsing a string at column 11");
        assert!(after_good(b"{\"text\": \"a\"} x").starts_with(":3: not valid JSON: trailing characters"));
        assert!(after_good(b"{\"prompt\": \"a\"}").starts_with(":3: `prompt` without `completion`"));
        let untrained = b"{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}]}";
        assert!(after_good(untrained).starts_with(":3: no token to train on: no message of the assistant"));
        let list = refusal(b"[\n{\"text\": \"a\"}\n]");
        assert!(list.starts_with(":1: not valid JSON: EOF") && list.contains("one object a line"), "{list}");
        assert!(refusal(b"[{\"text\": \"a\"}]").starts_with(":1: a row must be a JSON object, not a list"));
        let missing = load_jsonl(&["no/such.jsonl".into()], &ToyEncoder::default(), &(&DataOptions::default()).into());
        assert!(missing.unwrap_err().to_string().starts_with("no/such.jsonl: No such file"));
        // A folder opens but cannot be read.
        let folder = load_jsonl(&[".".into()], &ToyEncoder::default(), &(&DataOptions::default()).into());
        assert!(folder.unwrap_err().to_string().starts_with(".: Is a directory"));
    }

    #[test]
    fn what_is_left_out_is_counted() {
        let content = b"{\"prompt\": \"aaaaaaaaaa\", \"completion\": \"b\"}\n{\"text\": \"abcdefghij\"}\n\
            {\"prompt\": \"a\", \"completion\": \"\"}\n{\"prompt\": \"^a\", \"completion\": \"b\"}\n";
        let skip = |options: &mut DataOptions| {
            options.max_length = 6;
            options.on_untrained = crate::config::OnUntrained::Skip;
        };
        let stats = *load_with(content, skip).unwrap().stats();
        assert_eq!((stats.rows, stats.documents, stats.longest), (4, 2, 6));
        assert_eq!((stats.truncated, stats.dropped_after_truncation, stats.dropped_untrained), (1, 1, 1));
        assert_eq!((stats.double_bos, stats.tokens, stats.trained_tokens), (1, 10, 7));
        let drop = |options: &mut DataOptions| {
            skip(options);
            options.on_overlong = crate::config::OnOverlong::Drop;
        };
        assert_eq!(load_with(content, drop).unwrap().stats().dropped_overlong, 2);
        let nothing = load_with(b"{\"prompt\": \"a\", \"completion\": \"\"}", drop).unwrap_err().to_string();
        assert!(nothing.contains("none of 1 rows is left"), "{nothing}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Any bytes give documents or an error that names the file.
        #[test]
        fn arbitrary_bytes_never_panic(content in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Err(error) = load_with(&content, |_| ()) {
                prop_assert!(error.to_string().contains("data.jsonl"));
            }
        }

        /// The same for bytes that begin like rows.
        #[test]
        fn damaged_rows_never_panic(cut in 0usize..400, flip in 0usize..400, value in any::<u8>()) {
            let mut content = b"{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \
                \"content\": \"a\", \"weight\": 1}], \"tools\": null}\n{\"prompt\": \"p\", \"completion\": \"c\"}\n\
                {\"instruction\": \"i\", \"output\": \"o\", \"history\": [[\"a\", \"b\"]]}\n{\"text\": \"t\"}\n".to_vec();
            if let Some(byte) = content.get_mut(flip) {
                *byte = value;
            }
            content.truncate(cut);
            if let Err(error) = load_with(&content, |_| ()) {
                prop_assert!(error.to_string().contains("data.jsonl"));
            }
        }
    }
}
