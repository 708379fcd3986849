//! LoRA's options in PEFT's names, and the layers they select in a model.

use super::by_module::{ByModule, Layers};
use super::modules::LinearModule;
use super::tables::TokenIndices;
use super::targets::{ModuleFilter, TargetModules, entry_matches};
use crate::config::ModelConfig;
use crate::spec::{EMBEDDING, HEAD};
use crate::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Options of a LoRA adapter. Names, meanings and defaults are PEFT's, but for `target_modules`, which PEFT takes from
/// a table by architecture, and `task_type`.
///
/// In files (TOML, JSON) every key may be left out and an unknown key is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank: rows of A and columns of B.
    pub r: usize,
    /// Numerator of the scaling.
    #[serde(serialize_with = "as_integer_if_whole")]
    pub lora_alpha: f64,
    /// Probability with which an input of A is dropped in training.
    pub lora_dropout: f64,
    /// Rank-stabilized scaling: `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// DoRA: LoRA with a trained magnitude for every output of a layer (arXiv 2402.09353).
    pub use_dora: bool,
    /// Other ranks than `r`, by the end of a module's name.
    #[serde(skip_serializing_if = "ByModule::is_empty")]
    pub rank_pattern: ByModule<usize>,
    /// Other numerators of the scaling than `lora_alpha`, likewise.
    #[serde(skip_serializing_if = "ByModule::is_empty")]
    pub alpha_pattern: ByModule<f64>,
    /// Of a list of targets only those in these blocks. In `adapter_config.json` it is `layers_to_transform` and
    /// `layers_pattern`, elsewhere it has no key.
    #[serde(skip)]
    pub layers: Option<Layers>,
    /// The linear layers that get an adapter.
    pub target_modules: TargetModules,
    /// The modules left out of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<ModuleFilter>,
    /// Tokens whose rows of the embedding (or the head) are trained: those that the base does not know yet.
    #[serde(skip_serializing_if = "TokenIndices::is_empty")]
    pub trainable_token_indices: TokenIndices,
    /// Modules that are trained whole: `embed_tokens` and `lm_head`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// The head of a tied model follows an embedding that is trained whole; without, the two part.
    #[serde(skip_serializing_if = "is_false")]
    pub ensure_weight_tying: bool,
    /// The biases that are trained.
    pub bias: Bias,
    /// The initialization of A and B.
    pub init_lora_weights: InitLoraWeights,
    /// The task type in PEFT's terms, such as `CAUSAL_LM`; written to `adapter_config.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_type: Option<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            rank_pattern: ByModule::default(),
            alpha_pattern: ByModule::default(),
            layers: None,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            trainable_token_indices: TokenIndices::default(),
            modules_to_save: Vec::new(),
            ensure_weight_tying: false,
            bias: Bias::None,
            init_lora_weights: InitLoraWeights::KaimingUniform,
            task_type: Some("CAUSAL_LM".to_owned()),
        }
    }
}

impl LoraConfig {
    /// The factor of the adapter's output: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
    pub fn scaling(&self) -> f64 {
        scaling(self.lora_alpha, self.r, self.use_rslora)
    }

    /// The rank of the adapter of this module: `r`, unless `rank_pattern` has another.
    pub fn rank_of(&self, module: &str) -> usize {
        self.rank_pattern.get(module).unwrap_or(self.r)
    }

    /// [`Self::scaling`] of the adapter of this module, with its rank and its alpha.
    pub fn scaling_of(&self, module: &str) -> f64 {
        let alpha = self.alpha_pattern.get(module).unwrap_or(self.lora_alpha);
        scaling(alpha, self.rank_of(module), self.use_rslora)
    }

    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// If an option is outside its range; the message names it.
    pub fn validate(&self) -> Result<()> {
        if self.r == 0 {
            return Err(Error::Invalid("r is 0: a LoRA adapter needs a rank of at least 1".to_owned()));
        }
        // The scaling is used in f32.
        if !((self.lora_alpha as f32).is_finite() && self.lora_alpha > 0.0) {
            return Err(Error::Invalid(format!("lora_alpha is {}: it has to be a positive number", self.lora_alpha)));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::Invalid(format!(
                "lora_dropout is {}: it has to be at least 0 and less than 1",
                self.lora_dropout
            )));
        }
        if let Some((end, rank)) = self.rank_pattern.iter().find(|(_, rank)| !(1..=MAX_RANK).contains(*rank)) {
            return Err(Error::Invalid(format!("rank_pattern: {end:?} has the rank {rank}")));
        }
        if let Some((end, alpha)) = self.alpha_pattern.iter().find(|(_, alpha)| !(**alpha as f32).is_finite()) {
            return Err(Error::Invalid(format!("alpha_pattern: {end:?} has lora_alpha {alpha}")));
        }
        match (&self.target_modules, &self.layers) {
            // As PEFT has it: an expression names its layers itself.
            (TargetModules::Selected(ModuleFilter::Pattern(pattern)), Some(_)) => {
                return Err(Error::Invalid(format!(
                    "layers_to_transform does not go with the expression {:?} as target_modules",
                    pattern.as_str()
                )));
            }
            (TargetModules::Selected(filter), _) => filter.validate("target_modules")?,
            (TargetModules::AllLinear, Some(_)) => {
                let message = "layers_to_transform does not go with target_modules = \"all-linear\": list the modules";
                return Err(Error::Invalid(message.to_owned()));
            }
            (TargetModules::AllLinear, None) => {}
        }
        self.exclude_modules.as_ref().map_or(Ok(()), |filter| filter.validate("exclude_modules"))
    }

    /// Whether the module of this full name gets an adapter: targeted and not excluded.
    pub fn targets(&self, module: &str) -> bool {
        let in_layers = self.layers.as_ref().is_none_or(|layers| layers.contain(module));
        !self.excludes(module) && self.target_modules.matches(module) && in_layers
    }

    fn excludes(&self, module: &str) -> bool {
        self.exclude_modules.as_ref().is_some_and(|filter| filter.matches(module))
    }

    /// The layers of `model` that get A and B: the linear layers of the blocks in the order in which they run, then the head and the
    /// embedding, which `"all-linear"` leaves out. The embedding's input features are the tokens.
    ///
    /// # Errors
    /// If the options are not valid ([`LoraConfig::validate`]), if nothing is selected, if an entry of a list selects
    /// nothing, or if the targets select something that is no layer (a norm, a whole block). The message says which layers there are.
    pub fn resolve(&self, model: &ModelConfig) -> Result<Vec<LinearModule>> {
        self.validate()?;
        let spec = model.spec();
        let modules: Vec<LinearModule> = spec.linear().map(LinearModule::from).collect();
        if let Some(entry) = self.unmatched(model).first() {
            return Err(Error::Invalid(format!(
                "target_modules: {entry:?} matches no module of this model; its linear layers are {}",
                spec.describe_linear()
            )));
        }
        if let TargetModules::Selected(filter) = &self.target_modules {
            let ends = [EMBEDDING, HEAD];
            let selected =
                |name: &String| filter.matches(name) && !self.excludes(name) && !ends.contains(&name.as_str());
            if let Some(name) = spec.other_modules().into_iter().find(selected) {
                return Err(Error::Unsupported(format!(
                    "target_modules selects {name}; adapters can be put on {HEAD}, {EMBEDDING} and the linear layers of the blocks: {}",
                    spec.describe_linear()
                )));
            }
        }
        if self.exclude_modules.is_some() && !modules.iter().any(|module| self.excludes(&module.name)) {
            tracing::warn!("exclude_modules leaves out no linear layer of this model");
        }
        let mut selected: Vec<LinearModule> = modules.into_iter().filter(|module| self.targets(&module.name)).collect();
        selected.extend(self.ends(model)?);
        if !selected.is_empty() {
            return Ok(selected);
        }
        let what = match &self.target_modules {
            TargetModules::Selected(ModuleFilter::Pattern(pattern)) if self.exclude_modules.is_none() => format!(
                "target_modules: the regular expression {:?} matches no linear layer (it has to match the whole name; for \
                 names, give a list)",
                pattern.as_str()
            ),
            _ => "target_modules and exclude_modules leave no linear layer to train".to_owned(),
        };
        Err(Error::Invalid(format!("{what}; the model's linear layers are {}", spec.describe_linear())))
    }

    /// The head and the embedding, if they get A and B.
    fn ends(&self, model: &ModelConfig) -> Result<Vec<LinearModule>> {
        if self.target_modules == TargetModules::AllLinear {
            return Ok(Vec::new());
        }
        let (vocab, hidden) = (model.vocab_size, model.hidden_size);
        let module =
            |name: &str, out_features, in_features| LinearModule { name: name.to_owned(), out_features, in_features };
        let mut ends = vec![module(HEAD, vocab, hidden), module(EMBEDDING, hidden, vocab)];
        ends.retain(|module| self.targets(&module.name));
        let Some(LinearModule { name, .. }) = ends.first() else { return Ok(ends) };
        if self.use_dora {
            return Err(Error::Unsupported(format!(
                "use_dora on {name} is not supported: in training, leave it out of target_modules"
            )));
        }
        if self.ensure_weight_tying && model.tie_word_embeddings {
            return Err(Error::Unsupported(format!(
                "ensure_weight_tying with {name} in target_modules is not supported: in training, leave one of them out"
            )));
        }
        Ok(ends)
    }

    /// The entries of a `target_modules` list that match no module of `model` at all.
    pub(crate) fn unmatched<'a>(&'a self, model: &ModelConfig) -> Vec<&'a str> {
        let TargetModules::Selected(ModuleFilter::List(entries)) = &self.target_modules else { return Vec::new() };
        let spec = model.spec();
        let other = spec.other_modules();
        let names = || spec.linear().map(|module| &module.name).chain(&other);
        entries.iter().map(String::as_str).filter(|entry| !names().any(|name| entry_matches(entry, name))).collect()
    }
}

/// More than any layer has use for: a larger one is a mistake or an attack.
pub(crate) const MAX_RANK: usize = 1 << 16;

fn scaling(alpha: f64, rank: usize, rank_stabilized: bool) -> f64 {
    let rank = rank as f64;
    alpha / if rank_stabilized { rank.sqrt() } else { rank }
}

/// The biases that are trained with an adapter, in place of the base's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Bias {
    /// None (`"none"`).
    #[default]
    None,
    /// Those of all layers (`"all"`).
    All,
    /// Those of the layers with A and B (`"lora_only"`).
    LoraOnly,
}

/// The initialization of an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitLoraWeights {
    /// A uniform in `+-1/sqrt(in_features)`, B zero (`true`).
    #[default]
    KaimingUniform,
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_bool(true)
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = InitLoraWeights;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("true, the only supported initialization")
            }

            fn visit_bool<E: serde::de::Error>(self, value: bool) -> std::result::Result<InitLoraWeights, E> {
                if value {
                    Ok(InitLoraWeights::KaimingUniform)
                } else {
                    Err(E::invalid_value(serde::de::Unexpected::Bool(value), &self))
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

/// PEFT writes `lora_alpha` as it was given, which is nearly always an integer, and some readers insist on one.
fn as_integer_if_whole<S: Serializer>(value: &f64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    if value.fract() == 0.0 && value.abs() < 2f64.powi(53) {
        serializer.serialize_i64(*value as i64)
    } else {
        serializer.serialize_f64(*value)
    }
}

#[cfg(test)]
mod tests {
    use super::super::modules::tests::tiny_model;
    use super::*;

    fn with_targets(targets: TargetModules) -> LoraConfig {
        LoraConfig { target_modules: targets, ..Default::default() }
    }

    fn names(config: &LoraConfig) -> Vec<String> {
        config.resolve(&tiny_model(2)).unwrap().into_iter().map(|module| module.name).collect()
    }

    #[test]
    fn scaling_is_alpha_over_r_or_over_its_root() {
        let mut config = LoraConfig { r: 16, lora_alpha: 32.0, ..Default::default() };
        assert_eq!(config.scaling(), 2.0);
        config.use_rslora = true;
        assert_eq!(config.scaling(), 8.0);
    }

    #[test]
    fn the_default_targets_are_the_attention_of_every_block_in_layer_order() {
        let expected: Vec<String> =
            (0..2).flat_map(|i| ["q", "k", "v", "o"].map(|p| format!("model.layers.{i}.self_attn.{p}_proj"))).collect();
        assert_eq!(names(&LoraConfig::default()), expected);
        // The order is the model's, not the list's.
        assert_eq!(names(&with_targets(TargetModules::list(["o_proj", "v_proj", "k_proj", "q_proj"]))), expected);
    }

    #[test]
    fn head_and_embedding_come_last_where_they_are_named() {
        let model = tiny_model(1);
        let config = with_targets(TargetModules::list(["embed_tokens", "lm_head", "q_proj"]));
        let modules = config.resolve(&model).unwrap();
        let of = |i: usize| (modules[i].name.as_str(), modules[i].out_features, modules[i].in_features);
        assert_eq!(modules.len(), 3);
        assert_eq!((of(1), of(2)), (("lm_head", 128, 64), ("model.embed_tokens", 64, 128)));
        assert_eq!(with_targets(TargetModules::list(["embed_tokens"])).resolve(&model).unwrap().len(), 1);
    }

    #[test]
    fn all_linear_selects_seven_layers_a_block_and_exclusion_takes_away() {
        let mut config = with_targets(TargetModules::AllLinear);
        assert_eq!(names(&config).len(), 14);
        config.exclude_modules = Some(ModuleFilter::List(vec!["0.self_attn.q_proj".into(), "down_proj".into()]));
        let left = names(&config);
        assert_eq!(left.len(), 11);
        assert!(!left.iter().any(|name| name.ends_with("down_proj") || name == "model.layers.0.self_attn.q_proj"));
    }

    #[test]
    fn a_target_that_selects_nothing_is_named_with_what_there_is() {
        let model = tiny_model(2);
        let error = with_targets(TargetModules::list(["q_proj", "query"])).resolve(&model).unwrap_err().to_string();
        assert!(error.contains("\"query\" matches no module") && error.contains("self_attn.q_proj"), "{error}");
        let error = with_targets(TargetModules::parse("q_proj").unwrap()).resolve(&model).unwrap_err().to_string();
        assert!(error.contains("has to match the whole name") && error.contains("mlp.down_proj"), "{error}");
        let all = ModuleFilter::List(["q_proj", "k_proj", "v_proj", "o_proj"].map(String::from).into());
        let config = LoraConfig { exclude_modules: Some(all), ..Default::default() };
        assert!(config.resolve(&model).unwrap_err().to_string().contains("leave no linear layer"));
    }

    #[test]
    fn what_is_no_linear_layer_of_a_block_is_refused() {
        let model = tiny_model(1);
        for (targets, name) in [
            (TargetModules::list(["mlp"]), "model.layers.0.mlp"),
            (TargetModules::parse(".*(q_proj|norm)").unwrap(), "model.norm"),
            (TargetModules::parse(r"model\.layers\.0.*").unwrap(), "model.layers.0.self_attn"),
        ] {
            let error = with_targets(targets).resolve(&model).unwrap_err();
            assert!(
                matches!(&error, Error::Unsupported(text) if text.contains(&format!("selects {name};"))),
                "{error}"
            );
        }
        for (dora, tying, message) in
            [(true, false, "use_dora on lm_head"), (false, true, "ensure_weight_tying with lm_head")]
        {
            let targets = TargetModules::list(["q_proj", "lm_head"]);
            let config = LoraConfig { use_dora: dora, ensure_weight_tying: tying, ..with_targets(targets) };
            let error = config.resolve(&model).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        // Excluding them makes the same pattern usable.
        let mut config = with_targets(TargetModules::parse(".*(q_proj|norm)").unwrap());
        config.exclude_modules = Some(serde_json::from_str("\".*norm\"").unwrap());
        assert_eq!(config.resolve(&model).unwrap().len(), 1);
    }

    #[test]
    fn options_outside_their_range_are_named() {
        let bad = [
            (LoraConfig { r: 0, ..Default::default() }, "r is 0"),
            (LoraConfig { lora_alpha: 0.0, ..Default::default() }, "lora_alpha is 0"),
            (LoraConfig { lora_alpha: f64::NAN, ..Default::default() }, "lora_alpha is NaN"),
            (LoraConfig { lora_dropout: 1.0, ..Default::default() }, "lora_dropout is 1"),
            (LoraConfig { lora_dropout: -0.1, ..Default::default() }, "lora_dropout is -0.1"),
            (with_targets(TargetModules::list::<&str>([])), "target_modules is empty"),
            (
                LoraConfig { exclude_modules: Some(ModuleFilter::List(vec![])), ..Default::default() },
                "exclude_modules is empty",
            ),
            (with_targets(TargetModules::list([""])), "empty entry"),
        ];
        for (config, expected) in bad {
            let error = config.resolve(&tiny_model(1)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn files_take_defaults_and_refuse_unknown_keys_and_unsupported_values() {
        let config: LoraConfig =
            serde_json::from_str(r#"{"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}"#).unwrap();
        assert_eq!((config.r, config.lora_alpha, config.lora_dropout), (4, 16.0, 0.0));
        let text = serde_json::to_string(&config).unwrap();
        assert!(text.contains("\"lora_alpha\":16,"), "{text}");
        assert_eq!(serde_json::from_str::<LoraConfig>(&text).unwrap(), config);
        for (json, expected) in [
            (r#"{"rank": 4}"#, "unknown field `rank`"),
            (r#"{"bias": "some"}"#, "unknown variant `some`"),
            (r#"{"init_lora_weights": "pissa"}"#, "the only supported initialization"),
            (r#"{"init_lora_weights": false}"#, "the only supported initialization"),
            (r#"{"r": -1}"#, "invalid value"),
        ] {
            let error = serde_json::from_str::<LoraConfig>(json).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
