//! The command `qlora`, run as a user runs it, with tiny models.

#[path = "../../../../tests/common/random_folder.rs"]
mod random_folder;
#[path = "../../../../tests/common/tiny_folder.rs"]
mod tiny_folder;

mod chat;
mod data_kinds;
mod errors;
mod export;
#[cfg(all(unix, not(feature = "cuda")))]
mod front;
mod push;
mod push_to_hub;
#[cfg(target_os = "linux")]
mod terminal;
#[cfg(target_os = "linux")]
mod train_view;
mod whole_way;

/// The program.
const QLORA: &str = env!("CARGO_BIN_EXE_qlora");
