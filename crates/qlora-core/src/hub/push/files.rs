//! The files of an upload: which ones of a folder, and their ids.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// The first bytes of a file, by which the hub decides whether it is text.
const SAMPLE: u64 = 512;
/// Folders within each other that are looked into.
const MAX_DEPTH: usize = 16;

/// A file to upload.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PushFile {
    /// Its place on this machine.
    pub from: PathBuf,
    /// Its path in the repository, with `/` between folders.
    pub path: String,
    /// The fate of another file at that path.
    pub existing: Existing,
}

/// The fate of a file in the repository whose path an upload has too, with another content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Existing {
    /// It is replaced.
    #[default]
    Replaced,
    /// It is replaced if it is a generated model card that nobody edited ([`is_generated_card`](super::is_generated_card)).
    ReplacedIfGenerated,
    /// It stays.
    Kept,
}

impl PushFile {
    /// The file `from`, to be uploaded as `path`.
    pub fn new(from: impl Into<PathBuf>, path: impl Into<String>) -> Self {
        Self { from: from.into(), path: path.into(), existing: Existing::default() }
    }
}

/// The files of a folder that go up, and those that do not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PushFiles {
    /// The files to upload, by path.
    pub files: Vec<PushFile>,
    /// The files and folders of a run that stay here, by path; folders end in `/`. Hidden ones are not among them.
    pub left_out: Vec<String>,
}

/// The files of a folder, sorted, without what does not belong into a repository: hidden files and folders, and what a run keeps for
/// itself. That is, at any depth, its checkpoints (`checkpoint-N`, `superseded-checkpoint-N`), which hold the optimizer's state, the
/// files that repeat rows of the data (`samples.jsonl`, `report.html`, `runs/`), and the files of trackers (`wandb/`, `mlruns/`,
/// `wandb-run-id`, `mlflow-run-id`). A file that is named itself is taken whatever its name is.
///
/// # Errors
/// If there is no such file or folder, it cannot be read, or a name in it is not UTF-8.
pub fn files_of(path: &Path) -> Result<PushFiles> {
    let metadata = fs::metadata(path).map_err(|error| Error::io(path, error))?;
    let mut found = PushFiles::default();
    if metadata.is_dir() {
        walk(path, "", 0, &mut found)?;
        found.files.sort_by(|left, right| left.path.cmp(&right.path));
        found.left_out.sort();
    } else {
        let name = path.file_name().ok_or_else(|| Error::format(path, "has no file name"))?;
        found.files.push(PushFile::new(path, plain(path, name)?));
    }
    Ok(found)
}

/// Folders of a run that hold rows of the data (TensorBoard's texts) or what trackers keep.
const PRIVATE_FOLDERS: [&str; 3] = ["runs", "wandb", "mlruns"];
/// Files of a run that hold rows of the data or the ids of trackers.
const PRIVATE_FILES: [&str; 4] = ["samples.jsonl", "report.html", "wandb-run-id", "mlflow-run-id"];

/// Whether a folder is a checkpoint of a run, also one that was set aside (`superseded-checkpoint-10.2`) or is half deleted
/// (`checkpoint-10.tmp-trash`).
fn is_checkpoint(name: &str) -> bool {
    let name = name.strip_prefix("superseded-").unwrap_or(name);
    name.strip_prefix("checkpoint-").is_some_and(|rest| {
        let end = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        end.len() < rest.len() && (end.is_empty() || end.starts_with('.'))
    })
}

/// Whether a file holds rows of the data wherever it lies: TensorBoard's events, tokenized rows.
fn is_of_rows(name: &str) -> bool {
    name.starts_with("events.out.tfevents.") || name.ends_with(".tokens")
}

impl PushFiles {
    /// Leaves out what lies in these folders, or is one of these files.
    pub fn leave_out(&mut self, private: &[PathBuf]) {
        let private: Vec<PathBuf> = private.iter().filter_map(|path| path.canonicalize().ok()).collect();
        let is_private =
            |file: &Path| file.canonicalize().is_ok_and(|file| private.iter().any(|path| file.starts_with(path)));
        let (kept, out): (Vec<_>, Vec<_>) = self.files.drain(..).partition(|file| !is_private(&file.from));
        self.files = kept;
        self.left_out.extend(out.into_iter().map(|file| file.path));
        self.left_out.sort();
    }
}

fn plain(path: &Path, name: &std::ffi::OsStr) -> Result<String> {
    name.to_str().map(str::to_owned).ok_or_else(|| Error::format(path, "its name is not UTF-8"))
}

fn walk(folder: &Path, prefix: &str, depth: usize, found: &mut PushFiles) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::format(folder, format!("more than {MAX_DEPTH} folders within each other")));
    }
    for entry in fs::read_dir(folder).map_err(|error| Error::io(folder, error))? {
        let entry = entry.map_err(|error| Error::io(folder, error))?;
        let from = entry.path();
        let name = plain(&from, &entry.file_name())?;
        if name.starts_with('.') && name != ".gitattributes" && name != ".gitignore" {
            continue;
        }
        let metadata = fs::metadata(&from).map_err(|error| Error::io(&from, error))?;
        let path = format!("{prefix}{name}");
        if metadata.is_dir() {
            // A link to a folder may lead back to where it is.
            if is_checkpoint(&name) || PRIVATE_FOLDERS.contains(&&*name) || from.is_symlink() {
                found.left_out.push(path + "/");
            } else {
                walk(&from, &(path + "/"), depth + 1, found)?;
            }
        } else if metadata.is_file() {
            match PRIVATE_FILES.contains(&&*name) || is_of_rows(&name) {
                true => found.left_out.push(path),
                false => found.files.push(PushFile::new(from, path)),
            }
        }
    }
    Ok(())
}

fn git_header(size: u64) -> String {
    format!("blob {size}\0")
}

/// The id that git gives to a content.
fn git_id(bytes: &[u8]) -> String {
    hex(&Sha1::new_with_prefix(git_header(bytes.len() as u64)).chain_update(bytes).finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file with what the hub wants to know.
#[derive(Debug)]
pub(super) struct Local<'a> {
    file: &'a PushFile,
    size: u64,
    sample: Vec<u8>,
    large: bool,
    id: String,
}

impl<'a> Local<'a> {
    pub(super) fn read(file: &'a PushFile) -> Result<Self> {
        let mut sample = Vec::new();
        let opened = File::open(&file.from).map_err(|error| Error::io(&file.from, error))?;
        let size = opened.metadata().map_err(|error| Error::io(&file.from, error))?.len();
        opened.take(SAMPLE).read_to_end(&mut sample).map_err(|error| Error::io(&file.from, error))?;
        Ok(Self { file, size, sample, large: false, id: String::new() })
    }

    pub(super) fn path(&self) -> &'a str {
        &self.file.path
    }

    pub(super) fn existing(&self) -> Existing {
        self.file.existing
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn sample(&self) -> &[u8] {
        &self.sample
    }

    /// Whether it goes to the store for large files.
    pub(super) fn is_large(&self) -> bool {
        self.large
    }

    /// SHA-256 of a large file; else the id that git gives to its content. Empty before [`Self::hash`].
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn hash(&mut self, large: bool) -> Result<()> {
        self.large = large;
        self.id = match large {
            true => self.digest(Sha256::new())?,
            false => self.digest(Sha1::new_with_prefix(git_header(self.size)))?,
        };
        Ok(())
    }

    fn digest(&self, mut digest: impl Digest + io::Write) -> Result<String> {
        let failed = |error| Error::io(&self.file.from, error);
        let mut file = File::open(&self.file.from).map_err(failed)?;
        let read = io::copy(&mut file, &mut digest).map_err(failed)?;
        if read != self.size {
            return Err(self.changed());
        }
        Ok(hex(&digest.finalize()))
    }

    /// The content of a text file, which must still be the one that was hashed.
    pub(super) fn bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut part = self.part(0, self.size)?;
        part.read_to_end(&mut bytes).map_err(|error| Error::io(&self.file.from, error))?;
        if bytes.len() as u64 != self.size || (!self.id.is_empty() && git_id(&bytes) != self.id) {
            return Err(self.changed());
        }
        Ok(bytes)
    }

    fn changed(&self) -> Error {
        Error::format(&self.file.from, "it changed while it was read: start the upload again when it is at rest")
    }

    pub(super) fn text(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.bytes()?).into_owned())
    }

    /// The bytes of a range.
    pub(super) fn part(&self, start: u64, length: u64) -> Result<io::Take<File>> {
        let failed = |error| Error::io(&self.file.from, error);
        let mut file = File::open(&self.file.from).map_err(failed)?;
        file.seek(SeekFrom::Start(start)).map_err(failed)?;
        Ok(file.take(length))
    }
}
