//! Adapters and PEFT: what the Python library wrote is read, what is written is what it would write, and names are
//! matched as it matches them.
//!
//! Fixtures: `tests/fixtures/peft`, made by `scripts/fixtures/peft_adapter.py` with PEFT 0.21.2. They hold a tiny Llama
//! (`base/`), four adapters for it (a list of targets, `all-linear` with rsLoRA, a regular expression with an
//! exclusion, bf16 tensors) and, in `logits.safetensors`, the logits of `input_ids` without an adapter (`base`) and
//! with each (`adapter_list`, ...), for tests that run the model.
//!
//! The way back into Python needs an interpreter with PEFT:
//! `QLORA_PYTHON=path/to/python cargo test --test peft -- --ignored`.

use qlora::adapter::{self, AdapterDtype, SaveOptions};
use qlora::config::{Architecture, ModelConfig};
use qlora::core::{Error, Result};
use qlora::kernels::ops::rope::RopeConfig;
use qlora::lora::{AdapterLayout, LoraConfig, ModuleFilter, ModulePattern, TargetModules, linear_modules};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const ADAPTERS: [&str; 4] = ["adapter_list", "adapter_rslora", "adapter_regex", "adapter_bf16"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

/// The model of `base/config.json`.
fn model() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 128,
        hidden_size: 64,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-6,
        rope: RopeConfig { theta: 10_000.0, scaling: None },
        max_position_embeddings: 64,
        sliding_window: vec![None; 2],
        without_rope: Vec::new(),
        scalings: Default::default(),
        tie_word_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}

fn dtype_of(name: &str) -> AdapterDtype {
    if name == "adapter_bf16" { AdapterDtype::BF16 } else { AdapterDtype::F32 }
}

/// Loads a fixture and saves it again.
fn resaved(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let loaded = adapter::load(fixture(name), &model()).unwrap();
    let options = SaveOptions {
        dtype: dtype_of(name),
        base_model_name_or_path: loaded.config.base_model_name_or_path.clone(),
        ..Default::default()
    };
    adapter::save(folder.path(), &loaded.config.lora, &loaded.layout, &loaded.weights, &options).unwrap();
    folder
}

#[test]
fn linear_layers_have_the_names_and_shapes_of_the_base_file() {
    let bytes = fs::read(fixture("base/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let modules = linear_modules(&model());
    for module in &modules {
        let tensor = file.tensor(&format!("{}.weight", module.name)).unwrap();
        assert_eq!(tensor.shape(), [module.out_features, module.in_features], "{}", module.name);
    }
    let matrices = file.names().into_iter().filter(|name| name.ends_with("_proj.weight")).count();
    assert_eq!(matrices, modules.len());
}

#[test]
fn options_select_the_layers_and_the_scaling_that_peft_took() {
    let facts = json("facts.json");
    for name in ADAPTERS {
        let config = adapter::read_config(fixture(name)).unwrap();
        let modules: BTreeSet<String> = config.lora.resolve(&model()).unwrap().into_iter().map(|m| m.name).collect();
        let expected: BTreeSet<String> = serde_json::from_value(facts[name]["modules"].clone()).unwrap();
        assert_eq!(modules, expected, "{name}");
        assert_eq!(config.lora.scaling(), facts[name]["scaling"].as_f64().unwrap(), "{name}");
        assert_eq!(config.base_model_name_or_path.as_deref(), Some("qlora-tests/tiny-llama"));
    }
}

#[test]
fn all_linear_is_what_peft_makes_of_it() {
    let expected: BTreeSet<String> =
        serde_json::from_value(json("facts.json")["adapter_rslora"]["modules"].clone()).unwrap();
    let config = LoraConfig { target_modules: TargetModules::AllLinear, ..Default::default() };
    let layout = AdapterLayout::for_model(&config, &model()).unwrap();
    assert_eq!(layout.modules().map(str::to_owned).collect::<BTreeSet<_>>(), expected);
}

#[test]
fn tensors_written_by_peft_are_read_number_for_number() {
    for name in ADAPTERS {
        let loaded = adapter::load(fixture(name), &model()).unwrap();
        let bytes = fs::read(fixture(name).join(adapter::WEIGHTS_FILE)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(loaded.layout.entries().len(), file.len(), "{name}");
        for entry in loaded.layout.entries() {
            let tensor = file.tensor(&entry.tensor_name()).unwrap();
            let values: Vec<f32> = match dtype_of(name) {
                AdapterDtype::BF16 => {
                    // A bf16 is the upper half of an f32.
                    let wide = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                    tensor.data().chunks_exact(2).map(wide).collect()
                }
                _ => tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            };
            assert_eq!(loaded.weights[entry.range()], values, "{name} {}", entry.tensor_name());
            assert!(values.iter().any(|&value| value != 0.0), "{name} {}", entry.tensor_name());
        }
    }
}

#[test]
fn a_tensor_file_saved_again_has_the_bytes_that_peft_wrote() {
    for name in ADAPTERS {
        let folder = resaved(name);
        let ours = fs::read(folder.path().join(adapter::WEIGHTS_FILE)).unwrap();
        let theirs = fs::read(fixture(name).join(adapter::WEIGHTS_FILE)).unwrap();
        assert!(ours == theirs, "{name}: {} bytes, {} from PEFT", ours.len(), theirs.len());
    }
}

#[test]
fn a_configuration_saved_again_says_what_peft_said() {
    for name in ADAPTERS {
        let folder = resaved(name);
        let text = fs::read_to_string(folder.path().join(adapter::CONFIG_FILE)).unwrap();
        let ours: Value = serde_json::from_str(&text).unwrap();
        let theirs = json(&format!("{name}/{}", adapter::CONFIG_FILE));
        for (key, value) in ours.as_object().unwrap() {
            assert_eq!(Some(value), theirs.get(key), "{name}: {key}");
        }
        // An entry that is left out is off in PEFT's file too, or does not concern the adapter's result.
        let harmless = ["peft_version", "megatron_core", "qalora_group_size"];
        for (key, value) in theirs.as_object().unwrap() {
            let off = value.is_null() || *value == false || *value == serde_json::json!({});
            assert!(ours.get(key).is_some() || off || harmless.contains(&key.as_str()), "{name}: {key} = {value}");
        }
        // Python's layout: the same lines in the same order for the keys that both have.
        let original = fs::read_to_string(fixture(name).join(adapter::CONFIG_FILE)).unwrap();
        let lines: Vec<&str> = original.lines().map(|line| line.trim_end_matches(',')).collect();
        let mut from = 0;
        for line in text.lines().map(|line| line.trim_end_matches(',')) {
            let at = lines[from..].iter().position(|other| *other == line);
            from += at.unwrap_or_else(|| panic!("{name}: no line {line:?} after line {from} in PEFT's file")) + 1;
        }
        assert!(!text.ends_with('\n'));
    }
}

#[test]
fn names_are_matched_as_peft_matches_them() {
    let rows = json("matching.json");
    let rows = rows.as_array().unwrap();
    assert!(rows.len() > 200, "{} decisions", rows.len());
    let mut matched = 0;
    for row in rows {
        let name = row[2].as_str().unwrap();
        let expected = row[3].as_bool().unwrap();
        let target_modules: TargetModules = serde_json::from_value(row[0].clone()).unwrap();
        let exclude_modules: Option<ModuleFilter> = serde_json::from_value(row[1].clone()).unwrap();
        if exclude_modules.is_none() {
            assert_eq!(target_modules.matches(name), expected, "{row}");
        }
        let config = LoraConfig { target_modules, exclude_modules, ..Default::default() };
        assert_eq!(config.targets(name), expected, "{row}");
        matched += usize::from(expected);
    }
    assert!(matched > 50 && matched < rows.len() - 50, "{matched} of {} match", rows.len());
}

#[test]
fn regular_expressions_mean_what_they_mean_in_python() {
    let file = json("regex.json");
    let names: Vec<&str> = file[0].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let rows = file[1].as_array().unwrap();
    assert!(rows.len() > 2000, "{} patterns", rows.len());
    for row in rows {
        let (pattern, expected) = (row[0].as_str().unwrap(), row[1].as_str().unwrap());
        let compiled: Result<ModulePattern> = ModulePattern::new(pattern);
        match expected {
            "error" => assert!(compiled.is_err(), "{pattern:?} is an error in Python"),
            "unsupported" => {
                assert!(matches!(compiled, Err(Error::Unsupported(_))), "{pattern:?}: {compiled:?}");
            }
            expected => {
                let compiled = compiled.unwrap_or_else(|error| panic!("{pattern:?} is fine in Python: {error}"));
                let ours: String = names.iter().map(|name| if compiled.matches(name) { '1' } else { '0' }).collect();
                assert_eq!(ours, expected, "{pattern:?} on {names:?}");
            }
        }
    }
}

#[test]
#[ignore = "needs a Python with PEFT: QLORA_PYTHON=path/to/python"]
fn peft_takes_what_is_written_and_computes_the_same() {
    let python = std::env::var("QLORA_PYTHON").expect("QLORA_PYTHON names a Python interpreter with PEFT");
    let bytes = fs::read(fixture("logits.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for name in ADAPTERS {
        let folder = resaved(name);
        let logits = folder.path().join("logits.safetensors");
        let tensors = [("input_ids", file.tensor("input_ids").unwrap()), ("logits", file.tensor(name).unwrap())];
        fs::write(&logits, safetensors::serialize(tensors, None).unwrap()).unwrap();
        let output = Command::new(&python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check_peft.py"))
            .args(["--tolerance", "1e-5", "--base"])
            .arg(fixture("base"))
            .arg("--adapter")
            .arg(folder.path())
            .arg("--logits")
            .arg(&logits)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{name}: {text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("all taken") && text.contains("largest difference"), "{name}: {text}");
    }
}
