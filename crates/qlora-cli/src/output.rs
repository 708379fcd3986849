//! Results on stdout, everything else on stderr; progress bars and colours on terminals alone.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anstream::ColorChoice;
use clap::ValueEnum;
use clap::builder::styling::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

/// Whether to use colours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Colors {
    /// On terminals, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Also into files and pipes.
    Always,
    /// Nowhere.
    Never,
}

impl Colors {
    /// Makes it hold for everything that is printed from here on.
    pub(crate) fn apply(self) {
        let choice = match self {
            Self::Auto => ColorChoice::Auto,
            Self::Always => ColorChoice::Always,
            Self::Never => ColorChoice::Never,
        };
        choice.write_global();
    }
}

/// Tokens that are trained; figures that matter.
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
/// Things to look at.
pub(crate) const WARNING: Style = AnsiColor::Yellow.on_default();
/// Things that are wrong.
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
/// Things that matter less.
pub(crate) const FAINT: Style = Style::new().dimmed();
/// Titles.
pub(crate) const TITLE: Style = Style::new().bold();

static QUIET: AtomicBool = AtomicBool::new(false);

/// From here on remarks and progress bars are left out.
pub(crate) fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Whether remarks and progress are left out.
pub(crate) fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Whether what goes to stderr has colours.
pub(crate) fn colors_on_stderr() -> bool {
    anstream::AutoStream::choice(&io::stderr()) != ColorChoice::Never
}

/// Prints a result. Colours are taken out where there is no terminal.
///
/// # Errors
/// If the reader of the output has closed it.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut stdout = anstream::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Prints a line of a result.
macro_rules! line {
    ($($part:tt)*) => { $crate::output::print(&format!("{}\n", format_args!($($part)*)))? };
}
pub(crate) use line;

/// Prints a result for programs.
///
/// # Errors
/// If the reader of the output has closed it.
pub(crate) fn print_json(value: &Value) -> io::Result<()> {
    print(&format!("{value:#}\n"))
}

/// Says something that is no result.
pub(crate) fn remark(text: impl std::fmt::Display) {
    if !QUIET.load(Ordering::Relaxed) {
        // Where stderr is closed there is nobody to tell.
        let _ = writeln!(anstream::stderr(), "{text}");
    }
}

/// Which of several processes of a run this is, for before its lines.
static SPEAKER: OnceLock<String> = OnceLock::new();

/// From here on what is said of errors and in the log begins with `speaker`.
pub(crate) fn set_speaker(speaker: String) {
    let _ = SPEAKER.set(speaker);
}

pub(crate) fn speaker() -> &'static str {
    SPEAKER.get().map_or("", String::as_str)
}

/// Says why a command failed.
pub(crate) fn error(error: &anyhow::Error) {
    let _ = writeln!(anstream::stderr(), "{}{BAD}error:{BAD:#} {error:#}", speaker());
}

/// Whether an error says that the reader of the output has closed it.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let cause = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// A bar over bytes or things: `{bytes} of {total_bytes}` or `{pos} of {len} answers`.
pub(crate) fn bar(title: &str, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(&format!("{title} {{bar:24}} {what}, {{eta}} left"));
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    if QUIET.load(Ordering::Relaxed) {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}

/// A callback that moves a bar to so many of so many bytes.
pub(crate) fn bytes_of(bar: &ProgressBar) -> impl FnMut(u64, u64) + '_ {
    |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    }
}

/// A callback that moves a bar to so many of so many things.
pub(crate) fn count_of(bar: &ProgressBar) -> impl FnMut(usize, usize) + '_ {
    |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_is_gone_is_found_below_other_errors() {
        let gone = io::Error::new(io::ErrorKind::BrokenPipe, "gone");
        assert!(is_broken_pipe(&anyhow::Error::from(gone).context("printing")));
        assert!(!is_broken_pipe(&anyhow::anyhow!("other")));
    }
}
