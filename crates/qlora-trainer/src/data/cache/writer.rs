//! Writes shards while rows are tokenized: a thread of its own waits for the disk.

use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use qlora_core::atomic::write_atomically;

use super::shard::{END_FILE, ShardBuilder, end_file, shard_name};
use super::{SHARD_BYTES, SHARD_ROWS};
use crate::data::load::EncodedRow;
use crate::data::rows::RowPosition;

/// Keeps encoded rows. After a failure, which is a warning, it keeps nothing more.
pub(crate) struct Writer {
    folder: PathBuf,
    /// The number of the shard that is being filled.
    number: usize,
    shard: Option<ShardBuilder>,
    /// The position behind the rows so far.
    at: RowPosition,
    disk: Option<Disk>,
}

/// What a file has, in two parts.
type Contents = [Vec<u8>; 2];

/// Files that the thread still has to write are two at most: more would only take memory.
struct Disk {
    files: SyncSender<(PathBuf, Contents)>,
    thread: JoinHandle<Result<(), String>>,
}

impl Writer {
    pub(super) fn new(folder: PathBuf, number: usize, at: RowPosition) -> Self {
        let disk = Disk::new(folder.clone());
        if let Err(error) = &disk {
            warn(error);
        }
        Self { folder, number, shard: None, at, disk: disk.ok() }
    }

    /// Keeps rows of a file, read up to the position `end`.
    pub(crate) fn push(&mut self, file: usize, rows: &[EncodedRow], end: RowPosition) {
        if self.disk.is_none() {
            return;
        }
        let is_full = |shard: &ShardBuilder| shard.rows() >= SHARD_ROWS || shard.bytes() >= SHARD_BYTES;
        if self.shard.as_ref().is_some_and(|shard| shard.file() != file || is_full(shard)) {
            self.finish_shard();
        }
        let shard = self.shard.get_or_insert_with(|| ShardBuilder::new(file, self.at));
        rows.iter().for_each(|row| shard.push(row));
        self.at = end;
    }

    /// The number of shards that exist when all of them are written.
    pub(crate) fn shards(&self) -> usize {
        self.number + usize::from(self.shard.is_some())
    }

    fn finish_shard(&mut self) {
        if let Some(shard) = self.shard.take() {
            let path = self.folder.join(shard_name(self.number));
            self.number += 1;
            self.send(path, shard.finish(self.at));
        }
    }

    fn send(&mut self, path: PathBuf, contents: Contents) {
        let lost = self.disk.as_ref().is_some_and(|disk| disk.files.send((path, contents)).is_err());
        if lost {
            self.wait();
        }
    }

    /// Writes what is left, and, if the set ends here, says so in the folder. Returns whether everything was kept.
    pub(crate) fn finish(mut self, ends: bool) -> bool {
        self.finish_shard();
        if ends {
            self.send(self.folder.join(END_FILE), [end_file(self.at), Vec::new()]);
        }
        self.wait()
    }

    /// Waits for the thread; warns if it failed.
    fn wait(&mut self) -> bool {
        let Some(Disk { files, thread }) = self.disk.take() else { return false };
        drop(files);
        let result = thread.join().unwrap_or_else(|_| Err("the thread that writes has ended".to_owned()));
        if let Err(error) = &result {
            warn(error);
        }
        result.is_ok()
    }
}

fn warn(error: &str) {
    tracing::warn!("the tokens are not kept, so the next start makes them again: {error}");
}

impl Drop for Writer {
    /// After an error in the data: what was made before it stays.
    fn drop(&mut self) {
        self.wait();
    }
}

impl Disk {
    fn new(folder: PathBuf) -> Result<Self, String> {
        std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let (files, queue) = sync_channel::<(PathBuf, Contents)>(1);
        let write = move || {
            for (path, [first, second]) in queue {
                let write = |file: &mut dyn Write| file.write_all(&first).and_then(|()| file.write_all(&second));
                write_atomically(&path, write).map_err(|error| error.to_string())?;
            }
            Ok(())
        };
        let thread = thread::Builder::new().name("token cache".to_owned()).spawn(write);
        thread.map(|thread| Self { files, thread }).map_err(|error| format!("no thread can be started: {error}"))
    }
}
