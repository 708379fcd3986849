//! Models and configurations as transformers reads them.
//!
//! Tests on SmolLM2 need its GGUF file: `scripts/demo-model.sh` fetches it.

use std::fs;
use std::path::{Path, PathBuf};

use qlora_core::chat::{Message, TemplateArguments};
use qlora_core::config::{Architecture, ModelConfig};
use qlora_core::formats::{Gguf, HfDirectory};
use qlora_core::open::{OpenOptions, open_model};
use qlora_core::source::WeightSource;
use qlora_core::tokenizer::Tokenizer;
use qlora_kernels::ops::rope::{RopeConfig, RopeScaling};
use qlora_kernels::weight::PlainData;
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

/// SmolLM2-135M-Instruct as a GGUF file.
fn smollm2() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cache = std::env::var_os("QLORA_CACHE").map_or(root.join(".cache"), PathBuf::from);
    let path = cache.join("models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run scripts/demo-model.sh first", path.display());
    path
}

/// A copy of a fixture folder that a test may change.
fn copy_of(name: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    restore(&copy, name);
    copy
}

fn restore(copy: &tempfile::TempDir, name: &str) {
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap().path();
        fs::write(copy.path().join(entry.file_name().unwrap()), fs::read(&entry).unwrap()).unwrap();
    }
}

/// The rotary embedding in transformers' normal form.
fn rope(expected: &Value) -> RopeConfig {
    let number = |key: &str| expected[key].as_f64();
    let original = || expected["original_max_position_embeddings"].as_u64().unwrap() as usize;
    let factor = number("factor");
    let scaling = match expected["rope_type"].as_str().unwrap() {
        "default" => None,
        "linear" => Some(RopeScaling::Linear { factor: factor.unwrap() }),
        "llama3" => Some(RopeScaling::Llama3 {
            factor: factor.unwrap(),
            low_freq_factor: number("low_freq_factor").unwrap(),
            high_freq_factor: number("high_freq_factor").unwrap(),
            original_max_position_embeddings: original(),
        }),
        "yarn" => Some(RopeScaling::Yarn {
            factor: factor.unwrap(),
            original_max_position_embeddings: original(),
            beta_fast: number("beta_fast").unwrap_or(32.0),
            beta_slow: number("beta_slow").unwrap_or(1.0),
            attention_factor: number("attention_factor"),
            truncate: expected["truncate"].as_bool().unwrap_or(true),
        }),
        other => panic!("{other}"),
    };
    RopeConfig { theta: number("rope_theta").unwrap(), scaling }
}

#[test]
fn configurations_mean_what_they_mean_in_transformers() {
    let cases = json("loading/configs.json");
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 22);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let config = ModelConfig::from_json(&case["config"].to_string(), Path::new(name)).unwrap();
        let expected = &case["expected"];
        let number = |key: &str| expected[key].as_u64().map(|n| n as usize);
        let flag = |key: &str| expected[key].as_bool().unwrap();
        let kind = match config.architecture {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            other => panic!("{other:?}"),
        };
        assert_eq!(expected["model_type"], kind, "{name}");
        for (key, value) in [
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_hidden_layers", config.num_hidden_layers),
            ("num_attention_heads", config.num_attention_heads),
            ("num_key_value_heads", config.num_key_value_heads),
            ("head_dim", config.head_dim),
            ("max_position_embeddings", config.max_position_embeddings),
        ] {
            assert_eq!(number(key), Some(value), "{name}: {key}");
        }
        assert_eq!(expected["rms_norm_eps"].as_f64().unwrap() as f32, config.rms_norm_eps, "{name}");
        assert_eq!(flag("tie_word_embeddings"), config.tie_word_embeddings, "{name}");
        assert_eq!(flag("attention_bias") || kind == "qwen2", config.qkv_bias, "{name}");
        assert_eq!(flag("attention_bias"), config.o_bias, "{name}");
        assert_eq!(flag("mlp_bias"), config.mlp_bias, "{name}");
        assert_eq!(kind == "qwen3", config.qk_norm, "{name}");
        let windows = expected["sliding_window"].as_array().unwrap();
        let windows: Vec<Option<usize>> = windows.iter().map(|window| window.as_u64().map(|n| n as usize)).collect();
        assert_eq!(windows, config.sliding_window, "{name}");
        // Ids that the vocabulary does not have are dropped.
        let ids = |value: &Value| value.as_u64().filter(|id| *id < config.vocab_size as u64).map(|id| id as u32);
        assert_eq!(ids(&expected["bos_token_id"]), config.bos_token_id, "{name}");
        let eos: Vec<u32> = expected["eos_token_ids"].as_array().unwrap().iter().filter_map(ids).collect();
        assert_eq!(eos, config.eos_token_ids, "{name}");
        assert_eq!(rope(&expected["rope"]), config.rope, "{name}");
    }
}

#[test]
fn a_sharded_folder_and_a_gguf_file_hold_the_same_model() {
    let folder = HfDirectory::open(fixture("loading/llama")).unwrap();
    let gguf = Gguf::open(fixture("loading/llama.gguf")).unwrap();
    assert_eq!(gguf.name(), Some("tiny"));
    assert_eq!(folder.config(), gguf.config());
    assert_eq!(folder.names(), gguf.names());
    assert_eq!(folder.names().len(), folder.config().tensor_shapes().len());
    for name in folder.names() {
        assert_eq!(folder.shape(&name), gguf.shape(&name), "{name}");
        let (a, b) = (folder.read_finite(&name).unwrap(), gguf.read_finite(&name).unwrap());
        assert!(matches!(a.data, PlainData::Bf16(_)), "{name}");
        assert_eq!(matches!(b.data, PlainData::F16(_)), name.ends_with("q_proj.weight"), "{name}");
        let (a, b) = (a.into_f32(), b.into_f32());
        assert!(a.iter().any(|x| *x != 0.0));
        let largest = a.iter().fold(0f32, |max, x| max.max(x.abs()));
        // bf16 values are exact in f32, and in f16 down to its smallest numbers; Q8_0 rounds to 1/127 of a block's largest.
        let tolerance = if name.ends_with("gate_proj.weight") { largest / 127.0 } else { 1e-7 };
        for (x, y) in a.iter().zip(&b) {
            assert!((x - y).abs() <= tolerance, "{name}: {x} and {y}");
        }
    }
    let error = folder.read("model.layers.2.mlp.up_proj.weight").unwrap_err().to_string();
    assert!(error.contains("model.layers.2.mlp.up_proj.weight") && error.contains("loading/llama"), "{error}");
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let copy = copy_of("loading/llama");
    let path = |name: &str| copy.path().join(name);
    let refused = |what: &[&str]| {
        let error = HfDirectory::open(copy.path()).unwrap_err().to_string();
        for what in what {
            assert!(error.contains(what), "{what}: {error}");
        }
        restore(&copy, "loading/llama");
    };
    let edit = |name: &str, from: &str, to: &str| {
        let text = fs::read_to_string(path(name)).unwrap();
        assert!(text.contains(from), "{from}");
        fs::write(path(name), text.replace(from, to)).unwrap();
    };
    HfDirectory::open(copy.path()).unwrap();
    edit("config.json", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
    HfDirectory::open(copy.path()).expect("a head that is not used is ignored");
    restore(&copy, "loading/llama");

    edit("config.json", "\"intermediate_size\": 96", "\"intermediate_size\": 128");
    refused(&["model.layers.0.mlp.gate_proj.weight", "[96, 64]", "[128, 64]", "safetensors"]);
    edit("config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    refused(&["model.layers.2.input_layernorm.weight", "missing"]);
    edit("config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
    refused(&["model.layers.1.input_layernorm.weight", "no place"]);
    let index = "model.safetensors.index.json";
    let json: Value = serde_json::from_str(&fs::read_to_string(path(index)).unwrap()).unwrap();
    let home = json["weight_map"]["lm_head.weight"].as_str().unwrap();
    let other =
        if home.contains("00001") { "model-00002-of-00003.safetensors" } else { "model-00001-of-00003.safetensors" };
    let entry = format!("\"lm_head.weight\": \"{home}\"");
    edit(index, &entry, &format!("\"lm_head.weight\": \"{other}\""));
    refused(&["lm_head.weight", "two files", home, other]);
    edit(index, &entry, "\"elsewhere\": \"model-00001-of-00003.safetensors\"");
    refused(&["lm_head.weight", "not in model.safetensors.index.json"]);
    edit(index, &entry, &format!("\"another.weight\": \"{home}\", {entry}"));
    refused(&["another.weight", "missing in", home]);
    edit(index, "model-00002-of-00003.safetensors", "../model-00002-of-00003.safetensors");
    refused(&["index.json", "not the name of a .safetensors file"]);
    fs::remove_file(path("model-00002-of-00003.safetensors")).unwrap();
    refused(&["model-00002-of-00003.safetensors"]);
    fs::remove_file(path(index)).unwrap();
    refused(&["neither model.safetensors nor model.safetensors.index.json"]);
    fs::remove_file(path(index)).unwrap();
    fs::write(path("pytorch_model.bin"), "").unwrap();
    refused(&["pytorch_model.bin", "not a file of torch.save"]);
    fs::remove_file(path(index)).unwrap();
    fs::rename(path("pytorch_model.bin"), path("consolidated.00.pth")).unwrap();
    refused(&["PyTorch's pickles only pytorch_model.bin"]);
    fs::remove_file(path("config.json")).unwrap();
    refused(&["config.json"]);
}

#[test]
fn values_that_are_not_finite_are_found() {
    let copy = copy_of("loading/llama");
    let source = HfDirectory::open(copy.path()).unwrap();
    let name = "model.norm.weight";
    let file = source.file_of(name).unwrap().to_owned();
    drop(source);
    let mut bytes = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let info: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let start = 8 + header + info[name]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[start + 2 * 5..start + 2 * 6].copy_from_slice(&0x7fc0u16.to_le_bytes());
    fs::write(&file, bytes).unwrap();
    let source = HfDirectory::open(copy.path()).unwrap();
    source.read(name).unwrap();
    let error = source.read_finite(name).unwrap_err().to_string();
    assert!(
        error.contains(name) && error.contains("NaN at row 0, column 5") && error.contains("safetensors"),
        "{error}"
    );
}

#[test]
fn weights_of_a_quantizer_are_refused() {
    let copy = copy_of("loading/llama");
    fs::remove_file(copy.path().join("model.safetensors.index.json")).unwrap();
    for (name, dtype, message) in [
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "U8", "quantized weights"),
        ("model.layers.0.mlp.up_proj.weight", "U8", "dtype U8"),
        ("model.layers.0.mlp.up_proj.qweight", "I32", "quantized weights"),
    ] {
        let size = if dtype == "I32" { 4 } else { 1 };
        let header = format!(r#"{{"{name}":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,{size}]}}}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(vec![0; size]);
        fs::write(copy.path().join("model.safetensors"), bytes).unwrap();
        let error = HfDirectory::open(copy.path()).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains(name) && error.contains("model.safetensors"), "{error}");
    }
}

/// The sum of all bit patterns, each times 2 i + 1, as the fixture's script computes it.
fn checksum(data: &[f32]) -> u64 {
    let terms = data.iter().zip(0u64..).map(|(x, i)| u64::from(x.to_bits()).wrapping_mul(2 * i + 1));
    terms.fold(0, u64::wrapping_add)
}

#[test]
fn smollm2_has_the_weights_that_transformers_reads() {
    let model = Gguf::open(smollm2()).unwrap();
    let config = model.config();
    assert_eq!((config.num_hidden_layers, config.hidden_size, config.vocab_size), (30, 576, 49152));
    assert_eq!((config.num_attention_heads, config.num_key_value_heads, config.head_dim), (9, 3, 64));
    assert_eq!((config.rope.theta, config.rms_norm_eps, config.max_position_embeddings), (100_000.0, 1e-5, 8192));
    assert!(config.tie_word_embeddings && config.rope.scaling.is_none());
    assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (Some(1), &[2][..]));
    assert_eq!(config.parameter_count(), 134_515_008);
    let expected = json("loading/smollm2.json");
    let expected = expected.as_object().unwrap();
    assert!(expected.len() > 25);
    for (name, value) in expected {
        let tensor = model.read_finite(name).unwrap();
        let shape: Vec<usize> =
            value["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        assert_eq!(tensor.shape, shape, "{name}");
        assert_eq!(value["checksum"].as_str().unwrap(), checksum(&tensor.into_f32()).to_string(), "{name}");
    }
}

#[test]
fn smollm2_tokens_are_the_original_tokenizers() {
    let tokenizer = Tokenizer::from_gguf_file(smollm2()).unwrap();
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id(), tokenizer.vocab_size()), (Some(1), Some(2), 49152));
    let cases = json("tokenizer/smollm2.json");
    let cases = cases.as_array().unwrap();
    assert!(cases.len() > 200);
    let mut as_transformers = 0;
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).ok();
        let got = tokenizer.encode(text, false).unwrap();
        assert_eq!(Some(&got), ids("ids").as_ref(), "{text:?}");
        assert_eq!(tokenizer.encode(text, true).unwrap(), got, "this model adds no special tokens");
        assert_eq!(tokenizer.decode(&got, false).unwrap(), text);
        let mut stream = tokenizer.decode_stream(false);
        let mut streamed: String = got.iter().map(|&id| stream.push(id).unwrap()).collect();
        streamed.push_str(&stream.finish().unwrap());
        assert_eq!(streamed, text);
        as_transformers += usize::from(ids("transformers").is_none());
    }
    assert!(as_transformers > 170, "only {as_transformers} texts have the same ids in transformers' conversion");
}

#[test]
fn smollm2_is_opened_with_tokenizer_and_template() {
    let path = smollm2();
    let files = open_model(path.to_str().unwrap(), &OpenOptions::default()).unwrap();
    assert_eq!(files.name, path.to_str().unwrap());
    // <|im_end|>, which the file names, and <|endoftext|>, which is known by its text.
    assert_eq!(files.generation.eos_token_ids, [2, 0]);
    let template = files.chat_template.unwrap();
    let messages = [Message::user("Hi"), Message::assistant("Hello!")];
    let chat = template.encode(&files.tokenizer, &messages, &TemplateArguments::new()).unwrap();
    let text = files.tokenizer.decode(&chat.tokens, false).unwrap();
    assert!(text.starts_with("<|im_start|>system\nYou are a helpful AI assistant named SmolLM"), "{text}");
    assert!(text.ends_with("<|im_start|>assistant\nHello!<|im_end|>\n"), "{text}");
    let answer = chat.tokens.iter().zip(&chat.answer).filter(|(_, answer)| **answer).map(|(id, _)| *id);
    let answer: Vec<u32> = answer.collect();
    assert_eq!(files.tokenizer.decode(&answer, false).unwrap(), "Hello!<|im_end|>");
    assert_eq!(answer.last(), Some(&2));
}
