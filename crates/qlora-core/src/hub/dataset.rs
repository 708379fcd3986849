//! Data sets: the caller chooses files from the list of a revision, and they are put into the shared cache
//! (`datasets--org--name`), where `huggingface_hub` and `datasets` find them too.

use std::fs;
use std::path::{Path, PathBuf};

use super::settings::{Kind, Settings};
use super::{Request, Snapshot, Wanted, request};
use crate::error::{Error, Result};
use crate::hub_id::is_hub_id;
use crate::open::OpenOptions;

/// The branch on which the hub keeps every public data set as Parquet: `{config}/{split}/NNNN.parquet`.
pub const PARQUET_REVISION: &str = "refs/convert/parquet";

/// Chooses from the names of a revision's files. With the second argument it can get one of them first, such as the card
/// (`README.md`).
pub type Choose<'a> = dyn Fn(&[String], &dyn Fn(&str) -> Result<PathBuf>) -> Result<Vec<String>> + 'a;

/// The chosen files of a data set in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DatasetSnapshot {
    /// The commit they are from.
    pub commit: String,
    /// The files, in the order in which they were chosen.
    pub files: Vec<PathBuf>,
}

/// Makes sure that the chosen files of the data set `id` (`org/name`, or an old one without `org/`) are in the cache. `choose` may
/// be called twice: with the list of the hub, and with that of the cache if the hub cannot be asked.
///
/// # Errors
/// As [`snapshot`](super::snapshot), and as `choose` says.
pub fn dataset_snapshot(id: &str, options: &OpenOptions, choose: &Choose<'_>) -> Result<DatasetSnapshot> {
    let settings = Settings::new(options, |name| std::env::var(name).ok().filter(|value| !value.is_empty()))?;
    dataset_snapshot_with(id, &settings, choose)
}

pub(super) fn dataset_snapshot_with(id: &str, settings: &Settings, choose: &Choose<'_>) -> Result<DatasetSnapshot> {
    if !is_hub_id(id) {
        return Err(Error::Invalid(format!(
            "{id:?} is no file or folder here, and not the id of a data set on the hub (org/name)"
        )));
    }
    let settings = Settings { kind: Kind::Dataset, ..settings.clone() };
    let chosen = std::cell::RefCell::new(Vec::new());
    let remember = |files: &[String], get: &dyn Fn(&str) -> Result<PathBuf>| {
        let names = choose(files, get)?;
        chosen.borrow_mut().clone_from(&names);
        Ok(names)
    };
    let Snapshot { folder, commit } = request(&Request { id, wanted: Wanted::Data(&remember), settings: &settings })?;
    let files = chosen.take().iter().map(|name| folder.join(name)).collect();
    Ok(DatasetSnapshot { commit, files })
}

/// The files of a commit that the cache has, by their names in the repository.
pub(super) fn cached_files(folder: &Path) -> Vec<String> {
    const MAX_DEPTH: usize = 16;
    fn collect(folder: &Path, prefix: &str, depth: usize, names: &mut Vec<String>) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            let (path, name) = (entry.path(), format!("{prefix}{}", entry.file_name().to_string_lossy()));
            if path.is_dir() && depth < MAX_DEPTH {
                collect(&path, &format!("{name}/"), depth + 1, names);
            } else if path.is_file() {
                names.push(name);
            }
        }
    }
    let mut names = Vec::new();
    collect(folder, "", 0, &mut names);
    names.sort();
    names
}

/// Whether a file of a repository has a name that stays in its folder.
pub(super) fn is_plain(name: &str) -> bool {
    !name.contains(['\\', ':']) && !name.split('/').any(|part| part.is_empty() || part == "." || part == "..")
}

/// Of files such as `train-00001-of-00003.parquet` one that should be among them and is not: the cache may have but some of them.
pub(super) fn missing_part(names: &[String]) -> Option<String> {
    names.iter().find_map(|name| {
        let (head, tail) = name.split_once("-of-")?;
        let count: String = tail.chars().take_while(char::is_ascii_digit).collect();
        let (stem, number) = head.rsplit_once('-')?;
        let is_part =
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) && number.len() == count.len();
        let total: usize = count.parse().ok().filter(|total| is_part && *total <= 100_000)?;
        let part = |i: usize| format!("{stem}-{i:0width$}-of-{tail}", width = number.len());
        // Some data sets count from 1.
        let first = usize::from(!names.contains(&part(0)) && names.contains(&part(total)));
        (first..first + total).map(part).find(|part| !names.contains(part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_are_missing_are_found() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(missing_part(&names(&["a-00000-of-00002.parquet", "a-00001-of-00002.parquet", "b.json"])), None);
        assert_eq!(missing_part(&names(&["a-1-of-2.json", "a-2-of-2.json", "state-of-art.csv"])), None);
        assert_eq!(
            missing_part(&names(&["d/a-00000-of-00002.parquet"])).as_deref(),
            Some("d/a-00001-of-00002.parquet")
        );
    }

    #[test]
    fn names_stay_in_their_folder() {
        assert!(is_plain("data/train.json"));
        for name in ["../x", "a/../x", "/x", "a//b", "c:x", "a\\b", "."] {
            assert!(!is_plain(name), "{name}");
        }
    }
}
