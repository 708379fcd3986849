//! Counts of damaged files that were refused, each in bounded time and memory.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

/// The time limit for one damaged file. The slowest, a template that writes as much as it may, takes about a second.
const TIME: Duration = Duration::from_secs(10);
/// The growth limit of the process over all of a test, in bytes: the undamaged models take less than one of them.
const MEMORY: u64 = 192 << 20;

/// The most memory that this process ever had resident.
fn peak() -> u64 {
    let Ok(status) = fs::read_to_string("/proc/self/status") else { return 0 };
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Counts of one format by kind of damage, and the longest that one file took.
#[derive(Default)]
pub(crate) struct Tally {
    counts: BTreeMap<&'static str, usize>,
    slowest: Duration,
}

impl Tally {
    /// One damaged file: refused, by one of `names`, in time and memory.
    pub(crate) fn refused(
        &mut self,
        kind: &'static str,
        names: &[&str],
        what: &str,
        load: impl FnOnce() -> Result<(), String>,
    ) {
        let start = Instant::now();
        let error = load().expect_err(&format!("{kind}: {what} is accepted"));
        let took = start.elapsed();
        assert!(names.iter().any(|name| error.contains(name)), "{kind}: {what}: none of {names:?} is in {error:?}");
        let start: String = error.chars().take(200).collect();
        assert!(error.len() < 4000, "{kind}: {what}: {} bytes of message: {start}", error.len());
        assert!(took < TIME, "{kind}: {what} takes {took:?}");
        let peak = peak();
        assert!(peak < MEMORY, "{kind}: {what}: {} MB", peak >> 20);
        self.slowest = self.slowest.max(took);
        *self.counts.entry(kind).or_default() += 1;
    }

    pub(crate) fn check(self, format: &str, expected: &[(&str, usize)]) {
        let sum: usize = self.counts.values().sum();
        println!("{format}: {:?}, {sum} in all, the slowest took {:?}", self.counts, self.slowest);
        assert_eq!(self.counts.into_iter().collect::<Vec<_>>(), expected, "{format}");
    }
}

/// Lengths shorter than `whole`: the first bytes, where headers begin and end, and some in between.
pub(crate) fn cuts(whole: usize) -> Vec<usize> {
    let mut lengths: Vec<usize> = [0, 1, 7, 8, 9, 64].into_iter().chain((1..10).map(|i| whole * i / 10)).collect();
    lengths.extend([whole - 2, whole - 1]);
    lengths.retain(|&length| length < whole);
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}
