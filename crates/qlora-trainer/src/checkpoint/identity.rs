//! The identity of a run, which must match for a checkpoint to be resumed: data, model, and every option that changes
//! the numbers.
//!
//! Options that change none (logging, saving, evaluating, gradient checkpointing, paths) may differ. The number of steps
//! may differ where the learning rate does not depend on it (constant schedules). Where a model lies and what it is called is
//! no part of it, its weights are; on the CPU the number of threads is none, because it changes no bit.
//!
//! Options that only determine how the optimizer goes on from here ([`OVERRIDABLE`]) may differ if the configuration
//! says so.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{ObjectiveKind, SamplingStrategy, Scheduler, TrainConfig};
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::model::Parameter;
use crate::schedule::Schedule;

/// Options by section that change the numbers, besides those that need more thought (see [`RunIdentity::new`]).
const OPTIONS: &[(&str, &[&str])] = &[
    ("model", &["load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "blocksize"]),
    ("lora", &["r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "alpha_pattern"]),
    ("data", &["packing"]),
    (
        "training",
        &[
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "lr_scheduler_type",
            "max_grad_norm",
            "optim",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "seed",
            "train_sampling_strategy",
        ],
    ),
];

/// Options that change the documents of a stream, or their order.
const STREAM_OPTIONS: [&str; 10] = [
    "streaming",
    "buffer_size",
    "max_length",
    "on_overlong",
    "on_untrained",
    "completion_only_loss",
    "max_samples",
    "min_sample_len",
    "mix_strategy",
    "val_size",
];

/// The entries that may differ with `override_opt_param_scheduler`: they take effect from the next step on.
pub const OVERRIDABLE: [&str; 7] = [
    "number of steps",
    "training.learning_rate",
    "training.lr_scheduler_type",
    "training.max_grad_norm",
    "training.warmup_steps",
    "training.weight_decay",
    UNDECAYED,
];

/// Written where weight decay leaves parameters out: earlier versions let it take all of them, biases too.
const UNDECAYED: &str = "training.weight_decay of biases";

/// The names of the layers, which may be written in several ways: what they select counts.
const LAYERS: &str = "lora.target_modules";
/// The layers, as they were found in the model.
const PARAMETERS: &str = "trainable parameters";

/// Entries that earlier versions wrote and that are no part of an identity any more, and entries that they did not
/// write yet.
const NO_LONGER: [&str; 2] = ["model: model", "model: commit"];
const NOT_YET: [&str; 4] = ["model: weights", "model: device", "model: compute type", "model: full_determinism"];

/// Names and values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunIdentity(Map<String, Value>);

impl RunIdentity {
    /// The identity of a run over data of which `data` says what they are, with what a model says of itself
    /// ([`TrainableModel::identity`](crate::model::TrainableModel::identity)).
    pub fn new(
        config: &TrainConfig,
        schedule: &Schedule,
        data: &str,
        model: &[(String, String)],
        parameters: &[Parameter],
    ) -> Self {
        let options = serde_json::to_value(config).expect("plain values have a JSON form");
        let mut map = Map::new();
        for (section, keys) in OPTIONS {
            // How a base is quantized says nothing about one that is not.
            let keys = if *section == "model" && !config.model.load_in_4bit { &keys[..1] } else { keys };
            for key in keys {
                map.insert(format!("{section}.{key}"), options[section][key].clone());
            }
        }
        if config.data.packing {
            map.insert("data.max_length".to_owned(), config.data.max_length.into());
        }
        if config.training.train_sampling_strategy == SamplingStrategy::Random {
            map.insert("training.data_seed".to_owned(), config.training.resolved_data_seed().into());
        }
        if schedule.kind != Scheduler::Constant {
            map.insert("training.warmup_steps".to_owned(), schedule.warmup_steps.into());
        }
        if matches!(schedule.kind, Scheduler::Cosine | Scheduler::Linear) {
            map.insert("number of steps".to_owned(), schedule.total_steps.into());
        }
        // Of plain fine-tuning, which earlier versions had alone, there is nothing to say.
        if config.training.objective != ObjectiveKind::Sft {
            map.insert("training.objective".to_owned(), options["training"]["objective"].clone());
            let of_objective = options["objective"].as_object().into_iter().flatten();
            map.extend(of_objective.map(|(key, value)| (format!("objective.{key}"), value.clone())));
        }
        // Which tokens they are the parameters' shapes do not say.
        if !config.lora.trainable_token_indices.is_empty() {
            let key = "trainable_token_indices";
            map.insert(format!("lora.{key}"), options["lora"][key].clone());
        }
        if config.lora.ensure_weight_tying {
            map.insert("lora.ensure_weight_tying".to_owned(), true.into());
        }
        // In memory the documents themselves say what became of the rows.
        if config.data.streaming {
            for key in STREAM_OPTIONS {
                map.insert(format!("data.{key}"), options["data"][key].clone());
            }
        }
        if config.training.weight_decay != 0.0 && parameters.iter().any(|parameter| !parameter.decays) {
            map.insert(UNDECAYED.to_owned(), 0.0.into());
        }
        map.insert("training data".to_owned(), data.into());
        map.insert(PARAMETERS.to_owned(), describe(parameters).into());
        for (name, value) in model {
            map.insert(format!("model: {name}"), value.as_str().into());
        }
        Self(map)
    }

    /// Micro-batches of a step, over all ranks.
    pub(crate) fn micro_batches(&self) -> Option<usize> {
        self.0.get("training.gradient_accumulation_steps")?.as_u64().and_then(|n| usize::try_from(n).ok())
    }

    /// Checks that `self`, of the checkpoint at `path`, is the same as that of the run. With `overridden`, what is
    /// [`OVERRIDABLE`] may differ; those differences are returned.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with every difference, and what to do.
    pub fn check(&self, path: &Path, run: &Self, overridden: bool) -> Result<Vec<String>> {
        let names = self.0.keys().chain(run.0.keys().filter(|name| !self.0.contains_key(*name)));
        let same_layers = self.0.get(PARAMETERS) == run.0.get(PARAMETERS);
        let differs = |name: &&String| {
            let (then, now) = (self.0.get(*name), run.0.get(*name));
            let name = name.as_str();
            let old = match (then, now) {
                // Checkpoints without the key are from before there was a choice.
                (None, Some(now)) if name == "training.optim" => now == "adamw_torch",
                (None, Some(now)) if name == "lora.alpha_pattern" => now.as_object().is_some_and(Map::is_empty),
                (None, Some(_)) => NOT_YET.contains(&name),
                (Some(_), None) => NO_LONGER.contains(&name),
                _ => false,
            };
            then != now && !old && !(name == LAYERS && same_layers)
        };
        let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
        let (mut allowed, mut refused, mut fixed) = (Vec::new(), Vec::new(), 0);
        for name in names.filter(differs) {
            let (then, now) = (shown(self.0.get(name)), shown(run.0.get(name)));
            let difference = format!("{name}: {then} in the checkpoint, {now} now");
            let can_be_overridden = OVERRIDABLE.contains(&name.as_str());
            fixed += usize::from(!can_be_overridden);
            let list = if can_be_overridden && overridden { &mut allowed } else { &mut refused };
            list.push(difference);
        }
        if refused.is_empty() {
            return Ok(allowed);
        }
        Err(Error::Mismatch { path: path.to_owned(), differences: refused, overridable: fixed == 0 })
    }
}

fn describe(parameters: &[Parameter]) -> String {
    let mut fingerprint = Fingerprint::new();
    for parameter in parameters {
        fingerprint.bytes(parameter.name.as_bytes());
        parameter.shape.iter().for_each(|&size| {
            fingerprint.word(size as u64);
        });
    }
    let elements: usize = parameters.iter().map(|parameter| parameter.range.len()).sum();
    format!("{} tensors, {elements} elements, fingerprint {fingerprint}", parameters.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TrainingOptions;

    #[test]
    fn a_run_whose_biases_decayed_does_not_go_on_unnoticed() {
        let identity = |weight_decay, decays| {
            let training = TrainingOptions { weight_decay, ..TrainingOptions::default() };
            let config = TrainConfig { training, ..TrainConfig::default() };
            let parameter = |name: &str, range: std::ops::Range<usize>, decays| Parameter {
                name: name.to_owned(),
                shape: vec![range.len()],
                range,
                silenced_by: None,
                may_rest: false,
                decays,
            };
            let parameters = [parameter("lora_A", 0..4, true), parameter("bias", 4..6, decays)];
            RunIdentity::new(&config, &Schedule::new(&config.training, 10), "data", &[], &parameters)
        };
        let check = |then: &RunIdentity, now: &RunIdentity, overridden| then.check(Path::new("at"), now, overridden);
        // As an earlier version wrote it, which let all parameters decay.
        let (before, now) = (identity(0.1, true), identity(0.1, false));
        let error = check(&before, &now, false).unwrap_err().to_string();
        assert!(error.contains("training.weight_decay of biases: nothing in the checkpoint, 0.0 now"), "{error}");
        assert!(error.contains("override_opt_param_scheduler"), "{error}");
        assert_eq!(check(&before, &now, true).unwrap().len(), 1);
        assert!(check(&now, &now, false).unwrap().is_empty());
        // Without decay nothing is said of it.
        assert_eq!(identity(0.0, true), identity(0.0, false));
    }
}
