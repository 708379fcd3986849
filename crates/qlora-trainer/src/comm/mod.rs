//! The ranks of a run: several processes, one for each GPU, that train one model together.
//!
//! Every rank holds the whole model, or a share of its frozen base, and computes every `size`-th micro-batch of a step; the gradients are added, and each rank
//! makes the same update. The training loop knows of other ranks through [`Communicator`] alone.
//!
//! | module | what it is |
//! |---|---|
//! | [`ranks`] | which rank a process is: from torchrun, Slurm, Open MPI or [`launch`](crate::launch) |
//! | [`tcp`] | messages between processes, sums in the order of the ranks, heartbeats |
//! | [`store`] | a client of torchrun's key-value store, through which its workers find each other |
//! | `nccl` | sums between GPUs (feature `cuda`) |
//! | `context` | the exchange between ranks that share a micro-batch (`context_parallel_size`) |
//!
//! A rank that dies, is stopped or fails ends the run on every rank, with an error that names it ([`Error::Rank`]).

mod agree;
pub(crate) mod context;
mod dial;
mod frame;
#[cfg(feature = "cuda")]
pub mod nccl;
pub mod ranks;
pub(crate) mod shares;
pub mod store;
pub mod tcp;

use std::fmt;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use qlora_kernels::ViewMut;

pub(crate) use agree::{check_same_program, check_same_run};
pub use ranks::{RankPlace, Ranks};

/// Fails if the run is known to be over.
pub type Alive = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// The communication between the ranks of a run. All ranks make the same calls in the same order; `what` says in
/// messages (and to a rank that is elsewhere in the program) which call it is.
pub trait Communicator: fmt::Debug + Send {
    /// The number of this process among the ranks, from 0. Rank 0 writes files and prints.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn size(&self) -> usize;

    /// The number of this process on its host: which GPU it takes.
    fn local_rank(&self) -> usize {
        0
    }

    /// Everybody's message, in the order of the ranks.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed, is gone, or is elsewhere in the program.
    fn gather(&mut self, what: &'static str, mine: Vec<u8>) -> Result<Vec<Vec<u8>>>;

    /// Adds everybody's values (one row, f32), in the order of the ranks where that is possible: `((v0 + v1) + v2) + ...`. The
    /// sum has the same bits everywhere.
    ///
    /// # Errors
    /// As [`Self::gather`], or if a device fails.
    fn sum(&mut self, what: &'static str, values: ViewMut) -> Result<()>;

    /// Whether [`Self::sum`] adds in the order of the ranks, so that a step has the bits of one that a single process
    /// accumulates.
    fn sums_in_order(&self) -> bool;

    /// Fails if the run is known to be over; a rank calls it during long work.
    ///
    /// # Errors
    /// [`Error::Rank`] with the rank that is gone.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// [`Self::check`] for those who wait for another rank elsewhere than in a call of this.
    fn alive(&self) -> Alive {
        Arc::new(|| Ok(()))
    }

    /// An address of this rank that the others reach, if it is known.
    fn address(&self) -> Option<String> {
        None
    }

    /// The connection of all ranks' GPUs, if there is one.
    #[cfg(feature = "cuda")]
    fn nccl(&self) -> Option<Arc<Mutex<qlora_kernels::cuda::nccl::Nccl>>> {
        None
    }

    /// Says in which step this rank is, for messages.
    fn at_step(&self, step: u64) {
        let _ = step;
    }

    /// Whether something is being written that must not be cut short, whatever became of the others.
    fn writing(&self, on: bool) {
        let _ = on;
    }

    /// Tells the others that this rank fails, and why; they end with it. Errors here are nobody's concern any more.
    fn fail(&mut self, why: &str) {
        let _ = why;
    }

    /// Leaves in peace: the other ranks have everything that they need of this one.
    fn leave(&mut self) {}

    /// How many seconds receiving data from each rank took since this was last asked, from the first byte of a message to its last:
    /// where gradients come that way.
    fn receiving(&mut self) -> Vec<(usize, f64)> {
        Vec::new()
    }

    /// A rank in messages: its number, and where known its process and host.
    fn name(&self, rank: usize) -> String {
        format!("rank {rank}")
    }

    /// A description of the ranks' connection, for a line at the start of the run; none for a process of its own.
    fn describe(&self) -> Option<String> {
        None
    }
}

/// One process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn gather(&mut self, _: &'static str, mine: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        Ok(vec![mine])
    }

    fn sum(&mut self, _: &'static str, _: ViewMut) -> Result<()> {
        Ok(())
    }

    fn sums_in_order(&self) -> bool {
        true
    }
}

/// The ranks that the environment says this process belongs to; [`Alone`] if it says nothing.
///
/// # Errors
/// If the environment contradicts itself, or the others do not come.
pub fn from_env(options: &tcp::TcpOptions) -> Result<Box<dyn Communicator>> {
    match Ranks::from_env()? {
        None => Ok(Box::new(Alone)),
        Some(ranks) => Ok(Box::new(tcp::Tcp::connect(&ranks, options)?)),
    }
}

/// [`Communicator::gather`] of values that have a JSON form.
///
/// # Errors
/// As there.
pub fn exchange<T: Serialize + DeserializeOwned>(
    comm: &mut dyn Communicator,
    what: &'static str,
    mine: &T,
) -> Result<Vec<T>> {
    let mine = serde_json::to_vec(mine).expect("numbers and strings have a JSON form");
    let all = comm.gather(what, mine)?;
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        serde_json::from_slice(bytes)
            .map_err(|error| Error::rank(rank, format!("sent something else than expected ({what}): {error}")))
    };
    all.iter().enumerate().map(read).collect()
}

/// `result`, of which the other ranks are told if it is an error: they end with it.
///
/// # Errors
/// That of `result`.
pub(crate) fn or_tell_all<T>(comm: &mut dyn Communicator, result: Result<T>) -> Result<T> {
    result.inspect_err(|error| comm.fail(&format!("failed: {error}")))
}

/// How long it may take until the end of a rank is known after a connection of its GPU broke.
const AFTERMATH: Duration = Duration::from_secs(2);

/// `error`, or the rank whose end is behind it: a connection that breaks because a rank is gone is that rank's doing, which the others
/// may not have heard of yet.
pub(crate) fn of_rank(alive: &Alive, error: Error) -> Error {
    let until = Instant::now() + AFTERMATH;
    loop {
        match alive() {
            Err(lost) => return lost,
            Ok(()) if Instant::now() > until => return error,
            Ok(()) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Rank 0's bytes, on every rank. The bytes that the other ranks give are not sent.
///
/// # Errors
/// As [`Communicator::gather`].
pub(crate) fn from_first(comm: &mut dyn Communicator, what: &'static str, mine: Vec<u8>) -> Result<Vec<u8>> {
    let mine = if comm.rank() == 0 { mine } else { Vec::new() };
    Ok(comm.gather(what, mine)?.swap_remove(0))
}
