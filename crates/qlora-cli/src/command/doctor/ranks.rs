//! What several processes of a run need: who this one is, whether the others can be reached, a free port, NCCL, the GPUs' links.

use std::collections::BTreeMap;
use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::process::Command;
use std::time::{Duration, Instant};

use qlora::trainer::comm::Ranks;

use super::{Finding, State};

/// The time that a peer has to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// The findings about several ranks; `peers` are addresses that must answer.
pub(super) fn findings(peers: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    match Ranks::from_env() {
        Err(error) => {
            findings.push(Finding::wrong("ranks", error.to_string(), "unset the variables that are not meant"))
        }
        Ok(None) => findings.push(Finding::good("ranks", "no launcher: a process of its own, or --nproc-per-node")),
        Ok(Some(ranks)) => {
            let (place, at) = (&ranks.place, format!("{}:{}", ranks.address, ranks.port));
            let text = format!("rank {} of {}, started by {}; rank 0 at {at}", place.rank, place.size, ranks.launcher);
            findings.push(Finding::good("ranks", text));
            if place.rank == 0 && !ranks.store {
                findings.push(port(&ranks.address, ranks.port));
            }
            if ranks.store || place.rank > 0 {
                let what = if ranks.store { "torchrun's store" } else { "rank 0 (listens once it is started)" };
                findings.push(reach_all("rank 0", &[(what.to_owned(), at)]));
            }
        }
    }
    if !peers.is_empty() {
        let named: Vec<_> = peers.iter().map(|peer| (String::new(), peer.clone())).collect();
        findings.push(reach_all("peers", &named));
    }
    findings.push(nccl());
    findings.extend(links());
    findings
}

/// Whether rank 0 can listen where the others look for it.
fn port(address: &str, port: u16) -> Finding {
    // As a run does: a service's name is no address of the host's own.
    let bound = TcpListener::bind((address, port)).or_else(|error| match error.kind() {
        io::ErrorKind::AddrNotAvailable => TcpListener::bind(("0.0.0.0", port)),
        _ => Err(error),
    });
    match bound {
        Ok(_) => Finding::good("port", format!("{address}:{port} is free")),
        Err(error) => {
            let hint = match error.kind() {
                io::ErrorKind::AddrInUse => "another run has it: set MASTER_PORT to a free one, on every rank",
                _ => "set MASTER_ADDR and MASTER_PORT so that rank 0 may listen there",
            };
            Finding::wrong("port", format!("rank 0 cannot listen on {address}:{port}: {error}"), hint)
        }
    }
}

/// Tries addresses (what is there, where) one after the other.
fn reach_all(name: &'static str, peers: &[(String, String)]) -> Finding {
    let (mut texts, mut hint, mut state) = (Vec::new(), None, State::Good);
    for (what, at) in peers {
        let what = if what.is_empty() { at.clone() } else { format!("{what} at {at}") };
        match reach(at) {
            Ok(took) => texts.push(format!("{what} answers in {:.1} ms", took.as_secs_f64() * 1e3)),
            Err(error) => {
                let (why, advice, now) = match error.kind() {
                    io::ErrorKind::ConnectionRefused => (
                        "the host is there, but nothing listens on the port".to_owned(),
                        "start something there for the test (`nc -l PORT`), or try once rank 0 runs",
                        State::Missing,
                    ),
                    io::ErrorKind::TimedOut => (
                        format!("no answer in {} s", PATIENCE.as_secs()),
                        "a firewall, or another network: the hosts must reach each other on this port and on those that NCCL chooses",
                        State::Wrong,
                    ),
                    io::ErrorKind::InvalidInput => (error.to_string(), "an address is HOST:PORT", State::Wrong),
                    _ => (error.to_string(), "check the name, and the network between the hosts", State::Wrong),
                };
                texts.push(format!("{what}: {why}"));
                if state != State::Wrong {
                    (hint, state) = (Some(advice.to_owned()), now);
                }
            }
        }
    }
    Finding { name, state, text: texts.join("; "), hint }
}

fn reach(at: &str) -> io::Result<Duration> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in at.to_socket_addrs()? {
        let begin = Instant::now();
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(_) => return Ok(begin.elapsed()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(feature = "cuda")]
fn nccl() -> Finding {
    match qlora::kernels::cuda::nccl::describe() {
        Ok(text) => Finding::good("NCCL", text),
        Err(error) => Finding::missing(
            "NCCL",
            error.to_string(),
            "only needed for several GPUs: `pip install nvidia-nccl-cu13` brings it, QLORA_NCCL_PATH names a library",
        ),
    }
}

#[cfg(not(feature = "cuda"))]
fn nccl() -> Finding {
    Finding::missing(
        "NCCL",
        "this program was built without CUDA: ranks add their gradients over TCP",
        "fine for the CPU",
    )
}

/// How the GPUs of this host are connected, as `nvidia-smi topo -m` says; nothing where there is one or none.
fn links() -> Option<Finding> {
    let output =
        Command::new("nvidia-smi").args(["topo", "-m"]).output().ok().filter(|output| output.status.success())?;
    let kinds = kinds_of_links(&String::from_utf8_lossy(&output.stdout));
    if kinds.is_empty() {
        return None;
    }
    let text: Vec<_> = kinds.iter().map(|(kind, pairs)| format!("{pairs} by {}", meaning(kind))).collect();
    let text = format!("pairs of GPUs: {}", text.join(", "));
    match kinds.keys().any(|kind| kind.starts_with("SYS") || kind.starts_with("NODE")) {
        true => Some(Finding::missing(
            "links",
            text,
            "gradients cross the processors' link there: fine for LoRA, slower for more",
        )),
        false => Some(Finding::good("links", text)),
    }
}

/// Pairs of GPUs by the kind of their connection, from the matrix that `nvidia-smi topo -m` prints.
fn kinds_of_links(matrix: &str) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for line in matrix.lines() {
        let mut words = line.split_whitespace();
        let Some(number) = words.next().and_then(|word| word.strip_prefix("GPU")?.parse::<usize>().ok()) else {
            continue;
        };
        // The upper half of the matrix; the header has names where rows have kinds.
        for kind in words.take(number).filter(|word| !word.starts_with("GPU") && *word != "X") {
            *kinds.entry(kind.to_owned()).or_insert(0) += 1;
        }
    }
    kinds
}

/// A kind in words.
fn meaning(kind: &str) -> String {
    match kind {
        "PIX" => "one PCIe switch".to_owned(),
        "PXB" => "PCIe switches".to_owned(),
        "PHB" => "the PCIe host bridge".to_owned(),
        "NODE" => "PCIe host bridges of one processor".to_owned(),
        "SYS" => "the link between processors".to_owned(),
        _ => match kind.strip_prefix("NV") {
            Some(number) => format!("{number} NVLinks"),
            None => kind.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_counted_by_kind() {
        let matrix = "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m\n\
                      GPU0\t X \tNV18\tSYS\tPIX\t0-31\nGPU1\tNV18\t X \tPHB\tSYS\t0-31\nGPU2\tSYS\tPHB\t X \tSYS\t32-63\n\
                      NIC0\tPIX\tSYS\tSYS\t X\n\nLegend:\n  X    = Self\n  SYS  = Connection traversing PCIe\n";
        let kinds = kinds_of_links(matrix);
        let expected = [("NV18", 1), ("PHB", 1), ("SYS", 1)].map(|(kind, pairs)| (kind.to_owned(), pairs));
        assert_eq!(kinds, expected.into_iter().collect());
        assert_eq!(meaning("NV18"), "18 NVLinks");
        assert!(kinds_of_links("GPU0\t X \t0-31\n").is_empty());
    }

    #[test]
    fn peers_are_tried() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap().to_string();
        let found = reach_all("peers", &[(String::new(), at.clone())]);
        assert!(found.state == State::Good && found.text.contains("answers in"), "{}", found.text);
        assert!(port("127.0.0.1", listener.local_addr().unwrap().port()).state == State::Wrong);
        drop(listener);
        let found = reach_all("peers", &[(String::new(), at)]);
        assert!(found.state == State::Missing && found.text.contains("nothing listens"), "{}", found.text);
        let found = reach_all("peers", &[(String::new(), "no-port".to_owned())]);
        assert!(found.state == State::Wrong && found.hint.unwrap().contains("HOST:PORT"));
    }
}
