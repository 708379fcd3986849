//! Every kind of data that a command takes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::tiny_folder::{CHATML, write_model, write_rows};

const ON_CPU: [&str; 4] = ["--device", "cpu", "--r", "4"];

/// Runs `qlora` in a folder, with a text on its standard input.
fn qlora(folder: &Path, arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(super::QLORA)
        .args(arguments)
        .current_dir(folder)
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", folder.join("hub"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that does not read it has ended, or will.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

/// Runs the command, which must succeed, and returns its standard output and standard error.
fn worked(folder: &Path, arguments: &[&str], input: &str) -> (String, String) {
    let output = qlora(folder, arguments, input);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (printed, said) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "qlora {}: {said}{printed}", arguments.join(" "));
    (printed, said)
}

fn rows(folder: &Path, arguments: &[&str]) -> Value {
    let (printed, _) = worked(folder, &[&["data"], arguments, &["--json"]].concat(), "");
    serde_json::from_str(&printed).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/rows").join(name)
}

/// A model, and data of several formats: 4 rows of JSONL, 2 of CSV, 20 of Parquet in a folder, 3 in the cache of the hub.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_model(&at("model"), 1, CHATML);
    write_rows(&at("train.jsonl"), &["four", "five", "a longer answer", "four"]);
    std::fs::write(at("more.csv"), "question,answer\n\"what, then\",this\nwhy,because\n").unwrap();
    std::fs::create_dir(at("folder")).unwrap();
    std::fs::copy(fixture("texts.parquet"), at("folder/texts.parquet")).unwrap();
    let cached = at("hub/hub/datasets--some--set");
    let commit = "0123456789012345678901234567890123456789";
    std::fs::create_dir_all(cached.join("refs")).unwrap();
    std::fs::write(cached.join("refs/main"), commit).unwrap();
    std::fs::create_dir_all(cached.join("snapshots").join(commit)).unwrap();
    let train = cached.join("snapshots").join(commit).join("train.jsonl");
    write_rows(&train, &["one", "two", "three"]);
    folder
}

#[test]
fn files_folders_patterns_and_the_hub() {
    let temporary = folder();
    let here = temporary.path();
    let count = |what: &[&str]| rows(here, &[&["model"], what].concat())["rows"].as_u64().unwrap();
    assert_eq!(count(&["train.jsonl"]), 4);
    assert_eq!(count(&["folder", "--on-untrained", "skip"]), 20);
    assert_eq!(count(&["f*/t*.parquet", "train.jsonl", "--on-untrained", "skip"]), 24);
    assert_eq!(count(&["some/set"]), 3);
    assert_eq!(count(&["some/set", "train.jsonl", "--max-samples", "5"]), 5);
    for name in ["conversations.parquet", "conversations.json", "conversations.jsonl.gz"] {
        assert_eq!(count(&[fixture(name).to_str().unwrap()]), 3, "{name}");
    }
    let (printed, _) = worked(here, &["data", "model", "-"], "{\"text\": \"from a pipe\"}\n");
    assert!(printed.contains("-:1") && printed.contains("⟦from a pipe<|im_end|>⟧"), "{printed}");
    // Rows of Parquet have numbers, not lines.
    let (printed, _) = worked(here, &["data", "model", "folder", "--on-untrained", "skip", "--rows", "1"], "");
    assert!(printed.contains("texts.parquet, row "), "{printed}");
    let output = qlora(here, &["data", "model", "other/set"], "");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("other/set"), "{said}");
    // Columns whose names say nothing.
    let output = qlora(here, &["data", "model", "more.csv"], "");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.code() == Some(1) && printed.contains("more.csv:2: "), "{printed}");
}

#[test]
fn a_mixture_trains_and_is_evaluated() {
    let temporary = folder();
    let here = temporary.path();
    let set = "[{ path = \"more.csv\", field_instruction = \"question\", field_output = \"answer\" }]";
    let mixed = ["model", "train.jsonl", "--datasets", set, "--mix-strategy", "interleave_under"];
    let found = rows(here, &mixed);
    assert_eq!((found["rows"].as_u64(), found["problems"].as_array().map(Vec::len)), (Some(6), Some(0)));
    let run = [&["train"][..], &mixed, &ON_CPU, &["--max-steps", "2", "--val-size", "1", "--eval-steps", "1"]].concat();
    let (_, said) = worked(here, &[&run[..], &["--dry-run"]].concat(), "");
    assert!(said.contains("to evaluate on: 1 document") && !here.join("output").exists(), "{said}");
    worked(here, &run, "");
    let log = std::fs::read_to_string(here.join("output/metrics.jsonl")).unwrap();
    assert!(log.contains("eval_loss"), "{log}");
    let (printed, _) =
        worked(here, &["eval", "--adapter", "output", "some/set", "--device", "cpu", "--exact-match"], "");
    assert!(printed.contains("of 3 documents") && printed.contains("of 3 answers"), "{printed}");
}

#[test]
fn a_stream_comes_through_a_pipe() {
    let temporary = folder();
    let here = temporary.path();
    let input: String = (0..40).map(|i| format!("{{\"prompt\": \"q{i}\", \"completion\": \"a{i}\"}}\n")).collect();
    let stream = [&["train", "model", "-", "--streaming"][..], &ON_CPU, &["--buffer-size", "8"]].concat();
    let (printed, said) = worked(here, &[&stream[..], &["--max-steps", "2"]].concat(), &input);
    assert!(printed.contains("adapter: output") && said.contains("streamed"), "{said}");
    let output = qlora(here, &stream, &input);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("max_steps"), "{said}");
}
