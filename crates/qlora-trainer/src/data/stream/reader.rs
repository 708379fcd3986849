//! The documents of all sets in the order of the mixture.

use std::collections::VecDeque;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{BLOCK_TOKENS, Shared, StreamOptions, is_pipe};
use crate::data::dataset::Dataset;
use crate::data::load::{EncodedRow, encode_rows, filtered};
use crate::data::mix::{TurnState, Turns};
use crate::data::rows::{RowPlace, RowPosition, RowSource};
use crate::error::{Error, Result};
use crate::rng::derive_seed;

/// Rows of a set that are read and encoded together.
const CHUNK: usize = 256;

/// The position of a reader. It can be stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReaderPosition {
    /// Epochs behind.
    pub epoch: u64,
    /// Blocks behind in this epoch.
    pub block: u64,
    sets: Vec<SetPosition>,
    turns: TurnState,
}

/// The position in a set: rows are read in chunks, which are counted from where one begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct SetPosition {
    chunk: RowPosition,
    /// Rows of the set before the chunk, in this pass over it.
    before: usize,
    /// Rows of the chunk that are used up.
    rows: usize,
    /// Passes over the set behind, in this epoch.
    passes: usize,
}

/// A set as it is read.
struct SetReader {
    source: RowSource,
    position: SetPosition,
    /// The rows of the chunk that are left, and their file.
    rows: VecDeque<EncodedRow>,
    file: PathBuf,
    /// Nothing comes behind the chunk.
    ended: bool,
}

/// Documents that were read together.
#[derive(Debug)]
pub(super) struct Documents {
    /// The position at which the block begins.
    pub(super) start: ReaderPosition,
    pub(super) dataset: Dataset,
    /// The epoch ends with them.
    pub(super) last: bool,
}

pub(super) struct BlockReader {
    shared: Shared,
    sets: Vec<SetReader>,
    turns: Turns,
    epoch: u64,
    block: u64,
    /// The position at which an epoch begins.
    start: ReaderPosition,
    /// The epoch has ended, and the next one is not begun.
    ended: bool,
}

impl BlockReader {
    /// A reader at the beginning.
    pub(super) fn new(shared: Shared) -> Self {
        let turns = turns(&shared, 0);
        let sets = shared.sets.iter().map(|set| SetReader::new(RowSource::new(set.files.clone()))).collect();
        let start = ReaderPosition {
            epoch: 0,
            block: 0,
            sets: vec![SetPosition::default(); shared.sets.len()],
            turns: turns.state().clone(),
        };
        Self { shared, sets, turns, epoch: 0, block: 0, start, ended: false }
    }

    /// A reader that goes on from a position, with epochs that begin at `start`.
    ///
    /// # Errors
    /// If the position has other sets, or a file is not what it was.
    pub(super) fn at(shared: Shared, start: ReaderPosition, position: &ReaderPosition) -> Result<Self> {
        let mut reader = Self { start, ..Self::new(shared) };
        reader.seek(position)?;
        Ok(reader)
    }

    /// An epoch begins where the reader is now.
    pub(super) fn begin_here(&mut self) {
        (self.epoch, self.block) = (0, 0);
        self.start = self.position();
    }

    pub(super) fn position(&self) -> ReaderPosition {
        if self.ended {
            return self.start_of(self.epoch + 1);
        }
        ReaderPosition {
            epoch: self.epoch,
            block: self.block,
            sets: self.sets.iter().map(|set| set.position).collect(),
            turns: self.turns.state().clone(),
        }
    }

    fn start_of(&self, epoch: u64) -> ReaderPosition {
        let mut turns = self.start.turns.clone();
        if epoch > 0 {
            turns.random = self::turns(&self.shared, epoch).state().random;
        }
        ReaderPosition { epoch, block: 0, sets: self.start.sets.clone(), turns }
    }

    fn seek(&mut self, position: &ReaderPosition) -> Result<()> {
        if position.sets.len() != self.sets.len() {
            let (then, now) = (position.sets.len(), self.sets.len());
            return Err(Error::Invalid(format!("the position in the data is one of {then} sets, not of {now}")));
        }
        (self.epoch, self.block, self.ended) = (position.epoch, position.block, false);
        self.turns.set_state(position.turns.clone());
        (0..self.sets.len()).try_for_each(|set| self.read_again(set, position.sets[set]))
    }

    /// Goes to a place in a set.
    fn read_again(&mut self, set: usize, position: SetPosition) -> Result<()> {
        let files = &self.shared.sets[set].files;
        if let Some(pipe) = files.iter().find(|file| is_pipe(&file.path)) {
            let message = "it was read already, and a pipe can be read once only: more than one epoch needs a file, as does a run \
                           that is resumed";
            return Err(Error::data(&pipe.path, None, message));
        }
        let reader = &mut self.sets[set];
        *reader = SetReader::new(RowSource::new(files.clone()));
        reader.source.seek(position.chunk);
        reader.position = SetPosition { rows: 0, ..position };
        if position.rows > 0 {
            self.fill(set)?;
            let reader = &mut self.sets[set];
            if reader.rows.len() < position.rows {
                let path = reader.file.display();
                return Err(Error::Invalid(format!(
                    "{path}: it ends before where it was read to: it is another file now"
                )));
            }
            reader.rows.drain(..position.rows);
            reader.position.rows = position.rows;
        }
        Ok(())
    }

    /// The documents of the next block.
    ///
    /// # Errors
    /// If an epoch has none, or as for reading.
    pub(super) fn block(&mut self) -> Result<Documents> {
        self.documents(self.shared.options.buffer_size)
    }

    /// The next documents, at most `count` and about [`BLOCK_TOKENS`], of one epoch.
    pub(super) fn documents(&mut self, count: usize) -> Result<Documents> {
        if self.ended {
            self.seek(&self.start_of(self.epoch + 1))?;
        }
        let start = self.position();
        let mut dataset = Dataset::new();
        loop {
            let is_empty =
                (0..self.sets.len()).map(|set| self.settle(set, &mut dataset)).collect::<Result<Vec<_>>>()?;
            let mut turns = self.turns.clone();
            let Some(set) = turns.next(&is_empty) else {
                self.ended = true;
                break;
            };
            if dataset.len() >= count || dataset.stats().tokens >= BLOCK_TOKENS {
                break;
            }
            self.turns = turns;
            if is_empty[set] {
                let passes = self.sets[set].position.passes + 1;
                self.read_again(set, SetPosition { passes, ..self.start.sets[set] })?;
                self.settle(set, &mut dataset)?;
            }
            self.take(set, &mut dataset)?;
        }
        if self.ended && dataset.is_empty() && self.block == 0 {
            let files = self.shared.sets.iter().flat_map(|set| &set.files);
            let names: Vec<_> = files.map(|file| file.path.display().to_string()).collect();
            return Err(Error::Invalid(format!(
                "{}: no row is left to train on: {}",
                names.join(", "),
                dataset.stats()
            )));
        }
        self.block += 1;
        Ok(Documents { start, dataset, last: self.ended })
    }

    /// Leaves out rows up to the next document of a set; whether there is none.
    fn settle(&mut self, set: usize, dataset: &mut Dataset) -> Result<bool> {
        let min_sample_len = self.shared.options.min_sample_len;
        loop {
            let reader = &mut self.sets[set];
            match reader.rows.front() {
                Some(row) if row.is_left(min_sample_len) => return Ok(false),
                Some(_) => {
                    let row = reader.rows.pop_front().expect("there is one");
                    reader.position.rows += 1;
                    let index = file_of(dataset, &reader.file, row.place);
                    dataset.note_unused(index, row.unused);
                    dataset.count_row();
                    if let Err(reason) = filtered(row.outcome, min_sample_len) {
                        dataset.drop_row((index, row.place.number()), reason);
                    }
                }
                None if reader.ended => return Ok(true),
                None => self.fill(set)?,
            }
        }
    }

    /// Puts the documents of a set's next row, which is there, into the block.
    fn take(&mut self, set: usize, dataset: &mut Dataset) -> Result<()> {
        let reader = &mut self.sets[set];
        let Some(row) = reader.rows.pop_front() else { return Ok(()) };
        reader.position.rows += 1;
        let index = file_of(dataset, &reader.file, row.place);
        dataset.note_unused(index, row.unused);
        dataset.count_row();
        if let Ok((documents, notes)) = filtered(row.outcome, self.shared.options.min_sample_len) {
            let pushed = dataset.push_row(&documents, notes, Some((index, row.place.number())));
            pushed.map_err(|message| row.place.refuse(&reader.file, message))?;
        }
        Ok(())
    }

    /// Reads and encodes the next chunk of a set.
    fn fill(&mut self, set: usize) -> Result<()> {
        let Shared { sets, encoder, options } = &self.shared;
        let reader = &mut self.sets[set];
        let SetPosition { before, rows, passes, .. } = reader.position;
        reader.position = SetPosition { chunk: reader.source.position(), before: before + rows, rows: 0, passes };
        let left = options.max_samples.map_or(CHUNK, |most| most.saturating_sub(reader.position.before).min(CHUNK));
        let next = if left > 0 { reader.source.next(left)? } else { None };
        let Some((file, rows)) = next else {
            reader.ended = true;
            return Ok(());
        };
        reader.file.clone_from(&sets[set].files[file].path);
        let rows = encode_rows(&reader.file, rows, &sets[set].mapping, &**encoder, &options.encode);
        reader.rows = rows.into_iter().collect::<Result<_>>()?;
        Ok(())
    }
}

impl SetReader {
    fn new(source: RowSource) -> Self {
        Self { source, position: SetPosition::default(), rows: VecDeque::new(), file: PathBuf::new(), ended: false }
    }
}

/// A file's place among those of a data set, in which it is made if it is not there.
fn file_of(dataset: &mut Dataset, path: &std::path::Path, place: RowPlace) -> u32 {
    dataset.file_index(path).unwrap_or_else(|| dataset.add_file(path, matches!(place, RowPlace::Row(_))))
}

fn turns(shared: &Shared, epoch: u64) -> Turns {
    let StreamOptions { mix_strategy, interleave_probs, seed, .. } = &shared.options;
    Turns::new(shared.sets.len(), *mix_strategy, interleave_probs, derive_seed(*seed, &[epoch]))
}
