//! The quantization of an adapter's base model during training: merging goes into the weights that remain after it.
//!
//! [`save`](super::save) writes it beside the adapter (`base_quantization.json`); PEFT and others ignore the file. Of adapters that
//! other programs trained, PEFT's model card says it (`README.md`, "the following `bitsandbytes` quantization config was used"),
//! or the name of a base that is stored in 4 bits (`...-bnb-4bit`).

use std::path::Path;

use qlora_kernels::quant::{Absmax, QuantConfig, QuantType};
use serde_json::{Map, Value, json};

use super::load::read_any_config;
use super::{CARD_FILE, TRAINED_OVER_FILE};
use crate::config::StoredQuantization;
use crate::file::{self, SMALL};
use crate::model::Quantization;
use crate::source::{SourceWeight, WeightSource};
use crate::spec::Module;
use crate::{Error, Result};

/// The storage of the base model's linear layers during an adapter's training.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum TrainedOver {
    /// 16 or 32 bits: LoRA.
    Plain,
    /// NF4 or FP4: QLoRA.
    Bits4 {
        /// The quantization.
        config: QuantConfig,
        /// The base is stored so, and was not quantized while loading.
        stored: bool,
    },
    /// Something else, by its name: `GPTQ 4-bit`.
    Other(String),
}

impl TrainedOver {
    /// The storage of the linear layers of a base that is loaded from these files with this quantization.
    ///
    /// # Errors
    /// If a layer that is stored in 4 bits cannot be read.
    pub fn of(source: &dyn WeightSource, quantization: Quantization) -> Result<Self> {
        match (source.quantization(), quantization) {
            (Some(StoredQuantization::Bnb4bit), _) => {
                let spec = source.config().spec();
                let names = spec.linear().map(Module::weight_name);
                let packed = names.into_iter().find(|name| source.is_packed(name));
                let config = match packed.map(|name| source.read_weight(&name)).transpose()? {
                    Some(SourceWeight::FourBit(weight)) => QuantConfig {
                        quant_type: weight.quant_type(),
                        blocksize: weight.blocksize(),
                        double_quant: matches!(weight.absmax(), Absmax::Nested(_)),
                    },
                    _ => QuantConfig::default(),
                };
                Ok(Self::Bits4 { config, stored: true })
            }
            (Some(other), _) => Ok(Self::Other(other.to_string())),
            (None, Quantization::None) => Ok(Self::Plain),
            (None, Quantization::Bits4(config)) => Ok(Self::Bits4 { config, stored: false }),
            (None, Quantization::Int8) => Ok(Self::Other("LLM.int8".to_owned())),
            (None, Quantization::Int(config)) => Ok(Self::Other(format!("{}-bit integers", config.bits.bits()))),
        }
    }

    /// Reads the base's quantization from an adapter folder; none if nothing there records it.
    ///
    /// # Errors
    /// If `base_quantization.json` is damaged.
    pub fn read(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let dir = dir.as_ref();
        let path = dir.join(TRAINED_OVER_FILE);
        if path.exists() {
            return parse(&path, &file::read_object(&path, SMALL)?).map(Some);
        }
        if let Ok(card) = file::read_text(&dir.join(CARD_FILE), SMALL)
            && let Some(found) = from_card(&card)
        {
            return Ok(Some(found));
        }
        let base = read_any_config(dir).ok().and_then(|(config, _)| config.base_model_name_or_path);
        let stored = base.is_some_and(|base| base.to_ascii_lowercase().contains("bnb-4bit"));
        Ok(stored.then(|| Self::Bits4 { config: QuantConfig::default(), stored: true }))
    }

    /// The text of `base_quantization.json`, with the names of bitsandbytes' configuration.
    pub(super) fn to_json(&self) -> String {
        let value = match self {
            Self::Plain => json!({ "quant_method": null }),
            Self::Bits4 { config, stored } => json!({
                "quant_method": "bitsandbytes",
                "load_in_4bit": true,
                "bnb_4bit_quant_type": config.quant_type.name(),
                "bnb_4bit_use_double_quant": config.double_quant,
                "blocksize": config.blocksize,
                "stored_quantized": stored,
            }),
            Self::Other(name) => json!({ "quant_method": name }),
        };
        format!("{value:#}\n")
    }
}

impl std::fmt::Display for TrainedOver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plain => f.write_str("unquantized weights"),
            Self::Bits4 { config, stored } => {
                let double = if config.double_quant { ", double quantization" } else { "" };
                let stored = if *stored { ", as they are stored" } else { "" };
                write!(f, "weights in {} (blocks of {}{double}{stored})", config.quant_type, config.blocksize)
            }
            Self::Other(name) => write!(f, "weights in {name}"),
        }
    }
}

fn parse(path: &Path, map: &Map<String, Value>) -> Result<TrainedOver> {
    let wrong = |key: &str, expected: &str| {
        let got = map.get(key).map_or("missing".to_owned(), file::shown);
        Error::format(path, format!("{key} is {got}; expected {expected}"))
    };
    match map.get("quant_method") {
        Some(Value::Null) => return Ok(TrainedOver::Plain),
        Some(Value::String(method)) if method == "bitsandbytes" => {}
        Some(Value::String(method)) => return Ok(TrainedOver::Other(method.clone())),
        _ => return Err(wrong("quant_method", "null or the name of a method")),
    }
    let quant_type =
        map.get("bnb_4bit_quant_type").and_then(Value::as_str).and_then(|name| name.parse::<QuantType>().ok());
    let blocksize = map.get("blocksize").and_then(Value::as_u64).and_then(|size| usize::try_from(size).ok());
    let flag = |key: &str| map.get(key).and_then(Value::as_bool).ok_or_else(|| wrong(key, "true or false"));
    let config = QuantConfig {
        quant_type: quant_type.ok_or_else(|| wrong("bnb_4bit_quant_type", "\"nf4\" or \"fp4\""))?,
        blocksize: blocksize
            .filter(|size| qlora_kernels::quant::BLOCKSIZES.contains(size))
            .ok_or_else(|| wrong("blocksize", "a power of two from 32 to 4096"))?,
        double_quant: flag("bnb_4bit_use_double_quant")?,
    };
    Ok(TrainedOver::Bits4 { config, stored: flag("stored_quantized")? })
}

/// Parses the quantization that a model card gives in PEFT's lines (`- bnb_4bit_quant_type: nf4`) or in the options of
/// a training program that it quotes (`load_in_4bit: true`).
fn from_card(card: &str) -> Option<TrainedOver> {
    let value = |keys: &[&str]| {
        let lines = card.lines().filter_map(|line| line.trim_start_matches([' ', '\t', '-', '*']).split_once(':'));
        let found = lines.filter(|(key, _)| keys.contains(&key.trim_matches(['`', '"', ' '])));
        found.map(|(_, value)| value.trim().trim_matches(['"', '`', '\'']).to_ascii_lowercase()).next_back()
    };
    let flag = |keys: &[&str]| match value(keys)?.as_str() {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    };
    let four = flag(&["load_in_4bit", "_load_in_4bit"]);
    match (four, flag(&["load_in_8bit", "_load_in_8bit"])) {
        (Some(true), _) => {
            let defaults = QuantConfig::default();
            let config = QuantConfig {
                quant_type: value(&["bnb_4bit_quant_type"])
                    .and_then(|name| name.parse().ok())
                    .unwrap_or(defaults.quant_type),
                double_quant: flag(&["bnb_4bit_use_double_quant"]).unwrap_or(defaults.double_quant),
                ..defaults
            };
            Some(TrainedOver::Bits4 { config, stored: false })
        }
        (_, Some(true)) => Some(TrainedOver::Other("LLM.int8".to_owned())),
        (Some(false), _) => Some(TrainedOver::Plain),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(TrainedOver::read(folder.path()).unwrap(), None);
        let path = folder.path().join(TRAINED_OVER_FILE);
        let config = QuantConfig { quant_type: QuantType::Fp4, blocksize: 128, double_quant: false };
        for over in [
            TrainedOver::Plain,
            TrainedOver::Bits4 { config, stored: false },
            TrainedOver::Bits4 { config: QuantConfig::default(), stored: true },
            TrainedOver::Other("GPTQ 4-bit".to_owned()),
        ] {
            std::fs::write(&path, over.to_json()).unwrap();
            assert_eq!(TrainedOver::read(folder.path()).unwrap().as_ref(), Some(&over), "{over}");
        }
        for (text, message) in [
            ("{}", "quant_method is missing"),
            (r#"{"quant_method": "bitsandbytes"}"#, "bnb_4bit_quant_type is missing"),
            (r#"{"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "blocksize": 3}"#, "blocksize is 3"),
            ("[", "base_quantization.json"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = TrainedOver::read(folder.path()).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn model_cards_of_others_are_read() {
        let peft = "---\nbase_model: a/b\n---\n## Training procedure\n\nThe following `bitsandbytes` quantization config was used during \
                    training:\n- quant_method: bitsandbytes\n- _load_in_8bit: False\n- _load_in_4bit: True\n- bnb_4bit_quant_type: fp4\n- \
                    bnb_4bit_use_double_quant: False\n- load_in_4bit: True\n- load_in_8bit: False\n";
        let config = QuantConfig { quant_type: QuantType::Fp4, double_quant: false, ..QuantConfig::default() };
        assert_eq!(from_card(peft), Some(TrainedOver::Bits4 { config, stored: false }));
        let axolotl = "```yaml\nadapter: qlora\nload_in_8bit: false\nload_in_4bit: true\n```";
        assert_eq!(from_card(axolotl), Some(TrainedOver::Bits4 { config: QuantConfig::default(), stored: false }));
        let lora = axolotl.replace("4bit: true", "4bit: false");
        assert_eq!(from_card(&lora), Some(TrainedOver::Plain));
        let eight = lora.replace("8bit: false", "8bit: true");
        assert_eq!(from_card(&eight), Some(TrainedOver::Other("LLM.int8".to_owned())));
        assert_eq!(from_card("# A model\nIt can be used with load_in_4bit=True: see below."), None);
    }

    #[test]
    fn the_name_of_a_stored_base_says_it() {
        let folder = tempfile::tempdir().unwrap();
        let config = |base: &str| {
            let text = format!(
                r#"{{"peft_type": "LORA", "target_modules": ["q_proj"], "use_dora": true, "base_model_name_or_path": "{base}"}}"#
            );
            std::fs::write(folder.path().join(super::super::CONFIG_FILE), text).unwrap();
            TrainedOver::read(folder.path()).unwrap()
        };
        let stored = Some(TrainedOver::Bits4 { config: QuantConfig::default(), stored: true });
        assert_eq!(config("unsloth/llama-3-8b-unsloth-bnb-4bit"), stored);
        assert_eq!(config("meta-llama/Llama-3.1-8B"), None);
    }
}
