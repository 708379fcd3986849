//! The commands, a module each: its arguments and what it does.

pub(crate) mod adapters;
pub(crate) mod chat;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod data;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod generate;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod merge;
#[cfg(feature = "hub")]
pub(crate) mod push;
pub(crate) mod quantize;
mod run_args;
pub(crate) mod train;
