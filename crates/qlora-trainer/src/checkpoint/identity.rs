//! What must be the same for a run to go on from a checkpoint: data, model, and every option that changes the numbers.
//!
//! Options that change none (logging, saving, evaluating, gradient checkpointing, paths) may differ. The number of steps
//! may differ where the learning rate does not depend on it (constant schedules).

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{SamplingStrategy, Scheduler, TrainConfig};
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::model::{Parameter, TrainableModel};
use crate::schedule::Schedule;

/// Options by section that change the numbers, besides those that need more thought (see [`RunIdentity::new`]).
const OPTIONS: &[(&str, &[&str])] = &[
    ("model", &["load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "blocksize"]),
    ("lora", &["r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"]),
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

/// Names and values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunIdentity(Map<String, Value>);

impl RunIdentity {
    /// The identity of a run.
    pub fn new<M: TrainableModel + ?Sized>(
        config: &TrainConfig,
        schedule: &Schedule,
        dataset: &Dataset,
        model: &M,
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
        let (documents, tokens, fingerprint) = (dataset.len(), dataset.stats().tokens, dataset.fingerprint());
        map.insert(
            "training data".to_owned(),
            format!("{documents} documents, {tokens} tokens, fingerprint {fingerprint}").into(),
        );
        map.insert("trainable parameters".to_owned(), describe(parameters).into());
        for (name, value) in model.identity() {
            map.insert(format!("model: {name}"), value.into());
        }
        Self(map)
    }

    /// Checks that `self`, of the checkpoint at `path`, is the same as that of the run.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with every difference.
    pub fn check(&self, path: &Path, run: &Self) -> Result<()> {
        let names = self.0.keys().chain(run.0.keys().filter(|name| !self.0.contains_key(*name)));
        let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
        let difference = |name: &String| {
            let (then, now) = (self.0.get(name), run.0.get(name));
            // Checkpoints without the key are from before there was a choice.
            if then.is_none() && name == "training.optim" && now.is_some_and(|now| now == "adamw_torch") {
                return None;
            }
            (then != now).then(|| format!("{name}: {} in the checkpoint, {} now", shown(then), shown(now)))
        };
        let differences: Vec<_> = names.filter_map(difference).collect();
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::Mismatch { path: path.to_owned(), differences })
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
