//! An installation for GPUs: this program finds what the one with CUDA needs and is replaced by it. Libraries and programs are
//! stand-ins; what is found where is tested beside the code.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Stands in for the program with CUDA: says what it was given, and ends with a code of its own.
const SCRIPT: &str = "#!/bin/sh\necho \"cuda: $*\"\necho \"path: $LD_LIBRARY_PATH\"\nexit 7\n";

const WHEELS: [&str; 7] = [
    "cu13/lib/libcudart.so.13",
    "cu13/lib/libcublas.so.13",
    "cu13/lib/libcublasLt.so.13",
    "cu13/lib/libcurand.so.10",
    "cu13/lib/libnvrtc.so.13",
    "cudnn/lib/libcudnn.so.9",
    "nccl/lib/libnccl.so.2",
];

/// An environment of Python's with the programs and NVIDIA's wheels, and a folder with a driver.
struct Installation(tempfile::TempDir);

impl Installation {
    fn new() -> Self {
        let installation = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(installation.path("bin")).unwrap();
        let program = installation.path("bin/qlora");
        if fs::hard_link(super::QLORA, &program).is_err() {
            fs::copy(super::QLORA, &program).unwrap();
        }
        let cuda = installation.path("libexec/qlora/qlora-cuda");
        put(&cuda, SCRIPT);
        fs::set_permissions(&cuda, fs::Permissions::from_mode(0o755)).unwrap();
        WHEELS.iter().for_each(|file| put(&installation.wheels().join(file), ""));
        put(&installation.path("driver/libcuda.so.1"), "");
        installation
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().canonicalize().unwrap().join(file)
    }

    fn wheels(&self) -> PathBuf {
        self.path("lib/python3.12/site-packages/nvidia")
    }

    /// Runs `qlora` with a backend, where the loader is told of the driver.
    fn run(&self, program: &Path, backend: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.0.path()).env("HF_HUB_OFFLINE", "1").env("QLORA_BACKEND", backend);
        command.env("LD_LIBRARY_PATH", self.path("driver"));
        // A process that another test has just started may still hold a program that was written here.
        for _ in 0..100 {
            match command.output() {
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                    std::thread::sleep(std::time::Duration::from_millis(50));
                }
                output => return output.unwrap(),
            }
        }
        panic!("{} stays busy", program.display());
    }
}

fn put(file: &Path, text: &str) {
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, text).unwrap();
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_program_with_cuda_takes_over_and_is_told_of_the_libraries() {
    let installation = Installation::new();
    let wheels = installation.wheels();
    let folders =
        [installation.path("driver"), wheels.join("cu13/lib"), wheels.join("cudnn/lib"), wheels.join("nccl/lib")];
    let folders = std::env::join_paths(folders).unwrap().into_string().unwrap();
    let said = format!("cuda: generate --model a b c\npath: {folders}\n");
    let run = |program: &Path| installation.run(program, "cuda", &["generate", "--model", "a", "b c"]);

    let output = run(&installation.path("bin/qlora"));
    assert_eq!((text(&output.stdout), output.status.code()), (said.clone(), Some(7)), "{}", text(&output.stderr));

    // Also through a link from elsewhere.
    let link = installation.path("qlora");
    std::os::unix::fs::symlink(installation.path("bin/qlora"), &link).unwrap();
    assert_eq!(text(&run(&link).stdout), said);
}

#[test]
fn commands_that_need_no_gpu_stay_here() {
    let installation = Installation::new();
    let program = installation.path("bin/qlora");
    let output = installation.run(&program, "cuda", &["--version"]);
    assert_eq!(text(&output.stdout), format!("qlora {}\n", env!("CARGO_PKG_VERSION")));
    let output = installation.run(&program, "cuda", &["completions", "bash"]);
    assert!(output.status.success() && text(&output.stdout).contains("_qlora"), "{}", text(&output.stderr));
}

#[test]
fn the_cpu_can_be_asked_for() {
    let installation = Installation::new();
    let output = installation.run(&installation.path("bin/qlora"), "cpu", &["generate", "--model", "none", "text"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty() && said.contains("no such file or folder"), "{said}");
}

#[test]
fn wishes_that_cannot_be_met_are_errors() {
    let installation = Installation::new();
    let program = installation.path("bin/qlora");
    let refused = |backend: &str| {
        let output = installation.run(&program, backend, &["generate", "--model", "none", "text"]);
        assert_eq!(output.status.code(), Some(1));
        text(&output.stderr)
    };
    let said = refused("gpu");
    assert!(said.contains("QLORA_BACKEND=gpu: it is auto, cpu or cuda"), "{said}");

    let cuda = installation.path("libexec/qlora/qlora-cuda");
    fs::set_permissions(&cuda, fs::Permissions::from_mode(0o644)).unwrap();
    let said = refused("cuda");
    assert!(said.contains("qlora-cuda does not start") && said.contains("QLORA_BACKEND=cpu"), "{said}");

    fs::remove_file(&cuda).unwrap();
    let said = refused("cuda");
    assert!(said.contains("no qlora-cuda beside it") && said.contains("pip install 'qlora-cli[cuda]'"), "{said}");
}

#[test]
fn doctor_tells_the_state_instead_of_ending_with_it() {
    let installation = Installation::new();
    let program = installation.path("bin/qlora");
    let doctor = |backend: &str| {
        let output = installation.run(&program, backend, &["doctor", "--json"]);
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (found["GPU"]["state"].as_str().unwrap().to_owned(), found["GPU"]["text"].as_str().unwrap().to_owned())
    };
    assert_eq!(doctor("cpu"), ("missing".to_owned(), "QLORA_BACKEND=cpu".to_owned()));
    assert_eq!(doctor("gpu").0, "wrong");
    fs::set_permissions(installation.path("libexec/qlora/qlora-cuda"), fs::Permissions::from_mode(0o644)).unwrap();
    let (state, said) = doctor("cuda");
    assert!(state == "wrong" && said.contains("does not start"), "{said}");
}
