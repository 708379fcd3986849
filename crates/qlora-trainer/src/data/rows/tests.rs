use std::io::Write;
use std::path::PathBuf;

use serde_json::json;

use super::*;

/// A file of a name with content.
struct Written(tempfile::TempDir, PathBuf);

fn written(name: &str, content: &[u8]) -> Written {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    Written(folder, path)
}

fn rows_of(name: &str, content: &[u8]) -> Result<Vec<(usize, Value)>> {
    let Written(_folder, path) = written(name, content);
    all(&mut RowSource::new(vec![DataFile::new(path)]))
}

fn all(source: &mut RowSource) -> Result<Vec<(usize, Value)>> {
    let mut rows = Vec::new();
    while let Some((file, chunk)) = source.next(3)? {
        for row in chunk {
            let place = row.place();
            let value = row.parse().map_err(|message| place.refuse(&source.files()[file].path, message))?;
            rows.push((place.number(), value));
        }
    }
    Ok(rows)
}

fn refusal(name: &str, content: &[u8]) -> String {
    let message = rows_of(name, content).unwrap_err().to_string();
    message.split_once(name).unwrap_or_else(|| panic!("the file is named: {message}")).1.to_owned()
}

fn texts(texts: &[&str]) -> Vec<Value> {
    texts.iter().map(|text| json!({"text": text})).collect()
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn formats_are_told_by_name_and_content() {
    let jsonl = b"{\"text\": \"a\"}\n\n{\"text\": \"b\"}\n".as_slice();
    let array = b"\xef\xbb\xbf [\n{\"text\": \"a\"},\n {\"text\":\n\"b\"} ]\n".as_slice();
    let csv = b"text\na\nb\n".as_slice();
    let zstd = zstd::encode_all(jsonl, 0).unwrap();
    for (name, content, places) in [
        ("x.jsonl", jsonl.to_vec(), [1, 3]),
        ("x", jsonl.to_vec(), [1, 3]),
        ("x.json", jsonl.to_vec(), [1, 3]),
        ("x.unknown", jsonl.to_vec(), [1, 3]),
        ("x.txt", jsonl.to_vec(), [1, 3]),
        ("x.json", array.to_vec(), [1, 2]),
        ("x", array.to_vec(), [1, 2]),
        ("x.csv", csv.to_vec(), [2, 3]),
        ("x.TSV", csv.to_vec(), [2, 3]),
        ("x.txt", b"a\r\n\nb".to_vec(), [1, 3]),
        ("x.jsonl.gz", gzip(jsonl), [1, 3]),
        // Compressed files that do not say so, and several parts behind each other.
        ("x.jsonl", [gzip(&jsonl[..14]), gzip(&jsonl[14..])].concat(), [1, 3]),
        ("x.json.zst", zstd.clone(), [1, 3]),
        ("x.csv.gz", gzip(csv), [2, 3]),
        ("x.json.gz", gzip(array), [1, 2]),
    ] {
        let rows = rows_of(name, &content).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (found, values): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        assert_eq!((found.as_slice(), values), (places.as_slice(), texts(&["a", "b"])), "{name}");
    }
}

/// Removes null values, which files in columns have in every row.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let there = map.iter().filter(|(_, value)| !value.is_null());
            Value::Object(there.map(|(key, value)| (key.clone(), without_nulls(value))).collect())
        }
        Value::Array(list) => list.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

/// Files as pyarrow and `datasets` write them, with the rows that `datasets` reads from them.
#[test]
fn rows_are_those_of_datasets() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/rows");
    let expected: Map<String, Value> =
        serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    assert!(expected.len() > 10);
    for (name, expected) in expected.iter().filter(|(name, _)| cfg!(feature = "parquet") || !name.ends_with("parquet"))
    {
        let rows =
            all(&mut RowSource::new(vec![DataFile::new(folder.join(name))])).unwrap_or_else(|error| panic!("{error}"));
        let rows: Vec<Value> = rows.iter().map(|(_, row)| without_nulls(row)).collect();
        assert_eq!(Value::from(rows), without_nulls(expected), "{name}");
    }
}

#[test]
fn fields_of_csv_are_texts() {
    let csv = "\u{feff}prompt, completion\n\"a, \"\"b\"\"\nc\",1\n,\"\"\n";
    let rows = rows_of("x.csv", csv.as_bytes()).unwrap();
    assert_eq!(rows[0], (2, json!({"prompt": "a, \"b\"\nc", "completion": "1"})));
    assert_eq!(rows[1], (4, json!({"prompt": "", "completion": ""})));
    let rows = rows_of("x.tsv", b"prompt\tcompletion\na,b\t\"c\td\"\n").unwrap();
    assert_eq!(rows[0], (2, json!({"prompt": "a,b", "completion": "c\td"})));
}

#[test]
fn damaged_files_are_refused_with_their_place() {
    assert_eq!(
        refusal("x.csv", b"a,b\n1,2\n1\n"),
        ":3: 1 fields, but the first line names 2 columns; a field with a comma or a line feed needs quotes"
    );
    assert_eq!(refusal("x.csv", b"a,b\n1,\xff\n"), ":2: column `b` is not UTF-8 text");
    assert_eq!(refusal("x.csv", b"a,a\n1,2\n"), ":1: two columns have the name \"a\"");
    assert_eq!(refusal("x.csv", b"a,b\n"), ": the file has no rows");
    assert_eq!(refusal("x.txt", b"ok\n\xff\n"), ":2: not UTF-8 text (byte 1 of the line)");
    assert_eq!(refusal("x.json", b"[]"), ": the file has no rows");
    assert_eq!(refusal("x.json", b"[{\"a\": 1},\n\n{\"a\": }]"), ": row 2: not valid JSON: expected value at line 3");
    assert_eq!(
        refusal("x.json", b"[{\"a\": 1}\n{\"a\": 2}]"),
        ": row 2: not valid JSON: `,` or `]` was expected at line 2"
    );
    assert_eq!(refusal("x.json", b"[{\"a\": 1},\n"), ": row 2: not valid JSON: an object was expected at line 2");
    assert_eq!(
        refusal("x.json", b"[{\"a\": 1}\n"),
        ": row 2: not valid JSON: the list does not end: `]` is missing at line 2"
    );
    assert_eq!(refusal("x.json", b"[{\"a\": 1}] x"), ": row 2: not valid JSON: something follows the list at line 1");
    assert_eq!(refusal("x.json", b"[{\"a\": \"\xff\"}]"), ": row 1: not UTF-8 text (byte 8 of the row)");
    assert_eq!(refusal("x.json", b"[{\"a\": \"1}]"), ": row 1: not valid JSON: the file ends within a row at line 1");
    assert!(refusal("x.arrow", b"ARROW1").contains("`Dataset.to_parquet`"));
    let cut = gzip(b"{\"text\": \"a\"}\n");
    let message = refusal("x.jsonl.gz", &cut[..cut.len() - 9]);
    assert!(message.starts_with(": the file is compressed with gzip and cannot be unpacked: "), "{message}");
    let mut broken = zstd::encode_all(b"{\"text\": \"a\"}\n".as_slice(), 0).unwrap();
    broken.truncate(7);
    assert!(refusal("x.jsonl.zst", &broken).contains("compressed with zstd"));
    let Written(_folder, path) = written("x.jsonl", b"{}");
    let unknown = DataFile { path, format: Some("xml".to_owned()) };
    let message = RowSource::new(vec![unknown]).next(1).unwrap_err().to_string();
    assert!(message.contains("there is no format \"xml\"; there are jsonl, json, csv, tsv, text"), "{message}");
}

/// A file that unpacks to far more than a row may have.
#[test]
fn bombs_are_refused() {
    let zeros = vec![b' '; 1 << 20];
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    for _ in 0..=(MAX_ROW_BYTES >> 20) {
        encoder.write_all(&zeros).unwrap();
    }
    let bomb = encoder.finish().unwrap();
    assert!(bomb.len() < 4 << 20);
    for name in ["x.jsonl.gz", "x.txt.gz", "x.csv.gz"] {
        let message = refusal(name, &bomb);
        assert!(message.contains("a row of more than 256 MiB") || message.contains("no rows"), "{name}: {message}");
    }
}

/// Every format goes on from every position with the rows that would have followed.
#[test]
fn positions_resume() {
    let row = |i: usize| format!("{{\"text\": \"row {i}\"}}");
    let jsonl: String = (0..9).map(|i| row(i) + if i % 2 == 0 { "\n\n" } else { "\r\n" }).collect();
    let carriage: String = (0..9).map(|i| row(i) + "\r").collect();
    let array = format!("[{}\n]", (0..9).map(row).collect::<Vec<_>>().join(",\n"));
    let csv: String = "text\n".to_owned() + &(0..9).map(|i| format!("\"row {i}\"\n")).collect::<String>();
    let text: String = (0..9).map(|i| format!("row {i}\n\n")).collect();
    let mut files = vec![
        written("a.jsonl", jsonl.as_bytes()),
        written("b.jsonl", carriage.as_bytes()),
        written("c.json", array.as_bytes()),
        written("d.csv", csv.as_bytes()),
        written("e.txt", text.as_bytes()),
        written("f.jsonl.gz", &gzip(jsonl.as_bytes())),
        written("g.json.gz", &gzip(array.as_bytes())),
    ];
    #[cfg(feature = "parquet")]
    files.push(written(
        "h.parquet",
        &super::parquet::tests::texts(&(0..9).map(|i| format!("row {i}")).collect::<Vec<_>>(), 4),
    ));
    let sources = || RowSource::new(files.iter().map(|Written(_, path)| DataFile::new(path)).collect());
    let whole = all(&mut sources()).unwrap();
    assert_eq!(whole.len(), 9 * files.len());
    for (i, (_, value)) in whole.iter().enumerate() {
        assert_eq!(*value, json!({"text": format!("row {}", i % 9)}));
    }
    for step in [1, 2, 4] {
        let mut source = sources();
        let mut read = 0;
        while let Some((_, rows)) = source.next(step).unwrap() {
            read += rows.len();
            let stored = serde_json::to_string(&source.position()).unwrap();
            let mut resumed = sources();
            resumed.seek(serde_json::from_str(&stored).unwrap());
            assert_eq!(all(&mut resumed).unwrap(), whole[read..], "{step}, {read}");
        }
    }
}

#[test]
fn folders_and_patterns_are_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(at("deep/.git")).unwrap();
    std::fs::create_dir_all(at("empty")).unwrap();
    for name in
        ["b.jsonl", "a.csv.gz", "deep/c.parquet", "README.md", "dataset_info.json", ".hidden.json", "deep/.git/x.json"]
    {
        std::fs::write(at(name), "").unwrap();
    }
    assert_eq!(expand(folder.path()).unwrap(), [at("a.csv.gz"), at("b.jsonl"), at("deep/c.parquet")]);
    assert_eq!(expand(&at("*.jsonl")).unwrap(), [at("b.jsonl")]);
    assert_eq!(expand(&at("**/*.parquet")).unwrap(), [at("deep/c.parquet")]);
    assert_eq!(expand(Path::new("-")).unwrap(), [PathBuf::from("-")]);
    assert_eq!(expand(&at("none.jsonl")).unwrap(), [at("none.jsonl")]);
    let refusal = |path: &Path| expand(path).unwrap_err().to_string();
    assert!(refusal(&at("empty")).contains("the folder has no data files (.jsonl, .ndjson, .json, .csv"));
    assert!(refusal(&at("*.none")).ends_with("no file fits the pattern"));
    assert!(refusal(&at("x[")).contains("not a pattern of files"));
}
