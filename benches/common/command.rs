//! Code shared by the benches: parsing of the command line, writing of a results file.

use std::io::Write;
use std::path::Path;

/// The arguments `--name value` of the program.
pub(crate) struct Arguments(Vec<String>);

impl Arguments {
    pub(crate) fn read() -> Self {
        Self(std::env::args().collect())
    }

    pub(crate) fn value(&self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|argument| argument == name)?;
        self.0.get(at + 1).cloned()
    }

    pub(crate) fn number(&self, name: &str, default: usize) -> anyhow::Result<usize> {
        Ok(self.value(name).map_or(Ok(default), |text| text.parse())?)
    }

    /// The place and time of the run: the last columns of every results file.
    pub(crate) fn place(&self) -> String {
        ["--gpu", "--driver", "--commit", "--date"].map(|name| self.value(name).unwrap_or_default()).join(",")
    }
}

/// Appends a line to a CSV file, if there is one to be written.
pub(crate) fn append(path: Option<&str>, header: &str, line: &str) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let is_new = !Path::new(path).exists();
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    if is_new {
        writeln!(file, "{header}")?;
    }
    Ok(writeln!(file, "{line}")?)
}
