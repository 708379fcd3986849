//! The number of this process among the ranks, and the address of rank 0, from the environment variables of launchers.

use std::env;

use crate::error::{Error, Result};

/// A process among the ranks of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankPlace {
    /// Its number, from 0.
    pub rank: usize,
    /// The number of ranks.
    pub size: usize,
    /// Its number on its host: the number of its GPU.
    pub local_rank: usize,
}

/// The place of a process among the ranks, as the launcher gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranks {
    /// This process.
    pub place: RankPlace,
    /// The host on which rank 0 listens.
    pub address: String,
    /// The port there; of torchrun's store, if `store`.
    pub port: u16,
    /// Whether the port is that of torchrun's own key-value store, in which rank 0 says where it listens.
    pub store: bool,
    /// Tells this start of the job from others.
    pub job: String,
    /// The launcher, for messages.
    pub launcher: &'static str,
}

/// Rank, number of ranks, local rank.
const FAMILIES: [(&str, [&str; 3]); 4] = [
    ("torchrun", ["RANK", "WORLD_SIZE", "LOCAL_RANK"]),
    ("Open MPI", ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"]),
    ("Slurm", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"]),
    ("MPICH", ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"]),
];

const HOST: &str = "MASTER_ADDR";
const PORT: &str = "MASTER_PORT";

impl Ranks {
    /// Reads the ranks from the environment; `None` for a process of its own.
    ///
    /// # Errors
    /// If it says half of it, or contradicts itself; the message names the variables.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_variables(&|name| env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }

    fn from_variables(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = get(name) else { return Ok(None) };
            let parsed = text.trim().parse();
            parsed.map(Some).map_err(|_| Error::Invalid(format!("{name} is {text:?}, which is not a number of ranks")))
        };
        let mut found: Option<(&'static str, RankPlace, [&str; 3])> = None;
        let mut has_local_rank = false;
        for (launcher, names) in FAMILIES {
            let [Some(rank), Some(size)] = [number(names[0])?, number(names[1])?] else { continue };
            // An interactive shell in an allocation looks like the first of one task.
            if launcher == "Slurm" && (size < 2 || get("SLURM_STEP_ID").is_none()) {
                continue;
            }
            let local_rank = number(names[2])?;
            if let Some((of_launcher, known, of)) = &mut found {
                // The daemons of mpirun are a step of Slurm's, with numbers of their own.
                if launcher == "Slurm" && *of_launcher == "Open MPI" {
                    continue;
                }
                if known.rank != rank || known.size != size {
                    return Err(Error::Invalid(format!(
                        "{} = {} and {} = {} say rank {} of {}, but {} = {rank} and {} = {size} say otherwise: unset those of \
                         the launcher that did not start this run",
                        of[0], known.rank, of[1], known.size, known.rank, known.size, names[0], names[1]
                    )));
                }
                // `srun` with a script that exports RANK and WORLD_SIZE: Slurm knows the rest.
                has_local_rank |= local_rank.is_some_and(|local_rank| {
                    let missing = !has_local_rank;
                    if missing {
                        known.local_rank = local_rank;
                    }
                    missing
                });
                continue;
            }
            has_local_rank = local_rank.is_some();
            // A launcher of one process a host leaves the local rank out.
            let place = RankPlace { rank, size, local_rank: local_rank.unwrap_or(0) };
            if rank >= size {
                return Err(Error::Invalid(format!("{} is {rank}, but {} only {size}", names[0], names[1])));
            }
            found = Some((launcher, place, names));
        }
        let Some((launcher, place, names)) = found.filter(|(_, place, _)| place.size > 1) else {
            if let (Some(rank), None) = (get("RANK"), get("WORLD_SIZE")) {
                return Err(Error::Invalid(format!("RANK is {rank}, but WORLD_SIZE is not set")));
            }
            return Ok(None);
        };
        let address = match get(HOST) {
            Some(address) => address,
            None if launcher == "Slurm" || (launcher != "Open MPI" && get("SLURM_STEP_NODELIST").is_some()) => {
                first_host(get)?
            }
            // All ranks on one host.
            None if place.local_rank == place.rank => "127.0.0.1".to_owned(),
            None => {
                return Err(Error::Invalid(format!(
                    "{} says rank {} of {} on several hosts: set {HOST} to the host of rank 0, on every rank",
                    names[0], place.rank, place.size
                )));
            }
        };
        let port = match get(PORT) {
            Some(text) => {
                text.trim().parse().map_err(|_| Error::Invalid(format!("{PORT} is {text:?}, which is no port")))?
            }
            None => port_of_job(&job(get)),
        };
        let store = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        Ok(Some(Self { place, address, port, store, job: job(get), launcher }))
    }
}

/// A name that the processes of one start share and those of another start do not.
fn job(get: &dyn Fn(&str) -> Option<String>) -> String {
    let restarts = get("TORCHELASTIC_RESTART_COUNT").or_else(|| get("SLURM_RESTART_COUNT")).unwrap_or_default();
    let names = ["TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "QLORA_JOB"];
    let job = names.iter().find_map(|name| get(name)).unwrap_or_else(|| "qlora".to_owned());
    format!("{job}/{restarts}")
}

/// A port above those that systems hand out, the same for all processes of a job.
fn port_of_job(job: &str) -> u16 {
    let mut fingerprint = crate::fingerprint::Fingerprint::new();
    fingerprint.bytes(job.as_bytes());
    let digest = fingerprint.to_string();
    let number = digest.bytes().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
    20_000 + (number % 10_000) as u16
}

/// The first name of a Slurm node list: `node[07-09,12],other1` begins with `node07`.
fn first_host(get: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    let list = get("SLURM_STEP_NODELIST").or_else(|| get("SLURM_JOB_NODELIST"));
    let Some(list) = list else {
        return Err(Error::Invalid(format!("Slurm names no nodes: set {HOST} to the host of rank 0, on every rank")));
    };
    let unclear = || Error::Invalid(format!("{list:?} names no first node: set {HOST} to the host of rank 0"));
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (prefix, rest) = list.split_at(end);
    let host = match rest.strip_prefix('[') {
        None => prefix.to_owned(),
        Some(numbers) => {
            let (numbers, after) = numbers.split_once(']').ok_or_else(unclear)?;
            let first = numbers.split([',', '-']).next().ok_or_else(unclear)?;
            let suffix = after.split(',').next().unwrap_or_default();
            format!("{prefix}{first}{suffix}")
        }
    };
    if host.trim().is_empty() { Err(unclear()) } else { Ok(host.trim().to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(variables: &[(&str, &str)]) -> Result<Option<Ranks>> {
        let get = |name: &str| variables.iter().find(|(of, _)| *of == name).map(|(_, value)| (*value).to_owned());
        Ranks::from_variables(&get)
    }

    #[test]
    fn a_process_of_its_own_has_no_ranks() {
        assert_eq!(ranks(&[]).unwrap(), None);
        assert_eq!(ranks(&[("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")]).unwrap(), None);
        // A shell in an allocation of four tasks, which is no step.
        assert_eq!(ranks(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")]).unwrap(), None);
    }

    #[test]
    fn torchrun_is_understood() {
        let found = ranks(&[
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "a"),
            ("MASTER_PORT", "29400"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RUN_ID", "x"),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
        ]);
        let found = found.unwrap().unwrap();
        assert_eq!(found.place, RankPlace { rank: 5, size: 8, local_rank: 1 });
        assert_eq!((found.address.as_str(), found.port, found.store), ("a", 29_400, true));
        assert_eq!((found.job.as_str(), found.launcher), ("x/2", "torchrun"));
    }

    #[test]
    fn slurm_and_mpi_are_understood() {
        let slurm = |nodes| {
            let step = [("SLURM_PROCID", "3"), ("SLURM_NTASKS", "4"), ("SLURM_LOCALID", "1"), ("SLURM_STEP_ID", "0")];
            let mut all = step.to_vec();
            all.extend([("SLURM_STEP_NODELIST", nodes), ("SLURM_JOB_ID", "77")]);
            ranks(&all).map(|found| found.unwrap())
        };
        for (nodes, first) in [
            ("node1", "node1"),
            ("gpu[07-09,12],other1", "gpu07"),
            ("a1,b2", "a1"),
            ("n[3,7]-ib", "n3-ib"),
            ("rack[1-2]x,y", "rack1x"),
        ] {
            let found = slurm(nodes).unwrap();
            assert_eq!((found.address.as_str(), found.place.rank), (first, 3), "{nodes}");
            assert!((20_000..30_000).contains(&found.port));
            assert_eq!(found.port, slurm(nodes).unwrap().port);
        }
        assert!(slurm("[").is_err());
        let open_mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("PMIX_NAMESPACE", "j"),
        ];
        let found = ranks(&open_mpi).unwrap().unwrap();
        assert_eq!((found.address.as_str(), found.place.local_rank, found.launcher), ("127.0.0.1", 1, "Open MPI"));
    }

    #[test]
    fn launchers_inside_of_slurm_are_understood() {
        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NODELIST", "node[1-2]"),
        ];
        let with = |more: &[(&'static str, &'static str)]| {
            ranks(&[&slurm[..], more].concat()).map(|found| found.unwrap()).map(|found| (found.place, found.address))
        };
        let expected = (RankPlace { rank: 3, size: 4, local_rank: 1 }, "node1".to_owned());
        assert_eq!(with(&[]).unwrap(), expected);
        // srun --mpi=pmi2, and a script with `export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS`.
        assert_eq!(with(&[("PMI_RANK", "3"), ("PMI_SIZE", "4")]).unwrap(), expected);
        assert_eq!(with(&[("RANK", "3"), ("WORLD_SIZE", "4")]).unwrap(), expected);
        // mpirun, whose daemon is process 3 of the step.
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "6"),
            ("OMPI_COMM_WORLD_SIZE", "8"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("MASTER_ADDR", "a"),
        ];
        assert_eq!(with(&mpi).unwrap(), (RankPlace { rank: 6, size: 8, local_rank: 0 }, "a".to_owned()));
    }

    #[test]
    fn half_an_environment_and_contradictions_are_errors() {
        let refused = |variables: &[(&str, &str)], part: &str| {
            let text = ranks(variables).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        };
        refused(&[("RANK", "1")], "WORLD_SIZE is not set");
        refused(&[("RANK", "4"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "a")], "RANK is 4, but WORLD_SIZE only 4");
        refused(&[("RANK", "x"), ("WORLD_SIZE", "4")], "RANK is \"x\"");
        let both = [("RANK", "1"), ("WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2")];
        refused(&both, "OMPI_COMM_WORLD_RANK = 0");
        let hosts = [("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_LOCAL_RANK", "1")];
        refused(&hosts, "set MASTER_ADDR");
        refused(&[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "99999")], "MASTER_PORT is \"99999\"");
    }
}
