//! Requests to stop: finish the step, save, leave. Ctrl-C (SIGINT), SIGTERM (a scheduler, `kill`) and SIGHUP (the terminal is
//! gone) make one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::error::{Error, Result};
use crate::platform::{self, SIGINT};

/// A request to stop that the training loop looks at after every step. Clones share the request.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    requested: Arc<AtomicBool>,
    /// The number of the signal that asked; 0 for none.
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// A request that is not made yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A request that Ctrl-C, SIGTERM or SIGHUP make. A Ctrl-C after any of them ends the process at once with exit code 130;
    /// checkpoints are written atomically, so even that leaves the last one whole. SIGHUP stays ignored where it is (`nohup`).
    ///
    /// Until this is called signals end the process as always: call it when there is something to save, just before the run.
    ///
    /// # Errors
    /// If this was called before in this process, or the operating system refuses.
    pub fn on_ctrl_c() -> Result<Self> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err(Error::Invalid("cannot handle Ctrl-C: this process does already".to_owned()));
        }
        let interrupt = Self::new();
        platform::listen(&interrupt.requested, &interrupt.signal, exit_code(SIGINT))
            .map_err(|error| Error::Invalid(format!("cannot handle Ctrl-C: {error}")))?;
        Ok(interrupt)
    }

    /// Asks the loop to stop. Returns whether that had been asked before.
    pub fn request(&self) -> bool {
        self.requested.swap(true, Ordering::SeqCst)
    }

    /// Withdraws the request.
    pub fn clear(&self) {
        self.signal.store(0, Ordering::SeqCst);
        self.requested.store(false, Ordering::SeqCst);
    }

    /// Whether the loop was asked to stop.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    /// The code that a process ends with that this request stopped, as shells have it: 128 and the number of the signal. 130
    /// after Ctrl-C and a request without a signal, 143 after SIGTERM, 129 after SIGHUP.
    pub fn exit_code(&self) -> i32 {
        match self.signal.load(Ordering::SeqCst) {
            // A request without a signal counts as Ctrl-C.
            0 => exit_code(SIGINT),
            signal => exit_code(signal as i32),
        }
    }
}

fn exit_code(signal: i32) -> i32 {
    128 + signal
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
        assert_eq!(other.exit_code(), 130);
        other.clear();
        assert!(!interrupt.requested());
    }
}
