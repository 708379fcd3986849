//! `qlora completions`.

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::output;

/// Prints the completions of a shell.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  qlora completions bash > ~/.local/share/bash-completion/completions/qlora")]
pub(crate) struct Args {
    /// The shell.
    shell: Shell,
}

/// `Cli` is the whole program.
pub(crate) fn run<Cli: CommandFactory>(args: &Args) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "qlora", &mut text);
    Ok(output::print(&String::from_utf8_lossy(&text))?)
}
