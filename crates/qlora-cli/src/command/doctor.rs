//! `qlora doctor`.

mod ranks;

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use qlora::kernels::libraries::LibrarySearch;
use serde_json::{Map, Value, json};

#[cfg(feature = "cuda")]
use crate::cuda_libraries::{self, OPENED};
use crate::output::{self, BAD, GOOD, TITLE, WARNING};

/// Says what this machine can do: GPU, driver, libraries, memory, disk, several ranks, hub; and what is missing and how to get it.
#[derive(clap::Args)]
#[command(after_help = "The exit code is 1 if something is wrong that stops every run.")]
pub(crate) struct Args {
    /// Prints JSON.
    #[arg(long)]
    json: bool,
    /// Tries whether another host of a run can be reached from here; may be given again.
    #[arg(long, value_name = "HOST:PORT")]
    peer: Vec<String>,
}

/// The severity of a finding.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Good,
    /// Something that is not there and may be wanted.
    Missing,
    /// Something that stops runs.
    Wrong,
}

/// One thing that was looked at.
struct Finding {
    name: &'static str,
    state: State,
    text: String,
    /// Advice on how to fix the finding.
    hint: Option<String>,
}

impl Finding {
    fn good(name: &'static str, text: impl Into<String>) -> Self {
        Self { name, state: State::Good, text: text.into(), hint: None }
    }

    fn missing(name: &'static str, text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, state: State::Missing, text: text.into(), hint: Some(hint.into()) }
    }

    fn wrong(name: &'static str, text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, state: State::Wrong, text: text.into(), hint: Some(hint.into()) }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let findings: Vec<Finding> =
        [vec![program(), processor()], memory(), disk(), gpu(), ranks::findings(&args.peer), hub()]
            .into_iter()
            .flatten()
            .collect();
    if args.json {
        let entry = |finding: &Finding| {
            let state = match finding.state {
                State::Good => "good",
                State::Missing => "missing",
                State::Wrong => "wrong",
            };
            (finding.name.to_owned(), json!({ "state": state, "text": finding.text, "hint": finding.hint }))
        };
        output::print_json(&Value::Object(findings.iter().map(entry).collect::<Map<_, _>>()))?;
    } else {
        let mut text = String::new();
        for Finding { name, state, text: found, hint } in &findings {
            let (mark, style) = match state {
                State::Good => ("ok", GOOD),
                State::Missing => ("--", WARNING),
                State::Wrong => ("!!", BAD),
            };
            text += &format!("{style}{mark}{style:#} {TITLE}{name:12}{TITLE:#} {found}\n");
            text.extend(hint.iter().map(|hint| format!("{:16}{hint}\n", "")));
        }
        output::print(&text)?;
    }
    match findings.iter().any(|finding| finding.state == State::Wrong) {
        true => anyhow::bail!("a run would fail here"),
        false => Ok(()),
    }
}

fn program() -> Finding {
    let features = [
        ("cuda", cfg!(feature = "cuda")),
        ("hub", cfg!(feature = "hub")),
        ("parquet", cfg!(feature = "parquet")),
        ("object-store", cfg!(feature = "object-store")),
    ];
    let features: Vec<&str> = features.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    let features = if features.is_empty() { "none".to_owned() } else { features.join(", ") };
    Finding::good("qlora", format!("{}, built with: {features}", env!("CARGO_PKG_VERSION")))
}

fn processor() -> Finding {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    #[cfg(target_arch = "x86_64")]
    let simd = match (std::is_x86_feature_detected!("avx512f"), std::is_x86_feature_detected!("avx2")) {
        (true, _) => ", AVX-512",
        (false, true) => ", AVX2",
        (false, false) => ", neither AVX2 nor AVX-512: slow",
    };
    #[cfg(not(target_arch = "x86_64"))]
    let simd = "";
    Finding::good("processor", format!("{threads} threads, {}{simd}", std::env::consts::ARCH))
}

fn memory() -> Vec<Finding> {
    // Linux alone says it in a file.
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else { return Vec::new() };
    let of = |name: &str| -> Option<f64> {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? * 1024.0 / 1e9)
    };
    match (of("MemAvailable:"), of("MemTotal:")) {
        (Some(free), Some(all)) => vec![Finding::good("memory", format!("{free:.1} GB free of {all:.1} GB"))],
        _ => Vec::new(),
    }
}

fn disk() -> Vec<Finding> {
    let Ok(free) = fs4::available_space(Path::new(".")) else { return Vec::new() };
    let gigabytes = free as f64 / 1e9;
    vec![match gigabytes < 2.0 {
        true => Finding::missing(
            "disk",
            format!("{gigabytes:.1} GB free here"),
            "checkpoints and merged models may not fit",
        ),
        false => Finding::good("disk", format!("{gigabytes:.1} GB free here")),
    }]
}

/// The GPUs as `nvidia-smi` lists them: name, driver version, memory, compute capability; none if the tool is missing.
fn nvidia_smi() -> Option<String> {
    let query = ["--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"];
    let output = Command::new("nvidia-smi").args(query).output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; ");
    (!text.is_empty()).then_some(text)
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> Vec<Finding> {
    use crate::front::Cuda;

    let search = LibrarySearch::of_this_process();
    let driver = nvidia_smi();
    let cuda = match Cuda::find(&search) {
        Ok(cuda) => cuda,
        Err(error) => return vec![Finding::wrong("GPU", error.to_string(), "change the variable, or unset it")],
    };
    let finding = match (cuda.obstacle(&search), &cuda) {
        // The program has been started if it could be.
        (None, _) => Finding::wrong("GPU", "qlora-cuda, beside this program, does not start", "install it again"),
        (Some((what, advice)), Cuda::Missing(_)) => Finding::wrong("GPU", what, advice),
        (Some((what, advice)), Cuda::NotInstalled) => match &driver {
            Some(found) => Finding::missing("GPU", format!("{found}; {what}"), advice),
            None => Finding::missing("GPU", format!("no NVIDIA driver found; {CPU_ONLY}"), advice),
        },
        (Some((what, advice)), Cuda::NoDriver | Cuda::NoCard) => {
            Finding::missing("GPU", format!("{what}; {CPU_ONLY}"), advice)
        }
        (Some((what, advice)), _) => Finding::missing("GPU", what, advice),
    };
    vec![finding]
}

#[cfg(not(feature = "cuda"))]
const CPU_ONLY: &str = "runs use the CPU, which suits models up to about 1B";

/// What is opened at run time, where it is and what brings it.
#[cfg(feature = "cuda")]
fn libraries() -> Finding {
    let search = LibrarySearch::of_this_process();
    let (there, missing): (Vec<_>, Vec<_>) = OPENED.iter().partition(|library| library.find(&search).is_some());
    match missing.is_empty() {
        true => Finding::good("libraries", cuda_libraries::names(&there)),
        false => Finding::missing(
            "libraries",
            format!("missing: {}; they are optional", cuda_libraries::names(&missing)),
            cuda_libraries::pip_command(&search, &missing),
        ),
    }
}

#[cfg(feature = "cuda")]
fn gpu() -> Vec<Finding> {
    use qlora::model::DeviceChoice;

    let driver = nvidia_smi();
    let workspace = match DeviceChoice::Cuda(0).open(None, None) {
        Ok(workspace) => workspace,
        Err(error) => {
            let hint = match &driver {
                Some(found) => format!("the driver sees: {found}"),
                None => {
                    "nvidia-smi does not answer: install NVIDIA's driver, or leave this to the CPU (device = \"cpu\")"
                        .to_owned()
                }
            };
            return vec![Finding::missing("GPU", error.to_string(), hint)];
        }
    };
    let mut findings = vec![libraries()];
    if let Some(gpu) = workspace.gpu() {
        findings.push(Finding::good("GPU", driver.unwrap_or_else(|| gpu.name())));
        findings.push(Finding::good("attention", gpu.attention().describe()));
    }
    findings
}

#[cfg(not(feature = "hub"))]
fn hub() -> Vec<Finding> {
    vec![Finding::missing("hub", "this program was built without access to it", "build with the feature `hub`")]
}

#[cfg(feature = "hub")]
fn hub() -> Vec<Finding> {
    use qlora::hub::HubStatus;
    use qlora::open::OpenOptions;

    let status = match HubStatus::of(&OpenOptions::default()) {
        Ok(status) => status,
        Err(error) => {
            return vec![Finding::wrong("hub", error.to_string(), "set HF_HOME to a folder that can be written")];
        }
    };
    let token = match status.token_source {
        Some(source) => Finding::good("token", format!("from {source}")),
        None => {
            Finding::missing("token", "none: gated models are not accessible", "set HF_TOKEN, or run `hf auth login`")
        }
    };
    let hub = match (status.offline, status.reachable) {
        (true, _) => Finding::missing(
            "hub",
            "offline (HF_HUB_OFFLINE): models come from the cache alone",
            "unset HF_HUB_OFFLINE",
        ),
        (false, Ok(())) => Finding::good("hub", format!("{} answers", status.endpoint)),
        (false, Err(reason)) => Finding::missing(
            "hub",
            format!("{}: {reason}", status.endpoint),
            "models come from folders and the cache; HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy",
        ),
    };
    vec![hub, token, Finding::good("cache", status.cache.display().to_string())]
}
