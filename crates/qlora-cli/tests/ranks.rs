//! Several processes that train one model, on the CPU: the same run however many there are, and an end on every rank when one of
//! them ends.
#![cfg(target_os = "linux")]

#[path = "ranks/context.rs"]
mod context;
#[path = "ranks/placement.rs"]
mod placement;
#[path = "../../../tests/common/tiny_folder.rs"]
mod tiny_folder;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tiny_folder::{CHATML, write_model, write_rows};

/// The time limit for the other ranks to end after one did.
const END: Duration = Duration::from_secs(15);

/// A model and rows of different lengths, some to evaluate on.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"), 1, CHATML);
    let rows: Vec<String> = (0..40).map(|i| format!("answer {}", "x".repeat(i * 7 % 23))).collect();
    let rows: Vec<&str> = rows.iter().map(String::as_str).collect();
    write_rows(&folder.path().join("train.jsonl"), &rows);
    write_rows(&folder.path().join("eval.jsonl"), &rows[..7]);
    folder
}

/// `qlora train` of some steps into a folder.
fn train(here: &Path, output: &str, more: &[&str]) -> Command {
    train_on(here, "model", "train.jsonl", output, more)
}

fn train_on(here: &Path, model: &str, data: &str, output: &str, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_qlora"));
    command
        .args(["train", model, data, "--validation-file", "eval.jsonl", "--device", "cpu", "--r", "4"])
        .args(["--lora-dropout", "0.1", "--per-device-train-batch-size", "2", "--output-dir", output])
        .args(more)
        .current_dir(here)
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("RANK")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn run(here: &Path, output: &str, more: &[&str]) -> String {
    let done = train(here, output, more).output().unwrap();
    assert!(done.status.success(), "{output}: {}", said(&done));
    said(&done)
}

fn adapter(here: &Path, output: &str) -> Vec<u8> {
    fs::read(here.join(output).join("adapter_model.safetensors")).unwrap()
}

/// The log without what differs from run to run.
fn log(here: &Path, output: &str) -> Vec<Value> {
    let text = fs::read_to_string(here.join(output).join("metrics.jsonl")).unwrap();
    let entry = |line: &str| {
        let mut entry: Value = serde_json::from_str(line).unwrap();
        let fields = entry.as_object_mut().unwrap();
        let differs = ["memory", "second", "runtime", "imbalance"];
        fields.retain(|name, _| !differs.iter().any(|part| name.contains(part)));
        entry
    };
    text.lines().map(entry).collect()
}

const FIFTY: [&str; 8] = ["--max-steps", "50", "--logging-steps", "1", "--eval-steps", "20", "--save-steps", "20"];

#[test]
fn a_run_has_the_same_bits_on_any_number_of_ranks() {
    let temporary = folder();
    let here = temporary.path();
    // Forty rows in batches of two: the last step of an epoch has fewer micro-batches than others, and than ranks.
    for (micro_batches, spreads) in [(4, &[2, 4][..]), (3, &[3])] {
        let alone = format!("alone-{micro_batches}");
        run(here, &alone, &[&FIFTY[..], &["--gradient-accumulation-steps", &micro_batches.to_string()]].concat());
        for ranks in spreads {
            let output = format!("{ranks}-of-{micro_batches}");
            let each = (micro_batches / ranks).to_string();
            let number = ranks.to_string();
            let spread = ["--gradient-accumulation-steps", &each, "--nproc-per-node", &number];
            // Prompts are answered by one rank, and change nothing.
            let asked = ["--sample-every", "25", "--sample-max-new-tokens", "3"];
            let said = run(here, &output, &[&FIFTY[..], &spread, &asked].concat());
            let answers = fs::read_to_string(here.join(&output).join("samples.jsonl")).unwrap();
            assert_eq!(answers.lines().count(), 9, "three rows before, between and after: {answers}");
            assert!(said.contains("the ranks' shares of a step's tokens are uneven by "), "{said}");
            assert!(said.contains("time of the ranks: ") && said.contains("% waiting for each other; rank "), "{said}");
            let logged = fs::read_to_string(here.join(&output).join("metrics.jsonl")).unwrap();
            for name in ["compute_seconds", "communication_seconds", "waiting_seconds", "token_imbalance"] {
                assert_eq!(logged.matches(&format!("\"{name}\":")).count(), 50, "{name}");
            }
            let step = format!("{} rows a step: batches of 2, {each} on each rank", 2 * micro_batches);
            assert!(said.contains(&format!("{ranks} ranks: {ranks} on ")) && said.contains(&step), "{said}");
            assert_eq!(log(here, &output), log(here, &alone), "{output}");
            assert!(adapter(here, &output) == adapter(here, &alone), "{output}: the adapter differs");
        }
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let temporary = folder();
    let here = temporary.path();
    run(here, "whole", &[&FIFTY[..], &["--gradient-accumulation-steps", "4"]].concat());
    let part = |steps: &str, ranks: &str, each: &str| {
        let options = ["--max-steps", steps, "--nproc-per-node", ranks, "--gradient-accumulation-steps", each];
        let logs =
            ["--logging-steps", "1", "--eval-steps", "20", "--save-steps", "20", "--lr-scheduler-type", "constant"];
        let resume = ["--resume-from-checkpoint", "true"];
        train(here, "parts", &[&options[..], &logs, &resume].concat()).output().unwrap()
    };
    run(
        here,
        "whole",
        &[
            &FIFTY[..],
            &["--gradient-accumulation-steps", "4", "--lr-scheduler-type", "constant", "--overwrite-output-dir"],
        ]
        .concat(),
    );
    for (steps, ranks, each) in
        [("20", "4", "1"), ("30", "2", "2"), ("34", "2", "1"), ("40", "2", "1"), ("50", "1", "1")]
    {
        let done = part(steps, ranks, each);
        assert!(done.status.success(), "{ranks} ranks: {}", said(&done));
    }
    assert!(adapter(here, "parts") == adapter(here, "whole"), "the adapter differs");
    // Four micro-batches a step are no three's.
    let refused = part("60", "3", "1");
    let text = said(&refused);
    assert!(!refused.status.success() && text.contains("4 micro-batches, which 3 ranks cannot share evenly"), "{text}");
    assert!(text.contains("go on with 1, 2, 4 ranks"), "{text}");
}

/// A run that goes on until it is stopped.
struct Running {
    launcher: Child,
}

impl Running {
    fn start(here: &Path, output: &str, ranks: &str, more: &[&str]) -> Self {
        let long =
            ["--max-steps", "200000", "--save-steps", "20", "--save-total-limit", "2", "--nproc-per-node", ranks];
        let launcher = train(here, output, &[&long[..], more].concat()).spawn().unwrap();
        // Until the first checkpoint is there.
        let deadline = Instant::now() + Duration::from_secs(60);
        while !fs::read_dir(here.join(output))
            .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_string_lossy() == "checkpoint-20"))
            && !fs::read_dir(here.join(output)).is_ok_and(|entries| entries.flatten().count() > 4)
        {
            assert!(Instant::now() < deadline, "no checkpoint after a minute");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { launcher }
    }

    /// The process of a rank.
    fn process(&self, rank: usize) -> u32 {
        self.find(rank).unwrap_or_else(|| panic!("rank {rank} is not there"))
    }

    fn find(&self, rank: usize) -> Option<u32> {
        let launcher = self.launcher.id();
        let tasks = fs::read_dir(format!("/proc/{launcher}/task")).unwrap().flatten();
        let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let ids: Vec<u32> = children
            .flat_map(|text| text.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<u32>>())
            .collect();
        let is_rank = |id: &&u32| {
            let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|entry| entry == format!("RANK={rank}").as_bytes())
        };
        ids.iter().find(is_rank).copied()
    }

    fn signal(id: u32, name: &str) {
        assert!(Command::new("kill").args([format!("-{name}"), id.to_string()]).status().unwrap().success());
    }

    /// Waits until all ranks have ended, at most `limit`; the exit code and the output.
    fn end(mut self, limit: Duration) -> (Option<i32>, String) {
        let begin = Instant::now();
        while self.launcher.try_wait().unwrap().is_none() {
            if begin.elapsed() > limit {
                Self::signal(self.launcher.id(), "KILL");
                panic!(
                    "the ranks still ran {limit:?} after one ended: {}",
                    said(&self.launcher.wait_with_output().unwrap())
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let output = self.launcher.wait_with_output().unwrap();
        (output.status.code(), said(&output))
    }
}

/// The last checkpoint of a run.
fn reached(here: &Path, output: &str) -> u64 {
    let names = fs::read_dir(here.join(output)).unwrap().flatten().map(|entry| entry.file_name());
    let numbers = names.filter_map(|name| name.to_string_lossy().strip_prefix("checkpoint-")?.parse::<u64>().ok());
    numbers.max().unwrap_or(0)
}

/// Resumes a run for a few steps, and compares it with one that nobody disturbed.
fn goes_on_with_the_same_bits(here: &Path, output: &str, ranks: &str) {
    goes_on(here, output, &["--nproc-per-node", ranks]);
}

/// The same with these options.
fn goes_on(here: &Path, output: &str, options: &[&str]) {
    let until = (reached(here, output) + 5).to_string();
    let more = ["--max-steps", &until, "--lr-scheduler-type", "constant", "--save-steps", "0"];
    run(here, output, &[&more[..], options, &["--resume-from-checkpoint", "true"]].concat());
    let through = format!("{output}-through");
    run(here, &through, &[&more[..], options].concat());
    assert!(adapter(here, output) == adapter(here, &through), "{output}: the adapter differs");
}

#[test]
fn a_rank_that_is_killed_ends_the_others_who_name_it() {
    let temporary = folder();
    let here = temporary.path();
    for (rank, witness) in [(1, 0), (0, 1)] {
        let output = format!("killed-{rank}");
        let running = Running::start(here, &output, "3", &["--lr-scheduler-type", "constant"]);
        std::thread::sleep(Duration::from_millis(150 + 130 * rank as u64));
        let id = running.process(rank);
        Running::signal(id, "KILL");
        let (code, said) = running.end(END);
        assert_eq!(code, Some(128 + 9), "{said}");
        assert!(said.contains(&format!("rank {rank} (process {id} on ")), "{said}");
        let why = "its process ended or was killed, or the connection was cut; this rank was in step ";
        assert!(said.contains(why), "{said}");
        assert!(witness == 0 || said.contains("[rank 2] "), "{said}");
        assert!(said.contains(&format!("[launcher] rank {rank} (process {id}) was ended by signal 9")), "{said}");
        goes_on_with_the_same_bits(here, &output, "3");
    }
}

#[test]
fn a_rank_that_is_killed_before_the_first_step_ends_the_others() {
    let temporary = folder();
    let here = temporary.path();
    let launcher = train(here, "early", &["--max-steps", "200000", "--nproc-per-node", "3"]).spawn().unwrap();
    let running = Running { launcher };
    let deadline = Instant::now() + Duration::from_secs(30);
    // As soon as it is there; its meeting with the others is as likely before as after.
    let id = loop {
        match running.find(2) {
            Some(id) => break id,
            None => assert!(Instant::now() < deadline, "rank 2 does not come"),
        }
    };
    Running::signal(id, "KILL");
    let (code, said) = running.end(END);
    assert_eq!(code, Some(128 + 9), "{said}");
    assert!(said.contains(&format!("[launcher] rank 2 (process {id}) was ended by signal 9")), "{said}");
}

/// Stops a rank; the others miss it in time, and the launcher ends it.
fn stop(rank: usize, witness: usize) {
    let temporary = folder();
    let here = temporary.path();
    let output = format!("stopped-{rank}");
    let running = Running::start(here, &output, "2", &["--lr-scheduler-type", "constant"]);
    let (id, other) = (running.process(rank), running.process(witness));
    Running::signal(id, "STOP");
    let begin = Instant::now();
    while fs::read_to_string(format!("/proc/{other}/stat")).is_ok_and(|text| !text.contains(") Z ")) {
        assert!(begin.elapsed() < END, "rank {witness} goes on");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(begin.elapsed() > Duration::from_secs(7));
    let (_, said) = running.end(END);
    assert!(
        said.contains(&format!("rank {rank} (process {id} on ")) && said.contains("has not been heard of for 10 s"),
        "{said}"
    );
    goes_on_with_the_same_bits(here, &output, "2");
}

#[test]
fn a_rank_that_is_stopped_is_missed() {
    stop(1, 0);
}

#[test]
fn a_first_rank_that_is_stopped_is_missed() {
    stop(0, 1);
}

#[test]
fn a_request_to_one_rank_saves_everywhere_and_the_run_goes_on_with_the_same_bits() {
    let temporary = folder();
    let here = temporary.path();
    let running = Running::start(here, "asked", "2", &["--lr-scheduler-type", "constant"]);
    Running::signal(running.process(1), "TERM");
    let (code, said) = running.end(END);
    assert!(matches!(code, Some(130 | 143)), "{code:?}: {said}");
    let reached = reached(here, "asked");
    assert!(reached >= 20, "{reached}");
    let until = (reached + 10).to_string();
    let more = ["--max-steps", &until, "--lr-scheduler-type", "constant", "--save-steps", "0"];
    run(here, "asked", &[&more[..], &["--nproc-per-node", "2", "--resume-from-checkpoint", "true"]].concat());
    run(here, "through", &[&more[..], &["--nproc-per-node", "2"]].concat());
    assert!(adapter(here, "asked") == adapter(here, "through"), "the adapter differs");
}

/// Ranks that are started by hand, each in its own way; what they say and how they end.
fn by_hand(commands: Vec<Command>) -> Vec<Output> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let size = commands.len().to_string();
    let started: Vec<Child> = commands
        .into_iter()
        .enumerate()
        .map(|(rank, mut command)| {
            let rank = rank.to_string();
            let variables = [("RANK", &rank), ("LOCAL_RANK", &rank), ("WORLD_SIZE", &size), ("MASTER_PORT", &port)];
            command.envs(variables.map(|(name, value)| (name, value.as_str()))).env("MASTER_ADDR", "127.0.0.1");
            command.spawn().unwrap()
        })
        .collect();
    started.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
}

#[test]
fn ranks_that_differ_refuse_to_start_and_say_in_what() {
    let temporary = folder();
    let here = temporary.path();
    let three = |model: &str, data: &str, output: &str, more: &[&str]| {
        train_on(here, model, data, output, &[&["--max-steps", "3"], more].concat())
    };
    let refused = |second: Command, expected: &str| {
        let outputs = by_hand(vec![three("model", "train.jsonl", "first", &[]), second]);
        for (rank, output) in outputs.iter().enumerate() {
            let text = said(output);
            assert!(!output.status.success() && text.contains(expected), "rank {rank}: {text}");
        }
        assert!(!here.join("second").exists(), "rank 1 wrote");
    };
    let with = |more: &[&str]| three("model", "train.jsonl", "second", more);
    refused(with(&["--learning-rate", "1e-3"]), "training.learning_rate: 0.0002 at rank 0, 0.001 at rank 1");
    refused(with(&["--save-steps", "2"]), "training.save_steps: ");
    let all = fs::read_to_string(here.join("train.jsonl")).unwrap();
    fs::write(here.join("other.jsonl"), all.replacen("answer", "another", 1)).unwrap();
    refused(three("model", "other.jsonl", "second", &[]), "training data: 40 documents");
    write_model(&here.join("other"), 2, CHATML);
    refused(three("other", "train.jsonl", "second", &[]), "model: weights: ");
    // One that cannot load its model ends the others with its words.
    write_model(&here.join("broken"), 1, CHATML);
    fs::write(here.join("broken/model.safetensors"), b"no weights").unwrap();
    let broken = three("broken", "train.jsonl", "second", &[]);
    let outputs = by_hand(vec![three("model", "train.jsonl", "first", &[]), broken]);
    let text = said(&outputs[0]);
    assert!(text.contains("rank 1 failed: ") && text.contains("model.safetensors"), "{text}");
    assert!(outputs.iter().all(|output| !output.status.success()), "{text}");
}
