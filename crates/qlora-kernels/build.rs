//! With the feature `cuda`: compiles `kernels/*.cu` with nvcc into one static library of C launchers.
//!
//! `CUDA_COMPUTE_CAP` chooses the architecture, as for candle: `90`. `QLORA_CUDA_ARCHS` chooses several for our kernels,
//! such as `80,90` (candle's own are then to be built for the oldest, `CUDA_COMPUTE_CAP=80`: the driver translates them).
//! Without either the GPU of this machine is asked (`nvidia-smi`). A machine without a GPU builds with the variable set and
//! a toolkit on `PATH` or in `CUDA_HOME`.
//!
//! `QLORA_CUDA_PTX_ONLY=75` is for tests: no machine code at all, only the intermediate code (PTX) of one architecture, which
//! the driver of any newer GPU translates. With `QLORA_DEVICE_LIMITS` (`device_limits.rs`) such a program runs there as it
//! would on a card of that architecture. It goes before the other two.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest architecture whose tensor cores load fragments from shared memory (`ldmatrix`): Turing.
const OLDEST: u32 = 75;

/// Intermediate code of one architecture instead of machine code.
const PTX_ONLY: &str = "QLORA_CUDA_PTX_ONLY";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in
        [PTX_ONLY, "QLORA_CUDA_ARCHS", "CUDA_COMPUTE_CAP", "CUDA_HOME", "CUDA_PATH", "NVCC", "NVCC_CCBIN", "PATH"]
    {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=kernels");
    if let Err(message) = build() {
        println!("cargo::error={message}");
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let nvcc = nvcc();
    let targets = targets()?;
    // Hopper's own instructions came with CUDA 12; older toolkits make its kernels as for an A100.
    let wgmma = major_version(&nvcc).is_none_or(|major| major >= 12);
    let sources = sources(Path::new("kernels"))?;
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(sources.len());
    let next = std::sync::atomic::AtomicUsize::new(0);
    let compile_all = || -> Result<(), String> {
        loop {
            let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(source) = sources.get(index) else { return Ok(()) };
            compile(&nvcc, source, &object(&out, source), &targets, wgmma)?;
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(compile_all)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a compile thread panicked".to_owned())?)
    })?;
    let library = out.join("libqlora_cuda.a");
    // `ar` would keep objects of sources that are gone.
    let _ = std::fs::remove_file(&library);
    let objects = sources.iter().map(|source| object(&out, source));
    run(Command::new("ar").arg("crs").arg(&library).args(objects))?;
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=qlora_cuda");
    println!("cargo::rustc-link-lib=dylib=cudart");
    println!("cargo::rustc-link-lib=dylib=stdc++");
    Ok(())
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = std::env::var_os("NVCC") {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let found = homes.map(|home| home.join("bin/nvcc")).find(|nvcc| nvcc.exists());
    let usual = PathBuf::from("/usr/local/cuda/bin/nvcc");
    let on_path = Command::new("nvcc").arg("--version").output().is_ok();
    match found {
        Some(nvcc) => nvcc,
        None if !on_path && usual.exists() => usual,
        None => "nvcc".into(),
    }
}

/// The toolkit's major version, where `nvcc` says it: `Cuda compilation tools, release 13.0, V13.0.88`.
fn major_version(nvcc: &Path) -> Option<u32> {
    let output = Command::new(nvcc).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (_, release) = text.split_once("release ")?;
    release.split('.').next()?.parse().ok()
}

/// The architectures to compile for.
enum Targets {
    /// Machine code for these architectures, and intermediate code for what is newer.
    Machine(Vec<String>),
    /// Intermediate code for this architecture.
    Ptx(String),
}

fn targets() -> Result<Targets, String> {
    let set = |name: &'static str| std::env::var(name).ok().map(|text| (text, name));
    if let Some((text, origin)) = set(PTX_ONLY).filter(|(text, _)| !text.trim().is_empty()) {
        let mut found = architectures(&text, origin)?;
        return match found.len() {
            1 => Ok(Targets::Ptx(found.remove(0))),
            count => Err(format!("{origin} names {count} architectures; it takes one")),
        };
    }
    let (text, origin) = match set("QLORA_CUDA_ARCHS").or_else(|| set("CUDA_COMPUTE_CAP")) {
        Some(found) => found,
        None => {
            let output = Command::new("nvidia-smi").args(["--query-gpu=compute_cap", "--format=csv,noheader"]).output();
            let text = output.ok().filter(|output| output.status.success());
            let text = text.ok_or(
                "which GPU to compile for? Set CUDA_COMPUTE_CAP (75 for T4 and RTX 20, 80 for A100, 86 for RTX 30, 89 for RTX 40, 90 for H100, \
                 100 for B200, 120 for RTX 50); without it, nvidia-smi is asked, and it did not answer",
            )?;
            (String::from_utf8_lossy(&text.stdout).into_owned(), "nvidia-smi")
        }
    };
    architectures(&text, origin).map(Targets::Machine)
}

/// The architectures that a text names, such as `["80", "90"]`.
fn architectures(text: &str, origin: &str) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    for part in text.split([',', ';', ' ', '\n']).map(str::trim).filter(|part| !part.is_empty()) {
        let part = part.replace('.', "");
        let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
        let number: u32 =
            digits.parse().map_err(|_| format!("{origin}: `{part}` is not an architecture such as 90"))?;
        if number < OLDEST {
            return Err(format!(
                "{origin} names architecture {number}; the kernels need {OLDEST} (Turing: T4, RTX 20) or later, whose tensor \
                 cores load from shared memory"
            ));
        }
        if !found.contains(&digits) {
            found.push(digits);
        }
    }
    if found.is_empty() {
        return Err(format!("{origin} names no architecture"));
    }
    Ok(found)
}

fn sources(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut sources: Vec<_> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    // The longest to compile first: two cores are then busy to the end.
    sources.sort_by_key(|path| (std::cmp::Reverse(path.metadata().map_or(0, |data| data.len())), path.clone()));
    match sources.is_empty() {
        true => Err(format!("{} has no .cu file", folder.display())),
        false => Ok(sources),
    }
}

fn object(out: &Path, source: &Path) -> PathBuf {
    out.join(source.file_stem().unwrap_or_default()).with_extension("o")
}

fn compile(nvcc: &Path, source: &Path, object: &Path, targets: &Targets, wgmma: bool) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    command.args(["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-lineinfo"]);
    // Hopper's own instructions (wgmma.cuh) are not part of `sm_90`, which later GPUs have to run too, but of `sm_90a`.
    let text = std::fs::read_to_string(source).map_err(|error| format!("{}: {error}", source.display()))?;
    let hopper = wgmma && text.contains("#include \"wgmma.cuh\"");
    let suffix = |architecture: &str| if hopper && architecture == "90" { "a" } else { "" };
    let all = match targets {
        Targets::Machine(architectures) => {
            for architecture in architectures {
                let suffix = suffix(architecture);
                command.arg(format!("-gencode=arch=compute_{architecture}{suffix},code=sm_{architecture}{suffix}"));
            }
            // A quarter of the size, unpacked by the driver. One architecture is small enough as it is.
            if architectures.len() > 1 {
                command.arg("-Xfatbin=-compress-all");
            }
            // Later GPUs compile the newest one's intermediate code when the program starts.
            if let Some(newest) = architectures.iter().max_by_key(|name| name.parse::<u32>().unwrap_or(0)) {
                command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
            }
            architectures.as_slice()
        }
        Targets::Ptx(architecture) => {
            let suffix = suffix(architecture);
            command.arg(format!("-gencode=arch=compute_{architecture}{suffix},code=compute_{architecture}{suffix}"));
            std::slice::from_ref(architecture)
        }
    };
    if all.iter().any(|architecture| !suffix(architecture).is_empty()) {
        command.arg("-DQLORA_HOPPER");
    }
    if let Some(compiler) = std::env::var_os("NVCC_CCBIN") {
        command.arg("-ccbin").arg(compiler);
    }
    run(command.arg("-c").arg(source).arg("-o").arg(object))
}

fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| {
        format!("{name} cannot be run ({error}); install the CUDA toolkit, or make one with scripts/cuda-toolkit.sh")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    Err(format!("{command:?} failed: {}", text.replace('\n', " | ")))
}
