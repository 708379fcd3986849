//! Checkpoints in a store of objects: S3, Google Cloud Storage, Azure, or a folder.
//!
//! The output folder stays on the disk: the log is appended to there, the lock lies there, and a checkpoint is whole there before it is
//! sent. A store has neither appending nor renaming; what it has is that an object is there whole or not at all. So a checkpoint is
//!
//! ```text
//! checkpoint-<step>.<upload>/<file>      its files
//! checkpoint-<step>.json                 their names, sizes and SHA-256: written last
//! ```
//! and a checkpoint without the second does not exist. A step that is done again has files of its own beside the old ones; its
//! manifest takes the old one's place in one piece, and only then the old files go. Whoever resumes lists these manifests, takes the
//! newest, and checks every file against it; one that does not fit is said, and the one before it is taken.
//!
//! | module | what it is |
//! |---|---|
//! | [`mirror`] | this order of things over any store |
//! | `upload` | sends checkpoints while the run goes on |
//! | [`folder`] | a folder as a store (`file://`) |
//! | `cloud` | stores of the crate `object_store` (feature `object-store`) |

#[cfg(feature = "object-store")]
mod cloud;
pub mod folder;
pub mod mirror;
pub(crate) mod upload;

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

pub use mirror::Mirror;

use crate::error::{Error, Result};

/// Objects by their keys, which are relative, with `/` between their parts.
///
/// Errors are of the kinds `NotFound` and `AlreadyExists` where the methods say so; those that no second attempt helps against are
/// `PermissionDenied` or `InvalidInput`.
pub trait Store: fmt::Debug + Send + Sync {
    /// Writes a file's content as an object, whole or not at all. One that is there is replaced.
    ///
    /// # Errors
    /// If it cannot be sent.
    fn put(&self, key: &str, content: &File) -> io::Result<()>;

    /// Writes an object, whole or not at all, unless there is one.
    ///
    /// # Errors
    /// `AlreadyExists` if there is one; or if it cannot be sent.
    fn put_new(&self, key: &str, content: &[u8]) -> io::Result<()>;

    /// An object's content, into a new file.
    ///
    /// # Errors
    /// `NotFound` if there is none; or if it cannot be fetched.
    fn get(&self, key: &str, to: &Path) -> io::Result<()>;

    /// The keys that begin with `prefix`, in any order.
    ///
    /// # Errors
    /// If they cannot be listed.
    fn list(&self, prefix: &str) -> io::Result<Vec<String>>;

    /// Deletes an object; one that is not there is as good as deleted.
    ///
    /// # Errors
    /// If it cannot be deleted.
    fn delete(&self, key: &str) -> io::Result<()>;
}

/// Opens the store of a URL: `file:///folder`; with the feature `object-store` also `s3://bucket/prefix`, `gs://bucket/prefix` and
/// `az://container/prefix`, with the credentials and endpoints of the usual environment variables.
///
/// # Errors
/// If the URL is not one of these, or the store cannot be set up.
pub fn open(url: &str) -> Result<Mirror> {
    let store: Box<dyn Store> = match url.split_once("://") {
        Some(("file", path)) if path.starts_with('/') => Box::new(folder::Folder::new(Path::new(path))),
        #[cfg(feature = "object-store")]
        Some(("s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss", _)) => Box::new(cloud::Cloud::open(url)?),
        #[cfg(not(feature = "object-store"))]
        Some(("s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss", _)) => {
            return Err(Error::Invalid(format!(
                "{url}: this program was built without object stores; build it with the feature `object-store`"
            )));
        }
        _ => {
            return Err(Error::Invalid(format!(
                "{url:?} is no store of checkpoints: it is s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or \
                 file:///FOLDER"
            )));
        }
    };
    Ok(Mirror::new(store, url))
}

#[cfg(test)]
mod tests;
