//! What differs between operating systems: signals, and processes that this one starts.

use std::io;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};

/// Signals by the numbers that they have everywhere.
pub(crate) const SIGHUP: i32 = 1;
/// Ctrl-C.
pub(crate) const SIGINT: i32 = 2;
/// A request to end.
pub(crate) const SIGTERM: i32 = 15;

/// From here on Ctrl-C, SIGTERM and SIGHUP (unless it is ignored) set `requested`, and `signal` to their number; a Ctrl-C when
/// `requested` is set ends the process with `exit_code`. Where there is only Ctrl-C, `signal` stays as it is.
pub(crate) fn listen(requested: &Arc<AtomicBool>, signal: &Arc<AtomicUsize>, exit_code: i32) -> io::Result<()> {
    #[cfg(unix)]
    {
        use signal_hook::flag;

        // First: it must not see what the same Ctrl-C sets below.
        flag::register_conditional_shutdown(SIGINT, exit_code, Arc::clone(requested))?;
        for number in [SIGINT, SIGTERM, SIGHUP] {
            if number != SIGHUP || !hangup_is_ignored() {
                flag::register_usize(number, Arc::clone(signal), number as usize)?;
                flag::register(number, Arc::clone(requested))?;
            }
        }
        Ok(())
    }
    #[cfg(not(unix))]
    {
        let (requested, _) = (Arc::clone(requested), signal);
        let stop = move || {
            if requested.swap(true, std::sync::atomic::Ordering::SeqCst) {
                std::process::exit(exit_code);
            }
        };
        ctrlc::set_handler(stop).map_err(io::Error::other)
    }
}

/// Whether the process was started with SIGHUP ignored, as `nohup` does. Known on Linux only.
#[cfg(unix)]
fn hangup_is_ignored() -> bool {
    const SIGHUP_BIT: u64 = 1;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & SIGHUP_BIT != 0)
}

/// Whether processes can be started in groups of their own and get signals: what a launcher of ranks needs.
pub(crate) const HAS_PROCESS_GROUPS: bool = cfg!(unix);

/// From here on the signals of [`SIGINT`], [`SIGTERM`] and [`SIGHUP`] set `signal` to their number and do nothing else.
pub(crate) fn catch_signals(signal: &Arc<AtomicUsize>) -> io::Result<()> {
    #[cfg(unix)]
    for number in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_usize(number, Arc::clone(signal), number as usize)?;
    }
    #[cfg(not(unix))]
    let _ = signal;
    Ok(())
}

/// Puts the process that `command` starts into a group of its own: it gets no signal of the terminal.
pub(crate) fn in_own_group(command: &mut Command) {
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(command, 0);
    #[cfg(not(unix))]
    let _ = command;
}

/// The signal that ended a process.
pub(crate) fn signal_of(status: ExitStatus) -> Option<i32> {
    #[cfg(unix)]
    return std::os::unix::process::ExitStatusExt::signal(&status);
    #[cfg(not(unix))]
    {
        let _ = status;
        None
    }
}

/// Sends a signal to a process; one that is gone gets none.
pub(crate) fn send_signal(process: u32, number: i32) {
    #[cfg(unix)]
    {
        use nix::sys::signal::{Signal, kill};
        if let (Ok(process), Ok(signal)) = (i32::try_from(process), Signal::try_from(number)) {
            let _ = kill(nix::unistd::Pid::from_raw(process), signal);
        }
    }
    #[cfg(not(unix))]
    let _ = (process, number);
}

/// Lets this process end when the one is gone that started it. Only on Linux, and only if that works.
pub(crate) fn end_with_parent() {
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
}
