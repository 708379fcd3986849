//! The keys of a configuration's text: which are ours, which are another trainer's, and which are misspelt.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use serde::Deserialize;
use serde::de::value::Error as FieldError;
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, Visitor};
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Value};

use super::foreign_keys::{self, KnownKey};
use super::known_keys::KNOWN_SECTIONS;
use super::{DataOptions, LoraOptions, ModelOptions, ObjectiveOptions, TrainConfig, TrainingOptions};

/// A section's name and its keys.
pub(super) type Section = (&'static str, &'static [&'static str]);

pub(super) fn sections() -> [Section; 5] {
    [
        ("model", field_names::<ModelOptions>()),
        ("lora", field_names::<LoraOptions>()),
        ("data", field_names::<DataOptions>()),
        ("training", field_names::<TrainingOptions>()),
        ("objective", field_names::<ObjectiveOptions>()),
    ]
}

/// A key of ours in the text.
pub(super) struct Place {
    /// `section.key`.
    pub(super) key: String,
    /// The position of its value.
    pub(super) span: Range<usize>,
    /// Its value.
    pub(super) value: Value,
}

/// A key of another trainer in the text.
struct Foreign {
    line: usize,
    section: String,
    key: String,
    known: &'static KnownKey,
    value: Value,
}

/// A key of ours outside its section.
struct Misplaced {
    line: usize,
    message: String,
    home: &'static str,
    key: String,
    value: Option<Value>,
}

impl Misplaced {
    /// Whether it says what the configuration says anyway: as harmless as such a key of another trainer.
    fn agrees(self, config: &TrainConfig) -> bool {
        let mut changed = config.clone();
        self.value.is_some_and(|value| changed.put(self.home, &self.key, value).is_ok() && changed == *config)
    }
}

/// The keys of a configuration's text, with their lines.
#[derive(Default)]
pub(super) struct Keys {
    /// The line of every section and of every `section.key` of ours.
    pub(super) lines: HashMap<String, usize>,
    /// The keys of ours with their values.
    pub(super) places: Vec<Place>,
    foreign: Vec<Foreign>,
    misplaced: Vec<Misplaced>,
    unknown: Vec<(usize, String)>,
}

impl Keys {
    /// The part of the table that is ours, and the sorted keys of all of it.
    pub(super) fn sort<'a>(text: &str, table: DeTable<'a>) -> (DeTable<'a>, Self) {
        let known = sections();
        let (mut ours, mut keys) = (DeTable::new(), Self::default());
        for (name, value) in table {
            let line = line_of(text, name.span().start);
            let section: &str = name.get_ref();
            let span = value.span();
            match (known.iter().find(|(known, _)| *known == section), value.into_inner()) {
                (Some((section, names)), DeValue::Table(entries)) => {
                    keys.lines.insert((*section).to_owned(), line);
                    let mut kept = DeTable::new();
                    for (key, value) in entries {
                        if keys.sort_key(text, section, names, &key, &value, &known) {
                            kept.insert(key, value);
                        }
                    }
                    ours.insert(name, Spanned::new(span, DeValue::Table(kept)));
                }
                (Some(_), _) => keys.unknown.push((line, format!("`{section}` must be a section: write [{section}]"))),
                (None, DeValue::Table(_)) if is_known_section(section) => {
                    keys.unknown.push((line, unknown_section(section, &known)));
                }
                (None, value) if keys.take_foreign(line, "", section, &Spanned::new(span.clone(), value.clone())) => {}
                (None, DeValue::Table(_)) => keys.unknown.push((line, unknown_section(section, &known))),
                (None, value) => {
                    let hint = suggestion("", section, &known);
                    let message = format!("key `{section}` outside a section{hint}");
                    match home_of(section, &known) {
                        Some(home) => {
                            let (key, value) = (section.to_owned(), plain(&Spanned::new(span, value)));
                            keys.misplaced.push(Misplaced { line, message, home, key, value });
                        }
                        None => keys.unknown.push((line, message)),
                    }
                }
            }
        }
        (ours, keys)
    }

    /// Whether a section's entry is ours.
    fn sort_key(
        &mut self,
        text: &str,
        section: &str,
        names: &[&str],
        key: &Spanned<Cow<'_, str>>,
        value: &Spanned<DeValue<'_>>,
        known: &[Section],
    ) -> bool {
        let line = line_of(text, key.span().start);
        let key: &str = key.get_ref();
        if names.contains(&key) {
            let name = format!("{section}.{key}");
            self.lines.insert(name.clone(), line);
            self.places.extend(plain(value).map(|plain| Place { key: name, span: value.span(), value: plain }));
            return true;
        }
        let message = || format!("unknown key `{key}` in [{section}]{}", suggestion(section, key, known));
        // A key of ours in another section is no foreign one.
        if let Some(home) = home_of(key, known) {
            let (message, key, value) = (message(), key.to_owned(), plain(value));
            self.misplaced.push(Misplaced { line, message, home, key, value });
        } else if !self.take_foreign(line, section, key, value) {
            self.unknown.push((line, message()));
        }
        false
    }

    fn take_foreign(&mut self, line: usize, section: &str, key: &str, value: &Spanned<DeValue<'_>>) -> bool {
        let (Some(known), Some(value)) = (foreign_keys::find(key), plain(value)) else { return false };
        self.foreign.push(Foreign { line, section: section.to_owned(), key: key.to_owned(), known, value });
        true
    }

    /// The problems of the keys that are not ours, with their lines, in a file that otherwise says `config`.
    pub(super) fn problems(mut self, config: &TrainConfig) -> Vec<(usize, String)> {
        for Foreign { line, section, key, known, value } in self.foreign {
            match known.refusal(config, &key, &value) {
                Some(message) => self.unknown.push((line, message)),
                None => tracing::info!("line {line}, [{section}]: {key} = {value} is what happens anyway"),
            }
        }
        for misplaced in self.misplaced {
            let (line, message) = (misplaced.line, misplaced.message.clone());
            if !misplaced.agrees(config) {
                self.unknown.push((line, message));
            }
        }
        self.unknown.sort();
        self.unknown
    }
}

/// A value without its place; none for values without a form of their own (an integer beyond 64 bits).
fn plain(value: &Spanned<DeValue<'_>>) -> Option<Value> {
    Value::deserialize(value.clone().into_deserializer()).ok()
}

/// The section of a key of ours.
fn home_of(key: &str, known: &[Section]) -> Option<&'static str> {
    known.iter().find(|(_, names)| names.contains(&key)).map(|(section, _)| *section)
}

fn is_known_section(section: &str) -> bool {
    KNOWN_SECTIONS.iter().any(|(_, foreign)| foreign.contains(&section))
}

fn unknown_section(section: &str, known: &[Section]) -> String {
    let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
    let belongs = KNOWN_SECTIONS.iter().find(|(_, foreign)| foreign.contains(&section));
    let hint = match (belongs, names.iter().find(|name| is_misspelt(section, name))) {
        (Some((name, _)), _) => format!("its keys belong in [{name}]"),
        (None, Some(name)) => format!("did you mean [{name}]?"),
        (None, None) => format!("there are [{}]", names.join("], [")),
    };
    format!("unknown section [{section}]; {hint}")
}

/// A suggestion for an unknown `key` in `section`, as the end of a message.
pub(super) fn suggestion(section: &str, key: &str, known: &[Section]) -> String {
    if let Some((name, _)) = known.iter().find(|(_, keys)| keys.contains(&key)) {
        return format!("; it belongs in [{name}]");
    }
    let own = known.iter().filter(|(name, _)| *name == section);
    let others = known.iter().filter(|(name, _)| *name != section);
    for (name, keys) in own.chain(others) {
        if let Some(meant) = keys.iter().find(|meant| is_misspelt(key, meant)) {
            let place = if *name == section { String::new() } else { format!(" in [{name}]") };
            return format!("; did you mean `{meant}`{place}?");
        }
    }
    String::new()
}

/// Whether `key` is `name` with slips of the pen: its words in the same order, each right, abbreviated or with few wrong
/// letters. Keys that are alike as a whole often mean something else: `load_in_8bit` and `load_in_4bit`, `use_dora` and
/// `use_rslora`, `min_length` and `max_length`.
fn is_misspelt(key: &str, name: &str) -> bool {
    let key = snake_case(key);
    if digits(&key) != digits(name) {
        return false;
    }
    if key.replace('_', "") == name.replace('_', "") {
        return true;
    }
    let (written, meant): (Vec<_>, Vec<_>) = (key.split('_').collect(), name.split('_').collect());
    written.len() == meant.len() && written.iter().zip(meant).all(|(written, meant)| is_word(written, meant))
}

fn is_word(written: &str, meant: &str) -> bool {
    const SHORTEST_ABBREVIATION: usize = 3;
    let slips = match written.len().max(meant.len()) {
        0..=3 => 0,
        4..=7 => 1,
        _ => 2,
    };
    let abbreviated = written.len() >= SHORTEST_ABBREVIATION && meant.starts_with(written);
    let alike = written.get(..1) == meant.get(..1) && strsim::osa_distance(written, meant) <= slips;
    written == meant || abbreviated || alike
}

fn digits(text: &str) -> String {
    text.chars().filter(char::is_ascii_digit).collect()
}

/// `learningRate` and `learning-rate` as `learning_rate`.
fn snake_case(key: &str) -> String {
    let mut snake = String::with_capacity(key.len());
    for c in key.chars() {
        if c.is_ascii_uppercase() && snake.ends_with(|last: char| last.is_ascii_lowercase()) {
            snake.push('_');
        }
        snake.push(if c == '-' { '_' } else { c.to_ascii_lowercase() });
    }
    snake
}

/// The line, from 1, of a byte of the text.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
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
    use super::*;

    #[test]
    fn slips_are_told_from_other_meanings() {
        for (written, meant) in [
            ("learning_rte", "learning_rate"),
            ("learningRate", "learning_rate"),
            ("learning-rate", "learning_rate"),
            ("max_lenght", "max_length"),
            ("sede", "seed"),
            ("eval_step", "eval_steps"),
            ("target_module", "target_modules"),
            ("grad_acc_steps", "gradient_accumulation_steps"),
            ("load_in_4bits", "load_in_4bit"),
            ("wieght_decay", "weight_decay"),
        ] {
            assert!(is_misspelt(written, meant), "{written}");
        }
        for (written, other) in [
            ("load_in_8bit", "load_in_4bit"),
            ("use_dora", "use_rslora"),
            ("min_length", "max_length"),
            ("unpacking", "packing"),
            ("adam_beta3", "adam_beta1"),
            ("adam_beta", "adam_beta1"),
            ("save_steps", "eval_steps"),
            ("bnb_8bit_compute_dtype", "bnb_4bit_compute_dtype"),
            ("bnb_4bit_quant_storage", "bnb_4bit_quant_type"),
            ("lora_beta", "lora_alpha"),
            ("é", "r"),
            ("", "r"),
        ] {
            assert!(!is_misspelt(written, other), "{written}");
        }
    }
}
