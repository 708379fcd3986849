//! Answers on a terminal.

mod stream;
mod terminal;

pub(crate) use stream::{Asker, Figures};
pub(crate) use terminal::{HELP, Input, Terminal};
