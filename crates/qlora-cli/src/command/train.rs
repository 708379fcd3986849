//! `qlora train`.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use qlora::trainer::comm::tcp::TcpOptions;
use qlora::trainer::comm::{self, Alone, Communicator, Ranks};
use qlora::trainer::config::Tracker;
use qlora::trainer::data::TokenCache;
use qlora::trainer::launch::{self, HostOptions, Processes};
use qlora::trainer::progress::{Dashboard, DashboardFacts, HtmlReport, LossPlot, Observer, ProgressBar, ReportFacts};
use qlora::trainer::session::{Session, plan_on_card};
use qlora::trainer::{Interrupt, Outcome, TrainConfig};

use super::run_args::RunArgs;
use crate::card::CardArgs;
use crate::logging;
use crate::output::{self, remark};

/// Fine-tunes a model.
///
/// An option that is set by no flag and no file has the default that its flag names. Ctrl-C, SIGTERM and SIGHUP save a
/// checkpoint and end with exit code 130, 143 or 129; --resume-from-checkpoint true goes on from it, bit for bit.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  qlora train qlora.toml
  qlora train qlora.toml --learning-rate 1e-4 --output-dir second
  qlora train HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl --target-modules all-linear
  qlora train HuggingFaceTB/SmolLM2-135M-Instruct 'data/*.parquet' more.csv --val-size 0.05
  zcat rows.jsonl.gz | qlora train model - --streaming --max-steps 1000
  qlora train qlora.toml --memory-budget 8 --dry-run
  qlora train qlora.toml --nproc-per-node auto
  qlora train qlora.toml --nproc-per-node auto --nnodes 2 --node-rank 0 --master-addr HOST
  qlora train qlora.toml --dry-run --card T4")]
pub(crate) struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// Load the model, say what the run takes and what it would do, and stop.
    #[arg(long)]
    dry_run: bool,
    /// Train on several GPUs of this host, with a process for each: a number, or auto for all of them.
    #[arg(long, value_name = "N", conflicts_with = "dry_run")]
    nproc_per_node: Option<Processes>,
    /// Train on several hosts, with this command on each: their number.
    #[arg(long, value_name = "N", conflicts_with = "dry_run")]
    nnodes: Option<usize>,
    /// Which of the hosts this is, from 0.
    #[arg(long, value_name = "N")]
    node_rank: Option<usize>,
    /// Where host 0 is, on every host.
    #[arg(long, value_name = "HOST")]
    master_addr: Option<String>,
    /// The port on host 0 [default: 29500].
    #[arg(long, value_name = "PORT")]
    master_port: Option<u16>,
    /// Show progress as one line instead of the view with curve and figures.
    #[arg(long)]
    no_tui: bool,
    // With --dry-run only; nothing is loaded then.
    #[command(flatten)]
    card: CardArgs,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(code) = start_ranks(args)? {
        return Ok(code);
    }
    let config = args.run.config()?;
    if let Some(card) = args.card.card()? {
        ensure!(args.dry_run, "--card only plans: give it with --dry-run");
        let plan = plan_on_card(&config, &card)?;
        remark(&plan.training);
        plan.training.remarks().into_iter().for_each(remark);
        output::print(&plan.on.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let upload = config.training.hub_repository();
    if upload.is_some() && !args.dry_run && Ranks::from_env()?.is_none_or(|ranks| ranks.place.rank == 0) {
        #[cfg(feature = "hub")]
        super::push::check_before_run()?;
        #[cfg(not(feature = "hub"))]
        anyhow::bail!("push_to_hub in [training] needs a program that is built with the feature `hub`");
    }
    let comm = if args.dry_run { Box::new(Alone) } else { ranks()? };
    remark(format!("loading {}", config.model.model_name_or_path));
    let bar = output::bar("", "{bytes} of {total_bytes}");
    let progress = output::bytes_of(&bar);
    let mut session = match args.dry_run {
        true => Session::open_dry_run(&config, progress)?,
        false => Session::open_on(&config, comm, progress)?,
    };
    bar.finish_and_clear();
    let memory = session.model().memory();
    remark(format!(
        "model {:.1} MB (of it frozen projections {:.1}), adapter {:.1} MB",
        memory.total() as f64 / 1e6,
        memory.projections as f64 / 1e6,
        memory.adapter as f64 / 1e6
    ));
    session.base_note().into_iter().for_each(remark);
    if let Some(note) = session.ranks_note() {
        remark(note);
    }
    let (training, validation) = session.data()?;
    remark(&training);
    session.balance_note(&training)?.into_iter().for_each(remark);
    if let Some(validation) = &validation {
        remark(format!("to evaluate on: {}", validation.stats()));
    }
    training.remarks().into_iter().chain(validation.iter().flat_map(|data| data.remarks())).for_each(remark);
    let mut facts = ReportFacts::default();
    facts.title.clone_from(&config.model.model_name_or_path);
    facts.configuration = config.to_toml();
    facts.data = training.to_string();
    facts.data_fingerprint = training.fingerprint();
    match session.plan_memory(&training)? {
        Some(plan) => {
            let note = session.compute_note().map(|note| format!("; {note}")).unwrap_or_default();
            remark(format!("memory plan: {plan}{note}"));
            session.peaks_note().into_iter().for_each(remark);
            (facts.memory_plan, facts.planned_peak) = (Some(plan.to_string()), Some(plan.peak));
        }
        None => remark("training on the CPU: there is no memory plan"),
    }
    if args.dry_run {
        if let Some(tokens) = session.longest_sequence()? {
            remark(format!("the longest single sequence that fits: {tokens} tokens"));
        }
        remark(would_do(&config));
        return Ok(ExitCode::SUCCESS);
    }
    let output = config.training.output_dir.clone();
    // Only now is there something to save; until here signals end the program at once.
    let interrupt = Interrupt::on_ctrl_c()?;
    let (plot, report) = (output.join("loss.svg"), output.join("report.html"));
    let first = session.rank() == 0;
    let mut trainer = session.into_trainer(training, validation)?.with_interrupt(interrupt.clone());
    if first {
        if let Some(progress) = progress_of(args, &facts) {
            trainer = trainer.with_observer(progress);
        }
        trainer = trainer
            .with_observer(LossPlot::new(plot, "training loss"))
            .with_observer(HtmlReport::new(report.clone(), facts));
    }
    let ended = trainer.run();
    logging::set_view(None);
    let summary = ended?;
    if summary.outcome == Outcome::Interrupted {
        // The progress bar has said so; after SIGHUP there is nobody to tell.
        return Ok(ExitCode::from(u8::try_from(interrupt.exit_code()).unwrap_or(u8::MAX)));
    }
    if !first {
        return Ok(ExitCode::SUCCESS);
    }
    let folder = output.display();
    output::print(&format!("adapter: {folder}\nreport: {}\n", report.display()))?;
    remark(format!("try it: qlora chat --adapter {folder}"));
    #[cfg(feature = "hub")]
    if let Some(id) = &upload {
        end_when_asked(&interrupt);
        super::push::after_run(&config, id)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// From here on a signal ends the process: there is nothing left to save.
#[cfg(feature = "hub")]
fn end_when_asked(interrupt: &Interrupt) {
    interrupt.clear();
    let interrupt = interrupt.clone();
    std::thread::spawn(move || {
        while !interrupt.requested() {
            std::thread::sleep(Duration::from_millis(100));
        }
        std::process::exit(interrupt.exit_code());
    });
}

/// The view on a terminal, a line where that is wanted or the terminal is small, lines where there is none; nothing with -q.
fn progress_of(args: &Args, report: &ReportFacts) -> Option<Box<dyn Observer>> {
    if output::is_quiet() {
        return None;
    }
    let mut facts = DashboardFacts::default();
    facts.title.clone_from(&report.title);
    (facts.planned_peak, facts.colors) = (report.planned_peak, output::colors_on_stderr());
    let Some(view) = (!args.no_tui).then(|| Dashboard::on_terminal(facts)).flatten() else {
        return Some(Box::new(ProgressBar::new()));
    };
    logging::set_view(Some(view.above()));
    Some(Box::new(view))
}

/// Starts a process for each GPU, unless this is one of them; then returns the exit code of the processes.
fn start_ranks(args: &Args) -> Result<Option<ExitCode>> {
    launch::end_with_launcher();
    if args.dry_run || launch::is_launched() || Ranks::from_env()?.is_some() {
        return Ok(None);
    }
    let mut options = HostOptions::default();
    options.nproc_per_node = args.nproc_per_node;
    (options.nnodes, options.node_rank) = (args.nnodes, args.node_rank);
    (options.master_addr, options.master_port) = (args.master_addr.clone(), args.master_port);
    match options.share()? {
        Some(share) => Ok(Some(ExitCode::from(launch::launch(&share)?))),
        None => Ok(None),
    }
}

/// The other processes of the run. One that hangs in a step while another is gone is ended.
fn ranks() -> Result<Box<dyn Communicator>> {
    let when_lost = Arc::new(|error: &qlora::trainer::Error| {
        output::error(&anyhow::anyhow!("{error}"));
        // Libraries that are in the middle of something may keep an orderly end from coming.
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_secs(2));
            std::process::abort();
        });
        std::process::exit(1);
    });
    let comm = comm::from_env(&TcpOptions { when_lost, ..TcpOptions::default() })?;
    if comm.size() > 1 && !launch::is_launched() {
        // Where nobody else says whose lines they are.
        output::set_speaker(format!("[rank {}] ", comm.rank()));
    }
    if comm.rank() > 0 {
        output::set_quiet(true);
    }
    Ok(comm)
}

/// A list of the files that a run would write.
fn would_do(config: &TrainConfig) -> String {
    let options = &config.training;
    let folder = options.output_dir.display();
    let checkpoints = match (options.save_steps, options.save_total_limit) {
        (0, _) => "a checkpoint at the end".to_owned(),
        (every, 0) => format!("a checkpoint every {every} steps"),
        (every, kept) => format!("a checkpoint every {every} steps, of which the last {kept} are kept"),
    };
    let until = match options.max_steps {
        steps if steps > 0 => format!("{steps} steps"),
        _ => format!("{} epochs", options.num_train_epochs),
    };
    let samples = options.sample_every.map_or("", |_| ", samples.jsonl");
    let board = match options.report_to.contains(Tracker::TensorBoard) {
        true => format!(", and to {}: TensorBoard's events", options.resolved_logging_dir().display()),
        false => String::new(),
    };
    let upload = options.hub_repository().map_or_else(String::new, |id| {
        let private = if options.hub_private_repo { " (private, if it is new)" } else { "" };
        format!("; then it would upload the adapter to {id}{private}")
    });
    let tokens = match TokenCache::of(config, true).filter(|_| !config.data.streaming) {
        Some(cache) => format!("; tokens of sets of 1 MB and more to {}", cache.folder.display()),
        None => String::new(),
    };
    format!(
        "a run would take {until} and write to {folder}: the adapter, {checkpoints}, metrics.jsonl, report.html, \
         loss.svg{samples}{board}{tokens}{upload}"
    )
}
