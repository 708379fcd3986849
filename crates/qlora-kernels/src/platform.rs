//! What differs between operating systems.

use std::fs::File;
use std::io;
use std::ops::Range;

use memmap2::Mmap;

/// Whether libraries are DLLs: found in `PATH`, and in Python's packages in `bin`.
pub(crate) const HAS_DLLS: bool = cfg!(windows);

/// Takes the pages of a range out of the process's memory; a range that is empty or not within the map is none. Nothing where a system
/// cannot do that.
pub(crate) fn forget_pages(map: &Mmap, range: Range<usize>) {
    #[cfg(unix)]
    if range.start < range.end && range.end <= map.len() {
        // SAFETY: the mapping is never written, so dropped pages come back with the file's content.
        let _ = unsafe {
            map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.end - range.start)
        };
    }
    #[cfg(not(unix))]
    let _ = (map, range);
}

/// Fills `to` with the bytes of a file from `start` on, whose map is `mapped`: by reading the file where that takes no seeking.
pub(crate) fn read_at(file: &File, mapped: &[u8], start: usize, to: &mut [u8]) -> io::Result<()> {
    #[cfg(unix)]
    {
        let _ = mapped;
        std::os::unix::fs::FileExt::read_exact_at(file, to, start as u64)
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        to.copy_from_slice(&mapped[start..start + to.len()]);
        Ok(())
    }
}
