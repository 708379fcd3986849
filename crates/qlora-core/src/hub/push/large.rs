//! Large files: Git LFS's batch protocol, with the hub's multipart transfer.

use std::io::{self, Read};

use serde_json::{Map, Value, json};

use super::client::{Answer, Client};
use super::files::Local;
use super::{CHUNK, PushStep};
use crate::error::{Error, Result};

const LFS: &str = "application/vnd.git-lfs+json";

/// Sends the files that the store does not have.
pub(super) fn send(client: &Client, id: &str, files: &[&Local<'_>], step: &mut dyn FnMut(PushStep<'_>)) -> Result<()> {
    for chunk in files.chunks(CHUNK) {
        let answer = batch(client, id, chunk, step)?;
        for file in chunk {
            if let Some(expired) = object(client, id, file, &answer, step)? {
                let answer = batch(client, id, &[*file], step)?;
                if object(client, id, file, &answer, step)?.is_some() {
                    return Err(client.refused_by_store(&expired, file.path()));
                }
            }
        }
    }
    Ok(())
}

/// Asks where to send files.
fn batch(client: &Client, id: &str, files: &[&Local<'_>], step: &mut dyn FnMut(PushStep<'_>)) -> Result<Value> {
    let objects: Vec<Value> = files.iter().map(|file| json!({"oid": file.id(), "size": file.size()})).collect();
    let request = json!({
        "operation": "upload", "transfers": ["basic", "multipart"], "objects": objects, "hash_algo": "sha256",
        "ref": {"name": client.branch()},
    });
    let path = format!("/{id}.git/info/lfs/objects/batch");
    client.post(&path, LFS, request.to_string().as_bytes(), id, step)
}

/// Sends a file as the answer to [`batch`] says. Returns an address that the store no longer takes, if there was one.
fn object(
    client: &Client,
    id: &str,
    file: &Local<'_>,
    answer: &Value,
    step: &mut dyn FnMut(PushStep<'_>),
) -> Result<Option<String>> {
    let answers = answer["objects"].as_array().map_or(&[][..], Vec::as_slice);
    let Some(object) = answers.iter().find(|object| object["oid"].as_str() == Some(file.id())) else {
        return Err(client.not_understood(id, "where to send the bytes", file.path()));
    };
    if let Some(error) = object.get("error") {
        let message: String = error["message"].as_str().unwrap_or("no reason").chars().take(300).collect();
        return Err(Error::Invalid(format!("{id}: the hub does not take {}: {message}", file.path())));
    }
    match object["actions"]["upload"].as_object() {
        Some(action) => one(client, id, file, action, &object["actions"]["verify"], step),
        // It is there: from another repository, or an upload that broke off.
        None => {
            step(PushStep::Sent(file.path(), file.size()));
            Ok(None)
        }
    }
}

fn one(
    client: &Client,
    id: &str,
    file: &Local<'_>,
    action: &Map<String, Value>,
    verify: &Value,
    step: &mut dyn FnMut(PushStep<'_>),
) -> Result<Option<String>> {
    let unclear = || client.not_understood(id, "where to send the bytes", file.path());
    let url = action.get("href").and_then(Value::as_str).ok_or_else(unclear)?;
    let header = action.get("header").and_then(Value::as_object);
    match header.and_then(|header| header.get("chunk_size")) {
        None => {
            if part(client, file, url, 0, file.size(), step)?.is_none() {
                return Ok(Some(url.to_owned()));
            }
        }
        Some(size) => {
            // A number or its text.
            let size = size.as_u64().or_else(|| size.as_str()?.parse().ok()).filter(|size| *size > 0);
            let (size, header) = size.zip(header).ok_or_else(unclear)?;
            let urls = part_urls(header);
            if urls.len() as u64 != file.size().div_ceil(size) {
                return Err(unclear());
            }
            let mut parts = Vec::with_capacity(urls.len());
            for (index, url) in urls.iter().enumerate() {
                let start = index as u64 * size;
                let Some(answer) = part(client, file, url, start, size.min(file.size() - start), step)? else {
                    return Ok(Some((*url).to_owned()));
                };
                let etag = answer.etag.ok_or_else(unclear)?;
                parts.push(json!({"partNumber": index + 1, "etag": etag}));
            }
            let done = json!({"oid": file.id(), "parts": parts}).to_string();
            client.post(url, LFS, done.as_bytes(), file.path(), step)?;
        }
    }
    if let Some(url) = verify["href"].as_str() {
        client.post(
            url,
            "application/json",
            json!({"oid": file.id(), "size": file.size()}).to_string().as_bytes(),
            file.path(),
            step,
        )?;
    }
    Ok(None)
}

/// The addresses of the parts, which stand under their numbers.
fn part_urls(header: &Map<String, Value>) -> Vec<&str> {
    let mut urls: Vec<(u32, &str)> =
        header.iter().filter_map(|(number, url)| Some((number.parse().ok()?, url.as_str()?))).collect();
    urls.sort_unstable();
    urls.into_iter().map(|(_, url)| url).collect()
}

/// Sends a range of a file, and returns the store's answer; none if the store no longer takes the address.
fn part(
    client: &Client,
    file: &Local<'_>,
    url: &str,
    start: u64,
    length: u64,
    step: &mut dyn FnMut(PushStep<'_>),
) -> Result<Option<Answer>> {
    let body = || Ok(Whole { bytes: file.part(start, length)?, left: length });
    let answer = client.put(url, length, file.path(), step, body)?;
    if answer.is_some() {
        step(PushStep::Sent(file.path(), length));
    }
    Ok(answer)
}

/// A range of a file that must be as long as was promised: a request would otherwise wait for the rest forever.
struct Whole<R> {
    bytes: R,
    left: u64,
}

impl<R: Read> Read for Whole<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let read = self.bytes.read(to)?;
        self.left = self.left.saturating_sub(read as u64);
        if read == 0 && self.left > 0 && !to.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was sent"));
        }
        Ok(read)
    }
}
