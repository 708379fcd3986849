//! The shares of a frozen base that ranks hold for each other ([`qlora_core::model::placement`]), in host memory.
//!
//! Each rank answers for its own tensors in a thread of its own, whatever else it does: a rank asks for what it needs when it needs it,
//! and the others take no notice. So ranks need not be at the same place of the program, and one without a micro-batch has nothing to
//! do. (GPUs read each other's memory directly; this is for CPUs.) A request is a tensor's number, the answer its length and its bytes.
//!
//! All ranks are on one host. As the rest of [`comm`](super), for hosts whose users are trusted.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use qlora_core::model::placement::{OtherShares, OwnShare, Peers};

use super::tcp::{GRACE, SILENCE};
use super::{Communicator, exchange};
use crate::error::{Error, Result};

/// The operation in errors of the operations.
const OP: &str = "sharded base";

/// Longer than it takes until a rank that is stopped or cut off is found out, which says more than that it does not answer.
const PATIENCE: Duration = SILENCE.saturating_add(GRACE).saturating_add(Duration::from_secs(6));

/// How long it may take until the end of a rank is known after its share could not be read.
const AFTERMATH: Duration = Duration::from_secs(2);

/// The answer's length where a tensor is not this rank's.
const NOT_HERE: u64 = u64::MAX;

/// The ranks of a run while their base is loaded.
pub(crate) struct SharingRanks<'a> {
    comm: &'a mut dyn Communicator,
    /// The error behind one that had to pass through another crate.
    pub(crate) failed: Option<Error>,
}

impl<'a> SharingRanks<'a> {
    pub(crate) fn new(comm: &'a mut dyn Communicator) -> Self {
        Self { comm, failed: None }
    }

    fn keep<T>(&mut self, result: Result<T>) -> qlora_core::Result<T> {
        result.map_err(|error| {
            let text = error.to_string();
            self.failed = Some(error);
            qlora_core::Error::Invalid(text)
        })
    }
}

impl Peers for SharingRanks<'_> {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.size()
    }

    fn exchange(&mut self, what: &'static str, mine: Vec<u8>) -> qlora_core::Result<Vec<Vec<u8>>> {
        let all = self.comm.gather(what, mine);
        self.keep(all)
    }

    fn serve(&mut self, own: Arc<dyn OwnShare>) -> qlora_core::Result<Arc<dyn OtherShares>> {
        let shares = HostShares::meet(&mut *self.comm, own);
        self.keep(shares).map(|shares| Arc::new(shares) as Arc<dyn OtherShares>)
    }
}

/// The rank that made an error: where a share could not be read because its rank is gone, that says so.
pub(crate) fn cause_of(error: Error, comm: &dyn Communicator) -> Error {
    let of_share = matches!(
        &error,
        Error::Step { source: qlora_core::Error::Kernel(qlora_kernels::Error::Invalid { op: OP, .. }), .. }
            | Error::Core(qlora_core::Error::Kernel(qlora_kernels::Error::Invalid { op: OP, .. }))
            | Error::Kernel(qlora_kernels::Error::Invalid { op: OP, .. })
    );
    let until = Instant::now() + AFTERMATH;
    while of_share && Instant::now() < until {
        if let Err(lost) = comm.check() {
            return lost;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    error
}

/// The shares of all ranks: this rank's is served, the others' are read.
struct HostShares {
    others: Vec<Option<Mutex<TcpStream>>>,
    names: Vec<String>,
    /// This rank's server.
    address: SocketAddr,
    ended: Arc<AtomicBool>,
}

impl HostShares {
    fn meet(comm: &mut dyn Communicator, own: Arc<dyn OwnShare>) -> Result<Self> {
        let failed =
            |error: io::Error| Error::Invalid(format!("this rank's share of the base cannot be served: {error}"));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let ended = Arc::new(AtomicBool::new(false));
        let of_server = ended.clone();
        std::thread::spawn(move || serve(&listener, &own, &of_server));
        let mut shares = Self { others: Vec::new(), names: Vec::new(), address, ended };
        let rank = comm.rank();
        for (of, port) in
            exchange(comm, "addresses of the shares of the base", &address.port())?.into_iter().enumerate()
        {
            let connect = || -> io::Result<TcpStream> {
                let stream = TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, port).into(), SILENCE)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(SILENCE))?;
                Ok(stream)
            };
            let stream = match of == rank {
                true => None,
                false => {
                    let unreachable = |error| Error::rank(of, format!("does not give its share of the base ({error})"));
                    Some(Mutex::new(connect().map_err(unreachable)?))
                }
            };
            shares.others.push(stream);
            shares.names.push(comm.name(of));
        }
        Ok(shares)
    }
}

impl OtherShares for HostShares {
    fn read(&self, rank: usize, number: usize, out: &mut Vec<u8>) -> qlora_kernels::Result<()> {
        let invalid = |message: String| qlora_kernels::Error::Invalid { op: OP, message };
        let Some(stream) = self.others.get(rank).and_then(Option::as_ref) else {
            return Err(invalid(format!("rank {rank} is no other rank")));
        };
        let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ask = || -> io::Result<()> {
            stream.write_all(&(number as u64).to_le_bytes())?;
            let mut length = [0; 8];
            stream.read_exact(&mut length)?;
            let length = match u64::from_le_bytes(length) {
                NOT_HERE => return Err(io::Error::other(format!("it has no tensor {number}"))),
                length => usize::try_from(length).map_err(io::Error::other)?,
            };
            let start = out.len();
            // No more memory than arrives.
            let read = (&mut *stream).take(length as u64).read_to_end(out)?;
            if read < length {
                out.truncate(start);
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(())
        };
        ask().map_err(|error| {
            let text = match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => format!("no answer in {} s", PATIENCE.as_secs()),
                _ => error.to_string(),
            };
            invalid(format!("{} does not give its share of the base: {text}", self.names[rank]))
        })
    }
}

impl Drop for HostShares {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the server.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

impl fmt::Debug for HostShares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostShares(of {} ranks)", self.others.len())
    }
}

/// Answers until the shares are dropped.
fn serve(listener: &TcpListener, own: &Arc<dyn OwnShare>, ended: &Arc<AtomicBool>) {
    for stream in listener.incoming() {
        if ended.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let (own, ended) = (own.clone(), ended.clone());
        std::thread::spawn(move || {
            // The other side's end is no error of this one's.
            let _ = answer(stream, &*own, &ended);
        });
    }
}

fn answer(mut stream: TcpStream, own: &dyn OwnShare, ended: &AtomicBool) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut number = [0; 8];
    while !ended.load(Ordering::SeqCst) {
        stream.read_exact(&mut number)?;
        let piece = usize::try_from(u64::from_le_bytes(number)).ok().and_then(|number| own.piece(number));
        match piece {
            None => stream.write_all(&NOT_HERE.to_le_bytes())?,
            Some(piece) => {
                stream.write_all(&(piece.len() as u64).to_le_bytes())?;
                stream.write_all(&piece)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Alone;
    use super::*;

    struct Three;

    impl OwnShare for Three {
        fn piece(&self, number: usize) -> Option<Vec<u8>> {
            (number < 3).then(|| vec![number as u8; 1000 * number])
        }
    }

    fn connected(to: SocketAddr) -> HostShares {
        let stream = TcpStream::connect(to).unwrap();
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let names = vec!["rank 0".to_owned(), "rank 1 (process 7 on here)".to_owned()];
        HostShares { others: vec![None, Some(Mutex::new(stream))], names, address, ended: Arc::default() }
    }

    #[test]
    fn tensors_are_served_and_what_is_not_there_is_said() {
        let mut alone = Alone;
        let served = HostShares::meet(&mut alone, Arc::new(Three)).unwrap();
        let client = connected(served.address);
        let mut out = vec![9];
        for number in [2, 0, 1, 2] {
            out.truncate(1);
            client.read(1, number, &mut out).unwrap();
            assert_eq!(out.len(), 1 + 1000 * number);
            assert!(out[1..].iter().all(|&byte| usize::from(byte) == number) && out[0] == 9);
        }
        let error = client.read(1, 3, &mut out).unwrap_err().to_string();
        assert!(error.contains("rank 1 (process 7 on here)") && error.contains("no tensor 3"), "{error}");
        assert!(client.read(0, 0, &mut out).is_err());
    }

    #[test]
    fn a_rank_that_is_gone_is_named() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = connected(listener.local_addr().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        let gone = std::thread::spawn(move || {
            let mut number = [0; 8];
            stream.read_exact(&mut number).unwrap();
            // It dies in the middle of its answer.
            stream.write_all(&1000u64.to_le_bytes()).unwrap();
            stream.write_all(&[0; 10]).unwrap();
        });
        let mut out = Vec::new();
        let error = client.read(1, 0, &mut out).unwrap_err().to_string();
        gone.join().unwrap();
        assert!(error.contains("rank 1 (process 7 on here) does not give its share"), "{error}");
        assert!(out.is_empty());
    }
}
