//! `trainer_state.json`: where a run is.
//!
//! The keys are those of transformers' `TrainerState`, which can read the file. The state that a resumed run needs
//! beyond them is in `stateful_callbacks.qlora`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::identity::RunIdentity;
use crate::data::{Position, StreamPosition};
use crate::loss_scale::LossScale;
use crate::metrics::{LogEntry, LogWindow};

/// The version of [`QloraState`]; a checkpoint of another one is refused.
pub(crate) const FORMAT_VERSION: u32 = 1;

/// `trainer_state.json`. Keys of transformers that have no meaning here are written with its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Always null.
    pub best_global_step: Option<u64>,
    /// Always null.
    pub best_metric: Option<f64>,
    /// Always null.
    pub best_model_checkpoint: Option<String>,
    /// Epochs done, with the fraction of the current one.
    pub epoch: f64,
    /// Steps between two evaluations; 0 for one at the end only.
    pub eval_steps: u64,
    /// Optimizer steps done.
    pub global_step: u64,
    /// Always false.
    pub is_hyper_param_search: bool,
    /// Always true.
    pub is_local_process_zero: bool,
    /// Always true.
    pub is_world_process_zero: bool,
    /// The lines of `metrics.jsonl` so far.
    pub log_history: Vec<LogEntry>,
    /// Steps between two entries of training in the log.
    pub logging_steps: u64,
    /// Optimizer steps of the whole run.
    pub max_steps: u64,
    /// Tokens processed so far.
    pub num_input_tokens_seen: u64,
    /// Epochs of the whole run, rounded up.
    pub num_train_epochs: u64,
    /// Steps between two checkpoints.
    pub save_steps: u64,
    /// The state that this crate adds to transformers' keys.
    pub stateful_callbacks: StatefulCallbacks,
    /// Always 0.
    pub total_flos: f64,
    /// Documents (with packing: bins) in a micro-batch.
    pub train_batch_size: usize,
    /// Always null.
    pub trial_name: Option<String>,
    /// Always null.
    pub trial_params: Option<Map<String, Value>>,
}

/// The place in `trainer_state.json` where transformers lets others keep state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatefulCallbacks {
    /// Ours.
    pub qlora: QloraState,
}

/// The state that a resumed run needs beyond transformers' keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QloraState {
    /// The version of this struct.
    pub format_version: u32,
    /// The version of the crate that wrote it.
    pub qlora_version: String,
    /// The position in the data at which the next step begins.
    pub position: Position,
    /// The same position in data that is read while it is trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<StreamPosition>,
    /// The sums of the steps since the last log entry.
    pub(crate) window: LogWindow,
    /// Seed of initialisation and dropout.
    pub seed: u64,
    /// Seed of the order of the data.
    pub data_seed: u64,
    /// Stands for the parameters before the first step: equal for runs that began equally.
    pub initial_parameters: String,
    /// The current time (RFC 3339) that the chat template was given when the data was rendered, if it asks for the
    /// time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_time: Option<String>,
    /// The scale of the loss, in a run whose gradients are float16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// The number of ranks for which the micro-batches of a step were chosen.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub ranks: usize,
    /// Stands for `optimizer.safetensors`.
    pub optimizer_fingerprint: String,
    /// The identity of the run, which a resumed run must have, too.
    pub identity: RunIdentity,
}

fn one() -> usize {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks with a reference")]
fn is_one(ranks: &usize) -> bool {
    *ranks == 1
}

impl TrainerState {
    /// The file's text.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("numbers and strings have a JSON form");
        text.push('\n');
        text
    }

    /// Reads the file's text; the error describes the problem.
    pub(crate) fn from_json(text: &str) -> Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let Some(version) = json.pointer("/stateful_callbacks/qlora/format_version") else {
            return Err("it was not written by qlora".to_owned());
        };
        if version.as_u64() != Some(u64::from(FORMAT_VERSION)) {
            return Err(format!("it has format version {version}; this version reads {FORMAT_VERSION}"));
        }
        serde_json::from_value(json).map_err(|error| error.to_string())
    }
}
