//! Documents into bins of limited size: best-fit decreasing.
//!
//! From the longest document to the shortest, each goes into the fullest bin that still has room for it, or into a new
//! one. Ties keep the documents' order and prefer the bin opened first. `O(n log n)`.
//!
//! The documents of a bin stay separate sequences in the batch (block-diagonal attention, positions restart), so a bin
//! only decides which documents are computed together.

use std::collections::{BTreeMap, BTreeSet};

/// Packs documents of the given lengths into bins of `capacity` tokens. Each bin is a list of document indices in
/// ascending order; bins are in order of their first document.
///
/// # Panics
/// If a document is longer than `capacity`.
pub fn best_fit_decreasing(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    // Stable, so documents of the same length keep their order.
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));

    let mut bins: Vec<Vec<usize>> = Vec::new();
    let mut by_room: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    for document in order {
        let length = lengths[document];
        assert!(length <= capacity, "a document of {length} tokens does not fit into a bin of {capacity}");
        let fullest = by_room.range(length..).next().map(|(&room, open)| (room, *open.first().expect("never empty")));
        let (room, bin) = match fullest {
            Some((room, bin)) => {
                let open = by_room.get_mut(&room).expect("just found");
                open.remove(&bin);
                if open.is_empty() {
                    by_room.remove(&room);
                }
                (room, bin)
            }
            None => {
                bins.push(Vec::new());
                (capacity, bins.len() - 1)
            }
        };
        bins[bin].push(document);
        by_room.entry(room - length).or_default().insert(bin);
    }
    bins.iter_mut().for_each(|bin| bin.sort_unstable());
    bins.sort_unstable_by_key(|bin| bin[0]);
    bins
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn documents_go_where_they_fit_best() {
        // 6 opens a bin, 5 another, 4 fills the first (room 4 before room 5), 3 and 2 fill the second, 1 opens a third.
        assert_eq!(best_fit_decreasing(&[5, 6, 2, 3, 4, 1], 10), [vec![0, 2, 3], vec![1, 4], vec![5]]);
        // First-fit would put the 3 beside the 6; best-fit puts it beside the 7.
        assert_eq!(best_fit_decreasing(&[6, 7, 3, 4], 10), [vec![0, 3], vec![1, 2]]);
        assert_eq!(best_fit_decreasing(&[4, 4, 4], 4), [[0], [1], [2]]);
        assert_eq!(best_fit_decreasing(&[2, 2, 2, 2], 4), [[0, 1], [2, 3]]);
        assert!(best_fit_decreasing(&[], 4).is_empty());
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn overlong_documents_are_a_mistake_of_the_caller() {
        best_fit_decreasing(&[5], 4);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn every_document_once_no_bin_too_full(lengths in proptest::collection::vec(1usize..50, 0..200), spare in 0usize..50) {
            let capacity = 50 + spare;
            let bins = best_fit_decreasing(&lengths, capacity);
            let mut seen: Vec<_> = bins.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            let fill: Vec<usize> = bins.iter().map(|bin| bin.iter().map(|&i| lengths[i]).sum()).collect();
            prop_assert!(fill.iter().all(|&fill| fill <= capacity));
            // Best-fit decreasing needs at most 11/9 of the optimum and 1 bin more; the optimum is at least the volume.
            let volume = lengths.iter().sum::<usize>().div_ceil(capacity);
            let pairs_too_big = lengths.iter().filter(|&&length| 2 * length > capacity).count();
            prop_assert!(bins.len() <= 2 * volume.max(pairs_too_big) + 1);
            // No two bins could be merged.
            let mut sorted = fill.clone();
            sorted.sort_unstable();
            if let [a, b, ..] = sorted[..] {
                prop_assert!(a + b > capacity);
            }
        }
    }
}
