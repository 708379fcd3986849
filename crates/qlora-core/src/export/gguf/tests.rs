use std::path::{Path, PathBuf};

use safetensors::SafeTensors;

use super::*;
use crate::config::ModelConfig;
use crate::formats::{Gguf, HfDirectory};
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
        let kind = kind.tensor();
        let expected = file.tensor(name).unwrap().data();
        let mut got = vec![0xaa; expected.len()];
        assert!(encode_piece(&PlainData::F32(values.clone()), 0..values.len(), kind, None, &mut got));
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
    GgufOptions {
        name: Some("tiny"),
        chat_template: Some("{{ messages }}"),
        eos_token_ids: &[2, 5],
        ..GgufOptions::new(kind)
    }
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
    // Properties that GGUF does not distinguish or leaves open.
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
    for name in [
        "llama",
        "llama_wide",
        "llama_rope_linear",
        "llama_rope_yarn",
        "mistral",
        "qwen2",
        "granite",
        "smollm3",
        "ministral3",
    ] {
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
    // A file has the divisors only; the length that they were made for follows from them.
    for original in [8192, 4096, 100, 32] {
        let edits = [("/rope_scaling/original_max_position_embeddings", original.into())];
        let (llama3, _folder) = edited("llama_rope_llama3", &edits);
        let (difference, _) = difference_of("llama3", &llama3, GgufType::F32);
        assert!(difference < 1e-3, "llama 3, {original}: {difference}");
        assert!(model::rope_table(llama3.config()).unwrap().iter().any(|divisor| *divisor > 1.5), "{original}");
    }
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
fn names_of_types_are_llama_cpps() {
    assert_eq!("Q8_0".parse::<GgufType>().unwrap(), GgufType::Q8_0);
    for kind in GgufType::ALL {
        assert_eq!(kind.name().parse::<GgufType>().unwrap(), kind);
    }
    assert_eq!("q4_k".parse::<GgufType>().unwrap(), GgufType::Q4KM);
    let error = "q4_k_xl".parse::<GgufType>().unwrap_err().to_string();
    assert!(error.contains("q4_k_xl") && error.contains("q4_k_m, q5_k_s"), "{error}");
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
    assert!(!encode_piece(&values, 0..2, TensorType::F16, None, &mut [0; 4]));
    assert!(encode_piece(&values, 0..2, TensorType::Bf16, None, &mut [0; 4]));
}

/// A Llama of 4 layers with rows of 256 and 512, so that K-quants have whole blocks, and random weights.
fn wide() -> (HfDirectory, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "vocab_size": 80, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"});
    let path = folder.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let mut seed = 1u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let shapes = ModelConfig::from_json_file(&path).unwrap().tensor_shapes();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product()).map(|_| match shape.len() {
                1 => 1.0 + 0.1 * random(),
                _ => 0.1 * (random() + random() + random()),
            });
            let bytes = values.flat_map(f32::to_le_bytes).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.clone(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    (HfDirectory::open(folder.path()).unwrap(), folder)
}

#[test]
fn every_type_is_written_and_read_again() {
    let (source, _folder) = wide();
    let (q2, scale) = difference_of("wide", &source, GgufType::Q2K);
    let mut last = (q2, GgufType::Q2K);
    for kind in [GgufType::Q3KM, GgufType::Q4KM, GgufType::Q5KM, GgufType::Q6K] {
        let (difference, _) = difference_of("wide", &source, kind);
        println!("{kind}: {difference:.4} of {scale:.2}");
        assert!(difference < last.0, "{kind}: {difference}, {}: {}", last.1, last.0);
        last = (difference, kind);
    }
    // Of random weights, whose logits nothing holds together: 8% where it was written.
    assert!(last.0 < 0.1 * scale, "{} of {scale}", last.0);
    for kind in
        [GgufType::Q3KS, GgufType::Q3KL, GgufType::Q4KS, GgufType::Q5KS, GgufType::Q4_1, GgufType::Q5_0, GgufType::Q5_1]
    {
        let (difference, _) = difference_of("wide", &source, kind);
        assert!(difference < q2, "{kind}: {difference} of {scale}");
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let (source, folder) = wide();
    let bytes = |threads: usize| {
        let out = folder.path().join(format!("{threads}.gguf"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| write(&source, &tokenizer(80), &out, &options(GgufType::Q4KM), |_, _| ())).unwrap();
        std::fs::read(out).unwrap()
    };
    assert!(bytes(1) == bytes(3));
}

#[test]
fn rows_of_other_widths_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let source = HfDirectory::open(fixtures().join("models/llama_wide")).unwrap();
    let out = folder.path().join("m.gguf");
    let written = write(&source, &tokenizer(80), &out, &options(GgufType::Q4KS), |_, _| ()).unwrap();
    let up = written.fallbacks.iter().find(|fallback| fallback.tensor == "blk.0.ffn_up.weight").unwrap();
    assert_eq!((up.wanted, up.got, up.columns), ("q4_K", "q5_0", 64));
    assert_eq!(written.files, [out]);
}

#[test]
fn a_split_model_is_read_as_one() {
    let (source, folder) = wide();
    let out = folder.path().join("m.gguf");
    write(&source, &tokenizer(80), &out, &options(GgufType::Q6K), |_, _| ()).unwrap();
    let whole = Gguf::open(&out).unwrap();
    let options = GgufOptions { split_bytes: Some(600_000), ..options(GgufType::Q6K) };
    let written = write(&source, &tokenizer(80), &out, &options, |_, _| ()).unwrap();
    assert!(written.files.len() > 2, "{:?}", written.files);
    assert!(written.files[0].ends_with(format!("m-00001-of-{:05}.gguf", written.files.len())));
    for file in &written.files {
        assert!(std::fs::metadata(file).unwrap().len() < 620_000);
    }
    let read = Gguf::open(&written.files[0]).unwrap();
    assert_eq!(read.names(), whole.names());
    for name in read.names() {
        assert_eq!(read.read(&name).unwrap().into_f32(), whole.read(&name).unwrap().into_f32(), "{name}");
    }
}

#[test]
fn importance_moves_the_error_to_columns_that_do_not_count() {
    let (source, folder) = wide();
    let name = "model.layers.2.mlp.down_proj.weight";
    let weights: Vec<f32> = (0..512).map(|i| if i % 4 == 0 { 100.0 } else { 0.1 }).collect();
    let importance = Importance::new([("blk.2.ffn_down.weight".to_owned(), weights.clone())].into());
    let out = folder.path().join("m.gguf");
    let error = |importance: Option<&Importance>| {
        let options = GgufOptions { importance, ..options(GgufType::Q4KM) };
        let written = write(&source, &tokenizer(80), &out, &options, |_, _| ()).unwrap();
        let read = Gguf::open(&out).unwrap().read(name).unwrap().into_f32();
        let original = source.read(name).unwrap().into_f32();
        let squares = original.iter().zip(&read).enumerate().map(|(i, (x, y))| weights[i % 512] * (x - y) * (x - y));
        (squares.sum::<f32>(), written.without_importance)
    };
    let (plain, none) = error(None);
    let (weighted, missing) = error(Some(&importance));
    assert!(weighted < 0.8 * plain, "{weighted} of {plain}");
    assert!(none.is_empty());
    assert!(
        missing.contains(&"blk.0.attn_q.weight".to_owned()) && !missing.contains(&"blk.2.ffn_down.weight".to_owned())
    );
}
