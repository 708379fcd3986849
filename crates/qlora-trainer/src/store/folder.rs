//! A folder as a store: a mounted share, or a second disk.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use qlora_core::atomic;

use super::Store;

/// A store in a folder, which is made when the first object is written.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// A store in this folder.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// A temporary file beside the object, so that it can be renamed to it.
    fn write(
        &self,
        key: &str,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> io::Result<(tempfile::NamedTempFile, PathBuf)> {
        let path = self.path.join(key);
        let folder = path.parent().unwrap_or(&self.path);
        fs::create_dir_all(folder)?;
        // Nothing that begins with a dot is listed.
        let mut file = atomic::temporary_builder(".upload-", 0o666).tempfile_in(folder)?;
        write(file.as_file_mut())?;
        file.as_file().sync_all()?;
        Ok((file, path))
    }
}

impl Store for Folder {
    fn put(&self, key: &str, mut content: &File) -> io::Result<()> {
        let (file, path) = self.write(key, |file| io::copy(&mut content, file).map(drop))?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    }

    fn put_new(&self, key: &str, content: &[u8]) -> io::Result<()> {
        let (file, path) = self.write(key, |file| file.write_all(content))?;
        file.persist_noclobber(path).map_err(|error| error.error)?;
        Ok(())
    }

    fn get(&self, key: &str, to: &Path) -> io::Result<()> {
        fs::copy(self.path.join(key), to).map(drop)
    }

    fn list(&self, prefix: &str) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries?,
            };
            for entry in entries {
                let path = entry?.path();
                let key = path.strip_prefix(&self.path).unwrap_or(&path).to_string_lossy().into_owned();
                let is_hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
                if path.is_dir() {
                    folders.push(path);
                } else if key.starts_with(prefix) && !is_hidden {
                    found.push(key);
                }
            }
        }
        Ok(found)
    }

    fn delete(&self, key: &str) -> io::Result<()> {
        let path = self.path.join(key);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => {
                // A folder that is empty now; one that is not stays.
                let _ = path.parent().filter(|folder| **folder != *self.path).map(fs::remove_dir);
                Ok(())
            }
        }
    }
}
