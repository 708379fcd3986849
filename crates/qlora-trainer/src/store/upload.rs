//! Sends checkpoints while the run goes on.

use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::mirror::{Mirror, Opened};
use crate::error::{Error, Result};

/// The state that the run and its uploader share.
#[derive(Debug, Default)]
struct Queue {
    /// The newest checkpoint that is not yet being sent. One that waits when a newer one comes is never sent.
    waiting: Mutex<(Option<Opened>, bool)>,
    changed: Condvar,
}

/// Sends checkpoints in a thread, the newest first.
#[derive(Debug)]
pub(crate) struct Uploader {
    mirror: Arc<Mirror>,
    keep: usize,
    queue: Arc<Queue>,
    sender: Sender<(u64, Result<()>)>,
    results: Receiver<(u64, Result<()>)>,
    /// None before the first checkpoint, and after [`Self::finish`] until the next.
    thread: Option<JoinHandle<()>>,
    /// The newest step that was handed over.
    last: Option<u64>,
    /// The newest step of which it is known what became of it, and of one that failed why.
    known: Option<u64>,
    failed: Option<(u64, String)>,
}

impl Uploader {
    /// `keep`: checkpoints in the store (0: all).
    pub(crate) fn start(mirror: Mirror, keep: usize) -> Self {
        let (sender, results) = mpsc::channel();
        let (mirror, queue) = (Arc::new(mirror), Arc::new(Queue::default()));
        Self { mirror, keep, queue, sender, results, thread: None, last: None, known: None, failed: None }
    }

    /// The store's URL.
    pub(crate) fn url(&self) -> &str {
        self.mirror.url()
    }

    /// The step of the newest checkpoint, if it is not known yet what became of it.
    pub(crate) fn on_its_way(&self) -> Option<u64> {
        self.last.filter(|last| self.known != Some(*last))
    }

    /// Hands over a checkpoint; its files may be deleted from now on.
    pub(crate) fn send(&mut self, step: u64, folder: &Path) -> Result<()> {
        let opened = Opened::new(step, folder)?;
        self.last = Some(step);
        self.queue.waiting.lock().unwrap_or_else(PoisonError::into_inner).0 = Some(opened);
        self.queue.changed.notify_one();
        if self.thread.is_none() {
            let (mirror, keep) = (Arc::clone(&self.mirror), self.keep);
            let (queue, sender) = (Arc::clone(&self.queue), self.sender.clone());
            self.thread = Some(std::thread::spawn(move || send_all(&mirror, keep, &queue, &sender)));
        }
        Ok(())
    }

    /// What has become of checkpoints since this was last asked, in words.
    pub(crate) fn news(&mut self) -> Vec<String> {
        let results: Vec<_> = self.results.try_iter().collect();
        results.into_iter().map(|(step, result)| self.note(step, result)).collect()
    }

    fn note(&mut self, step: u64, result: Result<()>) -> String {
        self.known = Some(step);
        match result {
            Ok(()) => {
                self.failed = None;
                format!("checkpoint-{step} is in {}", self.url())
            }
            Err(error) => {
                let text = format!("checkpoint-{step} is not in the store: {error}; the run goes on");
                self.failed = Some((step, error.to_string()));
                text
            }
        }
    }

    /// Waits until everything is sent. Another checkpoint may be handed over after that.
    ///
    /// # Errors
    /// If the last checkpoint did not arrive.
    pub(crate) fn finish(&mut self, say: &mut dyn FnMut(&str)) -> Result<()> {
        self.end();
        self.news().iter().for_each(|text| say(text));
        match self.failed.take() {
            Some((step, why)) if Some(step) == self.last => {
                Err(Error::Invalid(format!("the last checkpoint, of step {step}, is on this machine only: {why}")))
            }
            _ => Ok(()),
        }
    }

    fn end(&mut self) {
        self.queue.waiting.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.queue.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.queue.waiting.lock().unwrap_or_else(PoisonError::into_inner).1 = false;
    }
}

fn send_all(mirror: &Mirror, keep: usize, queue: &Queue, results: &Sender<(u64, Result<()>)>) {
    loop {
        let mut waiting = queue.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let checkpoint = loop {
            match waiting.0.take() {
                Some(checkpoint) => break checkpoint,
                None if waiting.1 => return,
                None => waiting = queue.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(waiting);
        let sent = mirror.upload(&checkpoint);
        if sent.is_ok()
            && let Err(error) = mirror.limit(keep, checkpoint.step())
        {
            tracing::warn!("old checkpoints stay in the store: {error}");
        }
        if results.send((checkpoint.step(), sent)).is_err() {
            return;
        }
    }
}
