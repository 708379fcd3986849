//! Checkpoints in a store: written manifest last, read manifest first.

use std::fs::{self, File};
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use qlora_core::atomic;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Store;
use crate::checkpoint::folder;
use crate::error::{Error, Result};

/// How often something is tried before it counts as failed.
const ATTEMPTS: u32 = 5;
/// The version of manifests.
const FORMAT: u32 = 1;

/// The manifest of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    format_version: u32,
    step: u64,
    /// The keys of the files begin with it.
    prefix: String,
    files: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    name: String,
    size: u64,
    sha256: String,
}

/// A checkpoint's files, open: they can be read to the end whatever becomes of their names.
#[derive(Debug)]
pub struct Opened {
    step: u64,
    files: Vec<(String, File)>,
}

impl Opened {
    /// Opens all files of a checkpoint.
    ///
    /// # Errors
    /// If one cannot be opened.
    pub fn new(step: u64, folder: &Path) -> Result<Self> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| Error::io(&path, error)
        };
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).map_err(at(folder))? {
            let path = entry.map_err(at(folder))?.path();
            if path.is_file() {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                files.push((name, File::open(&path).map_err(at(&path))?));
            }
        }
        files.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Self { step, files })
    }

    /// The optimizer step after which it was written.
    pub fn step(&self) -> u64 {
        self.step
    }
}

/// The checkpoints of a run in a store.
#[derive(Debug)]
pub struct Mirror {
    store: Box<dyn Store>,
    url: String,
    /// The wait after the first failed attempt; it doubles.
    pause: Duration,
}

impl Mirror {
    /// Over a store, which messages call `url`.
    pub fn new(store: Box<dyn Store>, url: &str) -> Self {
        Self { store, url: url.trim_end_matches('/').to_owned(), pause: Duration::from_secs(1) }
    }

    /// Waits so long after the first failed attempt, and twice as long after each further one. One second, unless set.
    #[must_use]
    pub fn with_pause(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }

    /// The store's URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Tries something again where that may help.
    fn attempt<T>(&self, what: &str, mut act: impl FnMut() -> io::Result<T>) -> Result<T> {
        let mut pause = self.pause;
        for attempt in 1.. {
            match act() {
                Ok(value) => return Ok(value),
                Err(error) => {
                    use io::ErrorKind::{AlreadyExists, InvalidInput, NotADirectory, NotFound, PermissionDenied};
                    let hopeless = matches!(
                        error.kind(),
                        AlreadyExists | InvalidInput | NotADirectory | NotFound | PermissionDenied
                    );
                    if hopeless || attempt == ATTEMPTS {
                        return Err(Error::Io { path: PathBuf::from(format!("{}/{what}", self.url)), source: error });
                    }
                    tracing::warn!("{}/{what}: {error}; trying again", self.url);
                    std::thread::sleep(pause);
                    pause *= 2;
                }
            }
        }
        unreachable!("the last attempt returns")
    }

    /// Sends a checkpoint: it is in the store when this returns, and not before.
    ///
    /// # Errors
    /// If a file cannot be read or sent. What was sent of it is no checkpoint, and is deleted where that is possible; but it stays
    /// where the manifest may have arrived, and only its answer was lost.
    pub fn upload(&self, checkpoint: &Opened) -> Result<()> {
        let step = checkpoint.step;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let prefix = format!("{}.{now:x}-{:x}/", folder::name(step), std::process::id());
        let sent = self.send(checkpoint, &prefix);
        if sent.is_err() && !self.may_be_committed(step, &prefix) {
            self.forget(&prefix);
        }
        sent
    }

    /// Whether the store's manifest of this step may be the one of these files.
    fn may_be_committed(&self, step: u64, prefix: &str) -> bool {
        match self.manifest(&manifest_key(step)) {
            Ok(manifest) => manifest.prefix == prefix,
            Err(error) => !self.is_absence(&error),
        }
    }

    /// Whether an error says that the store does not have an object.
    fn is_absence(&self, error: &Error) -> bool {
        // Files on the disk may be missing, too.
        matches!(error, Error::Io { path, source } if source.kind() == io::ErrorKind::NotFound && path.starts_with(&self.url))
    }

    fn send(&self, checkpoint: &Opened, prefix: &str) -> Result<()> {
        let mut files = Vec::new();
        for (name, file) in &checkpoint.files {
            let read = |error| Error::io(Path::new(name), error);
            let (size, sha256) = digest(file).map_err(read)?;
            let key = format!("{prefix}{name}");
            self.attempt(&key, || {
                rewind(file)?;
                self.store.put(&key, file)
            })?;
            files.push(Entry { name: name.clone(), size, sha256 });
        }
        let manifest = Manifest { format_version: FORMAT, step: checkpoint.step, prefix: prefix.to_owned(), files };
        let content = serde_json::to_vec_pretty(&manifest).expect("texts and numbers have a JSON form");
        let key = manifest_key(checkpoint.step);
        let Err(error) = self.attempt(&key, || self.store.put_new(&key, &content)) else { return Ok(()) };
        if !exists_already(&error) {
            return Err(error);
        }
        // An attempt that arrived though its answer did not; or the step was done before, by a run that was set back.
        let known = self.manifest(&key);
        match &known {
            Ok(known) if *known == manifest => return Ok(()),
            Ok(known) if known.files == manifest.files && self.has_all_files(known)? => {
                self.forget(prefix);
                return Ok(());
            }
            // One that nobody can read is no checkpoint.
            Ok(_) | Err(Error::Checkpoint { .. }) => (),
            Err(_) => return known.map(drop),
        }
        // In one piece: before it the old checkpoint is there, after it the new one.
        let file = in_a_file(&content).map_err(|error| Error::io(std::env::temp_dir(), error))?;
        self.attempt(&key, || {
            rewind(&file)?;
            self.store.put(&key, &file)
        })?;
        if let Ok(known) = known {
            self.forget(&known.prefix);
        }
        Ok(())
    }

    /// Whether all objects of which a manifest tells are there.
    fn has_all_files(&self, manifest: &Manifest) -> Result<bool> {
        let keys = self.attempt(&manifest.prefix, || self.store.list(&manifest.prefix))?;
        Ok(manifest.files.iter().all(|Entry { name, .. }| keys.contains(&format!("{}{name}", manifest.prefix))))
    }

    /// Deletes the files of a checkpoint that has no manifest; what cannot be deleted stays, and is in nobody's way.
    fn forget(&self, prefix: &str) {
        for key in self.store.list(prefix).unwrap_or_default() {
            let _ = self.store.delete(&key);
        }
    }

    /// The steps of the checkpoints in the store, newest first.
    ///
    /// # Errors
    /// If it cannot be listed.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let keys = self.attempt("", || self.store.list("checkpoint-"))?;
        let step = |key: &String| key.strip_prefix("checkpoint-")?.strip_suffix(".json")?.parse().ok();
        let mut steps: Vec<u64> = keys.iter().filter_map(step).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }

    fn manifest(&self, key: &str) -> Result<Manifest> {
        let temporary = tempfile::tempdir().map_err(|error| Error::io(std::env::temp_dir(), error))?;
        let path = temporary.path().join("manifest.json");
        self.attempt(key, || self.store.get(key, &path))?;
        let content = fs::read(&path).map_err(|error| Error::io(&path, error))?;
        let broken = |why: String| Error::checkpoint(format!("{}/{key}", self.url), why);
        let manifest: Manifest =
            serde_json::from_slice(&content).map_err(|error| broken(format!("it is no manifest: {error}")))?;
        if manifest.format_version != FORMAT {
            return Err(broken(format!("it has the format {}, this program knows {FORMAT}", manifest.format_version)));
        }
        Ok(manifest)
    }

    /// Fetches the newest checkpoint of a step above `above` into `output_dir`, and returns its folder; none if there is none. One
    /// that is damaged or not whole is passed over, with a warning.
    ///
    /// # Errors
    /// If the store cannot be listed or read, the disk not written, or there are newer checkpoints but none is whole.
    pub fn fetch_newest(&self, output_dir: &Path, above: Option<u64>) -> Result<Option<PathBuf>> {
        let mut failed = None;
        for step in self.steps()?.into_iter().filter(|step| above.is_none_or(|above| *step > above)) {
            match self.fetch(step, output_dir) {
                Ok(path) => return Ok(Some(path)),
                Err(error) if matches!(error, Error::Checkpoint { .. }) || self.is_absence(&error) => {
                    tracing::warn!("{error}; trying the checkpoint before it");
                    failed.get_or_insert(error);
                }
                // A store that does not answer, or a full disk: the checkpoint is there, and an older one would cost its steps.
                Err(error) => return Err(error),
            }
        }
        // An older one on the disk is not what the store says there is, but it is whole.
        match failed {
            Some(error) if above.is_none() => Err(error),
            _ => Ok(None),
        }
    }

    fn fetch(&self, step: u64, output_dir: &Path) -> Result<PathBuf> {
        let key = manifest_key(step);
        let manifest = self.manifest(&key)?;
        let at = |error| Error::io(output_dir, error);
        fs::create_dir_all(output_dir).map_err(at)?;
        // The name of what a killed run leaves: the next one removes it.
        let temporary = atomic::temporary_builder(&format!("{}.tmp-", folder::name(step)), 0o777)
            .tempdir_in(output_dir)
            .map_err(at)?;
        for Entry { name, size, sha256 } in &manifest.files {
            let damaged =
                |why: &str| Error::checkpoint(format!("{}/{}{name}", self.url, manifest.prefix), why.to_owned());
            if Path::new(name).components().count() != 1 || name.starts_with('.') {
                return Err(damaged("this is no name of a file"));
            }
            let path = temporary.path().join(name);
            let key = format!("{}{name}", manifest.prefix);
            self.attempt(&key, || {
                let _ = fs::remove_file(&path);
                self.store.get(&key, &path)
            })?;
            let file = File::open(&path).map_err(|error| Error::io(&path, error))?;
            file.sync_all().map_err(|error| Error::io(&path, error))?;
            if digest(&file).map_err(|error| Error::io(&path, error))? != (*size, sha256.clone()) {
                return Err(damaged("the file is not the one of which the manifest tells"));
            }
        }
        let path = output_dir.join(folder::name(step));
        if path.exists() {
            folder::remove(&path)?;
        }
        fs::rename(temporary.keep(), &path).map_err(|error| Error::io(&path, error))?;
        Ok(path)
    }

    /// Deletes the checkpoints of all steps above `step`.
    ///
    /// # Errors
    /// As [`Self::limit`].
    pub fn forget_after(&self, step: u64) -> Result<()> {
        self.steps()?.into_iter().filter(|of| *of > step).try_for_each(|of| self.remove(of))
    }

    /// Deletes the oldest checkpoints until `keep` are left (0: keeps all), but never the one of `step`: the manifest first, so that
    /// none is half there.
    ///
    /// # Errors
    /// If they cannot be listed or deleted.
    pub fn limit(&self, keep: usize, step: u64) -> Result<()> {
        if keep == 0 {
            return Ok(());
        }
        let steps = self.steps()?;
        let surplus = steps.len().saturating_sub(keep);
        let old = steps.into_iter().rev().filter(|of| *of != step);
        old.take(surplus).try_for_each(|of| self.remove(of))
    }

    fn remove(&self, step: u64) -> Result<()> {
        let key = manifest_key(step);
        let manifest = self.manifest(&key);
        self.attempt(&key, || self.store.delete(&key))?;
        match manifest {
            Ok(manifest) => self.forget(&manifest.prefix),
            Err(error) => tracing::warn!("{error}: the files of this checkpoint are left in the store"),
        }
        Ok(())
    }
}

fn manifest_key(step: u64) -> String {
    format!("{}.json", folder::name(step))
}

fn exists_already(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
}

/// A file without a name that holds this.
fn in_a_file(content: &[u8]) -> io::Result<File> {
    let mut file = tempfile::tempfile()?;
    file.write_all(content)?;
    Ok(file)
}

fn rewind(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::Start(0))
}

/// Size and SHA-256 of a file.
fn digest(mut file: &File) -> io::Result<(u64, String)> {
    rewind(file)?;
    let (mut hash, mut size, mut piece) = (Sha256::new(), 0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece)? {
            0 => break,
            read => {
                hash.update(&piece[..read]);
                size += read as u64;
            }
        }
    }
    let digest = hash.finalize();
    Ok((size, digest.iter().map(|byte| format!("{byte:02x}")).collect()))
}
