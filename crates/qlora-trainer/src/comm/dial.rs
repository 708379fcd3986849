//! Connections that are tried until they succeed: ranks start at different times, and in any order.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// The time limit of one attempt.
const ATTEMPT: Duration = Duration::from_secs(5);
/// The interval at which a rank says for whom it waits.
const REMINDER: Duration = Duration::from_secs(10);

/// Connects to `at` (`host:port`), at any of the host's addresses, trying again until `deadline`. `whom` is named while it
/// waits.
pub(super) fn dial(at: &str, whom: &str, deadline: Instant) -> io::Result<TcpStream> {
    let (mut pause, mut reminded) = (Duration::from_millis(20), Instant::now());
    loop {
        let tried = at.to_socket_addrs().and_then(|addresses| {
            let mut last = io::ErrorKind::NotFound.into();
            for address in addresses {
                match TcpStream::connect_timeout(&address, ATTEMPT) {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        });
        if tried.is_ok() || Instant::now() > deadline {
            return tried;
        }
        if reminded.elapsed() > REMINDER {
            reminded = Instant::now();
            tracing::warn!("waiting for {whom} at {at}");
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}
