//! Whether the hub can be used, for people who want to know before a run.

use std::path::PathBuf;

use super::settings::Settings;
use crate::error::Result;
use crate::open::OpenOptions;

/// The hub's settings on this machine.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HubStatus {
    /// Its address (`HF_ENDPOINT`).
    pub endpoint: String,
    /// The folder of downloads (`HF_HUB_CACHE`, `HF_HOME`).
    pub cache: PathBuf,
    /// The origin of the access token; none if there is none.
    pub token_source: Option<String>,
    /// Whether it is not to be asked (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// Whether it accepts connections, or why not. Not tried where it is not to be asked.
    pub reachable: std::result::Result<(), String>,
}

impl HubStatus {
    /// Looks at options and environment, and connects.
    ///
    /// # Errors
    /// If the options make no sense, such as a token with characters that no token has.
    pub fn of(options: &OpenOptions) -> Result<Self> {
        let settings = Settings::new(options, super::environment)?;
        let reachable = if settings.offline { Ok(()) } else { settings.check_reachable() };
        Ok(Self {
            token_source: settings.token.as_ref().map(|_| settings.token_source.clone()),
            endpoint: settings.endpoint,
            cache: settings.cache,
            offline: settings.offline,
            reachable,
        })
    }
}
