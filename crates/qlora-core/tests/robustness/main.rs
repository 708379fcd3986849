//! Damages at random: errors, in little memory. A process of its own, because what other tests map counts as its peak.

#[path = "../common/mod.rs"]
mod common;

mod loading;
mod quantized;

use std::fs;

/// Fails if the process ever asked for much more memory than its small inputs can need, in pages touched or not.
fn check_memory() {
    let Ok(status) = fs::read_to_string("/proc/self/status") else { return };
    for (key, limit) in [("VmPeak:", 4 << 20), ("VmHWM:", 512 << 10)] {
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        let kilobytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(kilobytes < limit, "{line}");
    }
}
