//! The search for cuDNN's library, and the versions that are accepted.

use std::env;
use std::path::{Path, PathBuf};

use super::super::libraries::folders;
use super::api::Api;
use super::companions;
use super::error::{CudnnError, Result};
use crate::libraries::children;
use crate::platform::HAS_DLLS;

/// Names the library, or the directory that holds it, and goes before all other places.
const VARIABLE: &str = "QLORA_CUDNN_PATH";

/// File name of the library.
const FILE: &str = if HAS_DLLS { "cudnn64_9.dll" } else { "libcudnn.so.9" };

/// The oldest version that is used.
const MINIMUM: usize = 91_002;

/// The first version whose backward masks the end of a sequence by itself when its length is not a multiple of 128.
pub(super) const MASKS_THE_END: usize = 91_501;

/// Opens the newest library that can be found, if its version is usable.
///
/// Only one cuDNN can live in a process: the parts of a second one would be taken from the first, whatever path it is
/// opened by. So the version is read off the file names before anything is opened, and the first library that opens
/// is the last that is tried.
pub(super) fn open() -> Result<&'static Api> {
    let mut tried = Vec::new();
    for candidate in candidates() {
        let shown = candidate.path.display();
        if let Some(reason) = candidate.version.and_then(refusal) {
            tried.push(format!("{shown}: {reason}"));
            continue;
        }
        match Api::open(&candidate.path) {
            Ok(api) => {
                check_version(api)?;
                companions::open(api).map_err(CudnnError::NotAvailable)?;
                return Ok(api);
            }
            Err(error) => tried.push(format!("{shown}: {error}")),
        }
    }
    if tried.is_empty() {
        tried.push(format!("no {FILE}"));
    }
    Err(CudnnError::NotAvailable(format!("{} (set {VARIABLE} to the library)", tried.join("; "))))
}

/// Refuses versions that are too old or known to compute wrong gradients.
fn check_version(api: &Api) -> Result<()> {
    let version = api.version();
    match refusal(version) {
        None => Ok(()),
        Some(reason) => Err(CudnnError::Version {
            version: version_text(version),
            path: api.path.clone(),
            reason: reason.to_owned(),
        }),
    }
}

/// `9.19.0` of 91900.
pub(super) fn version_text(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// The reason why a version is not used, if it is not.
fn refusal(version: usize) -> Option<&'static str> {
    match version / 100 {
        minor if minor / 100 != 9 => Some("only cuDNN 9 is known to this program"),
        910 if version < 91_002 => Some("9.10.0 and 9.10.1 compute wrong attention gradients"),
        912 => Some("9.12 is reported to return NaN attention gradients on Hopper"),
        925 | 926 => Some("9.25 and 9.26 are reported to return NaN attention gradients on Hopper"),
        _ if version < MINIMUM => Some("9.10.2 or later is needed"),
        _ => None,
    }
}

/// A library file, and its version if the file or its package tells.
#[derive(Debug, PartialEq, Eq)]
struct Candidate {
    path: PathBuf,
    version: Option<usize>,
}

/// Every library that can be found, the newest first, and at the end the bare name for the dynamic loader.
fn candidates() -> Vec<Candidate> {
    if let Some(path) = env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        // Who names a library wants that one or none.
        return vec![Candidate { path: if path.is_dir() { path.join(FILE) } else { path }, version: None }];
    }
    let mut found: Vec<Candidate> = Vec::new();
    for folder in folders("cudnn") {
        let path = folder.join(FILE);
        if path.is_file() && found.iter().all(|known| known.path != path) {
            found.push(Candidate { version: version_of_file(&path), path });
        }
    }
    // Stable: equal versions stay in the order of the folders.
    found.sort_by_key(|candidate| std::cmp::Reverse(candidate.version));
    found.push(Candidate { path: PathBuf::from(FILE), version: None });
    found
}

/// The version from the name that a link leads to (`libcudnn.so.9.14.0`), or from the Python package beside it
/// (`nvidia_cudnn_cu13-9.19.0.56.dist-info`).
fn version_of_file(path: &Path) -> Option<usize> {
    let real = path.canonicalize().ok()?;
    let name = real.file_name()?.to_str()?;
    let from_name = name.strip_prefix("libcudnn.so.").and_then(parse_version);
    from_name.or_else(|| {
        let packages = path.ancestors().nth(4)?;
        children(packages, "nvidia_cudnn").iter().find_map(|info| {
            let name = info.file_name()?.to_str()?.strip_suffix(".dist-info")?;
            parse_version(name.split_once('-')?.1)
        })
    })
}

/// 91900 of `9.19.0` or `9.19.0.56`.
fn parse_version(text: &str) -> Option<usize> {
    let mut parts = text.split('.').map(str::parse::<usize>);
    let mut part = || parts.next()?.ok();
    Some(part()? * 10_000 + part()? * 100 + part()?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn versions_known_to_be_bad_are_refused() {
        for bad in [90_000, 90_999, 91_000, 91_001, 91_200, 92_500, 92_601, 100_000] {
            assert!(refusal(bad).is_some(), "{bad}");
        }
        for good in [91_002, 91_400, 91_501, 91_900, 91_901, 92_000, 92_400, 92_700, 92_800] {
            assert!(refusal(good).is_none(), "{good}");
        }
        assert_eq!(version_text(91_901), "9.19.1");
    }

    #[test]
    fn versions_are_read_off_file_names() {
        assert_eq!(parse_version("9.14.0"), Some(91_400));
        assert_eq!(parse_version("9.19.0.56"), Some(91_900));
        assert_eq!(parse_version("9"), None);

        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("nvidia").join("cudnn").join("lib");
        fs::create_dir_all(&library).unwrap();
        let file = library.join(FILE);
        fs::write(&file, "").unwrap();
        assert_eq!(version_of_file(&file), None);
        fs::create_dir(folder.path().join("nvidia_cudnn_cu13-9.19.0.56.dist-info")).unwrap();
        assert_eq!(version_of_file(&file), Some(91_900));
    }
}
