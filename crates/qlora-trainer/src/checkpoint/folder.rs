//! The output folder of a run: one run at a time, its checkpoints in order, nothing half-written in it.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use qlora_core::atomic::leftovers::remove_leftovers;

use crate::error::{Error, Result};

const PREFIX: &str = "checkpoint-";
const LOCK: &str = ".qlora.lock";

/// The name of a step's checkpoint.
pub fn name(step: u64) -> String {
    format!("{PREFIX}{step}")
}

/// The checkpoints in a folder with their steps, oldest first. None if there is no such folder.
///
/// # Errors
/// If the folder cannot be read.
pub fn list(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for (name, path) in entries(output_dir)? {
        let step = name.strip_prefix(PREFIX).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
        if let Some(step) = step.and_then(|digits| digits.parse().ok())
            && path.is_dir()
        {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// The checkpoint with the highest step.
///
/// # Errors
/// If the folder cannot be read.
pub fn latest(output_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(list(output_dir)?.pop().map(|(_, path)| path))
}

/// Deletes the oldest checkpoints until `keep` are left (0: keeps all), but never the one of `step`.
///
/// # Errors
/// If a folder cannot be deleted.
pub fn limit(output_dir: &Path, keep: usize, step: u64) -> Result<()> {
    if keep == 0 {
        return Ok(());
    }
    let mut old = list(output_dir)?;
    let surplus = old.len().saturating_sub(keep);
    old.retain(|(of, _)| *of != step);
    old.truncate(surplus);
    old.iter().try_for_each(|(_, path)| remove(path))
}

/// Deletes a checkpoint. It first gets a name that no run takes for a checkpoint, so that one of which only half is
/// deleted does not look whole.
///
/// # Errors
/// If it cannot be renamed or deleted.
pub fn remove(path: &Path) -> Result<()> {
    let mut trash = path.as_os_str().to_owned();
    trash.push(".tmp-trash");
    let trash = PathBuf::from(trash);
    fs::rename(path, &trash).map_err(|error| Error::io(path, error))?;
    fs::remove_dir_all(&trash).map_err(|error| Error::io(&trash, error))
}

/// Gives a checkpoint a name that no run takes for one, and returns its new path: `superseded-checkpoint-<step>`.
///
/// # Errors
/// If it cannot be renamed.
pub fn set_aside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let free = |suffix: &str| path.with_file_name(format!("superseded-{name}{suffix}"));
    let numbered = (2..).map(|number| free(&format!(".{number}")));
    let aside = std::iter::once(free("")).chain(numbered).find(|path| !path.exists()).expect("numbers do not end");
    fs::rename(path, &aside).map_err(|error| Error::io(path, error))?;
    Ok(aside)
}

/// A run's output folder, locked: a second run in the same folder is refused.
#[derive(Debug)]
pub struct OutputFolder {
    path: PathBuf,
    /// The operating system unlocks it when the process ends, however it ends.
    _lock: File,
}

impl OutputFolder {
    /// Makes the folder if need be, locks it, and removes the half-written files of killed runs.
    ///
    /// # Errors
    /// If the folder cannot be made or written, or another run has it.
    pub fn open(path: &Path) -> Result<Self> {
        let at = |error| Error::io(path, error);
        fs::create_dir_all(path).map_err(at)?;
        let lock = path.join(LOCK);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock)
            .map_err(|error| Error::io(&lock, error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Invalid(format!("{}: another run is writing to this folder", path.display())));
            }
            // A file system without locks: go on without.
            Err(TryLockError::Error(error)) => tracing::warn!("{}: cannot lock: {error}", lock.display()),
        }
        clean(path)?;
        Ok(Self { path: path.to_owned(), _lock: file })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Removes the temporary files of killed runs: `checkpoint-<step>.tmp-*` and files, also `checkpoint-<step>.old-*` where
/// the checkpoint that was to replace it is there; where it is not, the old one gets its name back.
fn clean(output_dir: &Path) -> Result<()> {
    remove_leftovers(output_dir)?;
    for (name, path) in entries(output_dir)? {
        if !name.starts_with(PREFIX) {
            continue;
        }
        if name.contains(".tmp-") {
            tracing::info!("removing {}, left by a run that was killed", path.display());
            fs::remove_dir_all(&path).map_err(|error| Error::io(&path, error))?;
        } else if let Some((original, _)) = name.split_once(".old-") {
            let original = output_dir.join(original);
            let result = if original.exists() { fs::remove_dir_all(&path) } else { fs::rename(&path, &original) };
            result.map_err(|error| Error::io(&path, error))?;
        }
    }
    Ok(())
}

/// Names and paths in a folder. None if there is no such folder.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(folder, error)),
    };
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.map_err(|error| Error::io(folder, error))?;
        Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
    };
    entries.map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        names.iter().for_each(|name| fs::create_dir_all(folder.path().join(name).join("inner")).unwrap());
        folder
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = entries(folder).unwrap().into_iter().map(|(name, _)| name).collect();
        names.retain(|name| name != LOCK);
        names.sort();
        names
    }

    #[test]
    fn the_latest_is_the_highest_step_and_nothing_else() {
        let folder =
            folder_with(&["checkpoint-9", "checkpoint-10", "checkpoint-11.tmp-x", "checkpoint-", "checkpoint-+12"]);
        fs::write(folder.path().join("checkpoint-13"), "a file").unwrap();
        assert_eq!(latest(folder.path()).unwrap(), Some(folder.path().join("checkpoint-10")));
        assert_eq!(list(folder.path()).unwrap().len(), 2);
        assert_eq!(latest(&folder.path().join("none")).unwrap(), None);
    }

    #[test]
    fn only_the_newest_are_kept_and_the_given_one_always() {
        let all = ["checkpoint-10", "checkpoint-20", "checkpoint-30", "checkpoint-5"];
        let left = |keep, step| {
            let folder = folder_with(&all);
            limit(folder.path(), keep, step).unwrap();
            names(folder.path())
        };
        assert_eq!(left(0, 30), all);
        assert_eq!(left(4, 30), all);
        assert_eq!(left(2, 30), ["checkpoint-20", "checkpoint-30"]);
        assert_eq!(left(2, 5), ["checkpoint-30", "checkpoint-5"]);
        assert_eq!(left(1, 5), ["checkpoint-5"]);
    }

    #[test]
    fn leftovers_are_removed_and_a_lost_checkpoint_gets_its_name_back() {
        let folder = folder_with(&[
            "checkpoint-1",
            "checkpoint-1.old-a",
            "checkpoint-1.tmp-b",
            "checkpoint-2.old-c",
            "checkpoint-3.tmp-trash",
            "other.tmp-d",
        ]);
        OutputFolder::open(folder.path()).unwrap();
        assert_eq!(names(folder.path()), ["checkpoint-1", "checkpoint-2", "other.tmp-d"]);
        assert!(folder.path().join("checkpoint-2/inner").exists());
    }

    #[test]
    fn a_folder_has_one_run_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        let first = OutputFolder::open(&path).unwrap();
        let refusal = OutputFolder::open(&path).unwrap_err().to_string();
        assert!(refusal.ends_with("another run is writing to this folder"), "{refusal}");
        drop(first);
        OutputFolder::open(&path).unwrap();
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("out");
        fs::write(&file, "").unwrap();
        for path in [file.clone(), file.join("deeper")] {
            let refusal = OutputFolder::open(&path).unwrap_err().to_string();
            assert!(refusal.starts_with(&path.display().to_string()), "{refusal}");
        }
    }
}
