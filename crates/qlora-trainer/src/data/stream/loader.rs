//! Whole optimizer steps out of a stream.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use qlora_core::batch::Batch;

use super::reader::{BlockReader, Documents, ReaderPosition};
use super::{Shared, Stream, StreamPosition, is_pipe};
use crate::data::dataset::Dataset;
use crate::data::loader::{Position, StepBatch};
use crate::data::order::{LargestBatch, LoaderOptions, Order};
use crate::error::{Error, Result};

/// Looks at documents before they are trained on.
type Check = dyn Fn(&Dataset) -> Result<()> + Send;

/// Yields the steps of a run over a stream. As with a [`Loader`](crate::data::Loader) the last step of an epoch has what is left.
pub struct StreamLoader {
    shared: Shared,
    options: LoaderOptions,
    start: ReaderPosition,
    identity: String,
    /// Looks at the documents of each block before they are trained on.
    check: Box<Check>,
    position: Position,
    block: Option<Block>,
    /// A reader that is open, until it is needed.
    reader: Option<BlockReader>,
    ahead: Option<Receiver<Result<Documents>>>,
    /// The documents of the last step.
    step: Dataset,
}

/// Documents in the order in which they are trained on.
struct Block {
    documents: Documents,
    items: Vec<Vec<usize>>,
    /// Items that are used up.
    used: usize,
}

impl Block {
    fn new(documents: Documents, options: LoaderOptions) -> Result<Self> {
        let ReaderPosition { epoch, block, .. } = documents.start;
        let items = match documents.dataset.is_empty() {
            true => Vec::new(),
            false => Order::new(&documents.dataset, options)?.of_block(epoch, block),
        };
        Ok(Self { documents, items, used: 0 })
    }

    fn is_used_up(&self) -> bool {
        self.used == self.items.len()
    }
}

impl StreamLoader {
    /// A loader at the start of the first epoch. `check` looks at the documents of each block before they are trained on.
    ///
    /// # Errors
    /// If a size is 0, or `check` refuses the first block.
    pub fn new(
        stream: Stream,
        options: LoaderOptions,
        check: impl Fn(&Dataset) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let Stream { shared, start, first, reader, identity } = stream;
        check(&first.dataset)?;
        Ok(Self {
            shared,
            options,
            start,
            identity,
            check: Box::new(check),
            position: Position::default(),
            block: Some(Block::new(first, options)?),
            reader: Some(reader),
            ahead: None,
            step: Dataset::new(),
        })
    }

    /// The stream, to keep, if no step was taken from it.
    pub(crate) fn into_stream(self) -> Option<Stream> {
        let Self { shared, start, block, reader, identity, .. } = self;
        Some(Stream { shared, start, first: block?.documents, reader: reader?, identity })
    }

    /// The fingerprint of the data.
    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    /// The most that a micro-batch of a run can have: documents of `max_length` tokens, all of them trained.
    pub fn largest_batch(&self) -> LargestBatch {
        largest_batch(self.options, self.shared.options.encode.max_length)
    }

    /// The number of epochs and steps that are done.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The position in the files at which the next step begins.
    pub fn stream_position(&self) -> StreamPosition {
        match &self.block {
            Some(block) => StreamPosition { block: block.documents.start.clone(), items: block.used },
            None => StreamPosition { block: self.start.clone(), items: 0 },
        }
    }

    /// Goes to a position.
    ///
    /// # Errors
    /// If it is not one of this stream, or the files are no longer what they were.
    pub fn seek(&mut self, position: Position, stream: &StreamPosition) -> Result<()> {
        let here = self.block.as_ref().is_some_and(|block| block.documents.start == stream.block);
        if !here {
            self.go_to(&stream.block)?;
        }
        let block = self.block.as_mut().expect("it was read");
        if stream.items > block.items.len() {
            let (then, now) = (stream.items, block.items.len());
            return Err(Error::Invalid(format!(
                "the data is not what it was: {then} items of a block were trained on that has {now}"
            )));
        }
        block.used = stream.items;
        self.position = position;
        Ok(())
    }

    fn go_to(&mut self, position: &ReaderPosition) -> Result<()> {
        let piped = self.shared.sets.iter().flat_map(|set| &set.files).any(|file| is_pipe(&file.path));
        self.ahead = None;
        if piped {
            // The same bytes have to come through it again; what is behind the position is read and left.
            loop {
                self.next_block()?;
                let reached = &self.block.as_ref().expect("it was read").documents.start;
                if reached == position {
                    return Ok(());
                }
                if (reached.epoch, reached.block) >= (position.epoch, position.block) {
                    return Err(Error::Invalid("the data that comes through the pipe is not what it was".to_owned()));
                }
            }
        }
        self.reader = Some(BlockReader::at(self.shared.clone(), self.start.clone(), position)?);
        self.block = None;
        self.next_block()
    }

    /// Waits for the next block; the thread that read it goes on with the one behind it.
    fn next_block(&mut self) -> Result<()> {
        let ahead = match &self.ahead {
            Some(ahead) => ahead,
            None => {
                let mut reader = match self.reader.take() {
                    Some(reader) => reader,
                    None => BlockReader::at(self.shared.clone(), self.start.clone(), &self.start)?,
                };
                // Nothing waits in the channel: the thread has read one block, and hands it over when it is asked for.
                let (sender, receiver) = sync_channel(0);
                let read = move || {
                    loop {
                        let block = reader.block();
                        let failed = block.is_err();
                        if sender.send(block).is_err() || failed {
                            return;
                        }
                    }
                };
                thread::Builder::new()
                    .name("data".to_owned())
                    .spawn(read)
                    .map_err(|error| Error::Invalid(format!("no thread can be started to read the data: {error}")))?;
                self.ahead.insert(receiver)
            }
        };
        let lost = || Err(Error::Invalid("the thread that reads the data has ended".to_owned()));
        let documents = ahead.recv().unwrap_or_else(|_| lost())?;
        (self.check)(&documents.dataset)?;
        self.block = Some(Block::new(documents, self.options)?);
        Ok(())
    }

    /// The next step; after the last of an epoch comes the first of the next one.
    ///
    /// # Errors
    /// If rows cannot be read, or are refused.
    pub fn next_step(&mut self) -> Result<StepBatch> {
        let window = self.options.batch_size * self.options.accumulation;
        self.step = Dataset::new();
        let mut items: Vec<Vec<usize>> = Vec::new();
        while items.len() < window {
            let Some(block) = self.block.as_mut().filter(|block| !block.is_used_up()) else {
                let ended = self.block.as_ref().is_some_and(|block| block.documents.last);
                if ended && !items.is_empty() {
                    break;
                }
                self.next_block()?;
                continue;
            };
            let first = self.step.len();
            let item = &block.items[block.used];
            item.iter().for_each(|&document| self.step.push_from(&block.documents.dataset, document));
            items.push((first..first + item.len()).collect());
            block.used += 1;
        }
        let block = self.block.as_ref().expect("items are of a block");
        self.position = match block.is_used_up() && block.documents.last {
            true => Position { epoch: block.documents.start.epoch + 1, step: 0 },
            false => Position { epoch: block.documents.start.epoch, step: self.position.step + 1 },
        };
        let documents: Vec<Vec<usize>> = items.chunks(self.options.batch_size).map(<[Vec<usize>]>::concat).collect();
        let micro_batches: Vec<_> = documents.iter().map(|documents| self.step.batch(documents)).collect();
        let num_items = micro_batches.iter().map(Batch::trained_tokens).sum();
        let groups = documents.iter().map(Vec::len).sum::<usize>() / self.step.group_size();
        Ok(StepBatch { micro_batches, documents, num_items, groups })
    }

    /// Documents of a row in the last step.
    pub(crate) fn group_size(&self) -> usize {
        self.step.group_size()
    }

    /// The origin of a document of the last step.
    pub fn origin(&self, document: usize) -> String {
        self.step.origin(document)
    }
}

/// The most that a micro-batch of a stream can have.
pub(crate) fn largest_batch(options: LoaderOptions, max_length: usize) -> LargestBatch {
    let tokens = options.batch_size * max_length;
    // A document has at least two tokens, so that one predicts the other.
    let sequences = options.packing.map_or(options.batch_size, |capacity| options.batch_size * (capacity / 2).max(1));
    LargestBatch { tokens, trained_tokens: tokens, sequences, uniform_len: None }
}

impl std::fmt::Debug for StreamLoader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamLoader").field("position", &self.position).finish_non_exhaustive()
    }
}
