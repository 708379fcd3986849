//! Tests of the terminal's display and its keys.

use std::path::Path;
use std::process::Command;

use rexpect::session::{PtySession, spawn_command};

use crate::random_folder;
use crate::tiny_folder::{CHATML, write_model, write_rows};

const PATIENCE_MS: Option<u64> = Some(60_000);

fn begin(folder: &Path, arguments: &[&str]) -> PtySession {
    let mut command = Command::new(super::QLORA);
    command.args(arguments).current_dir(folder).env("TERM", "xterm").env("HF_HUB_OFFLINE", "1").env_remove("NO_COLOR");
    spawn_command(command, PATIENCE_MS).unwrap()
}

#[test]
fn init_asks_for_what_it_needs() {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"), 1, CHATML);
    write_rows(&folder.path().join("train.jsonl"), &["four"]);
    let mut terminal = begin(folder.path(), &["init"]);
    terminal.exp_string("Model (a folder").unwrap();
    terminal.send_line("model").unwrap();
    terminal.exp_string("Data").unwrap();
    terminal.send_line("train.jsonl").unwrap();
    terminal.exp_string("Layers to adapt").unwrap();
    terminal.send_line("all-linear").unwrap();
    terminal.exp_string("a step of 2 documents").unwrap();
    terminal.exp_string("next: qlora data qlora.toml").unwrap();
    terminal.exp_eof().unwrap();
    let text = std::fs::read_to_string(folder.path().join("qlora.toml")).unwrap();
    assert!(
        text.contains("model_name_or_path = \"model\"") && text.contains("target_modules = \"all-linear\""),
        "{text}"
    );

    // Ctrl-D gives up, and writes nothing.
    std::fs::remove_file(folder.path().join("qlora.toml")).unwrap();
    let mut terminal = begin(folder.path(), &["init"]);
    terminal.exp_string("Model (a folder").unwrap();
    terminal.send_control('d').unwrap();
    terminal.exp_string("nothing is written").unwrap();
    terminal.exp_eof().unwrap();
    assert!(!folder.path().join("qlora.toml").exists());
}

#[test]
fn a_chat_has_lines_that_are_recalled_and_answers_that_end() {
    let folder = tempfile::tempdir().unwrap();
    random_folder::make(folder.path(), 50_000).unwrap();
    let model = folder.path().to_str().unwrap();
    let arguments = ["chat", "--device", "cpu", "--no-quantization", "--model", model, "--max-new-tokens", "40000"];
    let mut terminal = begin(folder.path(), &arguments);
    terminal.exp_string("Say something.").unwrap();
    terminal.exp_string("> ").unwrap();
    terminal.send_line("the water").unwrap();
    // The line is taken, and some of the answer is there; nobody waits for all of it.
    terminal.exp_string("\u{1b}[?2004l").unwrap();
    terminal.exp_regex("[a-zA-Z]{3}").unwrap();
    terminal.send_control('c').unwrap();
    terminal.exp_string("> ").unwrap();
    // The line before, by the arrow key.
    terminal.send("\u{1b}[A").unwrap();
    terminal.flush().unwrap();
    terminal.exp_string("the water").unwrap();
    // Ctrl-U empties the line.
    terminal.send_control('u').unwrap();
    terminal.send_line("/stats").unwrap();
    terminal.exp_string("new tokens at").unwrap();
    terminal.exp_string("> ").unwrap();
    terminal.send_control('d').unwrap();
    terminal.exp_eof().unwrap();
}

#[test]
fn training_shows_a_bar_and_ctrl_c_saves() {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"), 1, CHATML);
    write_rows(&folder.path().join("train.jsonl"), &["four", "five"]);
    let arguments =
        ["train", "model", "train.jsonl", "--device", "cpu", "--max-steps", "1000000", "--logging-steps", "1000"];
    let mut terminal = begin(folder.path(), &arguments);
    terminal.exp_string("training on the CPU").unwrap();
    terminal.exp_string("loss").unwrap();
    terminal.send_control('c').unwrap();
    terminal.exp_string("checkpoint").unwrap();
    terminal.exp_eof().unwrap();
    let status = terminal.process.wait().unwrap();
    assert!(format!("{status:?}").contains("130"), "{status:?}");
    let saved = std::fs::read_dir(folder.path().join("output")).unwrap();
    assert!(saved.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("checkpoint-")));
}

#[test]
fn rows_are_green_where_they_are_trained() {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"), 1, CHATML);
    write_rows(&folder.path().join("train.jsonl"), &["four"]);
    let mut terminal = begin(folder.path(), &["data", "model", "train.jsonl"]);
    terminal.exp_string("\u{1b}[32mfour<|im_end|>\u{1b}[0m").unwrap();
    terminal.exp_string("1 rows").unwrap();
    terminal.exp_eof().unwrap();
}
