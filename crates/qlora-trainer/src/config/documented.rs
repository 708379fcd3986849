//! The documentation of every key, read from `examples/finetune.toml`: one text serves the file that people
//! copy, the flags of a command line and the file that a program writes for them.

use std::sync::LazyLock;

use super::keys::sections;

/// A configuration of every key, with comments. A key without a default value stands there as a comment.
pub const EXAMPLE: &str = include_str!("example.toml");

/// A key of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocumentedKey {
    /// `model`, `lora`, `data` or `training`.
    pub section: &'static str,
    /// The key.
    pub name: &'static str,
    /// One or more sentences.
    pub help: String,
    /// The value that it has if it is not set, as TOML; none where there is none.
    pub default: Option<&'static str>,
    /// Its line in [`EXAMPLE`], from 0.
    pub line: usize,
}

impl DocumentedKey {
    /// `section.key`, as [`TrainConfig::set`](super::TrainConfig::set) takes it.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// Whether its values are true and false alone.
    pub fn is_flag(&self) -> bool {
        matches!(self.default, Some("true" | "false")) && self.name != "resume_from_checkpoint"
    }
}

/// Every key, in the order of [`EXAMPLE`].
pub fn documented_keys() -> &'static [DocumentedKey] {
    static KEYS: LazyLock<Vec<DocumentedKey>> = LazyLock::new(read);
    &KEYS
}

fn read() -> Vec<DocumentedKey> {
    let known = sections();
    let (mut keys, mut help) = (Vec::new(), Vec::new());
    let mut section: Option<&(&'static str, &'static [&'static str])> = None;
    let mut in_table = false;
    for (line, text) in EXAMPLE.lines().enumerate() {
        if let Some(name) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
            in_table = false;
            section = known.iter().find(|(known, _)| *known == name);
            help.clear();
            continue;
        }
        let (commented, bare) = match text.strip_prefix('#') {
            Some(rest) => (true, rest.strip_prefix(' ').unwrap_or(rest)),
            None => (false, text),
        };
        let known_key = |name: &str| {
            let (section, names) = section?;
            names.iter().find(|known| **known == name).map(|name| (*section, *name))
        };
        // An entry of a list of tables stands for the list; what stands in it are no keys of the section.
        let table = bare.strip_prefix("[[").and_then(|text| text.strip_suffix("]]"));
        in_table = table.is_some() || (in_table && commented);
        let entry = table.and_then(|path| known_key(path.split_once('.')?.1)).map(|key| (key, None));
        let assigned = bare.split_once(" = ").filter(|_| !in_table);
        let assigned = assigned.and_then(|(name, value)| Some((known_key(name)?, (!commented).then_some(value))));
        match entry.or(assigned) {
            Some(((section, name), default)) => {
                keys.push(DocumentedKey { section, name, help: std::mem::take(&mut help).join(" "), default, line })
            }
            None if commented && !in_table => help.push(bare.trim()),
            None => help.clear(),
        }
    }
    // `weight_decay` and the keys below it share one comment.
    let mut last = String::new();
    for key in &mut keys {
        match key.help.is_empty() {
            true => key.help.clone_from(&last),
            false => last.clone_from(&key.help),
        }
    }
    keys
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::config::TrainConfig;

    #[test]
    fn every_key_is_documented_once() {
        let keys = documented_keys();
        let mut wanted: Vec<String> = sections()
            .iter()
            .flat_map(|(section, names)| names.iter().map(move |name| format!("{section}.{name}")))
            .collect();
        let mut found: Vec<String> = keys.iter().map(DocumentedKey::path).collect();
        wanted.sort();
        found.sort();
        assert_eq!(found, wanted);
        assert!(keys.iter().all(|key| key.help.len() > 3), "{keys:?}");
        // A command line has them without their sections.
        assert_eq!(keys.iter().map(|key| key.name).collect::<HashSet<_>>().len(), keys.len());
    }

    #[test]
    fn defaults_are_values_of_their_keys() {
        let mut config = TrainConfig::from_toml_str(EXAMPLE).unwrap();
        let before = config.clone();
        for key in documented_keys() {
            if let Some(default) = key.default {
                config.set(&key.path(), default).unwrap();
            }
        }
        assert_eq!(config, before);
    }

    #[test]
    fn flags_are_told_apart() {
        let key = |name: &str| documented_keys().iter().find(|key| key.name == name).unwrap();
        assert!(key("packing").is_flag() && key("load_in_4bit").is_flag());
        assert!(!key("resume_from_checkpoint").is_flag() && !key("learning_rate").is_flag());
        assert_eq!(key("memory_budget").default, None);
        assert!(key("r").help.contains("Rank"), "{}", key("r").help);
        let (datasets, tests) = (key("datasets"), key("test_datasets"));
        assert!(datasets.help.starts_with("Further sets") && !datasets.help.contains("[["), "{}", datasets.help);
        assert!(tests.help == "Further sets to evaluate on." && tests.default.is_none(), "{}", tests.help);
    }
}
