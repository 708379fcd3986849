//! The exchange between the ranks that share a micro-batch (`context_parallel_size`).
//!
//! Ranks that follow each other form a group: with 8 ranks and groups of 2, ranks 0 and 1 have the first micro-batch of a step. GPUs
//! exchange by NCCL on their stream, over the connection of all ranks where there is one group, which saves its memory; others over a
//! TCP connection of the group's own, because groups need not make as many exchanges as each other.

use std::fmt;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use qlora_core::model::context::PlannedExchange;
use qlora_core::model::context::{SequenceExchange, check_heads};
use qlora_kernels::ops::attention::AttentionConfig;
use qlora_kernels::{View, ViewMut, Workspace};

use super::tcp::{Tcp, TcpOptions};
use super::{Alive, Communicator, RankPlace, Ranks, exchange, of_rank};
use crate::error::{Error, Result};

/// The time limit for the ranks of a group to connect: they are all there.
const PATIENCE: Duration = Duration::from_secs(60);

/// Checks that so many ranks make whole groups.
///
/// # Errors
/// If not, with what works.
pub(crate) fn check_ranks(ranks: usize, context: usize) -> Result<()> {
    if context >= 1 && ranks.is_multiple_of(context) {
        return Ok(());
    }
    let text = match ranks {
        1 => format!(
            "context_parallel_size = {context} shares every sequence among {context} processes: start them with --nproc-per-node \
             {context} (or a multiple), or another launcher"
        ),
        _ => format!(
            "{ranks} ranks are no groups of context_parallel_size = {context}: start a multiple of {context}, or set a number that \
             divides {ranks}"
        ),
    };
    Err(Error::Invalid(text))
}

/// The exchange of a model with this attention; none if every rank has micro-batches of its own. `planned`: no other rank is there, and
/// none is needed.
///
/// # Errors
/// If heads do not divide over a group, or its ranks cannot be connected.
pub(crate) fn connect(
    comm: &mut dyn Communicator,
    context: usize,
    attention: &AttentionConfig,
    workspace: &Workspace,
    planned: bool,
) -> Result<Option<Arc<dyn SequenceExchange>>> {
    if context == 1 {
        return Ok(None);
    }
    check_heads(attention, context)?;
    if planned {
        return Ok(Some(Arc::new(PlannedExchange { ranks: context })));
    }
    #[cfg(feature = "cuda")]
    if let Some(exchange) = on_gpus::connect(comm, context, workspace)? {
        return Ok(Some(exchange));
    }
    let _ = workspace;
    Ok(Some(Arc::new(over_tcp(comm, context)?)))
}

/// Ranks that exchange over TCP.
struct OverTcp {
    place: RankPlace,
    tcp: Mutex<Tcp>,
    alive: Alive,
    /// The rank that is the group's first.
    first: usize,
}

fn over_tcp(comm: &mut dyn Communicator, context: usize) -> Result<OverTcp> {
    let (group, rank) = (comm.rank() / context, comm.rank() % context);
    let address = comm.address().unwrap_or_else(|| "127.0.0.1".to_owned());
    // A free port: the system's choice, given back.
    let free_port = || {
        let listener = TcpListener::bind((address.as_str(), 0)).or_else(|_| TcpListener::bind(("0.0.0.0", 0)));
        listener.and_then(|listener| listener.local_addr())
    };
    let mine = match rank {
        0 => {
            let port = free_port().map_err(|error| Error::Invalid(format!("no port is free on {address}: {error}")))?;
            Some((address.clone(), port.port()))
        }
        _ => None,
    };
    let first = group * context;
    let addresses = exchange(comm, "addresses of the context groups", &mine)?;
    let (address, port) =
        addresses[first].clone().ok_or_else(|| Error::rank(first, "did not say where it listens".to_owned()))?;
    let place = RankPlace { rank, size: context, local_rank: comm.local_rank() };
    let ranks = Ranks {
        place: place.clone(),
        address,
        port,
        store: false,
        job: format!("context group {group}"),
        launcher: "context_parallel_size",
    };
    let tcp = Tcp::connect(&ranks, &TcpOptions { patience: PATIENCE, ..TcpOptions::default() })?;
    Ok(OverTcp { place, tcp: Mutex::new(tcp), alive: comm.alive(), first })
}

impl OverTcp {
    fn send(&self, outgoing: &[View<'_>], incoming: Vec<ViewMut<'_>>) -> Result<()> {
        let mut parts = Vec::with_capacity(outgoing.len());
        for part in outgoing {
            parts.push(bytemuck::cast_slice(&part.to_vec()?).to_vec());
        }
        let received = self.tcp.lock().unwrap_or_else(PoisonError::into_inner).all_to_all("attention", parts)?;
        for (rank, (bytes, to)) in received.iter().zip(incoming).enumerate() {
            let [rows, cols] = to.shape();
            let (values, rest) = bytes.as_chunks();
            if values.len() != rows * cols || !rest.is_empty() {
                let message = format!("sent {} bytes of activations, {} were expected", bytes.len(), 4 * rows * cols);
                return Err(Error::rank(self.first + rank, message));
            }
            if !values.is_empty() {
                let values: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
                to.copy_from(View::new(&values, rows, cols))?;
            }
        }
        Ok(())
    }
}

impl SequenceExchange for OverTcp {
    fn rank(&self) -> usize {
        self.place.rank
    }

    fn ranks(&self) -> usize {
        self.place.size
    }

    fn all_to_all(&self, outgoing: &[View<'_>], incoming: Vec<ViewMut<'_>>) -> qlora_core::Result<()> {
        self.send(outgoing, incoming).map_err(|error| {
            let error = match error {
                // Its number in the group.
                Error::Rank { rank, message } => Error::rank(self.first + rank, message),
                error => error,
            };
            qlora_core::Error::Invalid(of_rank(&self.alive, error).to_string())
        })
    }
}

impl Drop for OverTcp {
    fn drop(&mut self) {
        self.tcp.get_mut().unwrap_or_else(PoisonError::into_inner).leave();
    }
}

impl fmt::Debug for OverTcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OverTcp(rank {} of {})", self.place.rank, self.place.size)
    }
}

#[cfg(feature = "cuda")]
mod on_gpus {
    use qlora_kernels::cuda::nccl::{self, ID_BYTES, Nccl};

    use super::super::nccl::until_found;
    use super::*;

    /// The elements of the first exchange: NCCL connects, and takes its memory, at the first one, before the plan asks what is free.
    const FIRST: usize = 1 << 22;

    /// GPUs that exchange by NCCL.
    struct OnGpus {
        rank: usize,
        ranks: usize,
        nccl: Arc<Mutex<Nccl>>,
        alive: Alive,
    }

    pub(super) fn connect(
        comm: &mut dyn Communicator,
        context: usize,
        workspace: &Workspace,
    ) -> Result<Option<Arc<dyn SequenceExchange>>> {
        let (Some(all), Some(gpu)) = (comm.nccl(), workspace.gpu()) else { return Ok(None) };
        let (first, rank) = (comm.rank() / context * context, comm.rank() % context);
        let keep_waiting = until_found(comm.alive());
        let nccl = if context == comm.size() {
            all
        } else {
            let mine = if rank == 0 { Some(nccl::new_id()?.to_vec()) } else { None };
            let ids = exchange(comm, "NCCL's ids of the context groups", &mine)?;
            let id = ids[first].as_deref().and_then(|id| <[u8; ID_BYTES]>::try_from(id).ok());
            let id = id.ok_or_else(|| Error::rank(first, "sent something else than an id of NCCL's".to_owned()))?;
            Arc::new(Mutex::new(Nccl::join(&gpu.device(), id, rank, context, &keep_waiting)?))
        };
        let exchange = OnGpus { rank, ranks: context, nccl, alive: comm.alive() };
        let mut sent = Vec::with_capacity(context);
        let mut received = Vec::with_capacity(context);
        for other in 0..context {
            let elements = if other == rank { 0 } else { FIRST };
            sent.push(workspace.zeros_f32(1, elements)?);
            received.push(workspace.zeros_f32(1, elements)?);
        }
        let outgoing: Vec<View> = sent.iter().map(|part| part.view()).collect();
        let incoming = received.iter_mut().map(|part| part.view_mut()).collect();
        exchange.nccl.lock().unwrap_or_else(PoisonError::into_inner).all_to_all(&outgoing, incoming, &keep_waiting)?;
        Ok(Some(Arc::new(exchange)))
    }

    impl SequenceExchange for OnGpus {
        fn rank(&self) -> usize {
            self.rank
        }

        fn ranks(&self) -> usize {
            self.ranks
        }

        fn all_to_all(&self, outgoing: &[View<'_>], incoming: Vec<ViewMut<'_>>) -> qlora_core::Result<()> {
            let keep_waiting = || (self.alive)().map_err(|error| error.to_string());
            let mut nccl = self.nccl.lock().unwrap_or_else(PoisonError::into_inner);
            nccl.all_to_all(outgoing, incoming, &keep_waiting)
                .map_err(|error| qlora_core::Error::Invalid(of_rank(&self.alive, error.into()).to_string()))
        }
    }

    impl fmt::Debug for OnGpus {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "OnGpus(rank {} of {})", self.rank, self.ranks)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_make_whole_groups() {
        for (ranks, context) in [(1, 1), (2, 1), (2, 2), (8, 4)] {
            check_ranks(ranks, context).unwrap();
        }
        let text = |ranks, context| check_ranks(ranks, context).unwrap_err().to_string();
        assert!(text(1, 2).contains("--nproc-per-node 2"), "{}", text(1, 2));
        assert!(text(4, 3).contains("start a multiple of 3, or set a number that divides 4"), "{}", text(4, 3));
    }
}
