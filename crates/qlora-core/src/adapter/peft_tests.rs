//! Adapters of every kind that are not what their options say, and damaged files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::config_file;
use super::peft::assemble;
use super::{CONFIG_FILE, WEIGHTS_FILE, open_folder};
use crate::config::ModelConfig;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

/// Every kind with the model that it belongs to.
fn kinds() -> Vec<(String, ModelConfig)> {
    let facts = fs::read(fixtures().join("peft_kinds/facts.json")).unwrap();
    let facts: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&facts).unwrap();
    let model = |facts: &serde_json::Value| {
        ModelConfig::from_json_file(fixtures().join(facts["base"].as_str().unwrap()).join("config.json")).unwrap()
    };
    facts.iter().map(|(kind, facts)| (kind.clone(), model(facts))).collect()
}

type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

fn tensors(kind: &str) -> Vec<Tensor> {
    let bytes = fs::read(fixtures().join("peft_kinds").join(kind).join(WEIGHTS_FILE)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<Tensor> =
        file.iter().map(|(name, t)| (name.to_owned(), t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect();
    tensors.sort();
    tensors
}

fn bytes(tensors: &[Tensor]) -> Vec<u8> {
    fn view((name, dtype, shape, data): &Tensor) -> (String, TensorView<'_>) {
        (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    }
    let views: Vec<_> = tensors.iter().map(view).collect();
    safetensors::serialize(views, None).unwrap()
}

fn config_text(kind: &str) -> String {
    fs::read_to_string(fixtures().join("peft_kinds").join(kind).join(CONFIG_FILE)).unwrap()
}

/// The error of an adapter with this text and these tensors.
fn refused(text: &str, file: &[u8], model: &ModelConfig) -> String {
    let path = Path::new("adapter").join(WEIGHTS_FILE);
    let start = Instant::now();
    let parsed = config_file::parse_any(Path::new("adapter/adapter_config.json"), text.as_bytes());
    let adapter = parsed.and_then(|(config, kinds)| assemble(&path, config, kinds, file, model));
    let error = adapter.expect_err("the adapter is not what it says").to_string();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}: {error}", start.elapsed());
    error
}

#[test]
fn every_tensor_that_is_missing_renamed_reshaped_or_not_finite_is_named() {
    let mut cases = 0;
    for (kind, model) in kinds() {
        let (text, good) = (config_text(&kind), tensors(&kind));
        for i in 0..good.len() {
            let name = &good[i].0;
            // The base's own embedding may be there or not.
            if name.ends_with("embed_tokens.base_layer.weight") || (kind.ends_with("_tied") && name.contains("lm_head"))
            {
                continue;
            }
            let mut without = good.clone();
            without.remove(i);
            let error = refused(&text, &bytes(&without), &model);
            assert!(error.contains("1 missing tensors") && error.contains(name), "{kind}: {error}");

            let mut renamed = good.clone();
            renamed[i].0 = name.replace("base_model.model.", "base_model.model.x.");
            let error = refused(&text, &bytes(&renamed), &model);
            assert!(
                error.contains(name) && error.contains(&format!("unexpected tensors: {}", renamed[i].0)),
                "{kind}: {error}"
            );

            let mut longer = good.clone();
            let (_, dtype, shape, data) = &mut longer[i];
            shape[0] += 1;
            data.resize(shape.iter().product::<usize>() * dtype.bitsize() / 8, 0);
            let error = refused(&text, &bytes(&longer), &model);
            assert!(error.contains(name) && error.contains("has shape"), "{kind}: {error}");

            let mut poisoned = good.clone();
            let end = poisoned[i].3.len();
            poisoned[i].3[end - 4..].fill(0xff);
            let error = refused(&text, &bytes(&poisoned), &model);
            assert!(error.contains(name) && error.contains("holds NaN at row"), "{kind}: {error}");

            let mut integers = good.clone();
            integers[i].1 = if integers[i].1 == Dtype::F32 { Dtype::I32 } else { Dtype::I16 };
            let error = refused(&text, &bytes(&integers), &model);
            assert!(error.contains(name) && error.contains("has dtype I"), "{kind}: {error}");
            cases += 5;
        }
        let mut more = good.clone();
        more.push(("base_model.model.stray".to_owned(), Dtype::F32, vec![1], vec![0; 4]));
        let error = refused(&text, &bytes(&more), &model);
        assert!(error.contains("1 unexpected tensors: base_model.model.stray"), "{kind}: {error}");
        cases += 1;
    }
    println!("{cases} adapters refused");
    assert!(cases > 700, "{cases}");
}

#[test]
fn options_that_do_not_belong_to_the_tensors_are_found() {
    let mut cases = 0;
    for (kind, model) in kinds() {
        let file = bytes(&tensors(&kind));
        let mut changes = vec![("\"r\": ", "\"r\": 1"), ("\"lora_bias\": false", "\"lora_bias\": true")];
        if !kind.contains("lora_bias") {
            changes.push(("\"use_dora\": false", "\"use_dora\": true"));
        }
        if !kind.starts_with("save") {
            changes.push(("\"modules_to_save\": null", "\"modules_to_save\": [\"norm\"]"));
        }
        if kind != "tokens_tied" {
            changes.push(("\"trainable_token_indices\": null", "\"trainable_token_indices\": [1]"));
        }
        for (from, to) in changes {
            let text = config_text(&kind);
            // `"r": 2` becomes `"r": 12`.
            let changed = text.replacen(from, to, 1);
            if changed == text {
                continue;
            }
            refused(&changed, &file, &model);
            cases += 1;
        }
    }
    assert!(cases > 100, "{cases}");
    let (_, model) = kinds().into_iter().find(|(kind, _)| kind == "tokens").unwrap();
    let text = config_text("tokens").replace("    99", "    128");
    let error = refused(&text, &bytes(&tensors("tokens")), &model);
    assert!(error.contains("128 is beyond the vocabulary of 128"), "{error}");
}

#[test]
fn a_resized_vocabulary_says_what_to_do() {
    let (_, model) = kinds().into_iter().find(|(kind, _)| kind == "save_embedding").unwrap();
    let mut resized = tensors("save_embedding");
    let (_, dtype, shape, data) = resized.iter_mut().find(|tensor| tensor.0.ends_with("embed_tokens.weight")).unwrap();
    shape[0] += 3;
    data.resize(shape.iter().product::<usize>() * dtype.bitsize() / 8, 0);
    let error = refused(&config_text("save_embedding"), &bytes(&resized), &model);
    assert!(error.contains("resizes the vocabulary") && error.contains("merge"), "{error}");
}

#[test]
fn broken_pickles_and_missing_files_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let (_, model) = kinds().into_iter().find(|(kind, _)| kind == "dora").unwrap();
    let error = open_folder(folder.path(), &model).unwrap_err().to_string();
    assert!(error.contains("adapter_config.json") && error.contains("not found"), "{error}");
    fs::write(folder.path().join(CONFIG_FILE), config_text("dora")).unwrap();
    let error = open_folder(folder.path(), &model).unwrap_err().to_string();
    assert!(error.contains(WEIGHTS_FILE) && error.contains("not found"), "{error}");
    fs::write(folder.path().join("adapter_model.bin"), "pickle").unwrap();
    let error = open_folder(folder.path(), &model).unwrap_err().to_string();
    assert!(error.contains("adapter_model.bin") && error.contains("not a file of torch.save"), "{error}");
    fs::create_dir(folder.path().join(WEIGHTS_FILE)).unwrap();
    let error = open_folder(folder.path(), &model).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
}

/// A model, and the bytes of an adapter's two files for it.
type Files = (ModelConfig, Vec<u8>, Vec<u8>);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Damaged bytes of either file give an error, or an adapter whose numbers are finite, and never more memory than the file has.
    #[test]
    fn damaged_files_never_panic(
        kind in 0..28usize,
        which in any::<bool>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        header in prop::option::weighted(0.1, prop_oneof![any::<u64>(), 0..4096u64, Just(u64::MAX)]),
    ) {
        static FILES: std::sync::OnceLock<Vec<Files>> = std::sync::OnceLock::new();
        let files = FILES.get_or_init(|| {
            kinds().into_iter().map(|(kind, model)| (model, config_text(&kind).into_bytes(), bytes(&tensors(&kind)))).collect()
        });
        let (model, config, weights) = &files[kind % files.len()];
        let (mut config, mut weights) = (config.clone(), weights.clone());
        let target = if which { &mut config } else { &mut weights };
        // Mostly the header of the tensor file.
        let within = target.len().min(3000);
        edits.iter().for_each(|(at, byte)| target[at.index(within)] = *byte);
        if let Some(header) = header.filter(|_| !which) {
            target[..8].copy_from_slice(&header.to_le_bytes());
        }
        if let Some(cut) = cut {
            target.truncate(cut.index(target.len()));
        }
        let parsed = config_file::parse_any(Path::new("x"), &config);
        match parsed.and_then(|(config, kinds)| assemble(Path::new("x"), config, kinds, &weights, model)) {
            Ok(adapter) => prop_assert!(adapter.modules.iter().all(|m| m.a.iter().chain(&m.b).all(|x| x.is_finite()))),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
