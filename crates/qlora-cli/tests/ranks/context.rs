//! Ranks that share every sequence (`context_parallel_size`).

use std::path::Path;

use safetensors::SafeTensors;

use super::{END, Running, adapter, folder, goes_on, log, run, said, train};

const STEPS: [&str; 8] = ["--max-steps", "12", "--logging-steps", "1", "--eval-steps", "5", "--save-steps", "6"];
const CONTEXT: &str = "--context-parallel-size";

/// A run of twelve steps: processes, how many of them share a sequence, micro-batches of a group and a step.
fn share(here: &Path, output: &str, [ranks, context, each]: [&str; 3], more: &[&str]) -> String {
    let spread = ["--nproc-per-node", ranks, CONTEXT, context, "--gradient-accumulation-steps", each];
    run(here, output, &[&STEPS[..], &spread, more].concat())
}

/// The largest difference of two adapters, and the largest value.
fn apart(here: &Path, first: &str, second: &str) -> (f32, f32) {
    let (first, second) = (adapter(here, first), adapter(here, second));
    let (first, second) = (SafeTensors::deserialize(&first).unwrap(), SafeTensors::deserialize(&second).unwrap());
    let floats =
        |bytes: &[u8]| -> Vec<f32> { bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect() };
    let (mut apart, mut largest) = (0f32, 0f32);
    for (name, tensor) in first.tensors() {
        let other = floats(second.tensor(&name).unwrap().data());
        for (a, b) in floats(tensor.data()).into_iter().zip(other) {
            (apart, largest) = (apart.max((a - b).abs()), largest.max(a.abs()));
        }
    }
    (apart, largest)
}

#[test]
fn ranks_that_share_sequences_train_as_one() {
    let temporary = folder();
    let here = temporary.path();
    let packed = ["--packing=true", "--max-length", "96"];
    for (data, more) in [("rows", &[][..]), ("bins", &packed[..])] {
        let name = |ranks: &str| format!("{data}-{ranks}");
        run(here, &name("alone"), &[&STEPS[..], &["--gradient-accumulation-steps", "2"], more].concat());
        let start = share(here, &name("2x1"), ["2", "2", "2"], more);
        assert!(start.contains("; groups of 2 share every sequence; "), "{start}");
        assert!(start.contains("2 on each group") && !start.contains("ranks' shares of a step's tokens"), "{start}");
        let asked = ["--sample-every", "6", "--sample-max-new-tokens", "3"];
        let start = share(here, &name("2x2"), ["4", "2", "1"], &[more, &asked].concat());
        assert!(start.contains("1 on each group") && start.contains("ranks' shares of a step's tokens"), "{start}");
        // Of two key and value heads each of four ranks has one.
        share(here, &name("4x1"), ["4", "4", "2"], more);
        // Sums of two shares and of two micro-batches are made in one order, whoever has them.
        assert_eq!(log(here, &name("2x1")), log(here, &name("2x2")));
        assert!(adapter(here, &name("2x1")) == adapter(here, &name("2x2")), "{data}: the adapter differs");
        // Of all tokens at once in another: equal to rounding, which AdamW's first steps enlarge where gradients are nearly zero.
        let alone = log(here, &name("alone"));
        for ranks in ["2x1", "4x1"] {
            let shared = log(here, &name(ranks));
            assert_eq!(alone.len(), shared.len());
            for (one, other) in alone.iter().zip(&shared) {
                for key in ["loss", "eval_loss", "grad_norm", "learning_rate", "tokens", "trained_tokens", "num_tokens"]
                {
                    let (Some(one), Some(other)) = (one[key].as_f64(), other[key].as_f64()) else { continue };
                    assert!((one - other).abs() <= 2e-5 * one.abs(), "{data}, {ranks}, {key}: {one} {other}");
                }
            }
            let (apart, largest) = apart(here, &name("alone"), &name(ranks));
            assert!(apart < 2e-4 * largest, "{data}, {ranks}: {apart:e} of {largest:e}");
        }
    }
}

#[test]
fn a_shared_run_goes_on_with_another_number_of_groups() {
    let temporary = folder();
    let here = temporary.path();
    share(here, "whole", ["2", "2", "2"], &["--lr-scheduler-type", "constant"]);
    for (steps, ranks, each) in [("6", "4", "1"), ("12", "2", "2")] {
        let options =
            ["--max-steps", steps, "--nproc-per-node", ranks, CONTEXT, "2", "--lr-scheduler-type", "constant"];
        let others = ["--gradient-accumulation-steps", each, "--resume-from-checkpoint", "true", "--save-steps", "6"];
        run(here, "parts", &[&options[..], &others, &["--logging-steps", "1", "--eval-steps", "5"]].concat());
    }
    assert!(adapter(here, "parts") == adapter(here, "whole"), "the adapter differs");
    // Without sharing the steps are the same, up to rounding.
    let alone = ["--max-steps", "13", "--gradient-accumulation-steps", "2", "--resume-from-checkpoint", "true"];
    run(here, "parts", &[&alone[..], &["--lr-scheduler-type", "constant"]].concat());
}

#[test]
fn a_rank_of_a_group_that_is_killed_is_named_by_the_others() {
    let temporary = folder();
    let here = temporary.path();
    let more = ["--lr-scheduler-type", "constant", CONTEXT, "2"];
    let running = Running::start(here, "killed", "2", &more);
    std::thread::sleep(std::time::Duration::from_millis(170));
    let id = running.process(1);
    Running::signal(id, "KILL");
    let (code, said) = running.end(END);
    assert_eq!(code, Some(128 + 9), "{said}");
    assert!(said.contains(&format!("rank 1 (process {id} on ")), "{said}");
    assert!(said.contains("its process ended or was killed, or the connection was cut"), "{said}");
    goes_on(here, "killed", &["--nproc-per-node", "2", CONTEXT, "2"]);
}

#[test]
fn a_request_to_one_rank_of_a_group_ends_all_and_saves() {
    let temporary = folder();
    let here = temporary.path();
    let more = ["--lr-scheduler-type", "constant", CONTEXT, "2", "--eval-steps", "3"];
    let running = Running::start(here, "asked", "4", &more);
    Running::signal(running.process(3), "TERM");
    let (code, said) = running.end(END);
    assert!(matches!(code, Some(130 | 143)), "{code:?}: {said}");
    goes_on(here, "asked", &["--nproc-per-node", "4", CONTEXT, "2", "--eval-steps", "3"]);
}

#[test]
fn what_cannot_be_shared_is_refused_in_words() {
    let temporary = folder();
    let here = temporary.path();
    let refused = |more: &[&str], expected: &str| {
        let output = train(here, "refused", more).output().unwrap();
        let text = said(&output);
        assert!(!output.status.success() && text.contains(expected), "{text}");
    };
    refused(&[CONTEXT, "2"], "start them with --nproc-per-node 2");
    refused(&[CONTEXT, "2", "--nproc-per-node", "3"], "start a multiple of 2, or set a number that divides 3");
    refused(&[CONTEXT, "3", "--nproc-per-node", "3"], "4 query heads and 2 key/value heads do not divide over 3 ranks");
    refused(
        &[CONTEXT, "2", "--nproc-per-node", "2", "--objective", "dpo"],
        "context_parallel_size` must be 1 with the objective \"dpo\"",
    );
    // A plan needs no other process.
    let output = train(here, "planned", &[CONTEXT, "2", "--dry-run"]).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}
