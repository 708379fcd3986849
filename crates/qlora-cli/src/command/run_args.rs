//! The arguments that define a run: a TOML file, or a model and data, and any key of the configuration as a flag.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Arg, ArgMatches, Command, FromArgMatches};
use qlora::trainer::TrainConfig;
use qlora::trainer::config::{DocumentedKey, Paths, documented_keys};

/// The arguments that define a run.
#[derive(clap::Args)]
pub(crate) struct RunArgs {
    /// A TOML file (`qlora init` writes one); or the model: a folder, a GGUF file or a hub id.
    #[arg(value_name = "CONFIG or MODEL")]
    what: String,
    /// After a model: what to train on. Files of rows (JSONL, JSON, CSV, TSV, Parquet, text; also .gz and .zst), folders, patterns, -
    /// for standard input, or ids of data sets on the hub.
    #[arg(value_name = "DATA")]
    data: Vec<PathBuf>,
    /// Changes a key of the configuration, as `section.key=value`.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    keys: KeyFlags,
}

impl RunArgs {
    /// The configuration that is meant, checked.
    ///
    /// # Errors
    /// If the file cannot be read, a key is unknown or a value makes no sense.
    pub(crate) fn config(&self) -> Result<TrainConfig> {
        let is_file = self.what.to_ascii_lowercase().ends_with(".toml");
        let mut config = match (is_file, self.data.as_slice()) {
            (true, []) => TrainConfig::from_toml_file(&self.what)?,
            (true, _) => bail!("{} says what to train on: leave out the other files, or set `train_file`", self.what),
            (false, data) => {
                let mut config = TrainConfig::default();
                config.model.model_name_or_path.clone_from(&self.what);
                config.data.train_file = Paths::Many(data.to_vec());
                config
            }
        };
        for change in &self.set {
            let (key, value) = change.split_once('=').context("--set takes section.key=value")?;
            config.set(key.trim(), value.trim())?;
        }
        self.keys.apply(&mut config)?;
        if !is_file && config.data.train_file.is_empty() && config.data.datasets.is_empty() {
            bail!("nothing to train on: write `qlora train {} DATA.jsonl`, or the name of a TOML file", self.what);
        }
        config.validate()?;
        Ok(config)
    }
}

/// The keys of a configuration as flags: `training.learning_rate` is `--learning-rate`.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeyFlags {
    changes: Vec<(&'static DocumentedKey, String)>,
}

impl KeyFlags {
    /// Sets what was given.
    ///
    /// # Errors
    /// If a value does not fit its key.
    pub(crate) fn apply(&self, config: &mut TrainConfig) -> Result<()> {
        for (key, value) in &self.changes {
            config.set(&key.path(), &as_toml(key, value))?;
        }
        Ok(())
    }

    /// Whether a key was given.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.changes.iter().any(|(key, _)| key.name == name)
    }
}

/// `q_proj,v_proj` is a list, which TOML would write with brackets and quotes; `0.7,0.3` is one, which it would write with brackets.
fn as_toml(key: &DocumentedKey, value: &str) -> String {
    if key.name == "interleave_probs" && !value.trim_start().starts_with('[') {
        return format!("[{value}]");
    }
    let is_name =
        |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.".contains(&b));
    let list =
        key.name == "target_modules" && value != "all-linear" && value.split(',').all(|part| is_name(part.trim()));
    match list {
        true => {
            format!("[{}]", value.split(',').map(|part| format!("{:?}", part.trim())).collect::<Vec<_>>().join(", "))
        }
        false => value.to_owned(),
    }
}

impl clap::Args for KeyFlags {
    fn augment_args(command: Command) -> Command {
        command.args(documented_keys().iter().map(flag))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for KeyFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given =
            documented_keys().iter().filter_map(|key| Some((key, matches.get_one::<String>(key.name)?.clone())));
        Ok(Self { changes: given.collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn flag(key: &'static DocumentedKey) -> Arg {
    let default = key.default.map_or_else(String::new, |default| format!(" [default: {default}]"));
    let arg = Arg::new(key.name)
        .long(key.name.replace('_', "-"))
        .alias(key.name)
        .help(format!("{}{default}", key.help))
        .help_heading(format!("[{}]", key.section))
        .value_name(if key.is_flag() { "BOOL" } else { "VALUE" })
        .allow_negative_numbers(true);
    match key.is_flag() {
        // `--packing` and `--packing=false`; `--packing data.jsonl` must not take the file.
        true => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
        false => arg,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        run: RunArgs,
    }

    fn parsed(args: &[&str]) -> Result<TrainConfig> {
        Program::try_parse_from(["qlora"].iter().chain(args))?.run.config()
    }

    #[test]
    fn a_model_and_data_are_enough() {
        let config = parsed(&["org/name", "a.jsonl", "b.jsonl"]).unwrap();
        assert_eq!(config.model.model_name_or_path, "org/name");
        assert_eq!(config.data.train_file.as_slice().len(), 2);
        let expected = TrainConfig { model: config.model.clone(), data: config.data.clone(), ..TrainConfig::default() };
        assert_eq!(config, expected);
        let message = parsed(&["org/name"]).unwrap_err().to_string();
        assert!(message.contains("qlora train org/name DATA.jsonl"), "{message}");
    }

    #[test]
    fn every_key_is_a_flag() {
        let flags = ["--learning-rate", "1e-5", "--packing", "--r=8", "--max-steps", "-1", "--load-in-4bit=false"];
        let config = parsed(&[&["m", "d.jsonl", "--target_modules", "q_proj, v_proj"], &flags[..]].concat()).unwrap();
        assert_eq!((config.training.learning_rate, config.lora.r, config.data.packing), (1e-5, 8, true));
        assert!(!config.model.load_in_4bit);
        assert_eq!(
            config.lora.target_modules,
            qlora::trainer::config::Targets::List(vec!["q_proj".into(), "v_proj".into()])
        );
        let mixed = ["--datasets", "[{ path = \"b.csv\", field = \"t\" }]", "--interleave-probs", "0.7, 0.3"];
        let config = parsed(&[&["m", "d.jsonl", "--mix-strategy", "interleave_under"], &mixed[..]].concat()).unwrap();
        assert_eq!(config.data.datasets[0].field.as_deref(), Some("t"));
        assert_eq!(config.data.interleave_probs, [0.7, 0.3]);
        let config = parsed(&[&["m", "--datasets"], &mixed[1..2]].concat()).unwrap();
        assert!(config.data.train_file.is_empty());
        let config = parsed(&["m", "--packing", "d.jsonl", "--target-modules", "all-linear"]).unwrap();
        assert_eq!(config.data.train_file.as_slice()[0].to_str(), Some("d.jsonl"));
        let message = parsed(&["m", "d.jsonl", "--learning-rate", "fast"]).unwrap_err().to_string();
        assert!(message.contains("learning_rate"), "{message}");
        assert!(parsed(&["m", "d.jsonl", "--learning-rat", "1"]).unwrap_err().to_string().contains("--learning-rate"));
    }

    #[test]
    fn a_file_says_what_to_train_on_and_flags_change_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        std::fs::write(&path, "[model]\nmodel_name_or_path = \"m\"\n[data]\ntrain_file = \"t.jsonl\"\n").unwrap();
        let path = path.to_str().unwrap();
        let config = parsed(&[path, "--set", "lora.r=4", "--seed", "7"]).unwrap();
        assert_eq!((config.lora.r, config.training.seed), (4, 7));
        assert!(parsed(&[path, "more.jsonl"]).unwrap_err().to_string().contains("says what to train on"));
        assert!(parsed(&[path, "--r", "0"]).unwrap_err().to_string().contains('r'));
    }
}
