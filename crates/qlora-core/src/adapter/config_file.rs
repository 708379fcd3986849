//! `adapter_config.json`: PEFT's options, to and from [`LoraConfig`].
//!
//! Written: the keys that PEFT has had for years, sorted, indented by two, without a line break at the end, ASCII only,
//! as Python's `json.dumps(indent=2, sort_keys=True)` does; newer keys only where they are needed, as older readers
//! warn about keys they don't know. Read: every key of PEFT 0.21.2. One that changes what the adapter computes and is
//! not supported is an error that names it; an unknown one is a warning.

use super::kinds::AdapterKinds;
use super::save::SaveOptions;
use crate::lora::{AdapterLayout, ByModule, Layers, LoraConfig, MAX_RANK, ModuleFilter, TargetModules};
use crate::{Error, Result, file};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// The contents of an `adapter_config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// The adapter's options.
    pub lora: LoraConfig,
    /// The hub id or the path of the model that the adapter belongs to.
    pub base_model_name_or_path: Option<String>,
    /// The base model's revision.
    pub revision: Option<String>,
}

/// Options that change what an adapter computes and are not supported. All of them are off when absent, null, false or
/// empty.
const UNSUPPORTED: [&str; 10] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Options that inference supports ([`AdapterKinds`]) and training does not.
const INFERENCE_ONLY: [&str; 2] = ["fan_in_fan_out", "lora_bias"];

/// Options that do not change what a trained adapter computes, or that are read elsewhere in this file. The
/// configurations of initializations belong here: the initialization itself is checked.
const HARMLESS: [&str; 29] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
];

/// The file's text.
pub(super) fn to_json(config: &LoraConfig, layout: &AdapterLayout, options: &SaveOptions) -> Result<String> {
    let lora = |error: serde_json::Error| Error::Invalid(format!("adapter options: {error}"));
    let Value::Object(own) = serde_json::to_value(config).map_err(lora)? else {
        return Err(Error::Invalid("adapter options are no JSON object".to_owned()));
    };
    let mut keys: BTreeMap<String, Value> = own.into_iter().collect();
    if config.target_modules == TargetModules::AllLinear {
        // Some readers take only names here.
        keys.insert("target_modules".to_owned(), json!(last_names(layout)));
    }
    keys.entry("task_type".to_owned()).or_insert(Value::Null);
    layers_to_json(config, &mut keys);
    let fixed = json!({
        "auto_mapping": null,
        "base_model_name_or_path": options.base_model_name_or_path,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "modules_to_save": if config.modules_to_save.is_empty() { Value::Null } else { json!(config.modules_to_save) },
        "peft_type": "LORA",
        "revision": options.revision,
    });
    if let Value::Object(fixed) = fixed {
        keys.extend(fixed);
    }
    Ok(escape_non_ascii(&serde_json::to_string_pretty(&keys).map_err(lora)?))
}

/// The keys of options that differ from module to module, which are there in any case.
pub(super) fn layers_to_json(config: &LoraConfig, keys: &mut BTreeMap<String, Value>) {
    for key in ["rank_pattern", "alpha_pattern"] {
        keys.entry(key.to_owned()).or_insert_with(|| json!({}));
    }
    let numbers = config.layers.as_ref().map(|layers| &layers.numbers);
    let before: Vec<&str> = config.layers.iter().flat_map(Layers::patterns).collect();
    keys.insert("layers_to_transform".to_owned(), json!(numbers));
    keys.insert("layers_pattern".to_owned(), if before.is_empty() { Value::Null } else { json!(before) });
}

/// The last parts of the modules' names, each once, in the order in which a block has them.
pub(super) fn last_names(layout: &AdapterLayout) -> Vec<&str> {
    let mut names = Vec::new();
    for module in layout.modules() {
        let name = module.rsplit('.').next().unwrap_or(module);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

pub(super) fn escape_non_ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() && c != '\x7f' {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a string cannot fail.
                let _ = write!(text, "\\u{unit:04x}");
            }
        }
    }
    text
}

/// Reads the file's text for training, which takes LoRA and DoRA on linear layers of the blocks, rows of tokens and whole tables;
/// `path` is for messages.
pub(super) fn parse(path: &Path, text: &[u8]) -> Result<AdapterConfig> {
    let keys = keys(path, text)?;
    const WHY: &str = "in training; for inference, qlora::adapter::open and CausalLm::load_adapter take it";
    for key in INFERENCE_ONLY {
        if let Some(value) = keys.get(key).filter(|value| !is_off(value)) {
            return Err(unsupported(path, key, value, WHY));
        }
    }
    common(path, &keys)
}

/// Reads the file's text for inference.
pub(super) fn parse_any(path: &Path, text: &[u8]) -> Result<(AdapterConfig, AdapterKinds)> {
    let keys = keys(path, text)?;
    let (config, kinds) = (common(path, &keys)?, AdapterKinds::parse(path, &keys)?);
    if kinds.lora_bias && config.lora.use_dora {
        return Err(Error::format(path, "lora_bias and use_dora together"));
    }
    Ok((config, kinds))
}

/// The options, after the checks that all readers make.
fn keys(path: &Path, text: &[u8]) -> Result<Map<String, Value>> {
    let keys: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|error| Error::format(path, format!("no valid adapter configuration: {error}")))?;
    match keys.get("peft_type") {
        Some(Value::String(kind)) if kind == "LORA" => {}
        Some(kind) => return Err(unsupported(path, "peft_type", kind, "only \"LORA\" is")),
        None => return Err(Error::format(path, "no \"peft_type\": this is no adapter configuration of PEFT")),
    }
    for key in UNSUPPORTED {
        if let Some(value) = keys.get(key).filter(|value| !is_off(value)) {
            return Err(unsupported(path, key, value, "the adapter would compute something else without it"));
        }
    }
    for (key, value) in &keys {
        let known = [&HARMLESS[..], &UNSUPPORTED, &INFERENCE_ONLY].concat().contains(&key.as_str());
        if !known && !is_off(value) {
            tracing::warn!("{}: unknown option {key} = {} is ignored", path.display(), file::shown(value));
        }
    }
    Ok(keys)
}

/// The options that training has too.
fn common(path: &Path, keys: &Map<String, Value>) -> Result<AdapterConfig> {
    check_initialization(path, keys.get("init_lora_weights"))?;

    let defaults = LoraConfig::default();
    let targets: Option<TargetModules> = read(path, keys, "target_modules")?;
    let lora = LoraConfig {
        r: read(path, keys, "r")?.unwrap_or(8),
        lora_alpha: read(path, keys, "lora_alpha")?.unwrap_or(8.0),
        lora_dropout: read(path, keys, "lora_dropout")?.unwrap_or(0.0),
        use_rslora: read(path, keys, "use_rslora")?.unwrap_or(false),
        use_dora: read(path, keys, "use_dora")?.unwrap_or(false),
        rank_pattern: by_module(path, keys, "rank_pattern")?,
        alpha_pattern: by_module(path, keys, "alpha_pattern")?,
        layers: layers(path, keys)?,
        target_modules: targets.ok_or_else(|| Error::format(path, "target_modules is missing"))?,
        exclude_modules: read(path, keys, "exclude_modules")?
            .filter(|filter| !matches!(filter, ModuleFilter::List(entries) if entries.is_empty())),
        trainable_token_indices: read(path, keys, "trainable_token_indices")?.unwrap_or_default(),
        modules_to_save: read(path, keys, "modules_to_save")?.unwrap_or_default(),
        ensure_weight_tying: read(path, keys, "ensure_weight_tying")?.unwrap_or(false),
        bias: read(path, keys, "bias")?.unwrap_or_default(),
        init_lora_weights: defaults.init_lora_weights,
        task_type: read(path, keys, "task_type")?,
    };
    lora.validate().map_err(|error| Error::format(path, error.to_string()))?;
    if lora.r > MAX_RANK {
        return Err(Error::format(path, format!("r is {}: no adapter has more than {MAX_RANK}", lora.r)));
    }
    Ok(AdapterConfig {
        lora,
        base_model_name_or_path: read(path, keys, "base_model_name_or_path")?,
        revision: read(path, keys, "revision")?,
    })
}

/// The keys' values by module.
fn by_module<T: DeserializeOwned>(path: &Path, keys: &Map<String, Value>, key: &str) -> Result<ByModule<T>> {
    let map: BTreeMap<String, T> = read(path, keys, key)?.unwrap_or_default();
    ByModule::new(map).map_err(|error| in_file(path, error))
}

/// `layers_to_transform`, one number or several, and `layers_pattern`, one expression or several.
fn layers(path: &Path, keys: &Map<String, Value>) -> Result<Option<Layers>> {
    let numbers = match keys.get("layers_to_transform") {
        Some(Value::Number(_)) => read(path, keys, "layers_to_transform")?.map(|layer| vec![layer]),
        _ => read::<Vec<usize>>(path, keys, "layers_to_transform")?.filter(|layers| !layers.is_empty()),
    };
    let patterns: Vec<String> = match keys.get("layers_pattern") {
        Some(Value::String(one)) => Some(vec![one.clone()]).filter(|_| !one.is_empty()),
        _ => read(path, keys, "layers_pattern")?,
    }
    .unwrap_or_default();
    match numbers {
        Some(numbers) => Layers::new(numbers, patterns).map(Some).map_err(|error| in_file(path, error)),
        None if patterns.is_empty() => Ok(None),
        None => Err(Error::format(path, "layers_pattern without layers_to_transform")),
    }
}

fn in_file(path: &Path, error: Error) -> Error {
    match error {
        Error::Unsupported(message) => Error::Unsupported(format!("{}: {message}", path.display())),
        other => Error::format(path, other.to_string()),
    }
}

/// Initializations that only choose the adapter's start values say nothing about a trained one. The others also change
/// the base's weights, so that the adapter does not belong to the base as it is published.
fn check_initialization(path: &Path, value: Option<&Value>) -> Result<()> {
    match value {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(Value::String(name))
            if matches!(name.to_lowercase().as_str(), "gaussian" | "orthogonal" | "eva" | "mica") =>
        {
            Ok(())
        }
        Some(value) => Err(unsupported(
            path,
            "init_lora_weights",
            value,
            "such an adapter belongs to changed base weights; convert it with PEFT's save_pretrained(..., \
             path_initial_model_for_weight_conversion=...)",
        )),
    }
}

fn unsupported(path: &Path, key: &str, value: &Value, why: &str) -> Error {
    let value = file::shown(value);
    Error::Unsupported(format!("{}: {key} = {value} is not supported: {why}", path.display()))
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Number(_) => false,
    }
}

pub(super) fn read<T: DeserializeOwned>(path: &Path, keys: &Map<String, Value>, key: &str) -> Result<Option<T>> {
    match keys.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value.clone())
            .map(Some)
            .map_err(|error| Error::format(path, format!("{key} = {}: {error}", file::shown(value)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::LinearModule;

    fn layout() -> AdapterLayout {
        let modules =
            ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"];
        let modules: Vec<_> = modules
            .iter()
            .map(|name| LinearModule { name: name.to_string(), out_features: 2, in_features: 3 })
            .collect();
        AdapterLayout::new(&modules, 1)
    }

    #[test]
    fn the_text_is_what_python_would_write() {
        let config = LoraConfig {
            r: 4,
            lora_alpha: 16.0,
            lora_dropout: 0.05,
            target_modules: TargetModules::AllLinear,
            ..Default::default()
        };
        let options =
            SaveOptions { base_model_name_or_path: Some("org/h\u{e9}\u{1f600}".into()), ..Default::default() };
        let expected = r#"{
  "alpha_pattern": {},
  "auto_mapping": null,
  "base_model_name_or_path": "org/h\u00e9\ud83d\ude00",
  "bias": "none",
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "layers_pattern": null,
  "layers_to_transform": null,
  "lora_alpha": 16,
  "lora_dropout": 0.05,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 4,
  "rank_pattern": {},
  "revision": null,
  "target_modules": [
    "q_proj",
    "up_proj"
  ],
  "task_type": "CAUSAL_LM",
  "use_dora": false,
  "use_rslora": false
}"#;
        assert_eq!(to_json(&config, &layout(), &options).unwrap(), expected);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let config = LoraConfig {
            r: 64,
            lora_alpha: 11.5,
            lora_dropout: 0.1,
            use_rslora: true,
            target_modules: TargetModules::parse(r".*\.(q|v)_proj").unwrap(),
            exclude_modules: Some(ModuleFilter::List(vec!["0.self_attn.q_proj".into()])),
            task_type: None,
            ..Default::default()
        };
        let options = SaveOptions {
            base_model_name_or_path: Some("a/b".into()),
            revision: Some("main".into()),
            ..Default::default()
        };
        let read = parse(Path::new("x"), to_json(&config, &layout(), &options).unwrap().as_bytes()).unwrap();
        assert_eq!(read.lora, config);
        assert_eq!((read.base_model_name_or_path.as_deref(), read.revision.as_deref()), (Some("a/b"), Some("main")));
    }

    fn parse_with(key: &str, value: Value) -> Result<AdapterConfig> {
        let mut keys = json!({"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4});
        keys[key] = value;
        parse(Path::new("dir/adapter_config.json"), keys.to_string().as_bytes())
    }

    #[test]
    fn options_that_would_change_the_result_are_refused_by_name() {
        for key in UNSUPPORTED.into_iter().chain(INFERENCE_ONLY) {
            for off in [json!(null), json!(false), json!([]), json!({})] {
                parse_with(key, off).unwrap();
            }
            let error = parse_with(key, json!({"a": 1})).unwrap_err();
            assert!(matches!(&error, Error::Unsupported(text) if text.contains(key)), "{error}");
        }
        for (key, value) in [
            ("lora_bias", json!(true)),
            ("init_lora_weights", json!("pissa_niter_16")),
            ("init_lora_weights", json!("loftq")),
            ("peft_type", json!("IA3")),
        ] {
            let error = parse_with(key, value).unwrap_err();
            assert!(
                matches!(&error, Error::Unsupported(text) if text.contains(key) && text.contains("dir/adapter_config.json")),
                "{error}"
            );
        }
        for value in [json!(false), json!("gaussian"), json!("eva"), json!(null)] {
            parse_with("init_lora_weights", value).unwrap();
        }
        parse_with("an_option_of_the_future", json!(3)).unwrap();
    }

    #[test]
    fn wrong_types_and_values_name_the_key_and_the_file() {
        for (key, value, expected) in [
            ("r", json!("four"), "r = \"four\""),
            ("r", json!(0), "r is 0"),
            ("r", json!(1.5), "r = 1.5"),
            ("lora_alpha", json!(-1), "lora_alpha is -1"),
            ("lora_dropout", json!(2), "lora_dropout is 2"),
            ("target_modules", json!([3]), "target_modules = [3]"),
            ("target_modules", json!(null), "target_modules is missing"),
            ("target_modules", json!([]), "target_modules is empty"),
            ("base_model_name_or_path", json!(7), "base_model_name_or_path = 7"),
        ] {
            let error = parse_with(key, value).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("dir/adapter_config.json"), "{error}");
        }
        for text in ["", "[]", "{\"r\": 4}", "{\"peft_type\": \"LORA\"", "nonsense"] {
            assert!(parse(Path::new("x"), text.as_bytes()).is_err(), "{text}");
        }
    }
}
