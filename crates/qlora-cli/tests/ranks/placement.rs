//! A base that is not whole in every rank's memory: the same bits, and an end on every rank when a share is gone.

use std::time::Duration;

use super::tiny_folder::{CHATML, write_model_of, write_rows};
use super::{END, Running, adapter, folder, goes_on_with_the_same_bits, log, run, said, train};

/// Options that put the base somewhere else than whole into every rank's memory.
const STREAMED: [&str; 2] = ["--base-placement", "streamed"];
const SHARDED: [&str; 2] = ["--base-placement", "sharded"];

#[test]
fn a_base_in_shares_or_in_host_memory_gives_the_same_bits() {
    let temporary = tempfile::tempdir().unwrap();
    let here = temporary.path();
    // More blocks than there is room for.
    write_model_of(&here.join("model"), 5, CHATML, 5);
    let rows: Vec<String> = (0..14).map(|i| format!("answer {}", "x".repeat(i * 7 % 23))).collect();
    let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
    write_rows(&here.join("train.jsonl"), &rows);
    write_rows(&here.join("eval.jsonl"), &rows[..7]);
    // The last step of an epoch has fewer micro-batches than ranks; evaluation and answers read the base too.
    let steps = ["--max-steps", "7", "--logging-steps", "1", "--eval-steps", "3", "--target-modules", "all-linear"];
    let answers = ["--sample-every", "5", "--sample-max-new-tokens", "3"];
    let of = |output: &str, micro_batches: &str, more: &[&str]| {
        let accumulation = ["--gradient-accumulation-steps", micro_batches];
        run(here, output, &[&steps[..], &answers, &accumulation, more].concat())
    };
    for double_quant in ["true", "false"] {
        let kind = [format!("--bnb-4bit-use-double-quant={double_quant}")];
        let kind = [kind[0].as_str()];
        let whole = |name: &str, micro_batches| {
            of(
                &format!("{name}-{double_quant}"),
                micro_batches,
                &[&kind[..], &["--base-placement", "resident"]].concat(),
            );
            format!("{name}-{double_quant}")
        };
        let (two, three) = (whole("whole-2", "2"), whole("whole-3", "3"));
        let check = |output: &str, like: &str, said: &str, note: &str| {
            assert!(said.contains(note), "{output}: {said}");
            assert_eq!(log(here, output), log(here, like), "{output}");
            assert!(adapter(here, output) == adapter(here, like), "{output}: the adapter differs");
        };
        let name = format!("streamed-{double_quant}");
        let said = of(&name, "2", &[&kind[..], &STREAMED].concat());
        check(&name, &two, &said, "base streamed from host memory: ");
        for (ranks, like) in [("2", &two), ("3", &three)] {
            let name = format!("sharded-{ranks}-{double_quant}");
            let spread = ["--nproc-per-node", ranks];
            let said = of(&name, "1", &[&kind[..], &SHARDED, &spread].concat());
            check(&name, like, &said, &format!("base sharded over {ranks} ranks: "));
        }
    }
    // Unquantized weights, gradient checkpointing, DoRA, and streaming by several ranks.
    let other = ["--load-in-4bit=false", "--use-dora=true", "--gradient-checkpointing=true"];
    of("plain", "2", &other);
    of("plain-sharded", "1", &[&other[..], &SHARDED, &["--nproc-per-node", "2"]].concat());
    of("plain-streamed", "1", &[&other[..], &STREAMED, &["--nproc-per-node", "2"]].concat());
    for output in ["plain-sharded", "plain-streamed"] {
        assert_eq!(log(here, output), log(here, "plain"), "{output}");
        assert!(adapter(here, output) == adapter(here, "plain"), "{output}: the adapter differs");
    }
}

#[test]
fn a_base_that_cannot_be_shared_is_refused() {
    let temporary = folder();
    let here = temporary.path();
    let refused = |more: &[&str], part: &str| {
        let done = train(here, "refused", more).output().unwrap();
        assert!(!done.status.success(), "{more:?} was accepted");
        assert!(said(&done).contains(part), "{}", said(&done));
    };
    refused(&SHARDED, "start one for each GPU (--nproc-per-node auto), or take \"streamed\"");
    refused(&["--base-placement", "elsewhere"], "expected one of `auto`, `resident`, `sharded`, `streamed`");
}

#[test]
fn a_rank_whose_share_is_gone_is_named_by_the_others() {
    let temporary = folder();
    let here = temporary.path();
    write_model_of(&here.join("model"), 5, CHATML, 5);
    let more = ["--lr-scheduler-type", "constant", SHARDED[0], SHARDED[1]];
    for (rank, pause) in [(1, 100), (0, 230), (2, 370)] {
        let output = format!("gone-{rank}");
        let running = Running::start(here, &output, "3", &more);
        std::thread::sleep(Duration::from_millis(pause));
        let id = running.process(rank);
        Running::signal(id, "KILL");
        let (code, said) = running.end(END);
        assert_eq!(code, Some(128 + 9), "{said}");
        assert!(said.contains(&format!("rank {rank} (process {id} on ")), "{said}");
        assert!(
            said.contains("its process ended or was killed, or the connection was cut; this rank was in step "),
            "{said}"
        );
        goes_on_with_the_same_bits(here, &output, "3");
    }
}

/// On two GPUs, each of which reads the other's share.
#[cfg(feature = "cuda")]
#[test]
fn a_base_in_shares_of_two_gpus_gives_the_same_bits() {
    if qlora::kernels::cuda::device_count() < 2 {
        println!("skipped: there are no two GPUs");
        return;
    }
    let temporary = folder();
    let here = temporary.path();
    write_model_of(&here.join("model"), 5, CHATML, 5);
    let steps = ["--max-steps", "6", "--logging-steps", "1", "--eval-steps", "3", "--target-modules", "all-linear"];
    let of = |output: &str, placement: &str| {
        let more = ["--full-determinism=true", "--nproc-per-node", "2", "--base-placement", placement];
        let mut command = train_on_gpus(here, output, &[&steps[..], &more].concat());
        let done = command.output().unwrap();
        assert!(done.status.success(), "{output}: {}", said(&done));
        said(&done)
    };
    of("whole", "resident");
    for placement in ["sharded", "streamed"] {
        let said = of(placement, placement);
        assert!(said.contains(&format!("base {placement} ")), "{said}");
        assert_eq!(log(here, placement), log(here, "whole"), "{placement}");
        assert!(adapter(here, placement) == adapter(here, "whole"), "{placement}: the adapter differs");
    }
}

#[cfg(feature = "cuda")]
fn train_on_gpus(here: &std::path::Path, output: &str, more: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_qlora"));
    command
        .args(["train", "model", "train.jsonl", "--validation-file", "eval.jsonl", "--device", "cuda", "--r", "4"])
        .args(["--per-device-train-batch-size", "2", "--output-dir", output])
        .args(more)
        .current_dir(here)
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("RANK");
    command
}
