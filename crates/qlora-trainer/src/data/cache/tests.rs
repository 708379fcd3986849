use std::fs;
use std::path::PathBuf;

use super::*;
use crate::config::{DataOptions, OnUntrained};
use crate::data::dataset::{Dataset, Unused};
use crate::data::encode::{Encoded, Notes, RowOutcome};
use crate::data::load::{Filters, load, load_cached};
use crate::data::rows::{DataFile, RowPlace};
use crate::data::testing::ToyEncoder;

/// More than two shards.
const ROWS: usize = 40_000;

struct Job {
    folder: tempfile::TempDir,
    set: RowSet,
    encoder: ToyEncoder,
    options: EncodeOptions,
    filters: Filters,
}

impl Job {
    fn new() -> Self {
        Self::with_rows(30_000, ROWS)
    }

    /// Rows of several kinds in two files, among them some that are left out, doubled, cut, or have columns that nobody reads:
    /// those up to `first` in one, those from there to `rows` in the other.
    fn with_rows(first: usize, rows: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let row = |i: usize| match i % 7 {
            0 => format!("{{\"text\": \"row {}\"}}\n", i / 70),
            1 => format!("{{\"prompt\": \"p{i}\", \"completion\": \"\", \"id\": {i}}}\n"),
            2 => format!("{{\"prompt\": \"p{i}\", \"completion\": \"the answer to {i} is long\"}}\n"),
            3 => format!("\n{{\"messages\": [{{\"role\": \"assistant\", \"content\": \"{i}\"}}], \"n\": 1}}\n"),
            4 => "{\"text\": \"a\"}\n".to_owned(),
            5 => format!("{{\"prompt\": \"{}\", \"completion\": \"x\"}}\n", "long ".repeat(8)),
            _ => format!("{{\"text\": \"é {i}\"}}\n"),
        };
        let write = |name: &str, rows: std::ops::Range<usize>| {
            let path = folder.path().join(name);
            fs::write(&path, rows.map(row).collect::<String>()).unwrap();
            DataFile::new(path)
        };
        let files = vec![write("a.jsonl", 0..first), write("b.jsonl", first..rows)];
        let options = DataOptions { max_length: 24, on_untrained: OnUntrained::Skip, ..DataOptions::default() };
        let filters = Filters { min_sample_len: 4, exact_deduplication: true, ..Filters::default() };
        let (set, options) = (RowSet::new(files), EncodeOptions::from(&options));
        Self { folder, set, encoder: ToyEncoder::default(), options, filters }
    }

    fn cache(&self) -> TokenCache {
        TokenCache { min_bytes: 0, ..TokenCache::new(self.folder.path().join("cache")) }
    }

    fn load(&self) -> Dataset {
        load(std::slice::from_ref(&self.set), &self.encoder, &self.options, &self.filters).unwrap().0
    }

    fn cached(&self, cache: &TokenCache) -> (Dataset, String) {
        let sets = std::slice::from_ref(&self.set);
        let mut seen = 0;
        let mut watch = |rows: usize| seen = rows.max(seen);
        let loaded = load_cached(sets, &self.encoder, &self.options, &self.filters, Some(cache), &mut watch).unwrap().0;
        assert_eq!(seen, loaded.stats().rows);
        let remark = loaded.remarks().remove(0);
        (loaded, remark)
    }

    fn shards(&self) -> Vec<PathBuf> {
        let folders = fs::read_dir(self.folder.path().join("cache")).unwrap();
        let [folder] = folders.map(|entry| entry.unwrap().path()).collect::<Vec<_>>().try_into().unwrap();
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|path| path.extension().is_some_and(|end| end == "tokens"));
        files.sort();
        files
    }
}

/// Everything that a run sees of its data.
fn assert_same(loaded: &Dataset, expected: &Dataset) {
    assert_eq!(loaded.stats(), expected.stats());
    assert_eq!(loaded.len(), expected.len());
    assert_eq!(loaded.fingerprint(), expected.fingerprint());
    assert_eq!(loaded.group_size(), expected.group_size());
    for i in 0..expected.len() {
        assert_eq!(loaded.document(i), expected.document(i), "document {i}");
        assert_eq!(loaded.origin(i), expected.origin(i), "document {i}");
    }
    assert_eq!(loaded.dropped().collect::<Vec<_>>(), expected.dropped().collect::<Vec<_>>());
    assert_eq!(loaded.remarks()[1..], expected.remarks(), "all but the one about the cache");
}

#[test]
fn data_are_the_same_from_the_cache() {
    let job = Job::new();
    let expected = job.load();
    assert!(expected.stats().dropped_untrained > 0 && expected.stats().dropped_duplicates > 0);
    assert!(expected.stats().truncated > 0 && expected.remarks().len() > 2);
    let (made, remark) = job.cached(&job.cache());
    assert_same(&made, &expected);
    assert!(remark.starts_with("40000 rows tokenized") && remark.contains("kept for the next start"), "{remark}");
    assert_eq!(job.shards().len(), 3, "of the first file two, of the second one");
    let (read, remark) = job.cached(&job.cache());
    assert_same(&read, &expected);
    assert!(remark.starts_with("40000 rows are ready out of the cache"), "{remark}");
    let again = TokenCache { overwrite: true, ..job.cache() };
    let (made, remark) = job.cached(&again);
    assert_same(&made, &expected);
    assert!(remark.starts_with("40000 rows tokenized"), "{remark}");
}

#[test]
fn pairs_are_the_same_from_the_cache() {
    let mut job = Job::new();
    let path = job.folder.path().join("pairs.jsonl");
    let row = |i: usize| format!("{{\"prompt\": \"p{i}\", \"chosen\": \"yes {i}\", \"rejected\": \"no\"}}\n");
    fs::write(&path, (0..100).map(row).collect::<String>()).unwrap();
    job.set = RowSet::new(vec![DataFile::new(path)]);
    let expected = job.load();
    assert_eq!(expected.group_size(), 2);
    assert_same(&job.cached(&job.cache()).0, &expected);
    let (read, remark) = job.cached(&job.cache());
    assert_same(&read, &expected);
    assert!(remark.contains("out of the cache"), "{remark}");
}

/// What was made before a run was killed is there for the next one; so are the first rows, if only they were asked for.
#[test]
fn tokenizing_goes_on_where_it_stopped() {
    let mut job = Job::new();
    let expected = job.load();
    job.cached(&job.cache());
    let shards = job.shards();
    // Killed while the second shard was written.
    for path in [&shards[1], &shards[2], &shards[2].with_file_name(END_FILE)] {
        fs::remove_file(path).unwrap();
    }
    fs::write(shards[1].with_file_name("000001.tokens.tmp-1"), "half of").unwrap();
    let (loaded, remark) = job.cached(&job.cache());
    assert_same(&loaded, &expected);
    assert!(remark.starts_with("16384 rows out of the cache, 23616 rows tokenized"), "{remark}");
    assert!(job.cached(&job.cache()).1.starts_with("40000 rows are ready"));

    fs::remove_dir_all(shards[0].parent().unwrap()).unwrap();
    for (most, start) in
        [(20_000, "20000 rows tokenized"), (9_000, "9000 rows are ready"), (35_000, "20000 rows out of")]
    {
        job.filters.max_samples = Some(most);
        let (loaded, remark) = job.cached(&job.cache());
        assert!(remark.starts_with(start), "{remark}");
        assert_same(&loaded, &job.load());
    }
    job.filters.max_samples = None;
    let (loaded, remark) = job.cached(&job.cache());
    assert!(remark.starts_with("35000 rows out of the cache, 5000 rows tokenized"), "{remark}");
    assert_same(&loaded, &expected);
}

/// A shard that is damaged anywhere is made again, and the others are kept.
#[test]
fn damaged_shards_are_made_again() {
    let job = Job::new();
    let expected = job.load();
    job.cached(&job.cache());
    let shards = job.shards();
    for (i, path) in shards.iter().enumerate() {
        let whole = fs::read(path).unwrap();
        let flipped = |at: usize| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes
        };
        let longer = [whole.as_slice(), b"more"].concat();
        let middle = whole.len() / 2;
        // In the magic, the version, the head's length and fingerprint, the head, the rows; cut off, empty, too long.
        let damages = [0, 8, 12, 15, 16, 40, middle, whole.len() - 1].map(flipped).into_iter();
        for (n, bytes) in
            damages.chain([whole[..middle].to_vec(), whole[..10].to_vec(), Vec::new(), longer]).enumerate()
        {
            fs::write(path, bytes).unwrap();
            let (loaded, remark) = job.cached(&job.cache());
            assert_same(&loaded, &expected);
            let rows = [16_384, 13_616, 10_000][i];
            let expected = format!("{} rows out of the cache, {rows} rows tokenized", ROWS - rows);
            assert!(remark.starts_with(&expected), "shard {i}, damage {n}: {remark}");
            assert!(fs::read(path).unwrap() == whole, "shard {i}, damage {n}: made again, byte for byte");
        }
    }
    // A shard in another's place begins elsewhere.
    fs::copy(&shards[1], &shards[0]).unwrap();
    assert_same(&job.cached(&job.cache()).0, &expected);
    assert!(job.cached(&job.cache()).1.starts_with("40000 rows are ready"));
}

/// No bit of what stands before the rows can change without notice: it says which rows a shard has, and of which file.
#[test]
fn every_bit_of_a_head_is_checked() {
    let job = Job::with_rows(30, 40);
    let expected = job.load();
    job.cached(&job.cache());
    // What is damaged stays damaged, so that every bit is tried on the same files.
    let only_read = TokenCache { write: false, ..job.cache() };
    for (path, start) in job.shards().iter().zip(["40 rows tokenized", "30 rows out of the cache, 10 rows tokenized"]) {
        let whole = fs::read(path).unwrap();
        let before_rows = 24 + u32::from_le_bytes(whole[12..16].try_into().unwrap()) as usize;
        assert_eq!((whole[24], whole[before_rows - 1]), (b'{', b'}'));
        for bit in 0..before_rows * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(path, bytes).unwrap();
            assert!(shard::read_head(path).is_err() && shard::read(path).is_err(), "bit {bit}");
            // A whole load for some: for each it would take a quarter of a minute.
            if bit % 9 == 0 {
                let (loaded, remark) = job.cached(&only_read);
                assert!(remark.starts_with(start), "bit {bit}: {remark}");
                assert_same(&loaded, &expected);
            }
        }
        fs::write(path, whole).unwrap();
    }
    assert!(job.cached(&job.cache()).1.starts_with("40 rows are ready"));
}

#[test]
fn a_shard_of_a_file_that_the_set_does_not_have_is_made_again() {
    let job = Job::with_rows(30, 40);
    let expected = job.load();
    job.cached(&job.cache());
    let shards = job.shards();
    let (head, rows) = shard::read(&shards[0]).unwrap();
    let mut other = shard::ShardBuilder::new(2, head.start);
    rows.iter().for_each(|row| other.push(row));
    fs::write(&shards[0], other.finish(head.end).concat()).unwrap();
    assert_eq!(shard::read(&shards[0]).unwrap().1, rows);
    let (loaded, remark) = job.cached(&job.cache());
    assert_same(&loaded, &expected);
    assert!(remark.starts_with("10 rows out of the cache, 30 rows tokenized"), "{remark}");
    assert!(job.cached(&job.cache()).1.starts_with("40 rows are ready"));
}

/// Rows of long documents fill a shard before their number does.
#[test]
fn shards_end_by_their_bytes() {
    const TOKENS: usize = 1 << 20;
    let job = Job::with_rows(30, 40);
    let cache = job.cache();
    let mut set = cache.of_set(&job.set, &job.encoder, &job.options).unwrap();
    let row = |i: usize| {
        let encoded = Encoded { ids: vec![i as u32; TOKENS], trained: vec![true; TOKENS] };
        let outcome = RowOutcome::Document(encoded, Notes::default());
        EncodedRow { place: RowPlace::Line(i), outcome, unused: Unused::default() }
    };
    let position = |file: usize| RowPosition { file, ..RowPosition::default() };
    let mut writer = set.writer(position(0)).unwrap();
    // The positions only have to differ.
    (0..17).for_each(|i| writer.push(0, &[row(i)], position(i + 1)));
    assert_eq!(writer.shards(), 3);
    assert!(writer.finish(true));
    let mut read = 0;
    for rows in [8, 8, 1] {
        let (file, shard, end) = set.read(position(read)).unwrap();
        assert_eq!((file, shard.len(), end), (0, rows, position(read + rows)));
        assert!(shard.iter().enumerate().all(|(i, found)| *found == row(read + i)));
        read += rows;
    }
    assert!(set.read(position(read)).is_none() && set.ends_at(position(read)));
    let sizes = job.shards().into_iter().map(|path| fs::metadata(path).unwrap().len() as usize);
    assert!(sizes.max().unwrap() < SHARD_BYTES + 4 * TOKENS);
}

#[test]
fn a_cache_that_cannot_be_written_is_no_obstacle() {
    let job = Job::new();
    let expected = job.load();
    let only_read = TokenCache { write: false, ..job.cache() };
    let (loaded, remark) = job.cached(&only_read);
    assert_same(&loaded, &expected);
    assert!(remark.starts_with("40000 rows tokenized") && !remark.contains("kept"), "{remark}");
    assert!(!only_read.folder.exists());
    // A file has the name of the folder.
    fs::write(&only_read.folder, "").unwrap();
    let (loaded, remark) = job.cached(&job.cache());
    assert_same(&loaded, &expected);
    assert!(!remark.contains("kept"), "{remark}");
    // A folder has the name of the second shard: the disk fails in the middle.
    fs::remove_file(&only_read.folder).unwrap();
    job.cached(&job.cache());
    let shards = job.shards();
    fs::remove_file(&shards[1]).unwrap();
    fs::create_dir(&shards[1]).unwrap();
    let (loaded, remark) = job.cached(&job.cache());
    assert_same(&loaded, &expected);
    assert!(!remark.contains("kept"), "{remark}");
}

#[test]
fn whatever_tokens_depend_on_has_a_folder_of_its_own() {
    let mut job = Job::new();
    let cache = job.cache();
    let key = |job: &Job| cache.of_set(&job.set, &job.encoder, &job.options).map(|set| set.folder);
    let first = key(&job).unwrap();
    let mut seen = vec![first.clone()];
    let mut differs = |job: &Job, what: &str| {
        let folder = key(job).unwrap();
        assert!(!seen.contains(&folder), "{what}");
        seen.push(folder);
    };
    job.options.max_length = 25;
    differs(&job, "an option");
    job.encoder.bos = false;
    differs(&job, "the tokenizer");
    job.set.mapping = crate::data::Mapping::new(&toml::from_str("field = \"text\"").unwrap()).unwrap();
    differs(&job, "the mapping");
    job.set.files.swap(0, 1);
    differs(&job, "the order");
    // One byte, the same length, the same time.
    let path = job.set.files[1].path.clone();
    let (mut bytes, time) = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().modified().unwrap());
    let at = bytes.iter().rposition(|&byte| byte == b'9').unwrap();
    bytes[at] = b'8';
    fs::write(&path, bytes).unwrap();
    fs::File::open(&path).unwrap().set_modified(time).unwrap();
    differs(&job, "the content");
    // The same files elsewhere are the same.
    let mut moved = Job::new();
    for file in &mut moved.set.files {
        let path = file.path.with_file_name(format!("moved {}", file.path.file_name().unwrap().display()));
        fs::rename(&file.path, &path).unwrap();
        file.path = path;
    }
    assert_eq!(key(&moved).unwrap(), first);
    // Too little to be worth it, and what cannot be read twice.
    let cache = TokenCache::new(job.cache().folder);
    fs::write(&path, "{\"text\": \"a\"}\n").unwrap();
    job.set.files.remove(0);
    assert!(cache.of_set(&job.set, &job.encoder, &job.options).is_none());
    job.set.files[0].path = crate::data::rows::STDIN.into();
    assert!(job.cache().of_set(&job.set, &job.encoder, &job.options).is_none());
}

#[test]
fn the_versions_of_libraries_are_those_of_the_lock_file() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.lock");
    let lock: toml::Table = toml::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    for (library, version) in LIBRARIES {
        let packages = lock["package"].as_array().unwrap().iter();
        let locked: Vec<_> = packages.filter(|package| package["name"].as_str() == Some(library)).collect();
        assert_eq!(locked.len(), 1, "{library}");
        let locked = locked[0]["version"].as_str().unwrap();
        assert_eq!(locked, version, "set the version of {library} in LIBRARIES of data/encode.rs");
    }
}

/// The first problem is the same, and what came before it is kept.
#[test]
fn a_row_that_cannot_be_used_is_named_as_without_a_cache() {
    let job = Job::new();
    let path = job.set.files[1].path.clone();
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replacen("{\"text\": \"é 33998\"}", "{\"text\": 7}", 1)).unwrap();
    let sets = std::slice::from_ref(&job.set);
    let message = |cache: Option<&TokenCache>| {
        let loaded = load_cached(sets, &job.encoder, &job.options, &job.filters, cache, &mut |_| ());
        loaded.unwrap_err().to_string()
    };
    let expected = message(None);
    assert!(expected.contains("b.jsonl:") && expected.contains("`text` must be a string"), "{expected}");
    assert_eq!(message(Some(&job.cache())), expected);
    assert_eq!(job.shards().len(), 2);
    assert_eq!(message(Some(&job.cache())), expected);
}
