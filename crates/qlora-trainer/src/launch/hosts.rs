//! Several hosts, each with a launcher that is told its number: torchrun's options and the `PET_*` variables that Kubeflow Trainer
//! sets for it; the number of a pod of an indexed Job of Kubernetes.

use std::env;

use super::Processes;
use crate::error::{Error, Result};

/// The port where rank 0 listens unless another is given: torchrun's.
const PORT: u16 = 29_500;

/// The launchers of a run on several hosts, in torchrun's names; what is not given is read from the environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostOptions {
    /// Processes on each host. Environment: `PET_NPROC_PER_NODE`.
    pub nproc_per_node: Option<Processes>,
    /// The number of hosts. Environment: `PET_NNODES`.
    pub nnodes: Option<usize>,
    /// The number of this host, from 0. Environment: `PET_NODE_RANK`, `JOB_COMPLETION_INDEX`.
    pub node_rank: Option<usize>,
    /// The host of rank 0, which is on host 0. Environment: `PET_MASTER_ADDR`, `MASTER_ADDR`.
    pub master_addr: Option<String>,
    /// The port there, 29500. Environment: `PET_MASTER_PORT`, `MASTER_PORT`.
    pub master_port: Option<u16>,
}

/// The processes that a launcher starts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Share {
    /// Processes on this host.
    pub local: usize,
    /// The rank of the first of them.
    pub first: usize,
    /// Processes on all hosts.
    pub size: usize,
    /// Host and port of rank 0; none if this is the only host.
    pub master: Option<(String, u16)>,
}

impl HostOptions {
    /// The processes to start; none if there is one alone.
    ///
    /// # Errors
    /// If a number makes no sense, or the hosts could not find each other.
    pub fn share(&self) -> Result<Option<Share>> {
        self.share_with(&|name| env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }

    fn share_with(&self, get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Share>> {
        let read = |names: &[&str]| names.iter().find_map(|name| get(name).map(|value| ((*name).to_owned(), value)));
        let number = |given: Option<usize>, names: &[&str]| match (given, read(names)) {
            (Some(number), _) => Ok(Some(number)),
            (None, None) => Ok(None),
            // An elastic range of one number is that number.
            (None, Some((name, text))) => match text
                .trim()
                .split_once(':')
                .map_or(text.trim(), |(low, high)| if low == high { low } else { "" })
                .parse()
            {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(Error::Invalid(format!("{name} is {text:?}, which is not a number of hosts"))),
            },
        };
        let local = match (self.nproc_per_node, get("PET_NPROC_PER_NODE")) {
            (Some(processes), _) => processes.number(),
            (None, None) => 1,
            (None, Some(text)) => {
                let parsed = text.trim().parse::<Processes>();
                parsed.map_err(|error| Error::Invalid(format!("PET_NPROC_PER_NODE: {error}")))?.number()
            }
        };
        let nnodes = number(self.nnodes, &["PET_NNODES"])?.unwrap_or(1);
        if nnodes < 2 {
            return Ok((local > 1).then_some(Share { local, first: 0, size: local, master: None }));
        }
        let node_rank = number(self.node_rank, &["PET_NODE_RANK", "JOB_COMPLETION_INDEX"])?;
        let node_rank = node_rank.ok_or_else(|| {
            Error::Invalid(format!("there are {nnodes} hosts: say with --node-rank which this is, from 0"))
        })?;
        if node_rank >= nnodes {
            return Err(Error::Invalid(format!("there is no host {node_rank} of {nnodes}: --node-rank counts from 0")));
        }
        let address =
            self.master_addr.clone().or_else(|| read(&["PET_MASTER_ADDR", "MASTER_ADDR"]).map(|(_, value)| value));
        let address = address.ok_or_else(|| {
            Error::Invalid(format!("there are {nnodes} hosts: say with --master-addr where host 0 is, on every host"))
        })?;
        let port = match (self.master_port, read(&["PET_MASTER_PORT", "MASTER_PORT"])) {
            (Some(port), _) => port,
            (None, None) => PORT,
            (None, Some((name, text))) => {
                text.trim().parse().map_err(|_| Error::Invalid(format!("{name} is {text:?}, which is no port")))?
            }
        };
        Ok(Some(Share { local, first: node_rank * local, size: nnodes * local, master: Some((address, port)) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(options: &HostOptions, variables: &[(&str, &str)]) -> Result<Option<Share>> {
        options.share_with(&|name| variables.iter().find(|(of, _)| *of == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn hosts_are_read_from_options_and_launchers() {
        let none = HostOptions::default();
        assert_eq!(share(&none, &[]).unwrap(), None);
        let two = HostOptions { nproc_per_node: Some(Processes::Number(2)), ..none.clone() };
        assert_eq!(share(&two, &[]).unwrap(), Some(Share { local: 2, first: 0, size: 2, master: None }));
        let kubeflow = [
            ("PET_NNODES", "3"),
            ("PET_NPROC_PER_NODE", "2"),
            ("PET_NODE_RANK", "1"),
            ("PET_MASTER_ADDR", "job-node-0-0.job"),
            ("PET_MASTER_PORT", "29500"),
        ];
        let master = Some(("job-node-0-0.job".to_owned(), 29_500));
        assert_eq!(share(&none, &kubeflow).unwrap(), Some(Share { local: 2, first: 2, size: 6, master }));
        let given = HostOptions { nnodes: Some(4), node_rank: Some(3), master_addr: Some("a".to_owned()), ..two };
        let master = Some(("a".to_owned(), PORT));
        assert_eq!(share(&given, &[]).unwrap(), Some(Share { local: 2, first: 6, size: 8, master }));
        let job = HostOptions { nnodes: Some(2), master_addr: Some("b".to_owned()), ..none.clone() };
        let master = Some(("b".to_owned(), 7));
        let pod = [("JOB_COMPLETION_INDEX", "1"), ("MASTER_PORT", "7")];
        assert_eq!(share(&job, &pod).unwrap(), Some(Share { local: 1, first: 1, size: 2, master }));
        // One host of Kubeflow's, with one process.
        assert_eq!(share(&none, &[("PET_NNODES", "1:1"), ("PET_NPROC_PER_NODE", "1")]).unwrap(), None);
    }

    #[test]
    fn hosts_that_cannot_meet_are_refused() {
        let refused = |options: &HostOptions, variables: &[(&str, &str)], part: &str| {
            let text = share(options, variables).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        };
        let two = HostOptions { nnodes: Some(2), ..HostOptions::default() };
        refused(&two, &[], "--node-rank");
        refused(&two, &[("PET_NODE_RANK", "2")], "no host 2 of 2");
        refused(&two, &[("PET_NODE_RANK", "1")], "--master-addr");
        refused(&two, &[("PET_NODE_RANK", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "x")], "MASTER_PORT is \"x\"");
        refused(&HostOptions::default(), &[("PET_NNODES", "1:4")], "PET_NNODES is \"1:4\"");
        refused(&HostOptions::default(), &[("PET_NPROC_PER_NODE", "many")], "PET_NPROC_PER_NODE");
    }
}
