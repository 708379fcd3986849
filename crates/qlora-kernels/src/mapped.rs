//! Read-only memory-mapped files: weights are read from the page cache, never held in anonymous memory as a whole.

use std::fs::{self, File};
use std::io;
use std::ops::Deref;
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

/// The bytes of a file, as the operating system pages them in.
///
/// The file must not be changed or cut while it is mapped: a page that no longer exists ends the process (`SIGBUS`), as
/// with every mapped file.
#[derive(Debug)]
pub struct MappedFile {
    // None for an empty file, which not every system can map.
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps the whole of `path`.
    ///
    /// # Errors
    /// What the operating system says; a path that is no regular file (folder, pipe) is refused before it is opened.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        let len = usize::try_from(file.metadata()?.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the file is too large for this machine"))?;
        if len == 0 {
            return Ok(Self { map: None });
        }
        // SAFETY: the mapping is private to reading and lives as long as the returned value. That the file stays as it is
        // while mapped is what every user of a mapped file has to rely on (see the type's documentation); the bytes are
        // plain data in which every bit pattern is valid.
        let map = unsafe { MmapOptions::new().len(len).map(&file)? };
        Ok(Self { map: Some(map) })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_seen_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        fs::write(&path, [1, 2, 3]).unwrap();
        assert_eq!(&*MappedFile::open(&path).unwrap(), [1, 2, 3]);
        fs::write(&path, []).unwrap();
        assert!(MappedFile::open(&path).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(MappedFile::open(folder.path()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(MappedFile::open(folder.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
