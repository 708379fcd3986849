//! The connection to another rank: a thread reads its messages, every thread may send.

use std::io::{self, BufRead as _, BufReader, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::super::frame::{Frame, Kind, MOST};
use super::{SILENCE, Shared};
use crate::error::{Error, Result};

/// A rank at the other end.
pub(super) struct Line {
    pub(super) rank: usize,
    /// Host and process, for messages.
    pub(super) name: String,
    pub(super) inbox: Receiver<Frame>,
    handle: Arc<Handle>,
}

/// The part of a line that other threads use.
pub(super) struct Handle {
    pub(super) rank: usize,
    pub(super) name: String,
    writer: Mutex<TcpStream>,
    heard: Mutex<Instant>,
    /// How long its data took from the first byte to the last, since this was last asked.
    received: Mutex<Duration>,
    /// Whether the rank said that it is done.
    left: AtomicBool,
    /// Whether its messages are read no more.
    is_over: AtomicBool,
}

impl Line {
    pub(super) fn new(rank: usize, name: String, stream: TcpStream, shared: &Arc<Shared>) -> Result<Self> {
        let failed = |error: io::Error| Error::rank(rank, format!("{name} cannot be listened to: {error}"));
        let options = || -> io::Result<TcpStream> {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(None)?;
            // A stopped process does not read; what waits for it must end.
            stream.set_write_timeout(Some(SILENCE))?;
            stream.try_clone()
        };
        let reader = options().map_err(failed)?;
        let handle = Arc::new(Handle {
            rank,
            name: name.clone(),
            writer: Mutex::new(stream),
            heard: Mutex::new(Instant::now()),
            received: Mutex::new(Duration::ZERO),
            left: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
        });
        let (sender, inbox) = mpsc::channel();
        let (of_thread, shared) = (Arc::clone(&handle), Arc::clone(shared));
        std::thread::spawn(move || {
            read(reader, &of_thread, sender, &shared);
            of_thread.is_over.store(true, Ordering::SeqCst);
        });
        Ok(Self { rank, name, inbox, handle })
    }

    pub(super) fn silent_for(&self) -> Duration {
        self.handle.silent_for()
    }

    /// Whether nothing comes any more: the rank said that it is done, or the connection ended.
    pub(super) fn is_over(&self) -> bool {
        self.handle.is_over.load(Ordering::SeqCst)
    }

    pub(super) fn handle(&self) -> Arc<Handle> {
        Arc::clone(&self.handle)
    }

    pub(super) fn send(&self, kind: Kind, sequence: u64, name: &str, content: &[u8]) -> io::Result<()> {
        let mut writer = self.handle.writer.lock().unwrap_or_else(PoisonError::into_inner);
        Frame::write(&mut *writer, kind, sequence, name, content)
    }

    pub(super) fn tell_failure(&self, rank: usize, why: &str) {
        self.handle.tell_failure(rank, why);
    }
}

impl Handle {
    /// Says that this rank is alive, unless something longer is being sent, which says so too.
    pub(super) fn beat(&self) {
        if let Ok(mut writer) = self.writer.try_lock() {
            let _ = Frame::write(&mut *writer, Kind::Beat, 0, "", &[]);
        }
    }

    pub(super) fn tell_failure(&self, rank: usize, why: &str) {
        let content = serde_json::to_vec(&(rank, why)).expect("a number and a text have a JSON form");
        // In the middle of a long message, to a rank that does not read, there is no telling.
        for _ in 0..10 {
            if let Ok(mut writer) = self.writer.try_lock() {
                let _ = Frame::write(&mut *writer, Kind::Failed, 0, "", &content);
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends the connection; what was sent arrives. The thread that reads ends with it.
    pub(super) fn close(&self) {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writer.shutdown(Shutdown::Both);
    }

    pub(super) fn silent_for(&self) -> Duration {
        if self.left.load(Ordering::SeqCst) {
            return Duration::ZERO;
        }
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// See [`Handle::received`]; counted from zero again.
    pub(super) fn take_received(&self) -> Duration {
        std::mem::take(&mut *self.received.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn hear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// A stream whose every byte is a sign of life.
struct Heard<'a>(TcpStream, &'a Handle);

impl Read for Heard<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer)?;
        self.1.hear();
        Ok(read)
    }
}

fn read(stream: TcpStream, handle: &Handle, inbox: Sender<Frame>, shared: &Shared) {
    let mut inbox = Some(inbox);
    let mut stream = BufReader::with_capacity(1 << 16, Heard(stream, handle));
    loop {
        // Waits for a message to begin.
        let begun = stream.fill_buf().map(|_| Instant::now());
        match begun.and_then(|begun| Ok((begun, Frame::read(&mut stream, MOST)?))) {
            Ok((_, Frame { kind: Kind::Beat, .. })) => (),
            Ok((begun, frame @ Frame { kind: Kind::Data, .. })) => {
                *handle.received.lock().unwrap_or_else(PoisonError::into_inner) += begun.elapsed();
                // Nobody waits for data after a failure.
                if inbox.as_ref().is_some_and(|inbox| inbox.send(frame).is_err()) {
                    return;
                }
            }
            Ok((_, Frame { kind: Kind::Failed, content, .. })) => {
                let told = serde_json::from_slice::<(usize, String)>(&content);
                let (rank, why) = told.unwrap_or_else(|_| (handle.rank, "failed".to_owned()));
                shared.lose(rank, why);
                // It may go on for a while: its beats and its end are still to be heard.
                inbox = None;
            }
            Ok((_, Frame { kind: Kind::Left, .. })) => {
                handle.left.store(true, Ordering::SeqCst);
                return;
            }
            Ok((_, Frame { kind, .. })) => {
                shared.lose(handle.rank, format!("{} sent {kind:?} in the middle of a run", handle.name));
                return;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => {
                let how = match error.kind() {
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                        "its process ended or was killed, or the connection was cut".to_owned()
                    }
                    // Not gone, but nothing that it says can be relied on.
                    io::ErrorKind::InvalidData => {
                        shared.damaged.store(true, Ordering::SeqCst);
                        shared.lose(handle.rank, format!("{} cannot be understood: {error}", handle.name));
                        return;
                    }
                    _ => error.to_string(),
                };
                shared.lose(handle.rank, format!("{} is gone: {how}", handle.name));
                return;
            }
        }
    }
}
