//! Folders and patterns to files.

use std::fs;
use std::path::{Path, PathBuf};

use glob::MatchOptions;

use super::FORMATS;
use super::input::{STDIN, data_extension};
use crate::error::{Error, Result};

/// The extensions of data files, before a `.gz` or `.zst`.
pub fn data_extensions() -> impl Iterator<Item = &'static str> {
    FORMATS.iter().flat_map(|format| format.extensions).copied()
}

/// Files in a folder that are no data.
const NO_DATA: [&str; 7] = [
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "adapter_config.json",
    "tokenizer.json",
];
/// Folders in folders.
const MAX_DEPTH: usize = 16;

/// As a shell does, but `**` may stand for no folder, and hidden files are left out.
pub(crate) const PATTERNS: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// The files that a path means, sorted by name: itself, those of a folder and its folders, or those that fit a pattern with `*`,
/// `?` or `[...]`. A path that does not exist is itself; opening it says so.
///
/// # Errors
/// If a folder or pattern has no data files, or cannot be read.
pub fn expand(path: &Path) -> Result<Vec<PathBuf>> {
    let text = path.to_string_lossy();
    let files = if path == Path::new(STDIN) || path.is_file() {
        return Ok(vec![path.to_owned()]);
    } else if path.is_dir() {
        let mut files = Vec::new();
        collect(path, 0, &mut files)?;
        files
    } else if text.contains(['*', '?', '[']) {
        let wrong = |error: glob::PatternError| Error::data(path, None, format!("not a pattern of files: {error}"));
        let found = glob::glob_with(&text, PATTERNS).map_err(wrong)?;
        found.filter_map(|entry| entry.ok()).filter(|file| file.is_file()).collect()
    } else {
        return Ok(vec![path.to_owned()]);
    };
    if files.is_empty() {
        let message = if path.is_dir() {
            format!("the folder has no data files (.{})", data_extensions().collect::<Vec<_>>().join(", ."))
        } else {
            "no file fits the pattern".to_owned()
        };
        return Err(Error::data(path, None, message));
    }
    let mut files = files;
    files.sort();
    Ok(files)
}

/// Whether a file that was not named by itself is one of data.
pub(crate) fn is_data(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let known = data_extension(path).is_some_and(|extension| data_extensions().any(|known| known == extension));
    known && !name.starts_with(['.', '_']) && !NO_DATA.contains(&name.as_ref())
}

fn collect(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    let io = |error| Error::io(folder, error);
    for entry in fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if path.is_dir() && !hidden && depth < MAX_DEPTH {
            collect(&path, depth + 1, files)?;
        } else if path.is_file() && is_data(&path) {
            files.push(path);
        }
    }
    Ok(())
}
