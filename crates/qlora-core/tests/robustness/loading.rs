//! Damaged and hostile model files: every input is an error or a model that can be read, never a panic and never a large
//! allocation.
//!
//! Each property runs `PROPTEST_CASES` inputs (256 by default); besides, two files are cut at every byte of their headers.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use crate::check_memory;
use proptest::prelude::*;
use qlora_core::config::ModelConfig;
use qlora_core::formats::{Gguf, HfDirectory};
use qlora_core::source::WeightSource;
use qlora_core::tokenizer::Tokenizer;
use serde_json::Value;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures"));
static GGUF: LazyLock<Vec<u8>> = LazyLock::new(|| fs::read(FOLDER.join("loading/llama.gguf")).unwrap());
static VOCABULARIES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    ["spm.gguf", "byte-level-qwen2.gguf"].map(|name| fs::read(FOLDER.join("tokenizer").join(name)).unwrap()).to_vec()
});
static CONFIGS: LazyLock<Vec<Value>> = LazyLock::new(|| {
    let cases: Value = serde_json::from_str(&fs::read_to_string(FOLDER.join("loading/configs.json")).unwrap()).unwrap();
    cases.as_array().unwrap().iter().map(|case| case["config"].clone()).collect()
});

/// One change to a file.
#[derive(Clone, Debug)]
enum Change {
    /// Other bytes at a place (as a fraction of the region).
    Write(f64, Vec<u8>),
    /// A length or offset of the worst kind at a place.
    Number(f64, u64),
    Cut(f64),
    Insert(f64, Vec<u8>),
    Remove(f64, usize),
}

/// Lengths and offsets where arithmetic goes wrong.
fn worst_numbers() -> impl Strategy<Value = u64> {
    let edges = [
        0,
        1,
        31,
        32,
        1 << 16,
        1 << 31,
        (1 << 32) - 1,
        1 << 32,
        1 << 40,
        1 << 61,
        1 << 62,
        u64::MAX / 32,
        i64::MAX as u64,
    ];
    prop_oneof![prop::sample::select(edges.to_vec()), Just(u64::MAX), Just(u64::MAX - 7), any::<u64>(), 0..400_000u64]
}

fn change() -> impl Strategy<Value = Change> {
    let place = 0.0..1.0f64;
    let bytes = || prop::collection::vec(any::<u8>(), 1..12);
    prop_oneof![
        4 => (place.clone(), bytes()).prop_map(|(at, bytes)| Change::Write(at, bytes)),
        4 => (place.clone(), worst_numbers()).prop_map(|(at, number)| Change::Number(at, number)),
        1 => place.clone().prop_map(Change::Cut),
        1 => (place.clone(), bytes()).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        1 => (place, 1..64usize).prop_map(|(at, count)| Change::Remove(at, count)),
    ]
}

/// Applies a change within the first `region` bytes.
fn apply(file: &mut Vec<u8>, change: &Change, region: usize) {
    let region = region.min(file.len());
    let place = |at: f64| (at * region as f64) as usize;
    let write = |file: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        let end = (at + bytes.len()).min(file.len());
        file[at..end].copy_from_slice(&bytes[..end - at]);
    };
    match change {
        Change::Write(at, bytes) => write(file, place(*at), bytes),
        Change::Number(at, number) => write(file, place(*at), &number.to_le_bytes()),
        Change::Cut(at) => file.truncate(place(*at)),
        Change::Insert(at, bytes) => {
            let at = place(*at);
            file.splice(at..at, bytes.iter().copied());
        }
        Change::Remove(at, count) => {
            let at = place(*at);
            file.drain(at..(at + count).min(file.len()));
        }
    }
}

/// Opens a GGUF file and reads everything it has; true if it opened.
fn read_gguf(bytes: &[u8]) -> bool {
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let Ok(model) = Gguf::open(file.path()) else { return false };
    let _ = (model.chat_template(), model.name(), Tokenizer::from_gguf(&model));
    for name in model.names() {
        let _ = model.read_finite(&name);
    }
    true
}

/// As [`read_gguf`] for the vocabulary alone.
fn read_vocabulary(bytes: &[u8]) -> bool {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let Ok(tokenizer) = Tokenizer::from_gguf_file(file.path()) else { return false };
    if let Ok(ids) = tokenizer.encode("the water 12\n\u{e9}", true) {
        let _ = tokenizer.decode(&ids, false);
    }
    true
}

fn read_folder(folder: &Path) -> bool {
    let Ok(model) = HfDirectory::open(folder) else { return false };
    for name in model.names() {
        let _ = model.read_finite(&name);
    }
    true
}

proptest! {
    #[test]
    fn gguf_files(changes in prop::collection::vec(change(), 1..4), header_only in prop::bool::weighted(0.9)) {
        let mut file = GGUF.clone();
        // The header is 2 KB of 240 KB; most changes go there.
        let region = if header_only { 3000 } else { file.len() };
        changes.iter().for_each(|change| apply(&mut file, change, region));
        read_gguf(&file);
        check_memory();
    }

    #[test]
    fn gguf_vocabularies(which in 0..2usize, changes in prop::collection::vec(change(), 1..4), start in prop::bool::ANY) {
        let mut file = VOCABULARIES[which].clone();
        let region = if start { 400 } else { file.len() };
        changes.iter().for_each(|change| apply(&mut file, change, region));
        read_vocabulary(&file);
        check_memory();
    }

    #[test]
    fn safetensors_folders(which in 0..5usize, changes in prop::collection::vec(change(), 1..4), start in prop::bool::weighted(0.8)) {
        let names = ["config.json", "model.safetensors.index.json"];
        let shards = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"];
        let folder = tempfile::tempdir().unwrap();
        for (number, name) in names.into_iter().chain(shards).enumerate() {
            let mut file = fs::read(FOLDER.join("loading/llama").join(name)).unwrap();
            if number == which {
                let region = if start { 2000 } else { file.len() };
                changes.iter().for_each(|change| apply(&mut file, change, region));
            }
            fs::write(folder.path().join(name), file).unwrap();
        }
        read_folder(folder.path());
        check_memory();
    }

    #[test]
    fn safetensors_headers(
        shape in prop::collection::vec(worst_numbers(), 0..4),
        start in worst_numbers(),
        end in worst_numbers(),
        dtype in prop::sample::select(vec!["F32", "BF16", "F16", "U8", "F4", "I64", "F64", "BOOL", "X"]),
        length in prop::option::of(worst_numbers()),
        data in 0..64usize,
    ) {
        let header = format!(r#"{{"model.norm.weight":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}}}"#);
        let mut file = length.unwrap_or(header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.resize(file.len() + data, 0);
        let folder = tempfile::tempdir().unwrap();
        fs::copy(FOLDER.join("loading/llama/config.json"), folder.path().join("config.json")).unwrap();
        fs::write(folder.path().join("model.safetensors"), file).unwrap();
        prop_assert!(!read_folder(folder.path()), "one tensor is no model");
        check_memory();
    }

    #[test]
    fn configurations(which in 0..22usize, changes in prop::collection::vec((any::<prop::sample::Index>(), value()), 1..4)) {
        let mut config = CONFIGS[which].clone();
        let map = config.as_object_mut().unwrap();
        for (index, value) in changes {
            let key = map.keys().nth(index.index(map.len())).unwrap().clone();
            match (map.get_mut(&key), value) {
                // Half of the changes to the rotary options go inside.
                (Some(Value::Object(inner)), value) if !inner.is_empty() && index.index(2) == 0 => {
                    let key = inner.keys().nth(index.index(inner.len())).unwrap().clone();
                    inner.insert(key, value);
                }
                (_, value) => {
                    map.insert(key, value);
                }
            }
        }
        if let Ok(config) = ModelConfig::from_json(&config.to_string(), Path::new("config.json")) {
            prop_assert!(config.parameter_count() < 1 << 43);
            prop_assert_eq!(config.sliding_window.len(), config.num_hidden_layers);
            prop_assert_eq!(config.num_attention_heads % config.num_key_value_heads, 0);
            prop_assert!(config.rope.theta.is_finite());
            let total: u128 = config.tensor_shapes().iter().map(|(_, shape)| shape.iter().map(|n| *n as u128).product::<u128>()).sum();
            prop_assert_eq!(total, config.parameter_count());
        }
        check_memory();
    }

    #[test]
    fn configuration_texts(which in 0..22usize, changes in prop::collection::vec(change(), 1..4)) {
        let mut text = CONFIGS[which].to_string().into_bytes();
        let region = text.len();
        changes.iter().for_each(|change| apply(&mut text, change, region));
        let _ = ModelConfig::from_json(&String::from_utf8_lossy(&text), Path::new("config.json"));
    }
}

/// A JSON value of any kind.
fn value() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        worst_numbers().prop_map(Value::from),
        (-8..9000i64).prop_map(Value::from),
        prop::num::f64::ANY.prop_map(|x| serde_json::Number::from_f64(x).map_or(Value::Null, Value::Number)),
    ];
    prop_oneof![
        6 => number,
        1 => Just(Value::Null),
        1 => any::<bool>().prop_map(Value::from),
        1 => prop::sample::select(vec!["yarn", "llama3", "linear", "default", "dynamic", "qwen2", "silu", ""]).prop_map(Value::from),
        1 => prop::collection::vec(any::<u32>().prop_map(Value::from), 0..4).prop_map(Value::from),
        1 => Just(serde_json::json!({"rope_type": "yarn", "factor": 1e-300, "original_max_position_embeddings": 1})),
    ]
}

#[test]
fn files_cut_anywhere_are_errors() {
    assert!(read_gguf(&GGUF));
    // From the end, so that the file is only written once. Past the header every cut takes data away.
    let lengths = |header: usize, end: usize, step: usize| (0..header).chain((header..end).step_by(step)).rev();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), &*GGUF).unwrap();
    for length in lengths(3000, GGUF.len(), 5001) {
        file.as_file().set_len(length as u64).unwrap();
        assert!(Gguf::open(file.path()).is_err(), "cut to {length} bytes");
    }
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(FOLDER.join("loading/llama")).unwrap() {
        let entry = entry.unwrap().path();
        fs::copy(&entry, folder.path().join(entry.file_name().unwrap())).unwrap();
    }
    assert!(read_folder(folder.path()));
    let shard = folder.path().join("model-00002-of-00003.safetensors");
    let size = fs::metadata(&shard).unwrap().len() as usize;
    let file = fs::File::options().write(true).open(&shard).unwrap();
    for length in lengths(2000, size, 1009) {
        file.set_len(length as u64).unwrap();
        assert!(HfDirectory::open(folder.path()).is_err(), "cut to {length} bytes");
    }
    check_memory();
}
