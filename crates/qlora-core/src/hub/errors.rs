//! Error messages for the hub's answers, with advice.

use std::io::ErrorKind;
use std::path::Path;

use hf_hub::api::sync::ApiError;

use super::settings::{Kind, Settings};
use crate::error::Error;

/// Whether a request failed for a reason that passes: the hub limits requests or has a problem, the connection broke, or it no
/// longer takes the token (an expired one is refused even for public repositories).
pub(super) fn is_outage(error: &ApiError, settings: &Settings) -> bool {
    match error {
        ApiError::TooManyRetries(inner) => is_outage(inner, settings),
        ApiError::RequestError(request) => match &**request {
            ureq::Error::StatusCode(401) => settings.token.is_some(),
            ureq::Error::StatusCode(status) => *status == 429 || *status >= 500,
            ureq::Error::Io(_)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Timeout(_)
            | ureq::Error::Tls(_) => true,
            _ => false,
        },
        // A body that ends early.
        ApiError::IoError(io) => matches!(
            io.kind(),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::TimedOut
        ),
        _ => false,
    }
}

/// An id for messages about a repository that may not exist: what was meant may have been a folder.
pub(super) fn named(id: &str) -> String {
    match Path::new(id).exists() {
        true => id.to_owned(),
        false => format!("{id}: there is no such folder here; taken as the id of a repository on the hub"),
    }
}

/// The error for a request about `id`: for one of its files, or with an empty `what` for the repository itself.
pub(super) fn explain(error: &ApiError, id: &str, what: &str, settings: &Settings) -> Error {
    let error = match error {
        ApiError::TooManyRetries(inner) => inner,
        other => other,
    };
    let request = match error {
        ApiError::RequestError(request) => &**request,
        ApiError::IoError(io) => return Error::hub(id, format!("{}{io}", prefix(what))),
        ApiError::LockAcquisition(path) => {
            return Error::hub(id, format!("another process is downloading {what} (lock {})", path.display()));
        }
        other => return Error::hub(id, format!("{}the hub's answer is not understood: {other}", prefix(what))),
    };
    let Settings { endpoint, revision, token, token_source, .. } = settings;
    let (page, kind) = match settings.kind {
        Kind::Model => (format!("{endpoint}/{id}"), "model"),
        Kind::Dataset => (format!("{endpoint}/datasets/{id}"), "data set"),
    };
    let access = format!("ask for access at {page} with the account that the token belongs to");
    let message = match request {
        ureq::Error::StatusCode(401) if token.is_some() => format!(
            "the hub does not accept the access token from {token_source} (401), or there is no such repository. Set HF_TOKEN to a \
             valid token from {endpoint}/settings/tokens"
        ),
        ureq::Error::StatusCode(401) => format!(
            "the hub wants to know who asks (401): the repository is private or gated, or does not exist. Set the environment \
             variable HF_TOKEN to an access token from {endpoint}/settings/tokens; if the {kind} is gated, first {access}"
        ),
        ureq::Error::StatusCode(403) => {
            let with = if token.is_some() {
                format!("the access token from {token_source} does not allow it")
            } else {
                format!(
                    "it needs an access token: set the environment variable HF_TOKEN to one from {endpoint}/settings/tokens"
                )
            };
            format!("access is refused (403): {with}. The {kind} is gated or private: {access}")
        }
        ureq::Error::StatusCode(404) if what.is_empty() => {
            let private = if token.is_some() { "" } else { " (a private repository also needs HF_TOKEN)" };
            format!("no such repository on {endpoint}, or it has no revision {revision}{private}")
        }
        ureq::Error::StatusCode(404) => format!("revision {revision} has no file {what}"),
        ureq::Error::StatusCode(429) => format!("the hub limits the requests (429): wait, or set HF_TOKEN{}", at(what)),
        ureq::Error::StatusCode(status @ 500..) => format!("the hub has a problem (status {status}): try again later"),
        ureq::Error::StatusCode(status) => format!("the hub answers with status {status}{}", at(what)),
        ureq::Error::Io(_)
        | ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Timeout(_)
        | ureq::Error::Tls(_) => return unreachable(id, settings, &format!("{request}{}", at(what))),
        other => format!("{other}{}", at(what)),
    };
    let id = match request {
        ureq::Error::StatusCode(401 | 404) if what.is_empty() => named(id),
        _ => id.to_owned(),
    };
    Error::hub(id, message)
}

/// The error for a hub that cannot be reached.
pub(super) fn unreachable(id: &str, settings: &Settings, reason: &str) -> Error {
    let kind = match settings.kind {
        Kind::Model => "model",
        Kind::Dataset => "data set",
    };
    let message = format!(
        "cannot reach {} ({reason}). If the {kind} was downloaded before, set HF_HUB_OFFLINE=1 to use the cache in {}; else \
         download it where there is a network and give the path of its folder",
        settings.endpoint,
        settings.cache.display()
    );
    Error::hub(named(id), message)
}

fn prefix(what: &str) -> String {
    if what.is_empty() { String::new() } else { format!("{what}: ") }
}

fn at(what: &str) -> String {
    if what.is_empty() { String::new() } else { format!(", for {what}") }
}
