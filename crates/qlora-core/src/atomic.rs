//! Files and folders that are either the old one or the new one, whatever happens in between.
//!
//! A file is written under a temporary name in the same folder (`name.tmp-...`), flushed to the disk, and then renamed
//! over its final name; a folder likewise. A reader, or the next run after a crash, never sees half of it. If writing
//! fails the temporary file is removed and the old one is untouched; only a killed process leaves a `.tmp-` behind,
//! which the next one that writes the same file or folder removes (see [`leftovers`]).
//!
//! - [`write_atomically`]: one file.
//! - [`PendingFile`]: several files that become visible together, as near as a file system allows: write all, then
//!   commit all.
//! - [`replace_directory`]: a folder with everything in it. On Linux the exchange of old and new is one system call.

pub mod leftovers;

use crate::platform;
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Writes a file through `write` and puts it at `path`, replacing what was there, once it is complete and on the disk.
/// The folder must exist. A symbolic link at `path` is replaced, not followed.
///
/// # Errors
/// The error of `write`, or one of the file system, with the path.
pub fn write_atomically<T>(path: impl AsRef<Path>, write: impl FnOnce(&mut dyn Write) -> io::Result<T>) -> Result<T> {
    let mut file = PendingFile::create(path)?;
    let value = file.write_with(write)?;
    file.commit()?;
    Ok(value)
}

/// A file that is being written under a temporary name. Dropping it without [`PendingFile::commit`] removes it.
#[derive(Debug)]
pub struct PendingFile {
    writer: BufWriter<NamedTempFile>,
    path: PathBuf,
}

impl PendingFile {
    /// Begins a file that will be at `path`. The folder must exist.
    ///
    /// # Errors
    /// If no file can be made in the folder.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let (folder, prefix) = temporary_place(&path)?;
        let file = claimed(folder, &prefix, || {
            let file =
                temporary_builder(&prefix, 0o666).tempfile_in(folder).map_err(|error| cannot_write(folder, error))?;
            Ok((leftovers::claim(file.path(), file.as_file()), file))
        })?;
        Ok(Self { writer: BufWriter::with_capacity(1 << 20, file), path })
    }

    /// Writes to the file; errors are reported with the final path.
    ///
    /// # Errors
    /// The error of `write`.
    pub fn write_with<T>(&mut self, write: impl FnOnce(&mut dyn Write) -> io::Result<T>) -> Result<T> {
        write(&mut self.writer).map_err(|error| Error::io(&self.path, error))
    }

    /// Flushes what was written to the disk, under the temporary name still. After this, [`PendingFile::commit`] only
    /// renames: with several files, sync all of them before the first commit.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn sync(&mut self) -> Result<()> {
        let result = self.writer.flush().and_then(|()| self.writer.get_ref().as_file().sync_all());
        result.map_err(|error| Error::io(&self.path, error))
    }

    /// Flushes the file to the disk and gives it its final name, replacing what was there.
    ///
    /// # Errors
    /// If the disk is full or fails, or if the name cannot be taken (a folder has it). The old file is then untouched.
    pub fn commit(mut self) -> Result<()> {
        self.sync()?;
        let Self { writer, path } = self;
        let file = writer.into_inner().map_err(|error| Error::io(&path, error.into_error()))?;
        file.persist(&path).map_err(|error| Error::io(&path, error.error))?;
        sync_parent(&path)
    }
}

/// Fills a new folder through `fill`, which is given the temporary path, and puts it at `path` once all of its files
/// are on the disk. The old contents of `path` are removed after that. The folders above are created.
///
/// Where the system cannot exchange two folders in one step (not Linux, or a file system without it) a folder that is
/// replaced has no name for a moment; a crash in that moment leaves both the old one (`name.old-...`) and the new one
/// (`name.tmp-...`) complete.
///
/// # Errors
/// The error of `fill`, or one of the file system, with the path. The old folder is then untouched.
pub fn replace_directory<T>(path: impl AsRef<Path>, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let path = path.as_ref();
    let (folder, prefix) = temporary_place(path)?;
    fs::create_dir_all(folder).map_err(|error| cannot_write(folder, error))?;
    let (temporary, _lock) = claimed(folder, &prefix, || {
        let temporary =
            temporary_builder(&prefix, 0o777).tempdir_in(folder).map_err(|error| cannot_write(folder, error))?;
        // Where a folder cannot be opened as a file it has no lock, and cannot be taken for a leftover either.
        let lock = File::open(temporary.path()).ok();
        let claimed = lock.as_ref().is_none_or(|lock| leftovers::claim(temporary.path(), lock));
        Ok((claimed, (temporary, lock)))
    })?;
    let value = fill(temporary.path())?;
    sync_tree(temporary.path())?;
    match fs::symlink_metadata(path) {
        Err(_) => fs::rename(temporary.path(), path).map_err(|error| Error::io(path, error))?,
        Ok(old) if old.is_dir() => exchange(temporary.path(), path)?,
        Ok(_) => return Err(Error::io(path, io::Error::new(io::ErrorKind::NotADirectory, "is a file, not a folder"))),
    }
    sync_parent(path)?;
    // The temporary name now holds the old folder, or nothing.
    drop(temporary);
    Ok(value)
}

/// The folder of `path` and the beginning of a temporary name beside it.
fn temporary_place(path: &Path) -> Result<(&Path, String)> {
    let name = path.file_name().ok_or_else(|| {
        Error::io(path, io::Error::new(io::ErrorKind::InvalidInput, "does not end in the name of a file or folder"))
    })?;
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((folder, format!("{}{}", name.to_string_lossy(), leftovers::MARK)))
}

/// A new temporary file or folder, after what killed processes left of earlier ones is gone. `make` also says whether it could
/// be claimed: a removal of leftovers may have come in between.
fn claimed<T>(folder: &Path, prefix: &str, make: impl Fn() -> Result<(bool, T)>) -> Result<T> {
    const ATTEMPTS: usize = 8;
    leftovers::sweep(folder, prefix.strip_suffix(leftovers::MARK).unwrap_or(prefix));
    let mut made = make()?;
    for _ in 1..ATTEMPTS {
        if made.0 {
            break;
        }
        made = make()?;
    }
    Ok(made.1)
}

/// Names begin with `prefix`. Temporary files and folders are private by default; with `mode` 0o666 or 0o777 they get the rights that
/// any new file or folder gets.
pub fn temporary_builder<'a>(prefix: &'a str, mode: u32) -> tempfile::Builder<'a, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    platform::set_mode(&mut builder, mode);
    builder
}

pub(crate) fn cannot_write(folder: &Path, error: io::Error) -> Error {
    Error::io(folder, io::Error::new(error.kind(), format!("cannot write here, choose another output folder: {error}")))
}

/// Makes a rename in the folder of `path` last.
fn sync_parent(path: &Path) -> Result<()> {
    let (folder, _) = temporary_place(path)?;
    platform::sync_folder(folder).map_err(|error| Error::io(folder, error))
}

fn sync_tree(folder: &Path) -> Result<()> {
    let at = |error| Error::io(folder, error);
    for entry in fs::read_dir(folder).map_err(at)? {
        let entry = entry.map_err(at)?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(at)?);
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path).and_then(|file| file.sync_all()).map_err(|error| Error::io(&path, error))?;
        }
    }
    platform::sync_folder(folder).map_err(at)
}

/// Exchanges two folders, so that `new` becomes `path`.
fn exchange(new: &Path, path: &Path) -> Result<()> {
    if platform::exchange(new, path) { Ok(()) } else { exchange_in_steps(new, path) }
}

fn exchange_in_steps(new: &Path, path: &Path) -> Result<()> {
    let (folder, _) = temporary_place(path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // A free name for the old one.
    let old = temporary_builder(&format!("{name}.old-"), 0o777)
        .tempdir_in(folder)
        .map_err(|error| cannot_write(folder, error))?;
    fs::remove_dir(old.path()).map_err(|error| Error::io(old.path(), error))?;
    fs::rename(path, old.path()).map_err(|error| Error::io(path, error))?;
    if let Err(error) = fs::rename(new, path) {
        // Undo: the old folder must not be removed with its temporary name.
        let old = old.keep();
        let undone = fs::rename(&old, path);
        let fate = if undone.is_ok() { String::new() } else { format!("; the old one is at {}", old.display()) };
        return Err(Error::io(path, io::Error::new(error.kind(), format!("{error}{fate}"))));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        fs::write(&path, "old and longer").unwrap();
        let value = write_atomically(&path, |file| file.write_all(b"new").map(|()| 5)).unwrap();
        assert_eq!((value, fs::read_to_string(&path).unwrap().as_str()), (5, "new"));
        assert_eq!(names(folder.path()), ["a.json"]);
    }

    #[test]
    fn what_a_killed_process_left_goes_and_what_is_being_written_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        for left in ["a.json.tmp-Dead01", "b.json.tmp-Dead02", "a.json.tmp-notes", "a.json.old-Dead01"] {
            fs::write(folder.path().join(left), "half").unwrap();
        }
        fs::create_dir_all(folder.path().join("run.tmp-Dead03/inner")).unwrap();
        let mut other = PendingFile::create(&path).unwrap();
        other.write_with(|file| file.write_all(b"other")).unwrap();
        write_atomically(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        other.commit().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "other");
        replace_directory(folder.path().join("run"), |temporary| {
            // A second writer of the same folder does not disturb the first.
            replace_directory(folder.path().join("run"), |_| Ok(()))?;
            fs::write(temporary.join("file"), "").map_err(|error| Error::io(temporary, error))
        })
        .unwrap();
        assert_eq!(names(&folder.path().join("run")), ["file"]);
        let rest = ["a.json", "a.json.old-Dead01", "a.json.tmp-notes", "b.json.tmp-Dead02", "run"];
        assert_eq!(names(folder.path()), rest);
        let writing = PendingFile::create(&path).unwrap();
        leftovers::remove_leftovers(folder.path()).unwrap();
        assert_eq!(names(folder.path()).len(), rest.len(), "one left, one being written");
        drop(writing);
        assert_eq!(names(folder.path()), ["a.json", "a.json.old-Dead01", "a.json.tmp-notes", "run"]);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        fs::write(&path, "old").unwrap();
        let result = write_atomically(&path, |file| {
            file.write_all(&[7; 3 << 20])?;
            Err::<(), _>(io::Error::other("the numbers ran out"))
        });
        let message = result.unwrap_err().to_string();
        assert!(message.contains("a.json") && message.contains("the numbers ran out"), "{message}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(folder.path()), ["a.json"]);
    }

    #[test]
    fn a_place_where_nothing_can_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        for result in [
            write_atomically(file.join("a.json"), |_| Ok(())),
            write_atomically(folder.path().join("missing/a.json"), |_| Ok(())),
            replace_directory(file.join("checkpoint"), |_| Ok(())),
        ] {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("choose another output folder"), "{message}");
        }
        // A folder cannot be replaced by a file, nor a file by a folder.
        assert!(write_atomically(folder.path(), |_| Ok(())).is_err());
        assert!(replace_directory(&file, |_| Ok(())).unwrap_err().to_string().contains("not a folder"));
        assert!(write_atomically("..", |_| Ok(())).is_err());
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    #[cfg(unix)]
    fn new_files_and_folders_have_ordinary_rights() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions().mode() & 0o777;
        fs::write(folder.path().join("plain"), "").unwrap();
        fs::create_dir(folder.path().join("plain-folder")).unwrap();
        write_atomically(folder.path().join("file"), |_| Ok(())).unwrap();
        replace_directory(folder.path().join("folder"), |_| Ok(())).unwrap();
        assert_eq!((mode("file"), mode("folder")), (mode("plain"), mode("plain-folder")));
    }

    #[test]
    fn a_folder_appears_whole_and_replaces_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs/checkpoint-5");
        let fill = |text: &'static str| {
            move |temporary: &Path| {
                fs::create_dir(temporary.join("inner")).unwrap();
                fs::write(temporary.join("inner").join(text), text).unwrap();
                Ok(())
            }
        };
        replace_directory(&path, fill("one")).unwrap();
        replace_directory(&path, fill("two")).unwrap();
        assert_eq!(names(&path.join("inner")), ["two"]);
        assert_eq!(names(&folder.path().join("runs")), ["checkpoint-5"]);

        let failed = replace_directory(&path, |temporary| {
            fs::write(temporary.join("half"), "").unwrap();
            Err::<(), _>(Error::Invalid("stop".into()))
        });
        assert_eq!(failed.unwrap_err().to_string(), "stop");
        assert_eq!(names(&path), ["inner"]);
        assert_eq!(names(&folder.path().join("runs")), ["checkpoint-5"]);
    }

    #[test]
    fn the_exchange_in_steps_does_the_same_and_can_be_undone() {
        let folder = tempfile::tempdir().unwrap();
        let (new, path) = (folder.path().join("new"), folder.path().join("path"));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("old"), "").unwrap();
        assert!(exchange_in_steps(&new, &path).is_err());
        assert_eq!(names(&path), ["old"]);
        fs::create_dir(&new).unwrap();
        exchange_in_steps(&new, &path).unwrap();
        assert!(names(&path).is_empty());
        assert_eq!(names(folder.path()), ["path"]);
    }
}
