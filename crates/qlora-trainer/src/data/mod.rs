//! From data files to micro-batches.
//!
//! | module | what it is |
//! |---|---|
//! | [`rows`] | files of any format to rows, with a position to go on from |
//! | [`mapping`] | rows with columns of any name to the formats of `record` |
//! | [`record`] | the row formats: `messages`, `conversations`, `prompt`/`completion`, Alpaca, `text` |
//! | [`encode`] | rows to token ids, with the tokens to train on; the [`TextEncoder`] that does it for a model |
//! | [`load`](mod@load) | sets of rows to a [`Dataset`], with errors that name file and line |
//! | `pipeline` | the rows of a set, encoded while the next ones are read |
//! | [`cache`] | tokenized rows on the disk, for the next start |
//! | [`jsonl`] | JSONL files alone |
//! | `mix` | several sets as one; documents split off for validation |
//! | `card` | the files of a split, of a data set on the hub or a folder |
//! | `configured` | the data of a configuration |
//! | `lines` | the lines of a JSONL file, and JSON as Python writes it |
//! | [`dataset`] | the documents of a run, as tokens |
//! | [`packing`] | documents into bins of limited size |
//! | `preference` | pairs of answers to token ids |
//! | [`order`] | which documents are computed together, and when; the largest batch of a run |
//! | [`balance`] | how evenly the ranks of a run share its tokens |
//! | [`loader`] | whole optimizer steps, shuffled, from any position |
//! | [`stream`] | the same of data that is read while it is trained on |
//! | [`feed`] | what a run is fed with: one or the other |

pub mod balance;
pub mod cache;
mod card;
pub(crate) mod configured;
pub mod dataset;
pub mod encode;
pub mod feed;
pub mod jsonl;
mod lines;
pub mod load;
pub mod loader;
pub mod mapping;
mod mix;
pub mod order;
pub mod packing;
mod pipeline;
mod preference;
pub mod record;
pub mod rows;
pub mod stream;
#[cfg(test)]
mod testing;

pub use cache::TokenCache;
pub use configured::training_sets;
pub use dataset::{DataStats, Dataset, Document, DropReason};
pub use encode::{EncodeOptions, Encoded, TextEncoder};
pub use feed::TrainingData;
pub use jsonl::{JsonLine, check_jsonl, load_jsonl, read_json_lines, read_records};
pub use load::{Filters, PlacedRow, RowSet, Rows};
pub use loader::{Loader, Position, StepBatch};
pub use mapping::Mapping;
pub use order::{LargestBatch, LoaderOptions, largest_batch};
pub use record::{Conversation, ConversationMessage, Preference, Record, Row};
pub use rows::{DataFile, RowPlace, RowPosition, RowSource};
pub use stream::{SharedEncoder, Stream, StreamLoader, StreamOptions, StreamPosition};
