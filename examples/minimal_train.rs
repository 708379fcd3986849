//! The least that trains: a model, a file, and defaults for everything else. The adapter goes to `output`.
//!
//!     cargo run --release --example minimal_train -- MODEL rows.jsonl

use anyhow::Context;
use qlora::trainer::TrainConfig;
use qlora::trainer::config::Paths;
use qlora::trainer::session::Session;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut config = TrainConfig::default();
    config.model.model_name_or_path = arguments.next().context("which model?")?;
    config.data.train_file = Paths::One(arguments.next().context("which file?")?.into());
    let session = Session::open(&config, |_, _| ())?;
    let (training, validation) = session.datasets()?;
    let summary = session.into_trainer(training, validation)?.run()?;
    println!("{} steps; adapter: {:?}", summary.steps, summary.adapter);
    Ok(())
}
