//! The log on stderr.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use qlora::trainer::progress::Above;
use tracing::Level;

use crate::output;

/// Warnings alone, with `-v` information, with `-vv` everything; with `-q` errors alone.
pub(crate) fn start(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => Level::ERROR,
        (false, 0) => Level::WARN,
        (false, 1) => Level::INFO,
        (false, _) => Level::DEBUG,
    };
    tracing_subscriber::fmt().with_writer(|| Log).with_max_level(level).with_ansi(false).init();
}

static VIEW: Mutex<Option<Above>> = Mutex::new(None);

/// From here on the log is printed above a view that is drawn in place, until this is called with none.
pub(crate) fn set_view(view: Option<Above>) {
    *VIEW.lock().unwrap_or_else(PoisonError::into_inner) = view;
}

/// Gets each event as a whole.
struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let speaker = output::speaker();
        let spoken = [speaker.as_bytes(), bytes].concat();
        let view = VIEW.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match view {
            Some(view) => view.line(String::from_utf8_lossy(&spoken).trim_end()),
            // One write: lines of several processes stay whole.
            None => io::stderr().write_all(&spoken)?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
