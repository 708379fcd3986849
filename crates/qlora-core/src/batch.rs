//! A micro-batch: documents one after the other, each token with the token it has to predict.

use qlora_kernels::SequenceLayout;
pub use qlora_kernels::ops::linear_cross_entropy::IGNORE_INDEX;

/// Documents without padding, ready for a model's forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The token ids of all documents, one after the other.
    pub tokens: Vec<u32>,
    /// For each token, the id of the one that follows it in its document if that one is trained, else [`IGNORE_INDEX`].
    pub targets: Vec<i64>,
    /// The bounds of the documents.
    pub layout: SequenceLayout,
}

impl Batch {
    /// Puts documents together. Each is its token ids and, in Hugging Face's convention, its labels: for every token its
    /// own id where it is trained and [`IGNORE_INDEX`] where it is not. The shift by one happens here, within each
    /// document: no token predicts another document's first one.
    ///
    /// # Panics
    /// If a document's ids and labels differ in length.
    pub fn from_documents<'a>(documents: impl IntoIterator<Item = (&'a [u32], &'a [i64])>) -> Self {
        let (mut tokens, mut targets, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for (ids, labels) in documents {
            assert_eq!(ids.len(), labels.len(), "a document needs one label a token");
            tokens.extend_from_slice(ids);
            targets.extend(labels.iter().skip(1));
            if !ids.is_empty() {
                targets.push(IGNORE_INDEX);
            }
            lengths.push(ids.len());
        }
        Self { tokens, targets, layout: SequenceLayout::from_lengths(&lengths) }
    }

    /// The number of tokens that have a target: the divisor of an optimizer step's loss, summed over its micro-batches.
    pub fn trained_tokens(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE_INDEX).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_shifted_within_each_document() {
        let batch = Batch::from_documents([(&[5, 6, 7][..], &[-100, 6, 7][..]), (&[8, 9], &[8, -100])]);
        assert_eq!(batch.tokens, [5, 6, 7, 8, 9]);
        assert_eq!(batch.targets, [6, 7, -100, -100, -100]);
        assert_eq!(batch.trained_tokens(), 2);
        assert_eq!(**batch.layout.positions(), [0, 1, 2, 0, 1]);
    }
}
