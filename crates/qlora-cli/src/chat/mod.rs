//! Answers on a terminal.

mod ask_args;
mod stream;
mod terminal;

pub(crate) use ask_args::AskArgs;
pub(crate) use stream::{Asker, Figures};
pub(crate) use terminal::{HELP, Input, Terminal};
