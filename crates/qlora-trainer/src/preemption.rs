//! A notice that the machine is about to be taken away, as a file: a cloud's metadata service or a scheduler's hook writes it, and the
//! run saves a checkpoint and ends, as after SIGTERM.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A file that is watched.
#[derive(Clone, Debug)]
pub(crate) struct Notice {
    path: PathBuf,
    /// The time of a file that was there before the run: it meant an earlier one.
    old: Option<SystemTime>,
}

impl Notice {
    pub(crate) fn watch(path: &Path) -> Self {
        Self { path: path.to_owned(), old: modified(path) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file was written since the run began. One that cannot be looked at counts as absent.
    pub(crate) fn is_given(&self) -> bool {
        modified(&self.path).is_some_and(|now| self.old != Some(now))
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|metadata| metadata.modified()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::time::Duration;

    #[test]
    fn a_file_counts_once_it_is_new() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stop");
        let notice = Notice::watch(&path);
        assert!(!notice.is_given());
        fs::write(&path, "").unwrap();
        assert!(notice.is_given());
        // The next run finds it there.
        let next = Notice::watch(&path);
        assert!(!next.is_given());
        let later = SystemTime::now() + Duration::from_secs(10);
        File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        assert!(next.is_given());
        fs::remove_file(&path).unwrap();
        assert!(!next.is_given());
    }
}
