//! Starts the ranks of a run on this host, which may be one of several: `--nproc-per-node`, `--nnodes`.
//!
//! The program starts itself once for each rank, with torchrun's variables, and waits. Rank 0 has the terminal; what the others
//! print appears with their number before it. Signals go on to all ranks, which agree to save and leave. When a rank fails the
//! others notice ([`comm`](crate::comm)) and end by themselves; who does not, because it had not met the others yet, is asked to
//! after [`PATIENCE`], and killed after [`LAST_PATIENCE`]. A rank that is stopped (SIGSTOP) while others go on is killed once they
//! have had the time to notice. If this process is killed, the ranks end with it.

mod hosts;

use std::env;
use std::io::{self, BufRead, BufReader, IsTerminal as _, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use qlora_core::model::gpus;

use crate::error::{Error, Result};
use crate::platform::{self, SIGTERM};
pub use hosts::{HostOptions, Share};

/// The time that the other ranks have to end by themselves after one failed.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// The time after which those that still run are killed: one of them may be writing a checkpoint.
pub const LAST_PATIENCE: Duration = Duration::from_secs(30);
/// How long a rank may be stopped while others go on: longer than they take to miss it.
const STOPPED: Duration = Duration::from_secs(12);

/// Says to a rank that it was started by [`launch`].
const LAUNCHED: &str = "QLORA_LAUNCHED";

/// The number of processes that `--nproc-per-node` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Processes {
    /// One for each GPU.
    Auto,
    /// So many.
    Number(usize),
}

impl std::str::FromStr for Processes {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" | "gpu" => Ok(Self::Auto),
            // As torchrun has it; a process uses all cores.
            "cpu" => Ok(Self::Number(1)),
            _ => match text.parse() {
                Ok(number) if number > 0 => Ok(Self::Number(number)),
                _ => Err(format!("{text:?} is not a number of processes, nor auto")),
            },
        }
    }
}

impl Processes {
    /// The number; one where there is no GPU.
    pub fn number(self) -> usize {
        match self {
            Self::Number(number) => number,
            Self::Auto => gpus().max(1),
        }
    }
}

/// To be called early by a program that may be a rank: it ends when the process is gone that started it.
pub fn end_with_launcher() {
    if is_launched() {
        // Where that does nothing, the ranks notice each other's end all the same.
        platform::end_with_parent();
    }
}

/// Whether this process is a rank that [`launch`] started: its lines appear with its number before them.
pub fn is_launched() -> bool {
    env::var_os(LAUNCHED).is_some()
}

/// Runs this program, with its arguments, as the ranks of this host, and returns the code to end with: that of the first rank that
/// failed, 128 and the signal's number for one that was killed.
///
/// # Errors
/// If a process cannot be started; on Windows always: there each rank is started by hand, with torchrun's variables.
pub fn launch(share: &Share) -> Result<u8> {
    if !platform::HAS_PROCESS_GROUPS {
        return Err(Error::Invalid(
            "ranks cannot be started here: start each by itself, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
                .to_owned(),
        ));
    }
    let failed = |what: &str, error: io::Error| Error::Invalid(format!("{what}: {error}"));
    let program =
        env::current_exe().map_err(|error| failed("this program cannot be found to be started again", error))?;
    let (address, port, job) = match &share.master {
        // The launchers know nothing of each other that tells this start from another.
        Some((address, port)) => (address.clone(), *port, env::var("QLORA_JOB").unwrap_or_else(|_| "hosts".to_owned())),
        None => {
            // Given back before rank 0 takes it.
            let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
            let port = port.map_err(|error| failed("no port for the ranks to meet", error))?.port();
            ("127.0.0.1".to_owned(), port, std::process::id().to_string())
        }
    };
    let signal = Arc::new(AtomicUsize::new(0));
    platform::catch_signals(&signal).map_err(|error| failed("signals cannot be passed on", error))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = (cores / share.local).max(1).to_string();
    let (mut ranks, mut said) = (Vec::new(), Vec::new());
    for local_rank in 0..share.local {
        let rank = share.first + local_rank;
        let mut command = Command::new(&program);
        command.args(env::args_os().skip(1));
        for (name, value) in [
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", local_rank.to_string()),
            ("WORLD_SIZE", share.size.to_string()),
            ("LOCAL_WORLD_SIZE", share.local.to_string()),
            ("MASTER_ADDR", address.clone()),
            ("MASTER_PORT", port.to_string()),
            ("QLORA_JOB", job.clone()),
            (LAUNCHED, "1".to_owned()),
        ] {
            command.env(name, value);
        }
        if env::var_os("RAYON_NUM_THREADS").is_none() {
            // Ranks that compute on the CPU share it.
            command.env("RAYON_NUM_THREADS", &threads);
        }
        // In a group of its own a rank gets a signal once: from here.
        platform::in_own_group(&mut command);
        if rank > 0 {
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        match command.spawn() {
            Ok(mut child) => {
                said.extend(child.stdout.take().map(|stdout| pass_on(rank, stdout)));
                said.extend(child.stderr.take().map(|stderr| pass_on(rank, stderr)));
                ranks.push(child);
            }
            Err(error) => {
                ranks.iter_mut().for_each(|child: &mut Child| drop(child.kill()));
                return Err(failed(&format!("rank {rank} cannot be started"), error));
            }
        }
    }
    let code = wait(ranks, share.first, &signal);
    // Their last words; who else holds a pipe is not waited for.
    let until = Instant::now() + Duration::from_secs(2);
    while said.iter().any(|thread: &JoinHandle<()>| !thread.is_finished()) && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(code)
}

/// Prints the output of a rank, line by line with its number.
fn pass_on(rank: usize, from: impl Read + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(io::Result::ok) {
            write_line(&format!("[rank {rank}] "), &line);
        }
    })
}

/// Waits for the ranks, of which the first is rank `first`.
fn wait(mut ranks: Vec<Child>, first: usize, signal: &AtomicUsize) -> u8 {
    let mut ended: Vec<Option<ExitStatus>> = vec![None; ranks.len()];
    let (mut first_failure, mut since, mut asked) = (None, None::<Instant>, false);
    let mut stopped: Vec<Option<Instant>> = vec![None; ranks.len()];
    while ended.iter().any(Option::is_none) {
        std::thread::sleep(Duration::from_millis(20));
        let number = signal.swap(0, Ordering::SeqCst);
        if number > 0 {
            tell(&ranks, &ended, number as i32);
        }
        let mut failed = Vec::new();
        for (rank, child) in ranks.iter_mut().enumerate() {
            if ended[rank].is_none()
                && let Ok(Some(status)) = child.try_wait()
            {
                ended[rank] = Some(status);
                // The rank itself has said why, unless something ended it.
                if let (Some(signal), false) = (platform::signal_of(status), asked) {
                    say(&format!("rank {} (process {}) was ended by signal {signal}", first + rank, child.id()));
                }
                failed.extend((!status.success()).then_some(status));
            }
        }
        // Of several that are seen at once the one that did not end by itself is the cause.
        if let Some(cause) = failed.iter().find(|status| platform::signal_of(**status).is_some()).or(failed.first())
            && first_failure.is_none()
        {
            first_failure = Some(*cause);
            since = Some(Instant::now());
        }
        let running = || (0..ended.len()).filter(|&rank| ended[rank].is_none());
        for rank in running() {
            stopped[rank] = is_stopped(ranks[rank].id()).then(|| stopped[rank].unwrap_or_else(Instant::now));
        }
        // A job that is suspended as a whole is left in peace.
        if running().any(|rank| stopped[rank].is_none()) || first_failure.is_some() {
            for rank in running().filter(|&rank| stopped[rank].is_some_and(|since| since.elapsed() > STOPPED)) {
                say(&format!("rank {} (process {}) is stopped, and is ended", first + rank, ranks[rank].id()));
                let _ = ranks[rank].kill();
                // Who has not ended by now had not met it.
                since = Some(Instant::now().checked_sub(PATIENCE).unwrap_or_else(Instant::now));
            }
        }
        let Some(since) = since else { continue };
        if since.elapsed() > LAST_PATIENCE {
            for (child, _) in ranks.iter_mut().zip(&ended).filter(|(_, ended)| ended.is_none()) {
                let _ = child.kill();
            }
        } else if since.elapsed() >= PATIENCE && !asked {
            asked = true;
            say("the ranks that still run are asked to end");
            tell(&ranks, &ended, SIGTERM);
        }
    }
    first_failure.map_or(0, |status| {
        let code = status.code().or_else(|| platform::signal_of(status).map(|signal| 128 + signal)).unwrap_or(1);
        u8::try_from(code).unwrap_or(1)
    })
}

/// A line of the launcher's own.
fn say(text: &str) {
    write_line("[launcher] ", text.as_bytes());
}

fn write_line(before: &str, line: &[u8]) {
    let mut stderr = io::stderr().lock();
    let mut text = Vec::new();
    if stderr.is_terminal() {
        // Rank 0 draws its bar on the last line, where the cursor is, and draws it again below this line.
        text.extend(b"\r\x1b[J");
    }
    text.extend(before.as_bytes());
    text.extend(line);
    text.push(b'\n');
    // One write: lines of several ranks stay whole.
    let _ = stderr.write_all(&text);
}

/// Whether a process is stopped by a signal. Elsewhere than on Linux nobody knows.
fn is_stopped(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/stat"));
    // The name, in brackets, may hold anything.
    status.is_ok_and(|text| text.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T')))
}

fn tell(ranks: &[Child], ended: &[Option<ExitStatus>], number: i32) {
    for (child, _) in ranks.iter().zip(ended).filter(|(_, ended)| ended.is_none()) {
        platform::send_signal(child.id(), number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_processes_are_read() {
        assert_eq!("auto".parse(), Ok(Processes::Auto));
        assert_eq!("4".parse(), Ok(Processes::Number(4)));
        assert_eq!("cpu".parse(), Ok(Processes::Number(1)));
        assert_eq!(Processes::Number(3).number(), 3);
        for wrong in ["0", "-1", "all", ""] {
            assert!(wrong.parse::<Processes>().unwrap_err().contains("auto"), "{wrong}");
        }
    }
}
