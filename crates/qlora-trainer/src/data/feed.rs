//! The training data of a run: data in memory, or a stream.

use std::fmt;

use super::dataset::{DataStats, Dataset};
use super::loader::{Loader, Position, StepBatch};
use super::order::{LargestBatch, LoaderOptions, largest_batch};
use super::stream::{Stream, StreamLoader, StreamPosition};
use crate::config::TrainConfig;
use crate::error::{Error, Result};

/// The data to train on.
#[derive(Debug)]
#[non_exhaustive]
pub enum TrainingData {
    /// Everything, in memory.
    Whole(Box<Dataset>),
    /// Read while it is trained on.
    Stream(Box<Stream>),
}

impl From<Dataset> for TrainingData {
    fn from(data: Dataset) -> Self {
        Self::Whole(Box::new(data))
    }
}

impl From<Stream> for TrainingData {
    fn from(stream: Stream) -> Self {
        Self::Stream(Box::new(stream))
    }
}

impl TrainingData {
    /// The data that was read; of a stream the first block.
    pub fn read(&self) -> &Dataset {
        match self {
            Self::Whole(data) => data,
            Self::Stream(stream) => stream.first_block(),
        }
    }

    /// The statistics of the data that was read; of a stream those of the first block.
    pub fn stats(&self) -> &DataStats {
        self.read().stats()
    }

    /// Stands for the data: its tokens; of a stream the sizes of its files and its first documents.
    pub fn fingerprint(&self) -> String {
        match self {
            Self::Whole(data) => data.fingerprint().to_string(),
            Self::Stream(stream) => stream.identity().to_owned(),
        }
    }

    /// Remarks on data that was not used or left out; of a stream in the first block.
    pub fn remarks(&self) -> Vec<String> {
        self.read().remarks()
    }

    /// The largest micro-batch of a configured run. The contents of a stream are not known in advance: its batches are
    /// taken to be full of documents of `max_length` tokens.
    ///
    /// # Errors
    /// As [`Loader::new`].
    pub fn largest_batch(&self, config: &TrainConfig) -> Result<LargestBatch> {
        let options = LoaderOptions::from(config);
        match self {
            Self::Whole(data) => largest_batch(data, options, |per_epoch| config.training.total_steps(per_epoch)),
            Self::Stream(_) => Ok(super::stream::largest_batch(options, config.data.max_length)),
        }
    }
}

/// Formats the statistics of the data for people.
impl fmt::Display for TrainingData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(data) => data.stats().fmt(f),
            Self::Stream(stream) => write!(f, "streamed; what is read first: {}", stream.first_block().stats()),
        }
    }
}

/// The position of a run in its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FeedPosition {
    pub(crate) position: Position,
    /// The same position in a stream.
    pub(crate) stream: Option<StreamPosition>,
}

/// Yields the steps of a run.
#[derive(Debug)]
pub(crate) enum Feed {
    Whole(Box<Loader>),
    Stream(Box<StreamLoader>),
}

impl Feed {
    /// `check` looks at documents before they are trained on.
    pub(crate) fn new(
        data: TrainingData,
        options: LoaderOptions,
        check: impl Fn(&Dataset) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        match data {
            TrainingData::Whole(data) => {
                check(&data)?;
                Ok(Self::Whole(Box::new(Loader::new(*data, options)?)))
            }
            TrainingData::Stream(stream) => Ok(Self::Stream(Box::new(StreamLoader::new(*stream, options, check)?))),
        }
    }

    /// The data, to keep, of a run that has not begun.
    pub(crate) fn into_data(self) -> Result<TrainingData> {
        match self {
            Self::Whole(loader) => Ok(loader.into_dataset().into()),
            Self::Stream(loader) => {
                let begun = || Error::Invalid("the stream of data was begun already".to_owned());
                loader.into_stream().map(TrainingData::from).ok_or_else(begun)
            }
        }
    }

    /// The fingerprint of these data, for the identity of a run.
    pub(crate) fn identity(&self) -> String {
        match self {
            Self::Whole(loader) => {
                let dataset = loader.dataset();
                let (documents, tokens, fingerprint) = (dataset.len(), dataset.stats().tokens, dataset.fingerprint());
                format!("{documents} documents, {tokens} tokens, fingerprint {fingerprint}")
            }
            Self::Stream(loader) => loader.identity().to_owned(),
        }
    }

    /// Documents of a row: 1, or 2 where rows are pairs of answers.
    pub(crate) fn group_size(&self) -> usize {
        match self {
            Self::Whole(loader) => loader.dataset().group_size(),
            Self::Stream(loader) => loader.group_size(),
        }
    }

    /// Documents of an epoch; of a stream it is not known.
    pub(crate) fn documents(&self) -> Option<usize> {
        match self {
            Self::Whole(loader) => Some(loader.dataset().len()),
            Self::Stream(_) => None,
        }
    }

    /// Optimizer steps of an epoch; of a stream it is not known.
    pub(crate) fn steps_per_epoch(&self) -> Option<usize> {
        match self {
            Self::Whole(loader) => Some(loader.steps_per_epoch()),
            Self::Stream(_) => None,
        }
    }

    /// Epochs behind; with the fraction of the current one, where it is known.
    pub(crate) fn epochs(&self) -> f64 {
        match self {
            Self::Whole(loader) => loader.epochs(),
            Self::Stream(loader) => loader.position().epoch as f64,
        }
    }

    pub(crate) fn position(&self) -> FeedPosition {
        match self {
            Self::Whole(loader) => FeedPosition { position: loader.position(), stream: None },
            Self::Stream(loader) => {
                FeedPosition { position: loader.position(), stream: Some(loader.stream_position()) }
            }
        }
    }

    pub(crate) fn seek(&mut self, to: &FeedPosition) -> Result<()> {
        match (self, &to.stream) {
            (Self::Whole(loader), _) => loader.seek(to.position),
            (Self::Stream(loader), Some(stream)) => loader.seek(to.position, stream),
            (Self::Stream(_), None) => Err(Error::Invalid("the position is not one of a stream".to_owned())),
        }
    }

    pub(crate) fn next_step(&mut self) -> Result<StepBatch> {
        match self {
            Self::Whole(loader) => Ok(loader.next_step()),
            Self::Stream(loader) => loader.next_step(),
        }
    }

    /// The origin of a document of the last step.
    pub(crate) fn origin(&self, document: usize) -> String {
        match self {
            Self::Whole(loader) => loader.dataset().origin(document),
            Self::Stream(loader) => loader.origin(document),
        }
    }
}
