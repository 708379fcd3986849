//! Checkpoints that appear whole or not at all, and from which a run goes on bit for bit.
//!
//! ```text
//! output_dir/
//!   metrics.jsonl                  the log
//!   adapter_config.json            the adapter after the last step
//!   adapter_model.safetensors
//!   tokenizer.json, chat_template.jinja, ...   what it was trained with, here and in the checkpoints
//!   checkpoint-<step>/
//!     adapter_config.json          the adapter, in PEFT's format
//!     adapter_model.safetensors
//!     optimizer.safetensors        master, exp_avg, exp_avg_sq, each flat; with 8-bit moments their scales, too
//!     trainer_state.json           transformers' keys; ours are in stateful_callbacks.qlora
//!     config.toml                  the configuration, defaults written out
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`folder`] | the output folder: lock, list, latest, limit, leftovers |
//! | [`identity`] | what must be the same for a run to go on |
//! | [`state`] | `trainer_state.json` |
//! | [`tensors`] | `optimizer.safetensors` |

pub mod folder;
pub mod identity;
pub mod state;
pub mod tensors;

use std::fs;
use std::path::{Path, PathBuf};

use crate::config::TrainConfig;
use crate::error::{Error, Result};
use crate::model::TrainableModel;
use qlora_core::atomic::replace_directory;
use state::TrainerState;
use tensors::OptimizerTensors;

pub(crate) const STATE: &str = "trainer_state.json";
pub(crate) const OPTIMIZER: &str = "optimizer.safetensors";
const CONFIG: &str = "config.toml";

/// The contents of a checkpoint besides the adapter.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Checkpoint {
    /// The progress of the run.
    pub state: TrainerState,
    /// Masters and moments.
    pub tensors: OptimizerTensors,
}

/// Writes `checkpoint-<step>` in `output_dir`, replacing one of the same step.
///
/// Everything is written to a temporary folder, flushed to the disk, and renamed; if that fails, what was there before
/// is untouched.
///
/// # Errors
/// If the disk is full or not writable, or the model cannot save its adapter.
pub fn save<M: TrainableModel + ?Sized>(
    output_dir: &Path,
    model: &M,
    tensors: &OptimizerTensors,
    state: &TrainerState,
    config: &TrainConfig,
) -> Result<PathBuf> {
    let path = output_dir.join(folder::name(state.global_step));
    let mut state = state.clone();
    state.stateful_callbacks.qlora.optimizer_fingerprint = tensors.fingerprint().to_string();
    replace_directory(&path, |temporary| {
        let write = |name: &str, text: &str| {
            let file = temporary.join(name);
            fs::write(&file, text).map_err(|error| qlora_core::Error::io(file, error))
        };
        model.save_adapter(temporary)?;
        tensors.write(&temporary.join(OPTIMIZER))?;
        write(STATE, &state.to_json())?;
        write(CONFIG, &config.to_toml())
    })?;
    Ok(path)
}

/// The two files that a rank needs of a checkpoint: `trainer_state.json` and `optimizer.safetensors`.
pub(crate) type Files = (Vec<u8>, Vec<u8>);

/// Reads a checkpoint's files, to send them.
///
/// # Errors
/// If one cannot be read.
pub(crate) fn read_files(path: &Path) -> Result<Files> {
    let read = |name: &str| {
        let file = path.join(name);
        fs::read(&file).map_err(|error| damaged(&file, error))
    };
    Ok((read(STATE)?, read(OPTIMIZER)?))
}

/// A checkpoint from its files' content; `path` is where rank 0 has it.
///
/// # Errors
/// If they are not what was read there.
pub(crate) fn from_files(path: &Path, (state, tensors): &Files) -> Result<Checkpoint> {
    let file = path.join(STATE);
    let text = std::str::from_utf8(state).map_err(|error| damaged(&file, error))?;
    let state = TrainerState::from_json(text).map_err(|error| damaged(&file, error))?;
    let file = path.join(OPTIMIZER);
    let tensors = OptimizerTensors::parse(tensors).map_err(|problem| damaged(&file, problem))?;
    checked(&file, state, tensors)
}

/// Reads a checkpoint and checks that it is whole. Whether it belongs to the run is another question:
/// [`identity::RunIdentity::check`].
///
/// # Errors
/// If a file is missing or damaged; the error names it.
pub fn load(path: &Path) -> Result<Checkpoint> {
    if !path.is_dir() {
        return Err(Error::checkpoint(path, "there is no such checkpoint folder"));
    }
    let file = path.join(STATE);
    let text = fs::read_to_string(&file).map_err(|error| damaged(&file, error))?;
    let state = TrainerState::from_json(&text).map_err(|error| damaged(&file, error))?;
    let file = path.join(OPTIMIZER);
    let tensors = OptimizerTensors::read(&file).map_err(|problem| damaged(&file, problem))?;
    checked(&file, state, tensors)
}

fn checked(file: &Path, state: TrainerState, tensors: OptimizerTensors) -> Result<Checkpoint> {
    let (expected, found) = (&state.stateful_callbacks.qlora.optimizer_fingerprint, tensors.fingerprint().to_string());
    if *expected != found {
        return Err(damaged(file, format!("its fingerprint is {found}, not {expected}")));
    }
    Ok(Checkpoint { state, tensors })
}

fn damaged(file: &Path, problem: impl std::fmt::Display) -> Error {
    Error::checkpoint(file, format!("the checkpoint is damaged: {problem}; resume from an earlier one"))
}
