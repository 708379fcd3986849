//! The whole way on the demo task as a program of its own: measure the base model, fine-tune it, measure it again.
//! `scripts/quickstart.sh` does the same by the command `qlora`.
//!
//!     cargo run --release --example quickstart -- --model SmolLM2-135M-Instruct.gguf

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use indicatif::{ProgressBar as Bar, ProgressStyle};
use qlora::model::CausalLm;
use qlora::trainer::data::{Record, read_records};
use qlora::trainer::encoder::ModelText;
use qlora::trainer::exact_match::{AnsweredRow, answers};
use qlora::trainer::progress::{LossPlot, ProgressBar};
use qlora::trainer::session::Session;
use qlora::trainer::{Interrupt, Outcome, TrainConfig, memory};

/// Fine-tunes the demo model on the demo task.
#[derive(Parser)]
struct Args {
    /// The model: a folder, a GGUF file or a hub id.
    #[arg(long)]
    model: String,
    /// The configuration.
    #[arg(long, default_value = "examples/quickstart.toml")]
    config: PathBuf,
    /// The rows to measure on.
    #[arg(long, default_value = "examples/data/demo_heldout.jsonl")]
    heldout: PathBuf,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let args = Args::parse();
    let start = Instant::now();
    let mut config = TrainConfig::from_toml_file(&args.config)?;
    config.model.model_name_or_path = args.model;
    let heldout = read_records(&args.heldout)?;

    println!("loading and quantizing {}", config.model.model_name_or_path);
    let session = Session::open(&config, |_, _| ())?;
    let (training, validation) = session.datasets()?;
    println!("training data: {}", training.stats());

    // The trainer takes the model; the tokenizer and the template stay here.
    let text = session.text().clone();
    let before = measure("before", session.model(), &text, &heldout)?;

    let output = config.training.output_dir.clone();
    let plot = output.join("loss.svg");
    let interrupt = Interrupt::on_ctrl_c()?;
    let mut trainer = session
        .into_trainer(training, validation)?
        .with_interrupt(interrupt.clone())
        .with_observer(ProgressBar::new())
        .with_observer(LossPlot::new(&plot, "demo task: training loss"));
    let summary = trainer.run()?;
    if summary.outcome == Outcome::Interrupted {
        std::process::exit(interrupt.exit_code());
    }
    let model = trainer.into_model();
    let after = measure("after", model.model(), &text, &heldout)?;
    report(&before, &after, &plot, summary.adapter.as_deref());
    let peak = memory::peak_resident().unwrap_or_default() as f64 / 1e9;
    println!("{:.0} s in all, peak memory {peak:.2} GB", start.elapsed().as_secs_f64());
    Ok(())
}

fn measure(when: &str, model: &CausalLm, text: &ModelText, heldout: &[Record]) -> anyhow::Result<Vec<AnsweredRow>> {
    let style = ProgressStyle::with_template("{msg} {bar:24} {pos}/{len} answers")?;
    let bar = Bar::new(heldout.len() as u64).with_style(style).with_message(format!("measuring {when}"));
    let answers =
        answers(model, text.tokenizer(), &text.encoder(), heldout, 48, 25, |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    println!("exact match {when} training: {} of {}", exact(&answers), answers.len());
    Ok(answers)
}

fn exact(answers: &[AnsweredRow]) -> usize {
    answers.iter().filter(|answer| answer.is_exact()).count()
}

fn report(before: &[AnsweredRow], after: &[AnsweredRow], plot: &Path, adapter: Option<&Path>) {
    println!("\nfor example: {}", before[0].prompt);
    println!("  expected   {}", before[0].expected);
    println!("  before     {}", before[0].given.replace('\n', " "));
    println!("  after      {}", after[0].given);
    println!("\nheld-out exact match: {} -> {} of {}", exact(before), exact(after), after.len());
    println!("loss plot: {}", plot.display());
    if let Some(adapter) = adapter {
        println!("adapter:   {} (PEFT loads it too)", adapter.display());
    }
}
