//! Models and adapters whose weights are pickles (`scripts/fixtures/pickles.py`), against the same values as safetensors.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::tally::{Tally, cuts};

use qlora_core::adapter;
use qlora_core::config::ModelConfig;
use qlora_core::formats::HfDirectory;
use qlora_core::lora::AdapterLayout;
use qlora_core::source::WeightSource;
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

/// The configuration with the weights of a folder of pickles.
fn folder_of(weights: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let config = fixture("pickles/model/config.json");
    fs::copy(&config, copy.path().join("config.json")).unwrap();
    for entry in fs::read_dir(fixture("pickles").join(weights)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

#[test]
fn a_model_of_pickles_is_that_of_safetensors() {
    let expected = HfDirectory::open(fixture("pickles/model")).unwrap();
    for weights in ["zip", "legacy", "sharded"] {
        let folder = folder_of(weights);
        let source = HfDirectory::open(folder.path()).unwrap();
        assert_eq!(source.names(), expected.names(), "{weights}");
        assert!(source.config().tie_word_embeddings && source.remarks().is_empty(), "{:?}", source.remarks());
        for name in source.names() {
            assert_eq!(source.shape(&name), expected.shape(&name));
            let [left, right] = [&source, &expected].map(|source| source.read_finite(&name).unwrap());
            assert_eq!(format!("{left:?}"), format!("{right:?}"), "{weights} {name}");
            assert_eq!(left.into_f32(), right.into_f32(), "{weights} {name}");
            // What does not lie in one piece is not handed out as if it did.
            assert_eq!(source.stored(&name).is_none(), name.contains("k_proj"), "{name}");
        }
        let file = source.file_of("model.norm.weight").unwrap().to_owned();
        assert!(file.to_str().unwrap().ends_with(".bin"));
    }
    // Safetensors come first.
    let both = folder_of("zip");
    fs::write(both.path().join("model.safetensors"), fs::read(fixture("pickles/model/model.safetensors")).unwrap())
        .unwrap();
    let source = HfDirectory::open(both.path()).unwrap();
    assert!(source.file_of("model.norm.weight").unwrap().ends_with("model.safetensors"));
}

#[test]
fn damaged_models_of_pickles_say_what_is_wrong() {
    let folder = folder_of("sharded");
    let index = folder.path().join("pytorch_model.bin.index.json");
    let text = fs::read_to_string(&index).unwrap();
    let refused = |parts: &[&str]| {
        let error = HfDirectory::open(folder.path()).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    fs::write(&index, text.replacen("pytorch_model-00001-of-00002.bin", "../x.bin", 1)).unwrap();
    refused(&["index.json", "not the name of a .bin file"]);
    fs::write(&index, text.replacen("pytorch_model-00001-of-00002.bin", "x.safetensors", 1)).unwrap();
    refused(&["not the name of a .bin file"]);
    let entry = "\"model.embed_tokens.weight\": \"pytorch_model-00001-of-00002.bin\",";
    assert!(text.contains(entry));
    fs::write(&index, text.replace(entry, "")).unwrap();
    refused(&["model.embed_tokens.weight", "not in pytorch_model.bin.index.json"]);
    fs::write(&index, &text).unwrap();
    let shard = folder.path().join("pytorch_model-00002-of-00002.bin");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    refused(&["pytorch_model-00002-of-00002.bin", "cut short"]);
    fs::copy(fixture("pickles/refused/executes.bin"), &shard).unwrap();
    refused(&["pytorch_model-00002-of-00002.bin", ".system", "nothing in it is executed"]);
}

#[test]
fn an_adapter_of_a_pickle_is_that_of_safetensors() {
    let facts: Value = serde_json::from_slice(&fs::read(fixture("peft_kinds/facts.json")).unwrap()).unwrap();
    let base = fixture(facts["dora"]["base"].as_str().unwrap());
    let model = ModelConfig::from_json_file(base.join("config.json")).unwrap();
    let expected = adapter::load(fixture("peft_kinds/dora"), &model).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture("pickles/adapter/adapter_config.json"), folder.path().join("adapter_config.json")).unwrap();
    for from in ["adapter", "adapter-legacy"] {
        let weights = folder.path().join("adapter_model.bin");
        fs::copy(fixture("pickles").join(from).join("adapter_model.bin"), &weights).unwrap();
        let read = adapter::load(folder.path(), &model).unwrap();
        assert_eq!((&read.weights, &read.layout), (&expected.weights, &expected.layout), "{from}");
        let open = adapter::open_folder(folder.path(), &model).unwrap();
        assert_eq!(open.modules[0].a, adapter::open_folder(fixture("peft_kinds/dora"), &model).unwrap().modules[0].a);
        // Training goes on from it.
        let layout = AdapterLayout::for_model(&read.config.lora, &model).unwrap();
        let mut flat = vec![0.0; layout.len()];
        adapter::load_into(folder.path(), &read.config.lora, &layout, &mut flat).unwrap();
        assert_eq!(flat, expected.weights);
    }
    let weights = folder.path().join("adapter_model.bin");
    fs::copy(fixture("pickles/refused/executes.bin"), &weights).unwrap();
    for error in [
        adapter::load(folder.path(), &model).unwrap_err().to_string(),
        adapter::open_folder(folder.path(), &model).unwrap_err().to_string(),
    ] {
        assert!(error.contains("adapter_model.bin") && error.contains(".system"), "{error}");
    }
    fs::copy(fixture("pickles/zip/pytorch_model.bin"), &weights).unwrap();
    let error = adapter::load(folder.path(), &model).unwrap_err().to_string();
    assert!(error.contains("adapter_model.bin") && error.contains("the tensors are not those"), "{error}");
}

/// The damage set of pickles: cut, more than tensors, another format. Sizes that lie are tested where they are read.
#[test]
fn damage_set() {
    let mut tally = Tally::default();
    let names = ["pytorch_model"];
    for (weights, file) in
        [("zip", "pytorch_model.bin"), ("legacy", "pytorch_model.bin"), ("sharded", "pytorch_model-00002-of-00002.bin")]
    {
        let folder = folder_of(weights);
        let path = folder.path().join(file);
        let whole = fs::read(&path).unwrap();
        let load = || HfDirectory::open(folder.path()).map(drop).map_err(|error| error.to_string());
        for length in cuts(whole.len()) {
            fs::write(&path, &whole[..length]).unwrap();
            tally.refused("truncated", &names, &format!("{weights} cut to {length}"), load);
        }
        for refused in fs::read_dir(fixture("pickles/refused")).unwrap() {
            let refused = refused.unwrap().path();
            fs::copy(&refused, &path).unwrap();
            tally.refused("not tensors", &names, &format!("{}", refused.display()), load);
        }
        fs::write(&path, fs::read(fixture("pickles/model/model.safetensors")).unwrap()).unwrap();
        tally.refused("another format", &["not a file of torch.save"], "safetensors", load);
    }
    tally.check("pickles", DAMAGES);
}

const DAMAGES: &[(&str, usize)] = &[("another format", 3), ("not tensors", 30), ("truncated", 51)];
