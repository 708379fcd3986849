//! The files of a data set's split: as its card (`README.md`) says, and without that as their names say, as Hugging
//! Face's `datasets` reads both.
//!
//! Names are those in the repository or folder, with `/`. The order of the rules: `data_files` that were asked for; the card's
//! `configs`; `data/{split}-00000-of-00002.*`; a folder of the split's name; a word for the split in a folder's name, then in a
//! file's; without any such word everything is `train`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::rows::{PATTERNS, data_extension, is_data};

/// The part of a hub data set that is requested.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted<'a> {
    /// The configuration.
    pub(crate) name: Option<&'a str>,
    /// The split; none is `train`.
    pub(crate) split: Option<&'a str>,
    /// Names or patterns of files.
    pub(crate) data_files: &'a [String],
    /// The folder that they are in.
    pub(crate) data_dir: Option<&'a str>,
}

/// The reason why no files are chosen.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There are none in a format that is read.
    NoData(String),
    /// The requested part does not exist.
    NotThere(String),
}

impl Refusal {
    pub(crate) fn into_message(self) -> String {
        let (Self::NoData(message) | Self::NotThere(message)) = self;
        message
    }
}

/// The front matter of a card, as far as it says where data are.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Card {
    configs: Vec<Config>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    config_name: String,
    default: bool,
    data_files: Option<Files>,
    data_dir: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Files {
    One(String),
    Many(Vec<Entry>),
    Splits(BTreeMap<String, Names>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Entry {
    Name(String),
    Split { split: String, path: Names },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    One(String),
    Many(Vec<String>),
}

impl Names {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(name) => vec![name],
            Self::Many(names) => names,
        }
    }
}

const TRAIN: &str = "train";
/// Words for a split in names.
const WORDS: [(&str, &[&str]); 3] = [
    (TRAIN, &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// The names of the files that are wanted, sorted. `card` is the text of the card, if there is one.
pub(crate) fn select(names: &[String], card: Option<&str>, wanted: Wanted<'_>) -> Result<Vec<String>, Refusal> {
    let split = wanted.split.unwrap_or(TRAIN);
    if split.contains(['[', '+']) {
        let message = format!(
            "split = {split:?}: parts and sums of splits are not read; write `max_samples` in [data], or an entry for each"
        );
        return Err(Refusal::NotThere(message));
    }
    if !wanted.data_files.is_empty() {
        return matching(names, wanted.data_dir, wanted.data_files);
    }
    let files = match config_of(card, wanted)? {
        Some(config) => of_config(names, config, split)?,
        None => by_names(names, wanted, split)?,
    };
    Ok(of_one_format(files))
}

/// The configuration that the card has for the requested part; none without a card that lists files.
fn config_of(card: Option<&str>, wanted: Wanted<'_>) -> Result<Option<Config>, Refusal> {
    let Some(front) = card.and_then(front_matter) else { return Ok(None) };
    // Cards are written by hand: one that cannot be read says nothing.
    let card: Card = serde_saphyr::from_str(front).unwrap_or_else(|error| {
        tracing::warn!("the data set's card (README.md) cannot be read: {error}");
        Card::default()
    });
    let mut configs: Vec<Config> =
        card.configs.into_iter().filter(|config| config.data_files.is_some() || config.data_dir.is_some()).collect();
    if configs.is_empty() || wanted.data_dir.is_some() {
        return Ok(None);
    }
    let names: Vec<String> = configs.iter().map(|config| config.config_name.clone()).collect();
    let found = match wanted.name {
        Some(name) => names.iter().position(|known| known == name),
        None if names.len() == 1 => Some(0),
        None => configs.iter().position(|config| config.default || config.config_name == "default"),
    };
    match (found, wanted.name) {
        (Some(found), _) => Ok(Some(configs.swap_remove(found))),
        (None, Some(name)) => {
            Err(Refusal::NotThere(format!("it has no configuration {name:?}; there are {}", names.join(", "))))
        }
        (None, None) => {
            let message = format!("it has several configurations: write one as `name`: {}", names.join(", "));
            Err(Refusal::NotThere(message))
        }
    }
}

/// The text between the two lines `---` at a card's beginning.
fn front_matter(card: &str) -> Option<&str> {
    let rest = card.trim_start_matches('\u{feff}').trim_start().strip_prefix("---")?;
    rest.split_once("\n---").map(|(front, _)| front)
}

fn of_config(names: &[String], config: Config, split: &str) -> Result<Vec<String>, Refusal> {
    let directory = config.data_dir.as_deref();
    let Some(files) = config.data_files else {
        return by_names(names, Wanted { data_dir: directory, ..Wanted::default() }, split);
    };
    let mut splits: Vec<(String, Vec<String>)> = Vec::new();
    match files {
        Files::One(name) => splits.push((TRAIN.to_owned(), vec![name])),
        Files::Splits(map) => splits.extend(map.into_iter().map(|(split, names)| (split, names.into_vec()))),
        Files::Many(entries) => {
            for entry in entries {
                match entry {
                    Entry::Split { split, path } => splits.push((split, path.into_vec())),
                    Entry::Name(name) => match splits.iter_mut().find(|(split, _)| split == TRAIN) {
                        Some((_, names)) => names.push(name),
                        None => splits.push((TRAIN.to_owned(), vec![name])),
                    },
                }
            }
        }
    }
    let known: Vec<String> = splits.iter().map(|(split, _)| split.clone()).collect();
    match splits.into_iter().find(|(known, _)| known == split) {
        Some((_, patterns)) => matching(names, directory, &patterns),
        None => Err(no_split(split, &known)),
    }
}

/// The files that fit names or patterns.
fn matching(names: &[String], directory: Option<&str>, patterns: &[String]) -> Result<Vec<String>, Refusal> {
    let mut chosen: Vec<String> = Vec::new();
    for pattern in patterns {
        let whole = match directory.map(|directory| directory.trim_matches('/')) {
            Some(directory) if !directory.is_empty() => format!("{directory}/{pattern}"),
            _ => pattern.trim_start_matches("./").to_owned(),
        };
        let compiled = glob::Pattern::new(&whole)
            .map_err(|error| Refusal::NotThere(format!("{pattern:?} is not a pattern of files: {error}")))?;
        let fits = |name: &&String| **name == whole || compiled.matches_with(name, PATTERNS);
        let found: Vec<&String> = names.iter().filter(fits).collect();
        if found.is_empty() {
            return Err(Refusal::NotThere(format!("no file fits {whole:?}")));
        }
        if let Some(readable) = found.iter().all(|name| !is_data(Path::new(name.as_str()))).then(|| found[0]) {
            return Err(Refusal::NoData(format!("{readable} is in no format that is read")));
        }
        for name in found {
            if is_data(Path::new(name)) && !chosen.contains(name) {
                chosen.push(name.clone());
            }
        }
    }
    chosen.sort();
    Ok(chosen)
}

fn by_names(names: &[String], wanted: Wanted<'_>, split: &str) -> Result<Vec<String>, Refusal> {
    let folder = |folder: &str| format!("{}/", folder.trim_matches('/'));
    let inside = match (wanted.data_dir, wanted.name) {
        (Some(directory), _) => folder(directory),
        // As in the Parquet export.
        (None, Some(name)) => folder(name),
        (None, None) if names.iter().any(|name| name.starts_with("default/")) => folder("default"),
        (None, None) => String::new(),
    };
    // With the part of the name that says something.
    let files: Vec<(&String, &str)> = names
        .iter()
        .filter(|name| is_data(Path::new(name.as_str())))
        .filter_map(|name| Some((name, name.strip_prefix(&inside)?)))
        .collect();
    if files.is_empty() {
        let message = match inside.as_str() {
            "" => "it has no files in a format that is read".to_owned(),
            inside => format!("it has no files in a format that is read in {inside}"),
        };
        return Err(Refusal::NoData(message));
    }
    let splits: Vec<(&String, Option<String>)> = splits_of(&files);
    let mut known: Vec<String> = splits.iter().filter_map(|(_, split)| split.clone()).collect();
    known.sort();
    known.dedup();
    if known.is_empty() {
        known.push(TRAIN.to_owned());
    }
    let is_wanted = |of: &Option<String>| of.as_deref().unwrap_or(TRAIN) == split;
    let has_words = splits.iter().any(|(_, of)| of.is_some());
    let chosen: Vec<String> = splits
        .iter()
        .filter(|(_, of)| if has_words { of.as_deref() == Some(split) } else { is_wanted(of) })
        .map(|(name, _)| (*name).clone())
        .collect();
    if chosen.is_empty() { Err(no_split(split, &known)) } else { Ok(chosen) }
}

/// The split that a name says.
type Rule<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// The split of each file, by the first rule that finds one for any of them.
fn splits_of<'a>(files: &[(&'a String, &str)]) -> Vec<(&'a String, Option<String>)> {
    let word = |text: &str| {
        let text = text.to_lowercase();
        let mut words = text.split(|c: char| !c.is_ascii_alphabetic());
        words.find_map(|word| {
            WORDS.iter().find(|(_, words)| words.contains(&word)).map(|(split, _)| (*split).to_owned())
        })
    };
    let parts = |name: &str| {
        let name = name.strip_prefix("data/")?;
        let (head, tail) = name.split_once("-of-")?;
        let (split, number) = head.rsplit_once('-')?;
        let digits = |text: &str| text.len() >= 5 && text.bytes().take(5).all(|byte| byte.is_ascii_digit());
        (digits(number) && digits(tail) && !split.contains('/')).then(|| split.to_owned())
    };
    let folder = |name: &str| {
        let (folder, _) = name.rsplit_once('/')?;
        // The Parquet export names the folder of a set of which it has but a part.
        let folder = folder.rsplit('/').next()?;
        (folder != "data").then(|| folder.strip_prefix("partial-").unwrap_or(folder).to_owned())
    };
    let in_folder = |name: &str| name.rsplit_once('/').and_then(|(folder, _)| word(folder));
    let in_file = |name: &str| word(name.rsplit('/').next().unwrap_or(name));
    // Folders count as splits if all files are in such as have a word for one, or in folders beside them.
    let any_word = files.iter().any(|(_, name)| in_folder(name).is_some());
    let rules: [&Rule<'_>; 3] =
        [&parts, &|name| if any_word { in_folder(name).or_else(|| folder(name)) } else { None }, &in_file];
    for rule in rules {
        let found: Vec<_> = files.iter().map(|(name, short)| (*name, rule(short))).collect();
        if found.iter().any(|(_, split)| split.is_some()) {
            return found;
        }
    }
    files.iter().map(|(name, _)| (*name, None)).collect()
}

fn no_split(split: &str, known: &[String]) -> Refusal {
    Refusal::NotThere(format!("it has no split {split:?}; there are {}", known.join(", ")))
}

/// A repository may have the same rows in two formats: those of the format that most files have.
fn of_one_format(mut files: Vec<String>) -> Vec<String> {
    let format = |name: &String| match data_extension(Path::new(name)) {
        Some(end) if matches!(end.as_str(), "json" | "jsonl" | "ndjson") => Some("json".to_owned()),
        end => end,
    };
    let mut counts: BTreeMap<Option<String>, usize> = BTreeMap::new();
    files.iter().for_each(|name| *counts.entry(format(name)).or_default() += 1);
    if let Some((most, _)) = counts.into_iter().max_by_key(|(_, count)| *count) {
        files.retain(|name| format(name) == most);
    }
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], card: Option<&str>, wanted: Wanted<'_>) -> Result<Vec<String>, String> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        select(&names, card, wanted).map_err(Refusal::into_message)
    }

    fn split(split: &str) -> Wanted<'_> {
        Wanted { split: Some(split), ..Wanted::default() }
    }

    #[test]
    fn names_say_the_split() {
        let of = |names: &[&str], of: &str| chosen(names, None, split(of));
        for (names, split, expected) in [
            (["README.md", "a.jsonl", "b.jsonl"].as_slice(), "train", ["a.jsonl", "b.jsonl"].as_slice()),
            (
                &[
                    "data/train-00000-of-00002.parquet",
                    "data/train-00001-of-00002.parquet",
                    "data/test-00000-of-00001.parquet",
                ],
                "test",
                &["data/test-00000-of-00001.parquet"],
            ),
            (
                &["data/train_sft-00000-of-00001-a1b2.parquet", "data/train_gen-00000-of-00001-a1b2.parquet"],
                "train_sft",
                &["data/train_sft-00000-of-00001-a1b2.parquet"],
            ),
            (&["train/0.csv", "val/0.csv", "val/1.csv"], "validation", &["val/0.csv", "val/1.csv"]),
            (&["my-train-file.json", "my_dev.json"], "validation", &["my_dev.json"]),
            (&["training.jsonl.gz", "eval.jsonl.gz"], "test", &["eval.jsonl.gz"]),
            (
                &["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
                "train",
                &["default/train/0000.parquet", "default/train/0001.parquet"],
            ),
            (&["default/partial-train/0000.parquet"], "train", &["default/partial-train/0000.parquet"]),
            // The same rows twice.
            (&["a.jsonl", "b.jsonl", "all.parquet"], "train", &["a.jsonl", "b.jsonl"]),
        ] {
            assert_eq!(of(names, split).unwrap(), expected, "{names:?}");
        }
        let missing = of(&["train.json", "dev.json"], "test").unwrap_err();
        assert_eq!(missing, "it has no split \"test\"; there are train, validation");
        assert!(of(&["a.jsonl"], "test").unwrap_err().ends_with("there are train"));
        assert_eq!(of(&["a.bin"], "train").unwrap_err(), "it has no files in a format that is read");
        assert!(of(&["a.jsonl"], "train[:10]").unwrap_err().contains("`max_samples`"));
        let sft = Wanted { name: Some("sft"), ..split("train") };
        assert_eq!(
            chosen(&["sft/train/0.parquet", "dpo/train/0.parquet"], None, sft).unwrap(),
            ["sft/train/0.parquet"]
        );
    }

    #[test]
    fn files_that_are_named_come_first() {
        let names = ["a/1.jsonl", "a/2.jsonl", "b/1.jsonl", "a/x.bin", "README.md"];
        let of = |directory: Option<&str>, files: &[&str]| {
            let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
            chosen(
                &names,
                Some("---\nconfigs: 3\n---"),
                Wanted { data_dir: directory, data_files: &files, ..Wanted::default() },
            )
        };
        assert_eq!(of(None, &["b/1.jsonl", "a/*"]).unwrap(), ["a/1.jsonl", "a/2.jsonl", "b/1.jsonl"]);
        assert_eq!(of(Some("a/"), &["*.jsonl"]).unwrap(), ["a/1.jsonl", "a/2.jsonl"]);
        assert_eq!(of(None, &["**/1.jsonl"]).unwrap(), ["a/1.jsonl", "b/1.jsonl"]);
        assert_eq!(of(None, &["c/*"]).unwrap_err(), "no file fits \"c/*\"");
        assert_eq!(of(None, &["a/x.bin"]).unwrap_err(), "a/x.bin is in no format that is read");
    }

    #[test]
    fn the_card_says_configurations_and_splits() {
        let card = "---\nlicense: mit\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/t-*.jsonl\n  \
                    - split: test\n    path: [main/e.jsonl]\n- config_name: extra\n  default: true\n  data_files: extra/*.jsonl\n\
                    - config_name: dir\n  data_dir: deep\n---\n# Data\n";
        let names = [
            "README.md",
            "main/t-1.jsonl",
            "main/t-2.jsonl",
            "main/e.jsonl",
            "extra/x.jsonl",
            "deep/train.csv",
            "deep/test.csv",
        ];
        let of = |name: Option<&str>, split: &str| {
            chosen(&names, Some(card), Wanted { name, split: Some(split), ..Wanted::default() })
        };
        assert_eq!(of(Some("main"), "train").unwrap(), ["main/t-1.jsonl", "main/t-2.jsonl"]);
        assert_eq!(of(Some("main"), "test").unwrap(), ["main/e.jsonl"]);
        assert_eq!(of(None, "train").unwrap(), ["extra/x.jsonl"]);
        assert_eq!(of(Some("dir"), "test").unwrap(), ["deep/test.csv"]);
        assert_eq!(of(Some("main"), "dev").unwrap_err(), "it has no split \"dev\"; there are train, test");
        assert_eq!(of(Some("no"), "train").unwrap_err(), "it has no configuration \"no\"; there are main, extra, dir");
        let several = card.replace("  default: true\n", "");
        assert!(
            chosen(&names, Some(&several), split("train"))
                .unwrap_err()
                .contains("write one as `name`: main, extra, dir")
        );
        // A map of splits, and cards that say nothing.
        let map = "---\nconfigs:\n- config_name: a\n  data_files: {train: main/t-1.jsonl, test: [main/e.jsonl]}\n---\n";
        assert_eq!(chosen(&names, Some(map), split("test")).unwrap(), ["main/e.jsonl"]);
        for card in ["", "# Data", "---\n: [\n---\n", "---\nconfigs: 7\n---", "---\nlicense: mit\n---\n"] {
            assert_eq!(chosen(&["a.jsonl"], Some(card), split("train")).unwrap(), ["a.jsonl"], "{card}");
        }
    }
}
