//! `qlora init`.

use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use qlora::inspect::{Precision, training_planner};
use qlora::open::{OpenOptions, open_config};
use qlora::trainer::TrainConfig;
use qlora::trainer::config::{EXAMPLE, documented_keys};
use qlora::trainer::session::lora_config;
use rustyline::DefaultEditor;

use super::run_args::KeyFlags;
use crate::output::{self, remark};

/// Writes a configuration with every key explained, and says what a run will take.
///
/// On a terminal, asks for what is not given.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  qlora init
  qlora init --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --target-modules all-linear")]
pub(crate) struct Args {
    /// The model: a folder, a GGUF file or a hub id.
    #[arg(long)]
    model: Option<String>,
    /// The training data: a file of rows, a folder, a pattern or the id of a data set on the hub.
    #[arg(long)]
    data: Option<PathBuf>,
    /// The file to write.
    #[arg(long, default_value = "qlora.toml")]
    out: PathBuf,
    /// Replace the file if it is there.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    keys: KeyFlags,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let out = &args.out;
    ensure!(
        args.force || !out.exists(),
        "{} is there already: choose another name by --out, or --force",
        out.display()
    );
    let mut config = TrainConfig::default();
    let model = given_or_asked(args.model.as_deref(), "--model", "Model (a folder, a GGUF file or a hub id)", None)?;
    config.set("model.model_name_or_path", &format!("{model:?}"))?;
    let data = args.data.as_ref().map(|path| path.display().to_string());
    let data = given_or_asked(data.as_deref(), "--data", "Data (a file of rows, a folder or a hub id)", None)?;
    config.set("data.train_file", &format!("{data:?}"))?;
    args.keys.apply(&mut config)?;
    if asks() && !args.keys.has("target_modules") {
        let answer = ask("Layers to adapt (attention, all-linear)", Some("attention"))?;
        match answer.as_str() {
            "attention" => {}
            "all-linear" => config.set("lora.target_modules", "\"all-linear\"")?,
            other => config.set("lora.target_modules", other)?,
        }
    }
    config.validate()?;
    std::fs::write(out, text(&config)?).with_context(|| out.display().to_string())?;
    output::print(&format!("{}\n", out.display()))?;
    say_what_it_takes(&config);
    remark(format!("next: qlora data {0}, then qlora train {0}", out.display()));
    Ok(())
}

/// Whether there is a user to ask.
fn asks() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

fn given_or_asked(given: Option<&str>, flag: &str, question: &str, default: Option<&str>) -> Result<String> {
    match given {
        Some(given) => Ok(given.to_owned()),
        None if asks() => ask(question, default),
        None => bail!("give {flag}; without it a terminal is needed to ask"),
    }
}

/// Asks until there is an answer.
fn ask(question: &str, default: Option<&str>) -> Result<String> {
    let mut editor = DefaultEditor::new()?;
    let prompt = default.map_or_else(|| format!("{question}: "), |default| format!("{question} [{default}]: "));
    loop {
        let line = editor.readline(&prompt).context("no answer: nothing is written")?;
        match (line.trim(), default) {
            ("", None) => {}
            ("", Some(default)) => return Ok(default.to_owned()),
            (answer, _) => return Ok(answer.to_owned()),
        }
    }
}

/// [`EXAMPLE`] with the values of `config`.
fn text(config: &TrainConfig) -> Result<String> {
    let values: toml::Table = config.to_toml().parse()?;
    let mut lines: Vec<String> = EXAMPLE.lines().map(str::to_owned).collect();
    for key in documented_keys() {
        let value = values.get(key.section).and_then(|section| section.get(key.name));
        // Empty lists and tables stand for values that are not given.
        let is_empty = |value: &toml::Value| match value {
            toml::Value::Array(list) => list.is_empty(),
            toml::Value::Table(table) => table.is_empty(),
            _ => false,
        };
        let given = value.filter(|value| !is_empty(value));
        if let Some(value) = given.filter(|value| !is_default(key.default, value)) {
            lines[key.line] = format!("{} = {value}", key.name);
        }
    }
    let text = lines
        .join("\n")
        .replace("cargo run --release --example finetune -- examples/finetune.toml", "qlora train qlora.toml")
        + "\n";
    // The written text has to parse back to the same configuration.
    let written = TrainConfig::from_toml_str(&text)?;
    ensure!(written == *config, "the written configuration would differ from what was asked for; please report this");
    Ok(text)
}

/// Whether a value is what the text says anyway: `2e-4` stays `2e-4`.
fn is_default(default: Option<&str>, value: &toml::Value) -> bool {
    let parsed = default.and_then(|text| format!("v = {text}").parse::<toml::Table>().ok()?.remove("v"));
    match (parsed, value) {
        (Some(toml::Value::Integer(default)), toml::Value::Float(value)) => default as f64 == *value,
        (Some(default), value) => default == *value,
        (None, _) => false,
    }
}

/// The memory of a step, where the model's configuration can be read.
fn say_what_it_takes(config: &TrainConfig) {
    let estimate = || -> Result<String> {
        let options = OpenOptions { revision: config.model.revision.clone(), ..OpenOptions::default() };
        let model = open_config(&config.model.model_name_or_path, &options)?;
        let precision = if config.model.load_in_4bit { Precision::Nf4Double } else { Precision::Bf16 };
        let (documents, length) = (config.training.per_device_train_batch_size, config.data.max_length);
        let planner = training_planner(&model, &lora_config(&config.lora)?, precision, documents, length)?;
        let (least, most) = (planner.leanest().peak as f64 / 1e9, planner.richest().peak as f64 / 1e9);
        Ok(format!(
            "a step of {documents} documents of {length} tokens takes {least:.2} GB of GPU memory at least, {most:.2} GB at full \
             speed"
        ))
    };
    match estimate() {
        Ok(estimate) => remark(estimate),
        Err(error) => remark(format!("what it takes is not known yet: {error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_means_what_was_asked_for_and_keeps_its_comments() {
        let mut config = TrainConfig::default();
        for (key, value) in [
            ("model.model_name_or_path", "\"some \\\"model\\\"\""),
            ("data.train_file", "\"a.jsonl\""),
            ("lora.r", "8"),
            ("lora.target_modules", "\"all-linear\""),
            ("training.memory_budget", "8"),
            ("training.warmup_steps", "10"),
            ("data.chat_template_kwargs", "{ enable_thinking = false }"),
        ] {
            config.set(key, value).unwrap();
        }
        let text = text(&config).unwrap();
        assert!(text.contains("\nr = 8\n") && text.contains("\nlearning_rate = 2e-4\n"), "{text}");
        assert!(text.contains("# Rank of the adapters.\n"));
        assert!(text.contains("# data_seed = 42"), "what has no value stays a comment");
        assert!(!text.contains("cargo run"));
    }

    #[test]
    fn defaults_write_the_example() {
        let mut config = TrainConfig::from_toml_str(EXAMPLE).unwrap();
        config.set("data.train_file", "\"data/train.jsonl\"").unwrap();
        let text = text(&config).unwrap();
        let differing = text.lines().zip(EXAMPLE.lines()).filter(|(a, b)| a != b).count();
        assert_eq!(differing, 1, "the command alone\n{text}");
    }
}
