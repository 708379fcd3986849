//! The start of the program that is built with CUDA.
//!
//! A program with CUDA does not start where NVIDIA's libraries are missing, and they lie in many places. So an installation for GPUs
//! consists of this program, which needs none of them, and beside it `qlora-cuda`: this one finds driver and libraries and is replaced
//! by the other; or says what is missing and what brings it; or does the work on the CPU.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};
use qlora::kernels::libraries::LibrarySearch;

use crate::cuda_libraries::{self, CudaLibrary, LINKED, OPENED};
use crate::platform;

/// The variable that says where commands are to run.
pub(crate) const BACKEND: &str = "QLORA_BACKEND";

/// The program with CUDA, as seen from the folder of this one: in an archive that was unpacked flat, and in an installation.
const PLACES: [&str; 2] = ["qlora-cuda", "../libexec/qlora/qlora-cuda"];

/// The value of `QLORA_BACKEND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    /// The GPU if there is one.
    Auto,
    /// This program.
    Cpu,
    /// The program with CUDA, or an error.
    Cuda,
}

/// The state of an installation for GPUs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Cuda {
    /// No program with CUDA is beside this one.
    NotInstalled,
    /// `QLORA_BACKEND=cpu`.
    NotWanted,
    NoDriver,
    NoCard,
    /// There is a card, but not all that the program is linked to.
    Missing(Vec<&'static CudaLibrary>),
    Ready {
        program: PathBuf,
        /// A value for `LD_LIBRARY_PATH`, if the loader would not find everything as things are.
        library_path: Option<OsString>,
    },
}

impl Cuda {
    /// What is there.
    ///
    /// # Errors
    /// If `QLORA_BACKEND` has no value that is known.
    pub(crate) fn find(search: &LibrarySearch) -> Result<Self> {
        let backend = backend(search)?;
        let Some(program) = search.program().and_then(program_beside) else { return Ok(Self::NotInstalled) };
        if backend == Backend::Cpu {
            return Ok(Self::NotWanted);
        }
        if search.driver().is_none() {
            return Ok(Self::NoDriver);
        }
        // Who wants CUDA at any price hears from the driver what is wrong.
        if backend == Backend::Auto && !search.has_card() {
            return Ok(Self::NoCard);
        }
        let missing: Vec<_> = LINKED.iter().filter(|library| library.find(search).is_none()).collect();
        if !missing.is_empty() {
            return Ok(Self::Missing(missing));
        }
        Ok(Self::Ready { program, library_path: library_path(search) })
    }

    /// The obstacle, in words, and what to do about it.
    pub(crate) fn obstacle(&self, search: &LibrarySearch) -> Option<(String, String)> {
        let (what, advice) = match self {
            Self::Ready { .. } => return None,
            Self::NotInstalled => (
                "this program is built without CUDA, and there is no qlora-cuda beside it".to_owned(),
                "install the build for NVIDIA GPUs: pip install 'qlora-cli[cuda]', or the archive with cuda in its name; \
                 from source, build with --features cuda"
                    .to_owned(),
            ),
            Self::NotWanted => (format!("{BACKEND}=cpu"), format!("unset {BACKEND} to use a GPU")),
            Self::NoDriver => (
                "no NVIDIA driver (libcuda.so.1)".to_owned(),
                "if there is a card: install NVIDIA's driver, 580 or newer; in a container, start it with --gpus all".to_owned(),
            ),
            Self::NoCard => (
                "no NVIDIA card (the driver's library is there, /dev/nvidia0 is not)".to_owned(),
                "in a container, start it with --gpus all".to_owned(),
            ),
            Self::Missing(libraries) => (
                format!("missing: {}", cuda_libraries::names(libraries)),
                format!(
                    "{}; or install CUDA 13 and set CUDA_HOME to its folder",
                    cuda_libraries::pip_command(search, libraries)
                ),
            ),
        };
        Some((what, advice))
    }
}

/// Starts the program with CUDA in place of this one, if there is one and a GPU for it. Returns where the work is to be done here, with
/// the reason if one might wonder.
///
/// # Errors
/// If there is a card that cannot be used as things are, or `QLORA_BACKEND` asks for one; the message says what to do.
pub(crate) fn hand_over() -> Result<Option<String>> {
    let search = LibrarySearch::of_this_process();
    let cuda = Cuda::find(&search)?;
    if let Cuda::Ready { program, library_path } = &cuda {
        let mut command = Command::new(program);
        command.args(env::args_os().skip(1));
        if let Some(path) = library_path {
            command.env("LD_LIBRARY_PATH", path);
        }
        let error = platform::replace_process(&mut command);
        bail!("{} does not start: {error}; {BACKEND}=cpu runs on the CPU", program.display());
    }
    let Some((what, advice)) = cuda.obstacle(&search) else { return Ok(None) };
    match (backend(&search)?, &cuda) {
        (Backend::Cuda, _) => bail!("{BACKEND}=cuda: {what}. To do: {advice}"),
        // A run on the CPU would take days instead of saying what is missing.
        (_, Cuda::Missing(_)) => {
            bail!("the NVIDIA card cannot be used: {what}. To do: {advice}. {BACKEND}=cpu runs on the CPU")
        }
        (_, Cuda::NoDriver | Cuda::NoCard) => Ok(Some(format!("{what}: running on the CPU"))),
        (_, _) => Ok(None),
    }
}

fn backend(search: &LibrarySearch) -> Result<Backend> {
    match search.variable(BACKEND).map(|value| value.to_string_lossy().into_owned()).as_deref() {
        None | Some("auto") => Ok(Backend::Auto),
        Some("cpu") => Ok(Backend::Cpu),
        Some("cuda") => Ok(Backend::Cuda),
        Some(other) => bail!("{BACKEND}={other}: it is auto, cpu or cuda"),
    }
}

/// The program with CUDA that belongs to `program`.
fn program_beside(program: &Path) -> Option<PathBuf> {
    // A link to the program is not where the others are.
    let program = program.canonicalize().ok()?;
    let mut found = PLACES.iter().filter_map(|place| program.parent()?.join(place).canonicalize().ok());
    // A build without CUDA under that name would start itself for ever.
    found.find(|other| other.is_file() && *other != program)
}

/// `LD_LIBRARY_PATH` with the folders that the loader does not know.
fn library_path(search: &LibrarySearch) -> Option<OsString> {
    let mut added: Vec<PathBuf> = Vec::new();
    let libraries = LINKED.iter().chain(&OPENED).filter_map(|library| library.find(search));
    for file in libraries.chain(search.driver()) {
        let Some(folder) = file.parent() else { continue };
        if !search.is_loaders(folder) && added.iter().all(|known| known != folder) {
            added.push(folder.to_owned());
        }
    }
    if added.is_empty() {
        return None;
    }
    let given: Vec<PathBuf> =
        search.variable("LD_LIBRARY_PATH").map(|value| env::split_paths(value).collect()).unwrap_or_default();
    // A folder with the separator in its name cannot be given to the loader at all.
    env::join_paths(given.into_iter().chain(added)).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A system with files, and `bin/qlora` under `/home/u`.
    struct System(tempfile::TempDir);

    impl System {
        fn with(files: &[&str]) -> Self {
            let system = Self(tempfile::tempdir().unwrap());
            system.put("home/u/bin/qlora");
            files.iter().for_each(|file| system.put(file));
            system
        }

        fn path(&self, file: &str) -> PathBuf {
            self.0.path().canonicalize().unwrap().join(file)
        }

        fn put(&self, file: &str) {
            fs::create_dir_all(self.path(file).parent().unwrap()).unwrap();
            fs::write(self.path(file), "").unwrap();
        }

        fn search(&self, variables: &[(&str, &str)]) -> LibrarySearch {
            let variables = variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
            LibrarySearch::under(&self.path(""), &self.path("home/u/bin/qlora"), variables)
        }

        fn find(&self, variables: &[(&str, &str)]) -> Cuda {
            Cuda::find(&self.search(variables)).unwrap()
        }
    }

    const PROGRAM: &str = "home/u/libexec/qlora/qlora-cuda";
    const DRIVER: &str = "usr/lib/x86_64-linux-gnu/libcuda.so.1";
    const CARD: &str = "dev/nvidia0";
    const WHEELS: &str = "home/u/lib/python3.11/site-packages/nvidia";

    fn wheels(system: &System) {
        for library in LINKED.iter().chain(&OPENED) {
            system.put(&format!("{WHEELS}/{}/lib/{}", library.folder, library.file));
        }
    }

    #[test]
    fn what_is_not_there_is_told_apart() {
        assert_eq!(System::with(&[DRIVER, CARD]).find(&[]), Cuda::NotInstalled);
        assert_eq!(System::with(&[PROGRAM]).find(&[]), Cuda::NoDriver);
        assert_eq!(System::with(&["home/u/bin/qlora-cuda", DRIVER]).find(&[]), Cuda::NoCard);
        let system = System::with(&[PROGRAM, DRIVER, CARD]);
        assert_eq!(system.find(&[]), Cuda::Missing(LINKED.iter().collect()));
        assert_eq!(system.find(&[(BACKEND, "cpu")]), Cuda::NotWanted);
        let error = Cuda::find(&system.search(&[(BACKEND, "gpu")])).unwrap_err().to_string();
        assert!(error.contains("auto, cpu or cuda"), "{error}");
    }

    #[test]
    fn a_card_is_not_asked_for_where_cuda_is_wanted() {
        let system = System::with(&[PROGRAM, DRIVER]);
        assert_eq!(system.find(&[]), Cuda::NoCard);
        assert_eq!(system.find(&[(BACKEND, "cuda")]), Cuda::Missing(LINKED.iter().collect()));
    }

    #[test]
    fn pythons_wheels_are_given_to_the_loader() {
        let system = System::with(&[PROGRAM, DRIVER, CARD]);
        wheels(&system);
        let wheel = |folder: &str| system.path(&format!("{WHEELS}/{folder}/lib"));
        let added = [wheel("cu13"), wheel("cudnn"), wheel("nccl")];
        let ready = |path: &[PathBuf]| Cuda::Ready {
            program: system.path(PROGRAM),
            library_path: Some(env::join_paths(path).unwrap()),
        };
        assert_eq!(system.find(&[]), ready(&added));
        // What the user set goes before.
        let mut all = vec![PathBuf::from("/mine")];
        all.extend(added);
        assert_eq!(system.find(&[("LD_LIBRARY_PATH", "/mine")]), ready(&all));
    }

    #[test]
    fn the_loader_is_told_nothing_that_it_knows() {
        let system = System::with(&[PROGRAM, DRIVER, CARD]);
        LINKED.iter().for_each(|library| system.put(&format!("usr/lib64/{}", library.file)));
        assert_eq!(system.find(&[]), Cuda::Ready { program: system.path(PROGRAM), library_path: None });
        // WSL's driver lies where the loader may not look.
        fs::remove_file(system.path(DRIVER)).unwrap();
        system.put("usr/lib/wsl/lib/libcuda.so.1");
        let wsl = system.path("usr/lib/wsl/lib").into_os_string();
        assert_eq!(system.find(&[]), Cuda::Ready { program: system.path(PROGRAM), library_path: Some(wsl) });
    }

    #[test]
    fn the_advice_names_each_package_once() {
        let system = System::with(&[PROGRAM, DRIVER, CARD]);
        wheels(&system);
        fs::remove_file(system.path(&format!("{WHEELS}/cu13/lib/libcublas.so.13"))).unwrap();
        fs::remove_file(system.path(&format!("{WHEELS}/cu13/lib/libcublasLt.so.13"))).unwrap();
        let advice = |search: &LibrarySearch| {
            let (what, advice) = Cuda::find(search).unwrap().obstacle(search).unwrap();
            assert_eq!(what, "missing: libcublas.so.13, libcublasLt.so.13");
            advice
        };
        let text = advice(&system.search(&[]));
        assert!(text.starts_with("pip install 'nvidia-cublas==13.*';"), "{text}");
        system.put("home/u/bin/python3");
        let text = advice(&system.search(&[]));
        let python = system.path("home/u/bin/python3");
        assert!(text.starts_with(&format!("{} -m pip install 'nvidia-cublas==13.*';", python.display())), "{text}");
    }

    #[test]
    fn a_program_does_not_start_itself() {
        let system = System::with(&[PROGRAM, DRIVER, CARD]);
        let itself = LibrarySearch::under(&system.path(""), &system.path(PROGRAM), []);
        assert_eq!(Cuda::find(&itself).unwrap(), Cuda::NotInstalled);
    }
}
