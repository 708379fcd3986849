//! The order of the documents and their division into micro-batches: known before a run begins.

use super::dataset::Dataset;
use super::packing::best_fit_decreasing;
use crate::config::{SamplingStrategy, TrainConfig};
use crate::error::{Error, Result};
use crate::rng::{derive_seed, permutation};

/// The division of a data set into steps by a [`Loader`](super::Loader).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Items in a micro-batch.
    pub batch_size: usize,
    /// Micro-batches in a step.
    pub accumulation: usize,
    /// Shuffle every epoch with this seed; `None` keeps the order of the data.
    pub shuffle: Option<u64>,
    /// Pack documents into bins of this many tokens, pairs into bins of twice as many; `None` makes every document or pair an
    /// item.
    pub packing: Option<usize>,
}

impl From<&TrainConfig> for LoaderOptions {
    fn from(config: &TrainConfig) -> Self {
        let options = &config.training;
        let random = options.train_sampling_strategy == SamplingStrategy::Random;
        Self {
            batch_size: options.per_device_train_batch_size,
            accumulation: options.gradient_accumulation_steps,
            shuffle: random.then(|| options.resolved_data_seed()),
            packing: config.data.packing.then_some(config.data.max_length),
        }
    }
}

/// The items of a data set and the order of every epoch.
#[derive(Clone, Debug)]
pub(super) struct Order {
    options: LoaderOptions,
    /// The documents of each item.
    items: Vec<Vec<usize>>,
}

/// The largest micro-batch of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LargestBatch {
    /// The most tokens of a micro-batch.
    pub tokens: usize,
    /// The most tokens with a loss; another micro-batch may have them.
    pub trained_tokens: usize,
    /// The most documents; another micro-batch may have them.
    pub sequences: usize,
    /// The length of every document of every micro-batch, if it is the same.
    pub uniform_len: Option<usize>,
}

impl Order {
    pub(super) fn new(dataset: &Dataset, options: LoaderOptions) -> Result<Self> {
        if dataset.is_empty() {
            return Err(Error::Invalid("the training data is empty".to_owned()));
        }
        if options.batch_size == 0 || options.accumulation == 0 {
            return Err(Error::Invalid("batch size and accumulation must be at least 1".to_owned()));
        }
        // Documents of a group are computed together: a group is never cut.
        let size = dataset.group_size();
        let documents = |group: usize| size * group..size * (group + 1);
        let groups = dataset.len() / size;
        let items = match options.packing {
            None => (0..groups).map(|group| documents(group).collect()).collect(),
            Some(capacity) => {
                let capacity = capacity * size;
                let length = |group| documents(group).map(|i| dataset.document_len(i)).sum();
                let lengths: Vec<usize> = (0..groups).map(length).collect();
                if let Some(group) = lengths.iter().position(|&length| length > capacity) {
                    let (origin, length) = (dataset.origin(documents(group).start), lengths[group]);
                    return Err(Error::Invalid(format!(
                        "{origin}: {length} tokens do not fit into a bin of {capacity}"
                    )));
                }
                let bins = best_fit_decreasing(&lengths, capacity).into_iter();
                bins.map(|bin| bin.into_iter().flat_map(documents).collect()).collect()
            }
        };
        Ok(Self { options, items })
    }

    pub(super) fn items(&self) -> usize {
        self.items.len()
    }

    pub(super) fn steps_per_epoch(&self) -> usize {
        self.items.len().div_ceil(self.options.batch_size).div_ceil(self.options.accumulation)
    }

    /// The documents of each item, in the order of one block of an epoch's stream.
    pub(super) fn of_block(&self, epoch: u64, block: u64) -> Vec<Vec<usize>> {
        match self.options.shuffle {
            Some(seed) => {
                let order = permutation(self.items.len(), derive_seed(seed, &[epoch, block]));
                order.into_iter().map(|item| self.items[item].clone()).collect()
            }
            None => self.items.clone(),
        }
    }

    /// The items in the order of an epoch.
    pub(super) fn epoch(&self, epoch: u64) -> Vec<usize> {
        match self.options.shuffle {
            Some(seed) => permutation(self.items.len(), derive_seed(seed, &[epoch])),
            None => (0..self.items.len()).collect(),
        }
    }

    /// The documents of each micro-batch of a step, in an epoch of this order.
    pub(super) fn micro_batches<'a>(
        &'a self,
        epoch: &'a [usize],
        step: usize,
    ) -> impl Iterator<Item = Vec<usize>> + 'a {
        let window = self.options.batch_size * self.options.accumulation;
        let start = step * window;
        epoch[start..epoch.len().min(start + window)]
            .chunks(self.options.batch_size)
            .map(|items| items.iter().flat_map(|&item| self.items[item].iter().copied()).collect())
    }
}

/// The largest micro-batch of a run over a data set; `steps` says how many optimizer steps the run has, given those of an
/// epoch. Memory is planned for it: what the order never brings together need not fit.
///
/// # Errors
/// As [`Loader::new`](super::Loader::new).
pub fn largest_batch(
    dataset: &Dataset,
    options: LoaderOptions,
    steps: impl FnOnce(usize) -> u64,
) -> Result<LargestBatch> {
    let order = Order::new(dataset, options)?;
    let per_epoch = order.steps_per_epoch();
    let steps = steps(per_epoch);
    let trained: Vec<usize> = (0..dataset.len()).map(|i| dataset.trained_tokens(i)).collect();
    let first = dataset.document_len(0);
    let alike = (0..dataset.len()).all(|i| dataset.document_len(i) == first);
    let mut largest = LargestBatch { uniform_len: alike.then_some(first), ..LargestBatch::default() };
    // Without shuffling every epoch is the first one.
    let epochs = if options.shuffle.is_some() { steps.div_ceil(per_epoch as u64) } else { 1 };
    for epoch in 0..epochs {
        let items = order.epoch(epoch);
        let left = usize::try_from(steps - epoch * per_epoch as u64).unwrap_or(usize::MAX);
        for documents in (0..per_epoch.min(left)).flat_map(|step| order.micro_batches(&items, step)) {
            let sum = |of: &dyn Fn(usize) -> usize| documents.iter().map(|&i| of(i)).sum::<usize>();
            largest.tokens = largest.tokens.max(sum(&|i| dataset.document_len(i)));
            largest.trained_tokens = largest.trained_tokens.max(sum(&|i| trained[i]));
            largest.sequences = largest.sequences.max(documents.len());
        }
    }
    Ok(largest)
}

#[cfg(test)]
mod tests {
    use super::super::encode::Encoded;
    use super::super::loader::Loader;
    use super::*;

    fn dataset(lengths: &[usize]) -> Dataset {
        let document = |&length: &usize| Encoded {
            ids: vec![1; length],
            trained: (0..length).map(|place| place >= length / 2).collect(),
        };
        Dataset::from_encoded(lengths.iter().map(document)).unwrap()
    }

    #[test]
    fn the_largest_batch_is_that_of_the_steps_that_run() {
        let lengths: Vec<usize> = (0..37).map(|i| 2 + (i * 17) % 41).collect();
        for packing in [None, Some(64)] {
            for steps in [1, 3, 8, 30] {
                let options = LoaderOptions { batch_size: 3, accumulation: 2, shuffle: Some(5), packing };
                let mut loader = Loader::new(dataset(&lengths), options).unwrap();
                let mut expected = LargestBatch::default();
                for _ in 0..steps {
                    for batch in loader.next_step().micro_batches {
                        expected.tokens = expected.tokens.max(batch.tokens.len());
                        expected.trained_tokens = expected.trained_tokens.max(batch.trained_tokens());
                        expected.sequences = expected.sequences.max(batch.layout.sequences().len());
                    }
                }
                assert_eq!(
                    largest_batch(&dataset(&lengths), options, |_| steps).unwrap(),
                    expected,
                    "{packing:?} {steps}"
                );
            }
        }
    }

    #[test]
    fn documents_of_one_length_are_known() {
        let options = LoaderOptions { batch_size: 2, accumulation: 1, shuffle: None, packing: None };
        let largest = largest_batch(&dataset(&[8; 5]), options, |per_epoch| 3 * per_epoch as u64).unwrap();
        assert_eq!(largest, LargestBatch { tokens: 16, trained_tokens: 8, sequences: 2, uniform_len: Some(8) });
    }
}
