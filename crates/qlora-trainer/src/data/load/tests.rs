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

/// A set of rows is ready at 90% or more of the speed of the tokenizer alone, on the same cores. `ROWS` rows, tokenized by the
/// tokenizer of the GGUF file `TOKENIZER`.
#[test]
#[ignore = "measures speed, on an idle machine; run by scripts/bench/load_rows.sh"]
fn rows_are_ready_about_as_fast_as_they_are_tokenized() {
    let of = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let count: usize = of("ROWS").parse().unwrap();
    let tokenizer = qlora_core::tokenizer::Tokenizer::from_gguf_file(of("TOKENIZER")).unwrap();
    let words = "the water runs down the hill; 17 winds turned (slowly) because nobody asked either of them, and \"that\" was it. ";
    let mut random = crate::rng::SplitMix64::new(1);
    let mut text = |i: usize| {
        let (from, length) = (random.below(100) as usize, 100 + random.below(900) as usize);
        format!("{i} {}", &words.repeat(11)[from..from + length])
    };
    let texts: Vec<String> = (0..count).map(&mut text).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let line = |text: &String| serde_json::json!({ "text": text }).to_string() + "\n";
    std::fs::write(&path, texts.iter().map(line).collect::<String>()).unwrap();

    let start = std::time::Instant::now();
    let mut tokens = 0;
    for chunk in texts.chunks(CHUNK) {
        tokens +=
            tokenizer.inner().encode_batch(chunk.to_vec(), true).unwrap().iter().map(|ids| ids.len()).sum::<usize>();
    }
    let alone = count as f64 / start.elapsed().as_secs_f64();
    drop(texts);

    let before = crate::memory::peak_resident();
    let encoder = crate::encoder::ModelEncoder::new(&tokenizer, None, &[]);
    let options = EncodeOptions::from(&DataOptions::default());
    let start = std::time::Instant::now();
    let (dataset, _) =
        load(&[RowSet::new(vec![DataFile::new(&path)])], &encoder, &options, &Filters::default()).unwrap();
    let ready = count as f64 / start.elapsed().as_secs_f64();
    let share = 100.0 * ready / alone;
    println!(
        "{count} rows, {tokens} tokens: encode_batch {alone:.0} rows/s, ready {ready:.0} rows/s, {share:.0}%; peak of the process before \
         and after: {before:?}, {:?} bytes",
        crate::memory::peak_resident()
    );
    assert_eq!(dataset.len(), count);
    assert!(share >= 90.0, "{share:.0}%");
}
