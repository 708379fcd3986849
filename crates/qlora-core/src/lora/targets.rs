//! The selection of modules that get an adapter: PEFT's `target_modules` and `exclude_modules`.
//!
//! A list selects by name: an entry matches the module of that name and every module whose name ends in `.entry`. A
//! string is a regular expression that has to match the whole name ([`ModulePattern`]). `"all-linear"` (in any case,
//! targets only) selects every linear layer of the blocks.

use super::pattern::ModulePattern;
use crate::spec::is_linear_in_a_block;
use crate::{Error, Result};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Selects modules by a list of names or by a regular expression.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ModuleFilter {
    /// Names, whole or as the last parts of a name.
    List(Vec<String>),
    /// A regular expression over whole names.
    Pattern(ModulePattern),
}

impl ModuleFilter {
    /// Whether `module` is selected.
    pub fn matches(&self, module: &str) -> bool {
        match self {
            Self::List(entries) => entries.iter().any(|entry| entry_matches(entry, module)),
            Self::Pattern(pattern) => pattern.matches(module),
        }
    }

    /// Refuses an empty list and empty entries; `option` is named in the message.
    pub(super) fn validate(&self, option: &str) -> Result<()> {
        match self {
            Self::List(entries) if entries.is_empty() => {
                Err(Error::Invalid(format!("{option} is empty: name at least one module")))
            }
            Self::List(entries) if entries.iter().any(String::is_empty) => {
                Err(Error::Invalid(format!("{option} has an empty entry")))
            }
            _ => Ok(()),
        }
    }
}

/// Whether one entry of a list selects `module`.
pub(super) fn entry_matches(entry: &str, module: &str) -> bool {
    module.strip_suffix(entry).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The linear layers that get an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TargetModules {
    /// Every linear layer of the blocks, without the output head.
    AllLinear,
    /// Those that a list or a regular expression selects.
    Selected(ModuleFilter),
}

impl TargetModules {
    /// Targets from names, as in `["q_proj", "v_proj"]`.
    pub fn list<S: Into<String>>(entries: impl IntoIterator<Item = S>) -> Self {
        Self::Selected(ModuleFilter::List(entries.into_iter().map(Into::into).collect()))
    }

    /// Targets from a string: `"all-linear"`, or else a regular expression.
    ///
    /// # Errors
    /// If the regular expression cannot be used: see [`ModulePattern::new`].
    pub fn parse(text: &str) -> Result<Self> {
        if text.eq_ignore_ascii_case(ALL_LINEAR) {
            return Ok(Self::AllLinear);
        }
        Ok(Self::Selected(ModuleFilter::Pattern(ModulePattern::new(text)?)))
    }

    /// Whether the module of this full name gets an adapter, before `exclude_modules`. PEFT's decision for lists and
    /// regular expressions; `all-linear` goes by the last part of the name.
    pub fn matches(&self, module: &str) -> bool {
        match self {
            Self::AllLinear => is_linear_in_a_block(module),
            Self::Selected(filter) => filter.matches(module),
        }
    }
}

/// The attention's four layers.
impl Default for TargetModules {
    fn default() -> Self {
        Self::list(["q_proj", "k_proj", "v_proj", "o_proj"])
    }
}

const ALL_LINEAR: &str = "all-linear";

impl Serialize for ModuleFilter {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::List(entries) => entries.serialize(serializer),
            Self::Pattern(pattern) => serializer.serialize_str(pattern.as_str()),
        }
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => serializer.serialize_str(ALL_LINEAR),
            Self::Selected(filter) => filter.serialize(serializer),
        }
    }
}

/// A string or a sequence of strings.
enum TextOrList {
    Text(String),
    List(Vec<String>),
}

impl<'de> Deserialize<'de> for TextOrList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct TextOrListVisitor;
        impl<'de> Visitor<'de> for TextOrListVisitor {
            type Value = TextOrList;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(
                    "a list of module names, or one string (a regular expression; for targets also \"all-linear\")",
                )
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<TextOrList, E> {
                Ok(TextOrList::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> std::result::Result<TextOrList, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = sequence.next_element()? {
                    entries.push(entry);
                }
                Ok(TextOrList::List(entries))
            }
        }
        deserializer.deserialize_any(TextOrListVisitor)
    }
}

impl<'de> Deserialize<'de> for ModuleFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match TextOrList::deserialize(deserializer)? {
            TextOrList::Text(text) => ModulePattern::new(text).map(Self::Pattern).map_err(serde::de::Error::custom),
            TextOrList::List(entries) => Ok(Self::List(entries)),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match TextOrList::deserialize(deserializer)? {
            TextOrList::Text(text) => Self::parse(&text).map_err(serde::de::Error::custom),
            TextOrList::List(entries) => Ok(Self::list(entries)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_entry_is_a_whole_name_or_its_last_parts() {
        let name = "model.layers.1.self_attn.q_proj";
        for (entry, expected) in [
            ("q_proj", true),
            ("self_attn.q_proj", true),
            ("1.self_attn.q_proj", true),
            (name, true),
            ("proj", false),
            ("attn.q_proj", false),
            ("q_proj.", false),
            (".q_proj", false),
            ("self_attn", false),
            ("x.model.layers.1.self_attn.q_proj", false),
        ] {
            assert_eq!(TargetModules::list([entry]).matches(name), expected, "{entry}");
        }
        assert!(!TargetModules::list(["1.self_attn.q_proj"]).matches("model.layers.11.self_attn.q_proj"));
    }

    #[test]
    fn all_linear_is_recognized_in_any_case_and_leaves_the_head_out() {
        let targets: TargetModules = serde_json::from_str("\"All-Linear\"").unwrap();
        assert_eq!(targets, TargetModules::AllLinear);
        assert!(targets.matches("model.layers.0.mlp.down_proj") && !targets.matches("lm_head"));
        assert_eq!(serde_json::to_string(&targets).unwrap(), "\"all-linear\"");
    }

    #[test]
    fn lists_and_patterns_survive_serde() {
        for json in [r#"["q_proj","v_proj"]"#, r#"".*\\.(q|v)_proj""#] {
            let targets: TargetModules = serde_json::from_str(json).unwrap();
            assert_eq!(serde_json::to_string(&targets).unwrap(), json);
        }
        let error = serde_json::from_str::<TargetModules>(r#""(?!a)b""#).unwrap_err().to_string();
        assert!(error.contains("lookahead"), "{error}");
        let error = serde_json::from_str::<TargetModules>("3").unwrap_err().to_string();
        assert!(error.contains("a list of module names"), "{error}");
    }
}
