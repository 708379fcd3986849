//! The settings of the hub: its address, its cache and the access token, from options first, then from the environment
//! variables of Hugging Face's libraries.

use std::fs;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::hf_home::hf_home;
use crate::open::OpenOptions;

/// The time limit of a connection before the hub counts as unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The type of a hub repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    Dataset,
}

#[derive(Clone)]
pub(super) struct Settings {
    pub(super) kind: Kind,
    pub(super) endpoint: String,
    pub(super) cache: PathBuf,
    pub(super) token: Option<String>,
    /// The origin of the token, for messages.
    pub(super) token_source: String,
    pub(super) revision: String,
    pub(super) offline: bool,
    pub(super) progress: bool,
    /// Connections go through a proxy, so that the hub need not be reachable itself.
    pub(super) proxy: bool,
}

impl Settings {
    /// `env` gives the value of an environment variable, none if it is empty.
    pub(super) fn new(options: &OpenOptions, env: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let first = |names: &[&str]| names.iter().find_map(|name| env(name));
        let home = hf_home(&env);
        let cache = options.cache_dir.clone();
        let cache = cache.or_else(|| first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).map(PathBuf::from));
        let Some(cache) = cache.or_else(|| home.as_ref().map(|home| home.join("hub"))) else {
            return Err(Error::Invalid("there is no home folder to keep downloads in; set HF_HOME".to_owned()));
        };
        let cache = std::path::absolute(&cache).map_err(|error| Error::io(&cache, error))?;
        let (token, token_source) = find_token(options, &env, home);
        if let Some(token) = &token
            && !token.bytes().all(|b| b.is_ascii_graphic())
        {
            let message = format!("the access token from {token_source} has characters that no token has");
            return Err(Error::Invalid(message));
        }
        let revision = options.revision.clone().unwrap_or_else(|| "main".to_owned());
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        if !revision.chars().all(plain) || revision.split('/').any(|part| part.is_empty() || part.starts_with('.')) {
            return Err(Error::Invalid(format!("{revision:?} is not the name of a branch, a tag or a commit")));
        }
        let set = |name: &str| {
            env(name).is_some_and(|value| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        let endpoint = options.endpoint.clone().or_else(|| env("HF_ENDPOINT"));
        let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".to_owned()).trim_end_matches('/').to_owned();
        let proxies = ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
        Ok(Self {
            kind: Kind::Model,
            endpoint,
            cache,
            token,
            token_source,
            revision,
            offline: options.offline || set("HF_HUB_OFFLINE") || set("TRANSFORMERS_OFFLINE"),
            progress: options.progress,
            proxy: first(&proxies).is_some(),
        })
    }

    /// Whether the hub accepts connections; else why not. hf-hub itself would wait for minutes.
    pub(super) fn check_reachable(&self) -> std::result::Result<(), String> {
        if self.proxy {
            return Ok(());
        }
        let (rest, port) = match self.endpoint.split_once("://") {
            Some(("https", rest)) => (rest, 443),
            Some(("http", rest)) => (rest, 80),
            _ => return Err(format!("{:?} is not an http or https address", self.endpoint)),
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let address = if has_port { authority.to_owned() } else { format!("{authority}:{port}") };
        let mut reason = "no address found".to_owned();
        for address in address.to_socket_addrs().map_err(|error| error.to_string())? {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(_) => return Ok(()),
                Err(error) => reason = error.to_string(),
            }
        }
        Err(reason)
    }
}

/// The token and where it is from.
fn find_token(
    options: &OpenOptions,
    env: &impl Fn(&str) -> Option<String>,
    home: Option<PathBuf>,
) -> (Option<String>, String) {
    if let Some(token) = &options.token {
        return (Some(token.trim().to_owned()), "the options".to_owned());
    }
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(token) = env(name) {
            return (Some(token.trim().to_owned()), format!("the environment variable {name}"));
        }
    }
    let path = env("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home?.join("token")));
    let token = path.as_ref().and_then(|path| fs::read_to_string(path).ok());
    match (token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()), path) {
        (Some(token), Some(path)) => (Some(token), path.display().to_string()),
        _ => (None, String::new()),
    }
}
