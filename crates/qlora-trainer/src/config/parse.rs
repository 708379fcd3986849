//! TOML in and out: unknown keys with suggestions, wrong types and bad values, each with its line.

use std::fs;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use toml::de::DeTable;
use toml::{Spanned, Value};

use super::keys::{Keys, Place, line_of, sections, suggestion};
use super::{TrainConfig, foreign_keys, values};
use crate::error::{Error, Problem, Result};

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
        let value = format!("value = {value}")
            .parse::<toml::Table>()
            .ok()
            .and_then(|mut table| table.remove("value"))
            .unwrap_or_else(|| Value::String(value.to_owned()));
        let keys = known.iter().find(|(known, _)| *known == section).map(|(_, keys)| *keys);
        if !keys.is_some_and(|keys| keys.contains(&name)) {
            let ours = known.iter().any(|(_, keys)| keys.contains(&name));
            return match (foreign_keys::find(name).filter(|_| !ours), keys) {
                (Some(foreign), _) => {
                    foreign.refusal(self, name, &value).map_or(Ok(()), |message| Err(problem(message)))
                }
                (None, Some(_)) => Err(problem(format!("unknown key `{key}`{}", suggestion(section, name, &known)))),
                (None, None) => {
                    Err(problem(format!("`{key}`: write [section].[key]; {}", suggestion("", name, &known))))
                }
            };
        }
        self.put(section, name, value.clone()).map_err(|message| {
            let hint = values::hint(section, name, &value, &message);
            problem(format!("`{key}`: {message}{hint}"))
        })
    }

    /// Sets one key of ours; the error describes the problem of the value.
    pub(super) fn put(&mut self, section: &str, name: &str, value: Value) -> std::result::Result<(), String> {
        let mut whole = toml::Table::try_from(&*self).map_err(|error| error.to_string())?;
        if let Some(table) = whole.get_mut(section).and_then(Value::as_table_mut) {
            table.insert(name.to_owned(), value);
        }
        *self = whole.try_into().map_err(|error: toml::de::Error| error.message().to_owned())?;
        Ok(())
    }

    fn parse(text: &str, path: Option<&Path>) -> Result<Self> {
        let problem = |line: Option<usize>, message: String| Problem { path: path.map(Path::to_owned), line, message };
        // Without a path the line stands in the message.
        let located = |line: Option<usize>, message: String| match (path, line) {
            (None, Some(number)) => problem(line, format!("line {number}: {message}")),
            _ => problem(line, message),
        };
        let line_of_error = |error: &toml::de::Error| error.span().map(|span| line_of(text, span.start));
        let message_of = |error: &toml::de::Error| error.message().trim().replace('\n', ", ");

        let table = DeTable::parse(text).map_err(|error| {
            let line = line_of_error(&error);
            let hint = values::syntax_hint(text, line.unwrap_or(1));
            Error::Config(vec![located(line, format!("{}{hint}", message_of(&error)))])
        })?;
        let span = table.span();
        let (ours, keys) = Keys::sort(text, table.into_inner());
        let read = Self::deserialize(toml::de::Deserializer::from(Spanned::new(span, ours)));
        let lines = keys.lines.clone();
        let wrong_value = read.as_ref().err().map(|error| {
            let inside =
                |span: &Range<usize>| error.span().is_some_and(|at| span.start <= at.start && at.end <= span.end);
            let place = keys.places.iter().find(|place| inside(&place.span));
            (line_of_error(error), named(place, &message_of(error)))
        });
        let unknown = keys.problems(read.as_ref().unwrap_or(&Self::default()));
        let mut problems: Vec<_> = unknown.into_iter().map(|(line, message)| located(Some(line), message)).collect();
        problems.extend(wrong_value.map(|(line, message)| located(line, message)));
        if let (Ok(config), true) = (&read, problems.is_empty()) {
            let with_line = |(key, message): (&'static str, String)| located(lines.get(key).copied(), message);
            problems = config.problems().into_iter().map(with_line).collect();
        }
        match read {
            Ok(config) if problems.is_empty() => Ok(config),
            _ => Err(Error::Config(problems)),
        }
    }
}

/// A message about a value, with its key and a suggestion.
fn named(place: Option<&Place>, message: &str) -> String {
    let Some(Place { key, value, .. }) = place else { return message.to_owned() };
    let (section, name) = key.split_once('.').unwrap_or(("", key));
    format!("`{name}`: {message}{}", values::hint(section, name, value, message))
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
            ("[lora]\nlora_r = 8", "line 6: unknown key `lora_r`; here it is `r` in [lora]: write `r = 8`"),
            (
                "train_on_inputs = true",
                "line 5: unknown key `train_on_inputs`; here it is `completion_only_loss` in [data], with the opposite value: \
                 write `completion_only_loss = false`",
            ),
            ("[trainig]", "line 5: unknown section [trainig]; did you mean [training]?"),
            (
                "[zzz]\na = 1",
                "line 5: unknown section [zzz]; there are [model], [lora], [data], [training], [objective]",
            ),
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
