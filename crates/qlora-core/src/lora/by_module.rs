//! Options that differ from module to module: PEFT's `rank_pattern`, `alpha_pattern`, and `layers_to_transform` with
//! `layers_pattern`.

use std::collections::BTreeMap;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::pattern::ModulePattern;
use crate::Result;

/// A value for modules whose name ends in a match of a regular expression. PEFT tries the expressions in their sorted order,
/// and the first that matches counts.
#[derive(Clone, Debug, PartialEq)]
pub struct ByModule<T> {
    entries: Vec<(String, ModulePattern, T)>,
}

impl<T> Default for ByModule<T> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

impl<T> ByModule<T> {
    /// Values by expression, such as `q_proj` or `layers\.0\..*`.
    ///
    /// # Errors
    /// If an expression cannot be used: see [`ModulePattern::new`].
    pub fn new(map: BTreeMap<String, T>) -> Result<Self> {
        let compile = |(end, value): (String, T)| {
            let pattern = ModulePattern::new(format!(r"(.*\.)?({end})"))?;
            Ok((end, pattern, value))
        };
        Ok(Self { entries: map.into_iter().map(compile).collect::<Result<_>>()? })
    }

    /// Whether there is no expression.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The expressions and their values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.entries.iter().map(|(end, _, value)| (end.as_str(), value))
    }
}

impl<T: Copy> ByModule<T> {
    /// The value of the module of this full name, if an expression matches.
    pub fn get(&self, module: &str) -> Option<T> {
        self.entries.iter().find(|(_, pattern, _)| pattern.matches(module)).map(|(.., value)| *value)
    }
}

impl<T: Serialize> Serialize for ByModule<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for ByModule<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let map = Option::<BTreeMap<String, T>>::deserialize(deserializer)?.unwrap_or_default();
        Self::new(map).map_err(D::Error::custom)
    }
}

/// The blocks of which modules are adapted, if not of all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Layers {
    /// `layers_to_transform`: the blocks' numbers.
    pub numbers: Vec<usize>,
    /// `layers_pattern`: what stands before a block's number in a module's name; empty: anything.
    before: Vec<(String, ModulePattern)>,
}

impl Layers {
    /// Blocks by number, and expressions for what stands before the number.
    ///
    /// # Errors
    /// If an expression cannot be used.
    pub fn new(numbers: Vec<usize>, before: Vec<String>) -> Result<Self> {
        let compile = |text: String| {
            let pattern = ModulePattern::new(format!(r"(?:.*\.)?{text}"))?;
            Ok((text, pattern))
        };
        Ok(Self { numbers, before: before.into_iter().map(compile).collect::<Result<_>>()? })
    }

    /// `layers_pattern`.
    pub fn patterns(&self) -> impl Iterator<Item = &str> {
        self.before.iter().map(|(text, _)| text.as_str())
    }

    /// Whether the module is in one of the blocks.
    pub fn contain(&self, module: &str) -> bool {
        let Some((before, number)) = block_of(module) else { return false };
        let pattern = match self.before.as_slice() {
            [] => before.contains('.'),
            patterns => patterns.iter().any(|(_, pattern)| pattern.matches(before)),
        };
        pattern && self.numbers.contains(&number)
    }
}

/// A module's block number and the prefix before it: `model.layers` and 3 of `model.layers.3.mlp`.
fn block_of(module: &str) -> Option<(&str, usize)> {
    let mut start = 0;
    for part in module.split('.') {
        if start > 0
            && start + part.len() < module.len()
            && let Ok(number) = part.parse()
        {
            return Some((&module[..start - 1], number));
        }
        start += part.len() + 1;
    }
    None
}
