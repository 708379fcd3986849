//! The time of a run of several ranks, split into computing, communication and waiting; and the rank that the others wait for.
//!
//! Clocks of hosts are not compared. A rank measures how long each of its sums took; the rank that came to a sum last waited for
//! nobody, so the shortest of these times is what the communication itself takes, and the rest of each is waiting. A sum on a GPU
//! returns when it is done ([`Communicator::sum`](crate::comm::Communicator::sum)), so nothing is synchronized for this; what is
//! still to be computed when it is called counts as communication on the slowest rank, and as waiting on the others.
//!
//! Two ranks may hold up the others: one that computes longer for the same tokens, and one whose connection is slow, which is seen by
//! how long its messages take from the first byte to the last (where they go over TCP).

use std::time::Instant;

use serde::{Deserialize, Serialize};

/// Steps over which ranks are compared.
const COMPARED: u64 = 20;
/// A rank is a straggler if it computes so much longer than the others' median.
const SLOWER: f64 = 1.1;
/// A connection is slow if its messages take so much longer than the others' median,
const LONGER: f64 = 3.0;
/// and this share of the ranks' time.
const NOTABLE: f64 = 0.05;
/// The steps until the same straggler is named again.
const AGAIN: u64 = 1000;

/// The time of several ranks in the steps of an entry, in seconds. What happens between steps (evaluation, checkpoints) and the
/// optimizer's update is not in it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RankTimes {
    /// Computing gradients: the mean over the ranks.
    pub compute_seconds: f64,
    /// The same of the rank that took longest.
    pub slowest_compute_seconds: f64,
    /// Adding the gradients, once all ranks are there.
    pub communication_seconds: f64,
    /// Waiting for slower ranks before the gradients are added: the mean over the ranks.
    pub waiting_seconds: f64,
    /// By how much the largest share of a step's tokens exceeds an equal one: 0.01 is 1%.
    pub token_imbalance: f64,
}

/// One rank's step, as it tells the others.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct OwnTimes {
    /// Seconds from the beginning of the step to the end of its last sum, without the sums.
    computed: f64,
    /// The seconds of each sum.
    sums: Vec<f64>,
    /// The tokens that it computed.
    tokens: usize,
    /// The ranks from which it received data, and how many seconds that took.
    received: Vec<(usize, f64)>,
}

/// Measures a step of this rank.
pub(crate) struct Clock {
    last: Instant,
    own: OwnTimes,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { last: Instant::now(), own: OwnTimes::default() }
    }

    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.last, now)).as_secs_f64()
    }

    /// A micro-batch of so many tokens was computed.
    pub(crate) fn computed(&mut self, tokens: usize) {
        self.own.tokens += tokens;
    }

    /// A sum is about to begin: until here there was computing.
    pub(crate) fn sum_begins(&mut self) {
        self.own.computed += self.lap();
    }

    pub(crate) fn sum_is_done(&mut self) {
        let seconds = self.lap();
        self.own.sums.push(seconds);
    }

    pub(crate) fn finish(self, received: Vec<(usize, f64)>) -> OwnTimes {
        OwnTimes { received, ..self.own }
    }
}

/// Sums over steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Times {
    steps: u64,
    /// Of each rank.
    computed: Vec<f64>,
    /// Of each rank.
    waited: Vec<f64>,
    /// The messages of each rank and to it.
    connection: Vec<f64>,
    /// The same for all.
    communicated: f64,
    tokens: Vec<usize>,
    /// The most tokens of a rank, of each step.
    most_tokens: usize,
}

impl Times {
    /// Adds a step; `all` has every rank.
    pub(crate) fn add(&mut self, all: &[OwnTimes]) {
        if self.computed.len() != all.len() {
            let ranks = all.len();
            *self = Self {
                computed: vec![0.0; ranks],
                waited: vec![0.0; ranks],
                connection: vec![0.0; ranks],
                tokens: vec![0; ranks],
                ..Self::default()
            };
        }
        self.steps += 1;
        let sums = all.iter().map(|own| own.sums.len()).min().unwrap_or(0);
        for sum in 0..sums {
            let shortest = all.iter().map(|own| own.sums[sum]).fold(f64::INFINITY, f64::min);
            self.communicated += shortest;
            self.waited.iter_mut().zip(all).for_each(|(waited, own)| *waited += own.sums[sum] - shortest);
        }
        for (rank, own) in all.iter().enumerate() {
            self.computed[rank] += own.computed;
            self.tokens[rank] += own.tokens;
            for &(from, seconds) in &own.received {
                // Rank 0 has a connection with each of the others.
                let of = if rank == 0 { from } else { rank };
                self.connection.iter_mut().skip(of).take(1).for_each(|sum| *sum += seconds);
            }
        }
        self.most_tokens += all.iter().map(|own| own.tokens).max().unwrap_or(0);
    }

    /// For the log; none if there is one rank.
    pub(crate) fn to_log(&self) -> Option<RankTimes> {
        let ranks = self.computed.len() as f64;
        (self.steps > 0 && ranks > 1.0).then(|| RankTimes {
            compute_seconds: self.computed.iter().sum::<f64>() / ranks,
            slowest_compute_seconds: self.computed.iter().copied().fold(0.0, f64::max),
            communication_seconds: self.communicated,
            waiting_seconds: self.waited.iter().sum::<f64>() / ranks,
            token_imbalance: self.imbalance(),
        })
    }

    /// By how much the steps' largest shares of the tokens exceed equal shares.
    fn imbalance(&self) -> f64 {
        let mean = self.tokens.iter().sum::<usize>() as f64 / self.tokens.len() as f64;
        if mean > 0.0 { self.most_tokens as f64 / mean - 1.0 } else { 0.0 }
    }

    /// The whole run in a line; none if there is one rank.
    pub(crate) fn summary(&self) -> Option<String> {
        let log = self.to_log()?;
        let all = log.compute_seconds + log.communication_seconds + log.waiting_seconds;
        let percent = |part: f64| 100.0 * part / all.max(f64::MIN_POSITIVE);
        let (slowest, longest) = last_max(&self.computed);
        Some(format!(
            "time of the ranks: {:.1}% computing, {:.1}% communication, {:.1}% waiting for each other; rank {slowest} computed longest: \
             {longest:.1} s, the mean is {:.1} s; tokens are uneven by {:.2}%",
            percent(log.compute_seconds),
            percent(log.communication_seconds),
            percent(log.waiting_seconds),
            log.compute_seconds,
            100.0 * log.token_imbalance
        ))
    }

    fn straggler(&self) -> Option<Straggler> {
        // The one that costs the others more.
        let both = self.slow_rank().into_iter().chain(self.slow_connection());
        both.max_by(|a, b| (a.seconds - a.others).total_cmp(&(b.seconds - b.others)))
    }

    /// The rank whose messages take much longer than those of the others.
    fn slow_connection(&self) -> Option<Straggler> {
        let (rank, seconds) = last_max(&self.connection);
        let median = median_without(self.connection.get(1..)?, rank.checked_sub(1)?)?;
        let log = self.to_log()?;
        let all = log.compute_seconds + log.communication_seconds + log.waiting_seconds;
        let steps = self.steps as f64;
        (seconds > LONGER * median && seconds > NOTABLE * all).then(|| Straggler {
            rank,
            what: "has a slow connection: its messages take",
            seconds: seconds / steps,
            others: median / steps,
            wait: seconds / all,
        })
    }

    /// The rank that is slower than all others, by the time that it takes for a token.
    fn slow_rank(&self) -> Option<Straggler> {
        if self.tokens.contains(&0) || self.tokens.len() < 2 {
            return None;
        }
        let mean = self.tokens.iter().sum::<usize>() as f64 / self.tokens.len() as f64;
        // As if all had had the same number of tokens.
        let even: Vec<f64> =
            self.computed.iter().zip(&self.tokens).map(|(seconds, &tokens)| seconds * mean / tokens as f64).collect();
        let (rank, seconds) = last_max(&even);
        let median = median_without(&even, rank)?;
        if seconds < SLOWER * median {
            return None;
        }
        let (waited, computed): (Vec<f64>, Vec<f64>) = (0..even.len())
            .filter(|&other| other != rank)
            .map(|other| (self.waited[other], self.computed[other]))
            .unzip();
        let (waited, computed) = (waited.iter().sum::<f64>(), computed.iter().sum::<f64>());
        let all = waited + computed + self.communicated * (even.len() - 1) as f64;
        let steps = self.steps as f64;
        Some(Straggler {
            rank,
            what: "is slower than the others: it computes",
            seconds: seconds / steps,
            others: median / steps,
            wait: waited / all.max(f64::MIN_POSITIVE),
        })
    }
}

/// The median of all values but one; none if there is no other.
fn median_without(values: &[f64], place: usize) -> Option<f64> {
    let mut others: Vec<f64> =
        values.iter().enumerate().filter(|(i, _)| *i != place).map(|(_, value)| *value).collect();
    others.sort_by(f64::total_cmp);
    others.get(others.len() / 2).copied()
}

/// The place of the largest value, and the value.
fn last_max(values: &[f64]) -> (usize, f64) {
    values.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0))
}

/// A rank that the others wait for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Straggler {
    pub(crate) rank: usize,
    what: &'static str,
    /// That, in seconds a step.
    seconds: f64,
    /// The others' median.
    others: f64,
    /// The share of their time that the others wait.
    wait: f64,
}

impl Straggler {
    /// In words; `name` is that of the rank.
    pub(crate) fn describe(&self, name: &str) -> String {
        format!(
            "{name} {} {:.3} s a step, the others' {:.3} s; they wait {:.0}% of their time",
            self.what,
            self.seconds,
            self.others,
            100.0 * self.wait
        )
    }
}

/// Compares the ranks every few steps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch {
    /// Of the steps since the last comparison.
    times: Times,
    named: Option<(usize, u64)>,
    warm: bool,
}

impl Watch {
    /// Adds a step; returns the straggler if it is time to name one.
    pub(crate) fn add(&mut self, step: u64, all: &[OwnTimes]) -> Option<Straggler> {
        // The first step makes what later ones have.
        if !std::mem::replace(&mut self.warm, true) {
            return None;
        }
        self.times.add(all);
        if self.times.steps < COMPARED {
            return None;
        }
        let found = std::mem::take(&mut self.times).straggler()?;
        let known = self.named.is_some_and(|(rank, at)| rank == found.rank && step - at < AGAIN);
        (!known).then(|| {
            self.named = Some((found.rank, step));
            found
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(computed: f64, sums: &[f64], tokens: usize) -> OwnTimes {
        OwnTimes { computed, sums: sums.to_vec(), tokens, received: Vec::new() }
    }

    #[test]
    fn time_is_split_without_comparing_clocks() {
        let mut times = Times::default();
        // Rank 1 came a second late to the first sum, rank 0 half a second to the other.
        times.add(&[own(2.0, &[1.25, 0.25], 100), own(2.5, &[0.25, 0.75], 100)]);
        let log = times.to_log().unwrap();
        assert_eq!((log.communication_seconds, log.waiting_seconds), (0.5, 0.75));
        assert_eq!((log.compute_seconds, log.slowest_compute_seconds), (2.25, 2.5));
        assert_eq!(log.token_imbalance, 0.0);
        assert!(times.summary().unwrap().contains("64.3% computing, 14.3% communication, 21.4% waiting"));
        let mut alone = Times::default();
        alone.add(&[own(1.0, &[], 100)]);
        assert!(alone.to_log().is_none() && alone.summary().is_none());
    }

    #[test]
    fn shares_of_tokens_are_compared_step_by_step() {
        let mut times = Times::default();
        times.add(&[own(1.0, &[0.0], 110), own(1.0, &[0.0], 90)]);
        times.add(&[own(1.0, &[0.0], 90), own(1.0, &[0.0], 110)]);
        // Over both steps the shares are equal; in each one rank waits.
        assert!((times.to_log().unwrap().token_imbalance - 0.1).abs() < 1e-12);
    }

    #[test]
    fn a_straggler_is_named_once_and_more_work_makes_none() {
        let mut watch = Watch::default();
        let slow = [own(1.0, &[1.1], 100), own(2.0, &[0.1], 100), own(1.0, &[1.1], 100)];
        let named: Vec<_> = (1..=100).filter_map(|step| watch.add(step, &slow)).collect();
        let [straggler] = &named[..] else { panic!("{named:?}") };
        let text = straggler.describe("rank 1");
        assert_eq!(
            text,
            "rank 1 is slower than the others: it computes 2.000 s a step, the others' 1.000 s; they wait 48% of their time"
        );
        let busy = [own(1.0, &[1.1], 100), own(2.0, &[0.1], 200)];
        let mut watch = Watch::default();
        assert!((1..=100).all(|step| watch.add(step, &busy).is_none()));
        // A slow connection is no slow computing: all wait for it, and the rank itself too.
        let received = |slow: f64| vec![(1, 0.01), (2, slow)];
        let linked = |slow: f64| {
            let mut all = [own(1.0, &[0.5], 100), own(1.0, &[0.5], 100), own(1.0, &[0.5], 100)];
            all[0].received = received(slow);
            all[2].received = vec![(0, slow)];
            all
        };
        let mut watch = Watch::default();
        assert!((1..=100).all(|step| watch.add(step, &linked(0.01)).is_none()));
        let named: Vec<_> = (1..=100).filter_map(|step| watch.add(step, &linked(0.2))).collect();
        let [straggler] = &named[..] else { panic!("{named:?}") };
        let text = straggler.describe("rank 2");
        assert!(text.starts_with("rank 2 has a slow connection: its messages take 0.4"), "{text}");
        // One that has no micro-batch cannot be compared.
        let idle = [own(1.0, &[0.1], 100), own(0.0, &[1.1], 0)];
        let mut watch = Watch::default();
        assert!((1..=100).all(|step| watch.add(step, &idle).is_none()));
    }
}
