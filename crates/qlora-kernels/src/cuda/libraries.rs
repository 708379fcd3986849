//! The paths of the libraries that are opened at run time.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

/// The folders in which a library of NVIDIA's may lie: the loader's own paths, as far as they are known, and the
/// packages of Python (`nvidia/<package>/lib`).
pub(super) fn folders(package: &str) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = env::split_paths(&env::var_os("LD_LIBRARY_PATH").unwrap_or_default()).collect();
    if cfg!(windows) {
        folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    }
    for prefix in python_prefixes() {
        for library in children(&prefix.join("lib"), "python3").into_iter().chain([prefix.join("Lib")]) {
            for packages in ["site-packages", "dist-packages"] {
                let folder = library.join(packages).join("nvidia").join(package);
                folders.push(folder.join(if cfg!(windows) { "bin" } else { "lib" }));
            }
        }
    }
    folders
        .extend(["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(|path| Path::new(&path).join("lib64")));
    let fixed = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/cuda/lib64"];
    folders.extend(fixed.map(PathBuf::from));
    folders
}

/// Directories that hold Python installations: the active environments, then whatever is on the search path.
fn python_prefixes() -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    let path = env::var_os("PATH").unwrap_or_default();
    for folder in env::split_paths(&path) {
        if ["python3", "python", "python.exe"].iter().any(|name| folder.join(name).exists()) {
            prefixes.extend(folder.parent().map(Path::to_path_buf));
        }
    }
    if let Some(home) = env::var_os("HOME") {
        prefixes.push(Path::new(&home).join(".local"));
    }
    prefixes.push(PathBuf::from("/usr/local"));
    prefixes
}

/// Entries of `folder` whose name starts with `start`, in a fixed order.
pub(super) fn children(folder: &Path, start: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let starts = |path: &Path| path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(start));
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| starts(path)).collect();
    paths.sort();
    paths
}

/// A struct of C functions that are looked up by their symbols in a library that was opened at run time. Whoever writes a
/// table vouches that each symbol is a function with exactly the signature that stands behind it.
macro_rules! function_table {
    (
        $(#[$doc:meta])*
        struct $name:ident;
        $($field:ident : $symbol:literal = fn($($arg:ty),*) -> $ret:ty;)*
    ) => {
        $(#[$doc])*
        pub(super) struct $name {
            /// Path or name that the library was opened by.
            pub(super) path: String,
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> $ret,)*
        }

        impl $name {
            fn resolve(library: &Library, path: String) -> std::result::Result<Self, libloading::Error> {
                Ok(Self {
                    path,
                    $($field: {
                        // SAFETY: the symbol is a C function with exactly this signature: the table says so.
                        let symbol = unsafe {
                            library.get::<unsafe extern "C" fn($($arg),*) -> $ret>(concat!($symbol, "\0").as_bytes())?
                        };
                        *symbol
                    },)*
                })
            }
        }
    };
}
pub(super) use function_table;
