//! Sequences of any lengths through cuDNN: against the CPU, against our own kernels, and without plans for ever.
//!
//! Where cuDNN is not there, or refuses packed sequences on this GPU, our own kernels run instead and the tests say so; with
//! `QLORA_REQUIRE_CUDNN=1` they fail.

use candle_core::Device;
use qlora_kernels::cuda::{AttentionCalls, Gpu};
use qlora_kernels::ops::attention::AttentionPath;
use qlora_kernels::{Dtype, SequenceLayout};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::attention::{config, run, run_with, tolerance};
use crate::harness::{Output, Report, Side, half, halves, new_gpu, relative_error};

/// Grouped and single key/value heads.
const HEADS: [(usize, usize, usize); 4] = [(8, 2, 128), (4, 4, 128), (9, 3, 64), (4, 2, 96)];

/// The calls since `before` went that way. A test that compares our own kernels with themselves must not pass for
/// one of cuDNN.
fn went(gpu: &Gpu, before: AttentionCalls, path: AttentionPath, least: u64) {
    let since = gpu.attention().calls().since(before);
    let calls = match path {
        AttentionPath::CudnnUniform => since.cudnn_uniform,
        AttentionPath::CudnnPacked => since.cudnn_packed,
        _ => since.own,
    };
    let went = calls >= least;
    println!("{calls} of {least} calls by {path:?}: {}", gpu.attention().describe());
    let required = std::env::var("QLORA_REQUIRE_CUDNN").is_ok_and(|value| value == "1");
    assert!(went || !required, "cuDNN did not run: {}", gpu.attention().describe());
}

/// With two tokens dq is a multiple of `dP - D`, a difference of two numbers of which the rounding of the output leaves bf16 less
/// than two digits: 1.05e-2 with our kernels, on every card.
fn of_short_ones(dtype: Dtype) -> f64 {
    if dtype == Dtype::Bf16 { 1.2e-2 } else { tolerance(dtype) }
}

#[test]
fn packed_sequences_agree_with_the_cpu() {
    let Some(device) = new_gpu() else { return };
    let gpu = Gpu::of(&device).unwrap();
    gpu.attention().set_path(Some(AttentionPath::CudnnPacked));
    let before = gpu.attention().calls();
    let mut report = Report::with_tolerance("packed attention", of_short_ones);
    let mut calls = 0;
    for dtype in halves(&device) {
        for heads in HEADS {
            for lengths in [
                &[2][..],
                &[17],
                &[63, 64, 65],
                &[129, 1, 64, 17, 127, 63],
                &[300, 2, 511, 40],
                &[700, 700],
                &[1, 1, 1, 5],
                &[1337],
                &[25, 1000, 100],
            ] {
                for gap in [0, 8] {
                    let label = format!("{heads:?}, lengths {lengths:?}, gap {gap}");
                    report.compare(&device, dtype, &label, |side| run(side, &config(heads, None), lengths, gap));
                    calls += 2;
                }
            }
        }
    }
    report.finish();
    went(&gpu, before, AttentionPath::CudnnPacked, calls);
}

/// The results of one batch on the GPU, the same inputs for the same seed.
fn results(device: &Device, dtype: Dtype, seed: u64, heads: (usize, usize, usize), lengths: &[usize]) -> Vec<Output> {
    run(&Side::gpu(device, dtype, seed), &config(heads, None), lengths, 0).unwrap()
}

/// A run over documents of 25 to 1,000 tokens, eight a batch (the last batch of an epoch is smaller), over bins of 2,048 with
/// several documents each, four a batch (always through cuDNN, the others as the lengths decide), and over single documents of
/// 1,024 to 2,048. After the first batches there are no more plans; and the batches give what our own kernels give.
#[test]
fn plans_do_not_grow_with_the_lengths_of_documents() {
    let Some(device) = new_gpu() else { return };
    let gpu = Gpu::of(&device).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut report = Report::with_tolerance("documents of any length", tolerance);
    // Small heads: most of the time is spent on random inputs.
    let (heads, dtype) = ((2, 1, 64), half(&device));
    for kind in ["documents", "bins", "single documents"] {
        let before = gpu.attention().calls();
        let mut warm = gpu.counters();
        for step in 0..120u64 {
            let lengths: Vec<usize> = match kind {
                "documents" if step % 30 == 29 => (0..3).map(|_| rng.random_range(25..=1000)).collect(),
                "documents" => (0..8).map(|_| rng.random_range(25..=1000)).collect(),
                "single documents" => vec![rng.random_range(1024..=2048)],
                _ => bins(&mut rng, 4, 2048),
            };
            if step == 50 {
                warm = gpu.counters();
            }
            gpu.attention().set_path((kind == "bins").then_some(AttentionPath::CudnnPacked));
            let got = results(&device, dtype, step, heads, &lengths);
            if step % 10 != 0 {
                continue;
            }
            gpu.attention().set_path(Some(AttentionPath::Own));
            for (got, want) in got.iter().zip(&results(&device, dtype, step, heads, &lengths)) {
                // `lse` of cuDNN for sequences of one length has another order.
                let comparable = got.name() != "lse" || SequenceLayout::from_lengths(&lengths).uniform_len().is_none();
                let values = |output: &Output| output.to_f32().into_iter().map(f64::from).collect::<Vec<f64>>();
                let error = relative_error(&values(got), &values(want));
                let what = format!("{} is off by {error:.2e}", got.name());
                report.check(dtype, &format!("{lengths:?}"), !comparable || error <= 2.0 * tolerance(dtype), &what);
            }
        }
        let made = gpu.counters().since(warm);
        println!("{kind}: {:?} since step 50, {} plans in all", made, gpu.counters().cudnn_plans);
        assert_eq!(made.cudnn_plans, 0, "{kind}: {:#?}", gpu.attention().plans());
        went(&gpu, before, AttentionPath::CudnnPacked, 40);
    }
    // Three kinds of batches, forward and backward, and what the self-test took.
    let plans = gpu.counters().cudnn_plans;
    assert!(plans <= 40, "{plans} plans: {:#?}", gpu.attention().plans());
    report.finish();
}

/// Bins filled with documents of a prompt of 20 to 700 tokens and an answer of 5 to 300, as they come.
fn bins(rng: &mut ChaCha8Rng, count: usize, capacity: usize) -> Vec<usize> {
    let (mut lengths, mut filled, mut room) = (Vec::new(), 0, capacity);
    while filled < count {
        let len = rng.random_range(20..=700) + rng.random_range(5..=300);
        if len > room {
            (filled, room) = (filled + 1, capacity);
        } else {
            room -= len;
            lengths.push(len);
        }
    }
    lengths
}

/// The output of a forward can be read by every backward.
#[test]
fn a_backward_on_another_path_than_its_forward_is_right() {
    let Some(device) = new_gpu() else { return };
    let gpu = Gpu::of(&device).unwrap();
    let mut report = Report::with_tolerance("attention on two paths", tolerance);
    let paths = [AttentionPath::Own, AttentionPath::CudnnUniform, AttentionPath::CudnnPacked];
    for dtype in halves(&device) {
        for heads in HEADS {
            for lengths in [&[256, 256, 256][..], &[300, 17, 128]] {
                for (forward, backward) in paths.iter().flat_map(|f| paths.iter().map(move |b| (*f, *b))) {
                    let label = format!("{heads:?}, {lengths:?}, {forward:?} then {backward:?}");
                    report.compare(&device, dtype, &label, |side| {
                        gpu.attention().set_path(Some(forward));
                        let switch = || gpu.attention().set_path(Some(backward));
                        let results = run_with(side, &config(heads, None), lengths, 0, &switch)?;
                        Ok(results.into_iter().filter(|result| result.name() != "lse").collect())
                    });
                }
            }
            // Switched off in between: our own kernels have to read what cuDNN wrote by sequence.
            let label = format!("{heads:?}, switched off after the forward");
            gpu.attention().set_path(Some(AttentionPath::CudnnUniform));
            report.compare(&device, dtype, &label, |side| {
                gpu.attention().set_enabled(true);
                let switch = || gpu.attention().set_enabled(false);
                let results = run_with(side, &config(heads, None), &[200, 200], 0, &switch);
                gpu.attention().set_enabled(true);
                Ok(results?.into_iter().filter(|result| result.name() != "lse").collect())
            });
        }
    }
    report.finish();
}

/// Batches of lengths that were met need no plans.
#[test]
fn a_warm_batch_makes_no_plans() {
    let Some(device) = new_gpu() else { return };
    let gpu = Gpu::of(&device).unwrap();
    gpu.attention().set_path(Some(AttentionPath::CudnnPacked));
    let lengths: Vec<Vec<usize>> = vec![vec![900, 30, 411], vec![640, 640, 65], vec![1000, 1, 2]];
    let heads = (8, 2, 128);
    for lengths in &lengths {
        results(&device, half(&device), 1, heads, lengths);
    }
    let warm = gpu.counters();
    for lengths in lengths.iter().cycle().take(30) {
        results(&device, half(&device), 1, heads, lengths);
    }
    // Other tests of this process take memory of the same pool meanwhile: only plans are this device's own.
    let made = gpu.counters().since(warm);
    assert_eq!(made.cudnn_plans, 0, "{made}");
}

/// In deterministic mode our own kernels run, whatever is asked for.
#[test]
fn deterministic_batches_stay_with_our_kernels() {
    let Some(device) = new_gpu() else { return };
    let gpu = Gpu::of(&device).unwrap();
    gpu.set_deterministic(true);
    for path in [None, Some(AttentionPath::CudnnPacked), Some(AttentionPath::CudnnUniform)] {
        gpu.attention().set_path(path);
        results(&device, half(&device), 3, (8, 2, 128), &[1024, 1024]);
    }
    let calls = gpu.attention().calls();
    assert_eq!((calls.own, calls.cudnn_uniform, calls.cudnn_packed), (6, 0, 0));
    assert_eq!(gpu.counters().cudnn_plans, 0);
}
