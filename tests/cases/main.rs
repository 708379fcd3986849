//! Faults that users of other programs reported, one test a case under its name, a module a kind. Each module says which other inputs
//! of its kind it tries.

#[path = "../common/bigram.rs"]
mod bigram;
#[path = "../common/files.rs"]
mod files;
#[path = "../common/tiny_folder.rs"]
mod tiny_folder;

mod adapters;
mod answers;
mod ends;
mod prompts;
mod runs;
mod trl;
mod weights;
