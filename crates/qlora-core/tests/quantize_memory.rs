//! Quantizing a model holds the quantized model and little else. Alone in its process, so that no other test allocates
//! meanwhile.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use qlora_core::config::ModelConfig;
use qlora_core::formats::HfDirectory;
use qlora_core::model::{CausalLm, LoadOptions, Quantization};
use qlora_kernels::quant::QuantConfig;
use serde_json::{Map, json};

/// Anonymous resident memory in bytes.
fn anonymous() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("Linux reports RssAnon");
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn quantizing_holds_the_quantized_model_and_two_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 8704, "num_hidden_layers": 4,
        "num_attention_heads": 16, "tie_word_embeddings": true,
    });
    let path = folder.path().join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    let config = ModelConfig::from_json_file(&path).unwrap();

    // A file of zeros that takes no place on the disk. Its large tensors have more than 32 MiB, as those of real models:
    // smaller ones glibc may keep for reuse after they are freed.
    let (mut header, mut end, mut largest) = (Map::new(), 0usize, 0usize);
    for (name, shape) in config.tensor_shapes() {
        let size = shape.iter().product::<usize>() * 2;
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}));
        end += size;
        largest = largest.max(size);
    }
    let header = serde_json::to_string(&header).unwrap();
    let mut file = File::create(folder.path().join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let start = file.stream_position().unwrap();
    file.set_len(start + end as u64).unwrap();
    drop(file);

    let before = anonymous();
    let (peak, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let watcher = std::thread::spawn({
        let (peak, done) = (peak.clone(), done.clone());
        move || {
            while !done.load(Ordering::Relaxed) {
                peak.fetch_max(anonymous(), Ordering::Relaxed);
                std::thread::sleep(std::time::Duration::from_micros(500));
            }
        }
    });
    let source = HfDirectory::open(folder.path()).unwrap();
    let quantization = Quantization::Bits4(QuantConfig::default());
    let model = CausalLm::load(&source, LoadOptions { quantization, ..LoadOptions::default() }).unwrap();
    done.store(true, Ordering::Relaxed);
    watcher.join().unwrap();

    let (held, grown) = (model.memory().total() as u64, peak.load(Ordering::Relaxed) - before);
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    println!(
        "file {:.0} MB, quantized model {:.0} MB, largest tensor {:.0} MB, peak growth of RssAnon {:.0} MB",
        megabytes(end as u64),
        megabytes(held),
        megabytes(largest as u64),
        megabytes(grown)
    );
    assert!(held * 3 < end as u64, "{held} bytes held of {end}");
    assert!(grown < held + 2 * largest as u64, "grew by {grown}, the model holds {held}, the largest tensor {largest}");
}
