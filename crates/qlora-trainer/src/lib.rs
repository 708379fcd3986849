//! Configuration, data, optimizer and training loop.
//!
//! | module | what it is |
//! |---|---|
//! | [`config`] | everything a run needs to know, as a struct and as TOML |
//! | [`data`] | JSONL to tokens, packing, whole optimizer steps |
//! | [`session`] | from a configuration to a model, its data and a run |
//! | [`model`], [`qlora_model`] | what the loop asks of a model, and the decoder that answers |
//! | [`encoder`] | a model's tokenizer and chat template, for programs and as the data code sees them |
//! | [`trainer`] | the loop |
//! | [`objective`] | what a run minimises: a loss of the tokens' log-probabilities |
//! | [`optimizer`], [`schedule`] | AdamW with clipping, the learning rate |
//! | [`loss_scale`] | what keeps float16 gradients in range |
//! | [`checkpoint`] | atomic checkpoints, resumed bit for bit |
//! | [`store`] | copies of checkpoints in object stores and folders |
//! | [`exact_match`] | generated answers against expected ones |
//! | [`comm`], [`launch`] | the ranks of a run: several processes that train one model, and their start |
//! | [`metrics`], [`progress`] | the log, a progress bar, a plot of the loss |
//! | [`samples`] | answers to the same prompts again and again while training |
//! | [`interrupt`], [`memory`], [`fingerprint`] | Ctrl-C, memory of the process, fingerprints |

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod comm;
pub mod config;
pub mod data;
pub mod encoder;
pub mod error;
pub mod exact_match;
pub mod fingerprint;
mod guard;
pub mod interrupt;
pub mod launch;
pub mod loss_scale;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod objective;
pub mod optimizer;
mod platform;
mod preemption;
pub mod progress;
pub mod qlora_model;
mod rng;
pub mod samples;
pub mod schedule;
pub mod session;
pub mod store;
mod times;
pub mod trainer;

pub use config::TrainConfig;
pub use error::{Error, ErrorKind, Result};
pub use interrupt::Interrupt;
pub use model::{LossSum, Parameter, TrainPass, TrainableModel};
pub use trainer::{Outcome, Summary, Trainer};
