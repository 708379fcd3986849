//! A set of damaged files of every kind, each an error that names the file, tensor or key, within seconds and little memory.
//!
//! | | checkpoint | shard index | quantized | adapter | GGUF | chat template |
//! |---|---|---|---|---|---|---|
//! | truncated | here | here | `robustness` | here | `damage_set_gguf` | |
//! | wrong shapes, wrong dtypes, missing and extra keys, NaN | here | | `robustness` | `adapter/peft_tests.rs` | `damage_set_gguf` | |
//! | hostile sizes | here | here | here, `robustness` | here | `damage_set_gguf`, `source/gguf/tests.rs` | `damage_set_chat` |
//! | path tricks | | here | | | | |
//! | loops | | | | | | `damage_set_chat` |
//!
//! Every test prints its counts (`--nocapture`). Damages at random are in `robustness` and the
//! adapters' own tests.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use crate::common::tally::{Tally, cuts};
use crate::common::{Checkpoint, FOLDERS, Raw, fixtures, quantized};
use qlora_core::adapter;
use qlora_core::config::ModelConfig;
use qlora_core::formats::HfDirectory;
use qlora_core::model::{CausalLm, LoadOptions};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

fn load(folder: &Path) -> Result<(), String> {
    let source = HfDirectory::open(folder).map_err(|error| error.to_string())?;
    CausalLm::load(&source, LoadOptions::default()).map(drop).map_err(|error| error.to_string())
}

fn copy(from: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        // Not fs::copy: a fixture may be read-only.
        fs::write(folder.path().join(path.file_name().unwrap()), fs::read(&path).unwrap()).unwrap();
    }
    folder
}

/// Lengths that a safetensors file may claim for its header, all wrong.
fn header_lengths(file: &[u8]) -> Vec<u64> {
    let right = u64::from_le_bytes(file[..8].try_into().unwrap());
    vec![
        0,
        1,
        right - 1,
        right + 8,
        file.len() as u64,
        99_999_999,
        100_000_001,
        1 << 40,
        1 << 63,
        u64::MAX - 7,
        u64::MAX,
    ]
}

/// A file of a safetensors header and nothing else.
fn header_only(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
}

/// The tiny Llama model, in one file.
fn llama() -> Checkpoint {
    let folder = fixtures().join("loading/llama");
    let mut tensors = BTreeMap::new();
    for number in 1..=3 {
        let bytes = fs::read(folder.join(format!("model-0000{number}-of-00003.safetensors"))).unwrap();
        for (name, t) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            tensors.insert(name, Raw { dtype: t.dtype(), shape: t.shape().to_vec(), bytes: t.data().to_vec() });
        }
    }
    let config = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    Checkpoint { config, tensors }
}

#[test]
fn checkpoints() {
    let mut tally = Tally::default();
    let good = llama();
    let folder = tempfile::tempdir().unwrap();
    good.write(folder.path());
    load(folder.path()).unwrap();
    let mut refused = |kind, names: &[&str], what: &str, damaged: &Checkpoint| {
        damaged.write(folder.path());
        tally.refused(kind, names, what, || load(folder.path()));
    };
    for (name, raw) in &good.tensors {
        let mut damaged = good.clone();
        damaged.tensors.remove(name);
        refused("missing key", &[name], name, &damaged);
        let mut with = |kind, change: &dyn Fn(&mut Raw)| {
            let mut damaged = good.clone();
            change(damaged.tensors.get_mut(name).unwrap());
            refused(kind, &[name], name, &damaged);
        };
        let count: usize = raw.shape.iter().product();
        for shape in [vec![count / 2, 2], vec![1, count], vec![count, 1, 1]] {
            with("wrong shape", &|raw| raw.shape.clone_from(&shape));
        }
        for dtype in [Dtype::I16, Dtype::U16] {
            with("wrong dtype", &|raw| raw.dtype = dtype);
        }
        with("wrong dtype", &|raw| (raw.dtype, raw.bytes) = (Dtype::U8, vec![0; count]));
        with("wrong dtype", &|raw| (raw.dtype, raw.bytes) = (Dtype::F64, vec![0; 8 * count]));
        // bf16: NaN, and both infinities.
        for bits in [0x7fc0u16, 0x7f80, 0xff80] {
            for at in [0, count / 2, count - 1] {
                with("NaN", &|raw| raw.bytes[2 * at..2 * at + 2].copy_from_slice(&bits.to_le_bytes()));
            }
        }
    }
    for extra in
        ["model.layers.2.mlp.up_proj.weight", "lm_head.bias", "model.layers.0.mlp.up_proj.lora_A", "x", "a/../b"]
    {
        let mut damaged = good.clone();
        damaged.tensors.insert(extra.to_owned(), good.tensors["model.norm.weight"].clone());
        refused("extra key", &[extra], extra, &damaged);
    }
    let sizes = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ];
    for key in sizes {
        for value in
            [json!(u64::MAX), json!(i64::MAX), json!(1u64 << 40), json!(1u64 << 32), json!(-1), json!(0), json!(1e300)]
        {
            let mut damaged = good.clone();
            damaged.config[key] = value.clone();
            // A size that is possible by itself does not fit the tensors.
            refused("hostile size", &["config.json", key, "model."], &format!("{key} {value}"), &damaged);
        }
    }

    good.write(folder.path());
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in cuts(whole.len()) {
        fs::write(&path, &whole[..length]).unwrap();
        tally.refused("truncated", &["model.safetensors"], &format!("{length} bytes"), || load(folder.path()));
    }
    for length in header_lengths(&whole) {
        let mut damaged = whole.clone();
        damaged[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(&path, damaged).unwrap();
        tally.refused("hostile size", &["model.safetensors"], &format!("header {length}"), || load(folder.path()));
    }
    let max = u64::MAX;
    for entry in [
        format!(r#""shape":[{max}],"data_offsets":[0,{max}]"#),
        format!(r#""shape":[{max},{max}],"data_offsets":[0,8]"#),
        format!(r#""shape":[{},2],"data_offsets":[0,0]"#, 1u64 << 63),
        r#""shape":[4],"data_offsets":[8,0]"#.to_owned(),
        r#""shape":[1099511627776],"data_offsets":[0,2199023255552]"#.to_owned(),
        format!(r#""shape":{:?},"data_offsets":[0,2]"#, vec![1; 100_000]),
    ] {
        fs::write(&path, header_only(&format!(r#"{{"model.norm.weight":{{"dtype":"BF16",{entry}}}}}"#))).unwrap();
        tally.refused("hostile size", &["model.safetensors", "model."], &entry[..20], || load(folder.path()));
    }
    fs::write(&path, header_only(&"[".repeat(1 << 20))).unwrap();
    tally.refused("hostile size", &["model.safetensors"], "nested header", || load(folder.path()));
    // Files whose length is a terabyte, of nothing.
    for name in ["model.safetensors", "config.json"] {
        good.write(folder.path());
        File::options().write(true).open(folder.path().join(name)).unwrap().set_len(1 << 40).unwrap();
        tally.refused("hostile size", &[name], "a terabyte", || load(folder.path()));
    }
    tally.check(
        "checkpoints",
        &[
            ("NaN", 261),
            ("extra key", 5),
            ("hostile size", 76),
            ("missing key", 29),
            ("truncated", 17),
            ("wrong dtype", 116),
            ("wrong shape", 87),
        ],
    );
}

#[test]
fn shard_indexes() {
    const INDEX: &str = "model.safetensors.index.json";
    let mut tally = Tally::default();
    let folder = copy(&fixtures().join("loading/llama"));
    let path = folder.path().join(INDEX);
    let text = fs::read_to_string(&path).unwrap();
    let good: Value = serde_json::from_str(&text).unwrap();
    load(folder.path()).unwrap();
    // Behind every trick is a whole shard: following it would work.
    let outside = tempfile::tempdir().unwrap();
    let shard = "model-00002-of-00003.safetensors";
    fs::copy(folder.path().join(shard), outside.path().join("x.safetensors")).unwrap();
    fs::create_dir(folder.path().join("sub")).unwrap();
    fs::copy(folder.path().join(shard), folder.path().join("sub/x.safetensors")).unwrap();
    fs::copy(folder.path().join(shard), folder.path().join(".hidden.safetensors")).unwrap();
    let absolute = outside.path().join("x.safetensors").to_str().unwrap().to_owned();
    let up = format!("../{}/x.safetensors", outside.path().file_name().unwrap().to_str().unwrap());
    let name = good["weight_map"].as_object().unwrap().iter().find(|(_, file)| *file == shard).unwrap().0.clone();
    let long = format!("{}.safetensors", "a".repeat(100_000));
    for trick in [
        absolute.as_str(),
        &up,
        &format!("./{shard}"),
        &format!("sub/../{shard}"),
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "file:///x.safetensors",
        "//x.safetensors",
        "/dev/zero",
        "..",
        ".",
        "",
        ".hidden.safetensors",
        "x.safetensors\0",
        "config.json",
    ] {
        let mut damaged = good.clone();
        damaged["weight_map"][&name] = json!(trick);
        fs::write(&path, damaged.to_string()).unwrap();
        tally.refused("path trick", &[INDEX], trick, || load(folder.path()));
    }
    for wrong in [json!(null), json!(7), json!(["x.safetensors"]), json!({})] {
        let mut damaged = good.clone();
        damaged["weight_map"][&name] = wrong.clone();
        fs::write(&path, damaged.to_string()).unwrap();
        tally.refused("wrong type", &[INDEX], &wrong.to_string(), || load(folder.path()));
    }
    for wrong in
        [json!({}), json!([]), json!({"weight_map": {}}), json!({"weight_map": []}), json!({"weight_map": null})]
    {
        fs::write(&path, wrong.to_string()).unwrap();
        tally.refused("missing key", &[INDEX], &wrong.to_string(), || load(folder.path()));
    }
    // Names of files that are not there, too long, a folder, or another tensor's shard.
    fs::create_dir(folder.path().join("folder.safetensors")).unwrap();
    for (file, named) in [
        ("none.safetensors", "none.safetensors"),
        (&long, "aaaa"),
        ("folder.safetensors", "folder.safetensors"),
        ("model-00001-of-00003.safetensors", name.as_str()),
    ] {
        let mut damaged = good.clone();
        damaged["weight_map"][&name] = json!(file);
        fs::write(&path, damaged.to_string()).unwrap();
        let kind = if file.len() > 1000 { "hostile size" } else { "wrong file" };
        // The system's message does not repeat a name of 100,000 bytes, nor do we.
        tally.refused(kind, &[named, INDEX], &file[..20.min(file.len())], || load(folder.path()));
    }
    let mut damaged = good.clone();
    damaged["weight_map"].as_object_mut().unwrap().remove(&name);
    fs::write(&path, damaged.to_string()).unwrap();
    tally.refused("missing key", &[&name], "one tensor", || load(folder.path()));
    let mut damaged = good.clone();
    damaged["weight_map"]["model.extra"] = json!(shard);
    fs::write(&path, damaged.to_string()).unwrap();
    tally.refused("extra key", &["model.extra"], "one tensor", || load(folder.path()));
    for length in cuts(text.trim_end().len()) {
        fs::write(&path, &text[..length]).unwrap();
        tally.refused("truncated", &[INDEX], &format!("{length} bytes"), || load(folder.path()));
    }
    fs::write(&path, format!(r#"{{"weight_map": {}"#, "[".repeat(1 << 20))).unwrap();
    tally.refused("hostile size", &[INDEX], "nested", || load(folder.path()));
    fs::write(&path, "").unwrap();
    File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    tally.refused("hostile size", &[INDEX], "a terabyte", || load(folder.path()));
    #[cfg(unix)]
    {
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(INDEX, &path).unwrap();
        tally.refused("path trick", &["model.safetensors"], "a link to itself", || load(folder.path()));
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        tally.refused("path trick", &[INDEX], "a device", || load(folder.path()));
        // Nobody writes to this pipe: whoever opens it waits.
        fs::remove_file(&path).unwrap();
        fs::write(&path, &text).unwrap();
        let pipe = folder.path().join(shard);
        fs::remove_file(&pipe).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        tally.refused("path trick", &[shard], "a pipe", || load(folder.path()));
    }
    tally.check(
        "shard indexes",
        &[
            ("extra key", 1),
            ("hostile size", 3),
            ("missing key", 6),
            ("path trick", 20),
            ("truncated", 17),
            ("wrong file", 3),
            ("wrong type", 4),
        ],
    );
}

#[test]
fn quantized_checkpoints() {
    let mut tally = Tally::default();
    for name in FOLDERS {
        let folder = copy(&quantized(name));
        load(folder.path()).unwrap();
        let path = folder.path().join("model.safetensors");
        let whole = fs::read(&path).unwrap();
        for length in header_lengths(&whole) {
            let mut damaged = whole.clone();
            damaged[..8].copy_from_slice(&length.to_le_bytes());
            fs::write(&path, damaged).unwrap();
            tally.refused("hostile size", &["model.safetensors"], &format!("{name}: {length}"), || load(folder.path()));
        }
        File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        tally.refused("hostile size", &["model.safetensors"], &format!("{name}: a terabyte"), || load(folder.path()));
        fs::write(&path, &whole).unwrap();
        let config = fs::read(folder.path().join("config.json")).unwrap();
        for length in cuts(config.trim_ascii_end().len()) {
            fs::write(folder.path().join("config.json"), &config[..length]).unwrap();
            tally.refused("truncated", &["config.json"], &format!("{name}: {length}"), || load(folder.path()));
        }
    }
    tally.check("quantized checkpoints", &[("hostile size", 132), ("truncated", 187)]);
}

#[test]
fn adapters() {
    let mut tally = Tally::default();
    let facts: Value = serde_json::from_slice(&fs::read(fixtures().join("peft_kinds/facts.json")).unwrap()).unwrap();
    for (kind, facts) in facts.as_object().unwrap() {
        let base = fixtures().join(facts["base"].as_str().unwrap());
        let model = ModelConfig::from_json_file(base.join("config.json")).unwrap();
        let folder = copy(&fixtures().join("peft_kinds").join(kind));
        let open = || adapter::open_folder(folder.path(), &model).map(drop).map_err(|error| error.to_string());
        open().unwrap();
        let files = ["adapter_config.json", "adapter_model.safetensors"];
        for name in files {
            let path = folder.path().join(name);
            let whole = fs::read(&path).unwrap();
            for length in cuts(whole.trim_ascii_end().len()) {
                fs::write(&path, &whole[..length]).unwrap();
                tally.refused("truncated", &[name], &format!("{kind}: {length}"), open);
            }
            File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
            tally.refused("hostile size", &[name], &format!("{kind}: a terabyte"), open);
            fs::write(&path, whole).unwrap();
        }
        let [config, weights] = files.map(|name| folder.path().join(name));
        let whole = fs::read(&weights).unwrap();
        for length in header_lengths(&whole) {
            let mut damaged = whole.clone();
            damaged[..8].copy_from_slice(&length.to_le_bytes());
            fs::write(&weights, damaged).unwrap();
            tally.refused("hostile size", &[files[1]], &format!("{kind}: header {length}"), open);
        }
        fs::write(&weights, &whole).unwrap();
        let text = fs::read_to_string(&config).unwrap();
        let good: Value = serde_json::from_str(&text).unwrap();
        for (key, value) in [
            ("r", json!(u64::MAX)),
            ("r", json!(1u64 << 40)),
            ("r", json!(0)),
            ("r", json!(-1)),
            ("r", json!(1e300)),
            ("lora_alpha", json!(1e300)),
            ("lora_alpha", json!("NaN")),
            ("rank_pattern", json!({ ".*": u64::MAX })),
            ("rank_pattern", json!({ "q_proj": 1u64 << 40 })),
            ("target_modules", json!("((((((((((a{100}){100}){100}){100})))))))")),
            ("target_modules", json!("(".repeat(100_000))),
            ("layers_to_transform", json!([u64::MAX])),
            ("trainable_token_indices", json!([u64::MAX])),
            ("trainable_token_indices", json!([1u64 << 40])),
        ] {
            let mut damaged = good.clone();
            damaged[key] = value.clone();
            fs::write(&config, damaged.to_string()).unwrap();
            let what = format!("{kind}: {key} {}", &value.to_string().chars().take(40).collect::<String>());
            tally.refused("hostile size", &[files[0], files[1], key], &what, open);
        }
    }
    tally.check("adapters", &[("hostile size", 27 * 28), ("truncated", 34 * 28)]);
}
