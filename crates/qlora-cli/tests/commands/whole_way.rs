//! From a configuration to a merged model, each command with what the one before it wrote.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::tiny_folder::{CHATML, write_model, write_rows};

/// Runs `qlora` in a folder.
pub(crate) fn qlora(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(super::QLORA).args(arguments).current_dir(folder).env("HF_HUB_OFFLINE", "1").output().unwrap()
}

/// Runs the command, which must succeed, and returns its standard output.
pub(crate) fn printed(folder: &Path, arguments: &[&str]) -> String {
    let output = qlora(folder, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qlora {}: {stderr}", arguments.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn json(folder: &Path, arguments: &[&str]) -> Value {
    let text = printed(folder, arguments);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("qlora {}: {error}\n{text}", arguments.join(" ")))
}

/// A model and rows to train it on.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"), 1, CHATML);
    write_rows(&folder.path().join("train.jsonl"), &["four", "five", "a longer answer", "four"]);
    folder
}

#[test]
fn from_a_configuration_to_a_merged_model() {
    let temporary = folder();
    let here = temporary.path();

    let text = printed(here, &["init", "--model", "model", "--data", "train.jsonl", "--r", "4", "--max-steps", "3"]);
    assert_eq!(text, "qlora.toml\n");
    let again = qlora(here, &["init", "--model", "model", "--data", "train.jsonl"]);
    assert!(!again.status.success() && String::from_utf8_lossy(&again.stderr).contains("--force"));

    let looked_at = json(here, &["data", "qlora.toml", "--json"]);
    assert_eq!((looked_at["rows"].as_u64(), looked_at["documents"].as_u64()), (Some(4), Some(4)));
    assert!(looked_at["problems"].as_array().unwrap().is_empty());

    let plan = qlora(here, &["train", "qlora.toml", "--dry-run"]);
    let said = String::from_utf8_lossy(&plan.stderr);
    assert!(plan.status.success() && said.contains("3 steps") && !here.join("output").exists(), "{said}");
    let text = printed(here, &["train", "qlora.toml", "--learning-rate", "1e-2", "--device", "cpu"]);
    assert!(text.contains("adapter: output"), "{text}");
    assert!(here.join("output/adapter_model.safetensors").exists() && here.join("output/metrics.jsonl").exists());
    let page = std::fs::read_to_string(here.join("output/report.html")).unwrap();
    assert!(page.contains("finished") && page.contains("learning_rate = 0.01"), "{page}");

    let before = json(here, &["eval", "--model", "model", "train.jsonl", "--device", "cpu", "--json"]);
    let after = json(here, &["eval", "--adapter", "output", "train.jsonl", "--device", "cpu", "--json"]);
    assert!(after["loss"].as_f64() < before["loss"].as_f64(), "{before} {after}");
    assert_eq!(before["tokens"], after["tokens"]);

    let found = json(here, &["adapters", "list", "--json"]);
    assert!(
        found.as_array().unwrap().iter().any(|adapter| adapter["path"] == "./output" && adapter["r"] == 4),
        "{found}"
    );
    let shown = json(here, &["adapters", "show", "output", "--json"]);
    assert_eq!((shown["base_model"].as_str(), shown["kinds"][0].as_str()), (Some("model"), Some("LoRA")));
    printed(here, &["adapters", "convert", "output", "half", "--dtype", "bf16"]);
    let half = json(here, &["adapters", "show", "half", "--json"]);
    assert!(half["bytes"].as_u64() < shown["bytes"].as_u64(), "{half} {shown}");

    printed(here, &["merge", "--adapter", "output", "--out", "merged", "--gap-tokens", "0"]);
    let merged =
        json(here, &["eval", "--model", "merged", "--no-quantization", "train.jsonl", "--device", "cpu", "--json"]);
    let difference = merged["loss"].as_f64().unwrap() - after["loss"].as_f64().unwrap();
    assert!(difference.abs() < 1e-3, "{merged} {after}");

    let answer = ["generate", "--adapter", "output", "--max-new-tokens", "4", "--device", "cpu", "How much is it?"];
    assert!(printed(here, &answer).ends_with('\n'));
}

#[test]
fn rows_are_shown_as_the_model_sees_them() {
    let temporary = folder();
    let here = temporary.path();
    let text = printed(here, &["data", "model", "train.jsonl", "--rows", "1"]);
    // The trained tokens stand between the brackets: the answer and its end token.
    assert!(text.contains("<|im_start|>assistant\n⟦four<|im_end|>⟧"), "{text}");
    assert!(text.contains("duplicates") && text.contains("train.jsonl:4 is train.jsonl:1 again"), "{text}");
    assert!(!text.contains('\u{1b}'), "no colours in a pipe");
    let text = printed(here, &["--color", "always", "data", "model", "train.jsonl", "--rows", "1"]);
    assert!(text.contains("\u{1b}[32mfour<|im_end|>\u{1b}[0m"), "{text:?}");

    std::fs::write(here.join("broken.jsonl"), "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n").unwrap();
    let output = qlora(here, &["data", "model", "broken.jsonl"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("broken.jsonl:2: "), "{text}");
}

#[test]
fn what_is_read_by_programs() {
    let temporary = folder();
    let here = temporary.path();
    let figures = json(here, &["inspect", "model", "--r", "4", "--shape", "1x64", "--json"]);
    assert_eq!(figures["adapter"]["r"], 4);
    assert!(figures["training_step"]["least"].as_u64() <= figures["training_step"]["all_kept"].as_u64());
    let health = json(here, &["doctor", "--json"]);
    assert_eq!(health["processor"]["state"], "good");
    for shell in ["bash", "zsh", "fish"] {
        assert!(printed(here, &["completions", shell]).contains("learning-rate"), "{shell}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let temporary = folder();
    let mut child = Command::new(super::QLORA)
        .args(["data", "model", "train.jsonl"])
        .current_dir(temporary.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_card_need_not_be_there() {
    let temporary = folder();
    let here = temporary.path();
    let text = printed(here, &["train", "model", "train.jsonl", "--dry-run", "--card", "T4", "--device", "cuda:7"]);
    assert!(text.contains("on T4 (computed") && text.contains("computes in float16"), "{text}");
    let small = [
        "inspect",
        "model",
        "--shape",
        "1x64",
        "--card",
        "rtx 3060",
        "--card-memory",
        "8",
        "--link",
        "6",
        "--host-memory",
        "8",
    ];
    let text = printed(here, &small);
    assert!(text.contains("on RTX 3060 (computed") && text.contains("6 GB/s to the host"), "{text}");
    let card = &json(here, &[&small[..], &["--json"]].concat())["card"];
    assert_eq!((card["dtype"].as_str(), card["memory"].as_u64()), (Some("bfloat16"), Some(8_160_437_862)));
    assert!(card["computed_tokens_per_second"][0].as_f64() < card["computed_tokens_per_second"][1].as_f64());
    for (arguments, said) in [
        (&["inspect", "model", "--card", "GTX 1080"][..], "RTX 3060"),
        (&["inspect", "model", "--link", "6"], "--card"),
        (&["train", "model", "train.jsonl", "--card", "T4"], "--dry-run"),
    ] {
        let output = qlora(here, arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(said), "{arguments:?}: {stderr}");
    }
}
