//! The meeting of the ranks: rank 0 listens, the others connect.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::dial::dial;
use super::super::frame::{Frame, Kind, MOST_OF_STRANGERS, is_of_a_rank};
use super::super::ranks::Ranks;
use super::super::store::Store;
use super::{BEAT, SILENCE};
use crate::error::{Error, Result};

/// The version of the messages between ranks.
const PROTOCOL: u32 = 2;
/// The time limit for a new connection to introduce itself.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// The interval at which the missing ranks are named.
const REMINDER: Duration = Duration::from_secs(10);
/// The key under which rank 0 writes its address in torchrun's store.
const ADDRESS: &str = "address";

/// A rank's introduction: its protocol and version, its number, the run's size and job, its host and process.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Hello {
    protocol: u32,
    version: String,
    rank: usize,
    size: usize,
    job: String,
    host: String,
    pid: u32,
}

impl Hello {
    fn of(ranks: &Ranks) -> Self {
        Self {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            rank: ranks.place.rank,
            size: ranks.place.size,
            job: ranks.job.clone(),
            host: host(),
            pid: std::process::id(),
        }
    }

    fn name(&self) -> String {
        format!("(process {} on {})", self.pid, self.host)
    }

    /// Checks that `other` is a rank of the same run and returns the difference if not; an error ends the run for all.
    fn check(&self, other: &Self) -> std::result::Result<(), String> {
        let differs = |what: &str, ours: &dyn std::fmt::Display, theirs: &dyn std::fmt::Display| {
            Err(format!("{what}: {ours} at rank 0, {theirs} at rank {} {}", other.rank, other.name()))
        };
        if self.protocol != other.protocol || self.version != other.version {
            let of = |hello: &Self| format!("{} (protocol {})", hello.version, hello.protocol);
            return differs("the ranks have different versions of qlora", &of(self), &of(other));
        }
        if self.size != other.size {
            return differs("the ranks disagree on how many they are", &self.size, &other.size);
        }
        Ok(())
    }
}

/// Everybody a rank is connected with.
pub(super) struct Met {
    /// Rank, name and connection.
    pub(super) lines: Vec<(usize, String, TcpStream)>,
    pub(super) described: String,
}

pub(super) fn meet(ranks: &Ranks, patience: Duration) -> Result<Met> {
    let deadline = Instant::now() + patience;
    if ranks.place.rank == 0 { receive_all(ranks, deadline) } else { go_to_first(ranks, deadline) }
}

/// Rank 0: waits for everybody.
fn receive_all(ranks: &Ranks, deadline: Instant) -> Result<Met> {
    let own = Hello::of(ranks);
    let listener = listen(ranks)?;
    let mut present: BTreeMap<usize, (Hello, TcpStream)> = BTreeMap::new();
    let (mut reminded, mut beaten) = (Instant::now(), Instant::now());
    let (sender, introduced) = std::sync::mpsc::channel();
    let refuse_all = |present: &mut BTreeMap<usize, (Hello, TcpStream)>, why: String| {
        for (_, stream) in present.values_mut() {
            let _ = Frame::write(stream, Kind::Refused, 0, "", why.as_bytes());
        }
        // Who has just come would only see the connection end.
        while let Ok((mut stream, _)) = listener.accept() {
            if introduction(&mut stream).is_ok() {
                let _ = Frame::write(&mut stream, Kind::Refused, 0, "", why.as_bytes());
            }
        }
        Error::Invalid(why)
    };
    while present.len() + 1 < own.size {
        let missing = || {
            let missing: Vec<_> = (1..own.size).filter(|rank| !present.contains_key(rank)).collect();
            format!("{} of {}", list(&missing), own.size)
        };
        if Instant::now() > deadline {
            let why = format!("rank 0 waited for ranks {} in vain", missing());
            return Err(refuse_all(&mut present, why));
        }
        if reminded.elapsed() > REMINDER {
            reminded = Instant::now();
            tracing::warn!("waiting for ranks {}", missing());
        }
        if beaten.elapsed() > BEAT {
            beaten = Instant::now();
            for (_, stream) in present.values_mut() {
                let _ = Frame::write(stream, Kind::Beat, 0, "", &[]);
            }
        }
        // A rank that came and is gone again will not come back by itself.
        if let Some((_, (hello, _))) = present.iter().find(|(_, (_, stream))| is_closed(stream)) {
            let why = format!("rank {} {} ended before the run began", hello.rank, hello.name());
            return Err(refuse_all(&mut present, why));
        }
        match listener.accept() {
            // A stranger may be silent: nobody waits for it.
            Ok((mut stream, from)) => {
                let sender = sender.clone();
                std::thread::spawn(move || {
                    let hello = introduction(&mut stream);
                    let _ = sender.send((from, stream, hello));
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(refuse_all(&mut present, format!("rank 0 cannot listen any more: {error}"))),
        }
        let Ok((from, mut stream, hello)) = introduced.recv_timeout(Duration::from_millis(20)) else { continue };
        let hello = match hello {
            Ok(hello) => hello,
            Err(error) if is_of_a_rank(&error) => {
                let why = format!("{from} is a rank of another version of qlora, or its message was damaged: {error}");
                let _ = Frame::write(&mut stream, Kind::Refused, 0, "", why.as_bytes());
                return Err(refuse_all(&mut present, why));
            }
            Err(error) => {
                tracing::warn!("{from} connected and is no rank: {error}");
                continue;
            }
        };
        if hello.job != own.job {
            tracing::warn!("rank {} {} belongs to another start of the job: refused", hello.rank, hello.name());
            let why = format!("this rank is of the start {:?}, rank 0 of {:?}", hello.job, own.job);
            let _ = Frame::write(&mut stream, Kind::Refused, 0, "", why.as_bytes());
            continue;
        }
        let twin =
            if hello.rank == 0 { Some(own.name()) } else { present.get(&hello.rank).map(|(known, _)| known.name()) };
        let problem = match (own.check(&hello), twin) {
            (Err(problem), _) => Some(problem),
            (Ok(()), Some(twin)) => {
                Some(format!("two processes say that they are rank {}: {twin} and {}", hello.rank, hello.name()))
            }
            (Ok(()), None) if hello.rank >= own.size => {
                Some(format!("there is no rank {} of {}", hello.rank, own.size))
            }
            _ => None,
        };
        let rank = hello.rank;
        if let Some(problem) = problem {
            let _ = Frame::write(&mut stream, Kind::Refused, 0, "", problem.as_bytes());
            return Err(refuse_all(&mut present, problem));
        }
        present.insert(rank, (hello, stream));
    }
    let mut names = vec![own.name()];
    names.extend(present.values().map(|(hello, _)| hello.name()));
    let described = describe(&own, &present.values().map(|(hello, _)| hello.clone()).collect::<Vec<_>>());
    let welcome = serde_json::to_vec(&(names, &described)).expect("texts have a JSON form");
    let mut lines = Vec::new();
    for (rank, (hello, mut stream)) in present {
        Frame::write(&mut stream, Kind::Welcome, 0, "", &welcome)
            .map_err(|error| Error::rank(rank, format!("{} is gone: {error}", hello.name())))?;
        lines.push((rank, hello.name(), stream));
    }
    Ok(Met { lines, described })
}

/// Opens the port of rank 0 and writes its address to torchrun's store if there is one.
fn listen(ranks: &Ranks) -> Result<TcpListener> {
    let Ranks { address, port, store, .. } = ranks;
    let wanted = if *store { 0 } else { *port };
    let bound = TcpListener::bind((address.as_str(), wanted)).or_else(|error| match error.kind() {
        // A name of this host that is no address of its own, such as a service of Kubernetes.
        io::ErrorKind::AddrNotAvailable => TcpListener::bind(("0.0.0.0", wanted)),
        _ => Err(error),
    });
    // Debian and Ubuntu give a machine's own name the address 127.0.1.1, where no other host gets.
    let bound = match bound {
        Ok(listener) if !is_loopback(address) && listener.local_addr().is_ok_and(|at| at.ip().is_loopback()) => {
            drop(listener);
            TcpListener::bind(("0.0.0.0", wanted))
        }
        other => other,
    };
    let listener = bound.map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => ": another run has the port; set MASTER_PORT to a free one, on every rank",
            _ => ": is MASTER_ADDR the host of rank 0?",
        };
        Error::Invalid(format!("rank 0 cannot listen on {address}:{wanted} ({error}){hint}"))
    })?;
    let set_up = |error: io::Error| Error::Invalid(format!("rank 0 cannot listen on {address}:{wanted} ({error})"));
    listener.set_nonblocking(true).map_err(set_up)?;
    if *store {
        let port = listener.local_addr().map_err(set_up)?.port();
        Store::connect(ranks, Duration::from_secs(60))?.set(ADDRESS, &format!("{address}:{port}"))?;
    }
    Ok(listener)
}

fn is_loopback(address: &str) -> bool {
    address == "localhost" || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn introduction(stream: &mut TcpStream) -> io::Result<Hello> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(INTRODUCTION))?;
    stream.set_write_timeout(Some(INTRODUCTION))?;
    let frame = Frame::read(stream, MOST_OF_STRANGERS)?;
    if frame.kind != Kind::Hello {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not say who it is"));
    }
    serde_json::from_slice(&frame.content).map_err(io::Error::from)
}

/// The others: go to rank 0, and wait until everybody is there.
fn go_to_first(ranks: &Ranks, deadline: Instant) -> Result<Met> {
    let own = Hello::of(ranks);
    let at = if ranks.store {
        Store::connect(ranks, deadline.saturating_duration_since(Instant::now()))?.wait_for(ADDRESS, deadline)?
    } else {
        format!("{}:{}", ranks.address, ranks.port)
    };
    let mut stream =
        dial(&at, "rank 0", deadline).map_err(|error| Error::rank(0, format!("cannot be reached at {at}: {error}")))?;
    let gone = |error: io::Error| {
        let why = match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                format!("at {at} has not been heard of for {} s: is it stopped, or cut off?", SILENCE.as_secs())
            }
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => "ended before the run began".to_owned(),
            _ => format!("at {at} is no rank 0 of qlora: {error}"),
        };
        Error::rank(0, why)
    };
    stream.set_read_timeout(Some(SILENCE)).map_err(gone)?;
    let hello = serde_json::to_vec(&own).expect("numbers and texts have a JSON form");
    Frame::write(&mut stream, Kind::Hello, 0, "", &hello).map_err(gone)?;
    let answer = loop {
        let answer = Frame::read(&mut stream, MOST_OF_STRANGERS * 64).map_err(gone)?;
        if answer.kind != Kind::Beat {
            break answer;
        }
        // Rank 0 still waits for others.
        if Instant::now() > deadline {
            return Err(Error::rank(0, "waits for other ranks: are all of them started?"));
        }
    };
    match answer.kind {
        Kind::Welcome => {
            let (names, described): (Vec<String>, String) = serde_json::from_slice(&answer.content)
                .map_err(|error| Error::rank(0, format!("sent a welcome that cannot be read: {error}")))?;
            let name = names.into_iter().next().unwrap_or_default();
            Ok(Met { lines: vec![(0, name, stream)], described })
        }
        Kind::Refused => Err(Error::Invalid(String::from_utf8_lossy(&answer.content).into_owned())),
        other => Err(Error::rank(0, format!("answered with {other:?}"))),
    }
}

/// Whether the other end has closed a connection on which nothing is expected.
fn is_closed(stream: &TcpStream) -> bool {
    let peek = || {
        stream.set_nonblocking(true)?;
        let peeked = stream.peek(&mut [0]);
        stream.set_nonblocking(false)?;
        peeked
    };
    match peek() {
        Ok(bytes) => bytes == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

/// `1, 2, 5`, cut where it is long.
fn list(ranks: &[usize]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<_> = ranks.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = if ranks.len() > SHOWN { format!(" and {} more", ranks.len() - SHOWN) } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

fn describe(own: &Hello, others: &[Hello]) -> String {
    let mut hosts: Vec<(&str, usize)> = Vec::new();
    for hello in std::iter::once(own).chain(others) {
        match hosts.iter_mut().find(|(host, _)| *host == hello.host) {
            Some((_, count)) => *count += 1,
            None => hosts.push((&hello.host, 1)),
        }
    }
    let hosts: Vec<_> = hosts.iter().map(|(host, count)| format!("{count} on {host}")).collect();
    format!("{} ranks: {}", own.size, hosts.join(", "))
}

/// This host's name.
pub(crate) fn host() -> String {
    let read = |path| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let named = read("/proc/sys/kernel/hostname").or_else(|| std::env::var("HOSTNAME").ok());
    named.filter(|name| !name.is_empty()).unwrap_or_else(|| "this host".to_owned())
}
