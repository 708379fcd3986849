//! The current time as chat templates see it.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use chrono::{DateTime, FixedOffset, Local, SecondsFormat};
use minijinja::{Error as JinjaError, ErrorKind};

use crate::error::{Error, Result};

/// The moment that a template's `strftime_now` writes, in local time. Its text is RFC 3339 (`2026-02-28T09:30:00+01:00`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TemplateTime(DateTime<FixedOffset>);

impl TemplateTime {
    /// The time on this machine's clock, in its time zone.
    pub fn now() -> Self {
        Self(Local::now().fixed_offset())
    }

    /// The time in a format of `strftime`.
    pub(super) fn format(self, format: &str) -> std::result::Result<String, JinjaError> {
        let mut text = String::new();
        match write!(text, "{}", self.0.format(format)) {
            Ok(()) => Ok(text),
            Err(_) => Err(JinjaError::new(
                ErrorKind::InvalidOperation,
                format!("strftime_now: unknown date format {format:?}"),
            )),
        }
    }
}

impl fmt::Display for TemplateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_rfc3339_opts(SecondsFormat::Secs, false))
    }
}

impl FromStr for TemplateTime {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = DateTime::parse_from_rfc3339(text);
        parsed.map(Self).map_err(|error| Error::Invalid(format!("{text:?} is not a time of RFC 3339: {error}")))
    }
}
