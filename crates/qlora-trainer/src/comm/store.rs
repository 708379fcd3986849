//! A client of the key-value store that torchrun serves at `MASTER_ADDR:MASTER_PORT` (PyTorch's `TCPStore`): the port is taken
//! by it, so its workers find each other through it.
//!
//! The wire protocol as tried against torch 2.15's server: little-endian; a text is its length (u64) and its bytes; every key
//! begins with `/`. The store outlives a restart of the workers with what they wrote, so keys carry the job's name, which
//! counts restarts.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::dial::dial;
use super::ranks::Ranks;
use crate::error::{Error, Result};

const VALIDATE: u8 = 0x00;
const SET: u8 = 0x01;
const GET: u8 = 0x03;
const CHECK: u8 = 0x05;
/// The number that the first request has to hold.
const MAGIC: u32 = 0x3C85_F7CE;
/// The longest value that is taken: an address.
const LONGEST: u64 = 1 << 12;

/// A connection to the store.
#[derive(Debug)]
pub struct Store {
    stream: TcpStream,
    at: String,
    prefix: String,
}

impl Store {
    /// Connects, trying for as long as `patience`.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn connect(ranks: &Ranks, patience: Duration) -> Result<Self> {
        let at = format!("{}:{}", ranks.address, ranks.port);
        let connected = dial(&at, "torchrun's store", Instant::now() + patience);
        let begin = |mut stream: TcpStream| -> io::Result<TcpStream> {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            stream.set_write_timeout(Some(Duration::from_secs(30)))?;
            let mut request = vec![VALIDATE];
            request.extend(MAGIC.to_le_bytes());
            stream.write_all(&request)?;
            Ok(stream)
        };
        let stream = connected.and_then(begin).map_err(|error| failed(&at, &error))?;
        Ok(Self { stream, at, prefix: format!("/qlora/{}/", ranks.job) })
    }

    /// Writes a value.
    ///
    /// # Errors
    /// If the store is gone.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let mut request = vec![SET];
        self.text(&mut request, key);
        request.extend((value.len() as u64).to_le_bytes());
        request.extend(value.as_bytes());
        self.stream.write_all(&request).map_err(|error| failed(&self.at, &error))
    }

    /// The value of a key, once it is written.
    ///
    /// # Errors
    /// If it is not written before the deadline, or the store is gone.
    pub fn wait_for(&mut self, key: &str, deadline: Instant) -> Result<String> {
        while !self.has(key)? {
            if Instant::now() > deadline {
                return Err(Error::rank(0, format!("did not say in torchrun's store at {} where it is", self.at)));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut request = vec![GET];
        self.text(&mut request, key);
        self.ask(&request, |stream| {
            let mut length = [0; 8];
            stream.read_exact(&mut length)?;
            let length = u64::from_le_bytes(length);
            if length > LONGEST {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the value is no address"));
            }
            let mut value = vec![0; length as usize];
            stream.read_exact(&mut value)?;
            String::from_utf8(value).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the value is no text"))
        })
    }

    fn has(&mut self, key: &str) -> Result<bool> {
        let mut request = vec![CHECK];
        request.extend(1u64.to_le_bytes());
        self.text(&mut request, key);
        self.ask(&request, |stream| {
            let mut answer = [0];
            stream.read_exact(&mut answer)?;
            Ok(answer[0] == 0)
        })
    }

    fn ask<T>(&mut self, request: &[u8], read: impl FnOnce(&mut TcpStream) -> io::Result<T>) -> Result<T> {
        let answered = self.stream.write_all(request).and_then(|()| read(&mut self.stream));
        answered.map_err(|error| failed(&self.at, &error))
    }

    fn text(&self, request: &mut Vec<u8>, key: &str) {
        request.extend(((self.prefix.len() + key.len()) as u64).to_le_bytes());
        request.extend(self.prefix.as_bytes());
        request.extend(key.as_bytes());
    }
}

fn failed(at: &str, error: &io::Error) -> Error {
    Error::Invalid(format!("torchrun's store at {at} (MASTER_ADDR, MASTER_PORT) does not answer: {error}"))
}
