//! Mutations of valid files for every parser: none may panic, hang, or take much memory.
//!
//! `cargo test --test fuzz` runs a small number of inputs; `scripts/fuzz.sh` runs a million and writes `tests/fuzz/results.csv`.
//! Every input follows from seed, parser and index alone; `-- --seed S --only PARSER --index I` runs one again and writes it to
//! a file. An input passes the first check if the outermost syntax is right: JSON, TOML, a safetensors header that is JSON,
//! GGUF's magic and version, a template that compiles. Results: inputs, how many passed it, how many the parser accepted.

mod mutate;
mod mutate_files;
#[path = "../common/random_folder.rs"]
mod random_folder;
mod seeds;
mod targets;
mod targets_text;

use std::any::Any;
use std::fmt::Write as _;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use peak_alloc::PeakAlloc;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use targets::Target;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// The most memory that one input may take, in bytes. The largest seed has 100 KB.
const MEMORY_LIMIT: usize = 512 << 20;
/// The longest that one input may take.
const TIME_LIMIT: Duration = Duration::from_secs(2);
/// After this long an input counts as hanging, and the process ends.
const HANG: Duration = Duration::from_secs(60);
/// Failures that are kept for each parser.
const KEPT: usize = 20;

struct Options {
    count: u64,
    seed: u64,
    only: Option<String>,
    index: Option<u64>,
    results: Option<PathBuf>,
}

/// The options; none if the arguments, which are the test harness's, choose other tests.
fn options() -> anyhow::Result<Option<Options>> {
    let mut options = Options { count: 20_000, seed: 1, only: None, index: None, results: None };
    let mut arguments = std::env::args().skip(1);
    let mut chosen = true;
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} takes a value"));
        match argument.as_str() {
            "--count" => options.count = value()?.parse()?,
            "--seed" => options.seed = value()?.parse()?,
            "--only" => options.only = Some(value()?),
            "--index" => options.index = Some(value()?.parse()?),
            "--results" => options.results = Some(value()?.into()),
            "--list" => {
                println!("fuzz: test");
                return Ok(None);
            }
            "--ignored" => return Ok(None),
            "--test-threads" | "--skip" | "--format" | "--color" => drop(value()?),
            flag if flag.starts_with('-') => {}
            filter => chosen = "fuzz".contains(filter),
        }
    }
    Ok(chosen.then_some(options))
}

fn main() -> ExitCode {
    match options().and_then(|options| options.as_ref().map_or(Ok(()), run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fuzz: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Counts of the inputs of one parser, by result.
#[derive(Default)]
struct Tally {
    inputs: u64,
    passed: u64,
    accepted: u64,
    longest: Duration,
    most_memory: usize,
    failures: u64,
    /// The index of an input and what it did.
    kept: Vec<(u64, String)>,
}

fn run(options: &Options) -> anyhow::Result<()> {
    let folder = if Path::new("/dev/shm").is_dir() { tempfile::tempdir_in("/dev/shm") } else { tempfile::tempdir() }?;
    let mut targets = targets::all(folder.path())?;
    targets.retain(|target| options.only.as_ref().is_none_or(|name| target.name == *name));
    ensure!(!targets.is_empty(), "there is no parser of that name");
    let panics = catch_panics();
    let hang = watch();

    if let Some(index) = options.index {
        return run_one(&targets, options.seed, index, &panics);
    }
    let weights: u64 = targets.iter().map(|target| target.weight).sum();
    let mut results =
        "parser,seed,inputs,passed_first_check,share,accepted,longest_ms,most_memory_mb,failures\n".to_owned();
    let mut total = Tally::default();
    for target in &targets {
        let inputs = (options.count * target.weight).div_ceil(weights);
        let tally = fuzz(target, options.seed, inputs, &panics, &hang);
        write_row(&mut results, target.name, options.seed, &tally);
        eprint!("{}", results.lines().next_back().map(|row| row.to_owned() + "\n").unwrap_or_default());
        for (index, what) in &tally.kept {
            let seed = options.seed;
            eprintln!(
                "  {what}\n    again: cargo test --test fuzz -- --seed {seed} --only {} --index {index}",
                target.name
            );
        }
        total.inputs += tally.inputs;
        total.passed += tally.passed;
        total.accepted += tally.accepted;
        total.failures += tally.failures;
        total.longest = total.longest.max(tally.longest);
        total.most_memory = total.most_memory.max(tally.most_memory);
    }
    write_row(&mut results, "all", options.seed, &total);
    println!("{results}");
    if let Some(path) = &options.results {
        fs::write(path, &results).with_context(|| path.display().to_string())?;
    }
    ensure!(total.failures == 0, "{} inputs failed", total.failures);
    // Otherwise the mutations would only show that syntax errors are noticed.
    ensure!(
        total.passed * 10 >= total.inputs * 3,
        "only {} of {} inputs passed the first check",
        total.passed,
        total.inputs
    );
    Ok(())
}

fn write_row(results: &mut String, name: &str, seed: u64, tally: &Tally) {
    let Tally { inputs, passed, accepted, longest, most_memory, failures, .. } = tally;
    let share = *passed as f64 / *inputs as f64;
    let megabytes = *most_memory as f64 / 1e6;
    let longest = longest.as_millis();
    let row = format!("{name},{seed},{inputs},{passed},{share:.3},{accepted},{longest},{megabytes:.1},{failures}");
    writeln!(results, "{row}").expect("text can always be written to");
}

fn fuzz(target: &Target, seed: u64, inputs: u64, panics: &Panics, hang: &AtomicU64) -> Tally {
    let mut tally = Tally { inputs, ..Tally::default() };
    for index in 0..inputs {
        let (which, input) = make(target, seed, index);
        tally.passed += u64::from((target.passes)(&input));
        let before = MEMORY.current_usage();
        MEMORY.reset_peak_usage();
        hang.store(now(), Ordering::Relaxed);
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| (target.run)(which, &input)));
        let time = start.elapsed();
        hang.store(0, Ordering::Relaxed);
        let memory = MEMORY.peak_usage().saturating_sub(before);
        tally.longest = tally.longest.max(time);
        tally.most_memory = tally.most_memory.max(memory);
        let failure = match result {
            Err(panic) => Some(panics.text(&*panic)),
            _ if time > TIME_LIMIT => Some(format!("took {time:?}")),
            _ if memory > MEMORY_LIMIT => Some(format!("took {} MB", memory / 1_000_000)),
            Ok(accepted) => {
                tally.accepted += u64::from(accepted);
                None
            }
        };
        if let Some(failure) = failure {
            tally.failures += 1;
            // Of failures that say the same, one is enough.
            if tally.kept.len() < KEPT && tally.kept.iter().all(|(_, known)| *known != failure) {
                tally.kept.push((index, failure));
            }
        }
    }
    tally
}

/// Runs one input of each chosen parser, and keeps it in a file.
fn run_one(targets: &[Target], seed: u64, index: u64, panics: &Panics) -> anyhow::Result<()> {
    for target in targets {
        let (which, input) = make(target, seed, index);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}-{index}", target.name));
        fs::write(&path, &input)?;
        eprintln!("{} (of seed file {which}), passes the first check: {}", path.display(), (target.passes)(&input));
        match catch_unwind(AssertUnwindSafe(|| (target.run)(which, &input))) {
            Ok(accepted) => eprintln!("accepted: {accepted}"),
            Err(panic) => bail!("{}", panics.text(&*panic)),
        }
    }
    Ok(())
}

/// The input of an index: which valid file it comes from, and its bytes.
fn make(target: &Target, seed: u64, index: u64) -> (usize, Vec<u8>) {
    let mut state = [0; 32];
    let name = target.name.as_bytes();
    state[..8].copy_from_slice(&seed.to_le_bytes());
    state[8..16].copy_from_slice(&index.to_le_bytes());
    let length = name.len().min(16);
    state[16..16 + length].copy_from_slice(&name[..length]);
    let mut rng = ChaCha8Rng::from_seed(state);
    let which = mutate::below(&mut rng, target.files.len());
    let other = mutate::below(&mut rng, target.files.len());
    (which, (target.mutate)(&mut rng, &target.files[which], &target.files[other]))
}

/// The message of the last panic.
struct Panics(Arc<Mutex<String>>);

fn catch_panics() -> Panics {
    let last = Arc::new(Mutex::new(String::new()));
    let place = last.clone();
    std::panic::set_hook(Box::new(move |info| {
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        *place.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = location;
    }));
    Panics(last)
}

impl Panics {
    fn text(&self, panic: &(dyn Any + Send)) -> String {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let location = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Numbers differ from input to input.
        let text: String =
            text.unwrap_or("?").chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).take(200).collect();
        format!("panicked at {location}: {text}")
    }
}

fn now() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_millis() as u64 + 1
}

/// Ends the process if an input never comes back. The returned number is when the current one began, 0 between inputs.
fn watch() -> Arc<AtomicU64> {
    let began = Arc::new(AtomicU64::new(0));
    let watched = began.clone();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let began = watched.load(Ordering::Relaxed);
            if began > 0 && now().saturating_sub(began) > HANG.as_millis() as u64 {
                eprintln!("fuzz: an input hangs");
                std::process::abort();
            }
        }
    });
    began
}
