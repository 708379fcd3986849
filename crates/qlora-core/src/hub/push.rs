//! Uploads to the hub: a repository is made if need be, large files go to its store for large files (Git LFS's batch protocol, in parts
//! where the hub asks for it), and everything becomes visible in one commit.
//!
//! Only files that differ from those in the repository are sent. A transfer that broke off is taken up by doing the same again: large
//! files that had arrived as a whole are not sent twice. Requests that fail for a reason that passes (429, 5xx, a broken connection)
//! are made again, a few times.
//!
//! | request | answer |
//! |---|---|
//! | `POST /api/repos/create` | 409 if the repository is there |
//! | `POST /api/models/ID/preupload/REVISION`: path, size, first 512 bytes | per path: `regular` or `lfs`, ignored or not, the id of the content there |
//! | `POST /ID.git/info/lfs/objects/batch`: SHA-256, size | per object: nothing to do, one address, or addresses of parts; an address to verify |
//! | `PUT` to those addresses, without the token | an `ETag` per part, which the address of the object is then told |
//! | `POST /api/models/ID/commit/REVISION`: a line of JSON per file | the commit |

mod card;
mod client;
mod files;
mod large;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::environment;
use super::settings::Settings;
use crate::error::{Error, Result};
use crate::hub_id::is_hub_id;
use crate::open::OpenOptions;
pub use card::{is_generated_card, marked_card};
use client::Client;
use files::Local;
pub use files::{Existing, PushFile, PushFiles, files_of};

/// Files in one request about them, as in huggingface_hub.
const CHUNK: usize = 256;
/// The most bytes of files that are part of the commit itself, which is held in memory.
const MAX_REGULAR: u64 = 200 << 20;

/// Options of an upload. The defaults are those of `hf upload`.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct PushOptions {
    /// Makes a new repository a private one; one that exists stays as it is.
    pub private: bool,
    /// The branch (`main`), which must exist.
    pub revision: Option<String>,
    /// The commit's first line.
    pub commit_message: Option<String>,
    /// Access token with the right to write; else `HF_TOKEN`, else the one that `hf auth login` stored.
    pub token: Option<String>,
    /// Address of the hub; else `HF_ENDPOINT`, else <https://huggingface.co>.
    pub endpoint: Option<String>,
}

/// A step of an upload, for progress bars.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PushStep<'a> {
    /// A file is read to find out whether it is there already.
    Hashing(&'a str),
    /// So many bytes are to be sent.
    Sending(u64),
    /// So many of a large file's bytes were sent, since the last step of this kind.
    Sent(&'a str, u64),
    /// A request failed and is made again.
    Again(&'a str),
    /// A private repository was wanted, but this one was there before and is public. Nothing was sent so far.
    AlreadyPublic(&'a str),
}

/// A finished upload.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pushed {
    /// The address of the repository.
    pub url: String,
    /// The commit; none if nothing differed.
    pub commit: Option<String>,
    /// The files that were new or different, by their path in the repository.
    pub changed: Vec<String>,
    /// The number of files that were there already.
    pub unchanged: usize,
    /// The files that the repository's `.gitignore` excludes.
    pub ignored: Vec<String>,
    /// The files that did not take the place of those in the repository ([`Existing`]).
    pub kept: Vec<String>,
}

/// The files of an upload, by what happens to them.
#[derive(Default)]
struct Sorted<'a> {
    changed: Vec<Local<'a>>,
    unchanged: usize,
    ignored: Vec<String>,
    kept: Vec<String>,
}

/// Uploads `files` to the model repository `id` (`owner/name`; a `name` alone is one of the token's owner), which is made if it does
/// not exist. Files that are only in the repository stay there.
///
/// # Errors
/// If there is no token, the hub refuses it (401, 403), the repository or the branch is not there (404) or changed meanwhile (409,
/// 412), the hub limits requests (429), has a problem (5xx) or cannot be reached, each with what to do; if a file cannot be read.
/// The token is in no message.
pub fn push(files: &[PushFile], id: &str, options: &PushOptions, step: &mut dyn FnMut(PushStep<'_>)) -> Result<Pushed> {
    let open = OpenOptions {
        token: options.token.clone(),
        endpoint: options.endpoint.clone(),
        revision: options.revision.clone(),
        ..OpenOptions::default()
    };
    push_with(files, id, options, &Client::new(Settings::new(&open, environment)?)?, step)
}

fn push_with(
    files: &[PushFile],
    id: &str,
    options: &PushOptions,
    client: &Client,
    step: &mut dyn FnMut(PushStep<'_>),
) -> Result<Pushed> {
    if files.is_empty() {
        return Err(Error::Invalid("there are no files to upload".to_owned()));
    }
    if !is_hub_id(id) {
        return Err(Error::Invalid(format!("{id:?} is not the id of a repository, such as owner/name")));
    }
    let id = match id.contains('/') {
        true => id.to_owned(),
        false => format!("{}/{id}", client.owner(step)?),
    };
    // A file that cannot be read is found before a repository is made.
    let local = files.iter().map(Local::read).collect::<Result<Vec<_>>>()?;
    let existed = client.create(&id, options.private, step)?;
    if options.private && existed && client.is_public(&id, step)? {
        step(PushStep::AlreadyPublic(&id));
    }
    let Sorted { changed, unchanged, ignored, kept } = differing(client, &id, local, step)?;
    let url = format!("{}/{id}", client.endpoint());
    let names = |files: &[Local<'_>]| files.iter().map(|file| file.path().to_owned()).collect();
    if changed.is_empty() {
        return Ok(Pushed { url, commit: None, changed: Vec::new(), unchanged, ignored, kept });
    }
    let large: Vec<&Local<'_>> = changed.iter().filter(|file| file.is_large()).collect();
    step(PushStep::Sending(large.iter().map(|file| file.size()).sum()));
    large::send(client, &id, &large, step)?;
    let message = options.commit_message.as_deref().unwrap_or("Upload with qlora");
    let body = commit(&changed, message)?;
    let path = format!("/api/models/{id}/commit/{}", client.revision());
    let answer = client.post(&path, "application/x-ndjson", body.as_bytes(), &id, step)?;
    // Without its id nobody knows whether the commit was made: something in between may have answered.
    let commit = answer["commitOid"].as_str().filter(|commit| !commit.is_empty());
    let commit = commit.ok_or_else(|| client.not_understood(&id, "the id", "the commit"))?.to_owned();
    Ok(Pushed { url, commit: Some(commit), changed: names(&changed), unchanged, ignored, kept })
}

/// The files to send, and the others.
fn differing<'a>(
    client: &Client,
    id: &str,
    mut files: Vec<Local<'a>>,
    step: &mut dyn FnMut(PushStep<'_>),
) -> Result<Sorted<'a>> {
    let path = format!("/api/models/{id}/preupload/{}", client.revision());
    let mut sorted = Sorted::default();
    // A .gitignore that is sent along counts already.
    let ignore = files.iter().find(|file| file.path() == ".gitignore").map(Local::text).transpose()?;
    while !files.is_empty() {
        let chunk: Vec<Local<'a>> = files.drain(..files.len().min(CHUNK)).collect();
        let list: Vec<Value> = chunk
            .iter()
            .map(|file| json!({"path": file.path(), "sample": STANDARD.encode(file.sample()), "size": file.size()}))
            .collect();
        let mut request = json!({ "files": list });
        if let Some(ignore) = &ignore {
            request["gitIgnore"] = json!(ignore);
        }
        let answer = client.post_json(&path, &request, id, step)?;
        let modes = answer["files"].as_array().map_or(&[][..], Vec::as_slice);
        for mut file in chunk {
            let mode = modes.iter().find(|mode| mode["path"].as_str() == Some(file.path()));
            let (Some(mode), Some(upload)) = (mode, mode.and_then(|mode| mode["uploadMode"].as_str())) else {
                return Err(client.not_understood(id, "the way to upload", file.path()));
            };
            if mode["shouldIgnore"] == Value::Bool(true) {
                sorted.ignored.push(file.path().to_owned());
                continue;
            }
            step(PushStep::Hashing(file.path()));
            // The store for large files takes no empty ones.
            file.hash(upload == "lfs" && file.size() > 0)?;
            let there = mode["oid"].as_str();
            let mut replace = || -> Result<bool> {
                match file.existing() {
                    Existing::Replaced => Ok(true),
                    Existing::Kept => Ok(false),
                    Existing::ReplacedIfGenerated => {
                        // It is there; if it cannot be seen, it may be a person's.
                        let text = client.text(id, file.path(), step)?;
                        Ok(text.is_some_and(|text| is_generated_card(&text)))
                    }
                }
            };
            if there == Some(file.id()) {
                sorted.unchanged += 1;
            } else if there.is_none() || replace()? {
                sorted.changed.push(file);
            } else {
                sorted.kept.push(file.path().to_owned());
            }
        }
    }
    Ok(sorted)
}

/// The lines of a commit.
fn commit(files: &[Local<'_>], message: &str) -> Result<String> {
    let regular: u64 = files.iter().filter(|file| !file.is_large()).map(Local::size).sum();
    if regular > MAX_REGULAR {
        return Err(Error::Invalid(format!(
            "{} MB of text files for one commit; upload them in several steps",
            regular >> 20
        )));
    }
    let (summary, description) = message.split_once('\n').unwrap_or((message, ""));
    let mut lines =
        json!({"key": "header", "value": {"summary": summary, "description": description.trim()}}).to_string();
    for file in files {
        lines.push('\n');
        let line = match file.is_large() {
            true => json!({"key": "lfsFile", "value": {
                "path": file.path(), "algo": "sha256", "oid": file.id(), "size": file.size()}}),
            false => json!({"key": "file", "value": {
                "content": STANDARD.encode(file.bytes()?), "path": file.path(), "encoding": "base64"}}),
        };
        lines += &line.to_string();
    }
    lines.push('\n');
    Ok(lines)
}

#[cfg(test)]
#[path = "push/tests.rs"]
mod tests;
