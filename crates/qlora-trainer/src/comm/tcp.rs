//! Ranks that talk over TCP: a star with rank 0 in its middle.
//!
//! Each rank has a connection to rank 0. For a sum the others send their values, rank 0 adds them in the order of the ranks
//! and sends the sum back, so its bits do not depend on who is faster. That carries `2 (N - 1)` times the data through
//! one process: for CPUs, tests, and the small messages between ranks whose gradients NCCL adds.
//!
//! The kernel closes the connections of a process that dies, which the others notice at once; one that is stopped or cut off
//! is noticed by its silence (a heartbeat every [`BEAT`], gone after [`SILENCE`]). Rank 0 tells everybody who it was. A rank
//! that is in the middle of long work then has [`GRACE`] to notice by itself, before [`TcpOptions::when_lost`] is called.
//!
//! There is no authentication: for networks that are trusted, like NCCL's and torchrun's own protocols.

mod line;
mod meet;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::frame::{Frame, Kind};
use super::ranks::Ranks;
use super::{Alive, Communicator, RankPlace};
use crate::error::{Error, Result};
use line::Line;
#[cfg(feature = "cuda")]
pub(crate) use meet::host;
use qlora_kernels::{View, ViewMut};

/// The interval at which a rank says that it is alive.
pub const BEAT: Duration = Duration::from_secs(2);
/// The time after which a silent rank counts as gone.
pub const SILENCE: Duration = Duration::from_secs(10);
/// How long a rank may go on after another was lost before it is ended from outside.
pub const GRACE: Duration = Duration::from_secs(4);
/// How often a rank that waits for another says so.
const REMINDER: Duration = Duration::from_secs(60);

/// Options of connecting the ranks and of ending them.
#[derive(Clone)]
pub struct TcpOptions {
    /// The time that rank 0 waits for the others, and they for it.
    pub patience: Duration,
    /// Called once if a rank was lost and this one did not notice within [`GRACE`]: a program ends itself here. Nothing, unless
    /// set.
    pub when_lost: Arc<dyn Fn(&Error) + Send + Sync>,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self { patience: Duration::from_secs(600), when_lost: Arc::new(|_| ()) }
    }
}

/// Ranks that talk over TCP.
pub struct Tcp {
    place: RankPlace,
    /// Rank 0 has all others, in order; they have rank 0.
    lines: Vec<Line>,
    calls: u64,
    shared: Arc<Shared>,
    watch: Option<JoinHandle<()>>,
    described: String,
    address: Option<String>,
}

/// The state that the threads of a communicator share.
#[derive(Default)]
struct Shared {
    /// The rank that ended the run, and why.
    lost: Mutex<Option<(usize, String)>>,
    /// Whether this rank is done.
    left: AtomicBool,
    /// Whether its communicator is gone.
    dropped: AtomicBool,
    /// The step in which it is.
    step: AtomicU64,
    /// Whether it writes something that must not be cut short.
    writing: AtomicBool,
    /// Whether the rank that was lost is there, but cannot be understood.
    damaged: AtomicBool,
}

impl Shared {
    fn lost(&self) -> Option<(usize, String)> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Records the first loss; its consequences do not count.
    fn lose(&self, rank: usize, why: String) {
        if !self.left.load(Ordering::SeqCst) {
            self.lost.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((rank, why));
        }
    }

    fn error(&self) -> Option<Error> {
        let step = match self.step.load(Ordering::SeqCst) {
            0 => "; this rank had not begun its first step".to_owned(),
            step => format!("; this rank was in step {step}"),
        };
        self.lost().map(|(rank, why)| Error::rank(rank, format!("{why}{step}")))
    }
}

impl Tcp {
    /// Meets the other ranks.
    ///
    /// # Errors
    /// If they do not all come, cannot be reached, or do not belong together; the message names who is missing or what differs.
    pub fn connect(ranks: &Ranks, options: &TcpOptions) -> Result<Self> {
        let place = ranks.place.clone();
        let shared = Arc::new(Shared::default());
        let met = meet::meet(ranks, options.patience)?;
        let described = met.described;
        // Where rank 0 was reached from, others are reached.
        let own = met.lines.first().and_then(|(_, _, stream)| stream.local_addr().ok());
        let address = if place.rank == 0 { Some(ranks.address.clone()) } else { own.map(|own| own.ip().to_string()) };
        let lines = met.lines.into_iter().map(|(rank, name, stream)| Line::new(rank, name, stream, &shared));
        let lines: Vec<Line> = lines.collect::<Result<_>>()?;
        let watch = watch(&lines, &shared, Arc::clone(&options.when_lost));
        Ok(Self { place, lines, calls: 0, shared, watch: Some(watch), described, address })
    }

    /// The next call's number.
    fn call(&mut self) -> u64 {
        self.calls += 1;
        self.calls
    }

    fn send(&self, line: &Line, sequence: u64, what: &str, content: &[u8]) -> Result<()> {
        line.send(Kind::Data, sequence, what, content).map_err(|error| {
            let why = format!("{} cannot be reached any more ({error})", line.name);
            self.shared.lose(line.rank, why);
            self.shared.error().unwrap_or_else(|| Error::rank(line.rank, "is gone"))
        })
    }

    /// The next message of a rank, which has to belong to this call.
    fn receive(&self, line: &Line, sequence: u64, what: &str) -> Result<Vec<u8>> {
        let (since, mut reminded) = (Instant::now(), Instant::now());
        loop {
            if reminded.elapsed() > REMINDER {
                reminded = Instant::now();
                let (seconds, name) = (since.elapsed().as_secs(), &line.name);
                tracing::warn!("waiting for rank {} {name} at {what:?} for {seconds} s; it is alive", line.rank);
            }
            match line.inbox.recv_timeout(Duration::from_millis(100)) {
                Ok(Frame { sequence: theirs, name, content, .. }) => {
                    if theirs == sequence && name == what {
                        return Ok(content);
                    }
                    return Err(Error::rank(
                        line.rank,
                        format!(
                            "is elsewhere in the program: it is at call {theirs} ({name}), this rank at call {sequence} ({what})"
                        ),
                    ));
                }
                Err(RecvTimeoutError::Timeout) => self.check()?,
                Err(RecvTimeoutError::Disconnected) => {
                    self.check()?;
                    return Err(Error::rank(line.rank, format!("{} left before the end of the run", line.name)));
                }
            }
        }
    }

    /// Sends `parts[i]` to rank `i` and returns what each rank sends to this one, through rank 0.
    ///
    /// # Errors
    /// As [`Communicator::gather`].
    pub(crate) fn all_to_all(&mut self, what: &'static str, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        let (sequence, size) = (self.call(), self.place.size);
        if self.place.rank > 0 {
            self.send(&self.lines[0], sequence, what, &pack(&parts))?;
            return unpack(&self.receive(&self.lines[0], sequence, what)?, size);
        }
        let mut of_ranks = vec![parts];
        for line in &self.lines {
            of_ranks.push(unpack(&self.receive(line, sequence, what)?, size)?);
        }
        let mut to = |rank: usize| -> Vec<Vec<u8>> {
            of_ranks.iter_mut().map(|parts| std::mem::take(&mut parts[rank])).collect()
        };
        for line in &self.lines {
            self.send(line, sequence, what, &pack(&to(line.rank)))?;
        }
        Ok(to(0))
    }

    /// Sends bytes to everybody else.
    fn send_to_all(&self, sequence: u64, what: &str, content: &[u8]) -> Result<()> {
        self.lines.iter().try_for_each(|line| self.send(line, sequence, what, content))
    }
}

impl Communicator for Tcp {
    fn rank(&self) -> usize {
        self.place.rank
    }

    fn size(&self) -> usize {
        self.place.size
    }

    fn local_rank(&self) -> usize {
        self.place.local_rank
    }

    fn gather(&mut self, what: &'static str, mine: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let sequence = self.call();
        if self.place.rank > 0 {
            self.send(&self.lines[0], sequence, what, &mine)?;
            return unpack(&self.receive(&self.lines[0], sequence, what)?, self.place.size);
        }
        let mut all = vec![mine];
        for line in &self.lines {
            all.push(self.receive(line, sequence, what)?);
        }
        self.send_to_all(sequence, what, &pack(&all))?;
        Ok(all)
    }

    fn sum(&mut self, what: &'static str, values: ViewMut) -> Result<()> {
        let sequence = self.call();
        let mut sum = values.as_view().to_vec()?;
        if self.place.rank > 0 {
            self.send(&self.lines[0], sequence, what, bytemuck::cast_slice(&sum))?;
            let bytes = self.receive(&self.lines[0], sequence, what)?;
            sum = floats(&bytes, sum.len(), 0)?.collect();
        } else {
            for line in &self.lines {
                let bytes = self.receive(line, sequence, what)?;
                let theirs = floats(&bytes, sum.len(), line.rank)?;
                sum.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value);
            }
            self.send_to_all(sequence, what, bytemuck::cast_slice(&sum))?;
        }
        Ok(values.copy_from(View::vector(&sum))?)
    }

    fn sums_in_order(&self) -> bool {
        true
    }

    fn check(&self) -> Result<()> {
        self.shared.error().map_or(Ok(()), Err)
    }

    fn fail(&mut self, why: &str) {
        // Who fails because another did has nothing new to tell.
        self.shared.lose(self.place.rank, why.to_owned());
        self.leave();
    }

    fn leave(&mut self) {
        if !self.shared.left.swap(true, Ordering::SeqCst) {
            let lost = self.shared.lost();
            for line in &self.lines {
                // Rank 0 may leave before its watch has told the others why. A rank that is gone may be one that does not read.
                match &lost {
                    Some((rank, why)) if *rank == line.rank => {
                        if self.shared.damaged.load(Ordering::SeqCst) {
                            line.tell_failure(self.place.rank, &format!("says that rank {rank} {why}"));
                        }
                        continue;
                    }
                    Some((rank, why)) => line.tell_failure(*rank, why),
                    None => (),
                }
                let _ = line.send(Kind::Left, 0, "", &[]);
            }
        }
    }

    fn alive(&self) -> Alive {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.error().map_or(Ok(()), Err))
    }

    fn address(&self) -> Option<String> {
        self.address.clone()
    }

    fn at_step(&self, step: u64) {
        self.shared.step.store(step, Ordering::SeqCst);
    }

    fn writing(&self, on: bool) {
        self.shared.writing.store(on, Ordering::SeqCst);
    }

    fn receiving(&mut self) -> Vec<(usize, f64)> {
        self.lines.iter().map(|line| (line.rank, line.handle().take_received().as_secs_f64())).collect()
    }

    fn name(&self, rank: usize) -> String {
        let line = self.lines.iter().find(|line| line.rank == rank);
        line.map_or_else(|| format!("rank {rank}"), |line| format!("rank {rank} {}", line.name))
    }

    fn describe(&self) -> Option<String> {
        Some(self.described.clone())
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        // A rank that panics, or forgets to say why it ends, did not finish.
        if !self.shared.left.load(Ordering::SeqCst) {
            self.fail("ended before the run did");
        }
        self.shared.dropped.store(true, Ordering::SeqCst);
        if let Some(watch) = self.watch.take() {
            let _ = watch.join();
        }
        self.lines.iter().for_each(|line| line.handle().close());
    }
}

impl fmt::Debug for Tcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tcp(rank {} of {})", self.place.rank, self.place.size)
    }
}

/// Beats, listens for silence, tells everybody of a loss, and ends a rank that does not notice.
fn watch(lines: &[Line], shared: &Arc<Shared>, when_lost: Arc<dyn Fn(&Error) + Send + Sync>) -> JoinHandle<()> {
    let (lines, shared) = (lines.iter().map(Line::handle).collect::<Vec<_>>(), Arc::clone(shared));
    std::thread::spawn(move || {
        let (mut beaten, mut told, mut lost_at, mut ended) = (Instant::now(), false, None, false);
        while !shared.dropped.load(Ordering::SeqCst) {
            let slept = Instant::now();
            std::thread::sleep(Duration::from_millis(50));
            if slept.elapsed() > BEAT {
                // This process was stopped, or had no processor: the others' beats are still to be read.
                lines.iter().for_each(|line| line.hear());
            }
            if beaten.elapsed() >= BEAT {
                beaten = Instant::now();
                lines.iter().for_each(|line| line.beat());
            }
            for line in &lines {
                if line.silent_for() > SILENCE {
                    let why = format!("{} has not been heard of for {} s", line.name, SILENCE.as_secs());
                    shared.lose(line.rank, why);
                }
            }
            let Some((rank, why)) = shared.lost() else { continue };
            let since = *lost_at.get_or_insert_with(Instant::now);
            if !told && !shared.left.load(Ordering::SeqCst) {
                told = true;
                lines.iter().filter(|line| line.rank != rank).for_each(|line| line.tell_failure(rank, &why));
            }
            if since.elapsed() > GRACE && !ended && !shared.writing.load(Ordering::SeqCst) {
                ended = true;
                if let Some(error) = shared.error() {
                    when_lost(&error);
                }
            }
        }
    })
}

/// Messages as one: for each its length and its bytes.
fn pack(all: &[Vec<u8>]) -> Vec<u8> {
    all.iter().flat_map(|one| (one.len() as u64).to_le_bytes().into_iter().chain(one.iter().copied())).collect()
}

fn unpack(mut bytes: &[u8], expected: usize) -> Result<Vec<Vec<u8>>> {
    let broken = || Error::rank(0, "sent a broken message");
    let mut all = Vec::with_capacity(expected);
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| broken())?;
        let (one, rest) = rest.split_at_checked(length).ok_or_else(broken)?;
        all.push(one.to_vec());
        bytes = rest;
    }
    if all.len() == expected && bytes.is_empty() { Ok(all) } else { Err(broken()) }
}

fn floats(bytes: &[u8], expected: usize, rank: usize) -> Result<impl Iterator<Item = f32> + '_> {
    let (values, rest) = bytes.as_chunks();
    if values.len() != expected || !rest.is_empty() {
        return Err(Error::rank(rank, format!("sent {} values for a sum of {expected}", values.len())));
    }
    Ok(values.iter().map(|value| f32::from_le_bytes(*value)))
}

#[cfg(test)]
mod tests;
