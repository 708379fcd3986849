//! Whole optimizer steps out of a data set, shuffled, from any position.
//!
//! An item is a document, or a group of documents that belong together, or with packing a bin of them. A micro-batch is `batch_size` items without padding, a step
//! is `accumulation` micro-batches. The last step of an epoch has what is left: its last micro-batch may be smaller and it
//! may have fewer micro-batches. Because a step is handed over whole, the number of its trained tokens is known before
//! its first micro-batch runs.
//!
//! The order of an epoch depends on the seed and the epoch's number alone, so a position is two numbers.

use qlora_core::batch::Batch;
use serde::{Deserialize, Serialize};

use super::dataset::Dataset;
use super::order::{LoaderOptions, Order};
use crate::error::{Error, Result};

/// The position of a run in its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Whole epochs behind.
    pub epoch: u64,
    /// Steps behind in this epoch.
    pub step: usize,
}

/// Everything an optimizer step trains on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepBatch {
    /// The micro-batches.
    pub micro_batches: Vec<Batch>,
    /// The documents of each micro-batch, as indices into the data set.
    pub documents: Vec<Vec<usize>>,
    /// Trained tokens of all micro-batches: the divisor of the step's loss.
    pub num_items: usize,
    /// Groups of documents of all micro-batches: the divisor of the loss of an objective over groups.
    pub groups: usize,
}

impl StepBatch {
    /// Tokens of all micro-batches.
    pub fn tokens(&self) -> usize {
        self.micro_batches.iter().map(|batch| batch.tokens.len()).sum()
    }
}

/// Yields the steps of a run.
#[derive(Clone, Debug)]
pub struct Loader {
    dataset: Dataset,
    whole: Order,
    position: Position,
    /// The order of the items in the epoch of the position, once it was needed.
    order: Option<(u64, Vec<usize>)>,
}

impl Loader {
    /// A loader at the start of the first epoch.
    ///
    /// # Errors
    /// If the data set is empty, a size is 0, or a document is longer than a bin.
    pub fn new(dataset: Dataset, options: LoaderOptions) -> Result<Self> {
        let whole = Order::new(&dataset, options)?;
        Ok(Self { dataset, whole, position: Position::default(), order: None })
    }

    /// The data set.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// The data set, to keep.
    pub fn into_dataset(self) -> Dataset {
        self.dataset
    }

    /// Items (documents or bins) in an epoch.
    pub fn items(&self) -> usize {
        self.whole.items()
    }

    /// Optimizer steps in an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.whole.steps_per_epoch()
    }

    /// The position at which the next step begins.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes to a position.
    ///
    /// # Errors
    /// If an epoch has fewer steps.
    pub fn seek(&mut self, position: Position) -> Result<()> {
        let steps = self.steps_per_epoch();
        if position.step >= steps {
            let step = position.step;
            return Err(Error::Invalid(format!("there is no step {step} in an epoch of {steps} steps")));
        }
        self.position = position;
        Ok(())
    }

    /// Epochs behind, with the fraction of the current one.
    pub fn epochs(&self) -> f64 {
        let steps = self.steps_per_epoch();
        (self.position.epoch * steps as u64 + self.position.step as u64) as f64 / steps as f64
    }

    /// The next step; after the last of an epoch comes the first of the next one.
    pub fn next_step(&mut self) -> StepBatch {
        let epoch = self.position.epoch;
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            self.order = Some((epoch, self.whole.epoch(epoch)));
        }
        let order = &self.order.as_ref().expect("just set").1;
        let documents: Vec<Vec<usize>> = self.whole.micro_batches(order, self.position.step).collect();
        let micro_batches: Vec<_> = documents.iter().map(|documents| self.dataset.batch(documents)).collect();
        let num_items = micro_batches.iter().map(Batch::trained_tokens).sum();
        let groups = documents.iter().map(Vec::len).sum::<usize>() / self.dataset.group_size();

        self.position.step += 1;
        if self.position.step == self.steps_per_epoch() {
            self.position = Position { epoch: epoch + 1, step: 0 };
        }
        StepBatch { micro_batches, documents, num_items, groups }
    }
}

/// The micro-batches of an evaluation: all documents once, in order, `batch_size` groups at a time.
pub fn eval_batches(dataset: &Dataset, batch_size: usize) -> impl ExactSizeIterator<Item = Batch> + '_ {
    let all: Vec<usize> = (0..dataset.len()).collect();
    let documents = batch_size.max(1) * dataset.group_size();
    let starts = (0..all.len()).step_by(documents);
    starts.map(move |start| dataset.batch(&all[start..all.len().min(start + documents)]))
}

#[cfg(test)]
mod tests {
    use super::super::encode::Encoded;
    use super::*;

    /// Document `i` has `lengths[i]` tokens, all with the id `i`, trained from the second on.
    fn dataset(lengths: &[usize]) -> Dataset {
        let document = |(i, &length): (usize, &usize)| Encoded {
            ids: vec![i as u32; length],
            trained: (0..length).map(|place| place > 0).collect(),
        };
        Dataset::from_encoded(lengths.iter().enumerate().map(document)).unwrap()
    }

    const OPTIONS: LoaderOptions = LoaderOptions { batch_size: 2, accumulation: 3, shuffle: Some(7), packing: None };

    fn loader(documents: usize, options: LoaderOptions) -> Loader {
        let lengths: Vec<usize> = (0..documents).map(|i| 2 + i % 5).collect();
        Loader::new(dataset(&lengths), options).unwrap()
    }

    #[test]
    fn an_epoch_has_every_document_once_and_a_partial_end() {
        let mut loader = loader(15, OPTIONS);
        assert_eq!(loader.steps_per_epoch(), 3);
        for epoch in 0..3 {
            let steps: Vec<_> = (0..3).map(|_| loader.next_step()).collect();
            let shape: Vec<Vec<usize>> = steps.iter().map(|s| s.documents.iter().map(Vec::len).collect()).collect();
            assert_eq!(shape, [vec![2, 2, 2], vec![2, 2, 2], vec![2, 1]]);
            let mut seen: Vec<_> = steps.iter().flat_map(|step| step.documents.concat()).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..15).collect::<Vec<_>>());
            assert_eq!(loader.position(), Position { epoch: epoch + 1, step: 0 });
            for step in &steps {
                let trained: usize = step.documents.concat().iter().map(|i| 1 + i % 5).sum();
                assert_eq!(step.num_items, trained);
                assert_eq!(step.tokens(), trained + step.documents.concat().len());
            }
        }
    }

    #[test]
    fn epochs_differ_and_repeat_with_the_seed() {
        let order = |options, epochs: usize| -> Vec<usize> {
            let mut loader = loader(15, options);
            (0..3 * epochs).flat_map(|_| loader.next_step().documents.concat()).collect()
        };
        let run = order(OPTIONS, 2);
        assert_eq!(run, order(OPTIONS, 2));
        assert_ne!(run[..15], run[15..]);
        assert_ne!(run, order(LoaderOptions { shuffle: Some(8), ..OPTIONS }, 2));
        let sequential = order(LoaderOptions { shuffle: None, ..OPTIONS }, 2);
        assert_eq!(sequential, (0..15).chain(0..15).collect::<Vec<_>>());
    }

    #[test]
    fn the_split_into_micro_batches_does_not_change_the_steps() {
        let contents = |batch_size, accumulation| -> Vec<Vec<usize>> {
            let mut loader = loader(15, LoaderOptions { batch_size, accumulation, ..OPTIONS });
            (0..loader.steps_per_epoch()).map(|_| loader.next_step().documents.concat()).collect()
        };
        let reference = contents(6, 1);
        for (batch_size, accumulation) in [(3, 2), (2, 3), (1, 6)] {
            assert_eq!(contents(batch_size, accumulation), reference);
        }
    }

    #[test]
    fn any_position_can_be_reached() {
        let mut from_start = loader(15, OPTIONS);
        for i in 0..7 {
            let position = from_start.position();
            assert_eq!(from_start.epochs(), i as f64 / 3.0);
            let expected = from_start.next_step();
            let mut sought = loader(15, OPTIONS);
            sought.seek(position).unwrap();
            assert_eq!(sought.next_step(), expected);
        }
        let refusal = from_start.seek(Position { epoch: 0, step: 3 }).unwrap_err().to_string();
        assert_eq!(refusal, "there is no step 3 in an epoch of 3 steps");
    }

    #[test]
    fn packed_epochs_have_the_same_documents_as_separate_sequences() {
        let options = LoaderOptions { batch_size: 1, accumulation: 2, shuffle: Some(1), packing: Some(8) };
        let mut packed = loader(15, options);
        assert!(packed.items() < 15);
        let mut seen: Vec<usize> = Vec::new();
        for _ in 0..packed.steps_per_epoch() {
            let step = packed.next_step();
            for (batch, documents) in step.micro_batches.iter().zip(&step.documents) {
                assert!(batch.tokens.len() <= 8);
                let sequences: Vec<_> = batch.layout.sequences().collect();
                assert_eq!(sequences.len(), documents.len());
                for (rows, &document) in sequences.iter().zip(documents) {
                    assert!(batch.tokens[rows.clone()].iter().all(|&token| token == document as u32));
                    // Nothing predicts a document's first token, so nothing crosses documents.
                    assert_eq!(batch.targets[rows.end - 1], -100);
                    assert_eq!(batch.layout.positions()[rows.start], 0);
                }
                seen.extend(documents);
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..15).collect::<Vec<_>>());
    }

    #[test]
    fn evaluation_goes_through_everything_in_order() {
        let dataset = dataset(&[2, 3, 4, 2, 2]);
        let tokens: Vec<Vec<u32>> = eval_batches(&dataset, 2).map(|batch| batch.tokens).collect();
        assert_eq!(tokens, [vec![0, 0, 1, 1, 1], vec![2, 2, 2, 2, 3, 3], vec![4, 4]]);
    }

    #[test]
    fn groups_stay_together() {
        let lengths: Vec<usize> = (0..30).map(|i| 2 + i % 5).collect();
        let all = dataset(&lengths);
        let documents: Vec<Vec<u32>> = (0..30).map(|i| all.document(i).ids.to_vec()).collect();
        let encoded = || documents.iter().map(|ids| Encoded { trained: vec![true; ids.len()], ids: ids.clone() });
        for packing in [None, Some(8)] {
            let pairs = Dataset::from_groups(2, encoded()).unwrap();
            let mut loader = Loader::new(pairs, LoaderOptions { packing, ..OPTIONS }).unwrap();
            let mut seen = Vec::new();
            for _ in 0..loader.steps_per_epoch() {
                let step = loader.next_step();
                assert_eq!(2 * step.groups, step.documents.concat().len());
                for (batch, documents) in step.micro_batches.iter().zip(&step.documents) {
                    assert!(packing.is_none_or(|capacity| batch.tokens.len() <= 2 * 2 * capacity));
                    assert!(
                        documents.chunks(2).all(|pair| pair[0] % 2 == 0 && pair[1] == pair[0] + 1),
                        "{documents:?}"
                    );
                    seen.extend(documents.iter().copied());
                }
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..30).collect::<Vec<_>>());
        }
        let batches: Vec<_> =
            eval_batches(loader_pairs(encoded()).dataset(), 4).map(|batch| batch.layout.sequences().len()).collect();
        assert_eq!(batches, [8, 8, 8, 6]);
        let error = Dataset::from_groups(4, encoded()).unwrap_err().to_string();
        assert_eq!(error, "30 documents do not make groups of 4");
        let plain = Dataset::from_encoded(encoded()).unwrap().fingerprint();
        assert_ne!(Dataset::from_groups(2, encoded()).unwrap().fingerprint(), plain);
    }

    fn loader_pairs(documents: impl Iterator<Item = Encoded>) -> Loader {
        Loader::new(Dataset::from_groups(2, documents).unwrap(), OPTIONS).unwrap()
    }

    #[test]
    fn unusable_options_are_refused() {
        let refusal = |dataset, options| Loader::new(dataset, options).unwrap_err().to_string();
        assert_eq!(refusal(Dataset::new(), OPTIONS), "the training data is empty");
        let zero = LoaderOptions { batch_size: 0, ..OPTIONS };
        assert!(refusal(dataset(&[2]), zero).contains("at least 1"));
        let small = LoaderOptions { packing: Some(4), ..OPTIONS };
        assert_eq!(refusal(dataset(&[2, 5]), small), "document 1: 5 tokens do not fit into a bin of 4");
    }
}
