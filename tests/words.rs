//! What the programs say: nothing twice, and in a chat only what was asked for. Ctrl-C ends an answer, not the chat.
//!
//! The examples are run as a user runs them. `cargo test` builds them; where only this file is run, they are built here.

#[path = "common/example.rs"]
mod built;
#[path = "common/random_folder.rs"]
mod random_folder;

use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use built::example;

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn nothing_is_said_twice_in_a_chain_of_errors() {
    use qlora::kernels::Error as KernelError;
    use qlora::{Error as CoreError, trainer::Error};

    let io = || std::io::Error::new(std::io::ErrorKind::NotFound, "no such thing");
    let core = || CoreError::io("a", io());
    let kernel = || KernelError::Io { op: "read", error: io() };
    let candle = || candle_core::Error::Io(io());
    for error in [
        Error::io("a", io()),
        Error::Core(core()),
        Error::Core(kernel().into()),
        Error::Core(candle().into()),
        Error::Kernel(kernel()),
        Error::Kernel(candle().into()),
        Error::Step { step: 1, micro_batch: 1, source: core() },
        Error::Step { step: 1, micro_batch: 1, source: kernel().into() },
    ] {
        let text = format!("{:?}", anyhow::Error::from(error));
        assert_eq!(text.matches("no such thing").count(), 1, "{text}");
    }
}

#[test]
fn no_error_is_printed_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let write = |name: &str, text: &str| std::fs::write(path(name), text).unwrap();
    random_folder::make(&folder.path().join("model"), 64).unwrap();
    write(
        "unknown.toml",
        "[model]\nmodel_name_or_path = \"m\"\n[data]\ntrain_file = \"t\"\n[training]\nlearning_rte = 1\n",
    );
    let (model, rows) = (path("model"), path("no-rows.jsonl"));
    write("rows.toml", &format!("[model]\nmodel_name_or_path = {model:?}\n[data]\ntrain_file = {rows:?}\n"));

    let runs: [(&str, Vec<String>, &str); 8] = [
        ("finetune", vec![path("none.toml")], "No such file"),
        ("finetune", vec![path("unknown.toml")], "learning_rte"),
        ("finetune", vec![path("rows.toml")], "no-rows.jsonl"),
        ("finetune", vec![path("rows.toml"), "--set".into(), "lora.r=many".into()], "many"),
        ("generate", vec!["--model".into(), path("none"), "the".into()], "no such file or folder"),
        (
            "generate",
            vec!["--model".into(), model.clone(), "--batch".into(), rows, "--output".into(), path("o")],
            "No such file",
        ),
        (
            "merge",
            vec!["--base".into(), model, "--adapter".into(), path("no-adapter"), "--out".into(), path("o")],
            "no-adapter",
        ),
        ("inspect", vec![path("none")], "none\""),
    ];
    for (name, arguments, said) in runs {
        let mut program = Command::new(example(name));
        // A stack is printed where somebody asked for it.
        program.args(&arguments).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
        let output = program.output().unwrap();
        let text = stderr(&output);
        assert!(!output.status.success(), "{name} {arguments:?}: {text}");
        assert_eq!(text.matches(said).count(), 1, "{name} {arguments:?} says {said:?}:\n{text}");
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| line.len() > 8).collect();
        for (at, line) in lines.iter().enumerate() {
            let again = lines[at + 1..].iter().find(|later| later.contains(line) || line.contains(*later));
            assert_eq!(again, None, "{name} {arguments:?}:\n{text}");
        }
    }
}

/// A chat with a tiny model, as lines of a pipe.
struct Chat {
    process: Child,
    /// What it says, as it comes.
    said: mpsc::Receiver<u8>,
    _folder: tempfile::TempDir,
}

impl Chat {
    fn begin(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        random_folder::make(folder.path(), 50_000).unwrap();
        let mut command = Command::new(example("generate"));
        command.args(["--device", "cpu", "--no-quantization", "--model"]).arg(folder.path()).args(arguments);
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = pipes.spawn().unwrap();
        let (send, said) = mpsc::channel();
        let mut stdout = process.stdout.take().unwrap();
        std::thread::spawn(move || {
            let mut byte = [0];
            while stdout.read_exact(&mut byte).is_ok() && send.send(byte[0]).is_ok() {}
        });
        Self { process, said, _folder: folder }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.process.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Waits until an answer ends, or if not `whole` begins.
    fn wait_for_answer(&self, whole: bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut bytes = 0;
        while let Ok(byte) = self.said.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            bytes += 1;
            if (whole && byte == b'\n') || (!whole && bytes > 20) {
                return;
            }
        }
        panic!("no answer within a minute");
    }

    /// Waits until nothing is said any more.
    fn wait_for_silence(&self) {
        while self.said.recv_timeout(Duration::from_millis(500)).is_ok() {}
    }

    /// Closes the pipe, and returns what was printed beside the answers.
    fn end(mut self) -> (bool, String) {
        drop(self.process.stdin.take());
        let output = self.process.wait_with_output().unwrap();
        (output.status.success(), stderr(&output))
    }
}

#[test]
fn figures_come_on_request() {
    let mut chat = Chat::begin(&["--max-new-tokens", "3"]);
    chat.say("the water");
    chat.wait_for_answer(true);
    chat.say("and again");
    chat.wait_for_answer(true);
    let (success, text) = chat.end();
    assert!(success && !text.contains("tokens/s") && !text.contains("keys and values"), "{text}");

    let mut chat = Chat::begin(&["--max-new-tokens", "3"]);
    for line in ["/stats", "the water", "/stats", "/clear", "/stats", "/help", "/nothing", "", "/quit", "not reached"] {
        chat.say(line);
    }
    let (success, text) = chat.end();
    assert!(success, "{text}");
    assert_eq!(text.matches("no answer yet").count(), 2, "{text}");
    assert_eq!(text.matches("3 new tokens at").count(), 1, "{text}");
    assert!(text.contains("no command /nothing") && text.matches("/quit ").count() == 2, "{text}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_the_answer_and_not_the_chat() {
    let interrupt = |chat: &Chat| {
        let status = Command::new("kill").args(["-INT", &chat.process.id().to_string()]).status().unwrap();
        assert!(status.success());
    };
    // Answers far longer than anybody waits.
    let mut chat = Chat::begin(&["--max-new-tokens", "40000"]);
    for _ in 0..2 {
        chat.say("the water");
        chat.wait_for_answer(false);
        interrupt(&chat);
        chat.wait_for_silence();
    }
    chat.say("/stats");
    let (success, text) = chat.end();
    assert!(success && text.contains("new tokens at"), "{text}");

    // At the prompt it ends the program.
    let mut chat = Chat::begin(&["--max-new-tokens", "40000"]);
    chat.say("the water");
    chat.wait_for_answer(false);
    interrupt(&chat);
    chat.wait_for_silence();
    interrupt(&chat);
    let status = chat.process.wait().unwrap();
    assert_eq!(status.code(), Some(130));
}
