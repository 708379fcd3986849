//! Fine-tunes a model as a TOML file says.
//!
//!     cargo run --release --example finetune -- examples/finetune.toml
//!     cargo run --release --example finetune -- my.toml --set training.learning_rate=1e-4 --set lora.r=32
//!
//! `examples/finetune.toml` lists every key. Ctrl-C, SIGTERM and SIGHUP save a checkpoint and stop with exit code 130, 143 or 129;
//! `resume_from_checkpoint = true` goes on from it, bit for bit.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use indicatif::{ProgressBar as Bar, ProgressStyle};
use qlora::card::Card;
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

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
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
        return plan_for(&config, name, args.card_memory, args.link);
    }
    eprintln!("loading {}", config.model.model_name_or_path);
    let bar = Bar::new(0).with_style(ProgressStyle::with_template("{bar:24} {bytes} of {total_bytes}, {eta} left")?);
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let mut session =
        if args.dry_run { Session::open_dry_run(&config, progress)? } else { Session::open(&config, progress)? };
    bar.finish_and_clear();
    let memory = session.model().memory();
    eprintln!(
        "model {:.1} MB (of it frozen projections {:.1}), adapter {:.1} MB",
        memory.total() as f64 / 1e6,
        memory.projections as f64 / 1e6,
        memory.adapter as f64 / 1e6
    );

    let (training, validation) = session.data()?;
    eprintln!("{training}");
    for remark in training.remarks().into_iter().chain(validation.iter().flat_map(|data| data.remarks())) {
        eprintln!("{remark}");
    }
    match session.plan_memory(&training)? {
        Some(plan) => {
            let note = session.compute_note().map(|note| format!("; {note}")).unwrap_or_default();
            eprintln!("memory plan: {plan}{note}");
        }
        None => eprintln!("training on the CPU: there is no memory plan"),
    }
    if args.dry_run {
        if let Some(tokens) = session.longest_sequence()? {
            eprintln!("the longest single sequence that fits: {tokens} tokens");
        }
        return Ok(());
    }
    let output = config.training.output_dir.clone();
    // Only now is there something to save; until here signals end the program at once.
    let interrupt = Interrupt::on_ctrl_c()?;
    let summary = session
        .into_trainer(training, validation)?
        .with_interrupt(interrupt.clone())
        .with_observer(ProgressBar::new())
        .with_observer(LossPlot::new(output.join("loss.svg"), "training loss"))
        .run()?;

    if summary.outcome == Outcome::Interrupted {
        // The progress bar has said so; after SIGHUP there is nobody to tell.
        std::process::exit(interrupt.exit_code());
    }
    println!("adapter: {}", output.display());
    println!("loss plot: {}", output.join("loss.svg").display());
    Ok(())
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
