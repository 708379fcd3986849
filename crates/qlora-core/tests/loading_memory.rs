//! Reading a model tensor by tensor holds one tensor, not the file, neither as a copy nor as mapped pages. Alone in its process, so that no other
//! test allocates meanwhile.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::{Seek, Write};

use qlora_core::config::ModelConfig;
use qlora_core::formats::HfDirectory;
use qlora_core::source::WeightSource;
use serde_json::{Map, json};

/// Anonymous resident memory and resident pages of files, in bytes.
fn resident() -> [u64; 2] {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    ["RssAnon:", "RssFile:"].map(|field| {
        let line = status.lines().find(|line| line.starts_with(field)).expect("Linux reports it");
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    })
}

#[test]
fn reading_holds_one_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
        "num_attention_heads": 16, "tie_word_embeddings": true,
    });
    let path = folder.path().join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    let config = ModelConfig::from_json_file(&path).unwrap();

    // A file of zeros that takes no place on the disk.
    let (mut header, mut end) = (Map::new(), 0usize);
    for (name, shape) in config.tensor_shapes() {
        let size = shape.iter().product::<usize>() * 2;
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}));
        end += size;
    }
    let header = serde_json::to_string(&header).unwrap();
    let mut file = File::create(folder.path().join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let start = file.stream_position().unwrap();
    file.set_len(start + end as u64).unwrap();
    drop(file);

    let before = resident();
    let source = HfDirectory::open(folder.path()).unwrap();
    let largest = 16384 * 1024 * 2u64;
    let mut peaks = [0; 2];
    for name in source.names() {
        let tensor = source.read(&name).unwrap();
        assert!(!tensor.data.is_empty());
        for ((peak, now), before) in peaks.iter_mut().zip(resident()).zip(before) {
            *peak = now.saturating_sub(before).max(*peak);
        }
    }
    let file = end as u64;
    assert!(file > 200 << 20, "the file has {file} bytes");
    let [anonymous, pages] = peaks;
    assert!(
        anonymous < largest + (8 << 20),
        "{anonymous} bytes held for a file of {file}, a tensor has up to {largest}"
    );
    // The code itself is mapped, too.
    assert!(pages < 16 << 20, "{pages} bytes of pages stay of a file of {file}");
    println!(
        "file {} MB, largest tensor {} MB, peak growth of RssAnon {} MB, of RssFile {} MB",
        file >> 20,
        largest >> 20,
        anonymous >> 20,
        pages >> 20
    );
}
