use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::*;
use crate::config::ModelConfig;
use crate::source::{Gguf, HfDirectory};
use crate::test_support::{largest, logits};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

#[test]
fn blocks_are_those_of_the_gguf_package() {
    // Made by scripts/fixtures/gguf_blocks.py.
    let bytes = std::fs::read(fixtures().join("gguf/blocks.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = file.tensor("values").unwrap();
    let values: Vec<f32> = values.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    assert!(values.len() >= 32 * 256);
    for (kind, name) in
        [(GgufType::Q8_0, "q8_0"), (GgufType::Q4_0, "q4_0"), (GgufType::F16, "f16"), (GgufType::Bf16, "bf16")]
    {
        let expected = file.tensor(name).unwrap().data();
        let mut got = vec![0xaa; expected.len()];
        assert!(encode_piece(&PlainData::F32(values.clone()), 0..values.len(), kind, &mut got));
        let block = kind.block().1;
        for (index, (got, expected)) in got.chunks(block).zip(expected.chunks(block)).enumerate() {
            assert_eq!(got, expected, "{name}, block {index}");
        }
    }
}

/// A tokenizer with as many tokens as the fixtures' models.
fn tokenizer(vocab: usize) -> Tokenizer {
    let alphabet: Vec<String> = (0..vocab)
        .map(|id| match id {
            0 => "<unk>".to_owned(),
            1 => "<s>".to_owned(),
            2 => "</s>".to_owned(),
            3 => "ab".to_owned(),
            id => char::from_u32('A' as u32 - 4 + id as u32).unwrap().to_string(),
        })
        .collect();
    let vocab: serde_json::Map<_, _> =
        alphabet.iter().enumerate().map(|(id, token)| (token.clone(), serde_json::json!(id))).collect();
    let added: Vec<_> = (0..3)
        .map(|id| {
            serde_json::json!({"id": id, "content": alphabet[id], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let json = serde_json::json!({"version": "1.0", "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}});
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"bos_token": "<s>", "eos_token": "</s>"}"#)
        .unwrap();
    Tokenizer::from_folder(folder.path()).unwrap()
}

fn options(kind: GgufType) -> GgufOptions<'static> {
    GgufOptions { kind, name: Some("tiny"), chat_template: Some("{{ messages }}"), eos_token_ids: &[2, 5] }
}

/// Largest differences of the logits of a fixture's model, written as `kind` and read again, and its largest logit.
fn difference(name: &str, kind: GgufType) -> (f32, f32) {
    difference_of(name, &HfDirectory::open(fixtures().join("models").join(name)).unwrap(), kind)
}

fn difference_of(name: &str, source: &HfDirectory, kind: GgufType) -> (f32, f32) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model.gguf");
    let mut done = (0, 0);
    let written =
        write(source, &tokenizer(source.config().vocab_size), &out, &options(kind), |n, all| done = (n, all)).unwrap();
    assert_eq!((done, written.bytes), ((written.tensors, written.tensors), std::fs::metadata(&out).unwrap().len()));
    let read = Gguf::open(&out).unwrap();
    assert_eq!(read.chat_template().unwrap(), Some("{{ messages }}"));
    assert_eq!(read.name(), Some("tiny"));
    // What GGUF does not tell apart or leaves open.
    let expected = ModelConfig {
        architecture: read.config().architecture,
        eos_token_ids: vec![2, 5],
        bos_token_id: Some(1),
        ..source.config().clone()
    };
    let rope = &read.config().rope;
    let same = ModelConfig { rope: expected.rope.clone(), ..read.config().clone() };
    assert_eq!(same, expected, "{name}");
    assert_eq!(rope.theta, expected.rope.theta, "{name}");
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 80).collect();
    let original = logits(source, &tokens);
    let scale = original.iter().fold(0f32, |max, x| max.max(x.abs()));
    (largest(&logits(&read, &tokens), &original), scale)
}

#[test]
fn logits_of_every_architecture_survive() {
    for name in
        ["llama", "llama_wide", "llama_rope_linear", "llama_rope_yarn", "mistral", "qwen2", "granite", "smollm3"]
    {
        let (f32, scale) = difference(name, GgufType::F32);
        assert!(f32 < 1e-4, "{name}: f32 {f32} of {scale}");
        let (f16, _) = difference(name, GgufType::F16);
        assert!(f16 < 1e-3, "{name}: f16 {f16} of {scale}");
        let (bf16, _) = difference(name, GgufType::Bf16);
        println!("{name}: f32 {f32:.1e}, f16 {f16:.1e}, bf16 {bf16:.1e} of {scale:.2}");
    }
}

/// A fixture's model with other options in its configuration.
fn edited(name: &str, edits: &[(&str, serde_json::Value)]) -> (HfDirectory, tempfile::TempDir) {
    let (from, folder) = (fixtures().join("models").join(name), tempfile::tempdir().unwrap());
    std::fs::copy(from.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    edits.iter().for_each(|(pointer, value)| *config.pointer_mut(pointer).unwrap() = value.clone());
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    (HfDirectory::open(folder.path()).unwrap(), folder)
}

#[test]
fn qwen3_and_llama_3_rotations_survive() {
    // The fixture's windows have no place in a GGUF file.
    let full = serde_json::json!(["full_attention", "full_attention"]);
    let (qwen3, _folder) = edited("qwen3", &[("/use_sliding_window", false.into()), ("/layer_types", full)]);
    let (difference, _) = difference_of("qwen3", &qwen3, GgufType::F32);
    assert!(difference < 1e-4, "qwen3: {difference}");
    // A file has the divisors only; those of Llama 3.1 are recognized, to f32's precision.
    let edits = [("/rope_scaling/original_max_position_embeddings", 8192.into())];
    let (llama3, _folder) = edited("llama_rope_llama3", &edits);
    let (difference, _) = difference_of("llama3", &llama3, GgufType::F32);
    assert!(difference < 1e-3, "llama 3: {difference}");
    assert!(model::rope_table(llama3.config()).unwrap().iter().any(|divisor| *divisor > 1.5));
}

#[test]
fn quantized_files_stay_near() {
    // llama_wide has rows of whole blocks: 64 and 128 columns.
    let (q8_0, scale) = difference("llama_wide", GgufType::Q8_0);
    let (q4_0, _) = difference("llama_wide", GgufType::Q4_0);
    println!("q8_0 {q8_0:.4}, q4_0 {q4_0:.4} of {scale:.2}");
    assert!(q8_0 > 0.0 && q8_0 < 0.02 * scale, "{q8_0} of {scale}");
    assert!(q4_0 > q8_0 && q4_0 < 0.5 * scale, "{q4_0} of {scale}");
}

#[test]
fn rows_that_are_no_whole_blocks_become_f16() {
    assert_eq!(GgufType::Q8_0.of(Kind::Linear, &[64, 88]), GgufType::F16);
    assert_eq!(GgufType::Q4_0.of(Kind::Linear, &[64, 96]), GgufType::Q4_0);
    assert_eq!(GgufType::Q4_0.of(Kind::Table, &[64, 96]), GgufType::Q8_0);
    assert_eq!(GgufType::F16.of(Kind::Norm, &[96]), GgufType::F32);
    assert_eq!("Q8_0".parse::<GgufType>().unwrap(), GgufType::Q8_0);
    assert!("q4_k_m".parse::<GgufType>().unwrap_err().to_string().contains("f32, f16, bf16, q8_0, q4_0"));
}

#[test]
fn what_gguf_has_no_place_for_is_refused_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model.gguf");
    // A sliding window in some layers of a Qwen model.
    let source = HfDirectory::open(fixtures().join("models/qwen2_window")).unwrap();
    let error = write(&source, &tokenizer(80), &out, &options(GgufType::F32), |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("sliding window") && error.contains("llama.cpp"), "{error}");
    // A tokenizer with more tokens than the embedding has rows.
    let source = HfDirectory::open(fixtures().join("models/llama")).unwrap();
    let error = write(&source, &tokenizer(81), &out, &options(GgufType::F32), |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("80 rows of the embedding"), "{error}");
    // A folder where nothing can be written.
    let nowhere = folder.path().join("missing/model.gguf");
    let error = write(&source, &tokenizer(80), &nowhere, &options(GgufType::F32), |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("cannot write here"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_value_beyond_f16_is_an_error() {
    let values = PlainData::F32(vec![1.0, 70_000.0]);
    assert!(!encode_piece(&values, 0..2, GgufType::F16, &mut [0; 4]));
    assert!(encode_piece(&values, 0..2, GgufType::Bf16, &mut [0; 4]));
}
