use std::io::Write;
use std::path::PathBuf;

use super::super::loader::{Position, StepBatch};
use super::super::order::LoaderOptions;
use super::super::rows::DataFile;
use super::super::testing::ToyEncoder;
use super::*;
use crate::config::{DataOptions, TrainConfig};

const OPTIONS: LoaderOptions = LoaderOptions { batch_size: 2, accumulation: 2, shuffle: Some(7), packing: None };

/// Three sets: two JSONL files with rows that are left out, a compressed one, a CSV file.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &[u8]| std::fs::write(folder.path().join(name), content).unwrap();
        let jsonl = |name: &str, rows: usize| -> String {
            let row =
                |i: usize| format!("{{\"text\": \"{name}{i}{}\"}}\n", if i % 7 == 3 { "" } else { "-long enough" });
            (0..rows).map(row).collect()
        };
        write("a.jsonl", jsonl("a", 37).as_bytes());
        write("b.jsonl", jsonl("b", 5).as_bytes());
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(jsonl("c", 19).as_bytes()).unwrap();
        write("c.jsonl.gz", &gzip.finish().unwrap());
        write(
            "d.csv",
            ("text\n".to_owned() + &(0..11).map(|i| format!("d{i}-long enough\n")).collect::<String>()).as_bytes(),
        );
        Self(folder)
    }

    fn set(&self, names: &[&str]) -> RowSet {
        RowSet::new(names.iter().map(|name| DataFile::new(self.0.path().join(name))).collect())
    }

    fn sets(&self) -> Vec<RowSet> {
        vec![self.set(&["a.jsonl", "b.jsonl"]), self.set(&["c.jsonl.gz"]), self.set(&["d.csv"])]
    }
}

fn options(strategy: MixStrategy) -> StreamOptions {
    StreamOptions {
        encode: EncodeOptions::from(&DataOptions { max_length: 64, ..DataOptions::default() }),
        min_sample_len: 8,
        max_samples: None,
        mix_strategy: strategy,
        interleave_probs: if strategy == MixStrategy::Concat { Vec::new() } else { vec![0.6, 0.3, 0.1] },
        buffer_size: 10,
        val_size: 0,
        seed: 42,
    }
}

fn loader(files: &Files, options: StreamOptions, batches: LoaderOptions) -> (StreamLoader, Option<Dataset>) {
    let (stream, validation) = Stream::open(files.sets(), Arc::new(ToyEncoder::default()), options).unwrap();
    (StreamLoader::new(stream, batches, |_| Ok(())).unwrap(), validation)
}

/// The documents of a step, such as `a12`.
fn texts(step: &StepBatch) -> Vec<String> {
    let text = |batch: &qlora_core::batch::Batch| {
        let text: String = batch.tokens.iter().filter_map(|&id| char::from_u32(id)).collect();
        text.split('^')
            .filter(|text| !text.is_empty())
            .map(|text| text.split('-').next().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    step.micro_batches.iter().flat_map(text).collect()
}

#[test]
fn an_epoch_has_every_document_once_and_a_partial_end() {
    let files = Files::new();
    let (mut loader, _) = loader(&files, options(MixStrategy::InterleaveOnce), OPTIONS);
    let mut orders = Vec::new();
    for epoch in 0..2 {
        let mut seen = Vec::new();
        while loader.position().epoch == epoch {
            assert_eq!(loader.position().step, seen.len().div_ceil(4));
            let step = loader.next_step().unwrap();
            assert_eq!(step.num_items, step.micro_batches.iter().map(|batch| batch.trained_tokens()).sum::<usize>());
            seen.extend(texts(&step));
        }
        assert!(loader.origin(0).contains("jsonl") || loader.origin(0).contains("csv"), "{}", loader.origin(0));
        orders.push(seen.clone());
        seen.sort();
        let kept = |name: &str, rows: usize, all: bool| {
            (0..rows).filter(|i| all || i % 7 != 3).map(|i| format!("{name}{i}")).collect::<Vec<_>>()
        };
        let mut expected =
            [kept("a", 37, false), kept("b", 5, false), kept("c", 19, false), kept("d", 11, true)].concat();
        expected.sort();
        assert_eq!(seen, expected);
    }
    assert_ne!(orders[0], orders[1]);
}

#[test]
fn without_shuffling_the_order_is_that_of_the_files() {
    let files = Files::new();
    let (mut loader, _) = loader(&files, options(MixStrategy::Concat), LoaderOptions { shuffle: None, ..OPTIONS });
    let first: Vec<String> = (0..3).flat_map(|_| texts(&loader.next_step().unwrap())).collect();
    assert_eq!(first, ["a0", "a1", "a2", "a4", "a5", "a6", "a7", "a8", "a9", "a11", "a12", "a13"]);
}

/// Interrupted after any step, a run goes on with the same batches: mixed, shuffled, packed or not, with rows that are left out,
/// documents that are evaluated on, sets that begin anew within an epoch, and over the ends of epochs.
#[test]
fn any_position_can_be_reached() {
    let files = Files::new();
    for strategy in
        [MixStrategy::Concat, MixStrategy::InterleaveUnder, MixStrategy::InterleaveOver, MixStrategy::InterleaveOnce]
    {
        for (packing, val_size, max_samples) in [(None, 0, None), (Some(64), 3, None), (None, 2, Some(17))] {
            let stream = || StreamOptions { val_size, max_samples, ..options(strategy) };
            let batches = LoaderOptions { packing, ..OPTIONS };
            let (mut whole, validation) = loader(&files, stream(), batches);
            assert_eq!(validation.map_or(0, |data| data.len()), val_size);
            let mut steps: Vec<(Position, String, StepBatch)> = Vec::new();
            while whole.position().epoch < 3 && steps.len() < 60 {
                let stored = serde_json::to_string(&whole.stream_position()).unwrap();
                steps.push((whole.position(), stored, whole.next_step().unwrap()));
            }
            assert!(whole.position().epoch >= 1, "{strategy:?}");
            for (i, (position, stored, _)) in steps.iter().enumerate().step_by(3) {
                let (mut resumed, _) = loader(&files, stream(), batches);
                resumed.seek(*position, &serde_json::from_str(stored).unwrap()).unwrap();
                for (position, _, step) in steps.iter().skip(i).take(5) {
                    assert_eq!(resumed.position(), *position, "{strategy:?} {packing:?} from {i}");
                    assert_eq!(resumed.next_step().unwrap(), *step, "{strategy:?} {packing:?} from {i}");
                }
            }
        }
    }
}

#[test]
fn what_is_split_off_is_not_trained_on() {
    let files = Files::new();
    let (mut loader, validation) =
        loader(&files, StreamOptions { val_size: 4, ..options(MixStrategy::Concat) }, OPTIONS);
    let validation = validation.unwrap();
    assert!(validation.origin(3).ends_with("a.jsonl:5"), "{}", validation.origin(3));
    let mut seen = Vec::new();
    while loader.position().epoch < 2 {
        seen.extend(texts(&loader.next_step().unwrap()));
    }
    assert!(["a0", "a1", "a2", "a4"].iter().all(|text| !seen.contains(&text.to_string())));
    assert_eq!(seen.iter().filter(|text| *text == "a5").count(), 2);
}

#[test]
fn problems_are_found_when_their_turn_comes() {
    let files = Files::new();
    let path: PathBuf = files.0.path().join("late.jsonl");
    let rows: String = (0..600).map(|i| format!("{{\"text\": \"x{i}-long enough\"}}\n")).collect();
    std::fs::write(&path, rows + "{\n").unwrap();
    let open = |set: RowSet, options| Stream::open(vec![set], Arc::new(ToyEncoder::default()), options);
    let concat = || StreamOptions { interleave_probs: Vec::new(), ..options(MixStrategy::Concat) };
    let (stream, _) = open(files.set(&["late.jsonl"]), concat()).unwrap();
    let mut loader = StreamLoader::new(stream, OPTIONS, |_| Ok(())).unwrap();
    let (steps, error) = (0..).find_map(|step| loader.next_step().err().map(|error| (step, error))).unwrap();
    assert!(steps > 50 && error.to_string().contains("late.jsonl:601: not valid JSON"), "{steps}: {error}");
    let refusal = |set: &str, options| open(files.set(&[set]), options).unwrap_err().to_string();
    let short = refusal("b.jsonl", StreamOptions { min_sample_len: 60, ..concat() });
    assert!(
        short.contains("b.jsonl: no row is left to train on") && short.contains("5 left out as too short"),
        "{short}"
    );
    let all = refusal("b.jsonl", StreamOptions { val_size: 4, ..concat() });
    assert!(all.contains("takes all 4 documents"), "{all}");
    let (stream, _) = open(files.set(&["b.jsonl"]), concat()).unwrap();
    let refused = StreamLoader::new(stream, OPTIONS, |_| Err(Error::Invalid("no".to_owned()))).unwrap_err();
    assert_eq!(refused.to_string(), "no");
    // Another file of the same name.
    let (stream, _) = open(files.set(&["a.jsonl"]), concat()).unwrap();
    let mut loader = StreamLoader::new(stream, OPTIONS, |_| Ok(())).unwrap();
    (0..4).for_each(|_| drop(loader.next_step().unwrap()));
    let (position, stored) = (loader.position(), loader.stream_position());
    std::fs::write(files.0.path().join("a.jsonl"), "{\"text\": \"x-long enough\"}\n").unwrap();
    let (stream, _) = open(files.set(&["a.jsonl"]), concat()).unwrap();
    let mut loader = StreamLoader::new(stream, OPTIONS, |_| Ok(())).unwrap();
    let error = loader.seek(position, &stored).unwrap_err().to_string();
    assert!(error.contains("another file now"), "{error}");
}

/// A pipe is read once: forward to where a run was, but not again.
#[cfg(unix)]
#[test]
fn pipes_are_read_once() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let rows: String = (0..40).map(|i| format!("{{\"text\": \"x{i}-long enough\"}}\n")).collect();
    let open = || {
        let (path, rows) = (pipe.clone(), rows.clone());
        let writer = std::thread::spawn(move || std::fs::write(path, rows).unwrap());
        let set = RowSet::new(vec![DataFile::new(&pipe)]);
        let concat = StreamOptions { interleave_probs: Vec::new(), ..options(MixStrategy::Concat) };
        let (stream, _) = Stream::open(vec![set], Arc::new(ToyEncoder::default()), concat).unwrap();
        (StreamLoader::new(stream, OPTIONS, |_| Ok(())).unwrap(), writer)
    };
    let (mut whole, writer) = open();
    let mut steps = Vec::new();
    while whole.position().epoch == 0 {
        steps.push((whole.position(), whole.stream_position(), whole.next_step().unwrap()));
    }
    assert_eq!(steps.len(), 10);
    let again = whole.next_step().unwrap_err().to_string();
    assert!(again.contains("a pipe can be read once only"), "{again}");
    writer.join().unwrap();
    let (mut resumed, writer) = open();
    resumed.seek(steps[6].0, &steps[6].1).unwrap();
    for (_, _, step) in &steps[6..] {
        assert_eq!(resumed.next_step().unwrap(), *step);
    }
    writer.join().unwrap();
}

/// Writes rows of 100 to 8,000 characters until there are `bytes`; returns their number.
#[cfg(unix)]
fn write_rows(path: &Path, bytes: u64) -> u64 {
    let text =
        "the water runs down the hill and the wind turns with it because nobody asked either of them ".repeat(90);
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(path).unwrap());
    let (mut written, mut rows) = (0, 0);
    let mut random = crate::rng::SplitMix64::new(1);
    while written < bytes {
        let row = format!("{{\"text\": \"{rows} {}\"}}\n", &text[..100 + random.below(7900) as usize]);
        file.write_all(row.as_bytes()).unwrap();
        written += row.len() as u64;
        rows += 1;
    }
    file.flush().unwrap();
    rows
}

/// A stream of `STREAM_GB` gigabytes, made while it is read, takes less than 256 MB, from the file to the batches. The peak is one
/// of the process, so the test is run alone: `scripts/bench/stream_memory.sh 3`.
#[cfg(target_os = "linux")]
#[test]
#[ignore = "measures the memory of the whole process; run by scripts/bench/stream_memory.sh"]
fn memory_does_not_grow_with_the_data() {
    let gigabytes: f64 = std::env::var("STREAM_GB").map_or(0.2, |text| text.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("rows.jsonl");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let path = pipe.clone();
    let writer = std::thread::spawn(move || write_rows(&path, (gigabytes * 1e9) as u64));
    let mut config = TrainConfig::default();
    (config.training.per_device_train_batch_size, config.training.gradient_accumulation_steps) = (4, 8);
    let before = crate::memory::peak_resident().unwrap();
    let start = std::time::Instant::now();
    let set = RowSet::new(vec![DataFile::new(&pipe)]);
    let (stream, _) = Stream::open(vec![set], Arc::new(ToyEncoder::default()), StreamOptions::from(&config)).unwrap();
    let mut loader = StreamLoader::new(stream, LoaderOptions::from(&config), |_| Ok(())).unwrap();
    let (mut documents, mut tokens) = (0, 0);
    while loader.position().epoch == 0 {
        let step = loader.next_step().unwrap();
        documents += step.documents.iter().map(Vec::len).sum::<usize>() as u64;
        tokens += step.tokens() as u64;
    }
    let (rows, seconds) = (writer.join().unwrap(), start.elapsed().as_secs_f64());
    assert_eq!(documents, rows);
    let taken = crate::memory::peak_resident().unwrap() - before;
    let (taken, before) = (taken as f64 / 1e6, before as f64 / 1e6);
    println!(
        "{gigabytes} GB, {rows} rows, {tokens} tokens in {seconds:.0} s, {:.0} rows/s; the process had {before:.0} MB, the stream \
         took {taken:.0} MB more",
        rows as f64 / seconds
    );
    assert!(taken < 256.0, "{taken} MB");
}
