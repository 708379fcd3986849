//! A chat over pipes: only what was asked for is said, and Ctrl-C ends an answer, not the chat.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::random_folder;

/// A chat with a tiny model, as lines of a pipe.
struct Chat {
    process: Child,
    /// The command's output, byte by byte as it comes.
    said: mpsc::Receiver<u8>,
    _folder: tempfile::TempDir,
}

impl Chat {
    fn begin(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        random_folder::make(folder.path(), 50_000).unwrap();
        let mut command = Command::new(super::QLORA);
        command.args(["chat", "--device", "cpu", "--no-quantization", "--model"]).arg(folder.path()).args(arguments);
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
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
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
