//! Ctrl-C: finish the step, save, leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// The exit code of a process that a second Ctrl-C ends: 128 + SIGINT, as in a shell.
const EXIT_CODE: i32 = 130;

/// A request to stop that the training loop looks at after every step. Clones share the request.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// A request that nobody has made yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A request that Ctrl-C makes. The second Ctrl-C ends the process at once with exit code 130; checkpoints are
    /// written atomically, so even that leaves the last one whole.
    ///
    /// # Errors
    /// If the process has a Ctrl-C handler already.
    pub fn on_ctrl_c() -> Result<Self> {
        let interrupt = Self::new();
        let request = interrupt.clone();
        ctrlc::set_handler(move || {
            if request.request() {
                std::process::exit(EXIT_CODE);
            }
        })
        .map_err(|error| Error::Invalid(format!("cannot handle Ctrl-C: {error}")))?;
        Ok(interrupt)
    }

    /// Asks the loop to stop. Returns whether that had been asked before.
    pub fn request(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }

    /// Withdraws the request.
    pub fn clear(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    /// Whether somebody asked the loop to stop.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_the_request_and_the_second_is_noticed() {
        let interrupt = Interrupt::new();
        let other = interrupt.clone();
        assert!(!interrupt.requested());
        assert!(!other.request());
        assert!(interrupt.requested());
        assert!(other.request());
        other.clear();
        assert!(!interrupt.requested());
    }
}
