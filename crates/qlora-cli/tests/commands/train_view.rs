//! What a person sees of `qlora train` on a terminal: a pseudo-terminal whose output an emulator shows.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rexpect::process::{PtyProcess, Signal, WaitStatus};

use crate::tiny_folder::{CHATML, write_model, write_rows};

const PATIENCE: Duration = Duration::from_secs(60);
/// The size that a terminal has that does not say it.
const SIZE: [u16; 2] = [24, 80];

/// `qlora train` on a terminal.
struct Terminal {
    process: PtyProcess,
    keys: File,
    output: Receiver<Vec<u8>>,
    screen: vt100::Parser,
}

impl Terminal {
    fn train(folder: &Path, arguments: &[&str]) -> Self {
        Self::train_on(Some("xterm"), folder, arguments)
    }

    /// On a terminal that the environment names so, or not at all.
    fn train_on(term: Option<&str>, folder: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(super::QLORA);
        command.args(["train", "model", "train.jsonl", "--device", "cpu"]).args(arguments).current_dir(folder);
        command.env_remove("TERM").envs(term.map(|term| ("TERM", term)));
        command.env("HF_HUB_OFFLINE", "1").env_remove("NO_COLOR");
        let process = PtyProcess::new(command).unwrap();
        let (mut reader, keys) = (process.get_file_handle().unwrap(), process.get_file_handle().unwrap());
        let (send, output) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // Reading fails once the process has ended.
            while let Ok(read @ 1..) = reader.read(&mut bytes) {
                if send.send(bytes[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        let [rows, columns] = SIZE.map(|size| NonZero::new(size).unwrap());
        Self { process, keys, output, screen: vt100::Parser::new(rows, columns, 0) }
    }

    fn text(&self) -> String {
        let lines = self.screen.screen().rows(0, SIZE[1]);
        lines.map(|line| line.trim_end().to_owned() + "\n").collect()
    }

    fn wait_for(&mut self, part: &str) {
        self.wait_until(part, |text| text.contains(part));
    }

    fn wait_until(&mut self, what: &str, shown: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !shown(&self.text()) {
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.screen.process(&bytes),
                Err(_) => panic!("{what:?} never stands on the screen:\n{}", self.text()),
            }
        }
    }

    /// The screen once the process has ended, and its exit code.
    fn end(mut self) -> (String, Option<i32>) {
        let deadline = Instant::now() + PATIENCE;
        while let Ok(bytes) = self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.screen.process(&bytes);
        }
        let screen = self.screen.screen();
        assert!(!screen.hide_cursor() && !screen.alternate_screen(), "the terminal is as it was");
        let code = match self.process.wait().unwrap() {
            WaitStatus::Exited(_, code) => Some(code),
            _ => None,
        };
        (self.text(), code)
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"), 1, CHATML);
    write_rows(&folder.path().join("train.jsonl"), &["four", "five"]);
    write_rows(&folder.path().join("held.jsonl"), &["four"]);
    folder
}

fn is_braille(c: char) -> bool {
    ('\u{2801}'..='\u{28ff}').contains(&c)
}

fn has_checkpoint(folder: &Path) -> bool {
    let saved = std::fs::read_dir(folder.join("output")).unwrap();
    saved.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("checkpoint-"))
}

const ENDLESS: [&str; 2] = ["--max-steps", "1000000"];

#[test]
fn a_whole_run_leaves_its_last_state_behind() {
    let folder = folder();
    let asked = ["--sample-every", "20", "--sample-prompts", "[\"How much is it?\"]", "--sample-max-new-tokens", "4"];
    let run =
        ["-v", "--max-steps", "40", "--validation-file", "held.jsonl", "--eval-steps", "20", "--learning-rate", "1e-2"];
    let (text, code) = Terminal::train(folder.path(), &[&run[..], &asked].concat()).end();
    assert_eq!(code, Some(0), "{text}");
    for part in [
        "step 40/40",
        "100%",
        "loss ",
        "eval ",
        "(step 40)",
        "lr ",
        "norm ",
        "tok/s",
        "memory 0.",
        "How much is it?",
        "\n→ ",
    ] {
        assert!(text.contains(part), "{part:?}\n{text}");
    }
    // The curve falls: it begins at the top left and ends at the bottom right.
    let curve: Vec<&str> = text.lines().filter(|line| line.contains(is_braille)).collect();
    let first = |line: &str| line.chars().position(is_braille);
    assert!(curve.len() > 2 && first(curve[0]) < first(curve[curve.len() - 1]), "{text}");
    // Neither the log nor lines that stay leave parts of the view behind.
    assert_eq!(text.matches("left").count(), 1, "{text}");
    assert!(text.contains("saved output/checkpoint-40") && text.contains("step 40: How much is it? -> "), "{text}");
    let view = text.find("step 40/40  epoch").unwrap();
    assert!(text.find("saved output").unwrap() < view && view < text.find("adapter: output").unwrap(), "{text}");
}

#[test]
fn ctrl_c_and_sigterm_save_and_leave_the_terminal_as_it_was() {
    for (signal, code) in [(None, 130), (Some(Signal::SIGTERM), 143)] {
        let folder = folder();
        let mut terminal = Terminal::train(folder.path(), &ENDLESS);
        terminal.wait_for("tok/s");
        match signal {
            None => terminal.keys.write_all(&[3]).unwrap(),
            Some(signal) => terminal.process.signal(signal).unwrap(),
        }
        let (text, exit) = terminal.end();
        for part in
            ["stopping: finishing the step, then saving", "saved output/checkpoint-", "interrupted; resume_from"]
        {
            assert!(text.contains(part), "{part:?}\n{text}");
        }
        assert_eq!(exit, Some(code), "{text}");
        assert!(text.contains("/1000000  epoch") && has_checkpoint(folder.path()), "{text}");
    }
}

/// As after a panic: nothing of the program runs any more, and there is nothing to restore.
#[test]
fn a_killed_run_leaves_the_terminal_as_it_was() {
    let folder = folder();
    let mut terminal = Terminal::train(folder.path(), &ENDLESS);
    // A first step has no curve yet.
    terminal.wait_until("a curve", |text| text.contains(is_braille));
    terminal.process.signal(Signal::SIGKILL).unwrap();
    let (_, code) = terminal.end();
    assert_eq!(code, None, "killed, not ended");
}

#[test]
fn a_terminal_without_a_cursor_gets_every_line() {
    let folder = folder();
    for (term, options) in [(Some("dumb"), &[][..]), (None, &[][..]), (Some("dumb"), &["--no-tui"][..])] {
        let run = ["-v", "--max-steps", "3", "--overwrite-output-dir"];
        let (text, code) = Terminal::train_on(term, folder.path(), &[&run[..], options].concat()).end();
        assert_eq!(code, Some(0), "{text}");
        // Steps, a message of the run, and the log.
        for part in ["step 1/3  epoch", "step 3/3  epoch", "saved output/checkpoint-3", "INFO "] {
            assert!(text.contains(part), "{part:?} with TERM={term:?} {options:?}\n{text}");
        }
        assert!(!text.contains(is_braille), "{text}");
    }
}

#[test]
fn the_view_is_for_who_wants_it() {
    let folder = folder();
    let run = ["--max-steps", "30", "--overwrite-output-dir"];
    let (text, code) = Terminal::train(folder.path(), &[&run[..], &["--no-tui"]].concat()).end();
    assert!(code == Some(0) && !text.contains(is_braille) && text.contains("30/30  epoch"), "{text}");
    let (text, code) = Terminal::train(folder.path(), &[&run[..], &["-q"]].concat()).end();
    assert_eq!((text.trim(), code), ("adapter: output\nreport: output/report.html", Some(0)));
}
