//! Saving and loading through the file system, and broken files of every kind.

use super::load::assemble;
use super::{AdapterDtype, CARD_FILE, CONFIG_FILE, SaveOptions, WEIGHTS_FILE, config_file, load, load_into, save};
use crate::config::ModelConfig;
use crate::lora::{AdapterLayout, LoraConfig, TargetModules, init, tiny_model};
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use tempfile::TempDir;

fn model() -> ModelConfig {
    ModelConfig { hidden_size: 16, intermediate_size: 24, num_attention_heads: 4, head_dim: 4, ..tiny_model(2) }
}

/// Options, layout and numbers of an adapter with no zero in it.
fn adapter() -> (LoraConfig, AdapterLayout, Vec<f32>) {
    let config = LoraConfig { r: 2, lora_alpha: 4.0, target_modules: TargetModules::AllLinear, ..Default::default() };
    let layout = AdapterLayout::for_model(&config, &model()).unwrap();
    let flat = init(&layout, 3).iter().enumerate().map(|(i, v)| v + 0.5 + (i % 7) as f32 * 1e-3).collect();
    (config, layout, flat)
}

fn saved(options: &SaveOptions) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (config, layout, flat) = adapter();
    save(folder.path(), &config, &layout, &flat, options).unwrap();
    folder
}

fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Rewrites the tensors of a saved adapter: each may be renamed, reshaped, changed, or dropped.
fn rewrite(
    folder: &Path,
    edit: impl Fn(&str, Dtype, Vec<usize>, Vec<u8>) -> Option<(String, Dtype, Vec<usize>, Vec<u8>)>,
) {
    let path = folder.join(WEIGHTS_FILE);
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> =
        file.iter().filter_map(|(name, t)| edit(name, t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect();
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn what_is_saved_is_loaded_bit_for_bit() {
    let options = SaveOptions {
        base_model_name_or_path: Some("org/model".into()),
        revision: Some("v1".into()),
        ..Default::default()
    };
    let folder = saved(&options);
    assert_eq!(listing(folder.path()), [CARD_FILE, CONFIG_FILE, WEIGHTS_FILE]);
    let (config, layout, flat) = adapter();
    let loaded = load(folder.path(), &model()).unwrap();
    assert_eq!((&loaded.layout, &loaded.weights), (&layout, &flat));
    assert_eq!((loaded.config.lora.r, loaded.config.lora.scaling()), (2, 2.0));
    assert_eq!(loaded.config.base_model_name_or_path, options.base_model_name_or_path);
    assert_eq!(loaded.config.revision, options.revision);

    let mut resumed = vec![f32::NAN; layout.len()];
    load_into(folder.path(), &config, &layout, &mut resumed).unwrap();
    assert_eq!(resumed, flat);
}

#[test]
fn sixteen_bit_files_hold_the_rounded_numbers() {
    for (dtype, round) in [
        (AdapterDtype::F16, (|v| f16::from_f32(v).to_f32()) as fn(f32) -> f32),
        (AdapterDtype::BF16, |v| bf16::from_f32(v).to_f32()),
    ] {
        let folder = saved(&SaveOptions { dtype, ..Default::default() });
        let expected: Vec<f32> = adapter().2.into_iter().map(round).collect();
        assert_ne!(expected, adapter().2);
        assert_eq!(load(folder.path(), &model()).unwrap().weights, expected);
    }
}

#[test]
fn a_new_folder_appears_whole_and_an_old_one_keeps_its_other_files() {
    let parent = tempfile::tempdir().unwrap();
    let (config, layout, flat) = adapter();
    let dir = parent.path().join("runs/one");
    save(&dir, &config, &layout, &flat, &SaveOptions::default()).unwrap();
    assert_eq!(listing(&parent.path().join("runs")), ["one"]);

    fs::write(dir.join("mine.txt"), "kept").unwrap();
    fs::write(dir.join(CARD_FILE), "my own card").unwrap();
    let half: Vec<f32> = flat.iter().map(|v| v / 2.0).collect();
    save(&dir, &config, &layout, &half, &SaveOptions::default()).unwrap();
    assert_eq!(load(&dir, &model()).unwrap().weights, half);
    assert_eq!(listing(&dir), [CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, "mine.txt"]);
    assert_eq!(fs::read_to_string(dir.join(CARD_FILE)).unwrap(), "my own card");

    let bare = parent.path().join("bare");
    save(&bare, &config, &layout, &flat, &SaveOptions { model_card: false, ..Default::default() }).unwrap();
    assert_eq!(listing(&bare), [CONFIG_FILE, WEIGHTS_FILE]);
}

#[test]
fn a_broken_adapter_is_not_saved_and_the_old_one_stays() {
    let folder = saved(&SaveOptions::default());
    let (config, layout, mut flat) = adapter();
    let entry = layout.get("model.layers.1.mlp.up_proj").unwrap().b;
    for (value, dtype, expected) in [
        (f32::NAN, AdapterDtype::F32, "holds NaN"),
        (f32::INFINITY, AdapterDtype::BF16, "holds inf"),
        (1e6, AdapterDtype::F16, "does not fit F16"),
    ] {
        flat[entry.offset + 3] = value;
        let options = SaveOptions { dtype, ..Default::default() };
        let error = save(folder.path(), &config, &layout, &flat, &options).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("layers.1.mlp.up_proj.lora_B"), "{error}");
    }
    assert_eq!(load(folder.path(), &model()).unwrap().weights, adapter().2);
    assert_eq!(listing(folder.path()), [CARD_FILE, CONFIG_FILE, WEIGHTS_FILE]);

    // Buffers and options of another adapter.
    let flat = adapter().2;
    assert!(save(folder.path(), &config, &layout, &flat[1..], &SaveOptions::default()).is_err());
    let other = LoraConfig { target_modules: TargetModules::list(["q_proj"]), ..config.clone() };
    assert!(save(folder.path(), &other, &layout, &flat, &SaveOptions::default()).is_err());
    let other = LoraConfig { r: 4, ..config };
    assert!(save(folder.path(), &other, &layout, &flat, &SaveOptions::default()).is_err());
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let parent = tempfile::tempdir().unwrap();
    fs::write(parent.path().join("file"), "").unwrap();
    let (config, layout, flat) = adapter();
    for dir in ["file", "file/below"] {
        let error = save(parent.path().join(dir), &config, &layout, &flat, &SaveOptions::default()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("file") && error.contains("choose another output folder"), "{error}");
    }
    assert_eq!(listing(parent.path()), ["file"]);
}

#[test]
fn missing_and_unexpected_tensors_are_listed() {
    let folder = saved(&SaveOptions::default());
    let gone = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight";
    rewrite(folder.path(), |name, dtype, shape, data| {
        Some((if name == gone { "stray.weight".to_owned() } else { name.to_owned() }, dtype, shape, data))
    });
    let error = load(folder.path(), &model()).unwrap_err().to_string();
    assert!(error.contains(&format!("1 missing tensors: {gone}; 1 unexpected tensors: stray.weight")), "{error}");

    rewrite(folder.path(), |name, dtype, shape, data| Some((name.replace(".layers.", ".blocks."), dtype, shape, data)));
    let error = load(folder.path(), &model()).unwrap_err().to_string();
    assert!(
        error.contains("28 missing") && error.contains("and 20 more") && error.contains("another model"),
        "{error}"
    );
}

#[test]
fn a_wrong_shape_shows_both() {
    let folder = saved(&SaveOptions::default());
    let wider = ModelConfig { intermediate_size: 32, ..model() };
    let error = load(folder.path(), &wider).unwrap_err().to_string();
    assert!(
        error.contains("mlp.gate_proj.lora_B.weight") && error.contains("[24, 2]") && error.contains("[32, 2]"),
        "{error}"
    );
    // The same number of values in another shape.
    rewrite(folder.path(), |name, dtype, shape, data| {
        Some((name.to_owned(), dtype, shape.into_iter().rev().collect(), data))
    });
    assert!(load(folder.path(), &model()).unwrap_err().to_string().contains("[16, 2]"));
}

#[test]
fn numbers_that_are_not_finite_and_other_dtypes_are_refused() {
    let poisoned = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight";
    for dtype in [AdapterDtype::F32, AdapterDtype::F16, AdapterDtype::BF16] {
        let folder = saved(&SaveOptions { dtype, ..Default::default() });
        let width = if dtype == AdapterDtype::F32 { 4 } else { 2 };
        rewrite(folder.path(), |name, dtype, shape, mut data| {
            if name == poisoned {
                // All ones: a NaN in each of the three formats. Row 1, column 5.
                data[(24 + 5) * width..(24 + 6) * width].fill(0xff);
            }
            Some((name.to_owned(), dtype, shape, data))
        });
        let (config, layout, flat) = adapter();
        let error = load(folder.path(), &model()).unwrap_err().to_string();
        assert!(error.contains(poisoned) && error.contains("NaN at row 1, column 5"), "{error}");
        let mut buffer = flat.clone();
        assert!(load_into(folder.path(), &config, &layout, &mut buffer).is_err());
        assert_eq!(buffer, flat, "a failed load must not change the buffer");
    }
    let folder = saved(&SaveOptions::default());
    rewrite(folder.path(), |name, _, shape, data| Some((name.to_owned(), Dtype::I32, shape, data)));
    assert!(load(folder.path(), &model()).unwrap_err().to_string().contains("dtype I32"));
}

#[test]
fn resuming_needs_the_same_rank_scaling_and_layers() {
    let folder = saved(&SaveOptions::default());
    let (config, layout, flat) = adapter();
    let mut buffer = flat.clone();
    for other in [LoraConfig { lora_alpha: 8.0, ..config.clone() }, LoraConfig { use_rslora: true, ..config.clone() }] {
        let error = load_into(folder.path(), &other, &layout, &mut buffer).unwrap_err().to_string();
        assert!(error.contains("the adapter has r = 2, lora_alpha = 4"), "{error}");
    }
    let fewer = LoraConfig { target_modules: TargetModules::list(["q_proj"]), ..config };
    let layout = AdapterLayout::for_model(&fewer, &model()).unwrap();
    let mut buffer = vec![0.0; layout.len()];
    let error = load_into(folder.path(), &fewer, &layout, &mut buffer).unwrap_err().to_string();
    assert!(error.contains("24 unexpected"), "{error}");
}

#[test]
fn targets_that_match_nothing_are_dropped_from_a_published_adapter() {
    let folder = saved(&SaveOptions::default());
    let path = folder.path().join(CONFIG_FILE);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"q_proj\",", "\"q_proj\", \"query_key_value\",")).unwrap();
    let loaded = load(folder.path(), &model()).unwrap();
    assert_eq!(loaded.layout, adapter().1);
    assert_eq!(AdapterLayout::for_model(&loaded.config.lora, &model()).unwrap(), loaded.layout);
    // None that matches is an error, and so is one that no adapter can be put on.
    fs::write(&path, text.replace("_proj\"", "_layer\"")).unwrap();
    let error = load(folder.path(), &model()).unwrap_err().to_string();
    assert!(error.contains("matches no module") && error.contains(CONFIG_FILE), "{error}");
    fs::write(&path, text.replace("\"q_proj\",", "\"q_proj\", \"lm_head\",")).unwrap();
    let error = load(folder.path(), &model()).unwrap_err().to_string();
    assert!(error.contains("lm_head") && error.contains(CONFIG_FILE), "{error}");
}

#[test]
fn missing_files_say_what_belongs_there() {
    let folder = tempfile::tempdir().unwrap();
    let error = load(folder.path(), &model()).unwrap_err().to_string();
    assert!(error.contains("adapter_config.json") && error.contains("not found"), "{error}");
    let folder = saved(&SaveOptions::default());
    fs::rename(folder.path().join(WEIGHTS_FILE), folder.path().join("adapter_model.bin")).unwrap();
    let error = load(folder.path(), &model()).unwrap_err().to_string();
    assert!(error.contains("adapter_model.bin") && error.contains("not a file of torch.save"), "{error}");
}

/// One change to a file's bytes.
#[derive(Clone, Debug)]
enum Damage {
    Truncate(prop::sample::Index),
    Set(prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
    Append(Vec<u8>),
    HeaderLength(u64),
}

fn damage() -> impl Strategy<Value = Damage> {
    // Bytes that are JSON syntax, and digits, so that changes of the header stay parseable more often.
    let byte = prop_oneof![any::<u8>(), prop::sample::select(b"0123456789[]{},:\"-.eE \0".to_vec())];
    let bytes = prop::collection::vec(byte.clone(), 1..9);
    prop_oneof![
        any::<prop::sample::Index>().prop_map(Damage::Truncate),
        (any::<prop::sample::Index>(), byte).prop_map(|(at, byte)| Damage::Set(at, byte)),
        (any::<prop::sample::Index>(), bytes.clone()).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        (any::<prop::sample::Index>(), 1..16usize).prop_map(|(at, n)| Damage::Remove(at, n)),
        bytes.prop_map(Damage::Append),
        prop_oneof![any::<u64>(), 0..8192u64, Just(u64::MAX), Just(u64::MAX - 8)].prop_map(Damage::HeaderLength),
    ]
}

fn apply(damage: &Damage, bytes: &mut Vec<u8>, within: usize) {
    let within = within.min(bytes.len());
    match damage {
        Damage::Truncate(at) => bytes.truncate(at.index(bytes.len().max(1))),
        Damage::Set(at, byte) if within > 0 => bytes[at.index(within)] = *byte,
        Damage::Insert(at, new) => {
            let at = at.index(within + 1);
            bytes.splice(at..at, new.iter().copied());
        }
        Damage::Remove(at, n) if within > 0 => {
            let at = at.index(within);
            bytes.drain(at..(at + n).min(bytes.len()));
        }
        Damage::Append(new) => bytes.extend(new),
        Damage::HeaderLength(n) if bytes.len() >= 8 => bytes[..8].copy_from_slice(&n.to_le_bytes()),
        _ => {}
    }
}

/// Whatever a load of damaged files returns, it is an error with a message, or an adapter without a bad number.
fn check_outcome(config: &[u8], weights: &[u8]) {
    let dir = Path::new("adapter");
    match config_file::parse(dir, config).and_then(|config| assemble(dir, config, weights, &model())) {
        Ok(adapter) => assert!(adapter.weights.iter().all(|value| value.is_finite())),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The undamaged files.
fn files() -> &'static [Vec<u8>; 2] {
    static FILES: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
    FILES.get_or_init(|| {
        let folder = saved(&SaveOptions::default());
        [CONFIG_FILE, WEIGHTS_FILE].map(|name| fs::read(folder.path().join(name)).unwrap())
    })
}

/// 4,000 damaged files each by default; `PROPTEST_CASES` sets another number.
fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(4000);
    ProptestConfig { cases, failure_persistence: None, ..Default::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn damaged_tensor_files_never_panic(changes in prop::collection::vec(damage(), 1..4), in_header in any::<bool>()) {
        let [config, weights] = files();
        let mut damaged = weights.clone();
        let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
        for change in &changes {
            apply(change, &mut damaged, if in_header { header } else { usize::MAX });
        }
        check_outcome(config, &damaged);
    }

    #[test]
    fn damaged_configurations_never_panic(changes in prop::collection::vec(damage(), 1..4)) {
        let [config, weights] = files();
        let mut damaged = config.clone();
        for change in &changes {
            apply(change, &mut damaged, usize::MAX);
        }
        check_outcome(&damaged, weights);
    }
}
