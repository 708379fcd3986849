//! The options of `adapter_config.json` that make an adapter more than A and B of one rank on linear layers of the blocks,
//! and the modules they select in a model. Rules: PEFT 0.21.2.
//!
//! | option | effect |
//! |---|---|
//! | `rank_pattern`, `alpha_pattern` | another rank or `lora_alpha` for modules whose name ends in a match |
//! | `layers_to_transform`, `layers_pattern` | of a list of targets only those in the blocks of these numbers |
//! | `lora_bias` | a bias on B, scaled as B is |
//! | `use_dora` | a magnitude for every output feature |
//! | `modules_to_save` | whole modules in place of the base's, which then have no A and B |
//! | `trainable_token_indices` | rows of the embedding (and of the head that is tied to it) in place of the base's |
//! | `ensure_weight_tying` | what is done to the embedding is done to the tied head |
//! | `bias` | biases in place of the base's |

use std::path::Path;

use serde_json::{Map, Value};

pub(crate) mod dora;
pub(crate) mod tables;

use super::config_file::{AdapterConfig, read};
use crate::config::ModelConfig;
use crate::lora::{LinearModule, TargetModules};
use crate::spec::Module;
use crate::{Error, Result};

pub(crate) use crate::spec::{EMBEDDING, HEAD};

/// The options that only inference takes; those that training takes too are in [`LoraConfig`](crate::lora::LoraConfig).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterKinds {
    /// Whether B has a bias.
    pub lora_bias: bool,
    /// The ends of the names of modules that the adapter holds whole.
    pub modules_to_save: Vec<String>,
    /// Modules, by the end of their names, and the tokens whose rows the adapter holds.
    pub trainable_token_indices: Vec<(String, Vec<u32>)>,
    /// Whether a tied head follows the embedding.
    pub ensure_weight_tying: bool,
    /// The biases that the adapter holds.
    pub bias: TrainedBias,
}

/// The subset of the base's biases that an adapter holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrainedBias {
    /// None.
    #[default]
    None,
    /// All.
    All,
    /// Those of the modules with A and B.
    LoraOnly,
}

impl AdapterKinds {
    pub(super) fn parse(path: &Path, keys: &Map<String, Value>) -> Result<Self> {
        let flag = |key: &str| -> Result<bool> { Ok(read(path, keys, key)?.unwrap_or(false)) };
        if flag("fan_in_fan_out")? {
            // As in PEFT: it is about GPT-2's Conv1D; on other layers it has no effect.
            tracing::warn!("{}: fan_in_fan_out has no effect on this model's layers", path.display());
        }
        let bias = match read::<String>(path, keys, "bias")?.as_deref() {
            None | Some("none") => TrainedBias::None,
            Some("all") => TrainedBias::All,
            Some("lora_only") => TrainedBias::LoraOnly,
            Some(other) => {
                return Err(Error::Unsupported(format!("{}: bias = {other:?}", path.display())));
            }
        };
        let tokens = match keys.get("trainable_token_indices") {
            Some(Value::Object(_)) => read::<std::collections::BTreeMap<String, Vec<u32>>>(path, keys, TOKENS)?
                .map(|map| map.into_iter().collect()),
            _ => read::<Vec<u32>>(path, keys, TOKENS)?.map(|ids| vec![("embed_tokens".to_owned(), ids)]),
        };
        let kinds = Self {
            lora_bias: flag("lora_bias")?,
            modules_to_save: read(path, keys, "modules_to_save")?.unwrap_or_default(),
            trainable_token_indices: tokens.unwrap_or_default(),
            ensure_weight_tying: flag("ensure_weight_tying")?,
            bias,
        };
        if kinds.modules_to_save.iter().any(String::is_empty) {
            return Err(Error::format(path, "modules_to_save has an empty entry"));
        }
        Ok(kinds)
    }

    /// Whether the adapter holds the module of this name whole, or a part of the model that contains it.
    pub fn saves(&self, module: &str) -> bool {
        let mut end = module.len();
        loop {
            if self.modules_to_save.iter().any(|entry| module[..end].ends_with(entry.as_str())) {
                return true;
            }
            match module[..end].rfind('.') {
                Some(dot) => end = dot,
                None => return false,
            }
        }
    }

    /// Whether the module of this name gets A and B.
    pub fn targets(&self, config: &AdapterConfig, module: &str) -> bool {
        config.lora.targets(module) && !self.excluded_as_saved(module)
    }

    /// PEFT's rule against A and B on saved modules: an entry is a whole part of the name.
    fn excluded_as_saved(&self, module: &str) -> bool {
        self.modules_to_save.iter().any(|entry| {
            module.match_indices(entry.as_str()).any(|(start, _)| {
                let (before, after) = (&module[..start], &module[start + entry.len()..]);
                (before.is_empty() || before.ends_with('.')) && (after.is_empty() || after.starts_with('.'))
            })
        })
    }

    /// Every module that gets A and B, in the model's order: linear layers, then the head, then the embedding.
    pub fn resolve(&self, config: &AdapterConfig, model: &ModelConfig) -> Vec<LinearModule> {
        let spec = model.spec();
        let mut modules: Vec<LinearModule> = spec.linear().map(LinearModule::from).collect();
        if config.lora.target_modules != TargetModules::AllLinear {
            modules.push(LinearModule::from(&spec.head));
            // LoRA on the embedding reads one-hot rows: its input features are the tokens.
            let Module { name, .. } = &spec.embedding;
            let (vocab, hidden) = (spec.embedding.rows(), spec.embedding.cols());
            modules.push(LinearModule { name: name.clone(), out_features: hidden, in_features: vocab });
        }
        modules.retain(|module| self.targets(config, &module.name));
        modules
    }
}

const TOKENS: &str = "trainable_token_indices";

#[cfg(test)]
mod tests {
    use super::super::config_file::parse_any;
    use super::*;
    use serde_json::json;

    fn parse(extra: Value) -> Result<(AdapterConfig, AdapterKinds)> {
        let mut keys = json!({"peft_type": "LORA", "target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 8});
        keys.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        parse_any(Path::new("dir/adapter_config.json"), keys.to_string().as_bytes())
    }

    #[test]
    fn patterns_give_rank_and_scaling_by_the_end_of_the_name() {
        let (config, _) = parse(json!({
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 16, "a|self_attn": 9},
            "alpha_pattern": {"model.layers.0.self_attn.q_proj": 1, "proj": 100},
        }))
        .unwrap();
        let of = |module: &str| (config.lora.rank_of(module), config.lora.scaling_of(module));
        assert_eq!(of("model.layers.0.self_attn.q_proj"), (2, 0.5));
        assert_eq!(of("model.layers.1.self_attn.q_proj"), (2, 4.0));
        assert_eq!(of("model.layers.1.mlp.up_proj"), (16, 0.5));
        assert_eq!(of("model.layers.11.mlp.up_proj"), (4, 2.0));
        assert_eq!(of("model.layers.0.self_attn"), (9, 8.0 / 9.0));
    }

    #[test]
    fn layers_are_selected_by_number_and_by_what_stands_before_it() {
        let selected = |extra: Value| {
            let (config, kinds) = parse(extra).unwrap();
            (0..3).filter(|i| kinds.targets(&config, &format!("model.layers.{i}.self_attn.q_proj"))).collect::<Vec<_>>()
        };
        assert_eq!(selected(json!({})), [0, 1, 2]);
        assert_eq!(selected(json!({"layers_to_transform": 1})), [1]);
        assert_eq!(selected(json!({"layers_to_transform": [0, 2], "layers_pattern": "layers"})), [0, 2]);
        assert_eq!(selected(json!({"layers_to_transform": [0], "layers_pattern": ["h", "model.layers"]})), [0]);
        assert_eq!(selected(json!({"layers_to_transform": [0], "layers_pattern": ["h"]})), [0; 0]);
        assert_eq!(selected(json!({"layers_to_transform": []})), [0, 1, 2]);
    }

    #[test]
    fn fan_in_fan_out_has_no_effect_on_these_models() {
        assert_eq!(parse(json!({"fan_in_fan_out": true})).unwrap().1, AdapterKinds::default());
    }

    #[test]
    fn saved_modules_have_no_a_and_b() {
        let (config, kinds) = parse(json!({"modules_to_save": ["norm", "0.mlp", "lm_head"]})).unwrap();
        assert!(!kinds.targets(&config, "model.layers.0.mlp.up_proj"));
        assert!(kinds.targets(&config, "model.layers.1.mlp.up_proj"));
        for saved in ["model.norm", "model.layers.1.input_layernorm", "model.layers.0.mlp.down_proj", "lm_head"] {
            assert!(kinds.saves(saved), "{saved}");
        }
        assert!(!kinds.saves("model.layers.10.mlp1.down_proj") && !kinds.saves("model.embed_tokens"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_file() {
        for (extra, expected) in [
            (json!({"rank_pattern": {"q_proj": 0}}), "has the rank 0"),
            (json!({"rank_pattern": {"q_proj": 1_000_000_000_000u64}}), "has the rank 1000000000000"),
            (json!({"rank_pattern": ["q_proj"]}), "rank_pattern = "),
            (json!({"alpha_pattern": {"(": 1}}), "dir/adapter_config.json"),
            (json!({"alpha_pattern": {"(?=a)": 1}}), "lookahead"),
            (json!({"layers_pattern": "layers"}), "without layers_to_transform"),
            (json!({"layers_to_transform": -1}), "layers_to_transform = -1"),
            (json!({"layers_to_transform": ["0"]}), "layers_to_transform = "),
            (json!({"lora_bias": true, "use_dora": true}), "lora_bias and use_dora"),
            (json!({"lora_bias": 1}), "lora_bias = 1"),
            (json!({"modules_to_save": [""]}), "empty entry"),
            (json!({"modules_to_save": "lm_head"}), "modules_to_save = "),
            (json!({"trainable_token_indices": [-1]}), "trainable_token_indices"),
            (json!({"trainable_token_indices": {"lm_head": "x"}}), "trainable_token_indices"),
            (json!({"bias": "some"}), "bias = \"some\""),
            (json!({"r": 1_000_000_000_000u64}), "r is 1000000000000"),
            (json!({"kasa_config": {"a": 1}}), "kasa_config"),
        ] {
            let error = parse(extra.clone()).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("dir/adapter_config.json"), "{extra}: {error}");
        }
    }
}
