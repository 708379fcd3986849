//! Temporary files and folders that a killed process left behind.
//!
//! The writer of a temporary name holds an advisory lock on it, which the operating system drops with the process. So a
//! name that can be locked has no writer any more, and the next writer of the same name removes it. Where a file system
//! has no locks nothing is removed.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;

use crate::{Error, Result};

/// The marker between the final name and a temporary name's [`RANDOM`] letters and digits.
pub(super) const MARK: &str = ".tmp-";
/// Random characters of a temporary name, as `tempfile` makes them.
const RANDOM: usize = 6;

/// Whether `name` is a temporary name, of any final one.
pub fn is_temporary(name: &str) -> bool {
    let Some((original, random)) = name.rsplit_once(MARK) else { return false };
    !original.is_empty() && random.len() == RANDOM && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// Takes the lock on a new temporary file or folder; false if a clean-up is removing it.
pub(super) fn claim(path: &Path, file: &File) -> bool {
    !matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && path.exists()
}

/// Removes every temporary file and folder in `folder` whose writer is gone. Meant for folders that hold only what this crate
/// writes, such as a run's output.
///
/// # Errors
/// If the folder cannot be read, or one of them cannot be removed; the error names it.
pub fn remove_leftovers(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|error| Error::io(folder, error))?.flatten() {
        if entry.file_name().to_str().is_some_and(is_temporary) {
            remove_if_left(&entry.path()).map_err(|error| Error::io(entry.path(), error))?;
        }
    }
    Ok(())
}

/// Removes the leftovers of killed writers of `name` in `folder`. Failures are of no consequence for the new file.
pub(super) fn sweep(folder: &Path, name: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let entry_name = entry.file_name();
        let Some(entry_name) = entry_name.to_str().filter(|entry| is_temporary(entry)) else { continue };
        if entry_name.rsplit_once(MARK).is_some_and(|(original, _)| original == name) {
            let _ = remove_if_left(&entry.path());
        }
    }
}

/// Removes a temporary file or folder unless its writer still lives.
fn remove_if_left(path: &Path) -> io::Result<()> {
    let kind = fs::symlink_metadata(path)?.file_type();
    if kind.is_symlink() {
        return Ok(());
    }
    // Held until it is removed.
    let file = File::open(path)?;
    if file.try_lock().is_err() {
        return Ok(());
    }
    tracing::info!("removing {}, left by a process that was killed", path.display());
    if kind.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_are_told_apart() {
        for name in ["a.json.tmp-Ab3xYz", "x.tmp-000000", "a.tmp-b.tmp-123456"] {
            assert!(is_temporary(name), "{name}");
        }
        for name in [".tmp-Ab3xYz", "a.tmp-", "a.tmp-short", "a.tmp-toolong", "a.tmp-12345.", "a.tmp", "a"] {
            assert!(!is_temporary(name), "{name}");
        }
    }
}
