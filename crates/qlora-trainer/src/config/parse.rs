//! TOML in and out: unknown keys with suggestions, wrong types and bad values, each with its line.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde::de::value::Error as FieldError;
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use toml::de::{DeTable, DeValue};

use super::{DataOptions, LoraOptions, ModelOptions, TrainConfig, TrainingOptions};
use crate::error::{Error, Problem, Result};

/// What other trainers call a key, and where ours stands.
const FOREIGN_NAMES: &[(&str, &str)] = &[
    ("adapter_path", "`adapter_name_or_path` in [lora]"),
    ("base_model", "`model_name_or_path` in [model]"),
    ("batch_size", "`per_device_train_batch_size` in [training]"),
    ("cutoff_len", "`max_length` in [data]"),
    ("dataset_name", "`train_file` in [data]"),
    ("double_quantization", "`bnb_4bit_use_double_quant` in [model]"),
    ("eval_file", "`validation_file` in [data]"),
    ("init_from_adapter", "`adapter_name_or_path` in [lora]"),
    ("lora_model_dir", "`adapter_name_or_path` in [lora]"),
    ("lora_r", "`r` in [lora]"),
    ("lora_rank", "`r` in [lora]"),
    ("lora_target", "`target_modules` in [lora]"),
    ("lora_target_modules", "`target_modules` in [lora]"),
    ("lr", "`learning_rate` in [training]"),
    ("lr_scheduler", "`lr_scheduler_type` in [training]"),
    ("max_seq_length", "`max_length` in [data]"),
    ("micro_batch_size", "`per_device_train_batch_size` in [training]"),
    ("num_epochs", "`num_train_epochs` in [training]"),
    ("resume_adapter_file", "`adapter_name_or_path` in [lora]"),
    ("sample_packing", "`packing` in [data]"),
    ("sequence_len", "`max_length` in [data]"),
    ("test_file", "`validation_file` in [data]"),
    ("train_on_input", "`completion_only_loss` in [data], with the opposite value"),
    ("train_on_inputs", "`completion_only_loss` in [data], with the opposite value"),
    ("use_bnb_nested_quant", "`bnb_4bit_use_double_quant` in [model]"),
    ("use_double_quant", "`bnb_4bit_use_double_quant` in [model]"),
];

/// How alike (Jaro-Winkler, 0 to 1) a known key must be to be suggested.
const SIMILAR: f64 = 0.8;

impl TrainConfig {
    /// Reads and validates a TOML file.
    ///
    /// # Errors
    /// If the file cannot be read, is not TOML, has an unknown key, a value of the wrong type or one that makes no
    /// sense; the error names file, line and key.
    pub fn from_toml_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|error| Error::io(path, error))?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            let line = line_of(&String::from_utf8_lossy(&error.as_bytes()[..valid]), valid);
            Error::Config(vec![Problem {
                path: Some(path.to_owned()),
                line: Some(line),
                message: "not UTF-8 text".to_owned(),
            }])
        })?;
        Self::parse(&text, Some(path))
    }

    /// Reads and validates TOML text.
    ///
    /// # Errors
    /// As for [`TrainConfig::from_toml_file`].
    pub fn from_toml_str(text: &str) -> Result<Self> {
        Self::parse(text, None)
    }

    /// The configuration as TOML, all defaults written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("sections of plain values have a TOML form")
    }

    /// Sets one value, as a command line does: `set("training.learning_rate", "1e-4")`. The value is TOML; what is not
    /// valid TOML is taken as a string. The result is not validated; see [`TrainConfig::validate`].
    ///
    /// # Errors
    /// If there is no such key or the value has the wrong type.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let problem = |message: String| Error::Config(vec![Problem { path: None, line: None, message }]);
        let (section, name) = key.split_once('.').unwrap_or(("", key));
        let known = sections();
        let Some(keys) = known.iter().find(|(known, _)| *known == section).map(|(_, keys)| *keys) else {
            return Err(problem(format!("`{key}`: write [section].[key]; {}", suggestion("", name, &known))));
        };
        if !keys.contains(&name) {
            return Err(problem(format!("unknown key `{key}`{}", suggestion(section, name, &known))));
        }
        let mut whole = toml::Table::try_from(&*self).expect("sections of plain values have a TOML form");
        let value = format!("value = {value}")
            .parse::<toml::Table>()
            .ok()
            .and_then(|mut table| table.remove("value"))
            .unwrap_or_else(|| toml::Value::String(value.to_owned()));
        let table = whole.get_mut(section).and_then(toml::Value::as_table_mut).expect("every section is a table");
        table.insert(name.to_owned(), value);
        *self = whole.try_into().map_err(|error: toml::de::Error| problem(format!("`{key}`: {}", error.message())))?;
        Ok(())
    }

    fn parse(text: &str, path: Option<&Path>) -> Result<Self> {
        let problem = |line: Option<usize>, message: String| Problem { path: path.map(Path::to_owned), line, message };
        // Without a path the line stands in the message.
        let located = |line: Option<usize>, message: String| match (path, line) {
            (None, Some(number)) => problem(line, format!("line {number}: {message}")),
            _ => problem(line, message),
        };
        let of_toml = |error: &toml::de::Error| {
            let line = error.span().map(|span| line_of(text, span.start));
            Error::Config(vec![located(line, error.message().trim().replace('\n', ", "))])
        };

        let table = DeTable::parse(text).map_err(|error| of_toml(&error))?;
        let (lines, unknown) = check_keys(text, table.get_ref());
        if !unknown.is_empty() {
            return Err(Error::Config(unknown.into_iter().map(|(line, text)| located(Some(line), text)).collect()));
        }
        let config: Self = toml::from_str(text).map_err(|error| of_toml(&error))?;
        let problems = config.problems();
        if !problems.is_empty() {
            let with_line = |(key, message): (&'static str, String)| located(lines.get(key).copied(), message);
            return Err(Error::Config(problems.into_iter().map(with_line).collect()));
        }
        Ok(config)
    }
}

/// A section's name and its keys.
type Section = (&'static str, &'static [&'static str]);

fn sections() -> [Section; 4] {
    [
        ("model", field_names::<ModelOptions>()),
        ("lora", field_names::<LoraOptions>()),
        ("data", field_names::<DataOptions>()),
        ("training", field_names::<TrainingOptions>()),
    ]
}

/// The line of every key (`section.key`), and a message with its line for every key that does not exist.
fn check_keys(text: &str, table: &DeTable<'_>) -> (HashMap<String, usize>, Vec<(usize, String)>) {
    let known = sections();
    let (mut lines, mut unknown) = (HashMap::new(), Vec::new());
    for (section, value) in table {
        let line = line_of(text, section.span().start);
        let section: &str = section.get_ref();
        let keys = known.iter().find(|(name, _)| *name == section).map(|(_, keys)| *keys);
        match (keys, value.get_ref()) {
            (Some(keys), DeValue::Table(entries)) => {
                lines.insert(section.to_owned(), line);
                for key in entries.keys() {
                    let line = line_of(text, key.span().start);
                    let key: &str = key.get_ref();
                    if keys.contains(&key) {
                        lines.insert(format!("{section}.{key}"), line);
                    } else {
                        let hint = suggestion(section, key, &known);
                        unknown.push((line, format!("unknown key `{key}` in [{section}]{hint}")));
                    }
                }
            }
            (Some(_), _) => unknown.push((line, format!("`{section}` must be a section: write [{section}]"))),
            (None, DeValue::Table(_)) => {
                let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
                let hint = match most_similar(section, &names) {
                    Some(name) => format!("did you mean [{name}]?"),
                    None => format!("there are [{}]", names.join("], [")),
                };
                unknown.push((line, format!("unknown section [{section}]; {hint}")));
            }
            (None, _) => {
                unknown.push((line, format!("key `{section}` outside a section{}", suggestion("", section, &known))));
            }
        }
    }
    unknown.sort();
    (lines, unknown)
}

/// What to write instead of `key` in `section`, as the end of a message.
fn suggestion(section: &str, key: &str, known: &[Section]) -> String {
    if let Some((name, _)) = known.iter().find(|(_, keys)| keys.contains(&key)) {
        return format!("; it belongs in [{name}]");
    }
    if let Some((_, ours)) = FOREIGN_NAMES.iter().find(|(foreign, _)| *foreign == key) {
        return format!("; here it is {ours}");
    }
    let own = known.iter().find(|(name, _)| *name == section).and_then(|(_, keys)| most_similar(key, keys));
    if let Some(name) = own {
        return format!("; did you mean `{name}`?");
    }
    let elsewhere = known.iter().find_map(|(section, keys)| Some((section, most_similar(key, keys)?)));
    elsewhere.map(|(section, name)| format!("; did you mean `{name}` in [{section}]?")).unwrap_or_default()
}

fn most_similar<'a>(key: &str, names: &[&'a str]) -> Option<&'a str> {
    let scored = names.iter().map(|name| (strsim::jaro_winkler(key, name), *name));
    scored.filter(|(score, _)| *score >= SIMILAR).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name)
}

/// The line, from 1, of a byte of the text.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count()
}

/// The names of a struct's fields, as its `Deserialize` knows them.
fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut recorder = FieldRecorder(&[]);
    // Always an error: the recorder holds no value. What counts is what it was asked for.
    let _ = T::deserialize(&mut recorder);
    recorder.0
}

struct FieldRecorder(&'static [&'static str]);

impl<'de> Deserializer<'de> for &mut FieldRecorder {
    type Error = FieldError;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> std::result::Result<V::Value, FieldError> {
        Err(serde::de::Error::custom("not a struct"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> std::result::Result<V::Value, FieldError> {
        self.0 = fields;
        Err(serde::de::Error::custom("recorded"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Paths, Resume, Scheduler, Targets};
    use super::*;
    use proptest::prelude::*;

    const MINIMAL: &str = "[model]\nmodel_name_or_path = \"m\"\n[data]\ntrain_file = \"t.jsonl\"\n";

    fn refusal(text: &str) -> String {
        TrainConfig::from_toml_str(text).unwrap_err().to_string()
    }

    fn with(extra: &str) -> String {
        format!("{MINIMAL}{extra}")
    }

    #[test]
    fn the_smallest_file_gives_the_defaults() {
        let config = TrainConfig::from_toml_str(MINIMAL).unwrap();
        let mut expected = TrainConfig::default();
        expected.model.model_name_or_path = "m".into();
        expected.data.train_file = Paths::One("t.jsonl".into());
        assert_eq!(config, expected);
    }

    #[test]
    fn values_that_have_several_forms() {
        let text = with(
            "validation_file = [\"a\", \"b\"]\n[lora]\ntarget_modules = \"all-linear\"\nlora_alpha = 8\n\
             [training]\nresume_from_checkpoint = \"out/checkpoint-3\"\nlearning_rate = 1e-3\nwarmup_steps = 10\n\
             lr_scheduler_type = \"constant_with_warmup\"",
        );
        let config = TrainConfig::from_toml_str(&text).unwrap();
        assert_eq!(config.data.validation_file.as_slice().len(), 2);
        assert_eq!(config.lora.target_modules, Targets::Pattern("all-linear".into()));
        assert_eq!(config.lora.lora_alpha, 8.0);
        assert_eq!(config.training.resume_from_checkpoint, Resume::From("out/checkpoint-3".into()));
        assert_eq!(config.training.lr_scheduler_type, Scheduler::ConstantWithWarmup);
        assert_eq!(TrainConfig::from_toml_str(&config.to_toml()).unwrap(), config);
        let latest = TrainConfig::from_toml_str(&with("[training]\nresume_from_checkpoint = true")).unwrap();
        assert_eq!(latest.training.resume_from_checkpoint, Resume::Latest);
    }

    #[test]
    fn unknown_keys_name_the_line_and_what_was_meant() {
        let cases = [
            (
                "[training]\nlearning_rte = 1",
                "line 6: unknown key `learning_rte` in [training]; did you mean `learning_rate`?",
            ),
            ("[training]\nr = 8", "line 6: unknown key `r` in [training]; it belongs in [lora]"),
            ("[lora]\nlora_r = 8", "line 6: unknown key `lora_r` in [lora]; here it is `r` in [lora]"),
            (
                "train_on_inputs = true",
                "line 5: unknown key `train_on_inputs` in [data]; here it is `completion_only_loss` in [data], with the opposite value",
            ),
            ("[trainig]", "line 5: unknown section [trainig]; did you mean [training]?"),
            ("[zzz]\na = 1", "line 5: unknown section [zzz]; there are [model], [lora], [data], [training]"),
            ("[lora]\nqqq = 1", "line 6: unknown key `qqq` in [lora]"),
            (
                "[lora]\nmax_lenght = 1",
                "line 6: unknown key `max_lenght` in [lora]; did you mean `max_length` in [data]?",
            ),
        ];
        for (extra, expected) in cases {
            assert_eq!(refusal(&with(extra)), expected);
        }
        assert_eq!(refusal("seed = 1\n"), "line 1: key `seed` outside a section; it belongs in [training]");
        assert_eq!(refusal("model = 1\n"), "line 1: `model` must be a section: write [model]");
    }

    #[test]
    fn all_unknown_keys_are_named_at_once() {
        let message = refusal(&with("[lora]\nrr = 8\n[training]\nsede = 1"));
        assert_eq!(message.lines().count(), 2, "{message}");
        assert!(message.starts_with("line 6: ") && message.contains("\nline 8: "), "{message}");
    }

    #[test]
    fn wrong_types_and_broken_syntax_name_the_line() {
        for (extra, line, part) in [
            ("max_length = \"long\"", 5, "invalid type: string \"long\", expected usize"),
            ("max_length = -5", 5, "expected usize"),
            ("packing = 1", 5, "expected a boolean"),
            ("on_overlong = \"cut\"", 5, "unknown variant `cut`, expected one of `drop`, `error`, `truncate`"),
            ("validation_file = 3", 5, "expected a path or a list of paths"),
            ("[lora]\ntarget_modules = 1", 6, "expected \"all-linear\", a regular expression or a list"),
            ("[training]\n\nresume_from_checkpoint = 1", 7, "expected true, false or the path of a checkpoint"),
            ("[training\nseed = 1", 5, ""),
            ("packing = true\npacking = true", 6, "duplicate key"),
            ("packing = ", 5, ""),
        ] {
            let message = refusal(&with(extra));
            assert!(message.starts_with(&format!("line {line}: ")) && message.contains(part), "{extra}: {message}");
        }
    }

    #[test]
    fn files_are_named_in_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.toml");
        let refusal = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            TrainConfig::from_toml_file(&path).unwrap_err().to_string()
        };
        let at = |line: usize| format!("{}:{line}: ", path.display());
        assert!(refusal(with("[lora]\nr = 0").as_bytes()).starts_with(&at(6)));
        assert!(refusal(b"[lora]\nr = \xff").starts_with(&at(2)));
        assert!(refusal(b"").contains("model.model_name_or_path"));
        let missing = TrainConfig::from_toml_file(folder.path().join("none.toml")).unwrap_err().to_string();
        assert!(missing.contains("none.toml: No such file"), "{missing}");
    }

    #[test]
    fn a_value_can_be_set_from_text() {
        let mut config = TrainConfig::from_toml_str(MINIMAL).unwrap();
        config.set("training.learning_rate", "1e-3").unwrap();
        config.set("training.output_dir", "some/folder").unwrap();
        config.set("lora.target_modules", "[\"q_proj\"]").unwrap();
        config.set("training.warmup_steps", "5").unwrap();
        assert_eq!(config.training.learning_rate, 1e-3);
        assert_eq!(config.training.output_dir, Path::new("some/folder"));
        assert_eq!(config.lora.target_modules, Targets::List(vec!["q_proj".into()]));
        let refusal = |key, value| config.clone().set(key, value).unwrap_err().to_string();
        assert!(refusal("training.lr", "1").contains("`learning_rate` in [training]"));
        assert!(refusal("learning_rate", "1").contains("it belongs in [training]"));
        assert!(refusal("training.max_steps", "many").contains("expected i64"));
        assert_eq!(config.training.warmup_steps, Some(5.0));
    }

    /// Characters that mean something in TOML, and some that do not.
    fn toml_like() -> impl Strategy<Value = String> {
        proptest::string::string_regex("[\\[\\]{}=\"'.,#_a-z0-9 \n\t\\\\+\u{e9}-]{0,120}").unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn arbitrary_text_never_panics(text in toml_like()) {
            let _ = TrainConfig::from_toml_str(&text);
        }

        /// A whole configuration with a stretch replaced: it is read, or every problem names a line or a key.
        #[test]
        fn damaged_files_never_panic(start in 0usize..1500, len in 0usize..30, text in toml_like()) {
            let mut whole = TrainConfig::from_toml_str(MINIMAL).unwrap().to_toml();
            let start = start.min(whole.len());
            whole.replace_range(start..(start + len).min(whole.len()), &text);
            if let Err(error) = TrainConfig::from_toml_str(&whole) {
                let message = error.to_string();
                prop_assert!(message.starts_with("line ") || message.starts_with('`'), "{}", message);
            }
        }

        #[test]
        fn arbitrary_values_never_panic(key in "[a-z_]{1,12}(\\.[a-z_0-9]{1,30})?", value in toml_like()) {
            let mut config = TrainConfig::default();
            let _ = config.set(&key, &value);
            let _ = config.set("training.learning_rate", &value);
            let _ = config.validate();
        }
    }
}
