//! The validation of the configuration's values.

use qlora_core::model::DeviceChoice;

use super::{MixStrategy, ObjectiveKind, ObjectiveOptions, SamplePrompts, Scheduler, Targets, TrainConfig};
use crate::data::Mapping;
use crate::error::{Error, Problem, Result};

impl TrainConfig {
    /// Checks all values.
    ///
    /// # Errors
    /// [`Error::Config`] with everything that is wrong.
    pub fn validate(&self) -> Result<()> {
        let problems = self.problems();
        if problems.is_empty() {
            return Ok(());
        }
        let of_key = |(_, message)| Problem { path: None, line: None, message };
        Err(Error::Config(problems.into_iter().map(of_key).collect()))
    }

    /// Every value that makes no sense: its key and a message that names the key.
    pub(super) fn problems(&self) -> Vec<(&'static str, String)> {
        let mut check = Checker::default();
        self.check_model(&mut check);
        self.check_lora(&mut check);
        self.check_data(&mut check);
        self.check_training(&mut check);
        ObjectiveOptions::problems(self).into_iter().for_each(|(key, message)| check.that(false, key, message));
        check.problems
    }

    fn check_model(&self, check: &mut Checker) {
        let model = &self.model;
        check.that(
            !model.model_name_or_path.trim().is_empty(),
            "model.model_name_or_path",
            "is missing: a folder, a GGUF file or a hub id such as \"HuggingFaceTB/SmolLM2-135M-Instruct\"",
        );
        let blocksize = model.blocksize;
        check.that(
            blocksize.is_power_of_two() && (32..=4096).contains(&blocksize),
            "model.blocksize",
            format!("must be a power of two from 32 to 4096, not {blocksize}"),
        );
        let device = &model.device;
        check.that(
            device.parse::<DeviceChoice>().is_ok(),
            "model.device",
            format!("must be \"auto\", \"cpu\", \"cuda\" or such as \"cuda:1\", not {device:?}"),
        );
    }

    fn check_lora(&self, check: &mut Checker) {
        let lora = &self.lora;
        check.at_least_one("lora.r", lora.r as u64);
        check.positive("lora.lora_alpha", lora.lora_alpha);
        check.that(
            (0.0..1.0).contains(&lora.lora_dropout),
            "lora.lora_dropout",
            format!("must be at least 0 and below 1, not {}", lora.lora_dropout),
        );
        let named = match &lora.target_modules {
            Targets::Pattern(pattern) => !pattern.is_empty(),
            Targets::List(names) => !names.is_empty() && names.iter().all(|name| !name.is_empty()),
        };
        check.that(named, "lora.target_modules", "must name at least one module, and no empty name");
        let adapter = lora.adapter_name_or_path.as_deref();
        check.that(
            adapter.is_none_or(|adapter| !adapter.trim().is_empty()),
            "lora.adapter_name_or_path",
            "must not be empty: the folder or hub id of an adapter",
        );
        check.that(
            lora.modules_to_save.iter().all(|name| !name.is_empty()),
            "lora.modules_to_save",
            "must not have an empty name",
        );
        check.that(
            !(lora.use_dora && self.model.frozen_compute.is_some()),
            "lora.use_dora",
            "is not there with `frozen_compute = \"fp8\"`: leave one of the two out",
        );
        if let Some(meant) = meant_targets(&lora.target_modules) {
            check.that(false, "lora.target_modules", format!("does not name modules that way: write {meant}"));
        }
    }

    fn check_data(&self, check: &mut Checker) {
        let data = &self.data;
        check.that(
            data.training_sets() > 0,
            "data.train_file",
            "is missing: the path of a file or folder of rows, or a list; [[data.datasets]] says more of each set",
        );
        self.check_datasets(check);
        check.that(
            data.max_length >= 2,
            "data.max_length",
            format!("must be at least 2 (a token and the one it predicts), not {}", data.max_length),
        );
    }

    fn check_datasets(&self, check: &mut Checker) {
        let data = &self.data;
        for (key, sets) in [("data.datasets", &data.datasets), ("data.test_datasets", &data.test_datasets)] {
            for set in sets {
                let path = set.path.display();
                check.that(!set.path.as_os_str().is_empty(), key, "has an entry without `path`");
                if let Err(message) = Mapping::new(set) {
                    check.that(false, key, format!("has {path}: {message}"));
                }
                check.that(set.num_samples != Some(0), key, format!("has {path}: `num_samples` must be at least 1"));
                let share = set.fraction.unwrap_or(1.0);
                check.that(
                    share.is_finite() && share > 0.0,
                    key,
                    format!("has {path}: `fraction` must be a number above 0, not {share}"),
                );
            }
        }
        let shares = data.datasets.iter().filter(|set| set.fraction.is_some()).count();
        check.that(
            shares == 0 || shares == data.training_sets(),
            "data.datasets",
            "must have a `fraction` in all entries or in none, and no `train_file` beside them",
        );
        let val_size = data.val_size;
        check.that(
            val_size.is_finite() && val_size >= 0.0 && (val_size < 1.0 || val_size.fract() == 0.0),
            "data.val_size",
            format!("must be a share below 1 or a whole number of documents, not {val_size}"),
        );
        check.that(
            !(val_size > 0.0 && (val_size < 1.0 || val_size.fract() == 0.0))
                || (data.validation_file.is_empty() && data.test_datasets.is_empty()),
            "data.val_size",
            "and `validation_file` or `test_datasets` exclude each other",
        );
        check.at_least_one("data.buffer_size", data.buffer_size as u64);
        if data.streaming {
            self.check_streaming(check);
        }
        check.that(data.max_samples != Some(0), "data.max_samples", "must be at least 1");
        check.that(
            data.min_sample_len <= data.max_length,
            "data.min_sample_len",
            format!("must be at most max_length = {}, not {}", data.max_length, data.min_sample_len),
        );
        let (probabilities, sets) = (&data.interleave_probs, data.training_sets());
        check.that(
            probabilities.is_empty() || probabilities.len() == sets,
            "data.interleave_probs",
            format!("must have one number for each of the {sets} sets, not {}", probabilities.len()),
        );
        check.that(
            probabilities.iter().all(|p| p.is_finite() && *p > 0.0),
            "data.interleave_probs",
            "must be numbers above 0",
        );
        check.that(
            probabilities.is_empty() || data.mix_strategy != MixStrategy::Concat,
            "data.interleave_probs",
            "needs a `mix_strategy` that interleaves, such as \"interleave_under\"",
        );
    }

    fn check_streaming(&self, check: &mut Checker) {
        let (data, training) = (&self.data, &self.training);
        check.that(
            training.max_steps > 0,
            "data.streaming",
            "needs `max_steps` in [training]: how long the data is is not known",
        );
        check.that(
            !data.dataset_exact_deduplication,
            "data.dataset_exact_deduplication",
            "needs all data in memory, and does not go with `streaming`",
        );
        check.that(
            data.val_size == 0.0 || data.val_size >= 1.0,
            "data.val_size",
            "must be a number of documents with `streaming`: of data whose length is not known there is no share",
        );
        check.that(
            data.datasets.iter().all(|set| set.num_samples.is_none() && set.fraction.is_none()),
            "data.datasets",
            "must have no `num_samples` and no `fraction` with `streaming`; write `interleave_probs` or `max_samples`",
        );
    }

    fn check_training(&self, check: &mut Checker) {
        let training = &self.training;
        check.that(!training.output_dir.as_os_str().is_empty(), "training.output_dir", "must not be empty");
        if let Some(budget) = training.memory_budget {
            check.positive("training.memory_budget", budget);
        }
        check.positive("training.num_train_epochs", training.num_train_epochs);
        check.that(
            training.max_steps == -1 || training.max_steps > 0,
            "training.max_steps",
            format!("must be at least 1, or -1 for all epochs, not {}", training.max_steps),
        );
        check.at_least_one("training.per_device_train_batch_size", training.per_device_train_batch_size as u64);
        if let Some(size) = training.per_device_eval_batch_size {
            check.at_least_one("training.per_device_eval_batch_size", size as u64);
        }
        check.at_least_one("training.gradient_accumulation_steps", training.gradient_accumulation_steps as u64);
        check.at_least_one("training.context_parallel_size", training.context_parallel_size as u64);
        check.that(
            training.context_parallel_size <= 1 || training.objective == ObjectiveKind::Sft,
            "training.context_parallel_size",
            format!(
                "must be 1 with the objective \"{}\", which needs the log-probabilities of whole answers on one rank",
                training.objective.name()
            ),
        );
        check.positive("training.learning_rate", training.learning_rate);
        self.check_warmup(check);
        check.not_negative("training.max_grad_norm", training.max_grad_norm);
        check.not_negative("training.weight_decay", training.weight_decay);
        for (key, beta) in [("training.adam_beta1", training.adam_beta1), ("training.adam_beta2", training.adam_beta2)]
        {
            check.that((0.0..1.0).contains(&beta), key, format!("must be at least 0 and below 1, not {beta}"));
        }
        check.positive("training.adam_epsilon", training.adam_epsilon);
        check.at_least_one("training.logging_steps", training.logging_steps);
        let evaluates = self.data.evaluates();
        if let Some(steps) = training.eval_steps {
            check.at_least_one("training.eval_steps", steps);
            check.that(evaluates, "training.eval_steps", "needs a validation_file or a val_size in [data]");
        }
        self.check_samples(check);
        let on_start = !training.eval_on_start || evaluates;
        check.that(on_start, "training.eval_on_start", "needs a validation_file or a val_size in [data]");
        let repository = training.hub_repository();
        let is_id = repository.as_deref().is_some_and(qlora_core::hub_id::is_hub_id);
        let got = repository.map(|id| format!(": {id:?} is no id of one")).unwrap_or_default();
        let needs = format!("needs `hub_model_id`, the repository to upload to, such as \"me/my-adapter\"{got}");
        check.that(!training.push_to_hub || is_id, "training.push_to_hub", needs);
        // TOML and JSON consumers read integers as i64.
        for (key, seed) in [("training.seed", Some(training.seed)), ("training.data_seed", training.data_seed)] {
            check.that(seed.is_none_or(|seed| seed <= i64::MAX as u64), key, "must be below 2^63");
        }
    }

    fn check_samples(&self, check: &mut Checker) {
        let training = &self.training;
        let given = !training.sample_prompts.is_empty();
        if let Some(steps) = training.sample_every {
            check.at_least_one("training.sample_every", steps);
            check.that(
                given || self.data.evaluates(),
                "training.sample_every",
                "needs `sample_prompts`, or a validation_file or a val_size in [data], whose first rows are asked then",
            );
        } else {
            check.that(
                !given,
                "training.sample_prompts",
                "needs `sample_every`, the steps between two rounds of answers",
            );
        }
        let empty = match &training.sample_prompts {
            SamplePrompts::File(path) => path.as_os_str().is_empty(),
            SamplePrompts::Texts(texts) => texts.iter().any(|text| text.trim().is_empty()),
        };
        check.that(!empty, "training.sample_prompts", "must not have an empty prompt");
        check.at_least_one("training.sample_max_new_tokens", training.sample_max_new_tokens as u64);
    }

    fn check_warmup(&self, check: &mut Checker) {
        let training = &self.training;
        check.that(
            training.warmup_steps.is_none() || training.warmup_ratio.is_none(),
            "training.warmup_ratio",
            "and `warmup_steps` exclude each other",
        );
        if let Some(steps) = training.warmup_steps {
            check.that(
                steps.is_finite() && steps >= 0.0 && (steps < 1.0 || steps.fract() == 0.0),
                "training.warmup_steps",
                format!("must be a whole number of steps, or a share of all steps below 1, not {steps}"),
            );
        }
        if let Some(ratio) = training.warmup_ratio {
            check.that(
                (0.0..=1.0).contains(&ratio),
                "training.warmup_ratio",
                format!("must be from 0 to 1, not {ratio}"),
            );
        }
        let asked = training.warmup_steps.or(training.warmup_ratio).unwrap_or(0.0) > 0.0;
        check.that(
            !asked || training.lr_scheduler_type != Scheduler::Constant,
            "training.lr_scheduler_type",
            "\"constant\" has no warmup: use \"constant_with_warmup\" or leave the warmup out",
        );
    }
}

/// A suggestion for targets that would match no module although it is clear which are meant: "all-linear" in a list or
/// in other words, names in one text.
fn meant_targets(targets: &Targets) -> Option<String> {
    let all =
        |name: &str| ["all-linear", "all_linear", "all", "linear"].iter().any(|all| name.eq_ignore_ascii_case(all));
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    match targets {
        Targets::List(names) if names.iter().any(|name| all(name)) => Some("\"all-linear\"".to_owned()),
        Targets::Pattern(name) if name.eq_ignore_ascii_case("all-linear") => None,
        Targets::Pattern(name) if all(name) => Some("\"all-linear\"".to_owned()),
        // A regular expression has to match a module's whole name, which has dots.
        Targets::Pattern(text) => {
            let names: Vec<&str> = text.split(',').map(str::trim).collect();
            names.iter().all(|name| is_name(name)).then(|| format!("{names:?}"))
        }
        Targets::List(_) => None,
    }
}

#[derive(Default)]
struct Checker {
    problems: Vec<(&'static str, String)>,
}

impl Checker {
    fn that(&mut self, holds: bool, key: &'static str, message: impl Into<String>) {
        if !holds {
            self.problems.push((key, format!("`{key}` {}", message.into())));
        }
    }

    fn at_least_one(&mut self, key: &'static str, value: u64) {
        self.that(value >= 1, key, "must be at least 1");
    }

    fn positive(&mut self, key: &'static str, value: f64) {
        self.that(value.is_finite() && value > 0.0, key, format!("must be a number above 0, not {value}"));
    }

    fn not_negative(&mut self, key: &'static str, value: f64) {
        self.that(value.is_finite() && value >= 0.0, key, format!("must be a number of at least 0, not {value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> TrainConfig {
        let text = "model.model_name_or_path = \"m\"\ndata.train_file = \"t\"\ndata.validation_file = \"v\"";
        TrainConfig::from_toml_str(text).unwrap()
    }

    #[test]
    fn every_bad_value_is_named() {
        for (key, value) in [
            ("model.model_name_or_path", "\"\""),
            ("model.blocksize", "48"),
            ("model.blocksize", "8192"),
            ("lora.r", "0"),
            ("lora.lora_alpha", "0"),
            ("lora.lora_alpha", "nan"),
            ("lora.lora_dropout", "1.0"),
            ("lora.target_modules", "[]"),
            ("lora.target_modules", "[\"\"]"),
            ("lora.adapter_name_or_path", "\"\""),
            ("data.train_file", "[]"),
            ("data.max_length", "1"),
            ("data.val_size", "-0.1"),
            ("data.val_size", "nan"),
            ("data.val_size", "1.5"),
            ("data.val_size", "3"),
            ("data.max_samples", "0"),
            ("data.min_sample_len", "1025"),
            ("data.interleave_probs", "[1.0]"),
            ("data.datasets", "[{ num_samples = 3 }]"),
            ("data.datasets", "[{ path = \"x\", num_samples = 0 }]"),
            ("data.datasets", "[{ path = \"x\", fraction = 0.5 }]"),
            ("data.datasets", "[{ path = \"x\", columns = { prompt = \"q\" } }]"),
            ("data.test_datasets", "[{ path = \"x\", columns = {} }]"),
            ("training.output_dir", "\"\""),
            ("training.num_train_epochs", "0"),
            ("training.num_train_epochs", "inf"),
            ("training.max_steps", "0"),
            ("training.max_steps", "-2"),
            ("training.per_device_train_batch_size", "0"),
            ("training.per_device_eval_batch_size", "0"),
            ("training.gradient_accumulation_steps", "0"),
            ("training.learning_rate", "-1e-4"),
            ("training.warmup_steps", "1.5"),
            ("training.warmup_steps", "-1"),
            ("training.warmup_ratio", "1.5"),
            ("training.max_grad_norm", "-1"),
            ("training.weight_decay", "nan"),
            ("training.adam_beta1", "1"),
            ("training.adam_beta2", "-0.1"),
            ("training.adam_epsilon", "0"),
            ("training.logging_steps", "0"),
            ("training.eval_steps", "0"),
        ] {
            let mut config = valid();
            config.validate().unwrap();
            config.set(key, value).unwrap();
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(&format!("`{key}` ")), "{key} = {value}: {message}");
            assert_eq!(message.lines().count(), 1, "{key} = {value}: {message}");
        }
    }

    #[test]
    fn options_of_an_objective() {
        let refusal = |values: &[(&str, &str)]| {
            let mut config = valid();
            values.iter().for_each(|(key, value)| config.set(key, value).unwrap());
            config.validate().map_err(|error| error.to_string()).err()
        };
        let dpo = ("training.objective", "dpo");
        assert_eq!(refusal(&[dpo, ("objective.beta", "0.3"), ("objective.loss_type", "ipo")]), None);
        assert_eq!(refusal(&[dpo, ("objective.loss_type", "robust"), ("objective.label_smoothing", "0.1")]), None);
        for (values, part) in [
            (&[("objective.beta", "0.3")][..], "`objective` are options of objectives over pairs"),
            (&[dpo, ("objective.beta", "0")], "`objective.beta` must be a number above 0"),
            (&[dpo, ("objective.label_smoothing", "0.5")], "below 0.5"),
            (&[dpo, ("objective.label_smoothing", "0.1")], "needs `loss_type = \"robust\"`"),
            (&[dpo, ("data.completion_only_loss", "false")], "`data.completion_only_loss` must be true"),
        ] {
            let message = refusal(values).unwrap();
            assert!(message.contains(part), "{values:?}: {message}");
        }
    }

    #[test]
    fn values_that_contradict_each_other() {
        let refusal = |values: &[(&str, &str)]| {
            let mut config = valid();
            values.iter().for_each(|(key, value)| config.set(key, value).unwrap());
            config.validate().unwrap_err().to_string()
        };
        let both = refusal(&[("training.warmup_steps", "3"), ("training.warmup_ratio", "0.1")]);
        assert!(both.contains("exclude each other"), "{both}");
        let constant = refusal(&[("training.lr_scheduler_type", "\"constant\""), ("training.warmup_steps", "3")]);
        assert!(constant.contains("constant_with_warmup"), "{constant}");
        let no_data = refusal(&[("data.validation_file", "[]"), ("training.eval_steps", "5")]);
        assert!(no_data.contains("`training.eval_steps` needs a validation_file"), "{no_data}");
        let interleave = ("data.mix_strategy", "\"interleave_under\"");
        let probabilities = refusal(&[interleave, ("data.interleave_probs", "[0.5, 0.5]")]);
        assert!(probabilities.contains("one number for each of the 1 sets, not 2"), "{probabilities}");
        let zero = refusal(&[interleave, ("data.interleave_probs", "[0.0]")]);
        assert!(zero.contains("must be numbers above 0"), "{zero}");
    }
}
