//! Timing for the benches of this folder.
//!
//! Other work on the machine only ever makes a run slower, so the fastest of many runs is reported; what is compared is
//! run in turns. On a machine that is never idle, `RAYON_NUM_THREADS=1 CPU_TIME=1` measures the processor time of one
//! thread instead.
#![allow(dead_code)]

use std::ffi::c_long;
use std::sync::LazyLock;
use std::time::Instant;

use qlora_kernels::ops::matmul;
use qlora_kernels::{View, ViewMut};

unsafe extern "C" {
    /// The processor time of this process in microseconds.
    safe fn clock() -> c_long;
}

static START: LazyLock<Instant> = LazyLock::new(Instant::now);
static CPU_TIME: LazyLock<bool> = LazyLock::new(|| std::env::var_os("CPU_TIME").is_some());

/// Seconds since some moment.
fn seconds() -> f64 {
    if *CPU_TIME { clock() as f64 / 1e6 } else { START.elapsed().as_secs_f64() }
}

/// The fastest of the runs of each function, in seconds. They take turns until `rounds` is reached.
///
/// They run on a thread of the pool, as a training loop should: entering the pool from outside costs about 10
/// microseconds.
pub(crate) fn fastest(rounds: usize, functions: &mut [&mut (dyn FnMut() + Send)]) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; functions.len()];
    rayon::scope(|_| {
        for _ in 0..rounds {
            for (function, best) in functions.iter_mut().zip(&mut best) {
                let start = seconds();
                function();
                *best = best.min(seconds() - start);
            }
        }
    });
    best
}

/// Whether a case is to run: all do, unless the command line names a part of some (`cargo bench ... -- '2 x 256'`).
pub(crate) fn chosen(name: &str) -> bool {
    let mut filters = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).peekable();
    filters.peek().is_none() || filters.any(|filter| name.contains(&filter))
}

/// Pseudo-random numbers between -1 and 1.
pub(crate) fn random(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 * 2.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// The rate of a plain f32 product of square matrices, in GFLOP/s: what everything else is measured against.
pub(crate) fn matmul_ceiling() -> f64 {
    let n = 1024;
    let (a, b, mut c) = (random(n * n, 1), random(n * n, 2), vec![0.0; n * n]);
    let mut run =
        || matmul::nn(View::new(&a, n, n), View::new(&b, n, n), ViewMut::new(&mut c, n, n), 1.0, 0.0).unwrap();
    2.0 * (n * n * n) as f64 / fastest(20, &mut [&mut run])[0] / 1e9
}
