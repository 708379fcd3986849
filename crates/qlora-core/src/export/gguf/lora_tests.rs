use std::collections::HashMap;
use std::path::PathBuf;

use super::*;
use crate::adapter;
use crate::formats::HfDirectory;
use crate::formats::gguf::named_floats;
use crate::merge::{PeftUpdate, WeightUpdate};
use crate::source::WeightSource;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn written(adapter: &PeftAdapter, base: &HfDirectory) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a.gguf");
    let written = write_adapter(adapter, base.config(), &out, GgufType::F32, Some("tiny"))?;
    let bytes = std::fs::read(&out).unwrap();
    assert_eq!((written.bytes, written.tensors % 2), (bytes.len() as u64, 0));
    Ok(bytes)
}

/// f32 metadata by its key: its bytes follow the key and the type 6.
fn float(bytes: &[u8], key: &str) -> f32 {
    let mut pattern = key.as_bytes().to_vec();
    pattern.extend(6u32.to_le_bytes());
    let at = bytes.windows(pattern.len()).position(|window| window == pattern).unwrap() + pattern.len();
    f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Checks that llama.cpp's update of a weight, `alpha / r B A`, is the adapter's, in llama.cpp's order of rows. The
/// number of modules whose rows it interleaves.
fn check(name: &str, adapter: &PeftAdapter, base: &HfDirectory, bytes: &[u8]) -> usize {
    let tensors: HashMap<String, Vec<f32>> = named_floats(bytes).unwrap().into_iter().collect();
    let alpha = float(bytes, "adapter.lora.alpha");
    let update = PeftUpdate::new(adapter, base).unwrap();
    let config = base.config();
    let spec = config.spec();
    assert_eq!(tensors.len(), 2 * adapter.modules.len(), "{name}");
    let mut interleaved = 0;
    for tensor in spec.tensors().filter(|tensor| update.targets().contains(&tensor.name)) {
        let [rows, cols] = tensor.shape[..] else { panic!("{}", tensor.name) };
        let mut expected = vec![0.0; rows * cols];
        update.apply(&tensor.name, 0..rows, cols, &mut expected).unwrap();
        if let Some(heads) = tensor.module.interleaved_heads {
            let mut data = PlainData::F32(expected);
            crate::formats::gguf::rows::permute(&mut data, heads, config.head_dim);
            let PlainData::F32(data) = data else { unreachable!() };
            expected = data;
            interleaved += 1;
        }
        let factor = |end: &str| &tensors[&format!("{}.{end}", tensor.gguf())];
        let (a, b) = (factor("lora_a"), factor("lora_b"));
        let embedding = tensor.name.starts_with(EMBEDDING);
        let rank = if embedding { a.len() / rows } else { a.len() / cols };
        for (at, expected) in expected.iter().enumerate() {
            let (row, col) = (at / cols, at % cols);
            // Of the embedding, llama.cpp takes rows of A and multiplies them by B.
            let product = |k: usize| match embedding {
                true => a[row * rank + k] * b[col * rank + k],
                false => b[row * rank + k] * a[k * cols + col],
            };
            let got = alpha / rank as f32 * (0..rank).map(product).sum::<f32>();
            assert!((got - expected).abs() < 1e-5, "{name} {}: {got} {expected}", tensor.name);
        }
    }
    interleaved
}

#[test]
fn a_and_b_make_the_adapters_update() {
    let base = HfDirectory::open(fixtures().join("peft/base")).unwrap();
    for name in ["peft/adapter_list", "peft/adapter_regex", "peft/adapter_rslora"] {
        let adapter = adapter::open_folder(fixtures().join(name), base.config()).unwrap();
        let bytes = written(&adapter, &base).unwrap();
        assert!(check(name, &adapter, &base, &bytes) > 0, "{name}");
    }
}

/// PEFT's adapters of every kind: written right, or refused with the way out.
#[test]
fn what_llama_cpp_has_no_place_for_is_refused() {
    let facts = std::fs::read(fixtures().join("peft_kinds/facts.json")).unwrap();
    let facts: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&facts).unwrap();
    let (mut right, mut refused) = (Vec::new(), Vec::new());
    for (name, fact) in &facts {
        let folder = fixtures().join("peft_kinds").join(name);
        let Some(base) = fact["base"].as_str().filter(|_| folder.is_dir()) else { continue };
        let base = HfDirectory::open(fixtures().join(base)).unwrap();
        let adapter = adapter::open_folder(&folder, base.config()).unwrap();
        match written(&adapter, &base) {
            Ok(bytes) => {
                check(name, &adapter, &base, &bytes);
                right.push(name.as_str());
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("llama.cpp") && text.contains("--format gguf"), "{name}: {text}");
                refused.push(name.as_str());
            }
        }
    }
    println!("right: {right:?}; refused: {refused:?}");
    for name in ["embedding", "head_lora", "patterns", "patterns_rslora", "regex", "layers"] {
        assert!(right.contains(&name), "{name}: {right:?}");
    }
    for name in ["dora", "lora_bias", "tokens", "save_head", "head_lora_tied"] {
        assert!(refused.contains(&name), "{name}: {refused:?}");
    }
    let base = HfDirectory::open(fixtures().join("peft/base")).unwrap();
    let adapter = adapter::open_folder(fixtures().join("peft/adapter_list"), base.config()).unwrap();
    let out = std::env::temp_dir().join("never.gguf");
    let error = write_adapter(&adapter, base.config(), &out, GgufType::Q4KM, None).unwrap_err().to_string();
    assert!(error.contains("q4_k_m") && !out.exists(), "{error}");
}
