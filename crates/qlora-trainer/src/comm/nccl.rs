//! Ranks whose gradients NCCL adds, from GPU to GPU; everything else goes over TCP.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use qlora_kernels::cuda::nccl::{self, ID_BYTES, Nccl};
use qlora_kernels::{ViewMut, Workspace};

use super::{Alive, Alone, Communicator, exchange, from_first, of_rank};
use crate::error::{Error, Result};

/// The time limit for the GPUs to find each other.
pub(super) const PATIENCE: Duration = Duration::from_secs(180);

/// The values of the first sum: as many as make NCCL connect all that larger ones use.
const FIRST_SUM: usize = 1 << 22;

/// Lets the GPUs of several ranks add by themselves. Where a rank has no NCCL, sums go through the hosts' memory, and a warning
/// says what is missing.
///
/// # Errors
/// If two ranks have the same GPU, some compute on a GPU and some do not, or the GPUs cannot be connected.
pub(crate) fn sum_on_gpus(comm: &mut Box<dyn Communicator>, workspace: &Workspace) -> Result<()> {
    if comm.size() == 1 {
        return Ok(());
    }
    let gpu = workspace.gpu();
    let mine = gpu.map(|gpu| (gpu.uuid(), gpu.name().to_owned()));
    let gpus = exchange(&mut **comm, "GPUs", &mine)?;
    check(&gpus)?;
    let Some(gpu) = gpu else { return Ok(()) };
    let libraries = exchange(&mut **comm, "NCCL", &nccl::describe().map_err(|error| error.to_string()))?;
    if let Some((rank, Err(why))) = libraries.iter().enumerate().find(|(_, library)| library.is_err()) {
        if comm.rank() == 0 {
            tracing::warn!("gradients go through host memory, which is slow: rank {rank}: {why}");
        }
        return Ok(());
    }
    let versions: Vec<&str> = libraries.iter().flatten().map(|text| text.split(" (").next().unwrap_or(text)).collect();
    if let Some(rank) = (1..versions.len()).find(|&rank| versions[rank] != versions[0]) {
        let (first, other) = (versions[0], versions[rank]);
        return Err(Error::Invalid(format!(
            "rank 0 has {first}, rank {rank} {other}: NCCL needs the same version everywhere (QLORA_NCCL_PATH names a library)"
        )));
    }
    let id = if comm.rank() == 0 { nccl::new_id()?.to_vec() } else { Vec::new() };
    let id = from_first(&mut **comm, "NCCL's id", id)?;
    let id: [u8; ID_BYTES] =
        id.try_into().map_err(|_| Error::rank(0, "sent something else than an id of NCCL's".to_owned()))?;
    let keep_waiting = until_found(comm.alive());
    let mut nccl = Nccl::join(&gpu.device(), id, comm.rank(), comm.size(), &keep_waiting)?;
    // NCCL connects, and takes its memory, at the first sum: before the plan asks what is free.
    nccl.sum(workspace.zeros_f32(1, FIRST_SUM)?.view_mut(), &keep_waiting)?;
    if comm.rank() == 0 {
        tracing::info!(library = libraries[0].as_deref().unwrap_or_default(), "gradients are added");
    }
    let control = std::mem::replace(comm, Box::new(Alone));
    let deterministic = gpu.deterministic();
    let nccl = Arc::new(Mutex::new(nccl));
    *comm = Box::new(Gpus { control, nccl, deterministic });
    Ok(())
}

/// Whether to go on waiting for GPUs that connect.
pub(super) fn until_found(alive: Alive) -> impl Fn() -> std::result::Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    move || {
        alive().map_err(|error| error.to_string())?;
        if Instant::now() > deadline {
            return Err(format!(
                "the GPUs did not find each other in {} s: NCCL_DEBUG=INFO says where they look, NCCL_SOCKET_IFNAME names the \
                 network",
                PATIENCE.as_secs()
            ));
        }
        Ok(())
    }
}

/// A GPU by its UUID and name, or none for the CPU.
fn check(gpus: &[Option<(String, String)>]) -> Result<()> {
    let name = |gpu: &Option<(String, String)>| gpu.as_ref().map_or("the CPU".to_owned(), |(_, name)| name.clone());
    for (rank, gpu) in gpus.iter().enumerate().skip(1) {
        if gpu.is_some() != gpus[0].is_some() {
            let (first, other) = (name(&gpus[0]), name(gpu));
            return Err(Error::Invalid(format!("rank 0 computes on {first}, rank {rank} on {other}")));
        }
        let twin = gpus[..rank]
            .iter()
            .position(|other| other.is_some() && other.as_ref().map(|o| &o.0) == gpu.as_ref().map(|g| &g.0));
        if let Some(twin) = twin {
            return Err(Error::Invalid(format!(
                "ranks {twin} and {rank} have the same GPU ({}): start one rank for each GPU; LOCAL_RANK chooses it",
                name(gpu)
            )));
        }
    }
    Ok(())
}

/// Ranks with a GPU each.
struct Gpus {
    control: Box<dyn Communicator>,
    nccl: Arc<Mutex<Nccl>>,
    deterministic: bool,
}

impl Communicator for Gpus {
    fn rank(&self) -> usize {
        self.control.rank()
    }

    fn size(&self) -> usize {
        self.control.size()
    }

    fn local_rank(&self) -> usize {
        self.control.local_rank()
    }

    fn gather(&mut self, what: &'static str, mine: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.control.gather(what, mine)
    }

    fn sum(&mut self, what: &'static str, values: ViewMut) -> Result<()> {
        // Of two numbers the sum has one value; of more it depends on the order, which NCCL chooses.
        if self.deterministic && self.size() > 2 {
            return self.control.sum(what, values);
        }
        let control = &self.control;
        let keep_waiting = || control.check().map_err(|error| error.to_string());
        let summed = self.nccl.lock().unwrap_or_else(PoisonError::into_inner).sum(values, &keep_waiting);
        summed.map_err(|error| of_rank(&self.control.alive(), error.into()))
    }

    fn sums_in_order(&self) -> bool {
        self.deterministic
    }

    fn check(&self) -> Result<()> {
        self.control.check()
    }

    fn alive(&self) -> Alive {
        self.control.alive()
    }

    fn address(&self) -> Option<String> {
        self.control.address()
    }

    fn nccl(&self) -> Option<Arc<Mutex<Nccl>>> {
        Some(Arc::clone(&self.nccl))
    }

    fn at_step(&self, step: u64) {
        self.control.at_step(step);
    }

    fn writing(&self, on: bool) {
        self.control.writing(on);
    }

    fn fail(&mut self, why: &str) {
        self.control.fail(why);
    }

    fn leave(&mut self) {
        self.control.leave();
    }

    fn name(&self, rank: usize) -> String {
        self.control.name(rank)
    }

    fn describe(&self) -> Option<String> {
        self.control.describe()
    }
}

impl fmt::Debug for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpus({:?}, {:?})", self.control, self.nccl)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_belongs_to_one_rank() {
        let gpu = |id: &str| Some((id.to_owned(), "a card".to_owned()));
        check(&[gpu("1"), gpu("2")]).unwrap();
        check(&[None, None]).unwrap();
        let text = check(&[gpu("1"), gpu("2"), gpu("1")]).unwrap_err().to_string();
        assert!(text.starts_with("ranks 0 and 2 have the same GPU (a card)"), "{text}");
        let text = check(&[gpu("1"), None]).unwrap_err().to_string();
        assert_eq!(text, "rank 0 computes on a card, rank 1 on the CPU");
    }
}
