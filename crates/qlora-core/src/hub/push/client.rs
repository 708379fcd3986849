//! Requests to the hub, made again where that may help, with errors that say what to do.

use std::io::Read;
use std::time::Duration;

use serde_json::{Value, json};
use ureq::http::Response;
use ureq::{Agent, Body, SendBody};

use super::PushStep;
use crate::error::{Error, Result};
use crate::hub::settings::Settings;

/// How often a request is made before its failure is an error.
const ATTEMPTS: u32 = 5;
/// The longest wait that the hub may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// The longest time in which no byte comes or goes. A whole transfer may take as long as it needs.
const STALLED: Duration = Duration::from_secs(300);
/// The longest answer that is read.
const MAX_ANSWER: u64 = 16 << 20;

pub(super) struct Client {
    agent: Agent,
    settings: Settings,
    /// The wait before the second attempt; it doubles.
    pub(super) pause: Duration,
}

/// An answer with a status of success.
pub(super) struct Answer {
    pub(super) body: Value,
    pub(super) text: String,
    pub(super) etag: Option<String>,
}

/// A failed attempt.
enum Failure {
    Status {
        status: u16,
        message: String,
        wait: Option<Duration>,
    },
    Connection(String),
    /// Nothing that another attempt helps against.
    Final(Error),
}

impl Client {
    /// # Errors
    /// If there is no token, or the hub is not to be asked.
    pub(super) fn new(settings: Settings) -> Result<Self> {
        Self::with_patience(settings, STALLED)
    }

    /// `stalled` is the longest time in which no byte comes or goes.
    pub(super) fn with_patience(settings: Settings, stalled: Duration) -> Result<Self> {
        if settings.offline {
            return Err(Error::Invalid("offline (HF_HUB_OFFLINE): nothing can be uploaded".to_owned()));
        }
        if settings.token.is_none() {
            return Err(Error::Invalid(format!(
                "an upload needs an access token with the right to write: set the environment variable HF_TOKEN to one from \
                 {}/settings/tokens, or run `hf auth login`",
                settings.endpoint
            )));
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(stalled))
            .timeout_per_read(Some(stalled))
            .timeout_per_write(Some(stalled))
            .user_agent(concat!("qlora/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Ok(Self { agent, settings, pause: Duration::from_secs(1) })
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.settings.endpoint
    }

    /// The branch, as part of an address.
    pub(super) fn revision(&self) -> String {
        self.settings.revision.replace('/', "%2F")
    }

    /// The branch's name.
    pub(super) fn branch(&self) -> &str {
        &self.settings.revision
    }

    /// The name of the token's owner.
    pub(super) fn owner(&self, step: &mut dyn FnMut(PushStep<'_>)) -> Result<String> {
        let url = self.url("/api/whoami-v2");
        let sent = self.retried("who the token belongs to", step, || self.attempt("GET", &url, None, None));
        let answer = sent.map_err(|failure| self.explain(failure, "the token's owner"))?;
        let name = answer.body["name"].as_str().map(str::to_owned);
        name.ok_or_else(|| self.not_understood("the token's owner", "a name", "/api/whoami-v2"))
    }

    /// Whether anybody can read a repository.
    pub(super) fn is_public(&self, id: &str, step: &mut dyn FnMut(PushStep<'_>)) -> Result<bool> {
        let url = self.url(&format!("/api/models/{id}"));
        let sent = self.retried(id, step, || self.attempt("GET", &url, None, None));
        let answer = sent.map_err(|failure| self.explain(failure, id))?;
        let private = answer.body["private"].as_bool();
        Ok(!private.ok_or_else(|| self.not_understood(id, "the visibility", id))?)
    }

    /// A text file of the branch; none if it is not there.
    pub(super) fn text(&self, id: &str, file: &str, step: &mut dyn FnMut(PushStep<'_>)) -> Result<Option<String>> {
        let mut url = self.url(&format!("/{id}/raw/{}/", self.revision()));
        for byte in file.bytes() {
            match byte {
                b'/' | b'-' | b'_' | b'.' | b'~' => url.push(char::from(byte)),
                byte if byte.is_ascii_alphanumeric() => url.push(char::from(byte)),
                byte => url += &format!("%{byte:02X}"),
            }
        }
        match self.retried(id, step, || self.attempt("GET", &url, None, None)) {
            Ok(answer) => Ok(Some(answer.text)),
            Err(Failure::Status { status: 404, .. }) => Ok(None),
            Err(failure) => Err(self.explain(failure, &format!("{id}: {file}"))),
        }
    }

    /// Makes a repository if it does not exist, and returns whether it did.
    pub(super) fn create(&self, id: &str, private: bool, step: &mut dyn FnMut(PushStep<'_>)) -> Result<bool> {
        let (owner, name) = id.split_once('/').unwrap_or_default();
        let mut request = json!({"name": name, "organization": owner, "type": "model"});
        if private {
            request["visibility"] = json!("private");
        }
        let url = self.url("/api/repos/create");
        let body = request.to_string();
        let sent =
            self.retried(id, step, || self.attempt("POST", &url, Some("application/json"), Some(body.as_bytes())));
        match sent {
            Ok(_) => Ok(false),
            Err(Failure::Status { status: 409, .. }) => Ok(true),
            // A token that may write to this repository alone cannot make any.
            Err(Failure::Status { status: 403, message, wait }) => {
                let there = self.url(&format!("/api/models/{id}"));
                match self.retried(id, step, || self.attempt("GET", &there, None, None)) {
                    Ok(_) => Ok(true),
                    Err(_) => Err(self.explain(Failure::Status { status: 403, message, wait }, id)),
                }
            }
            Err(failure) => Err(self.explain(failure, id)),
        }
    }

    pub(super) fn post_json(
        &self,
        path: &str,
        body: &Value,
        id: &str,
        step: &mut dyn FnMut(PushStep<'_>),
    ) -> Result<Value> {
        self.post(path, "application/json", body.to_string().as_bytes(), id, step)
    }

    /// Posts to a path of the hub (or a whole address).
    pub(super) fn post(
        &self,
        path: &str,
        kind: &str,
        body: &[u8],
        id: &str,
        step: &mut dyn FnMut(PushStep<'_>),
    ) -> Result<Value> {
        let url = if path.starts_with('/') { self.url(path) } else { path.to_owned() };
        let sent = self.retried(id, step, || self.attempt("POST", &url, Some(kind), Some(body)));
        sent.map(|answer| answer.body).map_err(|failure| self.explain_at(&url, failure, id))
    }

    /// Puts bytes to an address that the hub named; `body` gives them anew for every attempt. None if the store no longer takes the
    /// address (403): it has a time limit, and the hub gives a new one.
    pub(super) fn put<R: Read>(
        &self,
        url: &str,
        length: u64,
        what: &str,
        step: &mut dyn FnMut(PushStep<'_>),
        body: impl Fn() -> Result<R>,
    ) -> Result<Option<Answer>> {
        let send = || {
            let mut reader = body().map_err(Failure::Final)?;
            let request = self.agent.put(url).header("Content-Length", length.to_string());
            answer(request.send(SendBody::from_reader(&mut reader)))
        };
        match self.retried(what, step, send) {
            Ok(answer) => Ok(Some(answer)),
            Err(Failure::Status { status: 403, .. }) if !self.is_ours(url) => Ok(None),
            Err(failure) => Err(self.explain_at(url, failure, what)),
        }
    }

    /// Whether an address is the hub's own, and not one of a store.
    fn is_ours(&self, url: &str) -> bool {
        url.strip_prefix(&self.settings.endpoint).is_some_and(|rest| rest.starts_with('/'))
    }

    fn explain_at(&self, url: &str, failure: Failure, what: &str) -> Error {
        if self.is_ours(url) { self.explain(failure, what) } else { explain_store(url, failure, what) }
    }

    /// The error of an address that the store refuses although the hub has just given it.
    pub(super) fn refused_by_store(&self, url: &str, what: &str) -> Error {
        explain_store(url, Failure::Status { status: 403, message: String::new(), wait: None }, what)
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.settings.endpoint)
    }

    fn attempt(
        &self,
        method: &str,
        url: &str,
        kind: Option<&str>,
        body: Option<&[u8]>,
    ) -> std::result::Result<Answer, Failure> {
        // The token is for the hub alone, not for the stores whose addresses it names.
        let token = self.settings.token.as_ref().filter(|_| self.is_ours(url)).map(|token| format!("Bearer {token}"));
        match (method, body) {
            ("POST", Some(body)) => {
                let mut request = self.agent.post(url);
                if let Some(token) = token {
                    request = request.header("Authorization", token);
                }
                if let Some(kind) = kind {
                    request = request.header("Content-Type", kind).header("Accept", accepted(kind));
                }
                answer(request.send(body))
            }
            _ => {
                let mut request = self.agent.get(url);
                if let Some(token) = token {
                    request = request.header("Authorization", token);
                }
                answer(request.call())
            }
        }
    }

    fn retried(
        &self,
        what: &str,
        step: &mut dyn FnMut(PushStep<'_>),
        attempt: impl Fn() -> std::result::Result<Answer, Failure>,
    ) -> std::result::Result<Answer, Failure> {
        let mut pause = self.pause;
        for _ in 1..ATTEMPTS {
            let wait = match attempt() {
                Err(Failure::Status { status: 429 | 500.., wait, .. }) => wait,
                Err(Failure::Connection(_)) => None,
                result => return result,
            };
            step(PushStep::Again(what));
            std::thread::sleep(wait.unwrap_or(pause).min(LONGEST_WAIT));
            pause *= 2;
        }
        attempt()
    }

    /// The error for an answer that is not as the hub's are.
    pub(super) fn not_understood(&self, id: &str, what: &str, of: &str) -> Error {
        Error::hub(id, format!("{} does not say {what} of {of}; is it a hub?", self.settings.endpoint))
    }

    fn explain(&self, failure: Failure, what: &str) -> Error {
        let Settings { endpoint, token_source, .. } = &self.settings;
        let (status, message) = match failure {
            Failure::Final(error) => return error,
            Failure::Connection(message) => {
                let again = "what had arrived is not sent again when the same upload is started anew";
                return Error::hub(what, format!("the connection to {endpoint} failed ({message}); {again}"));
            }
            Failure::Status { status, message, .. } => (status, message),
        };
        let advice = match status {
            401 => format!(
                "the hub does not accept the access token from {token_source}: set HF_TOKEN to a valid one with the right to write, \
                 from {endpoint}/settings/tokens"
            ),
            403 => format!(
                "the access token from {token_source} does not allow it: it needs the right to write to this repository, or to make \
                 one for its owner ({endpoint}/settings/tokens)"
            ),
            404 => format!(
                "there is no such repository, or it has no branch {} (a branch is made on its page, main is there from the start)",
                self.settings.revision
            ),
            409 | 412 => "the repository changed meanwhile: start the upload again".to_owned(),
            300..=399 => "the repository was renamed or moved: use its new id".to_owned(),
            413 => "a file is larger than the hub takes: split the model into smaller files".to_owned(),
            429 => "the hub limits the requests: wait, then start the upload again, which sends only what is missing"
                .to_owned(),
            500.. => "the hub has a problem: start the upload again later, which sends only what is missing".to_owned(),
            _ => "the hub refuses".to_owned(),
        };
        let message = if message.is_empty() { String::new() } else { format!(" (it says: {message})") };
        Error::hub(what, format!("{advice} (status {status}){message}"))
    }
}

/// The error of a store for large files, which knows nothing of tokens and repositories. Its address may hold a signature that
/// gives the right to write: the message names the host alone.
fn explain_store(url: &str, failure: Failure, what: &str) -> Error {
    let host = url.split("://").nth(1).unwrap_or(url).split(['/', '?', '#']).next().unwrap_or_default();
    let host = host.rsplit('@').next().unwrap_or_default();
    let again = "start the upload again, which sends only what is missing";
    let (status, message) = match failure {
        Failure::Final(error) => return error,
        Failure::Connection(message) => {
            let again = "what had arrived is not sent again when the same upload is started anew";
            let message = format!("the connection to the store for large files at {host} failed ({message}); {again}");
            return Error::hub(what, message);
        }
        Failure::Status { status, message, .. } => (status, message),
    };
    let advice = match status {
        401 | 403 => format!(
            "the store for large files at {host} does not take the address that the hub gave (it has a time limit; is this machine's \
             clock right, does a proxy change requests?): {again}"
        ),
        429 => format!("the store for large files at {host} limits the requests: wait, then {again}"),
        500.. => format!("the store for large files at {host} has a problem: later, {again}"),
        _ => format!("the store for large files at {host} refuses: {again}"),
    };
    let message = if message.is_empty() { String::new() } else { format!(" (it says: {message})") };
    Error::hub(what, format!("{advice} (status {status}){message}"))
}

/// Git LFS wants its own type accepted.
fn accepted(kind: &str) -> &str {
    if kind.contains("git-lfs") { kind } else { "application/json" }
}

fn answer(sent: std::result::Result<Response<Body>, ureq::Error>) -> std::result::Result<Answer, Failure> {
    let mut response = match sent {
        Ok(response) => response,
        Err(ureq::Error::Io(error)) => return Err(Failure::Connection(error.to_string())),
        Err(
            error @ (ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::Timeout(_)
            | ureq::Error::Tls(_)
            | ureq::Error::Protocol(_)),
        ) => return Err(Failure::Connection(error.to_string())),
        Err(other) => return Err(Failure::Final(Error::Invalid(format!("a request that cannot be made: {other}")))),
    };
    let header = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
    let (etag, wait, said) = (header("etag"), header("retry-after"), header("x-error-message"));
    let status = response.status().as_u16();
    let text = response.body_mut().with_config().limit(MAX_ANSWER).read_to_string();
    if !(200..300).contains(&status) {
        let body: Option<Value> = text.ok().and_then(|text| serde_json::from_str(&text).ok());
        let said = said.or_else(|| body?["error"].as_str().map(str::to_owned)).unwrap_or_default();
        let message = said.chars().filter(|c| !c.is_control()).take(300).collect();
        let wait = wait.and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
        return Err(Failure::Status { status, message, wait });
    }
    let text = text.map_err(|error| Failure::Connection(error.to_string()))?;
    // Stores answer with nothing or with XML.
    Ok(Answer { body: serde_json::from_str(&text).unwrap_or_default(), text, etag })
}
