//! Files that came with another commit. The cache keeps contents under their ETag, and a commit's folder has links to them:
//! `models--org--name/blobs/<etag>` and `models--org--name/snapshots/<commit>/<file>`.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{Api, ApiError};

/// Links `name` into the commit's folder `snapshot` if the cache has its content already. Says whether it had. Only the
/// file's headers are asked for, and nothing is if the cache has no contents of this repository.
///
/// # Errors
/// If the hub does not answer; what the file system refuses only means that the file is downloaded.
pub(super) fn link(api: &Api, url: &str, snapshot: &Path, name: &str) -> Result<bool, ApiError> {
    let Some(blobs) = snapshot.ancestors().nth(2).map(|repo| repo.join("blobs")) else { return Ok(false) };
    if !has_files(&blobs) {
        return Ok(false);
    }
    let metadata = api.metadata(url)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if metadata.etag().is_empty() || !metadata.etag().chars().all(plain) {
        return Ok(false);
    }
    let blob = blobs.join(metadata.etag());
    // One that was cut off has another name; a wrong length is somebody else's doing.
    if !fs::metadata(&blob).is_ok_and(|file| file.is_file() && file.len() == metadata.size() as u64) {
        return Ok(false);
    }
    Ok(place(&blob, &snapshot.join(name)).is_ok())
}

fn has_files(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

/// Makes `file` a link to `blob`, relative as Hugging Face's libraries make it; where there are no links, a copy.
fn place(blob: &Path, file: &Path) -> io::Result<()> {
    let parent = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    if fs::symlink_metadata(file).is_ok() {
        // A link to a content that is gone.
        fs::remove_file(file)?;
    }
    crate::platform::link(blob, &relative(blob, parent), file)
}

/// `to` as seen from the folder `from`.
fn relative(to: &Path, from: &Path) -> PathBuf {
    let (to, from): (Vec<Component>, Vec<Component>) = (to.components().collect(), from.components().collect());
    let common = to.iter().zip(&from).take_while(|(a, b)| a == b).count();
    let up = std::iter::repeat_n(Component::ParentDir, from.len() - common);
    up.chain(to[common..].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_seen_from_a_folder() {
        let of = |to: &str, from: &str| relative(Path::new(to), Path::new(from)).to_str().unwrap().to_owned();
        assert_eq!(of("/c/m/blobs/e", "/c/m/snapshots/1"), "../../blobs/e");
        assert_eq!(of("/c/m/blobs/e", "/c/m/snapshots/1/q"), "../../../blobs/e");
        assert_eq!(of("/c/e", "/c"), "e");
    }
}
