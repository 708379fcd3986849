//! Requests to stop: finish the step, save, leave. Ctrl-C (SIGINT), SIGTERM (a scheduler, `kill`) and SIGHUP (the terminal is
//! gone) make one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::error::{Error, Result};

/// SIGINT's number, which also stands for a request without a signal.
const SIGINT: i32 = 2;

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
        interrupt.listen().map_err(|error| Error::Invalid(format!("cannot handle Ctrl-C: {error}")))?;
        Ok(interrupt)
    }

    #[cfg(unix)]
    fn listen(&self) -> std::io::Result<()> {
        use signal_hook::consts::{SIGHUP, SIGTERM};
        use signal_hook::flag;

        // First: it must not see what the same Ctrl-C sets below.
        flag::register_conditional_shutdown(SIGINT, exit_code(SIGINT), Arc::clone(&self.requested))?;
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            if signal != SIGHUP || !hangup_is_ignored() {
                flag::register_usize(signal, Arc::clone(&self.signal), signal as usize)?;
                flag::register(signal, Arc::clone(&self.requested))?;
            }
        }
        Ok(())
    }

    #[cfg(not(unix))]
    fn listen(&self) -> std::result::Result<(), ctrlc::Error> {
        let request = self.clone();
        ctrlc::set_handler(move || {
            if request.request() {
                std::process::exit(exit_code(SIGINT));
            }
        })
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
            0 => exit_code(SIGINT),
            signal => exit_code(signal as i32),
        }
    }
}

fn exit_code(signal: i32) -> i32 {
    128 + signal
}

/// Whether the process was started with SIGHUP ignored, as `nohup` does. Known on Linux only.
#[cfg(unix)]
fn hangup_is_ignored() -> bool {
    const SIGHUP_BIT: u64 = 1;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & SIGHUP_BIT != 0)
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
