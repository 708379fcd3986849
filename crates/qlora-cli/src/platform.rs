//! What differs between operating systems.

use std::io;
use std::process::Command;

/// Runs a program in place of this one, with its process id, terminal and signals. Where a system cannot do that, waits for the program
/// and ends with its exit code. Returns only if the program cannot be started.
pub(crate) fn replace_process(command: &mut Command) -> io::Error {
    #[cfg(unix)]
    return std::os::unix::process::CommandExt::exec(command);
    #[cfg(not(unix))]
    match command.status() {
        Ok(status) => std::process::exit(status.code().unwrap_or(1)),
        Err(error) => error,
    }
}
