//! `qlora export` and `qlora quantize` into GGUF.

use crate::tiny_folder::{CHATML, write_model, write_rows};
use crate::whole_way::{json, printed, qlora};

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"), 1, CHATML);
    folder
}

#[test]
fn a_file_for_ollama_that_answers_here_too() {
    let temporary = folder();
    let here = temporary.path();
    let made = json(
        here,
        &["export", "model", "--type", "q4_k_m", "--out", "models", "--modelfile", "--system", "Be brief.", "--json"],
    );
    assert_eq!((made["format"].as_str(), made["type"].as_str()), (Some("gguf"), Some("q4_k_m")));
    assert_eq!(made["files"][0], "models/model-Q4_K_M.gguf");
    // Rows of 32 and 48: what llama.cpp takes instead.
    let fallbacks = made["fallbacks"].as_array().unwrap();
    let of = |name: &str| fallbacks.iter().find(|fallback| fallback["tensor"] == name).unwrap();
    assert_eq!(of("blk.0.attn_q.weight")["got"], "q5_0");
    assert_eq!(of("blk.0.ffn_down.weight")["got"], "f16");
    let text = std::fs::read_to_string(here.join("models/Modelfile")).unwrap();
    assert!(
        text.starts_with("FROM ./model-Q4_K_M.gguf\nTEMPLATE \"\"\"{{ if .System }}<|im_start|>system\n"),
        "{text}"
    );
    assert!(
        text.contains("SYSTEM \"\"\"Be brief.\"\"\"\n") && text.contains("PARAMETER stop \"<|im_end|>\"\n"),
        "{text}"
    );
    let answer =
        ["generate", "--model", "models/model-Q4_K_M.gguf", "--max-new-tokens", "2", "--device", "cpu", "Hello"];
    assert!(printed(here, &answer).ends_with('\n'));
    // Said to people, too, and nothing is overwritten.
    let again = qlora(here, &["export", "model", "--type", "q4_k_m", "--out", "models"]);
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("exists already"));
    let other = qlora(here, &["export", "model", "--type", "q6_k", "--out", "other.gguf"]);
    let said = String::from_utf8_lossy(&other.stderr);
    assert!(other.status.success() && said.contains("rows of 32") && said.contains("q8_0"), "{said}");
}

#[test]
fn split_files_are_read_as_one() {
    let temporary = folder();
    let here = temporary.path();
    let made =
        json(here, &["export", "model", "--type", "f16", "--out", "m.gguf", "--split-max-size", "20k", "--json"]);
    let files = made["files"].as_array().unwrap();
    assert!(files.len() > 2, "{made}");
    let first = files[0].as_str().unwrap();
    assert!(first.starts_with("m-00001-of-0000"), "{first}");
    let answer = ["generate", "--model", first, "--max-new-tokens", "2", "--device", "cpu", "Hello"];
    assert!(printed(here, &answer).ends_with('\n'));
}

#[test]
fn an_adapter_alone_and_a_merged_folder() {
    let temporary = folder();
    let here = temporary.path();
    write_rows(&here.join("train.jsonl"), &["four", "five"]);
    printed(here, &["train", "model", "train.jsonl", "--max-steps", "2", "--r", "4", "--device", "cpu"]);
    let made = json(
        here,
        &["export", "--adapter", "output", "--format", "gguf-lora", "--out", "a.gguf", "--modelfile", "--json"],
    );
    assert_eq!((made["format"].as_str(), made["type"].as_str()), (Some("gguf-lora"), Some("f32")));
    // A and B of four projections in two blocks.
    assert_eq!(made["tensors"], 2 * 4 * 2);
    let text = std::fs::read_to_string(here.join("Modelfile")).unwrap();
    assert!(text.contains("\nADAPTER ./a.gguf\n"), "{text}");
    let made = json(here, &["export", "--adapter", "output", "--format", "safetensors", "--out", "merged", "--json"]);
    assert_eq!((made["type"].as_str(), made["weight_files"].as_u64()), (Some("bfloat16"), Some(1)));
    let file = std::fs::read(here.join("merged/model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert!(tensors.iter().all(|(_, tensor)| tensor.dtype() == safetensors::Dtype::BF16));
    let refused = qlora(here, &["export", "model", "--format", "gguf-lora", "--out", "b.gguf"]);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("--adapter"));
}

/// An importance matrix in the older format: of one matrix.
fn importance(columns: i32) -> Vec<u8> {
    let name = b"blk.0.ffn_up.weight";
    let mut bytes = 1i32.to_le_bytes().to_vec();
    bytes.extend((name.len() as i32).to_le_bytes());
    bytes.extend(name);
    bytes.extend([1i32, columns].into_iter().flat_map(i32::to_le_bytes));
    bytes.extend((0..columns).flat_map(|column| (1.0 + column as f32).to_le_bytes()));
    bytes
}

#[test]
fn an_importance_matrix_has_to_be_of_the_model() {
    let temporary = folder();
    let here = temporary.path();
    std::fs::write(here.join("fits.dat"), importance(32)).unwrap();
    std::fs::write(here.join("other.dat"), importance(33)).unwrap();
    let made =
        json(here, &["export", "model", "--type", "q4_k_s", "--imatrix", "fits.dat", "--out", "m.gguf", "--json"]);
    let without = made["without_importance"].as_array().unwrap();
    assert!(!without.is_empty() && !without.iter().any(|name| name == "blk.0.ffn_up.weight"), "{made}");
    let refused = qlora(here, &["quantize", "model", "n.gguf", "--type", "q4_k_s", "--imatrix", "other.dat"]);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("blk.0.ffn_up.weight") && said.contains("another model"),
        "{said}"
    );
    assert!(!here.join("n.gguf").exists());
    assert!(printed(here, &["quantize", "model", "n.gguf", "--type", "q6_k"]).contains("q6_k"));
    // Made of a text, and read again: the same weights.
    std::fs::write(here.join("text.txt"), "How much is it? Four or five. ".repeat(40)).unwrap();
    let made = ["quantize", "model", "o.gguf", "--type", "q4_k_s", "--imatrix", "text.txt", "--imatrix-out", "i.gguf"];
    let output = qlora(here, &made);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("does not know"), "{said}");
    printed(here, &["quantize", "model", "p.gguf", "--type", "q4_k_s", "--imatrix", "i.gguf"]);
    let bytes = |name: &str| std::fs::read(here.join(name)).unwrap();
    let (o, p) = (bytes("o.gguf"), bytes("p.gguf"));
    assert_eq!(o.len(), p.len());
    // All but the name in the metadata, a letter.
    assert!(o.iter().zip(&p).filter(|(a, b)| a != b).count() <= 1);
    let refused = qlora(here, &["quantize", "model", "folder", "--type", "q6_k"]);
    assert!(!refused.status.success() && !here.join("folder").exists());
}
