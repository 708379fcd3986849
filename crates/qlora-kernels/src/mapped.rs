//! Read-only memory-mapped files: weights are read from the page cache, never held in anonymous memory as a whole.

use std::fs::{self, File};
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

use crate::platform;

/// The bytes of a file, as the operating system pages them in.
///
/// The file must not be changed or cut while it is mapped: a page that no longer exists ends the process (`SIGBUS`), as
/// with every mapped file.
#[derive(Debug)]
pub struct MappedFile {
    // None for an empty file, which not every system can map.
    map: Option<Mmap>,
    file: File,
}

/// Some bytes of a file.
#[derive(Clone, Copy, Debug)]
pub struct FileBytes<'a> {
    file: &'a MappedFile,
    start: usize,
    len: usize,
}

impl MappedFile {
    /// Maps the whole of `path`.
    ///
    /// # Errors
    /// The operating system's error; a path that is no regular file (folder, pipe) is refused before it is opened.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        let len = usize::try_from(file.metadata()?.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the file is too large for this machine"))?;
        if len == 0 {
            return Ok(Self { map: None, file });
        }
        // SAFETY: the mapping is private to reading and lives as long as the returned value. That the file stays as it is
        // while mapped is what every user of a mapped file has to rely on (see the type's documentation); the bytes are
        // plain data in which every bit pattern is valid.
        let map = unsafe { MmapOptions::new().len(len).map(&file)? };
        Ok(Self { map: Some(map), file })
    }

    /// The bytes of a range, to be read one piece at a time.
    ///
    /// # Panics
    /// If the range is not within the file.
    pub fn bytes(&self, range: Range<usize>) -> FileBytes<'_> {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {} bytes", self.len());
        FileBytes { file: self, start: range.start, len: range.len() }
    }

    /// Takes the pages of a range out of the process's memory; they stay in the system's cache and come back when they are
    /// read again. Without it every page that was read once counts as resident. A hint: where it cannot be followed,
    /// nothing happens.
    pub fn forget(&self, range: Range<usize>) {
        if let Some(map) = &self.map {
            platform::forget_pages(map, range);
        }
    }
}

impl FileBytes<'_> {
    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the bytes from `at` on into `to`. On Unix by reading the file: faster than through the map, whose pages would
    /// have to be mapped first, they never count as the process's memory, and a file that was cut meanwhile is an error
    /// instead of a signal.
    ///
    /// # Errors
    /// The operating system's error.
    ///
    /// # Panics
    /// If there are not so many bytes.
    pub fn read_at(&self, at: usize, to: &mut [u8]) -> io::Result<()> {
        assert!(to.len() <= self.len && at <= self.len - to.len(), "{} bytes from {at} on of {}", to.len(), self.len);
        platform::read_at(&self.file.file, self.file, self.start + at, to)
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
    fn forgotten_pages_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i * 31 % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let file = MappedFile::open(&path).unwrap();
        for range in [0..bytes.len(), 5000..5001, 4096..8192, 7..7, 99_999..100_000] {
            assert!(file[..] == bytes[..]);
            file.forget(range);
        }
        // Out of bounds is no harm.
        file.forget(99_999..100_001);
        assert!(file[..] == bytes[..]);
    }

    #[test]
    fn bytes_of_a_file_are_read_without_its_map() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let content: Vec<u8> = (0..10_000u32).map(|i| (i * 7 % 251) as u8).collect();
        fs::write(&path, &content).unwrap();
        let file = MappedFile::open(&path).unwrap();
        let bytes = file.bytes(100..9_000);
        let mut read = vec![0; 500];
        for at in [0, 1, 4_000, 8_400] {
            bytes.read_at(at, &mut read).unwrap();
            assert!(read == content[100 + at..600 + at], "from {at} on");
        }
        // Cut short while it is open: an error where the map would end the process.
        File::options().write(true).open(&path).unwrap().set_len(300).unwrap();
        #[cfg(unix)]
        assert_eq!(bytes.read_at(1_000, &mut read).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_no_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(MappedFile::open(folder.path()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(MappedFile::open(folder.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
