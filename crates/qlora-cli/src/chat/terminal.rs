//! Terminal input of a chat: line editing and history, commands, and Ctrl-C.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use signal_hook::consts::SIGINT;
use signal_hook::flag;

/// Help text of the chat commands.
pub(crate) const HELP: &str = "\
/stats  figures of the last answer and of the conversation
/clear  begin a new conversation
/quit   end the chat, as Ctrl-D does
Ctrl-C ends an answer; at the prompt, twice ends the chat. Arrow keys edit and recall lines.";

/// The exit code of a process that Ctrl-C ends: 128 + SIGINT, as in a shell.
const EXIT_CODE: i32 = 130;

/// One thing that the user wants.
pub(crate) enum Input {
    Say(String),
    Help,
    Stats,
    Clear,
    Quit,
}

/// A terminal, or lines from a pipe.
pub(crate) struct Terminal {
    editor: DefaultEditor,
    /// Whether Ctrl-C has been pressed. While it is set, Ctrl-C ends the process.
    interrupted: Arc<AtomicBool>,
}

impl Terminal {
    pub(crate) fn open() -> Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(true));
        // The order matters: the first Ctrl-C must not see what it sets itself.
        flag::register_conditional_shutdown(SIGINT, EXIT_CODE, interrupted.clone())?;
        flag::register(SIGINT, interrupted.clone())?;
        Ok(Self { editor: DefaultEditor::new()?, interrupted })
    }

    /// Waits for the next line that is not empty.
    pub(crate) fn read(&mut self) -> Result<Input> {
        // An answer that was interrupted was the first of two.
        let mut warned = self.interrupted.swap(true, Ordering::SeqCst);
        loop {
            let line = match self.editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) if !warned => {
                    eprintln!("Ctrl-C again, or Ctrl-D, ends the chat.");
                    warned = true;
                    continue;
                }
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(Input::Quit),
                Err(error) => return Err(error.into()),
            };
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            self.editor.add_history_entry(line)?;
            return Ok(match line {
                "/help" | "/?" => Input::Help,
                "/stats" => Input::Stats,
                "/clear" => Input::Clear,
                "/quit" | "/exit" => Input::Quit,
                // A path is something to say.
                _ if line.strip_prefix('/').is_some_and(|word| word.chars().all(char::is_alphabetic)) => {
                    eprintln!("there is no command {line}");
                    Input::Help
                }
                _ => Input::Say(line.to_owned()),
            });
        }
    }

    /// From here on the first Ctrl-C ends the answer, and only a second one the process.
    pub(crate) fn begin_answer(&self) {
        self.interrupted.store(false, Ordering::SeqCst);
    }

    /// Whether the answer is to end.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }
}
