//! Fine-tunes a model as a TOML file says.
//!
//!     cargo run --release --example finetune -- examples/finetune.toml
//!     cargo run --release --example finetune -- my.toml --set training.learning_rate=1e-4 --set lora.r=32
//!     cargo run --release --example finetune --features cuda -- my.toml --nproc-per-node auto
//!
//! `examples/finetune.toml` lists every key. Ctrl-C, SIGTERM and SIGHUP save a checkpoint and stop with exit code 130, 143 or 129;
//! `resume_from_checkpoint = true` goes on from it, bit for bit. On several GPUs it starts itself once for each; under torchrun, Slurm or
//! Open MPI it is one of their processes.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use indicatif::{ProgressBar as Bar, ProgressStyle};
use qlora::card::Card;
use qlora::trainer::comm::{self, Communicator, Ranks, tcp::TcpOptions};
use qlora::trainer::launch::{self, HostOptions, Processes};
use qlora::trainer::progress::{LossPlot, ProgressBar};
use qlora::trainer::session::{Session, plan_on_card};
use qlora::trainer::{Interrupt, Outcome, TrainConfig};

/// Fine-tunes a model with QLoRA.
#[derive(Parser)]
struct Args {
    /// The configuration.
    config: PathBuf,
    /// Changes a key of it, as `section.key=value`.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The most GPU memory to use, in GB; the same as `--set training.memory_budget=24`.
    #[arg(long, value_name = "GB")]
    memory_budget: Option<f64>,
    /// Processes that train together, one on each GPU: a number, or `auto`.
    #[arg(long, value_name = "N|auto")]
    nproc_per_node: Option<Processes>,
    /// Load the model, print the memory plan, and stop. With --card nothing is loaded.
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: plan for a card by its name (`RTX 4090`, `T4`, `A100 40GB`) instead of this machine's, without loading weights.
    #[arg(long, requires = "dry_run")]
    card: Option<String>,
    /// That card with another memory, in GB as it is sold.
    #[arg(long, value_name = "GB", requires = "card")]
    card_memory: Option<f64>,
    /// That card behind a link to the host of so many GB/s, such as 6 for PCIe 3 x8, 12 for PCIe 3 x16, 25 for PCIe 4 x16.
    #[arg(long, value_name = "GB/S", requires = "card")]
    link: Option<f64>,
    /// Log more: -v what the run made of memory and plans, -vv in which steps.
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if let Some(code) = start_ranks(&args)? {
        return Ok(code);
    }
    let level = [tracing::Level::WARN, tracing::Level::INFO, tracing::Level::DEBUG][usize::from(args.verbose.min(2))];
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(level).init();
    let mut config = TrainConfig::from_toml_file(&args.config)?;
    for change in &args.set {
        let (key, value) = change.split_once('=').context("--set takes section.key=value")?;
        config.set(key.trim(), value.trim())?;
    }
    if let Some(budget) = args.memory_budget {
        config.set("training.memory_budget", &format!("{budget:?}"))?;
    }

    if let Some(name) = &args.card {
        plan_for(&config, name, args.card_memory, args.link)?;
        return Ok(ExitCode::SUCCESS);
    }
    let comm = if args.dry_run { Box::new(comm::Alone) } else { ranks()? };
    // The others say nothing but what concerns them alone.
    let first = comm.rank() == 0;
    let say = |text: &dyn std::fmt::Display| {
        if first {
            eprintln!("{text}");
        }
    };
    say(&format_args!("loading {}", config.model.model_name_or_path));
    let bar = Bar::new(0).with_style(ProgressStyle::with_template("{bar:24} {bytes} of {total_bytes}, {eta} left")?);
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let mut session = match args.dry_run {
        true => Session::open_dry_run(&config, progress)?,
        false => Session::open_on(&config, comm, progress)?,
    };
    bar.finish_and_clear();
    let memory = session.model().memory();
    say(&format_args!(
        "model {:.1} MB (of it frozen projections {:.1}), adapter {:.1} MB",
        memory.total() as f64 / 1e6,
        memory.projections as f64 / 1e6,
        memory.adapter as f64 / 1e6
    ));
    session.ranks_note().iter().for_each(|note| say(note));

    let (training, validation) = session.data()?;
    say(&training);
    for remark in training.remarks().into_iter().chain(validation.iter().flat_map(|data| data.remarks())) {
        say(&remark);
    }
    match session.plan_memory(&training)? {
        Some(plan) => {
            let note = session.compute_note().map(|note| format!("; {note}")).unwrap_or_default();
            say(&format_args!("memory plan: {plan}{note}"));
        }
        None => say(&"training on the CPU: there is no memory plan"),
    }
    if args.dry_run {
        if let Some(tokens) = session.longest_sequence()? {
            say(&format_args!("the longest single sequence that fits: {tokens} tokens"));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let output = config.training.output_dir.clone();
    // Only now is there something to save; until here signals end the program at once.
    let interrupt = Interrupt::on_ctrl_c()?;
    let mut trainer = session.into_trainer(training, validation)?.with_interrupt(interrupt.clone());
    if first {
        trainer = trainer
            .with_observer(ProgressBar::new())
            .with_observer(LossPlot::new(output.join("loss.svg"), "training loss"));
    }
    let summary = trainer.run()?;

    if summary.outcome == Outcome::Interrupted {
        // The progress bar has said so; after SIGHUP there is nobody to tell.
        return Ok(ExitCode::from(u8::try_from(interrupt.exit_code())?));
    }
    if first {
        println!("adapter: {}", output.display());
        println!("loss plot: {}", output.join("loss.svg").display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts a process for each GPU and returns the code to end with; none if this is one of them, or the only one.
fn start_ranks(args: &Args) -> anyhow::Result<Option<ExitCode>> {
    launch::end_with_launcher();
    if args.dry_run || launch::is_launched() || Ranks::from_env()?.is_some() {
        return Ok(None);
    }
    let mut options = HostOptions::default();
    options.nproc_per_node = args.nproc_per_node;
    Ok(options.share()?.map(|share| launch::launch(&share)).transpose()?.map(ExitCode::from))
}

/// The other processes of the run. One that is in the middle of a step when another is gone is ended.
fn ranks() -> anyhow::Result<Box<dyn Communicator>> {
    let when_lost = Arc::new(|error: &qlora::trainer::Error| {
        eprintln!("Error: {error}");
        std::process::exit(1);
    });
    Ok(comm::from_env(&TcpOptions { when_lost, ..TcpOptions::default() })?)
}

/// Prints what a run would be on a card that need not be here.
fn plan_for(config: &TrainConfig, name: &str, memory: Option<f64>, link: Option<f64>) -> anyhow::Result<()> {
    let mut card = Card::named(name)?;
    if let Some(gb) = memory {
        card = card.with_memory(gb)?;
    }
    if let Some(rate) = link {
        card = card.with_host_link(rate)?;
    }
    let plan = plan_on_card(config, &card)?;
    eprintln!("{}", plan.training);
    for remark in plan.training.remarks() {
        eprintln!("{remark}");
    }
    eprint!("{}", plan.on);
    Ok(())
}
