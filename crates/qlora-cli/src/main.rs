//! `qlora`: fine-tuning with QLoRA, from data to a merged model. Each command is a module of [`command`]; what they do is in the
//! library.

mod card;
mod chat;
mod command;
mod cuda_libraries;
#[cfg(not(feature = "cuda"))]
mod front;
mod importance;
mod logging;
mod model;
mod output;
#[cfg(not(feature = "cuda"))]
mod platform;
mod sampling;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use output::Colors;

/// Fine-tunes language models with QLoRA: a frozen 4-bit base, trained LoRA adapters.
#[derive(Parser)]
#[command(name = "qlora", version, propagate_version = true, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options common to all commands.
#[derive(clap::Args)]
struct Global {
    /// Log more: -v what a run makes of memory and plans, -vv its steps.
    #[arg(short, long, action = clap::ArgAction::Count, global = true, conflicts_with = "quiet")]
    verbose: u8,
    /// Print results and errors only.
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Whether to use colours.
    #[arg(long, value_enum, default_value_t, global = true, value_name = "WHEN")]
    color: Colors,
}

const EXAMPLES: &str = "\
Examples:
  qlora doctor                                             what this machine can do
  qlora init --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl
  qlora train qlora.toml                                   as the file says
  qlora train HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl --learning-rate 1e-4
  qlora chat --adapter output
  qlora merge --adapter output --out model.gguf
  qlora export --adapter output --type q4_k_m --out model.gguf --modelfile
  qlora push output me/my-adapter --private";

#[derive(Subcommand)]
enum Command {
    Train(command::train::Args),
    Chat(command::chat::Args),
    Generate(command::generate::Args),
    Eval(command::eval::Args),
    Merge(command::merge::Args),
    Export(command::export::Args),
    Quantize(command::quantize::Args),
    #[cfg(feature = "hub")]
    Push(command::push::Args),
    Inspect(command::inspect::Args),
    Compare(command::compare::Args),
    Data(command::data::Args),
    Init(command::init::Args),
    Doctor(command::doctor::Args),
    Adapters(command::adapters::Args),
    Completions(command::completions::Args),
}

impl Command {
    /// Whether it runs on a GPU where there is one.
    #[cfg(not(feature = "cuda"))]
    fn uses_gpu(&self) -> bool {
        matches!(
            self,
            Self::Train(_) | Self::Chat(_) | Self::Generate(_) | Self::Eval(_) | Self::Compare(_) | Self::Doctor(_)
        )
    }
}

/// Whether the arguments say that no GPU is used: the device is the CPU, or a run is planned for a card by its name.
#[cfg(not(feature = "cuda"))]
fn needs_no_gpu(arguments: impl Iterator<Item = String>) -> bool {
    let arguments: Vec<String> = arguments.collect();
    let asks =
        |argument: &String| argument == "--device=cpu" || argument == "--card" || argument.starts_with("--card=");
    arguments.iter().any(asks) || arguments.windows(2).any(|pair| pair == ["--device", "cpu"])
}

fn main() -> ExitCode {
    let Cli { global, command } = Cli::parse();
    global.color.apply();
    logging::start(global.verbose, global.quiet);
    output::set_quiet(global.quiet);
    #[cfg(not(feature = "cuda"))]
    if command.uses_gpu() {
        match (front::hand_over(), &command) {
            // It says itself what is missing.
            (_, Command::Doctor(_)) => (),
            (Ok(remark), _) => remark.into_iter().for_each(output::remark),
            (Err(_), _) if needs_no_gpu(std::env::args()) => (),
            (Err(error), _) => return report(Err(error)),
        }
    }
    let done = match command {
        Command::Train(args) => return report(command::train::run(&args)),
        Command::Chat(args) => command::chat::run(args),
        Command::Generate(args) => command::generate::run(&args),
        Command::Eval(args) => command::eval::run(&args),
        Command::Merge(args) => command::merge::run(&args),
        Command::Export(args) => command::export::run(&args),
        Command::Quantize(args) => command::quantize::run(&args),
        #[cfg(feature = "hub")]
        Command::Push(args) => command::push::run(&args),
        Command::Inspect(args) => command::inspect::run(&args),
        Command::Compare(args) => command::compare::run(&args),
        Command::Data(args) => command::data::run(&args),
        Command::Init(args) => command::init::run(&args),
        Command::Doctor(args) => command::doctor::run(&args),
        Command::Adapters(args) => command::adapters::run(&args),
        Command::Completions(args) => command::completions::run::<Cli>(&args),
    };
    report(done.map(|()| ExitCode::SUCCESS))
}

/// The exit code of a command, with its error printed: 1 for an error, 2 (by clap) for wrong arguments.
fn report(done: anyhow::Result<ExitCode>) -> ExitCode {
    match done {
        Ok(code) => code,
        // `qlora data ... | head`: nobody reads on, which is no error.
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error);
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
