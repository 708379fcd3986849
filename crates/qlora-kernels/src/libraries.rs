//! Where NVIDIA's libraries lie: for what is opened at run time, and for whoever starts a program that is linked to them.
//!
//! Files are looked for, nothing is opened.

use std::collections::HashMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use crate::platform::HAS_DLLS;

/// Folders that the dynamic loader searches without being told.
const LOADER: [&str; 6] =
    ["usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "lib64", "lib"];

/// Folders that drivers and toolkits use without telling the loader: the toolkit's installer, WSL, NixOS, containers of notebooks.
const FIXED: [&str; 6] = [
    "usr/local/cuda/lib64",
    "usr/lib/wsl/lib",
    "run/opengl-driver/lib",
    "usr/lib64-nvidia",
    "usr/local/nvidia/lib64",
    "usr/local/nvidia/lib",
];

/// What the driver makes where there is a card: Linux, WSL, Jetson.
const CARDS: [&str; 4] = ["dev/nvidiactl", "dev/nvidia0", "dev/dxg", "dev/nvhost-gpu"];

/// A search over the files of a system and the environment of a process.
#[derive(Clone, Debug)]
pub struct LibrarySearch {
    root: PathBuf,
    program: Option<PathBuf>,
    variables: HashMap<OsString, OsString>,
}

impl LibrarySearch {
    /// The search of this process.
    pub fn of_this_process() -> Self {
        Self { root: PathBuf::from("/"), program: env::current_exe().ok(), variables: env::vars_os().collect() }
    }

    /// The search of a process that runs `program` with these variables, where the system's files lie under `root`. For tests.
    pub fn under(root: &Path, program: &Path, variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        Self { root: root.to_owned(), program: Some(program.to_owned()), variables: variables.into_iter().collect() }
    }

    /// The program that runs.
    pub fn program(&self) -> Option<&Path> {
        self.program.as_deref()
    }

    /// A variable of the environment, unless it is empty.
    pub fn variable(&self, name: &str) -> Option<&OsStr> {
        self.variables.get(OsStr::new(name)).map(OsString::as_os_str).filter(|value| !value.is_empty())
    }

    /// The folders in which a library of NVIDIA's may lie, the first to be preferred: `LD_LIBRARY_PATH`, the packages of Python
    /// (`nvidia/<package>/lib`), `CUDA_HOME` and `CUDA_PATH`, the loader's own folders and those of drivers and toolkits.
    pub fn folders(&self, package: &str) -> Vec<PathBuf> {
        let mut folders = self.paths("LD_LIBRARY_PATH");
        if HAS_DLLS {
            folders.extend(self.paths("PATH"));
        }
        for prefix in self.python_prefixes() {
            for library in children(&prefix.join("lib"), "python3").into_iter().chain([prefix.join("Lib")]) {
                for packages in ["site-packages", "dist-packages"] {
                    let folder = library.join(packages).join("nvidia").join(package);
                    folders.push(folder.join(if HAS_DLLS { "bin" } else { "lib" }));
                }
            }
        }
        for toolkit in ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| self.variable(name)) {
            folders.extend(["lib64", "targets/x86_64-linux/lib", "lib"].map(|folder| Path::new(toolkit).join(folder)));
        }
        folders.extend(self.system_folders());
        folders
    }

    /// The first file of this name in [`Self::folders`].
    pub fn find(&self, file: &str, package: &str) -> Option<PathBuf> {
        self.folders(package).into_iter().map(|folder| folder.join(file)).find(|path| path.is_file())
    }

    /// The driver's library, `libcuda.so.1`. The toolkit has none that works, so only the system's folders count, and what
    /// `LD_LIBRARY_PATH` adds to them.
    pub fn driver(&self) -> Option<PathBuf> {
        let folders = self.paths("LD_LIBRARY_PATH").into_iter().chain(self.system_folders());
        folders.map(|folder| folder.join("libcuda.so.1")).find(|path| path.is_file())
    }

    /// Whether the driver shows a card.
    pub fn has_card(&self) -> bool {
        CARDS.iter().any(|file| self.root.join(file).exists())
    }

    /// Whether the dynamic loader searches a folder as things are.
    pub fn is_loaders(&self, folder: &Path) -> bool {
        LOADER.iter().any(|known| self.root.join(known) == folder)
            || self.paths("LD_LIBRARY_PATH").iter().any(|known| known == folder)
    }

    /// A Python beside the program (`bin/qlora` and `bin/python3` of one environment), which has pip packages of its own.
    pub fn python_beside(&self) -> Option<PathBuf> {
        let folder = self.program()?.parent()?;
        ["python3", "python"].iter().map(|name| folder.join(name)).find(|path| path.exists())
    }

    fn paths(&self, variable: &str) -> Vec<PathBuf> {
        self.variable(variable).map(|value| env::split_paths(value).collect()).unwrap_or_default()
    }

    fn system_folders(&self) -> Vec<PathBuf> {
        let mut folders: Vec<PathBuf> = LOADER.iter().map(|folder| self.root.join(folder)).collect();
        self.configured(&self.root.join("etc/ld.so.conf"), 0, &mut folders);
        folders.extend(FIXED.iter().map(|folder| self.root.join(folder)));
        folders
    }

    /// Adds the folders of a file like `/etc/ld.so.conf`: a folder a line, or `include` with a file or `folder/*.conf`.
    fn configured(&self, file: &Path, depth: usize, folders: &mut Vec<PathBuf>) {
        let Ok(text) = fs::read_to_string(file) else { return };
        let at = |path: &str| match path.strip_prefix('/') {
            Some(path) => self.root.join(path),
            None => file.with_file_name(path),
        };
        for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
            match line.strip_prefix("include") {
                // Files that include each other end here.
                Some(_) if depth > 4 => (),
                Some(included) => match at(included.trim()) {
                    pattern if pattern.file_name() == Some(OsStr::new("*.conf")) => {
                        let files = children(pattern.parent().unwrap_or(&pattern), "");
                        let files = files.iter().filter(|file| file.extension() == Some(OsStr::new("conf")));
                        files.for_each(|file| self.configured(file, depth + 1, folders));
                    }
                    file => self.configured(&file, depth + 1, folders),
                },
                None if line.is_empty() => (),
                None => folders.push(at(line)),
            }
        }
    }

    /// Directories that hold Python installations: the program's own, the active environments, then whatever is on the search path.
    fn python_prefixes(&self) -> Vec<PathBuf> {
        // `<prefix>/bin/qlora`, `<prefix>/libexec/qlora/qlora-cuda`.
        let own = self.program.iter().flat_map(|program| program.ancestors().skip(2).take(2)).map(Path::to_path_buf);
        let mut prefixes: Vec<PathBuf> = own.collect();
        prefixes
            .extend(["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| self.variable(name)).map(PathBuf::from));
        for folder in self.paths("PATH") {
            if ["python3", "python", "python.exe"].iter().any(|name| folder.join(name).exists()) {
                prefixes.extend(folder.parent().map(Path::to_path_buf));
            }
        }
        prefixes.extend(self.variable("HOME").map(|home| Path::new(home).join(".local")));
        prefixes.push(self.root.join("usr/local"));
        prefixes
    }
}

/// Entries of `folder` whose name starts with `start`, in a fixed order.
pub(crate) fn children(folder: &Path, start: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let starts = |path: &Path| path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with(start));
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| starts(path)).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(file: &Path) {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "").unwrap();
    }

    fn search(root: &Path, variables: &[(&str, &Path)]) -> LibrarySearch {
        let variables = variables.iter().map(|(name, value)| (OsString::from(name), value.as_os_str().to_owned()));
        LibrarySearch::under(root, &root.join("env/bin/qlora"), variables)
    }

    #[test]
    fn every_place_is_searched_and_nearer_ones_first() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let file = "libcublas.so.13";
        let wheel = Path::new("lib/python3.12/site-packages/nvidia/cu13/lib").join(file);
        let (toolkit, active, given) = (root.join("toolkit"), root.join("active"), root.join("given"));
        // From the last that is taken to the first.
        let places = [
            root.join("opt/cuda/lib").join(file),
            root.join("usr/lib/x86_64-linux-gnu").join(file),
            toolkit.join("lib64").join(file),
            active.join(&wheel),
            root.join("env").join(&wheel),
            given.join(file),
        ];
        fs::create_dir_all(root.join("etc/ld.so.conf.d")).unwrap();
        fs::write(root.join("etc/ld.so.conf"), "include /etc/ld.so.conf.d/*.conf\ninclude ld.so.conf\n").unwrap();
        fs::write(root.join("etc/ld.so.conf.d/cuda.conf"), "# the toolkit\n/opt/cuda/lib # 13\n\n").unwrap();
        fs::write(root.join("etc/ld.so.conf.d/cuda.bak"), "/other\n").unwrap();
        let search =
            search(root, &[("CUDA_HOME", &toolkit), ("VIRTUAL_ENV", &active), ("LD_LIBRARY_PATH", given.as_path())]);
        assert_eq!(search.find(file, "cu13"), None);
        for place in places {
            put(&place);
            assert_eq!(search.find(file, "cu13"), Some(place));
        }
        assert!(!search.folders("cu13").contains(&root.join("other")));
    }

    #[test]
    fn the_loaders_folders_are_known() {
        let folder = tempfile::tempdir().unwrap();
        let (root, given) = (folder.path(), folder.path().join("given"));
        let search = search(root, &[("LD_LIBRARY_PATH", &given)]);
        for known in [given, root.join("usr/lib64"), root.join("usr/lib/x86_64-linux-gnu")] {
            assert!(search.is_loaders(&known), "{}", known.display());
        }
        assert!(!search.is_loaders(&root.join("usr/local/cuda/lib64")));
    }

    #[test]
    fn driver_and_card_are_the_systems() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let toolkit = root.join("toolkit");
        let search = search(root, &[("CUDA_HOME", &toolkit)]);
        put(&toolkit.join("lib64/libcuda.so.1"));
        assert_eq!((search.driver(), search.has_card()), (None, false));
        let driver = root.join("usr/lib/wsl/lib/libcuda.so.1");
        put(&driver);
        put(&root.join("dev/dxg"));
        assert_eq!((search.driver(), search.has_card()), (Some(driver), true));
    }

    #[test]
    fn the_python_beside_the_program_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let search = search(folder.path(), &[]);
        assert_eq!(search.python_beside(), None);
        let python = folder.path().join("env/bin/python3");
        put(&python);
        assert_eq!(search.python_beside(), Some(python));
    }
}
