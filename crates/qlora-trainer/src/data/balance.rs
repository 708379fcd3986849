//! How evenly the tokens of a run's steps lie on its ranks.
//!
//! Micro-batch `i` of a step belongs to rank `i % ranks`, whatever its length: a step's documents and their order do not depend on the
//! number of ranks. Packed bins are nearly full, so there is little to even out; documents that are not packed are as uneven as
//! their lengths.

use super::dataset::Dataset;
use super::order::{LoaderOptions, Order};
use crate::error::Result;

/// By how much the largest share of a step's tokens exceeds an equal one, over the whole steps of the first epoch: 0.01 is 1%. The
/// ranks wait for the largest share. The last step of an epoch, which may have less than a micro-batch for each rank, is not
/// counted unless it is the only one.
///
/// # Errors
/// As [`Loader::new`](super::Loader::new).
pub fn imbalance(dataset: &Dataset, options: LoaderOptions, ranks: usize) -> Result<f64> {
    let order = Order::new(dataset, options)?;
    let epoch = order.epoch(0);
    let full = options.batch_size * options.accumulation;
    let steps = (order.items() / full).max(1);
    let (mut largest, mut all) = (0, 0);
    for step in 0..steps {
        let mut shares = vec![0; ranks.max(1)];
        for (i, documents) in order.micro_batches(&epoch, step).enumerate() {
            shares[i % ranks.max(1)] += documents.iter().map(|&i| dataset.document_len(i)).sum::<usize>();
        }
        largest += shares.iter().max().copied().unwrap_or(0);
        all += shares.iter().sum::<usize>();
    }
    Ok(if all == 0 { 0.0 } else { (largest * ranks.max(1)) as f64 / all as f64 - 1.0 })
}

#[cfg(test)]
mod tests {
    use super::super::encode::Encoded;
    use super::*;

    fn dataset(lengths: impl IntoIterator<Item = usize>) -> Dataset {
        let document = |length| Encoded { ids: vec![1; length], trained: vec![true; length] };
        Dataset::from_encoded(lengths.into_iter().map(document)).unwrap()
    }

    fn options(batch_size: usize, accumulation: usize) -> LoaderOptions {
        LoaderOptions { batch_size, accumulation, shuffle: None, packing: None }
    }

    #[test]
    fn the_largest_share_of_each_step_counts() {
        // Two steps of two micro-batches of one document: 60 and 40, 50 and 50; the last has one micro-batch.
        let data = dataset([60, 40, 50, 50, 70]);
        assert!((imbalance(&data, options(1, 2), 2).unwrap() - 0.1).abs() < 1e-12);
        assert_eq!(imbalance(&data, options(1, 2), 1).unwrap(), 0.0);
        // An epoch that is one step has nothing else.
        assert!((imbalance(&data, options(2, 4), 2).unwrap() - (170.0 * 2.0 / 270.0 - 1.0)).abs() < 1e-12);
    }

    /// The lengths of the rows of scripts/bench/main_job/rows.py: SplitMix64 with the seed 321, of which every word takes a number.
    fn main_job() -> Vec<usize> {
        let mut state = 321u64;
        let mut between = |low: u64, high: u64| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (low + (z ^ (z >> 31)) % (high - low + 1)) as usize
        };
        let mut row = || {
            let (prompt, completion) = (between(20, 700), between(5, 300));
            (0..prompt + completion).for_each(|_| {
                between(0, 1999);
            });
            prompt + completion + 1
        };
        (0..600).map(|_| row()).collect()
    }

    #[test]
    fn packed_bins_of_the_main_job_are_even() {
        let lengths = main_job();
        assert_eq!(lengths.iter().sum::<usize>(), 305_700);
        let data = dataset(lengths);
        for ranks in [2, 4, 8] {
            for batch_size in [1, 4] {
                let packed = LoaderOptions { shuffle: Some(42), packing: Some(2048), ..options(batch_size, ranks) };
                let uneven = imbalance(&data, packed, ranks).unwrap();
                println!("{ranks} ranks, batches of {batch_size}: {:.2}%", 100.0 * uneven);
                assert!(uneven > 0.0 && uneven < 0.01, "{ranks} ranks, batches of {batch_size}: {uneven}");
                let apart = LoaderOptions { packing: None, ..packed };
                assert!(imbalance(&data, apart, ranks).unwrap() > 5.0 * uneven);
            }
        }
    }
}
