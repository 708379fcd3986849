//! The settings that all ranks of a run must have in common, compared before the first step.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Communicator, exchange};
use crate::checkpoint::identity::RunIdentity;
use crate::config::TrainConfig;
use crate::error::{Error, Result};

/// Settings of a host (paths and the device), which may differ between ranks; contents are compared instead.
const OF_A_HOST: [&str; 12] = [
    "model.model_name_or_path",
    "model.tokenizer_name_or_path",
    "model.cache_dir",
    "model.device",
    "lora.adapter_name_or_path",
    "data.train_file",
    "data.validation_file",
    "data.dataset_cache",
    "data.dataset_prepared_path",
    "data.overwrite_cache",
    "training.output_dir",
    "training.preemption_file",
];

/// Checks that all ranks are configured alike, before anything expensive is done.
///
/// # Errors
/// With every difference, on every rank.
pub(crate) fn check_same_program(comm: &mut dyn Communicator, config: &TrainConfig) -> Result<()> {
    if comm.size() == 1 {
        return Ok(());
    }
    let mut options = BTreeMap::new();
    let tree = serde_json::to_value(config).expect("plain values have a JSON form");
    for (section, keys) in tree.as_object().into_iter().flatten() {
        for (key, value) in keys.as_object().into_iter().flatten() {
            let name = format!("{section}.{key}");
            // Rank 0 alone decides what is resumed.
            if !OF_A_HOST.contains(&name.as_str()) && name != "training.resume_from_checkpoint" {
                options.insert(name, value.to_string());
            }
        }
    }
    let all = exchange(comm, "configuration", &options)?;
    compare(&all, "are configured differently")
}

/// Checks that all ranks have the same data, model and beginning.
///
/// # Errors
/// As [`check_same_program`].
pub(crate) fn check_same_run(comm: &mut dyn Communicator, identity: &RunIdentity) -> Result<()> {
    if comm.size() == 1 {
        return Ok(());
    }
    let tree = serde_json::to_value(identity).expect("plain values have a JSON form");
    let entries = tree.as_object().into_iter().flatten();
    let mine: BTreeMap<String, String> = entries.map(|(name, value)| (name.clone(), text(value))).collect();
    let all = exchange(comm, "data and model", &mine)?;
    compare(&all, "do not train the same")
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn compare(all: &[BTreeMap<String, String>], how: &str) -> Result<()> {
    let (first, others) = all.split_first().expect("this rank is one of them");
    let mut differences = Vec::new();
    for (i, other) in others.iter().enumerate() {
        let names = first.keys().chain(other.keys().filter(|name| !first.contains_key(*name)));
        for name in names.filter(|name| first.get(*name) != other.get(*name)) {
            let shown = |value: Option<&String>| value.map_or("nothing", String::as_str).to_owned();
            let (ours, theirs) = (shown(first.get(name)), shown(other.get(name)));
            differences.push(format!("{name}: {ours} at rank 0, {theirs} at rank {}", i + 1));
        }
    }
    if differences.is_empty() {
        return Ok(());
    }
    const SHOWN: usize = 12;
    let more = differences.len().saturating_sub(SHOWN);
    differences.truncate(SHOWN);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    Err(Error::Invalid(format!("the ranks {how}:\n  {}{more}", differences.join("\n  "))))
}
