use std::path::PathBuf;

use super::super::testing::ToyEncoder;
use super::*;
use crate::config::{DataOptions, OnOverlong, OnUntrained};

fn set_of(folder: &tempfile::TempDir, files: &[(&str, &str)]) -> RowSet {
    let write = |(name, content): &(&str, &str)| {
        let path: PathBuf = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        DataFile::new(path)
    };
    RowSet::new(files.iter().map(write).collect())
}

fn options() -> EncodeOptions {
    let mut options = DataOptions { max_length: 6, ..DataOptions::default() };
    (options.on_overlong, options.on_untrained) = (OnOverlong::Drop, OnUntrained::Skip);
    EncodeOptions::from(&options)
}

fn marked(dataset: &Dataset) -> Vec<String> {
    let encoder = ToyEncoder::default();
    (0..dataset.len()).map(|i| dataset.document(i).marked_text(&encoder, "[", "]").unwrap()).collect()
}

#[test]
fn what_is_left_out_is_reported_by_line() {
    let folder = tempfile::tempdir().unwrap();
    let jsonl = "{\"text\": \"aa\"}\n{\"text\": \"b\"}\n\n{\"text\": \"aa\", \"id\": 2}\n{\"prompt\": \"a\", \"completion\": \"a\"}\n\
                 {\"text\": \"too long\"}\n{\"prompt\": \"a\", \"completion\": \"\"}\n";
    let array = "[{\"text\": \"aa\"}, {\"text\": \"cc\"}]";
    let set = set_of(&folder, &[("a.jsonl", jsonl), ("b.json", array)]);
    let filters = Filters { min_sample_len: 4, exact_deduplication: true, ..Filters::default() };
    let (dataset, ranges) = load(&[set], &ToyEncoder::default(), &options(), &filters).unwrap();
    assert_eq!(marked(&dataset), ["[^aa$]", "^a[a$]", "[^cc$]"]);
    assert_eq!((ranges.len(), ranges[0].clone()), (1, 0..3));
    let dropped: Vec<_> =
        dataset.dropped().map(|(place, reason)| (place.rsplit('/').next().unwrap().to_owned(), reason)).collect();
    let expected = [
        ("a.jsonl:2", DropReason::Short),
        ("a.jsonl:4", DropReason::Duplicate),
        ("a.jsonl:6", DropReason::Overlong),
        ("a.jsonl:7", DropReason::Untrained),
        ("b.json, row 1", DropReason::Duplicate),
    ];
    assert_eq!(dropped, expected.map(|(place, reason)| (place.to_owned(), reason)));
    let stats = dataset.stats();
    assert_eq!((stats.rows, stats.documents, stats.dropped_short, stats.dropped_duplicates), (8, 3, 1, 2));
    let remarks = dataset.remarks().join("\n");
    assert!(remarks.contains("a.jsonl: 1 row left out, the same as earlier ones: line 4\n"), "{remarks}");
    assert!(remarks.ends_with("b.json: 1 row left out, the same as earlier ones: number 1"), "{remarks}");
    assert!(dataset.origin(2).ends_with("b.json, row 2"), "{}", dataset.origin(2));
    assert!(stats.to_string().contains("; 1 left out as too short; 2 left out as the same as earlier ones"), "{stats}");
}

#[test]
fn sets_are_cut_and_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let first = set_of(
        &folder,
        &[("a.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\n"), ("b.jsonl", "{\"text\": \"c\"}\n{\"text\": \"d\"}\n")],
    );
    let mut second = set_of(&folder, &[("c.csv", "q,a,id\nx,y,1\nz,w,2\n")]);
    second.mapping = Mapping::new(&toml::from_str("field = \"q\"").unwrap()).unwrap();
    let filters = Filters { max_samples: Some(3), ..Filters::default() };
    let (dataset, ranges) = load(&[first, second.clone()], &ToyEncoder::default(), &options(), &filters).unwrap();
    assert_eq!(marked(&dataset), ["[^a$]", "[^b$]", "[^c$]", "[^x$]", "[^z$]"]);
    assert_eq!(ranges, [0..3, 3..5]);
    assert!(dataset.remarks()[0].ends_with("c.csv: columns that are not used: `a`, `id`"), "{:?}", dataset.remarks());
    second.mapping = Mapping::new(&toml::from_str("field = \"missing\"").unwrap()).unwrap();
    let message = load(&[second], &ToyEncoder::default(), &options(), &filters).unwrap_err().to_string();
    assert!(
        message.ends_with("c.csv:2: the column `missing` is missing or null; there are `q`, `a`, `id`"),
        "{message}"
    );
}
