//! From JSONL files to micro-batches.
//!
//! | module | what it is |
//! |---|---|
//! | [`record`] | the row formats: `messages`, `conversations`, `prompt`/`completion`, Alpaca, `text` |
//! | [`encode`] | rows to token ids, with the tokens to train on; the [`TextEncoder`] that does it for a model |
//! | [`jsonl`] | files to a [`Dataset`], with errors that name file and line |
//! | `lines` | the lines of a JSONL file, and JSON as Python writes it |
//! | [`dataset`] | the documents of a run, as tokens |
//! | [`packing`] | documents into bins of limited size |
//! | `preference` | pairs of answers to token ids |
//! | [`order`] | which documents are computed together, and when; the largest batch of a run |
//! | [`loader`] | whole optimizer steps, shuffled, from any position |

pub mod dataset;
pub mod encode;
pub mod jsonl;
mod lines;
pub mod loader;
pub mod order;
pub mod packing;
mod preference;
pub mod record;
#[cfg(test)]
mod testing;

pub use dataset::{DataStats, Dataset, Document};
pub use encode::{EncodeOptions, Encoded, TextEncoder};
pub use jsonl::{JsonLine, check_jsonl, load_jsonl, read_json_lines, read_records};
pub use loader::{Loader, Position, StepBatch};
pub use order::{LargestBatch, LoaderOptions, largest_batch};
pub use record::{Conversation, Message, Preference, Record, Row};
