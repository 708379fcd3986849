//! Several sets as one: which set the next row is from.
//!
//! The strategies are those of Hugging Face's `interleave_datasets`, by LLaMA-Factory's names. Without probabilities the sets
//! take turns; with them a set is drawn for each row. The draws are of our generator, not of numpy's.

use serde::{Deserialize, Serialize};

use super::load::RowSet;
use crate::config::MixStrategy;
use crate::rng::{SplitMix64, derive_seed, permutation};

/// Purposes of the data's seed.
const SAMPLES: u64 = 1;
const TURNS: u64 = 2;
pub(super) const SPLIT: u64 = 3;

/// The order in which the sets of a mixture give rows.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    strategy: MixStrategy,
    /// One for each set, or none: then they take turns.
    probabilities: Vec<f64>,
    state: TurnState,
}

/// The state of the turns, which changes from row to row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TurnState {
    pub(super) random: u64,
    next: usize,
    /// The sets that were seen whole.
    seen: Vec<bool>,
}

impl Turns {
    pub(super) fn new(sets: usize, strategy: MixStrategy, probabilities: &[f64], seed: u64) -> Self {
        let state = TurnState { random: derive_seed(seed, &[TURNS]), next: 0, seen: vec![false; sets] };
        Self { strategy, probabilities: probabilities.to_vec(), state }
    }

    pub(super) fn state(&self) -> &TurnState {
        &self.state
    }

    pub(super) fn set_state(&mut self, state: TurnState) {
        self.state = state;
    }

    /// The set of the next row; `None` at the mixture's end. `is_empty` says of each set whether it has no row left; one that is
    /// chosen all the same begins anew, which happens with [`MixStrategy::InterleaveOver`] alone.
    pub(super) fn next(&mut self, is_empty: &[bool]) -> Option<usize> {
        let seen = &mut self.state.seen;
        seen.iter_mut().zip(is_empty).for_each(|(seen, empty)| *seen |= empty);
        if seen.iter().all(|seen| *seen) {
            return None;
        }
        match self.strategy {
            MixStrategy::Concat => is_empty.iter().position(|empty| !empty),
            MixStrategy::InterleaveUnder => Some(self.draw(&vec![true; is_empty.len()])).filter(|&set| !is_empty[set]),
            MixStrategy::InterleaveOver => Some(self.draw(&vec![true; is_empty.len()])),
            MixStrategy::InterleaveOnce => {
                let left: Vec<bool> = is_empty.iter().map(|empty| !empty).collect();
                Some(self.draw(&left))
            }
        }
    }

    /// One of the sets that are allowed.
    fn draw(&mut self, allowed: &[bool]) -> usize {
        let sets = allowed.len();
        if self.probabilities.is_empty() {
            let turn = (0..sets).map(|i| (self.state.next + i) % sets).find(|&set| allowed[set]).unwrap_or(0);
            self.state.next = (turn + 1) % sets;
            return turn;
        }
        let weight = |set: usize| if allowed[set] { self.probabilities[set] } else { 0.0 };
        let total: f64 = (0..sets).map(weight).sum();
        let mut random = SplitMix64::new(self.state.random);
        // 53 bits, as many as a double has.
        let mut point = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        self.state.random = random.state();
        for (set, allowed) in allowed.iter().enumerate() {
            if *allowed && point < weight(set) {
                return set;
            }
            point -= weight(set);
        }
        // Rounding may leave a little.
        allowed.iter().rposition(|allowed| *allowed).unwrap_or(0)
    }
}

/// The documents of all sets in the mixture's order, of which `documents` are those of each set.
pub(super) fn mixed(
    sets: &[RowSet],
    documents: Vec<Vec<usize>>,
    strategy: MixStrategy,
    probabilities: &[f64],
    seed: u64,
) -> Vec<usize> {
    let documents = shares(
        sets,
        documents
            .into_iter()
            .enumerate()
            .map(|(i, documents)| match sets[i].num_samples {
                Some(count) => drawn(&documents, count, derive_seed(seed, &[SAMPLES, i as u64])),
                None => documents,
            })
            .collect(),
    );
    let mut turns = Turns::new(sets.len(), strategy, probabilities, seed);
    let mut behind = vec![0; sets.len()];
    let mut mixture = Vec::new();
    loop {
        let is_empty: Vec<bool> =
            documents.iter().zip(&behind).map(|(documents, &behind)| behind == documents.len()).collect();
        let Some(set) = turns.next(&is_empty) else { return mixture };
        if is_empty[set] {
            behind[set] = 0;
        }
        // A set of which the filters left nothing has no turn.
        if let Some(&document) = documents[set].get(behind[set]) {
            mixture.push(document);
            behind[set] += 1;
        }
    }
}

/// So many documents in their order: each as often as the others, and of the rest a random choice.
fn drawn(documents: &[usize], count: usize, seed: u64) -> Vec<usize> {
    if documents.is_empty() {
        return Vec::new();
    }
    let mut chosen = documents.repeat(count / documents.len());
    let mut rest = permutation(documents.len(), seed);
    rest.truncate(count % documents.len());
    rest.sort_unstable();
    chosen.extend(rest.into_iter().map(|i| documents[i]));
    chosen
}

/// Of each set the first documents, as many as its share of the largest mixture that the sets allow.
fn shares(sets: &[RowSet], mut documents: Vec<Vec<usize>>) -> Vec<Vec<usize>> {
    let fractions: Option<Vec<f64>> = sets.iter().map(|set| set.fraction).collect();
    let Some(fractions) = fractions else { return documents };
    let sum: f64 = fractions.iter().sum();
    let total = documents.iter().zip(&fractions).map(|(documents, fraction)| documents.len() as f64 * sum / fraction);
    let total = total.fold(f64::INFINITY, f64::min);
    for (documents, fraction) in documents.iter_mut().zip(&fractions) {
        documents.truncate((fraction / sum * total).round() as usize);
    }
    documents
}

/// Draws `count` of the documents for validation; both parts in their order.
pub(super) fn split(documents: usize, count: usize, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let mut order = permutation(documents, derive_seed(seed, &[SPLIT]));
    let mut training = order.split_off(count.min(documents));
    training.sort_unstable();
    order.sort_unstable();
    (training, order)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sets of 3, 4 and 5 documents: 0.., 10.., 20...
    fn of(strategy: MixStrategy, probabilities: &[f64], change: impl Fn(&mut [RowSet])) -> Vec<usize> {
        let mut sets = vec![RowSet::default(); 3];
        change(&mut sets);
        let documents =
            [3, 4, 5].into_iter().enumerate().map(|(i, count)| (10 * i..10 * i + count).collect()).collect();
        mixed(&sets, documents, strategy, probabilities, 42)
    }

    #[test]
    fn turns_are_those_of_interleave_datasets() {
        let concat = of(MixStrategy::Concat, &[], |_| ());
        assert_eq!(concat, [0, 1, 2, 10, 11, 12, 13, 20, 21, 22, 23, 24]);
        let under = [0, 10, 20, 1, 11, 21, 2, 12, 22];
        assert_eq!(of(MixStrategy::InterleaveUnder, &[], |_| ()), under);
        assert_eq!(of(MixStrategy::InterleaveOver, &[], |_| ()), [under.as_slice(), &[0, 13, 23, 1, 10, 24]].concat());
        assert_eq!(of(MixStrategy::InterleaveOnce, &[], |_| ()), [under.as_slice(), &[13, 23, 24]].concat());
    }

    #[test]
    fn probabilities_are_kept_and_every_set_is_seen() {
        let mixture = of(MixStrategy::InterleaveOver, &[0.8, 0.1, 0.1], |_| ());
        assert_eq!(mixture, of(MixStrategy::InterleaveOver, &[0.8, 0.1, 0.1], |_| ()));
        let count = |set: usize| mixture.iter().filter(|&&document| document / 10 == set).count();
        assert!(count(0) > 2 * (count(1) + count(2)) && count(1) >= 4 && count(2) >= 5, "{mixture:?}");
        let once = of(MixStrategy::InterleaveOnce, &[0.8, 0.1, 0.1], |_| ());
        assert_eq!(once.len(), 12);
        let mut turns = Turns::new(2, MixStrategy::InterleaveOver, &[3.0, 1.0], 7);
        let first = (0..4000).filter(|_| turns.next(&[false, false]) == Some(0)).count();
        assert!((2900..3100).contains(&first), "{first}");
    }

    #[test]
    fn counts_and_shares() {
        let counts = of(MixStrategy::Concat, &[], |sets| {
            (sets[0].num_samples, sets[1].num_samples, sets[2].num_samples) = (Some(2), Some(9), Some(5));
        });
        assert_eq!(counts.len(), 16);
        assert_eq!(counts[2..10], [10, 11, 12, 13, 10, 11, 12, 13]);
        assert_eq!(counts[11..], [20, 21, 22, 23, 24]);
        // TRL: total = min(3 / .25, 4 / .5, 5 / .25) = 8.
        let shares = of(MixStrategy::Concat, &[], |sets| {
            (sets[0].fraction, sets[1].fraction, sets[2].fraction) = (Some(1.0), Some(2.0), Some(1.0));
        });
        assert_eq!(shares, [0, 1, 10, 11, 12, 13, 20, 21]);
    }

    #[test]
    fn a_split_has_every_document_once() {
        let (training, validation) = split(10, 3, 42);
        assert_eq!((training.len(), validation.len()), (7, 3));
        let mut all = [training.clone(), validation].concat();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        assert_ne!(split(10, 3, 43).0, training);
    }
}
