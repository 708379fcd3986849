//! What differs between operating systems.

use std::fs::File;
use std::io;
use std::path::Path;

/// The rights of what `builder` makes, where a system has them (`0o666`, `0o777`: those that any new file or folder gets).
pub(crate) fn set_mode(builder: &mut tempfile::Builder<'_, '_>, mode: u32) {
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = (builder, mode);
}

/// Makes what was renamed in a folder last. Nothing where a folder cannot be opened as a file.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// Exchanges two paths in one step. False where that cannot be done.
pub(crate) fn exchange(one: &Path, other: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (one, other);
        false
    }
}

/// Makes `file` a link to `target`, whose path from the folder of `file` is `relative`; where there are no links of that kind, another
/// name of it, or a copy.
#[cfg(feature = "hub")]
pub(crate) fn link(target: &Path, relative: &Path, file: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        let _ = target;
        std::os::unix::fs::symlink(relative, file)
    }
    #[cfg(not(unix))]
    {
        let _ = relative;
        std::fs::hard_link(target, file).or_else(|_| std::fs::copy(target, file).map(drop))
    }
}

/// The free bytes of the disk of a folder, where that is known.
pub(crate) fn free_space(folder: &Path) -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let disk = rustix::fs::statvfs(folder).ok()?;
        Some(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = folder;
        None
    }
}
